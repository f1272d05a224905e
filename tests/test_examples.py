"""Training on what is marked to be learned: its windows, losses and gradients, and a model that chats."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from two_processes import train_in_two

import train
from learning.batches import Batches
from learning.vocabulary import rows_for, with_rows
from storage import checkpoints, registry
from storage.chat_format import end_of_turn, is_chat, parse_messages, render, with_chat_tokens
from storage.datasets import Splits
from storage.runs import Workspace
from storage.token_files import BEGINS, LEARNED
from storage.tokenizer import char_tokenizer
from training import metrics
from training.examples import ExampleOrder, learned, order_of, weight
from training.probe import probe
from training.windows import gather

ROOT = Path(__file__).resolve().parent.parent
ANSWERS = {f"{word}?": word[::-1] for word in ("stop", "draw", "live", "part", "tool", "keep", "deer", "star")}
TINY = {"dataset": "talk", "tokenizer": "char", "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 24}
TINY |= {"batch_size": 8, "max_iters": 12, "eval_interval": 6, "eval_iters": 2, "log_interval": 1, "sample_tokens": 8}
TINY |= {"dtype": "fp32", "device": "cpu", "optimizer": "adamw", "learning_rate": 0.005}


def conversation(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def workspace(tmp_path):
    """A workspace with a dataset of conversations; train.py's signal handlers go when the test does."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    lines = [json.dumps({"messages": conversation(*item)}) + "\n" for item in ANSWERS.items()]
    (tmp_path / "data" / "talk").mkdir(parents=True)
    (tmp_path / "data" / "talk" / "chat.jsonl").write_text("".join(lines * 4))
    (tmp_path / "data" / "talk" / "val.jsonl").write_text("".join(lines * 4))
    yield Workspace(tmp_path)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def argv(workspace: Workspace, name: str, **fields) -> list[str]:
    flags = {"output_dir": f"out/{name}"} | (fields if "init_from" in fields else TINY | fields)
    return ["--root", str(workspace.root), *(part for key, value in flags.items() for part in (f"--{key}", str(value)))]


def run(workspace: Workspace, name: str, **fields) -> dict:
    """Train, and return the checkpoint."""
    assert train.main(argv(workspace, name, **fields)) == 0
    return checkpoints.load_training_state(workspace.run(name).checkpoint)


def answer(workspace: Workspace, name: str, question: str) -> str:
    """Return what the trained model answers, greedily."""
    loaded = checkpoints.load_model(registry.resolve(workspace, model_path=f"out/{name}"), workspace)
    text = loaded.tokenizer
    ids = render(text, parse_messages([{"role": "user", "content": question}]))
    found = loaded.model.generate(torch.tensor([ids]), 12, temperature=0, eot=end_of_turn(text))
    return text.decode(found[0, len(ids) :].tolist())


def mask_of(*documents: tuple[int, int]) -> np.ndarray:
    """Return the mask of documents of so many tokens to read and then so many to learn."""
    parts = [np.array([0] * read + [LEARNED] * said, np.uint8) for read, said in documents]
    for part in parts:
        part[0] |= BEGINS
    return np.concatenate(parts)


# ---- windows


def test_windows_begin_where_documents_begin_and_cover_all_that_is_learned():
    mask = mask_of(*[(3, 4), (2, 2), (5, 6)] * 20)
    order = ExampleOrder(mask, 16, seed=1)
    starts = order.next(len(order.order))
    seen = {(int(s) + 1 + i) % len(mask) for s in starts for i in range(16)}
    assert seen >= set(np.flatnonzero(mask & LEARNED)) and len(set(starts)) == len(starts)
    assert all(mask[s] & BEGINS for s in starts), "also the last ones, which go on at the beginning"


def test_each_of_a_few_documents_begins_a_window_and_none_is_longer_than_all_of_them():
    mask = mask_of((3, 4), (2, 2), (5, 6))
    order = order_of(np.zeros(len(mask), np.uint16), mask, 64, seed=1)
    assert order.length == len(mask) - 1 and set(order.next(60).tolist()) == {0, 7, 11}
    assert gather(np.arange(len(mask)), np.array([11, 0]), 14).tolist() == [[*range(11, 22), *range(4)], [*range(15)]]


def test_a_document_longer_than_a_window_goes_on_in_the_next():
    order = ExampleOrder(mask_of((5, 60), (5, 5)), 16, seed=0)
    assert {0, 16, 32, 48} <= set(order.next(len(order.order)).tolist())


def test_windows_with_nothing_to_learn_are_left_out():
    mask = mask_of(*[(40, 2)] * 10)
    order = ExampleOrder(mask, 8, seed=3)
    starts = order.next(len(order.order))
    assert 10 <= len(starts) <= 21 and all(weight(mask, np.array([s]), 8) > 0 for s in starts)
    with pytest.raises(ValueError, match="no window of 8 has a token to learn"):
        ExampleOrder(mask_of((40, 0)), 8, seed=3)


def test_an_order_of_examples_goes_on_exactly_where_it_stopped():
    mask = mask_of(*[(3, 4), (2, 2), (5, 6)] * 20)
    straight, stopped, again = (ExampleOrder(mask, 16, seed=7) for _ in range(3))
    expected, _ = straight.next(70), stopped.next(41)
    again.restore(json.loads(json.dumps(stopped.state())))
    assert straight.epoch > 0 and np.array_equal(again.next(29), expected[41:])


# ---- the loss


