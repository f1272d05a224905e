"""The native step against the plain forward with the same rounded weights, and that rows never depend on each other."""

import copy
import ctypes
import math
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from inference import native_runner
from inference.build import RunnerOptions, build_runner
from inference.native import build
from inference.native.packing import Model
from inference.native_runner import NativeRunner
from model import GPT, GPTConfig
from storage import pretrained
from storage.inspection import inspect_checkpoint
from storage.pretrained import StoredModel, export
from storage.tokenizer import char_tokenizer

REASON = NativeRunner.unsupported(GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=16), "fp32")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = ("fp32", "bf16", "int8")
SHAPES = {
    "odd": GPTConfig(n_layer=2, n_head=3, n_embd=48, block_size=70, vocab_size=65, bias=True),
    "no bias, untied": GPTConfig(n_layer=3, n_head=2, n_embd=64, block_size=33, vocab_size=33, bias=False, tied=False),
    "as GPT-2": GPTConfig(n_layer=2, n_head=2, n_embd=128, block_size=96, vocab_size=300, activation="gelu_new"),
    "wide heads": GPTConfig(n_layer=1, n_head=2, n_embd=224, block_size=40, vocab_size=1, bias=False),
}


@pytest.fixture(params=["all instructions", "without BF16 and VNNI"])
def instructions(request, monkeypatch):
    """Use the library as built for this processor, and for one that can only multiply floats."""
    if request.param == "without BF16 and VNNI":
        fewer = build.cpu_flags() - set(build.USEFUL)
        monkeypatch.setattr(build, "cpu_flags", lambda: fewer)


def model_of(config: GPTConfig, seed: int = 0) -> GPT:
    """Return a model whose norms and biases matter too."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
            else:
                p.mul_(3)
    return model


def rounded(model: GPT, dtype: str) -> GPT:
    """Return a copy whose matrices hold what the runner's packed ones stand for."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in copied.named_parameters():
            if p.dim() == 2 and "wpe" not in name:
                if dtype == "bf16":
                    p.copy_(p.bfloat16().float())
                if dtype == "int8":
                    scale = p.abs().amax(1, keepdim=True) / 127
                    p.copy_((p / scale).round() * scale)
    return copied


def resident() -> int:
    """Return this process's resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def compile_with_the_sources(source: str, folder: Path) -> Path:
    (folder / "test.cpp").write_text(source)
    target = folder / "test.so"
    command = [build.compiler(), *build.flags(), "-I", str(build.HERE), str(folder / "test.cpp"), "-o", str(target)]
    subprocess.run(command, check=True, timeout=50)
    return target


def ids_for(config: GPTConfig, n: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(config.vocab_size), k=n)


def prefill(runner: NativeRunner, ids: list[int], slot: int = 0) -> torch.Tensor:
    n = len(ids)
    return runner.rows(ids, [slot] * n, list(range(n)), list(range(n))).clone()


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the root mean square of the difference, relative to the spread of the expected logits."""
    spread = expected.std().item() if expected.numel() > len(expected) else expected.abs().max().item()
    return ((got - expected).square().mean().sqrt() / spread).item()


