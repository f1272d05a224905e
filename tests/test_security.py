"""Who may ask what: Host, Origin, keys, rate limit, and the headers of every reply."""

import base64

import pytest
from fakes import FakeServer, byte_tokenizer

from web.security import host_name
from web.settings import Settings


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def server(tmp_path_factory, tokenizer):
    return FakeServer(tmp_path_factory.mktemp("open"), tokenizer)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, tokenizer):
    return FakeServer(tmp_path_factory.mktemp("guarded"), tokenizer, api_key=("sesame", "open"))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# ---- Host and Origin


@pytest.mark.parametrize(
    "host", ["localhost:5000", "LOCALHOST", "127.0.0.1:1", "[::1]:5000", "192.168.1.7", "localhost."]
)
def test_hosts_that_cannot_be_pointed_elsewhere_are_served(server, host):
    assert server.get("/api/status", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example:5000"]
)
def test_a_foreign_host_is_refused(server, host):
    reply = server.get("/api/status", headers={"Host": host})
    assert reply.status_code == 403 and "allowed_hosts" in reply.json["error"]


def test_a_request_without_a_host_is_refused(server):
    assert server.client.get("/health", environ_overrides={"HTTP_HOST": ""}).status_code == 400


def test_names_can_be_allowed(tmp_path, tokenizer):
    server = FakeServer(tmp_path, tokenizer, allowed_hosts=("models.example.org",))
    assert server.get("/health", headers={"Host": "models.example.org:5000"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "name"), [("A.B:80", "a.b"), ("[::1]:5", "::1"), ("[::1", "::1"), ("x", "x"), (":5", "")]
)
def test_the_name_of_a_host_is_found(host, name):
    assert host_name(host) == name


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost.evil.example", "http://localhost:1"]
)
def test_another_pages_origin_may_not_change_anything(server, origin):
    reply = server.post("/api/generate", {"prompt": "a"}, headers={"Origin": origin, "Host": "localhost:5000"})
    assert reply.status_code == 403


def test_our_own_page_may(server):
    headers = {"Origin": "http://localhost:5000", "Host": "localhost:5000"}
    assert server.post("/api/generate", {"prompt": "a", "max_new_tokens": 1}, headers=headers).status_code == 200


def test_reading_with_a_foreign_origin_gives_it_no_permission(server):
    reply = server.get("/api/models", headers={"Origin": "http://evil.example"})
    assert "Access-Control-Allow-Origin" not in reply.headers
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    reply = server.client.options("/api/train", headers=preflight)
    assert "Access-Control-Allow-Origin" not in reply.headers


def test_configured_origins_are_allowed_and_no_others(tmp_path, tokenizer):
    server = FakeServer(tmp_path, tokenizer, cors_allow_origins=("https://app.example",), api_key=("k",))
    headers = {"Origin": "https://app.example", **bearer("k")}
    reply = server.post("/api/generate", {"prompt": "a", "max_new_tokens": 1}, headers=headers)
    assert reply.status_code == 200 and reply.headers["Access-Control-Allow-Origin"] == "https://app.example"
    preflight = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    reply = server.client.options("/api/generate", headers=preflight)
    assert reply.status_code == 200 and reply.headers["Access-Control-Allow-Origin"] == "https://app.example"
    reply = server.get("/api/models", headers={"Origin": "https://evil.example", **bearer("k")})
    assert "Access-Control-Allow-Origin" not in reply.headers


# ---- keys


@pytest.mark.parametrize("key", ["sesame", "open"])
def test_each_key_opens(guarded, key):
    assert guarded.get("/api/status", headers=bearer(key)).status_code == 200


def test_a_key_may_have_any_letters_and_comes_as_utf_8(tmp_path, tokenizer):
    server = FakeServer(tmp_path, tokenizer, api_key=("s\u00e9same",))
    as_wsgi_has_it = "s\u00e9same".encode().decode("latin-1")
    assert server.get("/api/status", headers=bearer(as_wsgi_has_it)).status_code == 200
    code = base64.b64encode("me:s\u00e9same".encode()).decode()
    assert server.get("/api/status", headers={"Authorization": f"Basic {code}"}).status_code == 200


