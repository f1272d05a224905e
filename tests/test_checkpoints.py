"""Checkpoints: saved whole or not at all, proven by their manifests, and loaded through one careful door."""

import errno
import json
import os
import pickle
import stat

import pytest
import torch

from model import GPT, GPTConfig
from storage import checkpoints, files
from storage.checkpoints import damage, load_model, load_training_state, newest_valid, save_checkpoint
from storage.errors import NoSpace, NotFound, NotLoadable, StorageError
from storage.registry import resolve
from storage.runs import Workspace
from storage.tokenizer import char_tokenizer

CHARACTERS = "abcdefgh \n"
SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=4, vocab_size=10)


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path)


@pytest.fixture
def run(workspace):
    """Return a run with a tokenizer and no checkpoint yet."""
    run = workspace.run("m")
    run.folder.mkdir(parents=True)
    char_tokenizer(CHARACTERS).save(run.tokenizer)
    return run


def state(iter_num=0, shape=SMALL, **changes):
    model = GPT(shape)
    return {
        "model": model.state_dict(), "optimizer": {"state": {}, "param_groups": []}, "model_args": shape.model_args(),
        "iter_num": iter_num, "best_val_loss": 1.5, "config": {"dataset": "d", "betas": (0.9, 0.95)},
        "activation": shape.activation, "tied": shape.tied, "rng": torch.get_rng_state(), **changes,
    }  # fmt: skip


def load(workspace, path="out/m/ckpt.pt"):
    return load_model(resolve(workspace, model_path=path), workspace)


def nanogpt(run, model=None, config=None, **args):
    """Save what nanoGPT saves, the way it saves it."""
    model = GPT(SMALL).state_dict() if model is None else model
    torch.save(
        {"model": model, "optimizer": {}, "model_args": {**SMALL.model_args(), **args}, "iter_num": 3,
         "best_val_loss": torch.tensor(1.5), "config": config or {}},
        run.checkpoint,
    )  # fmt: skip


# ---- saving


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_what_is_saved_is_loaded(workspace, run, bias, tied, activation):
    config = GPTConfig(**{**SMALL.model_args(), "bias": bias, "tied": tied, "activation": activation})
    saved = state(7, config)
    save_checkpoint(run.checkpoint, saved)
    loaded = load(workspace)
    assert loaded.model.config == config and not loaded.model.training
    assert (loaded.iter_num, loaded.config["dataset"], loaded.tokenizer.n_vocab) == (7, "d", 10)
    assert loaded.nbytes == 4 * loaded.model.num_params() and loaded.reference.id == "m"
    assert all(torch.equal(tensor, saved["model"][name]) for name, tensor in loaded.model.state_dict().items())


def test_the_manifest_says_what_is_in_the_file(run):
    save_checkpoint(run.checkpoint, state(7))
    manifest = files.read_json(run.manifest(run.checkpoint))
    assert manifest["size"] == run.checkpoint.stat().st_size and len(manifest["sha256"]) == 64
    assert (manifest["iter_num"], manifest["best_val_loss"]) == (7, 1.5)
    assert manifest["model_args"] == SMALL.model_args() and manifest["config"]["betas"] == [0.9, 0.95]
    assert run.describe()["iter_num"] == 7 and run.describe()["damaged"] is None


def test_the_one_before_is_kept_and_only_that(run):
    for i in range(4):
        save_checkpoint(run.checkpoint, state(i))
    assert load_training_state(run.previous)["iter_num"] == 2
    assert sorted(os.listdir(run.folder)) == ["ckpt.prev.pt", "ckpt.pt", "ckpt.pt.json", "tokenizer.json"]


def test_the_best_checkpoint_has_its_own_manifest_and_no_predecessor(run):
    for i in range(2):
        save_checkpoint(run.best, state(i))
    assert sorted(os.listdir(run.folder)) == ["best.pt", "best.pt.json", "tokenizer.json"]
    assert damage(run.best) is None


