"""The worker: gunicorn's threaded worker, with what it lacks for long streams and rude clients.

    - A connection takes a thread when its first byte is there, not before: silent ones cost none.
    - A sender has a deadline and slow ones few threads (`receiving`); a reader that stops is cut after WRITE_SECONDS.
    - A connection is closed without waiting on the loop that accepts the others.
    - SIGTERM: refuse new connections at once, give running requests the drain time, end the others with 503.
    - A worker shows signs of life from its birth, also while it imports and loads.
    - What is wrong before Flask sees it is answered in JSON, too, in the shape of its path.

It knows the app as a WSGI function and three calls (`AppProcess`); gunicorn is pinned, since its inner
methods are overridden here.
"""

import contextlib
import ctypes
import errno
import faulthandler
import json
import logging
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

from gunicorn.http import errors as http
from gunicorn.workers.gthread import TConn, ThreadWorker

from web.errors import Problem, is_openai
from web.pump import SENDER
from web.receiving import Receiver

log = logging.getLogger(__name__)

SLOW_PLACES = 64  # threads that may wait for slow senders
SEND_BUFFER = 64 * 1024  # bytes of a stream; Linux takes twice as much
READ_SECONDS = 10
WRITE_SECONDS = 15  # without progress; one write may make some once, so that a reader is cut after 30 at most
BOOT_SECONDS = 120  # in which a worker must have begun to serve
LINGER_SECONDS = 1.0  # for the client to take the reply and close, before we do
LINGER_BYTES = 8 * 2**20
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends
CLOSE_CONNECTION = "web.close_connection"  # in the WSGI environment: call it to have the connection closed

STATUS = {
    http.LimitRequestLine: (414, "URI Too Long", "the request line is too long"),
    http.LimitRequestHeaders: (431, "Request Header Fields Too Large", "the headers are too large or too many"),
    http.ExpectationFailed: (417, "Expectation Failed", "this expectation is not supported"),
    http.UnsupportedTransferCoding: (501, "Not Implemented", "this transfer coding is not supported"),
}
BAD_REQUEST = (400, "Bad Request", "this is not a valid HTTP request")
FAILED = (500, "Internal Server Error", "internal error; the server's log has the details")


class AppProcess(Protocol):
    """What the worker asks of the application beside answering requests."""

    def started(self, age: int) -> None:
        """Begin to serve; `age` counts the workers of this server from 1."""
        ...

    def drain(self) -> None:
        """Refuse new requests, end waiting ones, and return when running ones have ended or had their time."""
        ...

    def close(self) -> None:
        """Stop what is left."""
        ...


class Connection(TConn):  # type: ignore[misc]
    """A connection whose graceful close does not hold up the worker's loop."""

    def __init__(self, worker: "Worker", sock: socket.socket, client: Any, server: Any):
        super().__init__(worker.cfg, sock, client, server)
        self.worker = worker
        self.lingered = 0  # bytes thrown away while waiting for the client to close

    def init(self) -> None:
        """Make the parser, and have it read what comes in time."""
        if not self.initialized:
            super().init()
            self.parser.unreader = Receiver(self.sock, self.worker.slow_places)

    def close(self, graceful: bool = False) -> None:
        """Close; gracefully means to let the client read the reply first."""
        if graceful:
            self.worker.linger(self)
        else:
            super().close()


