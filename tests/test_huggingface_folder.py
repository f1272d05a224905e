"""Hugging Face GPT-2 folders, described from config.json and safetensors headers; all others refused."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from model import GPT, GPTConfig
from storage.errors import NotLoadable
from storage.inspection import inspect
from storage.registry import ModelReference

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=4, vocab_size=11)


def reference(path, kind="folder"):
    return ModelReference("m", kind, path, "out/m/model.safetensors")


def refusal(path):
    """Return why a folder is not loadable, after checking that it is one sentence without paths of the machine."""
    with pytest.raises(NotLoadable) as caught:
        inspect(reference(path))
    text = str(caught.value)
    assert "out/m" in text and len(text) < 400 and "\n" not in text and str(path.parent) not in text
    return text


def huggingface_config(config=SMALL, **changes):
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": config.n_layer, "n_head": config.n_head,
        "n_embd": config.n_embd, "n_positions": config.block_size, "vocab_size": config.vocab_size,
        "activation_function": "gelu_new", "tie_word_embeddings": config.tied, **changes,
    }  # fmt: skip


def stored_tensors(config=SMALL):
    """Return transformers' names and layout of a model's weights."""
    swapped = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    parameters = dict(GPT(config).named_parameters()).items()
    return {name: p.detach().t().contiguous() if name.endswith(swapped) else p.detach() for name, p in parameters}


def folder(path, config, tensors, name="model.safetensors"):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(tensors, path / name)
    return path


def test_a_folder_is_described(tmp_path):
    found = inspect(reference(folder(tmp_path / "m", huggingface_config(), stored_tensors())))
    assert found.kind == "huggingface" and found.parameters == GPT(SMALL).num_params()
    assert GPTConfig(**found.model_args) == GPTConfig(
        **{**SMALL.model_args(), "activation": "gelu_new", "dropout": 0.1}
    )


def test_a_folder_may_lack_the_prefix_and_carry_masks_and_a_tied_head(tmp_path):
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in stored_tensors().items()}
    tensors |= {"h.0.attn.bias": torch.ones(4, 4).bool(), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    found = inspect(reference(folder(tmp_path / "m", huggingface_config(), tensors)))
    assert found.names["transformer.wte.weight"] == "wte.weight" and "lm_head.weight" not in found.names


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"), ("model_type", None), ("architectures", ["GPT2ForSequenceClassification"]),
        ("architectures", "x"), ("activation_function", "relu"), ("activation_function", ["gelu"]), ("n_inner", 99),
        ("layer_norm_epsilon", 1e-6), ("layer_norm_epsilon", None), ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True), ("scale_attn_weights", False), ("add_cross_attention", True),
        ("n_layer", 10**9), ("n_head", 3), ("vocab_size", "11"), ("tie_word_embeddings", 1), ("resid_pdrop", 2),
    ],
)  # fmt: skip
def test_what_our_model_cannot_compute_is_refused_by_field(tmp_path, field, value):
    ours = {
        "activation_function": "activation",
        "tie_word_embeddings": "tied",
        "resid_pdrop": "dropout",
        "n_head": "n_embd",
    }
    path = folder(tmp_path / "m", huggingface_config(**{field: value}), stored_tensors())
    assert ours.get(field, field) in refusal(path)


@pytest.mark.parametrize("config", ["", "{", "[]", "null", "[" * 10**5, '{"model_type": NaN}'], ids=lambda c: c[:9])
def test_a_config_that_is_no_object_is_refused(tmp_path, config):
    assert "config.json of out/m" in refusal(folder(tmp_path / "m", config, stored_tensors()))


def test_a_folder_with_pickled_weights_only_says_to_convert_them(tmp_path):
    path = folder(tmp_path / "m", huggingface_config(), stored_tensors())
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    assert "convert it to safetensors" in refusal(path)
    (path / "pytorch_model.bin").unlink()
    assert "out/m/model.safetensors does not exist: the folder is not complete" in refusal(path)


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path):
    whole = stored_tensors()
    for tensors, why in (
        ({name: t for name, t in whole.items() if name != "transformer.ln_f.bias"}, 'lacks "transformer.ln_f.bias"'),
        ({**whole, "transformer.h.9.ln_1.bias": torch.ones(8)}, 'has "transformer.h.9.ln_1.bias"'),
        (
            {**whole, "transformer.h.0.mlp.c_fc.weight": torch.ones(32, 8)},
            r"shape (32, 8); its configuration means (8, 32)",
        ),
        ({**whole, "transformer.ln_f.bias": torch.ones(8).int()}, "type I32"),
        ({**whole, "wte.weight": torch.ones(11, 8)}, '"transformer.wte.weight" twice'),
    ):
        assert why in refusal(folder(tmp_path / "m", huggingface_config(), tensors))


def sharded(path, **changes):
    """Write a folder of two shards; `changes` replace files that the index names."""
    tensors = stored_tensors()
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for file, part in halves.items():
        folder(path, huggingface_config(), {name: tensors[name] for name in part}, file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**weight_map, **changes}}))
    return path


def test_a_sharded_folder_is_described(tmp_path):
    found = inspect(reference(sharded(tmp_path / "m")))
    assert {file for file, _ in found.places.values()} == {"model-1.safetensors", "model-2.safetensors"}


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/passwd", "x.bin", 7, None, "\ud800.safetensors", "a/b.safetensors"]
)
def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path, file):
    assert "names the file" in refusal(sharded(tmp_path / "m", **{"transformer.wte.weight": file}))


def test_a_shard_that_is_missing_a_link_or_without_its_tensor_is_refused(tmp_path):
    path = sharded(tmp_path / "m", **{"transformer.x": "model-1.safetensors"})
    assert 'lacks "transformer.x", which the index says it has' in refusal(path)
    (sharded(path) / "model-2.safetensors").unlink()
    assert "model-2.safetensors does not exist" in refusal(path)
    (path / "model-2.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(NotLoadable, match="is a link"):
        inspect(reference(path))


def test_links_are_followed_in_the_hugging_face_cache_only(tmp_path):
    blobs = folder(tmp_path / "blobs", huggingface_config(), stored_tensors())
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(blobs / name)
    assert inspect(reference(snapshot, "pretrained")).parameters == GPT(SMALL).num_params()
    with pytest.raises(NotLoadable, match="is a link"):
        inspect(reference(snapshot))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"PK\x03\x04" + b"\0" * 30, "is a PyTorch file"),
        (b"\x80\x02}.", "is a PyTorch file"),
        (b"hello, this is text", "is not a safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "is not a safetensors file"),
        (struct.pack("<Q", 2) + b"{}", "is not this kind of GPT-2: it lacks"),
        (struct.pack("<Q", 3) + b"{}", "ends after the file"),
        (struct.pack("<Q", 9) + b'{"a": 1} ', 'describes "a" wrongly'),
        (struct.pack("<Q", 5) + b"{\xff}  ", "not valid JSON"),
    ],
)
def test_each_kind_of_wrong_safetensors_has_its_own_sentence(tmp_path, content, why):
    path = folder(tmp_path / "m", huggingface_config(), stored_tensors())
    (path / "model.safetensors").write_bytes(content)
    assert why in refusal(path)


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("dtype", "F99"), ("dtype", ["F32"]), ("dtype", None), ("shape", [-1]), ("shape", [True]), ("shape", [1.0]),
        ("shape", [1] * 9), ("shape", [2]), ("shape", 1), ("shape", [[1]]), ("data_offsets", [4, 0]),
        ("data_offsets", [0]), ("data_offsets", [-4, 0]), ("data_offsets", None), ("data_offsets", ["0", "4"]),
    ],
)  # fmt: skip
def test_a_header_entry_that_cannot_be_is_refused(tmp_path, change, value):
    path = folder(tmp_path / "m", huggingface_config(), stored_tensors())
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], change: value}}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    assert "is damaged" in refusal(path)
