"""Who may import whom, as the design's table says, and that importing stays cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"api_server", "api_client", "client", "model", "train", "dry_run", "web", "inference", "learning"}
OURS |= {"training", "storage"}
WITH_TORCH = {
    "storage/checkpoints.py",
    "storage/pretrained.py",
    "inference/build.py",
    "inference/engine.py",
    "inference/decode_graphs.py",
    "inference/kv_cache.py",
    "inference/native/compact.py",
    "inference/native/packing.py",
    "inference/native_runner.py",
    "inference/packed_linear.py",
    "inference/runner.py",
    "inference/sampling.py",
    "inference/torch_runner.py",
}
MAY_IMPORT = {
    "web": {"web", "inference.sequence", "inference.backend", "training", "storage"},
    "inference": {"inference", "model", "storage"},
    "training": {"training", "storage"},
    "storage": {"storage", "model"},
    "model": set(),
    "api_client": {"client"},
    "client": {"client"},
    "learning": {"learning", "model", "training", "storage"},
    "train": {"learning", "model", "storage", "training"},
    "dry_run": {"learning", "train", "storage", "training"},
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py")) if (ROOT / package).is_dir() else [ROOT / f"{package}.py"]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_the_design_allows(package):
    allowed = MAY_IMPORT[package]
    for path in sources(package):
        ours = {name for name in imports(path) if name.split(".")[0] in OURS}
        bad = {n for n in ours if not any(n == a or n.startswith(a + ".") for a in allowed)}
        assert not bad, f"{path.relative_to(ROOT)} imports {sorted(bad)}"


def test_only_the_named_modules_of_the_packages_import_torch():
    found = {
        str(path.relative_to(ROOT))
        for package in ("web", "inference", "training", "storage")
        for path in sources(package)
        if any(name.split(".")[0] == "torch" for name in imports(path))
    }
    assert found <= WITH_TORCH


def test_storage_imports_the_model_only_where_weights_become_one():
    users = {p.name for p in sources("storage") if any(n.split(".")[0] == "model" for n in imports(p))}
    assert users <= {"checkpoints.py", "pretrained.py"}


def loaded_by(statement: str, *modules: str) -> list[str]:
    code = f"import sys; {statement}; print([m for m in {modules!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout)


def test_the_web_layer_loads_without_torch():
    assert loaded_by("import web.native_routes, web.job_routes, web.openai_routes, training.jobs", "torch") == []


def test_serving_does_not_load_the_compiler_of_torch():
    assert loaded_by("import inference.engine, storage.checkpoints, inference.native_runner", "torch._dynamo") == []


STEP = """import torch, train
from learning.optimizers import optimizers
from model import GPT, GPTConfig
from training.config import TrainConfig
model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=9))
x = torch.zeros(1, 8, dtype=torch.long)
for optimizer in optimizers(TrainConfig(dataset='d', output_dir='out/d', optimizer='muon'), model).values():
    model(x, x)[1].backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())"""


def test_training_loads_neither_the_compiler_of_torch_nor_what_splits_tensors():
    assert loaded_by(f"exec({STEP!r})", "torch._dynamo", "torch.distributed.tensor", "sympy") == []


def test_the_client_loads_neither_torch_nor_flask():
    assert loaded_by("import api_client", "torch", "flask", "pydantic") == []


@pytest.mark.parametrize("script", ["api_server.py", "api_client.py", "train.py", "dry_run.py"])
def test_a_python_without_the_projects_packages_is_told_in_one_line_which_has_them(script):
    command = [sys.executable, "-ES", script]  # without what is installed
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    said = f"is not installed for this Python; after `make setup` use .venv/bin/python {script}\n"
    assert done.returncode == 1 and done.stderr.endswith(said) and done.stderr.count("\n") == 1