def test_a_full_training_state_comes_back_bit_by_bit(run):
    model = GPT(SMALL)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))[1].backward()
    optimizer.step()
    data = {"epoch": 1, "order": torch.arange(5), "seed": 2**40, "python": (3, (1, 2), None)}
    save_checkpoint(run.checkpoint, state(model=model.state_dict(), optimizer=optimizer.state_dict(), data_state=data))
    found = load_training_state(run.checkpoint)
    GPT(SMALL).load_state_dict(found["model"])
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert found["data_state"]["seed"] == 2**40 and torch.equal(found["data_state"]["order"], torch.arange(5))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": {}}, "no weights"),
        ({"model_args": {}}, "n_layer of ckpt.pt is missing"),
        ({"best_val_loss": torch.ones(1).numpy()[0]}, "numpy"),
        ({"model": GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=10)).state_dict()}, "lacks"),
    ],
)
def test_a_state_that_could_not_be_loaded_again_is_not_saved(run, changes, why):
    save_checkpoint(run.checkpoint, state(1))
    with pytest.raises(NotLoadable, match=why):
        save_checkpoint(run.checkpoint, state(2, **changes))
    assert load_training_state(run.checkpoint)["iter_num"] == 1 and not run.previous.exists()


class FullDisk:
    """A file on a disk that has room for `room` bytes more."""

    def __init__(self, path, mode, room, number):
        self.f, self.room, self.number = path.open(mode), room, number

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(self.number, os.strerror(self.number))
        return self.f.write(data)

    def __getattr__(self, name):
        return getattr(self.f, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.f.close()


@pytest.mark.fault("F3", "ENOSPC and EIO after so many bytes of a save")
@pytest.mark.parametrize("room", [0, 10, 3000, 7000])
@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, NoSpace), (errno.EIO, OSError)])
def test_a_disk_that_fails_leaves_the_last_checkpoint_and_the_next_save_succeeds(run, monkeypatch, room, number, error):
    save_checkpoint(run.checkpoint, state(1))
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", lambda path, mode: FullDisk(path, mode, room, number), raising=False)
        with pytest.raises(error):
            save_checkpoint(run.checkpoint, state(2))
    assert newest_valid(run) == run.checkpoint and load_training_state(run.checkpoint)["iter_num"] == 1
    assert not [name for name in os.listdir(run.folder) if name.startswith(".")]
    save_checkpoint(run.checkpoint, state(3))
    assert load_training_state(run.checkpoint)["iter_num"] == 3


def test_a_disk_that_returns_other_bytes_is_noticed_before_the_rename(run, monkeypatch):
    save_checkpoint(run.checkpoint, state(1))
    monkeypatch.setattr(checkpoints, "sha256_of", lambda path: "0" * 64)
    with pytest.raises(OSError, match="reads back differently"):
        save_checkpoint(run.checkpoint, state(2))
    assert damage(run.checkpoint) is None and load_training_state(run.checkpoint)["iter_num"] == 1


class Crash(BaseException):
    """The power goes: nothing after this runs, not even clean-up by our own code."""


@pytest.mark.fault("F1", "the power goes before each call to the system of a save")
def test_whatever_moment_the_power_goes_the_run_has_a_whole_checkpoint(run, monkeypatch):
    originals = {name: getattr(os, name) for name in ("fsync", "replace", "unlink", "link")}
    for moment in range(100):
        save_checkpoint(run.checkpoint, state(10))
        save_checkpoint(run.checkpoint, state(20))
        left = moment

        def counting(name):
            def call(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    raise Crash
                return originals[name](*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in originals:
                patch.setattr(os, name, counting(name))
            try:
                save_checkpoint(run.checkpoint, state(30))
            except Crash:
                pass
            else:
                break
        found = load_training_state(newest_valid(run))["iter_num"]
        assert found in (20, 30) and damage(run.checkpoint) is None, moment
        files.sweep_temporary(run.folder)
        assert not [name for name in os.listdir(run.folder) if name.startswith(".")]
    assert 4 < moment < 99


def test_saving_works_where_there_are_no_hard_links(run, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(errno.EPERM, "none here")))
    for i in range(3):
        save_checkpoint(run.checkpoint, state(i))
    assert load_training_state(run.checkpoint)["iter_num"] == 2 and load_training_state(run.previous)["iter_num"] == 1


@pytest.mark.fault("F2", "a recorder of every fsync and rename of a save")
def test_everything_is_synced_before_it_takes_its_name(run, monkeypatch):
    save_checkpoint(run.checkpoint, state(0))
    order, fsync, replace = [], os.fsync, os.replace

    def kind(fd):
        return "folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"

    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(kind(fd)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append(os.path.basename(new)), replace(old, new)))
    save_checkpoint(run.checkpoint, state(1))
    assert order == ["file", "ckpt.prev.pt", "file", "ckpt.pt.json", "folder", "ckpt.pt", "folder"]


