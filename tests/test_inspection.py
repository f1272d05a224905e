"""What is in a weights file, found out without loading it; and everything that is not a model of ours refused."""

import errno
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from model import GPT, GPTConfig
from storage.errors import NotLoadable, StorageError
from storage.inspection import inspect
from storage.registry import ModelReference, resolve
from storage.runs import Workspace

CANARY = Path("/tmp/reliability_canary")
SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=4, vocab_size=11)


def reference(path, kind="trained"):
    return ModelReference("m", kind, path, f"out/m/{path.name}" if path.suffix == ".pt" else "out/m")


def refusal(path):
    """Return why a file is not loadable, after checking that it is one sentence without paths of the machine."""
    with pytest.raises(NotLoadable) as caught:
        inspect(reference(path))
    text = str(caught.value)
    assert "out/m" in text and len(text) < 400 and "\n" not in text and str(path.parent) not in text
    return text


def checkpoint(shape=SMALL, **changes):
    """Return a checkpoint as our trainer saves it; a change to None removes the key."""
    state = {
        "model": GPT(shape).state_dict(), "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []},
        "model_args": shape.model_args(), "iter_num": 7, "best_val_loss": 1.25, "config": {"dataset": "d"},
        "activation": shape.activation, "tied": shape.tied, **changes,
    }  # fmt: skip
    return {key: value for key, value in state.items() if value is not None}


def saved(path, state):
    torch.save(state, path)
    return path


def changed(path, name, change):
    """Rewrite one record of a torch file."""
    with zipfile.ZipFile(path) as old:
        records = [
            (i.filename, change(old.read(i)) if i.filename.endswith(name) else old.read(i)) for i in old.infolist()
        ]
    with zipfile.ZipFile(path, "w") as new:
        for record in records:
            new.writestr(*record)
    return path


# ---- what cannot be read


def huggingface(path):
    """Return a folder that says it holds a GPT-2."""
    (path / "m").mkdir()
    (path / "m" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (path / "m" / "model.safetensors").write_bytes(b"")
    return path / "m"


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", ["ckpt.pt", "model.safetensors"])
def test_other_things_in_the_place_of_weights_are_refused_at_once(tmp_path, name, make):
    folder = huggingface(tmp_path) if name != "ckpt.pt" else tmp_path
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    assert refusal(folder / name if name == "ckpt.pt" else folder).startswith(f"out/m/{name} is a ")


@pytest.mark.parametrize("reader", ["inspection.read_torch_file", "huggingface_folder.read_header"])
def test_a_disk_that_fails_while_weights_are_described_is_told_so(tmp_path, monkeypatch, reader):
    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = saved(tmp_path / "ckpt.pt", checkpoint()) if "torch" in reader else huggingface(tmp_path)
    monkeypatch.setattr(f"storage.{reader}", fail)
    assert refusal(path).endswith("cannot be read: Input/output error")


# ---- checkpoints of ours and of nanoGPT


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=2, vocab_size=3, bias=False),
        GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=2, vocab_size=3, tied=False, activation="gelu_new"),
    ],
)
def test_our_checkpoint_is_described(tmp_path, config):
    found = inspect(reference(saved(tmp_path / "ckpt.pt", checkpoint(config))))
    model = GPT(config)
    assert GPTConfig(**found.model_args) == config and found.kind == "checkpoint"
    assert found.parameters == model.num_params() and found.nbytes == 4 * model.num_params()
    assert {name: shape for name, (_, shape) in found.tensors.items()} == {
        name: tuple(p.shape) for name, p in model.named_parameters()
    }
    assert (found.iter_num, found.best_val_loss, found.config) == (7, 1.25, {"dataset": "d"})