# fp32 differs by the order of sums. bf16 rounds the activations to 8 bits of mantissa (0.2 % each). int8 rounds them to
# 1/127 of about 4 times their root mean square: 1 % of noise in each product. Measured: 1e-6, 0.004 and 0.02.
TOLERANCE = {"fp32": 5e-6, "bf16": 0.01, "int8": 0.04}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_plain_forward_with_the_same_weights(shape, dtype, instructions):
    model = model_of(SHAPES[shape])
    ids = ids_for(model.config, model.config.block_size)
    runner = NativeRunner(model, slots=2, dtype=dtype, threads=2)
    with torch.inference_mode():
        expected = rounded(model, dtype)(torch.tensor([ids]))[0][0]
    assert difference(prefill(runner, ids, slot=1), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_far_out_cost_little_precision(dtype):
    """Trained GPT-2 has a few channels a hundred times the others; plain 8-bit rows lose everything beside them."""
    config = SHAPES["as GPT-2"]
    model = model_of(config)
    with torch.no_grad():
        for block in model.transformer["h"]:
            block.ln_1.weight[5], block.ln_2.weight[77] = 60.0, 100.0
            block.attn.c_attn.weight[:, 5] /= 60
            block.mlp.c_fc.weight[:, 77] /= 100
            block.mlp.c_fc.bias[9] = 20.0
    ids = ids_for(config, 90)
    with torch.inference_mode():
        expected = rounded(model, dtype)(torch.tensor([ids]))[0][0]
    got = prefill(NativeRunner(model, slots=1, dtype=dtype, threads=1), ids)
    assert difference(got, expected) < TOLERANCE[dtype]


def test_fp32_continues_a_prompt_as_naive_generate_does():
    for shape in ("odd", "as GPT-2", "no bias, untied"):
        model = model_of(SHAPES[shape])
        ids = ids_for(model.config, 9)
        expected = model.generate(torch.tensor([ids]), 24, temperature=0)[0].tolist()
        runner = NativeRunner(model, slots=1, dtype="fp32", threads=1)
        runner.rows(ids[:-1], [0] * 8, list(range(8)), [])
        while len(ids) < len(expected):
            runner.rows(ids[-1:], [0], [len(ids) - 1], [0])
            ids.append(runner.last_argmax[0])
        assert ids == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_bit_for_bit_in_pieces_in_any_batch_and_with_any_threads(dtype, instructions):
    """Sequences of their own lengths start at random and advance by random pieces in common steps."""
    model = model_of(SHAPES["as GPT-2"])
    draw = random.Random(3)
    whole = [ids_for(model.config, n, seed=n) for n in (96, 64, 50, 33, 17, 16, 15, 7, 2, 1, 90, 61, 40)]
    alone = NativeRunner(model, slots=1, dtype=dtype, threads=1)
    expected = [prefill(alone, ids) for ids in whole]
    for threads in (1, 2, 3):
        runner = NativeRunner(model, slots=len(whole), dtype=dtype, threads=threads)
        at = [0] * len(whole)
        while pieces := {s: draw.choice((1, 1, 1, 2, 5, 30)) for s in range(len(whole)) if at[s] < len(whole[s])}:
            rows = [
                (s, p)
                for s, n in pieces.items()
                if draw.random() < 0.7
                for p in range(at[s], min(at[s] + n, len(whole[s])))
            ]
            want = sorted(draw.sample(range(len(rows)), draw.randint(0, len(rows))))
            got = runner.rows([whole[s][p] for s, p in rows], [s for s, _ in rows], [p for _, p in rows], want)
            for i, row in enumerate(want):
                s, at[s] = rows[row][0], rows[row][1] + 1
                assert torch.equal(got[i], expected[s][rows[row][1]]), (threads, len(rows), rows[row])
            for s, p in rows:
                at[s] = p + 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_others_take_the_place_of_leave_no_trace(dtype):
    """As drafts do: some right, the rest wrong, and the next step goes on from the last right one."""
    model = model_of(SHAPES["as GPT-2"])
    ids, wrong = ids_for(model.config, 96), ids_for(model.config, 96, seed=9)
    expected = prefill(NativeRunner(model, slots=1, dtype=dtype, threads=1), ids)
    runner, draw, at = NativeRunner(model, slots=2, dtype=dtype, threads=2), random.Random(7), 0
    while at < 84:
        right = draw.randint(1, 6)
        tokens = ids[at : at + right] + wrong[: 12 - right]
        got = runner.rows(tokens, [1] * 12, list(range(at, at + 12)), list(range(12)))
        assert torch.equal(got[:right], expected[at : at + right])
        at += right


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_begun_before_it_is_asked_for_gives_the_same_bits_whenever_the_caller_comes(dtype, instructions):
    """It joins in the first phase, in the midst, or when all is done; rows leave, and prompts enter."""
    model, draw = model_of(SHAPES["as GPT-2"]), random.Random(4)
    plain = NativeRunner(model, slots=6, dtype=dtype, threads=1)
    for threads in (2, 3):
        runner = NativeRunner(model, slots=6, dtype=dtype, threads=threads)
        at = dict.fromkeys(range(6), 0)
        while at:
            rows = [(s, p) for s in at for p in range(at[s], min(96, at[s] + draw.choice((1, 1, 1, 9))))]
            step = (
                [draw.randrange(300) for _ in rows],
                [s for s, _ in rows],
                [p for _, p in rows],
                list(range(len(rows))),
            )
            expected, greatest = plain.rows(*step).clone(), plain.last_argmax
            runner.begin(*step)
            time.sleep(draw.choice((0, 0, 2e-5, 1e-4, 2e-3)))
            if draw.random() < 0.1:
                runner.copy(0, 0, 1)  # waits for it, and it is still there
            assert torch.equal(runner.rows(*step), expected) and runner.last_argmax == greatest
            at = {s: p + 1 for s, p in rows if p < 95 and draw.random() < 0.97}
        runner.close()


def test_a_begun_step_that_nobody_asks_for_is_forgotten():
    model = model_of(SHAPES["as GPT-2"])
    plain, runner = (NativeRunner(model, slots=3, dtype="bf16", threads=2) for _ in range(2))
    other, step = ([7, 8], [1, 2], [0, 0], [0, 1]), ([3, 4, 5], [0, 0, 1], [0, 1, 0], [1, 2])
    drawing = torch.randn(4, 300), [0, 1, 2, 3], [(0.5, 1.0, 0.9, 0.0, 3.0)] * 4, [None] * 4
    for _ in range(50):
        runner.begin(*other)
        assert torch.equal(runner.rows(*step), plain.rows(*step))
        runner.begin(*step)
        assert torch.equal(runner.hidden(*other), plain.hidden(*other))
        runner.begin(*other)
        assert runner.draw(*drawing) == plain.draw(*drawing)
        assert torch.equal(runner.rows(*other), plain.rows(*other))
        runner.begin(*other)
        runner.release(1)
    runner.begin(*other)
    runner.close()
    for call in (runner.begin, runner.rows):
        with pytest.raises(ValueError, match="closed"):
            call(*other)


def test_what_cannot_be_begun_is_refused_or_left_to_the_step_itself():
    model = model_of(GPTConfig(n_layer=1, n_head=1, n_embd=32, block_size=700, vocab_size=50))
    assert NativeRunner(model, slots=1, dtype="fp32", threads=1).begin is None
    runner = NativeRunner(model, slots=2, dtype="fp32", threads=2)
    with pytest.raises(ValueError, match="row 1 is token 50 in slot 1"):
        runner.begin([3, 50], [0, 1], [0, 0], [0, 1])
    with pytest.raises(ValueError, match="want is"):
        runner.begin([3], [0], [0], [1])
    many = [1] * 600, [0] * 600, list(range(600))
    for step in ((*many, [599]), (*many, list(range(600))), ([1, 2], [0, 0], [0, 1], [1, 0])):
        runner.begin(*step)
        assert torch.equal(runner.rows(*step), runner.rows(*step))


def test_a_runner_may_go_while_a_step_is_begun():
    model = model_of(SHAPES["as GPT-2"])
    expected = prefill(NativeRunner(model, slots=1, dtype="bf16", threads=1), [1])
    for _ in range(10):
        runner = NativeRunner(model, slots=1, dtype="bf16", threads=2)
        runner.begin([1], [0], [0], [0])
        del runner
    assert torch.equal(prefill(NativeRunner(model, slots=1, dtype="bf16", threads=2), [1]), expected)


def test_a_step_of_more_rows_than_fit_at_once_is_the_same_as_several():
    model = model_of(GPTConfig(n_layer=2, n_head=1, n_embd=32, block_size=700, vocab_size=50))
    runner = NativeRunner(model, slots=2, dtype="bf16", threads=2)
    ids = ids_for(model.config, 700)
    one = prefill(runner, ids, slot=0)
    parts = [
        runner.rows(ids[a : a + 7], [1] * 7, list(range(a, a + 7)), list(range(7))).clone() for a in range(0, 700, 7)
    ]
    assert torch.equal(one, torch.cat(parts))
    few = runner.rows(ids, [0] * 700, list(range(700)), [3, 511, 512, 699])
    assert torch.equal(few, one[[3, 511, 512, 699]])


def test_want_may_be_in_any_order_repeat_and_be_empty():
    model = model_of(SHAPES["odd"])
    runner = NativeRunner(model, slots=1, dtype="fp32", threads=1)
    everything = prefill(runner, [1, 2, 3, 4])
    got = runner.rows([1, 2, 3, 4], [0] * 4, [0, 1, 2, 3], [3, 0, 3])
    assert torch.equal(got, everything[[3, 0, 3]])
    assert runner.last_argmax == everything[[3, 0, 3]].argmax(1).tolist()
    assert runner.rows([1], [0], [0], []).shape == (0, 65)
    assert runner.last_argmax == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_states_are_those_of_the_plain_forward_with_the_same_weights(shape, dtype):
    model = model_of(SHAPES[shape])
    ids = ids_for(model.config, 30)
    runner = NativeRunner(model, slots=1, dtype=dtype, threads=2)
    got = runner.hidden(ids, [0] * 30, list(range(30)), list(range(30)))
    with torch.inference_mode():
        expected = rounded(model, dtype).hidden(torch.tensor([ids]))[0]
    assert got.shape == expected.shape and got.dtype == torch.float32
    assert difference(got, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hidden_state_is_the_same_bit_for_bit_in_pieces_and_beside_others(dtype):
    model = model_of(SHAPES["as GPT-2"])
    ids, other = ids_for(model.config, 40), ids_for(model.config, 30, seed=2)
    runner = NativeRunner(model, slots=3, dtype=dtype, threads=2)
    expected = runner.hidden(ids, [0] * 40, list(range(40)), list(range(40)))
    logits = prefill(runner, ids)
    runner.rows(ids[:17], [2] * 17, list(range(17)), [])
    slots, positions = [1] * 30 + [2] * 23, [*range(30), *range(17, 40)]
    got = runner.hidden(other + ids[17:], slots, positions, [52, 30, 30, 40])
    assert torch.equal(got, expected[[39, 17, 17, 27]])
    assert torch.equal(prefill(runner, ids), logits)


def test_hidden_states_of_more_rows_than_fit_at_once_are_all_there():
    model = model_of(GPTConfig(n_layer=1, n_head=1, n_embd=32, block_size=700, vocab_size=50))
    runner = NativeRunner(model, slots=1, dtype="fp32", threads=2)
    ids = ids_for(model.config, 700)
    with torch.inference_mode():
        expected = model.hidden(torch.tensor([ids]))[0]
    got = runner.hidden(ids, [0] * 700, list(range(700)), [5, 511, 512, 699])
    assert difference(got, expected[[5, 511, 512, 699]]) < TOLERANCE["fp32"]
    assert runner.hidden(ids, [0] * 700, list(range(700)), []).shape == (0, 32)


def test_hidden_refuses_what_rows_refuses():
    runner = NativeRunner(model_of(SHAPES["odd"]), slots=2, dtype="fp32", threads=1)
    with pytest.raises(ValueError, match=r"row 1 is token 65 in slot 0 at position 1"):
        runner.hidden([3, 65], [0, 0], [0, 1], [0])
    with pytest.raises(ValueError, match=r"want is \[2\]; the step has rows 0 to 1"):
        runner.hidden([3, 4], [0, 0], [0, 1], [2])
    with pytest.raises(ValueError, match="2 tokens, 1 slots and 2 positions"):
        runner.hidden([3, 4], [0], [0, 1], [0])
    runner.close()
    with pytest.raises(ValueError, match="closed"):
        runner.hidden([3], [0], [0], [0])


def test_a_slot_is_used_again_from_position_0_without_a_trace():
    model = model_of(SHAPES["odd"])
    runner = NativeRunner(model, slots=1, dtype="int8", threads=1)
    first = prefill(runner, [5, 6, 7])
    prefill(runner, ids_for(model.config, 60))
    assert torch.equal(prefill(runner, [5, 6, 7]), first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copied_beginning_goes_on_as_the_computed_one_bit_for_bit(dtype):
    model = model_of(SHAPES["as GPT-2"])
    runner = NativeRunner(model, slots=3, dtype=dtype, threads=2)
    ids, other = ids_for(model.config, 96), ids_for(model.config, 96, seed=2)
    expected = prefill(runner, ids, slot=2)
    for length in (0, 1, 63, 64, 65, 90, 95):
        prefill(runner, other, slot=0)
        runner.copy(2, 0, length)
        rest = range(length, 96)
        got = runner.rows(ids[length:], [0] * len(rest), list(rest), list(range(len(rest))))
        assert torch.equal(got, expected[length:]), length
    assert torch.equal(runner.rows(ids[95:], [2], [95], [0]), expected[95:])  # the source is as it was


def test_a_slot_goes_on_from_any_position_below_which_it_is_filled():
    model = model_of(SHAPES["odd"])
    runner = NativeRunner(model, slots=1, dtype="bf16", threads=1)
    ids, other = ids_for(model.config, 60), ids_for(model.config, 60, seed=2)
    expected = prefill(runner, ids)
    for kept in (50, 33, 16, 1):
        runner.rows(other[kept:], [0] * (60 - kept), list(range(kept, 60)), [])
        got = runner.rows(ids[kept:], [0] * (60 - kept), list(range(kept, 60)), list(range(60 - kept)))
        assert torch.equal(got, expected[kept:]), kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 0, 1), "source is 2; it must be 0 to 1"),
        ((0, -1, 1), "target is -1; it must be 0 to 1"),
        ((0, 1, 71), "length is 71; it must be 0 to 70"),
    ],
)
def test_a_copy_out_of_bounds_is_refused(arguments, message):
    runner = NativeRunner(model_of(SHAPES["odd"]), slots=2, dtype="fp32", threads=1)
    with pytest.raises(ValueError, match=message):
        runner.copy(*arguments)
    runner.close()
    with pytest.raises(ValueError, match="closed"):
        runner.copy(0, 1, 1)