# ---- proving


def flip(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def zero(path):
    path.write_bytes(b"\0" * path.stat().st_size)


@pytest.mark.fault("F4", "the newest checkpoint flipped, cut, zeroed, emptied")
@pytest.mark.parametrize("harm", [flip, truncate, zero, lambda path: path.write_bytes(b"")])
def test_a_damaged_newest_is_named_and_the_one_before_is_used(workspace, run, harm):
    save_checkpoint(run.checkpoint, state(1))
    save_checkpoint(run.checkpoint, state(2))
    harm(run.checkpoint)
    said = []
    assert newest_valid(run, said.append) == run.previous
    assert len(said) == 1 and said[0].startswith("ckpt.pt ")
    assert load_training_state(run.previous)["iter_num"] == 1
    with pytest.raises(NotLoadable):
        load(workspace)


@pytest.mark.parametrize("at", [0.01, 0.2, 0.4, 0.6, 0.8, 0.95, 0.999])
def test_a_single_bit_anywhere_is_noticed(workspace, run, at):
    save_checkpoint(run.checkpoint, state(1))
    flip(run.checkpoint, at)
    with pytest.raises(NotLoadable):
        load(workspace)


@pytest.mark.fault("F4", "the manifest deleted")
def test_without_its_manifest_a_whole_checkpoint_still_counts_and_a_damaged_one_does_not(run):
    save_checkpoint(run.checkpoint, state(1))
    run.manifest(run.checkpoint).unlink()
    assert newest_valid(run) == run.checkpoint
    data = run.checkpoint.read_bytes()
    place = data.index(GPT(SMALL).transformer["ln_f"].weight.detach().numpy().tobytes())
    run.checkpoint.write_bytes(data[:place] + b"\1" + data[place + 1 :])
    assert "checksum" in damage(run.checkpoint)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"size": "x"}', b"null"])
def test_a_broken_manifest_is_no_reason_to_lose_a_checkpoint(run, content):
    save_checkpoint(run.checkpoint, state(1))
    run.manifest(run.checkpoint).write_bytes(content)
    if content.startswith(b'{"size'):
        assert "were written" in damage(run.checkpoint)
    else:
        assert newest_valid(run) == run.checkpoint


def test_a_file_that_was_replaced_by_hand_says_what_to_do(run):
    save_checkpoint(run.checkpoint, state(1))
    torch.save(state(2, padding=torch.ones(99)), run.checkpoint)
    assert damage(run.checkpoint).endswith("if it was replaced on purpose, delete the .json beside it")


def test_the_best_is_used_when_nothing_else_is_left(run):
    for path in (run.best, run.checkpoint):
        save_checkpoint(path, state(1))
    zero(run.checkpoint)
    assert newest_valid(run) == run.best


def test_a_run_without_a_whole_checkpoint_says_why(run):
    with pytest.raises(NotFound, match=r"out/m has no checkpoint$"):
        newest_valid(run)
    run.checkpoint.write_bytes(b"hello")
    with pytest.raises(NotFound, match=r"that is whole: ckpt\.pt is a text file"):
        newest_valid(run)


# ---- loading nanoGPT's


