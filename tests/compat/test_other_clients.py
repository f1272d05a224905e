"""litellm, langchain-openai and llm as they are installed: a completion, a stream and an embedding each.

Each runs as a program of its own, as its users run it; what it prints is compared with the server's own answer.
"""

import json
from pathlib import Path

import pytest
from clients import run

PROMPT = "Once upon"

LITELLM = """
import json, litellm
about = dict(model="text-completion-openai/random", prompt={prompt!r}, api_base={base!r}, api_key="-",
             temperature=0, max_tokens=12)
whole = litellm.text_completion(**about).choices[0].text
pieces = [chunk.choices[0].text or "" for chunk in litellm.text_completion(**about, stream=True)]
reply = litellm.embedding(model="openai/random", input=[{prompt!r}], api_base={base!r}, api_key="-")
vector = reply.data[0]["embedding"]
print(json.dumps([whole, "".join(pieces), vector]))
"""

LANGCHAIN = """
import json
from langchain_openai import OpenAI, OpenAIEmbeddings
server = dict(model="random", base_url={base!r}, api_key="-")
llm = OpenAI(**server, temperature=0, max_tokens=12)
embeddings = OpenAIEmbeddings(**server, check_embedding_ctx_length=False)
print(json.dumps([llm.invoke({prompt!r}), "".join(llm.stream({prompt!r})), embeddings.embed_query({prompt!r})]))
"""


@pytest.fixture
def expected(server) -> str:
    """Return the text that every client must show."""
    assert server.post("/api/load_model", {"model_path": "models/random"}).status_code == 200
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12}
    return server.post("/v1/completions", body).json()["choices"][0]["text"]


@pytest.fixture
def embedded(server, expected) -> list[float]:
    """Return the embedding that every client must show."""
    return server.post("/v1/embeddings", {"model": "random", "input": PROMPT}).json()["data"][0]["embedding"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("code", [LITELLM, LANGCHAIN], ids=["litellm", "langchain"])
def test_a_completion_its_stream_and_an_embedding_are_the_servers(code, server, expected, embedded, tmp_path):
    said = run(["-W", "ignore", "-c", code.format(prompt=PROMPT, base=f"{server.url}/v1")], tmp_path)
    whole, streamed, vector = json.loads(said.splitlines()[-1])
    assert whole == streamed == expected
    assert vector == pytest.approx(embedded, abs=1e-6)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", [["--no-stream"], []], ids=["whole", "stream"])
def test_llm_completes(how, server, expected, tmp_path: Path):
    about = f'- model_id: here\n  model_name: random\n  api_base: "{server.url}/v1"\n  completion: true\n'
    for folder in (tmp_path / ".config" / "io.datasette.llm",):
        folder.mkdir(parents=True)
        (folder / "extra-openai-models.yaml").write_text(about)
    options = ["--key", "-", "-o", "temperature", "0", "-o", "max_tokens", "12"]
    assert run(["-m", "llm", "-m", "here", *options, *how, PROMPT], tmp_path) == expected + "\n"


LLM = """
import json, os
os.environ["OPENAI_BASE_URL"] = {base!r}
from llm.default_plugins.openai_models import OpenAIEmbeddingModel
model = OpenAIEmbeddingModel("here", "random")
model.key = "-"
print(json.dumps(model.embed({prompt!r})))
"""


@pytest.mark.timeout(120)
def test_llm_embeds(server, embedded, tmp_path: Path):
    said = run(["-W", "ignore", "-c", LLM.format(prompt=PROMPT, base=f"{server.url}/v1")], tmp_path)
    assert json.loads(said.splitlines()[-1]) == pytest.approx(embedded, abs=1e-6)
