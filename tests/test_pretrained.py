"""Hugging Face folders in and out: read whole or refused, written whole or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from model import GPT, GPTConfig
from storage import pretrained
from storage.chat_format import end_of_turn, parse_messages, render, with_chat_tokens
from storage.checkpoints import load_model, open_model
from storage.errors import NotLoadable, NotWritable
from storage.pretrained import FileChanged, export, load_folder
from storage.registry import ModelReference, resolve
from storage.runs import Workspace
from storage.tokenizer import char_tokenizer, train_bpe

TEXT = "to be, or not to be: that is the question.\n" * 20
SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=300, activation="gelu_new")


@pytest.fixture
def tokenizer():
    return train_bpe([TEXT], 270)


@pytest.fixture
def exported(tmp_path, tokenizer):
    """Return a folder with a random model."""
    export(GPT(SMALL), tokenizer, tmp_path / "out" / "m")
    return tmp_path / "out" / "m"


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_what_is_exported_is_loaded_again(tmp_path, tokenizer, bias, tied, activation):
    config = GPTConfig(**{**SMALL.model_args(), "bias": bias, "tied": tied, "activation": activation, "dropout": 0.25})
    model = GPT(config).eval()
    export(model, tokenizer, tmp_path / "m")
    loaded, found = load_folder(tmp_path / "m")
    x = torch.arange(8)[None]
    torch.testing.assert_close(loaded(x)[0], model(x)[0], atol=1e-6, rtol=1e-6)
    assert loaded.config == GPTConfig(**{**config.model_args(), "bias": True, "tied": tied, "activation": activation})
    assert found.fingerprint == tokenizer.fingerprint and not loaded.training


def test_the_folder_holds_what_transformers_needs_and_nothing_else(exported):
    assert sorted(os.listdir(exported)) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert os.listdir(exported.parent) == ["m"]


def test_transformers_loads_model_and_tokenizer_with_no_other_file(exported, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(exported)
    ids = theirs(TEXT)["input_ids"]
    assert ids == tokenizer.encode(TEXT) and theirs.decode(ids) == TEXT
    assert (theirs.eos_token_id, theirs.eos_token) == (tokenizer.eot, "<|endoftext|>")
    model = AutoModelForCausalLM.from_pretrained(exported).eval()
    assert model.generation_config.eos_token_id == tokenizer.eot and model.config.n_ctx == 8
    ours, _ = load_folder(exported)
    prompt = torch.tensor([ids[:3]])
    mask = torch.ones_like(prompt)
    generated = model.generate(prompt, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert generated.tolist() == ours.generate(prompt, 5, temperature=0).tolist()


def test_transformers_loads_characters_too(tmp_path):
    from transformers import AutoTokenizer

    characters = char_tokenizer(TEXT + "é ,'n")
    export(GPT(GPTConfig(**{**SMALL.model_args(), "vocab_size": characters.n_vocab})), characters, tmp_path / "m")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "to be , n't that\n  é"
    assert theirs(text)["input_ids"] == characters.encode(text) and theirs.decode(theirs(text)["input_ids"]) == text
    assert json.loads((tmp_path / "m" / "config.json").read_text())["eos_token_id"] is None


def test_transformers_renders_conversations_as_we_do_and_stops_at_the_end_of_a_turn(tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chat = with_chat_tokens(tokenizer)
    export(GPT(GPTConfig(**{**SMALL.model_args(), "vocab_size": chat.n_vocab})), chat, tmp_path / "m")
    theirs, messages = AutoTokenizer.from_pretrained(tmp_path / "m"), [{"role": "user", "content": "to be"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == render(chat, parse_messages(messages))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert theirs.eos_token_id == model.generation_config.eos_token_id == end_of_turn(chat)
    assert load_folder(tmp_path / "m")[1].fingerprint == chat.fingerprint


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_halves_the_file_and_is_read_back_as_it_is(tmp_path, tokenizer, exported, dtype):
    model = GPT(SMALL)
    export(model, tokenizer, tmp_path / "half", dtype)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "half", exported)]
    assert sizes[0] < 0.6 * sizes[1]
    loaded, _ = load_folder(tmp_path / "half")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.to(dtype))


def test_another_type_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; it must be float32, float16 or bfloat16"):
        export(GPT(SMALL), tokenizer, tmp_path / "m", torch.int8)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fails_while_weights_are_read_is_told_so(exported, tokenizer, monkeypatch):
    workspace = Workspace(exported.parent.parent)
    opened = open_model(resolve(workspace, model_path="out/m"), workspace).model

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    for read in (lambda: load_folder(exported), lambda: opened.get_parameter("transformer.wte.weight")):
        with pytest.raises(NotLoadable, match="m cannot be read: Input/output error"):
            read()


def test_an_export_replaces_the_one_before_as_a_whole(exported, tokenizer):
    (exported / "old").write_bytes(b"")
    model = GPT(SMALL)
    export(model, tokenizer, exported)
    assert not (exported / "old").exists() and os.listdir(exported.parent) == ["m"]
    assert torch.equal(load_folder(exported)[0].lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("step", ["_write_folder", "inspect", "_put_in_place"])
def test_an_export_that_fails_leaves_the_one_before(exported, tokenizer, monkeypatch, step):
    before = (exported / "model.safetensors").read_bytes()

    def fail(*args):
        raise OSError("injected")

    monkeypatch.setattr(pretrained, step, fail)
    with pytest.raises(OSError, match="injected"):
        export(GPT(SMALL), tokenizer, exported)
    assert os.listdir(exported.parent) == ["m"] and (exported / "model.safetensors").read_bytes() == before


def test_an_export_to_a_read_only_disk_is_refused(exported, tokenizer, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(NotWritable, match=r"the disk is read-only: .*/m could not be written"):
        export(GPT(SMALL), tokenizer, exported)


def test_an_export_takes_the_place_of_a_link_to_nowhere(tmp_path, tokenizer):
    (tmp_path / "m").symlink_to("nowhere")
    export(GPT(SMALL), tokenizer, tmp_path / "m")
    assert (tmp_path / "m" / "config.json").is_file()


def test_a_rename_that_fails_puts_the_old_folder_back(exported, tokenizer, monkeypatch):
    rename = os.rename
    monkeypatch.setattr(
        os, "rename", lambda a, b: rename(a, b) if str(b).endswith(".tmp") else rename(a, b / "none" / "x")
    )
    with pytest.raises(OSError):
        export(GPT(SMALL), tokenizer, exported)
    monkeypatch.undo()
    left = os.listdir(exported.parent)
    assert len(left) == 1


def test_a_model_in_training_on_padded_vocabulary_is_exported(tmp_path, tokenizer):
    model = GPT(SMALL).train()
    export(model, tokenizer, tmp_path / "m")
    assert model.training and load_folder(tmp_path / "m")[0].config.vocab_size == 300 > tokenizer.n_vocab


# ---- in


def test_vocab_and_merges_do_as_well_as_tokenizer_json(exported, tokenizer):
    model = tokenizer.to_json()["model"]
    (exported / "vocab.json").write_text(json.dumps({**model["vocab"], "<|endoftext|>": tokenizer.eot}))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (exported / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (exported / "tokenizer.json").unlink()
    assert load_folder(exported)[1].encode(TEXT) == tokenizer.encode(TEXT)


def test_a_folder_without_a_tokenizer_says_what_is_missing(exported):
    (exported / "tokenizer.json").unlink()
    with pytest.raises(NotLoadable, match=r"m has no tokenizer: put its tokenizer\.json into the folder"):
        load_folder(exported)


def test_a_tokenizer_of_another_model_is_no_pair(exported):
    char_tokenizer("".join(map(chr, range(300, 700)))).save(exported / "tokenizer.json")
    with pytest.raises(NotLoadable, match="has 400 tokens and the model only 300"):
        load_folder(exported)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(tmp_path, tokenizer, number):
    model = GPT(SMALL)
    with torch.no_grad():
        model.transformer["ln_f"].weight[3] = number
    export(model, tokenizer, tmp_path / "m")
    with pytest.raises(NotLoadable, match=r"NaN or infinite numbers in transformer\.ln_f\.weight"):
        load_folder(tmp_path / "m")


def test_a_file_cut_short_while_it_is_read_is_refused_and_kills_nothing(exported, monkeypatch):
    read_weights = pretrained.read_weights

    def cut_then_read(*args):
        os.truncate(exported / "model.safetensors", 5000)
        return read_weights(*args)

    monkeypatch.setattr(pretrained, "read_weights", cut_then_read)
    with pytest.raises(NotLoadable, match="m changed while it was read"):
        load_folder(exported)


def test_a_folder_that_is_exported_anew_while_it_is_read_is_never_mixed(exported, tokenizer, monkeypatch):
    read_weights, said, new = pretrained.read_weights, [], GPT(SMALL)

    def replace_then_read(*args):
        if len(said) == 1:  # in the first attempt
            export(new, tokenizer, exported)
        return read_weights(*args)

    monkeypatch.setattr("storage.checkpoints.read_weights", replace_then_read)
    loaded = load_model(ModelReference("m", "folder", exported, "out/m"), Workspace(exported.parent), said.append)
    assert torch.equal(loaded.model.lm_head.weight, new.lm_head.weight)
    assert said[1] == "out/m changed while it was read; starting again"


@pytest.mark.parametrize("part_bytes", [1, 40 * 4 * SMALL.n_embd, 2**20])
@pytest.mark.parametrize("tied", [True, False])
def test_an_opened_model_reads_its_weights_one_by_one_and_as_they_are(
    tmp_path, tokenizer, tied, part_bytes, monkeypatch
):
    monkeypatch.setattr("storage.pretrained.PART_BYTES", part_bytes)
    model = GPT(GPTConfig(**{**SMALL.model_args(), "activation": "gelu_new", "tied": tied}))
    export(model, tokenizer, tmp_path / "m")
    opened = open_model(ModelReference("m", "folder", tmp_path / "m", "m"), Workspace(tmp_path))
    assert opened.model.config == model.config and opened.tokenizer.fingerprint == tokenizer.fingerprint
    for (name, read), (expected, p) in zip(opened.model.named_parameters(), model.named_parameters(), strict=True):
        assert name == expected and torch.equal(read, p)
        assert torch.equal(torch.cat(list(opened.model.parts(name))), p)
    x = torch.arange(8)[None]
    assert torch.equal(opened.model.load()(x)[0], model.eval()(x)[0])


def test_an_opened_model_stays_itself_when_another_takes_its_name_and_is_refused_when_written_over(exported, tokenizer):
    reference, workspace = ModelReference("m", "folder", exported, "m"), Workspace(exported.parent)
    opened = open_model(reference, workspace)
    before = opened.model.get_parameter("transformer.wte.weight")
    export(GPT(SMALL), tokenizer, exported)
    assert torch.equal(opened.model.get_parameter("transformer.wte.weight"), before)
    opened = open_model(reference, workspace)
    assert not torch.equal(opened.model.get_parameter("transformer.wte.weight"), before)
    os.truncate(exported / "model.safetensors", 5000)
    with pytest.raises(FileChanged, match="m changed while it was read"):
        opened.model.get_parameter("transformer.ln_f.weight")


def test_weights_are_dense_in_memory_of_their_own(exported):
    model, _ = load_folder(exported)
    assert all(p.is_contiguous() for p in model.parameters())
    (exported / "model.safetensors").write_bytes(b"")
    assert torch.isfinite(model(torch.arange(8)[None])[0]).all()


def test_the_one_door_loads_folders_by_path_and_by_name(tmp_path, exported):
    workspace = Workspace(tmp_path, tmp_path / "out")
    for reference in (resolve(workspace, model_path="out/m"), resolve(workspace, model_type="m")):
        loaded = load_model(reference, workspace)
        assert loaded.iter_num is None and loaded.config == {} and loaded.reference == reference
        assert loaded.nbytes == 4 * loaded.model.num_params()


def test_the_one_door_fetches_what_is_not_there_yet(tmp_path, exported, monkeypatch):
    monkeypatch.setattr("storage.checkpoints.fetch", lambda name, workspace, say: exported)
    loaded = load_model(ModelReference("gpt2", "pretrained", None, "gpt2"), Workspace(tmp_path))
    assert loaded.reference.path == exported and loaded.model.config.n_layer == 2


def test_gpt2s_size_without_a_tokenizer_means_gpt2s_own(tmp_path, tokenizer, shared, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "data" / "gpt2_bpe" / "tiktoken_cache"))
    config = GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=2, vocab_size=50257)
    export(GPT(config), tokenizer, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    assert load_folder(tmp_path / "m")[1].kind == "gpt2"


def test_a_changed_config_no_longer_fits_the_weights(exported):
    edit(exported, n_positions=9)
    with pytest.raises(NotLoadable, match=r"transformer\.wpe\.weight in m has the shape \(8, 16\)"):
        load_folder(exported)