def test_a_nanogpt_checkpoint_is_loaded_compiled_with_masks_and_a_meta_pkl(workspace, run):
    model = GPT(SMALL)
    theirs = {"_orig_mod." + name: tensor for name, tensor in model.state_dict().items()}
    theirs["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4).tril()
    nanogpt(run, theirs)
    run.tokenizer.unlink()
    stoi = {character: i for i, character in enumerate(sorted(CHARACTERS))}
    meta = {"vocab_size": 10, "stoi": stoi, "itos": {i: character for character, i in stoi.items()}}
    (run.folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    loaded = load(workspace)
    x = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded.model(x)[0], model.eval()(x)[0])
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("head")) == "head" and loaded.iter_num == 3
    assert loaded.model.config.activation == "gelu" and loaded.model.config.tied
    GPT(SMALL).load_state_dict(load_training_state(run.checkpoint)["model"])


@pytest.mark.parametrize("same", [True, False])
def test_a_head_stored_apart_is_tied_if_it_is_equal(workspace, run, same):
    model = {name: tensor.clone() for name, tensor in GPT(SMALL).state_dict().items()}
    model["lm_head.weight"] += 0 if same else 1
    nanogpt(run, model)
    loaded = load(workspace).model
    assert loaded.config.tied is same and torch.equal(loaded.lm_head.weight, model["lm_head.weight"])
    assert (loaded.lm_head.weight is loaded.transformer["wte"].weight) is same


def test_the_characters_are_found_in_the_folder_of_the_dataset(workspace, run):
    nanogpt(run, config={"dataset": "chars"})
    run.tokenizer.unlink()
    with pytest.raises(NotLoadable, match=r"has no tokenizer: put tokenizer\.json or nanoGPT's meta\.pkl beside it"):
        load(workspace)
    (workspace.data / "chars").mkdir(parents=True)
    stoi = {character: i for i, character in enumerate(CHARACTERS)}
    (workspace.data / "chars" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 10, "stoi": stoi}))
    assert load(workspace).tokenizer.n_vocab == 10


@pytest.mark.parametrize("dataset", ["../secret", "/etc", "a/b", 7, "\ud800", ""])
def test_a_dataset_that_is_no_name_is_not_looked_for(workspace, run, dataset):
    (workspace.root / "secret").mkdir()
    (workspace.root / "secret" / "meta.pkl").write_bytes(
        pickle.dumps({"stoi": dict(zip(CHARACTERS, range(10), strict=True))})
    )
    nanogpt(run, config={"dataset": dataset})
    run.tokenizer.unlink()
    with pytest.raises(NotLoadable, match="has no tokenizer"):
        load(workspace)


def test_a_hostile_meta_pkl_is_refused_and_not_executed(workspace, run, tmp_path):
    nanogpt(run)
    run.tokenizer.unlink()
    canary = tmp_path / "canary"
    (run.folder / "meta.pkl").write_bytes(b"cbuiltins\nopen\n(S'%s'\nS'w'\ntR." % str(canary).encode())
    with pytest.raises(NotLoadable, match=r"meta\.pkl"):
        load(workspace)
    assert not canary.exists()


def test_gpt2s_vocabulary_means_gpt2s_tokenizer(workspace, run, shared, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "data" / "gpt2_bpe" / "tiktoken_cache"))
    run.tokenizer.unlink()
    for size in (50257, 50304):
        config = GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=2, vocab_size=size)
        save_checkpoint(run.checkpoint, state(shape=config))
        assert load(workspace).tokenizer.kind == "gpt2"


def test_a_tokenizer_larger_than_the_model_is_no_pair(workspace, run):
    char_tokenizer(CHARACTERS + "XY").save(run.tokenizer)
    save_checkpoint(run.checkpoint, state())
    with pytest.raises(NotLoadable, match="12 tokens and the model only 10"):
        load(workspace)


# ---- refusing


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(workspace, run, number):
    model = GPT(SMALL).state_dict()
    model["transformer.h.1.mlp.c_fc.bias"][3] = number
    nanogpt(run, model)
    with pytest.raises(NotLoadable, match=r"NaN or infinite numbers in transformer\.h\.1\.mlp\.c_fc\.bias"):
        load(workspace)


