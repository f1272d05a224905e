"""Who may ask what: Host and Origin, API keys, rate limit, and the headers that keep browsers careful.

Deny by default. Every request passes `check`, in this order: a Host that is ours (another name is a web
page that points its own name at this machine), an Origin that is ours for anything that is not a GET, and
a key where keys are set, on every route but /health and /healthz. A key comes as a Bearer token or as the
password of Basic, so that a browser can ask its user for it. Keys are kept as digests and compared so that
time tells nothing.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from flask import Flask, Response, g, request

from web.errors import Refused
from web.settings import Settings

OPEN_PATHS = ("/health", "/healthz")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
}
POLICY = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
DOCS_POLICY = POLICY + "; style-src 'self' 'unsafe-inline'; img-src 'self' data:"  # swagger writes style attributes
ASK = 'Bearer realm="language model server"'
ASK_BROWSER = 'Basic realm="language model server", charset="UTF-8"'


def host_name(host: str) -> str:
    """Return a Host header without its port, in lower case, an IPv6 address without brackets."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


def is_address(name: str) -> bool:
    """Say whether a host name is an IP address, which nobody can point elsewhere."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def digest(key: str) -> bytes:
    """Return what is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Guard:
    """Check requests against the settings."""

    def __init__(self, settings: Settings):
        names = [settings.host, "localhost", *settings.allowed_hosts]
        self._hosts = {host_name(name) for name in names}
        self._origins = {origin.lower() for origin in settings.cors_allow_origins}
        self._keys = [digest(key) for key in settings.keys]

    def check(self) -> None:
        """Refuse the current request if it may not be made."""
        self._check_host()
        self._check_origin()
        if self._keys and request.path not in OPEN_PATHS and request.method != "OPTIONS":
            self._check_key()

    def _check_host(self) -> None:
        host = request.environ.get("HTTP_HOST")
        if not host:
            raise Refused(400, "the Host header is missing")
        name = host_name(host)
        if name not in self._hosts and not is_address(name):
            raise Refused(403, "this Host is not served here; allowed_hosts can add names")

    def _check_origin(self) -> None:
        origin = request.headers.get("Origin")
        if origin is None or request.method in SAFE_METHODS:
            return
        if origin.lower() not in self._origins and urlsplit(origin.lower()).netloc != request.host.lower():
            raise Refused(403, "requests from this web page's origin are not allowed")

    def _check_key(self) -> None:
        given = request.authorization
        key = None if given is None else _utf8(given.token) if given.type == "bearer" else given.password
        own = digest(key or "")
        found = [hmac.compare_digest(own, known) for known in self._keys]  # all of them: no early end
        if not key or not any(found):
            headers = {"WWW-Authenticate": ASK_BROWSER if _is_browser() else ASK}
            message = "a valid API key is needed: Authorization: Bearer <key>"
            raise Refused(401, message, "invalid_api_key", headers=headers)
        g.key = own.hex()


def _utf8(header: str | None) -> str | None:
    """Return the text of a header, whose bytes WSGI hands over as Latin-1."""
    return None if header is None else header.encode("latin-1").decode("utf-8", "surrogateescape")


def _is_browser() -> bool:
    return request.method == "GET" and "text/html" in request.headers.get("Accept", "")


def key_digest() -> str:
    """Return the digest of the key that the current request was made with; "" where no key is asked for."""
    return str(getattr(g, "key", ""))


def requester() -> str:
    """Return who asks, for the rate limit and the shares of the engine: the checked key, or the address."""
    return key_digest() or str(request.remote_addr)


def add_headers(response: Response) -> Response:
    """Add what every reply has."""
    response.headers.update(HEADERS)
    response.headers["Content-Security-Policy"] = DOCS_POLICY if request.path.startswith("/docs") else POLICY
    response.headers.setdefault("Cache-Control", "no-store")
    return response


def _limit(app: Flask, rate_limit: str) -> None:
    from flask_limiter import Limiter  # slow to import, and seldom needed

    limiter = Limiter(
        requester,
        app=app,
        application_limits=[rate_limit],
        storage_uri="memory://",
        strategy="moving-window",
        headers_enabled=True,
    )
    limiter.request_filter(lambda: request.path in OPEN_PATHS)


def _allow_origins(app: Flask, origins: Sequence[str]) -> None:
    from flask_cors import CORS

    exposed = ["X-Request-Id", "X-Ignored-Params", "Retry-After"]
    CORS(app, origins=list(origins), expose_headers=exposed, allow_headers=["Authorization", "Content-Type"])


def protect(app: Flask, settings: Settings) -> None:
    """Guard all routes of `app`; the key is checked before the rate limit counts."""
    guard = Guard(settings)
    app.before_request(guard.check)
    app.after_request(add_headers)
    if settings.rate_limit is not None:
        _limit(app, settings.rate_limit)
    if settings.cors_allow_origins:
        _allow_origins(app, settings.cors_allow_origins)