def test_nanogpt_checkpoints_are_exact_gelu_and_tied_and_may_be_compiled_and_carry_masks(tmp_path):
    model = {"_orig_mod." + name: tensor for name, tensor in GPT(SMALL).state_dict().items()}
    for layer in range(SMALL.n_layer):
        model[f"_orig_mod.transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 4, 4).tril()
        model[f"_orig_mod.transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    state = checkpoint(model=model, best_val_loss=torch.tensor(1.5), activation=None, tied=None)
    found = inspect(reference(saved(tmp_path / "ckpt.pt", state)))
    assert found.model_args["activation"] == "gelu" and found.model_args["tied"] is True
    assert found.names["transformer.h.0.attn.c_attn.bias"] == "_orig_mod.transformer.h.0.attn.c_attn.bias"
    assert not any(name.endswith(".attn.bias") for name in found.names)


def test_a_head_stored_apart_is_untied_if_nothing_says_otherwise(tmp_path):
    state = checkpoint(GPTConfig(**{**SMALL.model_args(), "tied": False}), activation=None, tied=None)
    assert inspect(reference(saved(tmp_path / "ckpt.pt", state))).model_args["tied"] is False


def test_a_checkpoint_saved_on_a_gpu_is_read_without_one(tmp_path):
    path = saved(tmp_path / "ckpt.pt", checkpoint())
    changed(path, "data.pkl", lambda data: data.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0"))
    assert inspect(reference(path)).parameters == GPT(SMALL).num_params()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_read(tmp_path, dtype):
    state = checkpoint(model=GPT(SMALL).to(dtype).state_dict())
    assert inspect(reference(saved(tmp_path / "ckpt.pt", state))).nbytes == 2 * GPT(SMALL).num_params()


def test_model_args_of_before_the_bias_option_mean_biases(tmp_path):
    args = {key: value for key, value in SMALL.model_args().items() if key not in ("bias", "dropout")}
    assert inspect(reference(saved(tmp_path / "ckpt.pt", checkpoint(model_args=args)))).model_args["bias"] is True


def test_only_what_json_can_hold_is_kept_of_a_config(tmp_path):
    config = {
        "a": 1,
        "nan": float("nan"),
        "betas": (0.9, 0.95),
        "deep": [[1]],
        "t": torch.ones(1),
        3: 4,
        "s": "x" * 9999,
    }
    assert inspect(reference(saved(tmp_path / "ckpt.pt", checkpoint(config=config)))).config == {
        "a": 1, "betas": [0.9, 0.95],
    }  # fmt: skip


# ---- checkpoints that are not


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layer", 0), ("n_layer", 1001), ("n_layer", 10**9), ("n_layer", "12"), ("n_layer", True), ("n_layer", 1.0),
        ("n_layer", None), ("n_embd", 65537), ("n_embd", 9), ("n_head", 0), ("n_head", -2), ("block_size", 2**20 + 1),
        ("block_size", 10**12), ("vocab_size", -5), ("vocab_size", 2**24 + 1), ("vocab_size", None), ("bias", 1),
        ("bias", "no"), ("dropout", 1.0), ("dropout", -0.1), ("dropout", float("nan")), ("dropout", "0"),
    ],
)  # fmt: skip
def test_a_field_out_of_bounds_is_refused_by_name(tmp_path, field, value):
    state = checkpoint(model_args={**SMALL.model_args(), field: value})
    assert field in refusal(saved(tmp_path / "ckpt.pt", state))


def test_a_missing_field_is_named(tmp_path):
    args = {key: value for key, value in SMALL.model_args().items() if key != "n_embd"}
    assert "n_embd of out/m/ckpt.pt is missing" in refusal(saved(tmp_path / "ckpt.pt", checkpoint(model_args=args)))


def test_a_configuration_of_too_many_parameters_is_refused(tmp_path):
    args = {**SMALL.model_args(), "n_embd": 65536, "n_layer": 1000}
    assert "at most 20000000000 are loaded" in refusal(saved(tmp_path / "ckpt.pt", checkpoint(model_args=args)))


@pytest.mark.parametrize(("key", "value"), [("activation", "relu"), ("activation", 1), ("tied", "yes"), ("tied", 1)])
def test_activation_and_tied_are_checked(tmp_path, key, value):
    assert key in refusal(saved(tmp_path / "ckpt.pt", checkpoint(**{key: value})))


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ([1, 2], "no model_args"),
        ({}, "no model_args"),
        ({"weight": torch.ones(2)}, "no model_args"),
        (checkpoint(model_args=None), "no model_args"),
        (checkpoint(model=None), "no weights under the key 'model'"),
        (checkpoint(model={}), "no weights"),
        (checkpoint(model=[torch.ones(1)]), "no weights"),
        (checkpoint(model={**GPT(SMALL).state_dict(), "x": 3}), '"x" among its weights, which is no tensor'),
        (
            checkpoint(model_args={**SMALL.model_args(), "n_kv_head": 2}),
            'another architecture: its model_args have "n_kv',
        ),
        (
            checkpoint(tied=False, model={k: v for k, v in GPT(SMALL).state_dict().items() if "head" not in k}),
            "lm_head",
        ),
    ],
)
def test_a_file_of_something_else_says_so(tmp_path, state, why):
    assert why in refusal(saved(tmp_path / "ckpt.pt", state))


def test_missing_and_unexpected_tensors_are_named_three_at_most(tmp_path):
    model = {name.replace("attn", "attention"): tensor for name, tensor in GPT(SMALL).state_dict().items()}
    text = refusal(saved(tmp_path / "ckpt.pt", checkpoint(model=model)))
    assert 'lacks "transformer.h.0.attn.c_attn.bias"' in text and text.count("and 5 more") == 2


def test_a_wrong_shape_and_a_wrong_type_are_named(tmp_path):
    model = GPT(SMALL).state_dict()
    for tensor, why in ((torch.ones(8, 4), r"\(8, 4\).*means \(4, 8\)"), (torch.ones(4, 8).double(), "type F64")):
        state = checkpoint(model={**model, "transformer.wpe.weight": tensor})
        assert re.search("transformer.wpe.weight.*" + why, refusal(saved(tmp_path / "ckpt.pt", state)))


