"""The state of Python's and NumPy's global generators, as plain lists that a checkpoint can hold safely.

Our own loop draws from neither; a library might, and then a resumed run must draw the same.
"""

import random
from typing import Any

import numpy as np


def state() -> dict[str, Any]:
    """Return the state of both generators."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    numpy = [str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(cached)]
    return {"python": [version, list(numbers), gauss], "numpy": numpy}


def restore(saved: dict[str, Any]) -> None:
    """Put both generators back to a saved state."""
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
