"""The server process: gunicorn's master over one worker, and what must hold before it starts.

`claim` takes the port, and says in one line why the server cannot start. `Server` is gunicorn's application;
its settings are fixed here, since others would lose the model: one worker, loaded after the fork, never
recycled; gunicorn's own configuration file and GUNICORN_CMD_ARGS are not read. The first SIGTERM or Ctrl-C
lets running requests end, the second ends at once.
"""

import contextlib
import errno
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from flask import Flask
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter

from storage.errors import StorageError
from storage.runs import Workspace
from training.lock_file import OutLock
from web.logs import GunicornLogger
from web.settings import Settings, SettingsError
from web.worker import AppProcess, Worker, leave

SPARE_THREADS = 32  # beside those of open generation requests, for everything that is quick
WORKER_TIMEOUT = 18  # seconds without a sign of life of the worker's loop
STOPPED = 5.0  # seconds between two looks at the worker: this process slept, and the worker may have, too
LOCK_PATIENCE = 0.3  # seconds for another server to give out/ free
LAST_WRITES = 1.0  # seconds for the last bytes, after the drain time
SERVED = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGCHLD)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        reason = (error.strerror or str(error)).lower()
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise SettingsError(f"host is {host!r}; it must be an address of this machine: {reason}") from None
        instead = "choose another with --port; 0 takes a free one"
        raise SettingsError(f"port {port} on {host} cannot be used: {reason}; {instead}") from None
    return listener


def claim(settings: Settings, workspace: Workspace) -> socket.socket:
    """Return the socket that listens, if nobody else looks after out/. Raises SettingsError and OutInUse.

    The lock of out/ itself is the job manager's, in the worker; here it only shows that there will be one.
    """
    OutLock(workspace.out, patience=LOCK_PATIENCE).release()
    return _bind(settings.host, settings.port)


class Master(Arbiter):  # type: ignore[misc]
    """gunicorn's master with the signals of a server that has one worker."""

    stopping = False
    _looked = math.inf

    def murder_workers(self) -> None:
        """End a worker that shows no sign of life; the time in which this process was stopped does not count."""
        now = time.monotonic()
        if now - self._looked > STOPPED:
            for worker in self.WORKERS.values():
                worker.tmp.notify()
        self._looked = now
        super().murder_workers()

    def signal(self, sig: int, frame: Any) -> None:
        """Queue a signal; what would add, remove or replace workers is left out."""
        if sig in (signal.SIGTERM, signal.SIGINT):
            sig = signal.SIGQUIT if self.stopping else signal.SIGTERM
            self.stopping = True
        if sig in SERVED:
            super().signal(sig, frame)


class Server(BaseApplication):  # type: ignore[misc]
    """gunicorn's application: settings, and the app built in the worker."""

    process: AppProcess  # of the worker; set by `load` after the fork

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        build: Callable[[], tuple[Flask, AppProcess]],
        ready: Callable[[], None],
    ):
        self._settings, self._build, self._ready = settings, build, ready
        self._descriptor = listener.detach()  # gunicorn's from now on: closed where it closes
        super().__init__()

    def load_config(self) -> None:
        """Fix gunicorn's settings."""
        values = {
            "bind": f"fd://{self._descriptor}",
            "workers": 1,
            "worker_class": Worker,
            "threads": self._settings.max_streams + SPARE_THREADS,
            "worker_connections": max(1000, 2 * self._settings.max_streams + SPARE_THREADS),
            "preload_app": False,
            "max_requests": 0,
            "timeout": WORKER_TIMEOUT,
            "graceful_timeout": math.ceil(self._settings.drain + LAST_WRITES),
            "keepalive": 15,
            "control_socket_disable": True,
            "logger_class": GunicornLogger,
            "when_ready": lambda server: None if self._device_asked else self._ready(),
            "post_worker_init": self._begin,
            "worker_exit": lambda server, worker: leave(worker),
        }
        for name, value in values.items():
            self.cfg.set(name, value)

    @property
    def _device_asked(self) -> bool:
        """Say whether a device is asked for that only the worker, which has torch, can know to be here."""
        return self._settings.device not in ("auto", "cpu")

    def _begin(self, worker: Worker) -> None:
        """Let the built app begin to serve; the first worker says so where the master could not yet."""
        if self._device_asked and worker.age == 1:
            self._ready()
        worker.process.started(worker.age)

    def load(self) -> Flask:
        """Build the app; called in the worker. What it refuses is one line, and ends the server."""
        try:
            app, self.process = self._build()
        except (StorageError, SettingsError) as error:
            print(f"api_server.py: {error}", file=sys.stderr, flush=True)
            sys.exit(Arbiter.WORKER_BOOT_ERROR)
        return app

    def run(self) -> None:
        """Serve until a signal ends it. Exits with 2 when the worker cannot start, else with 0."""
        master = os.getpid()
        with contextlib.suppress(KeyboardInterrupt):
            try:
                Master(self).run()
            except SystemExit as end:
                if os.getpid() != master:  # a worker that cannot start: its master has to know it by the code
                    raise
                sys.exit(2 if end.code in (Arbiter.WORKER_BOOT_ERROR, Arbiter.APP_LOAD_ERROR) else end.code)
