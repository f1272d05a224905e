"""JsonReplies: how replies become JSON: UTF-8, keys in the order of the code, and never NaN or Infinity."""

import math
from typing import Any

from flask.json.provider import DefaultJSONProvider


def finite(value: Any) -> Any:
    """Return `value` with null in place of NaN and infinities, wherever they are."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def encodable(text: str) -> str:
    """Return `text` with a question mark for each half of a surrogate pair, which UTF-8 does not have."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


class JsonReplies(DefaultJSONProvider):
    """Flask's JSON, strict."""

    ensure_ascii = False
    sort_keys = False
    compact = True

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        """Return `obj` as JSON."""
        try:
            text = super().dumps(obj, allow_nan=False, **kwargs)
        except ValueError:
            text = super().dumps(finite(obj), allow_nan=False, **kwargs)
        return encodable(text)