def test_a_released_slot_can_be_used_again_and_its_neighbours_are_as_they_were():
    model = model_of(SHAPES["as GPT-2"])
    runner, ids = NativeRunner(model, slots=3, dtype="bf16", threads=1), ids_for(model.config, 96)
    for slot in range(3):
        expected = prefill(runner, ids, slot=slot)
    runner.release(1)
    for slot in (0, 2):
        assert torch.equal(runner.rows(ids[95:], [slot], [95], [0]), expected[95:])
    assert torch.equal(prefill(runner, ids, slot=1), expected)


def test_the_memory_of_a_released_slot_goes_back():
    config = GPTConfig(n_layer=4, n_head=4, n_embd=256, block_size=4096, vocab_size=64)
    runner = NativeRunner(model_of(config), slots=2, dtype="fp32", threads=2)
    runner.rows([1] * 2048, [1] * 2048, list(range(2048)), [])  # 16 MiB
    before = resident()
    runner.release(1)
    assert before - resident() > 12 << 20


def test_a_release_out_of_bounds_is_refused():
    runner = NativeRunner(model_of(SHAPES["odd"]), slots=2, dtype="fp32", threads=1)
    with pytest.raises(ValueError, match="slot is 2; it must be 0 to 1"):
        runner.release(2)
    runner.close()
    with pytest.raises(ValueError, match="closed"):
        runner.release(0)


