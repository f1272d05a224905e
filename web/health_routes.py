"""/health, /healthz, /metrics, /queue, /requests/{id}, /, /docs: how the server is, and what there is to read.

/health and /healthz are open to all and say only whether the server can answer: 503 while the first model
loads and while the engine is stalled, that is, has shown no sign of life for STALLED seconds.
"""

from http import HTTPStatus
from pathlib import Path
from typing import Any

import flask_openapi3_swagger  # type: ignore[import-untyped]
from flask import Response, current_app, jsonify, request, send_from_directory
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from web.context import Context, context
from web.errors import Refused
from web.schemas import BEFORE_ROUTES, Error, Reply, RequestPath

STALLED = 4.0  # seconds without a heartbeat
STATIC = Path(__file__).parent / "static"
SWAGGER = Path(flask_openapi3_swagger.__file__).parent / "templates" / "swagger"
TEXT = {"text/plain": {"schema": {"type": "string"}}}

ERRORS: dict[str | int | HTTPStatus, Any] = dict.fromkeys((*BEFORE_ROUTES, 400, 401, 403), Error)

routes = APIBlueprint("health", __name__, abp_tags=[Tag(name="operations")], abp_responses=ERRORS)


class Health(Reply):
    """Whether the server can answer."""

    status: str
    model: str | None
    queue: dict[str, Any]


class Queue(Reply):
    """The engine's queue."""

    running: int
    waiting: int
    slots: int
    cache_tokens: int
    cache_kept: int
    cache_capacity: int
    cache_bytes: int
    cache_saved: int
    drafted_tokens: int
    accepted_tokens: int
    tokens_per_second: float


class RequestState(Reply):
    """One generation request."""

    id: str
    state: str


def _state(ctx: Context) -> str:
    if ctx.closing.is_set():
        return "stopping"
    if ctx.loader.starting and ctx.engine.served() is None:
        return "loading"
    return "stalled" if ctx.engine.heartbeat_age() > STALLED else "ok"


def _health() -> Response:
    ctx = context()
    info, served = ctx.engine.info(), ctx.engine.served()
    state = _state(ctx)
    model = None if served is None else served.id
    response = jsonify({"status": state, "model": model, "queue": info})
    if state != "ok":
        response.status_code = 503
        response.headers["Retry-After"] = "1"
    return response


@routes.get("/health", responses={200: Health, 503: Health})
def health() -> Response:
    """Tell whether the server can answer, with queue and model."""
    return _health()


@routes.get("/healthz", responses={200: Health, 503: Health})
def healthz() -> Response:
    """Tell whether the server can answer."""
    return _health()


@routes.get("/queue", responses={200: Queue})
def queue() -> dict[str, Any]:
    """Tell the engine's figures: running, waiting, slots, cache, tokens per second."""
    ctx = context()
    return ctx.engine.info() | {"open_requests": ctx.streams.open}


@routes.get("/requests/<request_id>", responses={200: RequestState, 404: Error})
def request_state(path: RequestPath) -> dict[str, Any]:
    """Tell the state of a generation request by its X-Request-Id, also for a while after its end."""
    found = context().engine.request(path.request_id)
    if found is None:
        raise Refused(404, "no request of this id runs, waits or has lately ended")
    return found


@routes.get("/metrics", responses={200: {"description": "Prometheus metrics", "content": TEXT}})
def metrics() -> Response:
    """Return the counters for Prometheus."""
    return Response(context().metrics.text(), mimetype="text/plain; version=0.0.4")


@routes.route("/")
def index() -> Response:
    """Return the web page to a browser, and what the server is to everyone else."""
    if request.accept_mimetypes.best_match(["application/json", "text/html"]) == "text/html":
        return send_from_directory(STATIC, "index.html")
    served = context().engine.served()
    links = {"documentation": "/docs", "openapi": "/openapi.json", "health": "/health", "status": "/api/status"}
    name = current_app.config["OPENAPI_TITLE"]
    return jsonify({"name": name, "model": None if served is None else served.id, **links})


@routes.route("/static/<path:name>")
def static(name: str) -> Response:
    """Return a file of the web page."""
    return send_from_directory(STATIC, name)


@routes.route("/favicon.ico")
def favicon() -> Response:
    """Return the icon."""
    return send_from_directory(STATIC, "favicon.svg", mimetype="image/svg+xml")


@routes.route("/docs")
def docs() -> Response:
    """Return the documentation page."""
    return send_from_directory(STATIC, "docs.html")


@routes.route("/docs/<path:name>")
def docs_file(name: str) -> Response:
    """Return a file of the documentation page, which comes with a package and from no other address."""
    return send_from_directory(SWAGGER, name)


@routes.route("/openapi.json")
def openapi() -> Response:
    """Return the OpenAPI document."""
    return jsonify(current_app.api_doc)  # type: ignore[attr-defined]
