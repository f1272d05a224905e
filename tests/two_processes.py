"""train.py in two processes, as torchrun would start them by hand."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def train_in_two(argv: Sequence[str]) -> list[int]:
    """Train to the end; return the exit codes."""
    with socket.socket() as held:  # nobody else is given its port, and the first of them may listen there all the same
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        team = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1])}
        command = [sys.executable, "train.py", *argv]
        members = [
            subprocess.Popen(command, cwd=ROOT, env=os.environ | team | {"RANK": rank}, stdout=subprocess.DEVNULL)
            for rank in "01"
        ]
        try:
            return [member.wait(50) for member in members]
        finally:
            for member in members:
                member.kill()