def test_logits_stay_valid_after_the_runner_is_closed_and_closing_twice_is_fine():
    runner = NativeRunner(model_of(SHAPES["odd"]), slots=1, dtype="bf16", threads=2)
    logits = runner.rows([1], [0], [0], [0])
    before = logits.clone()
    runner.close()
    runner.close()
    assert torch.equal(logits, before)
    with pytest.raises(ValueError, match="closed"):
        runner.rows([1], [0], [0], [0])


def test_other_instructions_are_another_arithmetic(monkeypatch):
    runner = NativeRunner(model_of(SHAPES["odd"]), slots=1, dtype="bf16", threads=1)
    assert NativeRunner(model_of(SHAPES["odd"]), slots=1, dtype="int8", threads=2).arithmetic == runner.arithmetic
    fewer = build.cpu_flags() - set(build.USEFUL)
    monkeypatch.setattr(build, "cpu_flags", lambda: fewer)
    other = NativeRunner(model_of(SHAPES["odd"]), slots=1, dtype="bf16", threads=1)
    assert other.arithmetic != runner.arithmetic and len(other.arithmetic) == 6


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("VERSION", native_runner.VERSION + 1),
        ("Model", type("Model", (Model,), {"_fields_": [("more", ctypes.c_long)]})),
    ],
)
def test_a_library_of_another_version_or_layout_is_a_reason_for_the_torch_runner(monkeypatch, name, changed):
    monkeypatch.setattr(native_runner, name, changed)
    assert "another version of the interface" in NativeRunner.unsupported(SHAPES["odd"], "bf16")
    runner, reason = build_runner(model_of(SHAPES["odd"]), RunnerOptions(device="cpu"))
    assert runner.name == "torch" and "another version" in reason


