"""From what a user calls a model to where it is; and nothing outside the three folders, whatever the spelling."""

import os

import pytest

from storage.errors import BadName, NotFound, NotLoadable, StorageError
from storage.registry import BUNDLED, PATH_RULE, PRETRAINED, pretrained_names, resolve
from storage.runs import Workspace


def touch(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture
def workspace(tmp_path):
    for name in (
        "out/run/ckpt.pt",
        "out/run/best.pt",
        "out/run/train.log",
        "out/exported/config.json",
        "out/exported/model.safetensors",
        "out/nested/hf/model.safetensors",
        "out/nested/hf/config.json",
        "models/tiny-shakespeare/config.json",
        "local/gpt2-medium/config.json",
        "local/mine/config.json",
        "local/empty/README",
        "secret/ckpt.pt",
    ):
        touch(tmp_path / name)
    return Workspace(tmp_path, tmp_path / "local")


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("out/rum/ckpt.pt", "; did you mean run?"),
        ("out/nothing", ""),
        ("out/run/ckpt-100.pt", ""),  # the run is right
    ],
)
def test_a_run_that_is_not_there_is_refused_with_the_nearest_name(workspace, value, hint):
    with pytest.raises(NotFound) as caught:
        resolve(workspace, model_path=value)
    assert str(caught.value) == f"{value} does not exist{hint}"


@pytest.mark.parametrize(
    ("value", "id", "kind", "path"),
    [
        ("out/run/ckpt.pt", "run", "trained", "out/run/ckpt.pt"),
        ("out/run", "run", "trained", "out/run/ckpt.pt"),
        ("out/run/", "run", "trained", "out/run/ckpt.pt"),
        ("out/run/best.pt", "run/best", "trained", "out/run/best.pt"),
        ("out/exported", "exported", "folder", "out/exported"),
        ("out/exported/model.safetensors", "exported", "folder", "out/exported"),
        ("out/nested/hf", "nested/hf", "folder", "out/nested/hf"),
        ("out/nested/hf/model.safetensors", "nested/hf", "folder", "out/nested/hf"),
        ("models/tiny-shakespeare", BUNDLED, "bundled", "models/tiny-shakespeare"),
        ("gpt2-medium", "gpt2-medium", "pretrained", "local/gpt2-medium"),
        ("mine", "mine", "folder", "local/mine"),
    ],
)
def test_every_documented_path_is_found(workspace, value, id, kind, path):
    reference = resolve(workspace, model_path=value)
    assert (reference.id, reference.kind, reference.label) == (id, kind, value)
    assert reference.path == workspace.root / path


def test_names_are_found_bundled_local_or_are_still_to_be_fetched(workspace):
    assert resolve(workspace, model_type=BUNDLED).path == workspace.models / BUNDLED
    assert resolve(workspace, model_type="gpt2-medium").path == workspace.root / "local/gpt2-medium"
    assert resolve(workspace, model_type="gpt2").path is None
    assert resolve(workspace, model_type="mine").kind == "folder"


def test_the_names_are_the_five_the_bundled_one_and_the_local_folders(workspace):
    assert pretrained_names(workspace) == [*PRETRAINED, BUNDLED, "mine"]
    assert pretrained_names(Workspace(workspace.root)) == [*PRETRAINED, BUNDLED]


def test_a_bundled_model_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(NotFound, match="models/tiny-shakespeare is not there"):
        resolve(Workspace(tmp_path), model_type=BUNDLED)


@pytest.mark.parametrize("given", [{}, {"model_path": "out/run", "model_type": "gpt2"}])
def test_exactly_one_of_path_and_type_is_asked_for(workspace, given):
    with pytest.raises(BadName, match="exactly one of model_path and model_type"):
        resolve(workspace, **given)


@pytest.mark.parametrize("value", [7, 0, True, 1.5, ["out/run"], {"a": 1}, "", b"out/run"], ids=ascii)
@pytest.mark.parametrize("field", ["model_path", "model_type"])
def test_what_is_no_text_is_refused_by_field(workspace, field, value):
    with pytest.raises(BadName, match=f"^{field} is "):
        resolve(workspace, **{field: value})


@pytest.mark.parametrize(
    "value", ["gpt5", "gpt2:main", "http://169.254.169.254/gpt2", "g" * 5000, "evil/x", "\ud800", "run"]
)
def test_an_unknown_type_is_refused_with_the_known_ones(workspace, value):
    rule = r"it must be one of gpt2, .*; a trained model has a model_path: out/<name>"
    with pytest.raises((BadName, NotFound), match=rule):
        resolve(workspace, model_type=value)


