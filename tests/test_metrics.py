"""Metrics, progress and data order: what a run tells of itself, and which windows it sees."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from learning.machine import PEAK_SIDE_CPU, Machine
from storage.errors import NotLoadable
from storage.runs import Workspace
from training import metrics
from training.config import TrainConfig
from training.hardware import Peak, sheet_peak
from training.progress import PreparationLine, ProgressLine, bar, duration, quantity
from training.report import Report, losses
from training.windows import UnlistedOrder, WindowOrder, gather

ROOT = Path(__file__).resolve().parent.parent

# ---- metrics.jsonl


def test_rows_are_read_as_they_were_written_and_nan_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for i in range(3):
        metrics.append(path, {"iter_num": i, "loss": 0.1 + 0.2 if i else math.nan})
    assert metrics.read(path) == [{"iter_num": 0, "loss": None}, *({"iter_num": i, "loss": 0.1 + 0.2} for i in (1, 2))]
    assert metrics.read(path, after=0, limit=1) == [{"iter_num": 1, "loss": 0.1 + 0.2}]


def test_a_file_that_is_missing_or_cut_short_is_no_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert metrics.read(path) == [] and metrics.last(path) == {}
    path.write_bytes(b'{"iter_num": 1}\n[2]\n{"iter_num": "x"}\n\xff\n{"iter_num": 3, "lo')
    assert metrics.read(path) == [{"iter_num": 1}] and metrics.last(path) == {"iter_num": 1}


def test_last_has_the_newest_value_of_every_column_of_a_long_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"iter_num": i, "loss": i / 7, "pad": "x" * 200}) for i in range(5000)]
    rows[4500] = json.dumps({"iter_num": 4500, "val_loss": 1.5})
    path.write_text("\n".join(rows) + "\n")
    newest = metrics.last(path)
    assert (newest["iter_num"], newest["loss"], newest["val_loss"]) == (4999, 4999 / 7, 1.5)


def test_a_line_that_nests_too_deeply_is_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iter_num": 1}\n' + "[" * 100_000 + '\n{"iter_num": 2}\n')
    assert metrics.read(path) == [{"iter_num": 1}, {"iter_num": 2}] and metrics.last(path) == {"iter_num": 2}


def test_a_line_without_an_end_is_refused_and_not_read_into_memory(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with open(path, "wb") as f:
        f.truncate(20 * 2**30)  # 20 GB, all of it a hole
    with pytest.raises(NotLoadable, match=r"metrics\.jsonl has a line of 4 MiB or more"):
        metrics.read(path)
    assert metrics.last(path) == {}


def test_a_resumed_run_cuts_off_what_it_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for i in range(10):
        metrics.append(path, {"iter_num": i})
    metrics.cut(path, 6)
    assert [row["iter_num"] for row in metrics.read(path)] == list(range(7))


def test_bits_per_byte_compare_across_tokenizers():
    row = losses(2.0, math.log(2) * 3, None, bytes_per_token=1.5)
    assert row["val_bits_per_byte"] == pytest.approx(2.0) and row["val_perplexity"] == pytest.approx(8.0)
    assert losses(1.0, 10_000.0, None, 1.0)["val_perplexity"] < math.inf


# ---- what the speed is compared with


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_peak_of_a_device_without_a_known_data_sheet_is_measured(dtype):
    fields = {"dataset": "a", "output_dir": "out/a", "device": "cpu", "dtype": dtype}
    peak = Machine.of(TrainConfig.parse(fields)).peak()
    assert peak.flops > 1e8 and peak.source == f"a product of matrices in {dtype}, measured"


class BusyClock:
    """A machine on which others compute: a product takes 10 s, and 0.25 s of its processors."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 10.0
        return self.now

    def process_time(self) -> float:
        self.now += 0.25
        return self.now


def test_what_others_compute_meanwhile_does_not_lower_the_peak(monkeypatch):
    monkeypatch.setattr("learning.machine.time", BusyClock())
    monkeypatch.setattr("learning.machine.torch.get_num_threads", lambda: 1)
    fields = {"dataset": "d", "output_dir": "out/a", "device": "cpu", "dtype": "fp32"}
    assert Machine.of(TrainConfig.parse(fields)).peak().flops == pytest.approx(2 * PEAK_SIDE_CPU**3 / 0.25)


def test_the_peak_of_a_known_device_is_its_data_sheets_and_of_the_precision_that_it_is_for():
    assert sheet_peak("NVIDIA A100-SXM4-80GB", "bf16") == Peak(312e12, "the data sheet of A100")
    assert sheet_peak("NVIDIA A100-SXM4-80GB", "fp32") is None and sheet_peak("cpu", "bf16") is None


def test_mfu_is_the_share_of_the_peak_of_all_processes(tmp_path):
    run = Workspace(tmp_path).run("a")
    run.folder.mkdir(parents=True)
    fields = {"dataset": "a", "output_dir": "out/a", "batch_size": 4, "gradient_accumulation_steps": 2, "max_iters": 9}
    report = Report(run, TrainConfig.parse(fields))
    report.start(parameters=1000, window=16, flops_per_token=6000, peak=Peak(1e6, "a guess"), devices=2)
    report.iteration(10, {"loss": 1.0}, None, seconds=20.0, memory=1)  # half an iteration a second
    (row,) = metrics.read(run.metrics)
    assert row["tokens_per_second"] == 64 and row["flops_per_second"] == 384_000 and row["mfu"] == 0.192


# ---- the progress line