def test_several_runners_compute_at_the_same_time_in_one_process():
    models = [model_of(SHAPES["as GPT-2"], seed) for seed in (1, 2)]
    ids = ids_for(models[0].config, 60)
    expected = [prefill(NativeRunner(m, slots=1, dtype="fp32", threads=1), ids) for m in models]
    runners = [NativeRunner(m, slots=1, dtype="fp32", threads=2) for m in models]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            for got, right in zip(pool.map(lambda r: prefill(r, ids), runners), expected, strict=True):
                assert torch.equal(got, right)


def test_the_model_may_be_freed_once_it_is_packed():
    model = model_of(SHAPES["odd"])
    runner = NativeRunner(model, slots=1, dtype="fp32", threads=1)
    before = prefill(runner, [1, 2, 3])
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    assert torch.equal(prefill(runner, [1, 2, 3]), before)


PEAK = """
import resource, sys
from pathlib import Path
from inference.native_runner import NativeRunner
from storage.checkpoints import open_model
from storage.registry import ModelReference
from storage.runs import Workspace

opened = open_model(ModelReference("m", "folder", Path(sys.argv[1]), "m"), Workspace(Path(sys.argv[1]).parent))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
runner = NativeRunner(opened.model, slots=1, dtype="int8", threads=1)
print((peak() - before) * 1024, runner.packed_bytes)
"""


