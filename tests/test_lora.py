"""Adapters: they alone are trained, the checkpoint is merged, and a resumed run is exact."""

import json

import pytest
import torch
from test_train import Place, place, same_weights, stop_at  # noqa: F401

from learning import lora
from model import GPT, GPTConfig
from storage import checkpoints, registry
from training.config import ConfigError, TrainConfig, resolve

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=11)
TUNING = {"batch_size": 4, "eval_interval": 6, "eval_iters": 2, "log_interval": 1, "max_iters": 12, "sample_tokens": 4}
TUNING |= {"dataset": "sums", "init_from": "base", "dtype": "fp32", "learning_rate": 0.01, "lora_rank": 2}


def adapted(rank: int = 2) -> GPT:
    torch.manual_seed(0)
    model = GPT(SHAPE)
    lora.adapt(model, rank, 2.0 * rank)
    return model


def moved(model: GPT) -> GPT:
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(3))


def test_new_adapters_change_nothing():
    model = adapted()
    torch.manual_seed(0)
    assert torch.equal(model(tokens())[0], GPT(SHAPE)(tokens())[0])


def test_only_adapters_are_trained_and_they_are_few():
    model = adapted()
    model(tokens(), tokens())[1].backward()
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"down", "up"}
    assert all(p.requires_grad == (p.grad is not None) for p in model.parameters())


def test_the_merged_weights_are_a_plain_model_that_does_the_same():
    model, plain = moved(adapted()), GPT(SHAPE)
    plain.load_state_dict(lora.saved(model)["model"])
    assert not torch.allclose(plain(tokens())[0], adapted()(tokens())[0], atol=1e-2)
    torch.testing.assert_close(plain(tokens())[0], model(tokens())[0], atol=1e-5, rtol=1e-4)


def test_fixed_matrices_are_held_in_the_type_of_the_products_and_change_no_bit_of_them():
    model, held = moved(adapted()), moved(adapted())
    lora.hold_fixed(held, torch.bfloat16)
    assert {p.dtype for p in held.parameters() if not p.requires_grad and p.dim() == 2} >= {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in held.parameters() if p.requires_grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(held(tokens())[0], model(tokens())[0])


def test_weights_held_in_half_the_bytes_are_saved_in_them_and_merged_in_full():
    held = moved(adapted())
    lora.hold_fixed(held, torch.bfloat16)
    state = lora.saved(held)
    assert {w.dtype for w in state["model"].values()} == {torch.float32}
    assert {w.dtype for name, w in state["lora"].items() if name.endswith("weight")} == {torch.bfloat16}
    again = adapted()
    again.load_state_dict(lora.take_weights(state))
    lora.hold_fixed(again, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), held.parameters(), strict=True))


def test_what_is_saved_gives_the_adapted_model_back_bit_for_bit():
    model, again = moved(adapted()), adapted()
    again.load_state_dict(lora.take_weights(lora.saved(model)))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_model_without_adapters_is_saved_as_it_is():
    model = GPT(SHAPE)
    state = lora.saved(model)
    assert list(state) == ["model"] and state["model"].keys() == model.state_dict().keys()


@pytest.mark.parametrize(("optimizer", "dtype"), [("adamw", "fp32"), ("muon", "fp32"), ("adamw", "bf16")])
def test_a_stopped_and_resumed_tuning_is_bitwise_the_uninterrupted_one(place, monkeypatch, optimizer, dtype):  # noqa: F811
    place.train("base")
    fields = TUNING | {"optimizer": optimizer, "dtype": dtype}
    assert place.train("straight", **fields) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        place.train("stopped", **fields)
    assert place.result("stopped")["iter_num"] == 8
    assert place.train("stopped", init_from="resume") == 0
    assert place.losses("stopped") == place.losses("straight") and len(place.losses("straight")) == 13
    assert same_weights(place.state("stopped"), place.state("straight"))


def test_a_tuned_model_is_better_loads_as_any_other_and_can_be_tuned_again(place):  # noqa: F811
    place.train("base")
    assert place.train("tuned", **TUNING) == 0
    assert place.losses("tuned")[-1][2] != place.losses("tuned")[0][2]
    assert place.result("tuned")["best_val_loss"] < place.result("base")["best_val_loss"]
    for path in ("out/tuned/ckpt.pt", "out/tuned/best.pt"):
        loaded = checkpoints.load_model(registry.resolve(place.workspace, model_path=path), place.workspace)
        assert loaded.model.state_dict().keys() == place.state("base")["model"].keys()
    assert place.train("again", **TUNING | {"init_from": "tuned"}) == 0


def test_moments_are_of_adapters_alone(place):  # noqa: F811
    place.train("base")
    place.train("tuned", **TUNING)
    moments = place.state("tuned")["optimizer"]["state"].values()
    assert {min(m["exp_avg"].shape) for m in moments} == {2} and len(moments) == 2 * 4 * 2


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"init_from": "resume", "lora_rank": 4}, "lora_rank is 4; ckpt.pt was trained with 2, and a resumed run"),
        (
            {"init_from": "resume", "lora_alpha": 1},
            "lora_alpha is 1.0; ckpt.pt was trained with 4.0, and a resumed run",
        ),
        (TUNING | {"lora_rank": 32}, "lora_rank is 32; it must be less than the model's width of 32"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(place, capsys, fields, sentence):  # noqa: F811
    place.train("base")
    place.train("tuned", **TUNING)
    name = "tuned" if fields["init_from"] == "resume" else "other"
    assert place.train(name, **fields) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"lora_rank": 8}, "lora_rank is 8; adapters are for fine-tuning"),
        ({"lora_alpha": 8, "init_from": "mine"}, "lora_alpha is 8 without lora_rank"),
        ({"lora_rank": 0, "init_from": "mine"}, "lora_rank"),
        ({"lora_rank": 1025, "init_from": "mine"}, "lora_rank"),
        ({"lora_rank": 2, "lora_alpha": 0, "init_from": "mine"}, "lora_alpha"),
    ],
)
def test_a_bad_configuration_of_adapters_is_refused(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        resolve(TrainConfig.parse({"dataset": "text", "output_dir": "out/x"} | fields))


def test_adapters_take_a_higher_rate_and_count_twice():
    given = {"dataset": "text", "output_dir": "out/x", "init_from": "mine"}
    plain, adapters = resolve(TrainConfig.parse(given)), resolve(TrainConfig.parse(given | {"lora_rank": 8}))
    assert adapters.learning_rate > plain.learning_rate and adapters.lora_alpha == 16
    assert plain.lora_alpha is None


def test_new_tokens_of_chats_are_refused_because_the_embedding_stays(place, capsys):  # noqa: F811
    place.train("base")
    folder = place.workspace.data / "talk"
    folder.mkdir()
    said = [{"role": "user", "content": "1 and 2"}, {"role": "assistant", "content": "make 3, or 2 if you multiply."}]
    (folder / "chat.jsonl").write_text((json.dumps({"messages": said}) + "\n") * 200)
    assert place.train("chat", **TUNING | {"dataset": "talk"}) == 2
    assert "adapters cannot learn the new tokens of chats" in capsys.readouterr().err


def test_what_is_not_trained_counts_four_operations_a_token_and_not_six():
    model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=2, n_embd=16))
    weights, attention = model.num_params(embeddings=False), 12 * 16 * 8
    assert model.flops_per_token(8) == 6 * weights + attention
    lora.adapt(model, rank=2, alpha=4.0)
    own = model.num_params(embeddings=False) - weights
    assert model.flops_per_token(8) == 6 * own + 4 * weights + attention