def test_large_but_finite_weights_are_loaded(workspace, run):
    model = {name: torch.full_like(tensor, 3e38) for name, tensor in GPT(SMALL).state_dict().items()}
    model["lm_head.weight"] = model["transformer.wte.weight"]
    nanogpt(run, model)
    assert load(workspace).model.lm_head.weight[0, 0] == 3e38


def test_half_precision_is_kept_and_a_mixture_becomes_float32(workspace, run):
    half = {name: tensor.half() for name, tensor in GPT(SMALL).state_dict().items()}
    nanogpt(run, {**half, "lm_head.weight": half["transformer.wte.weight"]})
    assert load(workspace).model.lm_head.weight.dtype == torch.float16
    nanogpt(run, {**half, "transformer.ln_f.weight": torch.ones(8), "lm_head.weight": half["transformer.wte.weight"]})
    assert {p.dtype for p in load(workspace).model.parameters()} == {torch.float32}


def test_a_file_that_changes_each_time_it_is_looked_at_is_refused(workspace, run, monkeypatch):
    save_checkpoint(run.checkpoint, state())
    other = state(shape=GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=10))
    monkeypatch.setattr(checkpoints, "damage", lambda path: torch.save(other, path))
    with pytest.raises(NotLoadable, match=r"out/m/ckpt\.pt changed while it was read"):
        load(workspace)


def test_a_checkpoint_saved_while_the_one_before_is_loaded_is_loaded_instead(workspace, run, monkeypatch):
    save_checkpoint(run.checkpoint, state(1))
    new = state(2)

    def damage_then_save(path):
        monkeypatch.undo()
        save_checkpoint(path, new)
        return damage(path)

    monkeypatch.setattr(checkpoints, "damage", damage_then_save)
    loaded = load(workspace)
    assert loaded.iter_num == 2 and torch.equal(loaded.model.lm_head.weight, new["model"]["lm_head.weight"])


class Evil:
    """What a pickle can do when it is opened."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


def test_a_pickle_that_appears_after_the_inspection_is_not_executed(workspace, run, monkeypatch, tmp_path):
    save_checkpoint(run.checkpoint, state())
    monkeypatch.setattr(checkpoints, "damage", lambda path: torch.save(Evil(tmp_path / "canary"), path))
    for loading in (lambda: load(workspace), lambda: load_training_state(run.checkpoint)):
        save_checkpoint(run.checkpoint, state())
        with pytest.raises(NotLoadable):
            loading()
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("harm", [truncate, zero])
def test_a_model_in_use_does_not_depend_on_its_file(workspace, run, harm):
    save_checkpoint(run.checkpoint, state())
    model, x = load(workspace).model, torch.tensor([[1, 2, 3]])
    before = model(x)[0]
    harm(run.checkpoint)
    assert torch.equal(model(x)[0], before)


def test_progress_is_told_in_sentences(workspace, run):
    save_checkpoint(run.checkpoint, state())
    said = []
    load_model(resolve(workspace, model_path="out/m"), workspace, said.append)
    assert said == ["loading out/m: 0.0 million parameters"]


def test_no_refusal_leaves_an_open_file(workspace, run):
    before = len(os.listdir("/dev/fd"))
    for content in (b"", b"hello", b"PK\x03\x04" + b"\0" * 99):
        run.checkpoint.write_bytes(content)
        with pytest.raises(StorageError):
            load(workspace)
    assert len(os.listdir("/dev/fd")) == before


def test_a_manifest_is_strict_json_even_for_an_infinite_loss(run):
    save_checkpoint(run.checkpoint, state(best_val_loss=float("inf"), config={"x": float("nan"), "lr": 1e-3}))
    manifest = json.loads(run.manifest(run.checkpoint).read_text(), parse_constant=pytest.fail)
    assert manifest["best_val_loss"] is None and manifest["config"] == {"lr": 1e-3}
