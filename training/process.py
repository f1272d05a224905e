"""Processes, told apart for certain: a pid alone may be somebody else's tomorrow.

A ProcessIdentity is pid, start time and boot id. A signal goes through a pidfd that was opened before the
identity was checked, so between the check and the signal no other process can slip under the number. A job's
processes are those of its session, which it leads, and of the sessions that its children lead: torchrun gives each
process one. Needs Linux's /proc.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TRAINER = "trainer.json"  # a trainer's identity, in the folder of the run that it holds
PROC = Path("/proc")
PARENT, SESSION, START_TIME = 1, 3, 19  # places in /proc/<pid>/stat, counted after the name's closing parenthesis


@dataclass(frozen=True)
class ProcessIdentity:
    """One process, on one boot of one machine."""

    pid: int
    start_time: int  # in clock ticks since the boot
    boot_id: str

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> "ProcessIdentity | None":
        """Return the identity in a file, None if there is none that makes sense."""
        if not isinstance(value, dict):
            return None
        pid, start_time, boot = value.get("pid"), value.get("start_time"), value.get("boot_id")
        if type(pid) is int and pid > 1 and type(start_time) is int and isinstance(boot, str):
            return cls(pid, start_time, boot)
        return None


def boot_id() -> str:
    """Return what tells this boot of the machine from all others."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/<pid>/stat after the name; None for no process, or a dead one not yet reaped."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields


def identify(pid: int) -> ProcessIdentity | None:
    """Return the identity of the process that has this pid now; None if there is none."""
    fields = _stat(pid)
    return None if fields is None else ProcessIdentity(pid, int(fields[START_TIME]), boot_id())


def is_alive(identity: ProcessIdentity) -> bool:
    """Say whether this very process is running."""
    return identify(identity.pid) == identity


@contextmanager
def opened(pid: int) -> Iterator[int | None]:
    """Open a pidfd, None if no process has this pid."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _send(descriptor: int | None, number: signal.Signals) -> None:
    if descriptor is not None:
        with suppress(ProcessLookupError):  # it has ended meanwhile
            signal.pidfd_send_signal(descriptor, number)


def _session_is_ours(identity: ProcessIdentity) -> bool:
    """Say whether the session of this number is the one that the process led: nobody else has its number now."""
    now = identify(identity.pid)
    return identity.boot_id == boot_id() and (now is None or now == identity)


def _stats() -> dict[int, list[str]]:
    """Return the fields of all living processes."""
    pids = [int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal()]
    return {pid: fields for pid in pids if (fields := _stat(pid)) is not None}


def children(pid: int) -> list[int]:
    """Return the living processes that `pid` has started."""
    return [child for child, fields in _stats().items() if int(fields[PARENT]) == pid]


def session(identity: ProcessIdentity) -> list[ProcessIdentity]:
    """Return the living processes of the session that `identity` leads or led, and of those that its children lead."""
    if not _session_is_ours(identity):
        return []
    stats = _stats()
    led = {pid for pid, fields in stats.items() if int(fields[PARENT]) == identity.pid and int(fields[SESSION]) == pid}
    return [
        ProcessIdentity(pid, int(fields[START_TIME]), identity.boot_id)
        for pid, fields in stats.items()
        if int(fields[SESSION]) in {identity.pid, *led} and int(fields[START_TIME]) >= identity.start_time
    ]


def signal_session(identity: ProcessIdentity, number: signal.Signals) -> int:
    """Send a signal to each process of the session, and to none other; return how many there were."""
    members = session(identity)
    for member in members:
        with opened(member.pid) as descriptor:
            if is_alive(member):
                _send(descriptor, number)
    return len(members)