def test_numbers_are_shown_as_a_person_says_them():
    assert [duration(s) for s in (0, 59.6, 200, 7500, 100_000, -5)] == ["0s", "1m00s", "3m20s", "2h05m", "1d03h", "0s"]
    assert [quantity(n) for n in (950, 12_345, 4_560_000)] == ["950", "12.3k", "4.56M"]
    assert [len(bar(x)) for x in (-1, 0, 0.013, 0.5, 1, 2)] == [24] * 6 and bar(0.5) == "█" * 12 + "░" * 12


def test_a_file_gets_plain_lines_and_a_terminal_one_that_is_rewritten():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream in (io.StringIO(), Terminal()):
        line = ProgressLine(500, stream)
        line.show(10, 3.21, None, 5000, 70)
        line.say("sample: hello")
        line.show(20, 3.21, 3.3, 5000, 70, keep=True)
    shown = stream.getvalue()
    assert shown.startswith("\r\x1b[K") and "\r\x1b[Ksample: hello\n 20/500  loss" in shown and shown.endswith("left\n")
    plain = io.StringIO()
    ProgressLine(500, plain).show(10, 3.21, 3.3, 5000, 70)
    assert plain.getvalue() == " 10/500  loss 3.2100  val 3.3000  5k tok/s  1m10s left\n"


def test_preparation_is_shown_once_per_stage_and_not_for_every_piece(capsys):
    show = PreparationLine()
    for done in range(1000):
        show("tokenizing", done, 1000)
    show("writing", 0, 0)
    assert capsys.readouterr().out.splitlines() == ["tokenizing 0%", "writing"]


# ---- data order


def test_an_epoch_has_every_window_once_in_another_order_than_the_next():
    order = WindowOrder(tokens=1000, length=16, seed=1)
    first = order.next(len(order.order))
    assert len(set(first)) == len(first) >= 61 and set((first - order.offset) % 16) == {0}
    assert list(first) != sorted(first) and first.max() + 17 <= 1000
    second = order.next(5)
    assert order.state() == {"epoch": 1, "position": 5} and list(second) != list(first[:5])


@pytest.mark.parametrize("windows", [1, 2, 3, 62, 1000, 4097])
def test_an_order_without_a_list_has_every_window_once_and_is_random(monkeypatch, windows):
    monkeypatch.setattr("training.windows.LISTED", 0)
    order = WindowOrder(tokens=16 * windows + 16, length=16, seed=3)
    assert len(order.order) >= windows and isinstance(order.order, UnlistedOrder)
    first, count = order.next(len(order.order)), len(order.order)
    assert sorted(first - order.offset) == [16 * i for i in range(count)]
    second = order.next(min(count, len(order.order)))
    if windows >= 1000:
        places = np.argsort(first)
        assert abs(np.corrcoef(places, np.arange(count))[0, 1]) < 0.15
        assert (first[: len(second)] != second).mean() > 0.9


def test_an_order_without_a_list_goes_on_where_it_stopped(monkeypatch):
    monkeypatch.setattr("training.windows.LISTED", 0)
    straight, stopped, again = (WindowOrder(10_000, 16, seed=7) for _ in range(3))
    expected = [straight.next(90) for _ in range(20)]
    for part in expected[:11]:
        assert np.array_equal(stopped.next(90), part)
    again.restore(stopped.state())
    assert all(np.array_equal(again.next(90), part) for part in expected[11:])


def test_an_order_of_a_huge_split_takes_no_memory():
    order = WindowOrder(tokens=10**15, length=1024, seed=1)
    starts = order.next(1000)
    assert (
        isinstance(order.order, UnlistedOrder)
        and len(set(starts)) == 1000
        and starts.min() >= 0
        and starts.max() < 10**15 - 1024
    )
    assert 0.45 < starts.mean() / 10**15 < 0.55


def test_windows_go_on_exactly_where_a_saved_order_stopped():
    straight, stopped = (WindowOrder(1000, 16, seed=7) for _ in range(2))
    expected = np.concatenate([straight.next(13) for _ in range(30)])
    begun = np.concatenate([stopped.next(13) for _ in range(11)])
    again = WindowOrder(1000, 16, seed=7)
    again.restore(json.loads(json.dumps(stopped.state())))
    assert np.array_equal(expected, np.concatenate([begun, *(again.next(13) for _ in range(19))]))


def test_a_request_for_more_than_an_epoch_runs_into_the_next():
    order = WindowOrder(tokens=40, length=16, seed=0)
    assert len(order.next(100)) == 100 and order.epoch > 40


@pytest.mark.parametrize("tokens", [0, 16])
def test_too_few_tokens_for_one_window_are_refused(tokens):
    with pytest.raises(ValueError, match=f"{tokens} tokens hold no window of 16"):
        WindowOrder(tokens, 16, seed=0)


def test_rows_are_the_windows_with_the_token_after_each():
    tokens = np.arange(100, dtype=np.uint16)
    rows = gather(tokens, np.array([0, 90, 3]), 9)
    assert rows.dtype == np.uint16 and rows.tolist() == [list(range(s, s + 10)) for s in (0, 90, 3)]


def test_a_row_that_does_not_fit_on_the_disk_leaves_no_half(tmp_path, monkeypatch):
    metrics.append(tmp_path / "m", {"iter_num": 1})
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    with pytest.raises(OSError, match="No space left"):
        metrics.append(tmp_path / "m", {"iter_num": 2})
    monkeypatch.undo()
    metrics.append(tmp_path / "m", {"iter_num": 3})
    assert [row["iter_num"] for row in metrics.read(tmp_path / "m")] == [1, 3]


def test_the_memory_of_a_process_is_its_own_and_not_that_of_who_started_it():
    large = bytearray(b"x") * (300 << 20)  # in memory while the other starts
    code = "from training.hardware import process_memory; print(process_memory())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert 5 << 20 < int(done.stdout) < len(large)
