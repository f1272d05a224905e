"""Which model is served: the choice at the start, by request, and again after the worker was replaced."""

import json

import pytest
from fakes import FakeEngine, byte_tokenizer

from storage.errors import NotFound
from storage.registry import BUNDLED
from storage.runs import Workspace
from web.errors import Refused
from web.loading import ModelLoader, first_choice, state_file
from web.settings import Settings


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def loader(tmp_path, tokenizer, **settings) -> tuple[ModelLoader, FakeEngine]:
    engine = FakeEngine(tokenizer)
    return ModelLoader(Settings(root=tmp_path, **settings), engine, Workspace(tmp_path)), engine


def test_the_bundled_model_is_the_first_choice_unless_another_or_none_is_named():
    assert first_choice(Settings()) == {"model_type": BUNDLED}
    assert first_choice(Settings(model_type="gpt2")) == {"model_type": "gpt2"}
    assert first_choice(Settings(model_path="out/x")) == {"model_path": "out/x"}
    assert first_choice(Settings(model_type="none")) is None


def test_the_last_model_is_served_again_and_not_the_first(tmp_path, tokenizer):
    first, _ = loader(tmp_path, tokenizer, model_type="gpt2")
    first.start(again=False)
    first.load({"model_type": "gpt2-medium"})
    again, engine = loader(tmp_path, tokenizer, model_type="gpt2")
    assert again.start(again=True).id == "gpt2-medium" and engine.loads[-1].id == "gpt2-medium"


def test_a_new_start_forgets_what_was_loaded_before(tmp_path, tokenizer):
    loader(tmp_path, tokenizer)[0].load({"model_type": "gpt2-medium"})
    assert loader(tmp_path, tokenizer, model_type="gpt2")[0].start(again=False).id == "gpt2"


def test_an_unloaded_model_is_not_loaded_again(tmp_path, tokenizer):
    first, _ = loader(tmp_path, tokenizer, model_type="gpt2")
    first.start(again=False)
    first.unload()
    assert loader(tmp_path, tokenizer, model_type="gpt2")[0].start(again=True) is None


def test_a_model_that_has_gone_leaves_the_server_without_one(tmp_path, tokenizer):
    (tmp_path / "out").mkdir()
    state_file(Workspace(tmp_path)).write_text(json.dumps({"model": {"model_path": "out/gone/ckpt.pt"}}))
    again, _ = loader(tmp_path, tokenizer)
    assert again.start(again=True) is None and not again.starting


def test_the_first_model_must_load(tmp_path, tokenizer):
    first, _ = loader(tmp_path, tokenizer, model_path="out/gone/ckpt.pt")
    with pytest.raises(NotFound):
        first.start(again=False)
    assert not first.starting


@pytest.mark.parametrize("content", ["", "[]", '{"model": 5}', "{", '{"model": {"model_type": 5}}'])
def test_a_damaged_note_is_as_good_as_none(tmp_path, tokenizer, content):
    (tmp_path / "out").mkdir()
    state_file(Workspace(tmp_path)).write_text(content)
    again, _ = loader(tmp_path, tokenizer, model_type="gpt2")
    served = again.start(again=True)
    assert served is None or served.id == "gpt2"


def test_what_no_device_can_serve_is_refused_in_its_own_words(tmp_path, tokenizer):
    first, engine = loader(tmp_path, tokenizer)

    def fail(reference):
        raise ValueError("dtype is 'int8', which this runner does not have")

    engine.load = fail
    with pytest.raises(Refused, match="int8"):
        first.load({"model_type": "gpt2"})
    assert not state_file(Workspace(tmp_path)).exists()
