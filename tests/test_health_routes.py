"""Health, figures, documentation and the web page."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fakes import FakeServer, byte_tokenizer
from prometheus_client.parser import text_string_to_metric_families

from web.health_routes import STATIC
from web.openai_schemas import CompletionBody

PAGE = Path(__file__).parent / "page.mjs"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def server(tmp_path, tokenizer):
    return FakeServer(tmp_path, tokenizer)


def text_of(reply) -> str:
    with reply:
        assert reply.status_code == 200
        return reply.get_data(as_text=True)


@pytest.mark.parametrize("path", ["/health", "/healthz"])
def test_health_is_ok_with_model_and_queue(server, path):
    reply = server.get(path)
    assert reply.status_code == 200 and reply.json["status"] == "ok" and reply.json["model"] == "tiny"
    assert reply.json["queue"]["running"] == 0


def test_a_server_without_a_model_is_healthy(server):
    server.post("/api/unload_model", {})
    assert server.get("/health").status_code == 200 and server.get("/health").json["model"] is None


def test_a_stalled_engine_turns_health_red(server):
    server.engine.quiet = 4.1
    reply = server.get("/healthz")
    assert reply.status_code == 503 and reply.json["status"] == "stalled" and reply.headers["Retry-After"] == "1"


def test_a_server_that_loads_its_first_model_says_so_and_refuses_generation_with_503(tmp_path, tokenizer):
    server = FakeServer(tmp_path, None)
    loader = server.app.extensions["language_model_server"].loader
    loader.begin_start()
    assert server.get("/health").json["status"] == "loading" and server.get("/health").status_code == 503
    reply = server.post("/v1/completions", {"prompt": "a"})
    assert reply.status_code == 503 and reply.json["error"]["code"] == "loading" and "Retry-After" in reply.headers
    loader.start(again=False) if (tmp_path / "models").exists() else loader._starting.clear()
    assert server.get("/health").status_code == 200


def test_a_stopping_server_is_not_healthy(server):
    server.app.extensions["language_model_server"].closing.set()
    assert server.get("/healthz").status_code == 503


def test_queue_has_the_engines_figures(server):
    cache = {"cache_tokens", "cache_kept", "cache_capacity", "cache_bytes", "cache_saved"}
    drafts = {"drafted_tokens", "accepted_tokens"}
    assert {"running", "waiting", "slots", "tokens_per_second"} | cache | drafts <= set(server.get("/queue").json)


def test_an_unknown_request_is_not_found(server):
    assert server.get("/requests/req-nobody").status_code == 404


def test_metrics_count_requests_and_tokens(server):
    server.post("/api/generate", {"prompt": "Once", "max_new_tokens": 3})
    server.post("/api/generate", {"prompt": 5})
    text = server.get("/metrics").get_data(as_text=True)
    samples = {
        (s.name, s.labels.get("route"), s.labels.get("status")): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    assert samples["lm_requests_total", "/api/generate", "200"] == 1
    assert samples["lm_requests_total", "/api/generate", "400"] == 1
    assert samples["lm_generated_tokens_total", None, None] == 3
    assert samples["lm_drafted_tokens", None, None] == samples["lm_accepted_tokens", None, None] == 0
    assert 'lm_model_loaded{dtype="fp32",id="tiny",runner="torch"} 1.0' in text


# ---- what there is to read


def test_the_root_is_a_page_for_a_browser_and_json_for_others(server):
    browser = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
    assert "<!doctype html>" in text_of(server.get("/", headers=browser))
    assert server.get("/").json["documentation"] == "/docs"
    assert server.get("/", headers={"Accept": "*/*"}).json["model"] == "tiny"


@pytest.mark.parametrize("path", ["/static/app.js", "/static/style.css", "/favicon.ico", "/docs"])
def test_the_pages_files_are_there(server, path):
    assert text_of(server.get(path))


@pytest.mark.parametrize("path", ["/docs/js/swagger-ui-bundle.js", "/docs/css/swagger-ui.css"])
def test_the_documentation_comes_from_this_server(server, path):
    assert text_of(server.get(path))


@pytest.mark.parametrize("path", ["/static/../settings.py", "/static/%2e%2e/settings.py", "/docs/../__init__.py"])
def test_nothing_else_is_served(server, path):
    assert server.get(path).status_code in (400, 404)


def test_every_module_and_element_that_the_page_names_is_there():
    page = (STATIC / "index.html").read_text()
    for script in ("app.js", "dom.js", "server.js", "text.js"):
        text = (STATIC / script).read_text()
        assert all((STATIC / name).is_file() for name in re.findall(r'from "\./([\w.]+)"', text))
        assert [name for name in re.findall(r'\$\("([\w-]+)"\)', text) if f'id="{name}"' not in page] == []


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_page_says_which_place_a_job_has_and_why_it_waits(tmp_path):
    folder = shutil.copytree(STATIC, tmp_path / "static")
    (folder / "package.json").write_text('{"type": "module"}')
    reason = "max_jobs is 1; running now: <b>a</b>"
    jobs = [{"name": "a", "state": "running"}, {"name": "b", "state": "queued"}]
    jobs[1] |= {"queue_position": 1, "queue_reason": reason}
    command = ["node", str(PAGE), str(folder), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    rows = json.loads(done.stdout)
    assert [row.split()[0] for row in rows] == ["a", "b", "b"]
    assert rows[2] == f"b has place 1 in the queue ({reason})"


def test_our_pages_name_no_other_address_and_have_no_inline_script():
    for file in STATIC.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text, file.name
        assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=\"|style=\"|innerHTML|insertAdjacentHTML", text), (
            file.name
        )


def test_the_openapi_document_names_every_route_and_no_other_address(server):
    document = server.get("/openapi.json").json
    assert "http://" not in json.dumps(document) and "https://" not in json.dumps(document)
    rules = {re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule) for rule in server.app.url_map.iter_rules()}
    left_out = ("/static", "/docs", "/openapi.json", "/favicon", "/v1/files", "/v1/fine_tuning")
    assert set(document["paths"]) >= {rule for rule in rules if rule != "/" and not rule.startswith(left_out)}
    assert set(document["paths"]) <= rules


def test_every_documented_error_has_the_shape_that_is_sent(server):
    document = server.get("/openapi.json").json
    for path, item in document["paths"].items():
        for operation in item.values():
            for status, response in operation["responses"].items():
                if status >= "400" and not path.startswith("/health"):
                    shape = response["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
                    openai = path.startswith(("/v1", "/comp", "/tok", "/detok"))
                    assert shape == ("OpenAIError" if openai else "Error")


def test_every_reference_of_the_document_leads_somewhere(server):
    document = server.get("/openapi.json").json
    for name in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)):
        assert name in document["components"]["schemas"]


def test_the_documented_body_of_completions_has_its_bounds():
    properties = CompletionBody.model_json_schema()["properties"]
    assert properties["n"]["maximum"] == 128 and "anyOf" in properties["prompt"]
