"""Pages of a list in OpenAI's manner: `after` is the last id a client has seen, `has_more` says whether to go on.

An `after` that is not in the list is refused: to begin again at the top would make a client read for ever.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, Field

from web.errors import Refused

MOST = 10_000
Item = TypeVar("Item")


class PageQuery(BaseModel):
    """Which part of a list."""

    after: str | None = Field(None, max_length=200, description="id of the last item of the page before")
    limit: int | None = Field(None, ge=1, le=MOST, description="most items of the page")


def page(
    items: Sequence[Item], query: PageQuery, default: int, id_of: Callable[[Item], str], show: Callable[[Item], Any]
) -> dict[str, Any]:
    """Return a page of `items`, which are in the order in which clients read them. Raises Refused (400)."""
    start = 0
    if query.after is not None:
        start = 1 + next((i for i, item in enumerate(items) if id_of(item) == query.after), len(items))
        if start > len(items):
            raise Refused(400, "after names nothing in this list", "invalid_after", "after")
    limit = default if query.limit is None else query.limit
    data = [show(item) for item in items[start : start + limit]]
    ids = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, "has_more": start + limit < len(items), **ids}
