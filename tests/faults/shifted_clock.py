"""The real server and its trainers with a clock that is wrong by what the file `shift` in --root says, in seconds.

python shifted_clock.py <flags of api_server.py>            the server, whose jobs run this script
python shifted_clock.py --config … --root …                 a trainer
"""

import sys
import time
from functools import partial
from pathlib import Path

THIS = Path(__file__).resolve()
sys.path.insert(0, str(THIS.parent.parent.parent))

SHIFT = Path(sys.argv[sys.argv.index("--root") + 1]) / "shift"
right = time.time


def shifted() -> float:
    """Return the wrong time."""
    return right() + (float(SHIFT.read_text()) if SHIFT.exists() else 0)


if __name__ == "__main__":
    time.time = shifted
    if "--config" in sys.argv:
        import train

        sys.exit(train.main())
    import api_server
    from training import local_backend

    local_backend.LocalBackend = partial(local_backend.LocalBackend, script=THIS)  # type: ignore[assignment, misc]
    sys.exit(api_server.main())