@pytest.mark.parametrize("tensor", [torch.ones(8, 4).t(), torch.ones(8, 8)[:4, :]])
def test_a_tensor_that_is_part_of_another_or_turned_is_refused_or_dense(tmp_path, tensor):
    model = {**GPT(SMALL).state_dict(), "transformer.wpe.weight": tensor}
    path = saved(tmp_path / "ckpt.pt", checkpoint(model=model))
    if tensor.is_contiguous():
        assert inspect(reference(path)).parameters > 0
    else:
        assert "is a view into a larger tensor" in refusal(path)


def test_one_record_may_not_serve_for_many_tensors(tmp_path):
    config = GPTConfig(n_layer=50, n_head=1, n_embd=64, block_size=4, vocab_size=11)
    model = GPT(config).state_dict()
    shared = {name: model["transformer.h.0." + name.split(".", 3)[3]] for name in model if ".h." in name}
    text = refusal(saved(tmp_path / "ckpt.pt", checkpoint(config, model={**model, **shared})))
    assert "bytes of weights and has" in text


def test_objects_that_are_no_plain_values_are_refused_by_name(tmp_path):
    state = checkpoint(best_val_loss=torch.ones(1).numpy()[0])
    assert "numpy" in refusal(saved(tmp_path / "ckpt.pt", state)) and "which no checkpoint needs" in refusal(
        tmp_path / "ckpt.pt"
    )


# ---- hostile files, from others and our own


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory):
    script = Path(__file__).resolve().parent.parent.parent / "shared" / "acceptance" / "make_bad_fixtures.py"
    if not script.exists():
        pytest.skip("no ../shared/acceptance beside this checkout")
    CANARY.unlink(missing_ok=True)
    root = tmp_path_factory.mktemp("fixtures")
    subprocess.run([sys.executable, str(script), str(root)], check=True, capture_output=True, timeout=60)
    return Workspace(root)


def test_every_hostile_fixture_is_refused_and_nothing_is_executed(fixtures):
    for folder in sorted(fixtures.out.iterdir()):
        for name in ("ckpt.pt", "model.safetensors"):
            if os.path.lexists(folder / name):
                with pytest.raises(StorageError):
                    inspect(resolve(fixtures, model_path=f"out/{folder.name}/{name}"))
    assert not CANARY.exists()


def test_hostile_safetensors_are_refused_with_a_right_config_too(fixtures):
    config = json.dumps(
        {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 8, "vocab_size": 8}
    )
    reasons = {}
    for folder in sorted(fixtures.out.glob("fx_st_*")):
        (folder / "config.json").write_text(config)
        reasons[folder.name[6:]] = refusal(folder)
    assert "ends after the file" in reasons["hdr63"] and "at most 4194304 are read" in reasons["hdrbig"]
    assert "nested too deeply" in reasons["deep"] and "overlaps" in reasons["overlap"]
    assert "does not fit its shape" in reasons["overflow"] and "cut short" in reasons["short"]


def test_real_files_of_other_projects_are_refused(shared):
    for path in (shared / "data" / "negative").rglob("ckpt.pt"):
        assert re.search("Git LFS pointer|another architecture", refusal(path))


# ---- cost


MEASURE = """
import sys
from pathlib import Path
from storage.errors import StorageError
from storage.inspection import inspect
from storage.registry import ModelReference

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
for path in sys.argv[1:]:
    try:
        inspect(ModelReference("m", "trained", Path(path), "out/m"))
        sys.exit(f"{path} was accepted")
    except StorageError:
        pass
print(peak() - before, "torch" in sys.modules)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure a peak of memory")
def test_files_made_to_take_memory_do_not_and_no_torch_is_needed(tmp_path):
    emoji = "\U0001f600".encode()
    bombs = {
        "objects": b"}" * 999_990,
        "text": b"X" + struct.pack("<I", 15_999_998) + b"a" * 15_999_994 + emoji,
        "texts": b"".join(b"X\x04\0\0\0" + emoji for _ in range(500_000)),
    }
    for name, pickle in bombs.items():
        with zipfile.ZipFile(tmp_path / f"{name}.pt", "w") as z:
            z.writestr("archive/data.pkl", b"\x80\x02" + pickle + b".")
    header = b'{"a":[' + b"[]," * 1_300_000 + b"[]]}"
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "m" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    command = [sys.executable, "-c", MEASURE, *map(str, sorted(tmp_path.glob("*.pt"))), str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent.parent)
    kilobytes, torch_loaded = done.stdout.split()
    assert int(kilobytes) < 200_000 and torch_loaded == "False", done.stderr
