"""Compile the native step on this machine, once, into a cache; the file's name says for what it was built.

The name is a hash of sources, compiler and flags, so a changed one never loads an old library. Building
writes a file of its own and renames it: two processes that start at once both succeed. No torch here.
`python -m inference.native.build` builds ahead and ends with 0 also where it cannot; `--sanitize` builds with
AddressSanitizer and UBSan and runs the tests with it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from inference.native.machine import cpu_flags

HERE = Path(__file__).parent
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c")  # without these the step cannot be built
USEFUL = {  # these make it fast
    "avx512_bf16": "-mavx512bf16",
    "avx512_vnni": "-mavx512vnni",
    "avx512vbmi": "-mavx512vbmi",
    "3dnowprefetch": "-mprfchw",
}
FLAGS = (
    "-std=c++20",
    "-O3",
    "-ffp-contract=off",  # a product and a sum fuse only where the source says so: the same in every tile
    "-Wall",
    "-Wno-uninitialized",  # gcc 12's own headers
    "-Wno-maybe-uninitialized",
    "-fPIC",
    "-fvisibility=hidden",
    "-shared",
    "-pthread",
)
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g")
CACHE_SETTING = "LM_SERVER_NATIVE_CACHE"
SANITIZE_SETTING = "LM_SERVER_NATIVE_SANITIZE"  # for tests of the step itself


class CannotBuild(Exception):
    """The native step cannot be built or used here; the message says why."""


def missing_instructions() -> list[str]:
    """Return the needed instruction sets that this machine lacks."""
    have = cpu_flags()
    return [name for name in NEEDED if name not in have]


def screens() -> bool:
    """Say whether greatest logits are looked for in 8 bits first: both formats must be multiplied as they are."""
    return {"avx512_bf16", "avx512_vnni"} <= cpu_flags()


def compiler() -> str:
    """Return the path of the C++ compiler: CXX, or the system's. Raises CannotBuild."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)) is not None:
            return path
    raise CannotBuild("no C++ compiler: neither c++, g++ nor clang++ is installed, nor does CXX name one")


def flags() -> tuple[str, ...]:
    """Return the compiler's options for this processor."""
    extra = SANITIZE if os.environ.get(SANITIZE_SETTING) == "1" else ()
    useful = tuple(flag for name, flag in USEFUL.items() if name in cpu_flags())
    return FLAGS + tuple(f"-m{name}" for name in NEEDED) + useful + extra


def cache_folder() -> Path:
    """Return where libraries are kept: LM_SERVER_NATIVE_CACHE, or the user's cache folder."""
    if setting := os.environ.get(CACHE_SETTING):
        return Path(setting)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "language-model-api-server"


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise CannotBuild(f"the compiler {command[0]} does not run: {e}") from e


def sources() -> list[Path]:
    """Return the files that make up the library."""
    return sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")])


def _name(command: list[str]) -> str:
    digest = hashlib.sha256()
    for part in (_run([command[0], "--version"]).stdout, *command):
        digest.update(part.encode() + b"\0")
    for source in sources():
        digest.update(source.read_bytes() + b"\0")
    return f"step-{digest.hexdigest()[:16]}.so"


def library() -> Path:
    """Return the compiled library for this machine, built now if need be. Raises CannotBuild."""
    if missing := missing_instructions():
        raise CannotBuild(f"the processor has no {', '.join(missing)}")
    command, folder = [compiler(), *flags()], cache_folder()
    target = folder / _name(command)
    if target.is_file():
        return target
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".building-", suffix=".so", dir=folder)
    except OSError as e:
        raise CannotBuild(f"the cache folder {folder} cannot be written ({e.strerror}); set {CACHE_SETTING}") from e
    os.close(handle)
    try:
        done = _run([*command, str(HERE / "step.cpp"), "-o", temporary])
        if done.returncode != 0:
            said = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
            raise CannotBuild(f"{command[0]} failed: {said}")
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def run_sanitized(arguments: list[str]) -> int:
    """Run the tests of the native runner on a build with AddressSanitizer and UBSan; return pytest's status."""
    runtime = _run([compiler(), "-print-file-name=libasan.so"]).stdout.strip()
    environment = os.environ | {
        SANITIZE_SETTING: "1",
        "LD_PRELOAD": runtime,  # Python itself is not built with it
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps much until its end
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-s",
        "--timeout=900",
        "tests/test_native_packing.py",
        "tests/test_native_runner.py",
        "tests/test_native_screen.py",
        "tests/test_following.py",
        "tests/test_native_draw.py",
        *arguments,
    ]  # -s: its words
    return subprocess.run(command, cwd=HERE.parent.parent, env=environment).returncode


def main(argv: list[str]) -> int:
    """Build ahead, or with --sanitize run the tests on a checked build."""
    if argv[:1] == ["--sanitize"]:
        return run_sanitized(argv[1:])
    try:
        print(f"native step: {library()}")
    except CannotBuild as e:
        print(f"native step: not built, the torch runner will serve ({e})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
