#!/usr/bin/env python3
"""The server: `python api_server.py [--port 5000] [--model_path out/my_model/ckpt.pt]`; --help lists every setting.

`create_app` wires settings, engine, jobs and routes into a Flask app. The command reads the settings, checks
what can be checked before anything heavy is imported, and starts gunicorn, whose worker builds the app, the
engine and the job manager. A wrong start is one line on stderr and exit code 2.
"""

import logging
import os
import sys
import threading
import time
import uuid
from functools import partial
from typing import Any

try:
    import click
except ModuleNotFoundError as error:  # a Python without the project's packages
    sys.exit(f"{error.name} is not installed for this Python; after `make setup` use .venv/bin/python api_server.py")

from flask import Flask, Response, g, request
from flask_openapi3.models.info import Info
from flask_openapi3.openapi import OpenAPI

from inference.backend import InferenceBackend
from inference.sequence import InferenceError
from storage import hub, user_files
from storage.errors import StorageError
from storage.inspection import inspect
from storage.registry import resolve
from storage.registry_file import read_registry
from storage.runs import Workspace
from training.jobs import JobManager
from web import (
    chat_routes,
    embedding_routes,
    errors,
    file_routes,
    fine_tuning_routes,
    health_routes,
    job_routes,
    native_routes,
    openai_routes,
    query,
    security,
)
from web.catalogue import Catalogue
from web.context import EXTENSION, Context, StreamLimit
from web.errors import Refused
from web.json_replies import JsonReplies
from web.loading import ModelLoader, check_allowed, first_choice
from web.metrics import Metrics
from web.pump import Pump
from web.settings import MIB, SETTINGS, Settings, SettingsError, misspelt, read
from web.strict_json import StrictRequest, close_if_unread
from web.watchdog import Watchdog

log = logging.getLogger("server")

TITLE = "Language model API server"
VERSION = "0.1.0"
FIRST_LOAD_WAIT = 15.0  # seconds; well below gunicorn's patience with a worker that starts
BOOT_ERROR = 3  # gunicorn's exit code of a worker that cannot start; the server then ends, too


class App(OpenAPI):
    """Flask with strict bodies and strict replies."""

    request_class = StrictRequest
    json_provider_class = JsonReplies


def _note_request(app: Flask, metrics: Metrics) -> None:
    """Give every request an id, and count it."""

    def begin() -> None:
        g.request_id, g.started = f"req-{uuid.uuid4().hex}", time.monotonic()

    def end(response: Response) -> Response:
        route = "none" if request.url_rule is None else request.url_rule.rule
        metrics.observe(request.method, route, response.status_code, time.monotonic() - g.started)
        response.headers["X-Request-Id"] = g.request_id
        in_query = query.unknown_parameters() if errors.is_openai(request.path) else []
        ignored = [*g.get("ignored_params", ()), *in_query]
        names = [name for name in ignored if name.isascii() and name.isidentifier()]  # a header takes no others
        if names:
            response.headers["X-Ignored-Params"] = ", ".join(names)[:1000]
        return close_if_unread(response)

    app.before_request(begin)
    app.after_request(end)


def create_app(settings: Settings, engine: InferenceBackend, jobs: JobManager, workspace: Workspace) -> OpenAPI:
    """Return the Flask app over these objects. It starts nothing and loads no model."""
    app = App(
        __name__,
        info=Info(title=TITLE, version=VERSION),
        static_folder=None,
        doc_ui=False,
        validation_error_status=400,
        validation_error_callback=errors.refuse_invalid,
        security_schemes={"bearer": {"type": "http", "scheme": "bearer"}},
    )
    app.config.update(MAX_CONTENT_LENGTH=settings.max_body_bytes, MAX_FORM_PARTS=100, OPENAPI_TITLE=TITLE)
    metrics, loader = Metrics(engine), ModelLoader(settings, engine, workspace)
    streams = StreamLimit(settings.max_streams)
    catalogue = Catalogue(settings, engine, workspace, jobs)
    pump = Pump(engine)
    app.extensions[EXTENSION] = Context(settings, engine, jobs, workspace, loader, metrics, streams, catalogue, pump)
    errors.register(app)
    _note_request(app, metrics)
    security.protect(app, settings)
    app.before_request(query.check_names)
    for module in (
        native_routes,
        job_routes,
        openai_routes,
        chat_routes,
        embedding_routes,
        file_routes,
        fine_tuning_routes,
        health_routes,
    ):
        app.register_api(module.routes)
    return app


class ServerProcess:
    """The application's life in the worker: load the model, drain, close. Satisfies web.worker.AppProcess."""

    def __init__(self, context: Context):
        self._context = context

    def started(self, age: int) -> None:
        """Load the model; one that takes longer than FIRST_LOAD_WAIT goes on loading while /health says so.

        Until this returns connections wait in the listen queue, so a client's first request finds a model.
        """
        Watchdog(self._context.engine.heartbeat_age, self._context.stalled, self._context.closing).start()
        self._context.pump.start()
        self._context.loader.begin_start()
        load = threading.Thread(target=self._load, args=(age > 1,), name="load", daemon=True)
        load.start()
        load.join(FIRST_LOAD_WAIT)

    def _load(self, again: bool) -> None:
        try:
            model = self._context.loader.start(again)
        except (StorageError, InferenceError, Refused) as error:
            print(f"api_server.py: {error}", file=sys.stderr, flush=True)
            os._exit(BOOT_ERROR)
        except Exception:
            log.exception("the model could not be loaded")
            os._exit(BOOT_ERROR)
        if model is None:
            log.info("no model is loaded")
        else:
            size = f"{model.parameters / 1e6:.1f} million parameters"
            log.info("serving %s: %s, %s runner, %s, %s", model.id, size, model.runner, model.device, model.dtype)

    def drain(self) -> None:
        """Refuse new requests, end waiting ones, and let running ones end."""
        self._context.closing.set()
        self._context.engine.close(self._context.settings.drain)

    def close(self) -> None:
        """Stop the engine; training jobs go on."""
        self._context.closing.set()
        self._context.engine.close(0.0)
        self._context.jobs.close()


