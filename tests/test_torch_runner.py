"""The torch runner: ragged rows give the logits of the whole forward, and choosing a runner."""

import mmap
import platform
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference import build as building
from inference import packed_linear
from inference.build import RunnerOptions, build_runner, choose, fingerprint, pick_device
from inference.footprint import memory_bytes
from inference.torch_runner import TorchRunner
from model import GPT, GPTConfig

V = 50


def tiny(**config: Any) -> GPT:
    torch.manual_seed(4)
    shape = {"n_layer": 2, "n_head": 3, "n_embd": 48, "block_size": 40, "vocab_size": V, **config}
    model = GPT(GPTConfig(**shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # biases and layer norms too
    return model


def whole(model: GPT, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids]))[0][0]


def feed(runner: TorchRunner, ids: list[int], slot: int, pieces: list[int]) -> torch.Tensor:
    """Compute a sequence in pieces of the given sizes; return all its logits."""
    logits, start = [], 0
    for size in pieces:
        end = min(start + size, len(ids))
        n = end - start
        if n > 0:
            logits.append(runner.rows(ids[start:end], [slot] * n, list(range(start, end)), list(range(n))))
        start = end
    return torch.cat(logits)


@pytest.mark.parametrize(
    "config",
    [{}, {"bias": False}, {"activation": "gelu_new"}, {"tied": False}, {"n_head": 1}, {"n_embd": 51, "n_head": 3}],
    ids=str,
)
@pytest.mark.parametrize("pieces", [[30], [1] * 30, [7, 1, 1, 21], [1, 29]], ids=str)
def test_a_sequence_in_any_pieces_has_the_logits_of_the_whole(config: dict[str, Any], pieces: list[int]) -> None:
    ids = [(i * 7) % V for i in range(30)]
    runner, expected = TorchRunner(tiny(**config), slots=2), whole(tiny(**config), ids)
    torch.testing.assert_close(feed(runner, ids, 1, pieces), expected, atol=2e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), slots=st.integers(1, 4), most=st.integers(1, 40))
def test_rows_of_many_slots_do_not_see_each_other(seed: int, slots: int, most: int) -> None:
    rng, model, runner = random.Random(seed), tiny(), TorchRunner(tiny(), slots=4)
    texts = [[rng.randrange(V) for _ in range(rng.randint(1, most))] for _ in range(slots)]
    done = [0] * slots
    expected = [whole(model, ids) for ids in texts]
    while any(n < len(ids) for n, ids in zip(done, texts, strict=True)):
        rows: list[tuple[int, int]] = []
        for slot in rng.sample(range(slots), slots):
            end = min(done[slot] + rng.choice([0, 1, 1, 5, 12]), len(texts[slot]))
            rows += [(slot, p) for p in range(done[slot], end)]
            done[slot] = end
        want = rng.choices(range(len(rows)), k=min(6, len(rows)))
        if rows:
            logits = runner.rows([texts[s][p] for s, p in rows], [s for s, _ in rows], [p for _, p in rows], want)
            assert logits.shape == (len(want), V) and logits.dtype == torch.float32
            for got, i in zip(logits, want, strict=True):
                torch.testing.assert_close(got, expected[rows[i][0]][rows[i][1]], atol=2e-5, rtol=1e-5)


def test_hidden_states_are_those_of_the_whole_forward() -> None:
    ids = [(i * 7) % V for i in range(30)]
    runner, model = TorchRunner(tiny(), slots=2), tiny()
    with torch.inference_mode():
        expected = model.hidden(torch.tensor([ids]))[0]
    feed(runner, ids, 1, [12])
    got = runner.hidden(ids[12:], [1] * 18, list(range(12, 30)), [17, 0, 17])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected[[29, 12, 29]], atol=2e-5, rtol=1e-5)
    half = TorchRunner(tiny(), slots=1, dtype="bf16").hidden(ids, [0] * 30, list(range(30)), [29])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected[[29]], atol=0.1, rtol=0.05)