class ReplySender:
    """A streamed reply, sent as gunicorn would, but without waiting. Satisfies web.pump.Sender.

    The head goes with the first frame, which comes after PING_SECONDS at most: sent alone, it wakes the client in the
    middle of the step that computes the first token.
    """

    def __init__(self, reply: Any):
        self._reply = reply

    def begin(self) -> None:
        """Hold little for a reader: one who stops is noticed after 128 KiB, and not after 2.6 MiB."""
        self._reply.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    def _head(self) -> bytes:
        """Return the head if it is still to be sent; it counts as sent then."""
        if self._reply.headers_sent:
            return b""
        lines = self._reply.default_headers() + [f"{name}: {value}\r\n" for name, value in self._reply.headers]
        self._reply.headers_sent = True
        return "".join([*lines, "\r\n"]).encode("latin-1")

    def _framed(self, data: bytes, last: bool) -> bytes:
        """Return data as HTTP has it, after the head if that is still to be sent."""
        reply = self._reply
        reply.sent += len(data)
        head = self._head()
        if not reply.chunked:
            return head + data
        if data:
            data = b"%X\r\n%b\r\n" % (len(data), data)
        if last:
            data += b"0\r\n\r\n"
            reply.chunked, reply.response_length = False, reply.sent  # so that gunicorn does not end it again
        return head + data

    def send(self, data: bytes, last: bool) -> bytes:
        """Send as much as goes at once, and after the last the connection's end if that is due; return the rest."""
        sock, closes, data = self._reply.sock, last and self._reply.should_close(), self._framed(data, last)
        try:
            rest = data[sock.send(data, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return data
        if closes and not rest:
            _end_sending(sock)
        return rest

    def send_rest(self, rest: bytes) -> None:
        """Send a rest; the kernel ends it when the reader has stopped."""
        self._reply.sock.sendall(rest)


def _end_sending(sock: socket.socket) -> None:
    """Let the client see the end now rather than when the loop or the request's thread comes to it."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)


def _set_deadlines(sock: socket.socket) -> None:
    """Have the kernel end reads and writes that make no progress, also on a blocking socket."""
    for option, seconds in ((socket.SO_RCVTIMEO, READ_SECONDS), (socket.SO_SNDTIMEO, WRITE_SECONDS)):
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, 0))


def _end_with(parent: int) -> None:
    """Have the kernel end this process with its parent, so that port and out/ are free for the next server at once."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before it could be said
            os._exit(1)


class Worker(ThreadWorker):  # type: ignore[misc]
    """The one worker process."""

    process: AppProcess  # set by `load_wsgi`

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.lingering: deque[Connection] = deque()
        self.slow_places = threading.Semaphore(SLOW_PLACES)
        self.of_thread = threading.local()  # its connection

    # --- starting and stopping ---

    def init_process(self) -> None:
        """Begin, in the new process."""
        _end_with(self.ppid)
        threading.Thread(target=self._notify_until_booted, name="boot", daemon=True).start()
        super().init_process()

    def _notify_until_booted(self) -> None:
        deadline = time.monotonic() + BOOT_SECONDS
        while not self.booted and time.monotonic() < deadline:
            self.notify()
            time.sleep(1.0)

    def init_signals(self) -> None:
        """Leave Ctrl-C to the master; have a crash show stacks, also the SIGABRT that ends a worker that hangs."""
        super().init_signals()
        faulthandler.enable()
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def load_wsgi(self) -> None:
        """Build the application; its environment gets the means to close a connection and to send without waiting."""
        super().load_wsgi()
        app: Callable[..., Iterable[bytes]] = self.app.wsgi()
        self.process = self.app.process

        def wsgi(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            reply = start_response.__self__
            environ[CLOSE_CONNECTION], environ[SENDER] = reply.force_close, ReplySender(reply)
            return app(environ, start_response)

        self.wsgi = wsgi

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to drain on SIGTERM, on the loop's thread rather than in the signal handler."""
        if self.alive:
            self.method_queue.defer(self._begin_drain)
        super().handle_exit(sig, frame)

    def _begin_drain(self) -> None:
        threading.Thread(target=self.process.drain, name="drain", daemon=True).start()

    def set_accept_enabled(self, enabled: bool) -> None:
        """Accept or not; when stopping, close the listening sockets, so that nobody waits in their queue."""
        super().set_accept_enabled(enabled)
        if not self.alive:
            for listener in self.sockets:
                listener.close()

    # --- connections; all on the loop's thread ---

    def accept(self, listener: Any) -> None:
        """Take a connection and wait for its first byte, unless it is there."""
        try:
            sock, client = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.05)  # out of descriptors: others will end
            return
        self.nr_conns += 1
        _set_deadlines(sock)
        connection = Connection(self, sock, client, listener.getsockname())
        with contextlib.suppress(OSError):
            connection.data_ready = bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        if connection.data_ready:  # as mostly: so a turn of the loop is spared
            self.enqueue_req(connection)
            return
        connection.timeout = time.monotonic() + READ_SECONDS
        self.pending_conns.append(connection)
        self.poller.register(sock, selectors.EVENT_READ, partial(self.on_pending_socket_readable, connection))

    def linger(self, connection: Connection) -> None:
        """Send the end, then throw away what still comes until the client closes or its time is over."""
        try:
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError:
            connection.close()
            return
        connection.sock.setblocking(False)
        connection.timeout = time.monotonic() + LINGER_SECONDS
        self.lingering.append(connection)
        self.poller.register(connection.sock, selectors.EVENT_READ, partial(self._throw_away, connection))

    def _throw_away(self, connection: Connection, sock: socket.socket) -> None:
        try:
            data = sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        connection.lingered += len(data)
        if not data or connection.lingered > LINGER_BYTES:
            self._end_linger(connection)

    def _end_linger(self, connection: Connection) -> None:
        self.lingering.remove(connection)
        with contextlib.suppress(OSError, KeyError, ValueError):
            self.poller.unregister(connection.sock)
        connection.close()

    def murder_pending(self) -> None:
        """Close connections whose time is over: those that sent nothing, and those that linger."""
        super().murder_pending()
        now = time.monotonic()
        while self.lingering and self.lingering[0].timeout <= now:
            self._end_linger(self.lingering[0])

    def handle(self, conn: Connection) -> Any:
        """Handle the next request of a connection, in a thread of the pool."""
        self.of_thread.connection = conn
        if conn.initialized:
            conn.parser.unreader.begin()
        goes_on = super().handle(conn)
        if goes_on is False:
            _end_sending(conn.sock)
        return goes_on

    # --- errors before the application ---

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: BaseException) -> None:
        """Answer what the application never saw, in JSON."""
        status, reason, message = STATUS.get(type(exc), BAD_REQUEST)
        if not isinstance(exc, http.ParseException):
            status, reason, message = FAILED
            log.error("a request failed outside the application", exc_info=exc)
        connection = self.of_thread.connection
        path = connection.parser.unreader.path if connection.initialized else ""
        body = json.dumps(Problem(status, message).body(is_openai(path))).encode()
        head = f"HTTP/1.1 {status} {reason}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        head += f"X-Request-Id: req-{uuid.uuid4().hex}\r\n"
        with contextlib.suppress(OSError):
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


def leave(worker: Worker) -> None:
    """End the worker process: stop the application, then go without waiting for threads that wait for clients."""
    if not worker.booted:
        return
    try:
        worker.process.close()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