OUTSIDE = [
    "/etc/passwd", "/etc/no_such_file", "out/x/../../etc/passwd", "../secret/ckpt.pt", "~/.ssh/id_rsa",
    "out/%2e%2e/etc/passwd", "out/run/ckpt.pt#/../x", "/proc/self/environ", "/dev/zero", "out/*/ckpt.pt",
    "out/\uff0e\uff0e/ckpt.pt", "out/\ud800/ckpt.pt", "out/run/ckpt.pt\0", "\\\\x", "out//run", "C:\\out\\run",
    "./out/run", "out/run\n", "file:///etc/passwd", "/", "//", "x//", "out/run//",
]  # fmt: skip
NO_MODELS_PATH = [
    "secret/ckpt.pt", "secret/none.pt", "out", "out/", "models", "data/x/train.bin", "out/run/a/b/c", "models/a/b/c",
    "x", "x/",
]  # fmt: skip


@pytest.mark.parametrize("value", OUTSIDE, ids=ascii)
def test_a_path_outside_gets_one_reply_whether_it_exists_or_not(workspace, value):
    with pytest.raises(BadName) as caught:
        resolve(Workspace(workspace.root), model_path=value)
    assert str(caught.value) == f"model_path is not one that can be loaded; {PATH_RULE}"  # nor is it repeated


@pytest.mark.parametrize("value", NO_MODELS_PATH)
def test_names_that_are_no_models_path_are_repeated_whether_they_exist_or_not(workspace, value):
    with pytest.raises(BadName) as caught:
        resolve(Workspace(workspace.root), model_path=value)
    assert str(caught.value) == f'model_path is "{value}"; {PATH_RULE}'


def test_refusals_name_no_folder_of_the_machine(workspace):
    missing = ["out/none/ckpt.pt", "out/run/none.pt", "none", "models/none"]
    for value in (*OUTSIDE, *NO_MODELS_PATH, *missing, "out/run/train.log"):
        with pytest.raises(StorageError) as caught:
            resolve(workspace, model_path=value)
        assert str(workspace.root) not in str(caught.value)


@pytest.mark.parametrize("value", ["out/none/ckpt.pt", "out/run/none.pt", "out/none", "models/none", "none"])
def test_a_well_formed_path_of_nothing_is_not_found(workspace, value):
    with pytest.raises(NotFound, match="does not exist"):
        resolve(workspace, model_path=value)


@pytest.mark.parametrize("value", ["out/run/train.log", "empty", "out/nested"])
def test_what_is_there_and_no_model_is_not_loadable(workspace, value):
    with pytest.raises(NotLoadable):
        resolve(workspace, model_path=value)


@pytest.mark.parametrize("target", ["/etc", "/no/such", "../secret"])
def test_links_are_refused_wherever_they_point(workspace, target):
    (workspace.out / "link").symlink_to(target)
    (workspace.out / "run" / "link.pt").symlink_to(target + "/ckpt.pt")
    for value in ("out/link/ckpt.pt", "out/link", "out/run/link.pt"):
        with pytest.raises(NotLoadable, match=rf"^{value} cannot be loaded: .*is a link; links are not followed$"):
            resolve(workspace, model_path=value)


def test_a_link_in_the_folder_of_pretrained_models_is_no_name(workspace):
    (workspace.pretrained_dir / "linked").symlink_to(workspace.pretrained_dir / "mine")
    assert "linked" not in pretrained_names(workspace)


def test_folders_that_cannot_be_looked_at_hide_no_other_model(workspace, monkeypatch):
    lstat, listdir = os.lstat, os.listdir

    def denied(path, original, under):
        if str(path).startswith(str(under)):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    mine = workspace.pretrained_dir / "mine"
    monkeypatch.setattr(os, "lstat", lambda path, **kwargs: denied(path, lstat, mine))
    assert "mine" not in pretrained_names(workspace) and "gpt2-medium" in pretrained_names(workspace)
    monkeypatch.setattr(os, "listdir", lambda path: denied(path, listdir, workspace.pretrained_dir))
    assert pretrained_names(workspace) == [*PRETRAINED, BUNDLED]


def test_folders_and_pipes_in_place_of_a_checkpoint_are_refused_at_once(workspace):
    (workspace.out / "odd" / "ckpt.pt").mkdir(parents=True)
    os.mkfifo(workspace.out / "odd" / "best.pt")
    for name, what in (("ckpt.pt", "a folder"), ("best.pt", "a pipe")):
        with pytest.raises(NotLoadable, match=f"is {what}"):
            resolve(workspace, model_path=f"out/odd/{name}")
