"""Query parameters that a route does not have: /api refuses them, and repeated ones; /v1 names them in a header.

flask-openapi3 reads and checks those that a route has, the fields of its argument `query`; what it leaves
is found here, in one way for every route. Pages, /health and /metrics take no notice of it.
"""

import inspect
from typing import get_type_hints

from flask import current_app, request
from pydantic import BaseModel

from training.strict_model import unknown_field
from web.errors import Refused
from web.schemas import NoFields


def _known() -> type[BaseModel]:
    """Return the class of the current route's query."""
    route = inspect.unwrap(current_app.view_functions[str(request.endpoint)])
    known: type[BaseModel] = get_type_hints(route).get("query", NoFields)
    return known


def unknown_parameters() -> list[str]:
    """Return the names in the current request's query that its route does not have."""
    if not request.args or request.url_rule is None:
        return []
    known = _known().model_fields
    return [name for name in request.args if name not in known]


def check_names() -> None:
    """Refuse a request to /api whose query has a name that its route does not have, or one twice, as in bodies."""
    if request.path.startswith("/api/") and request.method != "OPTIONS":  # a browser's preflight, without the request
        for name in unknown_parameters():
            raise Refused(400, unknown_field(name, _known()))
        for name, values in request.args.lists():
            if len(values) > 1:
                raise Refused(400, f"{name} is given {len(values)} times; it may be given once")