def build(settings: Settings, workspace: Workspace) -> tuple[Flask, ServerProcess]:
    """Return the app with the real engine and jobs; called in the worker, which alone imports torch.

    Raises SettingsError for a device that is not here.
    """
    from inference.build import half_of_memory, pick_device
    from inference.engine import Engine
    from training.local_backend import LocalBackend

    if settings.hf_token is not None:
        os.environ["HF_TOKEN"] = settings.hf_token  # huggingface_hub reads it there
    try:
        pick_device(settings.device)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    user_files.sweep(workspace)
    memory = settings.model_memory_bytes
    engine = Engine(
        workspace,
        device=settings.device,
        dtype=settings.dtype,
        slots=settings.slots,
        threads=settings.threads,
        cache_memory=None if settings.cache_memory is None else settings.cache_memory * MIB,
        max_waiting=settings.max_waiting,
        max_waiting_tokens=settings.max_waiting_tokens,
        prefill_tokens=settings.prefill_tokens,
        request_timeout=settings.request_timeout,
        speculation=settings.speculation,
        memory=half_of_memory(settings.device) if memory is None else memory,
    )
    allow = partial(check_allowed, settings)
    priority, most = settings.training_priority, settings.training_memory_bytes
    backend = LocalBackend(workspace, priority=priority, at_once=settings.max_jobs, memory=most)
    jobs = JobManager(workspace, backend, max_jobs=settings.max_jobs, allow=allow)
    app = create_app(settings, engine, jobs, workspace)
    return app, ServerProcess(app.extensions[EXTENSION])


def check_model(settings: Settings, workspace: Workspace) -> None:
    """Fetch a pretrained model that is not here, and refuse what cannot be served. Raises StorageError and Refused."""
    choice = first_choice(settings)
    if choice is None:
        return
    reference = resolve(workspace, **choice)
    check_allowed(settings, reference)
    if reference.path is None:
        hub.fetch(reference.repository or reference.id, workspace, lambda text: print(text, flush=True))
    else:
        inspect(reference)


def open_workspace(settings: Settings) -> Workspace:
    """Return the folders that the settings name, with the models of the registry file. Raises StorageError."""
    if settings.model_registry_path is None:
        return Workspace(settings.root.resolve(), settings.pretrained_dir)
    registered = read_registry(settings.model_registry_path)
    for reference in dict(registered).values():
        if reference.path is not None:
            inspect(reference)
    return Workspace(settings.root.resolve(), settings.pretrained_dir, registered)


def banner(host: str, port: int, needs_key: bool) -> str:
    """Return what the server says when it listens."""
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    head = "-H 'Content-Type: application/json'" + " -H 'Authorization: Bearer KEY'" * needs_key
    return f"""{TITLE} at {url}
  web page        {url}/
  documentation   {url}/docs
  try it          curl -s {url}/api/generate {head} -d '{{"prompt": "Once upon a time"}}'
"""


def serve(settings: Settings) -> None:
    """Check, claim the port and the folder, and serve until a signal ends it."""
    from web import logs
    from web.master import Server, claim

    workspace = open_workspace(settings)
    check_model(settings, workspace)
    listener = claim(settings, workspace)
    logs.configure(settings.log_format, settings.log_level)
    text = banner(*listener.getsockname()[:2], needs_key=bool(settings.keys))
    Server(settings, listener, lambda: build(settings, workspace), lambda: print(text, flush=True)).run()


def _option(name: str, help: str) -> click.Option:
    return click.Option([f"--{name}"], type=str, metavar="VALUE", help=help)


def command() -> click.Command:
    """Return the command line that the settings table makes."""
    options: list[click.Parameter] = []
    for row in SETTINGS:
        default = f" (default: {row.shown_default})" if row.shown_default else ""
        also = f" or {row.also}" if row.also else ""
        options.append(_option(row.name, f"{row.help}{default} [{row.variable}{also}]"))
    return click.Command(
        "api_server.py",
        params=options,
        callback=lambda **flags: flags,
        help="Serve a language model, and train others. Every setting is a flag or an environment variable.",
        context_settings={"token_normalize_func": lambda name: name.replace("-", "_"), "max_content_width": 120},
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        flags: Any = command().main(argv, standalone_mode=False)
        if not isinstance(flags, dict):  # --help has been printed
            return 0
        for sentence in misspelt(os.environ):
            print(f"api_server.py: {sentence}", file=sys.stderr)
        serve(read(flags, os.environ))
    except click.ClickException as error:
        print(f"api_server.py: {error.format_message()} See --help.", file=sys.stderr)
        return 2
    except (SettingsError, StorageError, Refused) as error:
        print(f"api_server.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
