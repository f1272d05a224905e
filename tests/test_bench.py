"""The benchmarks: contestants behind pipes, the names they write, and the tables; nothing here is timed."""

import sys
from pathlib import Path

import pytest
import torch

from bench import bench_gpu, peer_llama
from bench.bench_generate import COLUMNS, Lineup, measure, ours, pairs, report
from bench.bench_native import row
from bench.bench_quality import windows, with_channels_far_out
from bench.bench_waiting import Gaps, percentile, waiting
from bench.contestant import Absent, Process, Result
from bench.measure import Figure, comparison
from bench.reference_model import decode_bytes, model_folder, prompts
from bench.write_gguf import renamed
from inference.native import packing
from model import GPT, GPTConfig


def test_our_engine_takes_part_and_fills_every_column(tmp_path: Path) -> None:
    mine = ours(model_folder(tmp_path, small=True), "fp32", 1, "--runner", "torch")
    try:
        figures, bandwidth, _ = measure([mine], COLUMNS[:1], 512, 1)
    finally:
        mine.close()
    assert "torch runner, fp32" in mine.versions
    assert figures[COLUMNS[0].title]["ours fp32"].samples[0] > 0 and bandwidth.median > 0


def test_a_contestant_that_cannot_start_is_absent_and_says_why() -> None:
    lineup = Lineup()
    lineup.add("broken", lambda: Process("broken", [sys.executable, "-c", "raise SystemExit('no engine here')"]))
    assert lineup.present == [] and lineup.said == ["absent: broken (broken ended: no engine here)"]


def test_a_peer_whose_packages_are_missing_is_absent(tmp_path: Path) -> None:
    script = "from bench.contestant import serve\nserve(lambda: __import__('no_such_engine'))"
    with pytest.raises(Absent, match="no_such_engine"):
        Process("missing", [sys.executable, "-c", script])


def test_llama_is_absent_where_its_programs_are_not(tmp_path: Path) -> None:
    with pytest.raises(Absent, match=f"llama-batched-bench is not in {tmp_path}"):
        peer_llama.program("llama-batched-bench", tmp_path)


def fake_llama(tmp_path: Path, *lines: str) -> peer_llama.Llama:
    """Return llama.cpp by a program that prints one more of the lines at each call."""
    script = tmp_path / "fake"
    calls = tmp_path / "calls"
    script.write_text(f"#!/bin/sh\necho x >> {calls}\nhead -n $(wc -l < {calls}) {tmp_path / 'lines'}\n")
    script.chmod(0o755)
    (tmp_path / "lines").write_text("\n".join(lines) + "\n")
    return peer_llama.Llama("llama.cpp", script, tmp_path / "none.gguf", 1)


def test_llamas_warm_up_is_never_taken_for_the_figures(tmp_path: Path) -> None:
    warm, real = '{"tg": 2, "t_pp": 9.0, "t_tg": 9.0}', '{"tg": 4, "t_pp": 1.0, "t_tg": 4.0}'
    result = fake_llama(tmp_path, "no figures", warm, real).run([[1, 2]] * 3, 4)
    assert (result.first, result.seconds, result.tokens) == (1.0, 4.0, 12)


def test_llama_without_figures_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="printed no figures"):
        fake_llama(tmp_path, "nothing").run([[1, 2]], 4)


def test_decode_counts_the_tokens_after_the_first_of_each_request() -> None:
    result = Result(first=1.0, seconds=3.0, tokens=20, requests=2, peak_mb=0.0)
    assert result.decode == pytest.approx(9.0) and result.total == pytest.approx(20 / 3)


def test_gguf_has_llamas_names() -> None:
    names = ("wte.weight", "h.11.attn.c_attn.bias", "h.0.mlp.c_proj.weight", "ln_f.bias")
    wanted = ["token_embd.weight", "blk.11.attn_qkv.bias", "blk.0.ffn_down.weight", "output_norm.bias"]
    assert [renamed(name) for name in names] == wanted


def test_no_two_rounds_share_a_prompt() -> None:
    assert prompts(1, 64, 512, 1) != prompts(1, 64, 512, 2) and prompts(2, 8, 512, 3) == prompts(2, 8, 512, 3)


def test_each_peer_is_compared_with_ours_of_its_precision() -> None:
    names = ["ours fp32, torch runner", "transformers fp32", "ours bf16, torch runner", "transformers bf16"]
    assert pairs(names) == [(names[0], names[1]), (names[2], names[3])]
    assert pairs(["ours int8", "llama.cpp Q8_0"]) == [("ours int8", "llama.cpp Q8_0")]


def test_ratios_are_of_the_same_round_and_turned_where_less_is_better() -> None:
    figures = {
        "speed": {"ours": Figure([30.0, 10.0]), "peer": Figure([10.0, 5.0])},
        "wait": {"ours": Figure([2.0, 2.0]), "peer": Figure([4.0, 6.0])},
    }
    aims = {("peer", "speed"): 2.0, ("peer", "wait"): 3.0}
    text = comparison(figures, {"speed": 0, "wait": 0}, {"wait"}, [("ours", "peer")], aims)
    assert "2.50 (2.00-3.00) x, aim 2: holds" in text and "2.50 (2.00-3.00) x, aim 3: does not hold" in text