def test_each_key_has_a_cache_of_its_own_and_without_keys_all_clients_share_one(server, guarded):
    body = {"prompt": "a", "max_new_tokens": 1}
    for key in ("sesame", "open", "sesame"):
        guarded.post("/api/generate", body, headers=bearer(key))
    scopes = [sequence.cache_scope for sequence in guarded.engine.sequences[-3:]]
    assert scopes[0] == scopes[2] != scopes[1] and "" not in scopes and "sesame" not in str(scopes)
    for address in ("10.0.0.1", "10.0.0.2"):
        server.post("/api/generate", body, environ_overrides={"REMOTE_ADDR": address})
    owners = {(sequence.cache_scope, sequence.owner) for sequence in server.engine.sequences[-2:]}
    assert owners == {("", "10.0.0.1"), ("", "10.0.0.2")}


def test_a_browser_may_send_the_key_as_a_password(guarded):
    code = base64.b64encode(b"me:sesame").decode()
    assert guarded.get("/", headers={"Authorization": f"Basic {code}"}).status_code == 200
    reply = guarded.get("/", headers={"Accept": "text/html"})
    assert reply.status_code == 401 and reply.headers["WWW-Authenticate"].startswith("Basic")


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", "Bearer a Bearer sesame", "sesame", "Basic sesame", "Basic !!!!"]
    + ["Bearer caf\u00e9", "Bearer " + "a" * 4000, "Digest sesame", "Bearer a%00b"],
)
def test_anything_else_is_refused(guarded, authorization):
    headers = {} if authorization is None else {"Authorization": authorization}
    reply = guarded.post("/v1/completions", {"prompt": "a"}, headers=headers)
    assert reply.status_code == 401 and reply.headers["WWW-Authenticate"].startswith("Bearer")
    assert (reply.json["error"]["type"], reply.json["error"]["code"]) == ("invalid_request_error", "invalid_api_key")


def test_every_route_but_health_needs_the_key(guarded):
    for rule in guarded.app.url_map.iter_rules():
        path = rule.rule
        for argument in rule.arguments:
            path = path.replace(f"<path:{argument}>", "x").replace(f"<{argument}>", "x")
        for method in rule.methods - {"OPTIONS", "HEAD"}:
            expected = (200, 503) if path in ("/health", "/healthz") else (401,)
            assert guarded.client.open(path, method=method).status_code in expected, (method, path)


def test_unknown_routes_need_the_key_too(guarded):
    assert guarded.get("/nowhere").status_code == 401


def test_a_key_in_the_address_does_not_count(guarded):
    assert guarded.get("/v1/models?api_key=sesame&access_token=sesame").status_code == 401


def test_an_authorization_that_nobody_asked_for_does_no_harm(server):
    assert server.get("/v1/models", headers={"Authorization": "Bearer "}).status_code == 200


# ---- limits and headers


def test_a_rate_limit_is_per_key_and_says_when_to_come_again(tmp_path, tokenizer):
    server = FakeServer(tmp_path, tokenizer, api_key=("a", "b"), rate_limit="2 per minute")
    assert [server.get("/api/models", headers=bearer("a")).status_code for _ in range(3)] == [200, 200, 429]
    reply = server.get("/api/models", headers=bearer("a"))
    assert int(reply.headers["Retry-After"]) >= 1 and reply.json["error"] == "too many requests"
    assert server.get("/api/models", headers=bearer("b")).status_code == 200
    assert server.get("/health").status_code == 200
    assert server.get("/api/models", headers=bearer("wrong")).status_code == 401


@pytest.mark.parametrize("path", ["/api/status", "/nowhere", "/metrics"])
def test_every_reply_has_the_careful_headers(server, path):
    headers = server.get(path).headers
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"] and headers["Cache-Control"] == "no-store"


def test_a_prompt_with_markup_comes_back_as_json(server):
    reply = server.post("/api/generate", {"prompt": "<script>alert(1)</script>", "max_new_tokens": 1})
    assert reply.mimetype == "application/json"


def test_settings_do_not_need_keys_on_loopback():
    assert Settings().keys == ()