def test_the_loss_ignores_what_the_user_says(workspace, monkeypatch):
    seen = []
    batch = Batches.batch

    def watched(self, starts):
        inputs, targets = batch(self, starts)
        rows = gather(self.part[0], starts, self.window)[:, 1:].astype(np.int64)
        expected = np.where(learned(self.part[1], starts, self.window), rows, -1)
        seen.append((targets.numpy() == expected).all() and 0 < (targets >= 0).sum() < targets.numel() / 2)
        return inputs, targets

    monkeypatch.setattr(Batches, "batch", watched)
    run(workspace, "a")
    assert len(seen) > 12 and all(seen)


def test_steps_count_by_what_is_learned_in_them(workspace):
    lines = [json.dumps({"prompt": "a" * (1 + 7 * (i % 3)), "completion": "b" * (1 + 3 * (i % 4))}) for i in range(90)]
    (workspace.data / "uneven").mkdir()
    (workspace.data / "uneven" / "a.jsonl").write_text("\n".join(lines))
    fields = {"dataset": "uneven", "tokenizer": "bpe:257", "max_iters": 4, "eval_interval": 4}
    whole = run(workspace, "whole", **fields)["model"]
    parts = run(workspace, "parts", **fields, batch_size=1, gradient_accumulation_steps=8)["model"]
    assert all(torch.allclose(whole[k], parts[k], atol=1e-4) for k in whole)
    losses = [[row["loss"] for row in metrics.read(workspace.run(n).metrics)[1:]] for n in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_two_processes_make_the_losses_of_one(workspace):
    run(workspace, "one", max_iters=3)
    assert train_in_two(argv(workspace, "two", max_iters=3)) == [0, 0]
    one, two = (metrics.read(workspace.run(name).metrics) for name in ("one", "two"))
    assert [row["loss"] for row in two[1:]] == pytest.approx([row["loss"] for row in one[1:]], abs=1e-5)
    assert two[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], abs=1e-5)


def test_a_stopped_and_resumed_run_is_bitwise_the_uninterrupted_one(workspace, monkeypatch):
    straight = run(workspace, "straight", dropout=0.1)["model"]
    update = train.Trainer.update

    def stopping(self):
        result = update(self)
        self.stop.requested |= self.iter_num == 7
        return result

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "update", stopping)
        assert run(workspace, "stopped", dropout=0.1)["iter_num"] == 7
    resumed = run(workspace, "stopped", init_from="resume", dataset="talk")["model"]
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


# ---- a model that chats


def test_a_model_trained_on_conversations_answers_as_it_was_taught(workspace):
    run(workspace, "chat", max_iters=150, eval_interval=75)
    assert {q: answer(workspace, "chat", q) for q in ANSWERS} == {q: a + "<|end|>" for q, a in ANSWERS.items()}
    sample = metrics.read(workspace.run("chat").samples)[-1]
    asked = sample["prompt"].removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")
    assert sample["text"] == ANSWERS[asked] + "<|end|>"


def test_four_conversations_are_enough_of_which_one_is_validated_on_and_each_other_is_learned(workspace):
    few = dict(list(ANSWERS.items())[:4])
    lines = [json.dumps({"messages": conversation(*item)}) + "\n" for item in few.items()]
    (workspace.data / "talk" / "val.jsonl").unlink()
    (workspace.data / "talk" / "chat.jsonl").write_text("".join(lines))
    run(workspace, "few", **{"block_size": 64, "max_iters": 100, "eval_interval": 100, "learning_rate": 0.01})
    last = metrics.last(workspace.run("few").metrics)
    assert last["train_loss"] < 0.1 < last["val_loss"]
    assert sum(answer(workspace, "few", question) == f"{said}<|end|>" for question, said in few.items()) == 3


def test_a_model_of_plain_text_becomes_one_that_chats(workspace):
    (workspace.data / "text").mkdir()
    (workspace.data / "text" / "a.txt").write_text(" ".join([*ANSWERS, *ANSWERS.values()] * 30))
    base = run(workspace, "base", dataset="text", tokenizer="bpe:300")
    fields = {"dataset": "talk", "init_from": "base", "batch_size": 8, "learning_rate": 0.005, "sample_tokens": 0}
    tuned = run(workspace, "tuned", **fields, max_iters=200, eval_interval=200)
    assert tuned["model_args"]["vocab_size"] == base["model_args"]["vocab_size"] + 4
    assert answer(workspace, "tuned", "stop?") == "pots<|end|>"


def test_new_tokens_get_the_mean_of_the_known_rows_and_spare_rows_are_used_first():
    known = torch.arange(12.0).view(6, 2)
    grown = with_rows({"transformer.wte.weight": known, "lm_head.weight": known}, used=4, wanted=5)
    assert grown["lm_head.weight"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [3, 4], [10, 11]]
    assert len(with_rows(dict.fromkeys(grown, known), used=6, wanted=9)["lm_head.weight"]) == 9
    assert known[4].tolist() == [8, 9]


def test_a_new_model_has_a_row_for_each_token():
    assert rows_for(char_tokenizer("abc")) == 3 and rows_for(with_chat_tokens(char_tokenizer("abc"))) == 7


# ---- samples


def test_a_sample_of_a_chat_model_is_the_answer_to_a_question():
    text = with_chat_tokens(char_tokenizer("ab?"))
    ids = np.array(render(text, parse_messages(conversation("a?", "b")), reply=False), np.uint16)
    mask = np.array([0] * 5 + [LEARNED] * 2, np.uint8)
    splits = Splits(ids, ids, 1.0, text, "talk", mask, mask)
    assert is_chat(text) and probe(splits, None, 24) == (ids[:5].tolist(), end_of_turn(text))
    assert text.decode(probe(splits, "b?", 24)[0]) == "<|user|>b?<|end|><|assistant|>"
    assert len(probe(splits, "b" * 50, 24)[0]) == 23