def test_a_slot_is_used_again_from_position_0() -> None:
    runner, model = TorchRunner(tiny(), slots=1), tiny()
    feed(runner, list(range(40)), 0, [40])
    short = [9, 8, 7]
    torch.testing.assert_close(feed(runner, short, 0, [1, 1, 1]), whole(model, short), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_copied_beginning_goes_on_as_the_computed_one(dtype: str) -> None:
    ids, other = [(i * 7) % V for i in range(40)], [(i * 11 + 3) % V for i in range(40)]
    runner = TorchRunner(tiny(), slots=3, dtype=dtype)
    for length in (1, 17, 39):
        feed(runner, other, 0, [40])
        feed(runner, ids, 2, [length])
        runner.copy(2, 0, length)
        for start in range(length, 40, 8):
            where = list(range(start, min(start + 8, 40)))
            copied, computed = (
                runner.rows([ids[p] for p in where], [slot] * len(where), where, list(range(len(where)))).clone()
                for slot in (0, 2)
            )
            assert torch.equal(copied, computed), (length, start)


def test_a_slot_goes_on_from_any_position_below_which_it_is_filled() -> None:
    ids, other = [(i * 7) % V for i in range(40)], [(i * 11 + 3) % V for i in range(40)]
    runner, expected = TorchRunner(tiny(), slots=2), whole(tiny(), ids)
    feed(runner, ids, 1, [40])
    for kept in (30, 12, 1):
        runner.rows(other[kept:], [1] * (40 - kept), list(range(kept, 40)), [])
        got = runner.rows(ids[kept:], [1] * (40 - kept), list(range(kept, 40)), list(range(40 - kept)))
        torch.testing.assert_close(got, expected[kept:], atol=2e-5, rtol=1e-5)


def test_what_is_no_number_does_not_stay_behind_a_copied_or_kept_beginning() -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(tiny().lm_head.weight.detach().clone())
        model.transformer["wte"].weight[13] = float("nan")
    runner, ids = TorchRunner(model, slots=3), [1, 2, 3]
    expected = whole(tiny(), [*ids, 4])[-1]
    feed(runner, [*ids, *[13] * 20], 0, [3, 20])
    feed(runner, [13] * 23, 1, [23])
    runner.copy(0, 1, 3)
    feed(runner, list(range(20)), 2, [20])
    logits = runner.rows([4, 4, 5], [0, 1, 2], [3, 3, 20], [0, 1, 2])  # slots 0 and 1 are padded to the span of slot 2
    for row in logits[:2]:
        torch.testing.assert_close(row, expected, atol=2e-5, rtol=1e-5)


def test_a_copy_out_of_bounds_is_refused() -> None:
    runner = TorchRunner(tiny(), 2)
    for arguments, message in (((2, 0, 1), "source is 2"), ((0, -1, 1), "target is -1"), ((0, 1, 41), "length is 41")):
        with pytest.raises(ValueError, match=message):
            runner.copy(*arguments)


def test_a_released_slot_is_empty_and_its_neighbour_as_it_was() -> None:
    runner, ids = TorchRunner(tiny(), slots=3), [(i * 7) % V for i in range(40)]
    for slot in range(3):
        expected = feed(runner, ids, slot, [40])
    runner.release(1)
    assert runner._cache is not None and not runner._cache.keys[:, 1].any() and not runner._cache.values[:, 1].any()
    for slot in (0, 2):
        torch.testing.assert_close(runner.rows([ids[39]], [slot], [39], [0])[0], expected[39], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(feed(runner, ids, 1, [40]), expected, atol=2e-5, rtol=1e-5)


def test_a_release_out_of_bounds_is_refused() -> None:
    with pytest.raises(ValueError, match="slot is 2; it must be 0 to 1"):
        TorchRunner(tiny(), 2).release(2)


def test_numbers_that_are_none_stay_in_their_sequence() -> None:
    model = tiny()
    with torch.no_grad():
        model.transformer["wte"].weight[13] = float("nan")
        model.lm_head.weight = torch.nn.Parameter(tiny().lm_head.weight.detach().clone())
    runner, ids = TorchRunner(model, slots=2), [1, 2, 3]
    assert feed(runner, [13] * 30, 0, [30]).isnan().all()
    feed(runner, ids, 0, [3])
    feed(runner, list(range(20)), 1, [20])
    logits = runner.rows([4, 5], [0, 1], [3, 20], [0, 1])  # slot 0 is padded to the span of slot 1
    torch.testing.assert_close(logits[0], whole(tiny(), [*ids, 4])[-1], atol=2e-5, rtol=1e-5)


def test_the_last_position_of_the_context_can_be_used() -> None:
    ids = [i % V for i in range(40)]
    torch.testing.assert_close(feed(TorchRunner(tiny(), 1), ids, 0, [39, 1]), whole(tiny(), ids), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_memory_that_is_told_is_that_of_its_cache(dtype: str) -> None:
    runner = TorchRunner(tiny(), 4, dtype=dtype)
    four, five = (memory_bytes(tiny().config, "torch", "cpu", dtype, slots) for slots in (4, 5))
    assert five - four == runner.block_size * runner.position_bytes


def test_bf16_stays_near_fp32() -> None:
    texts = [[(i * 5 + j) % V for i in range(30)] for j in range(3)]
    runner, model = TorchRunner(tiny(), 3, dtype="bf16"), tiny()
    for slot, ids in enumerate(texts):
        feed(runner, ids[:20], slot, [12, 8])
    for p in range(20, 30):
        logits = runner.rows([ids[p] for ids in texts], [0, 1, 2], [p] * 3, [0, 1, 2])
    expected = torch.stack([whole(model, ids)[-1] for ids in texts])
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


def test_bf16_is_served_where_the_cpu_does_not_multiply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(linear: torch.nn.Linear, *_: object) -> None:  # what oneDNN says with AVX2 alone
        if linear.weight.dtype == torch.bfloat16:
            raise RuntimeError("bf16 path needs the cpu support avx_ne_convert or avx512bw, avx512vl and avx512dq")
        raise AssertionError("only bf16 is asked for")

    monkeypatch.setattr(packed_linear, "PackedLinear", refuse)
    ids = [(i * 7) % V for i in range(30)]
    logits = feed(TorchRunner(tiny(), 1, dtype="bf16"), ids, 0, [12, 18])
    expected = whole(tiny(), ids)
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("fewest", [1, 4])
def test_a_step_of_few_rows_gives_the_rows_that_are_wanted(fewest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.torch_runner.fewest_rows", lambda: fewest)
    runner, expected = TorchRunner(tiny(), slots=3), whole(tiny(), [5, 6, 7])
    assert runner.rows([5, 5], [0, 2], [0, 0], []).shape == (0, V)
    assert runner.rows([6], [2], [1], []).shape == (0, V)
    torch.testing.assert_close(runner.rows([7], [2], [2], [0]), expected[[2]], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(runner.rows([6], [0], [1], [0, 0]), expected[[1, 1]], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(runner.hidden([7], [0], [2], [0]), runner.hidden([7], [2], [2], [0]))


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs Linux with huge pages")
def test_memory_is_put_into_huge_pages_and_keeps_what_it_holds() -> None:
    def huge() -> int:
        found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
        return int(found[1]) * 1024 if found else 0

    memory = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    numbers = torch.frombuffer(memory, dtype=torch.int32).copy_(torch.arange(4 << 20))
    before = huge()
    packed_linear.ask_for_huge_pages(numbers.data_ptr(), 1000)
    assert huge() == before
    packed_linear.ask_for_huge_pages(numbers.data_ptr() + 1000, numbers.nbytes - 2000)
    if tuple(map(int, platform.release().split(".")[:2])) >= (6, 1):  # earlier ones do it when they find the time
        assert huge() - before >= 12 << 20
    assert torch.equal(numbers, torch.arange(4 << 20, dtype=torch.int32))


def test_its_arithmetic_is_told_by_torchs_version_and_the_processors_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def told(flags: set[str], version: str = "2.0") -> str:
        monkeypatch.setattr("inference.torch_runner.cpu_flags", lambda: frozenset(flags))
        monkeypatch.setattr(torch, "__version__", version)
        return TorchRunner(tiny(), slots=1).arithmetic

    assert told({"avx2", "sse"}) == told({"avx2", "aes"})
    assert len({told({"avx2"}), told({"avx2", "avx512f"}), told({"avx2"}, "2.1")}) == 3


def test_a_precision_it_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype is 'int4'; the torch runner has fp32, bf16"):
        TorchRunner(tiny(), 1, dtype="int4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'; it must be one of auto, cpu, cuda, mps"),
        ({"dtype": "fp8"}, "dtype is 'fp8'"),
        ({"slots": 0}, "slots is 0; it must be at least 1"),
        ({"threads": 0}, "threads is 0"),
        ({"cache_memory": 0}, "cache_memory is 0"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunnerOptions(**options)


def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda', but torch finds none here"):
        pick_device("cuda")


def test_the_torch_runner_serves_where_the_native_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_native_refusal", lambda *_: "a test")
    runner, reason = build_runner(tiny(), RunnerOptions(device="cpu", slots=3))
    assert (runner.name, runner.device, runner.dtype, runner.slots, reason) == ("torch", "cpu", "fp32", 3, "a test")
    with pytest.raises(ValueError, match="int8"):
        build_runner(tiny(), RunnerOptions(device="cpu", dtype="int8"))


@pytest.mark.parametrize(("flags", "dtype"), [({"avx512_vnni"}, "int8"), (set(), "bf16")], ids=str)
def test_auto_is_int8_in_the_native_runner_where_the_cpu_multiplies_bytes(
    flags: set[str], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "_native_refusal", lambda *_: None)
    monkeypatch.setattr(building, "cpu_flags", lambda: frozenset(flags))
    assert choose(tiny().config, RunnerOptions(device="cpu")).dtype == dtype
    assert choose(tiny().config, RunnerOptions(device="cpu", dtype="fp32")).dtype == "fp32"


def test_a_fingerprint_changes_with_any_weight() -> None:
    model = tiny()
    before = fingerprint(model)
    assert before == fingerprint(tiny())
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1e-6
    assert fingerprint(model) != before