@pytest.mark.skipif(build.SANITIZE_SETTING in os.environ, reason="AddressSanitizer keeps what is freed")
def test_a_model_in_its_files_is_packed_with_little_more_memory_than_the_packed_takes(tmp_path):
    model = GPT(GPTConfig(n_layer=4, n_head=12, n_embd=768, block_size=32, vocab_size=256))  # 114 MB in float32
    export(model, char_tokenizer("abc"), tmp_path / "m")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "m")]
    done = subprocess.run(command, cwd=build.HERE.parent.parent, capture_output=True, text=True, timeout=50, check=True)
    more, packed = map(int, done.stdout.split())
    assert packed < 30e6 and more < 1.3 * packed + 20e6


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_in_its_files_gives_the_logits_of_the_one_in_memory(shape, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "PART_BYTES", 1)  # many parts
    model = model_of(SHAPES[shape])
    path = tmp_path / "out" / "m" / "ckpt.pt"
    path.parent.mkdir(parents=True)
    config = model.config
    state = {"model": model.state_dict(), "model_args": config.model_args(), "config": {}, "iter_num": 1}
    torch.save({**state, "best_val_loss": 1.0, "activation": config.activation, "tied": config.tied}, path)
    inspection = inspect_checkpoint(path, "m")
    stored = StoredModel(inspection, inspection.model_args, "m")
    expected = prefill(NativeRunner(model, slots=1, dtype="int8", threads=1), [0] * 9)
    assert torch.equal(prefill(NativeRunner(stored, slots=1, dtype="int8", threads=1), [0] * 9), expected)


def test_memory_of_slots_is_taken_when_they_are_used():
    config = GPTConfig(n_layer=4, n_head=4, n_embd=256, block_size=4096, vocab_size=64)
    before = resident()
    runner = NativeRunner(model_of(config), slots=64, dtype="bf16", threads=1)  # 1 GiB of cache
    runner.rows([1, 2], [0, 63], [0, 0], [1])
    assert resident() - before < 100 << 20