def test_a_table_names_the_aim_of_a_peer_by_the_start_of_its_name() -> None:
    figures = {c.title: {"ours bf16": Figure([5.0]), "llama.cpp BF16": Figure([5.0])} for c in COLUMNS}
    text = report(figures, COLUMNS, [("ours bf16", "llama.cpp BF16")], "bf16")
    assert "aim 1.25: does not hold" in text and "aim 2.6" in text


@pytest.mark.parametrize("bias", [True, False])
def test_channels_far_out_leave_the_function_as_it_is(bias: bool) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=16, vocab_size=40, bias=bias)).eval()
    changed = with_channels_far_out(model)
    ids = torch.arange(16)[None]
    with torch.inference_mode():
        torch.testing.assert_close(changed(ids)[0], model(ids)[0], atol=1e-5, rtol=1e-4)
    gains = changed.transformer["h"][0].ln_1.weight
    assert (gains > 29).sum() == 2 and gains.max() < 101


def test_windows_are_spread_evenly_and_whole() -> None:
    assert windows(list(range(101)), 10, 3) == [list(range(a, a + 11)) for a in (0, 30, 60)]
    assert [w[0] for w in windows(list(range(25)), 10, 9)] == [0, 10] and windows([1, 2], 10, 3) == []


def test_a_line_of_the_native_step_tells_tokens_and_the_share_of_the_read_limit() -> None:
    line = row("decode, 4 rows", "bf16", Figure([0.01]), Figure([10.0]), 37.5e6)
    assert line == "| bf16 | decode, 4 rows | 10.0 (10.0-10.0) | 400 | 38 (38-38) % |"
    line = row("prefill, 16 x 64", "int8", Figure([0.5]), Figure([10.0]), 1)
    assert line == "| int8 | prefill, 16 x 64 | 500.0 (500.0-500.0) | 2048 |  |"


@pytest.mark.parametrize(("screened", "bf16"), [(True, 1.5 * 100 + 4096 * 16), (False, 1.5 * (100 + 4096 * 16))])
def test_a_greedy_step_in_bf16_reads_the_head_in_8_bits_where_there_is_such_a_head(
    screened: bool, bf16: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "screens", lambda: screened)
    config = GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=4096)
    others = GPT(config).num_params(embeddings=False) - 4096 * 16
    assert decode_bytes(config, "bf16") == bf16 + 1.5 * (others - 100)
    assert decode_bytes(config, "int8") == others + 4096 * 16


def test_the_gpu_benchmark_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        bench_gpu.main([])
    assert end.value.code == 1 and "no GPU here that torch can use" in capsys.readouterr().err


def test_the_gpu_benchmark_compares_with_what_is_present_and_with_the_aims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = [sys.executable, "-c", "raise SystemExit('not here')"]
    monkeypatch.setattr(bench_gpu, "transformers", lambda *_: Process("transformers bf16", missing))
    flags = ["--device", "cpu", "--small", "--requests", "3", "--rounds", "1", "--threads", "1"]
    bench_gpu.main([*flags, "--work", str(tmp_path)])
    said = capsys.readouterr().out
    assert "absent: transformers bf16 (transformers bf16 ended: not here)" in said
    assert "| ours bf16 | " in said and "3 requests, tokens/s" in said and "these figures mean nothing" in said
    assert bench_gpu.verdict("1", Figure([2.0, 4.0, 3.0]), 3).endswith("aim 3: holds.")
    assert bench_gpu.verdict("1", Figure([2.0, 4.0, 3.0]), 3.5).endswith("aim 3.5: does not hold.")


def test_waiting_is_measured_beside_a_prompt_and_without(tmp_path: Path) -> None:
    gaps = waiting(model_folder(tmp_path, small=True), "fp32", [2], rounds=1, length=40, threads=1)[2]
    assert len(gaps.without) >= 50 and gaps.beside and gaps.first_token_ms.median > 0
    assert percentile(sorted(gaps.without), 50) == pytest.approx(1, rel=0.5)


def test_a_line_of_waiting_tells_the_median_the_last_percent_and_the_worst() -> None:
    gaps = Gaps(Figure([4.0]), [1.0] * 99 + [3.0], [1.5] * 3 + [2.5], Figure([700.0]))
    expected = "| int8, 1 | 4.0 (4.0-4.0) | 1.00, 3.00 | 1.50 | 2.50, 2.50 | 25.0 % of 4 | 700 (700-700) |"
    assert gaps.row("int8, 1") == expected
    assert [percentile([4, 1, 3, 2], percent) for percent in (1, 50, 75, 100)] == [1, 2, 3, 4]