@pytest.mark.parametrize("row", [(65, 0, 0), (-1, 0, 0), (1, 2, 0), (1, -1, 0), (1, 0, 70), (1, 0, -1)])
def test_a_row_out_of_bounds_is_refused_by_its_index(row):
    runner = NativeRunner(model_of(SHAPES["odd"]), slots=2, dtype="fp32", threads=1)
    token, slot, position = row
    with pytest.raises(ValueError, match=r"row 1 is token .* 65 tokens, 2 slots and 70 positions"):
        runner.rows([3, token], [0, slot], [0, position], [0])


@pytest.mark.parametrize("want", [[2], [-1], [0, 7]])
def test_a_wanted_row_out_of_bounds_is_refused(want):
    runner = NativeRunner(model_of(SHAPES["odd"]), slots=2, dtype="fp32", threads=1)
    with pytest.raises(ValueError, match=r"want is .* rows 0 to 1"):
        runner.rows([3, 4], [0, 0], [0, 1], want)


def test_lists_of_different_lengths_are_refused():
    runner = NativeRunner(model_of(SHAPES["odd"]), slots=2, dtype="fp32", threads=1)
    with pytest.raises(ValueError, match="2 tokens, 1 slots and 2 positions"):
        runner.rows([3, 4], [0], [0, 1], [0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_not_finite_are_refused(dtype):
    model = model_of(SHAPES["odd"])
    with torch.no_grad():
        model.transformer["h"][1].mlp.c_fc.weight[100, 3] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        NativeRunner(model, slots=1, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_that_are_not_finite_give_nan_and_not_an_answer(dtype):
    model = model_of(SHAPES["odd"])
    with torch.no_grad():
        model.transformer["wpe"].weight[1, 7] = math.nan
    runner = NativeRunner(model, slots=1, dtype=dtype, threads=1)
    got = prefill(runner, [1, 2])
    assert got[0].isfinite().all() and got[1].isnan().all()
    assert runner.last_argmax == [got[0].argmax(), model.config.vocab_size]


def test_a_greatest_logit_that_is_infinite_is_no_token():
    model = model_of(SHAPES["no bias, untied"])
    with torch.no_grad():
        model.transformer["ln_f"].weight.fill_(100)
        model.lm_head.weight[3:5] = 0
        model.lm_head.weight[3, 0], model.lm_head.weight[4, 0] = 3e38, -3e38
    runner = NativeRunner(model, slots=1, dtype="fp32", threads=1)
    assert prefill(runner, [1]).max() == math.inf and runner.last_argmax == [model.config.vocab_size]


def test_what_the_step_cannot_do_is_said_in_words():
    odd = GPTConfig(n_layer=1, n_head=4, n_embd=32, block_size=8, vocab_size=16)
    assert "head size 8" in NativeRunner.unsupported(odd, "fp32")
    assert "fp8" in NativeRunner.unsupported(SHAPES["odd"], "fp8")
    with pytest.raises(ValueError, match="head size 8"):
        NativeRunner(GPT(odd), slots=1, dtype="fp32")
    with pytest.raises(ValueError, match="slots is 0"):
        NativeRunner(model_of(SHAPES["odd"]), slots=0, dtype="fp32")


def test_the_activations_are_exact_to_a_millionth(tmp_path):
    source = """
        #include "vector.h"
        extern "C" __attribute__((visibility("default")))
        void activate(const float *x, float *exact, float *tanh, long n) {
            for (long i = 0; i < n; i += 16) store(exact + i, gelu(load(x + i)));
            for (long i = 0; i < n; i += 16) store(tanh + i, gelu_new(load(x + i)));
        }"""
    lib = ctypes.CDLL(str(compile_with_the_sources(source, tmp_path)))
    x = torch.cat([torch.linspace(-12, 12, 160_000), torch.tensor([0.0, -0.0, 1e30, -1e30] * 4)])
    exact, tanh = torch.empty_like(x), torch.empty_like(x)
    lib.activate(*(ctypes.c_void_p(t.data_ptr()) for t in (x, exact, tanh)), ctypes.c_long(len(x)))
    scale = x.abs().clamp(min=1)
    assert ((exact.double() - F.gelu(x.double())) / scale).abs().max() < 5e-7
    assert ((tanh.double() - F.gelu(x.double(), approximate="tanh")) / scale).abs().max() < 5e-7
