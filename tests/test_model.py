"""The model against its specification: transformers' GPT-2, cross-entropy written out, and itself with a cache."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import model as model_file
from learning.machine import compiled
from model import GPT, GPTConfig, short_attention
from storage.pretrained import export, load_folder
from storage.tokenizer import char_tokenizer

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=20)
SHAPES = [
    {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 5, "vocab_size": 11},
    {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 50},
    {"n_layer": 2, "n_head": 3, "n_embd": 48, "block_size": 64, "vocab_size": 131},
]


TOKENS = {"bos_token_id": 0, "eos_token_id": 0}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def characters(n):
    return char_tokenizer("".join(map(chr, range(40, 40 + n))))


def shaken(model):
    """Return a model with parameters that all matter: initial biases and norms are 0 and 1, and forgive mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def ids(config, T=None):
    return torch.randint(config.vocab_size, (2, T or config.block_size))


# ---- transformers


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_theirs_loads_here_with_the_same_logits(tmp_path, shape, tied, activation):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {("n_positions" if name == "block_size" else name): n for name, n in shape.items()}
    config = GPT2Config(
        **sizes, activation_function=activation, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0
    )
    theirs = shaken(GPT2LMHeadModel(config))
    theirs.save_pretrained(tmp_path)
    characters(shape["vocab_size"]).save(tmp_path / "tokenizer.json")
    ours, _ = load_folder(tmp_path)
    assert ours.config.tied is tied and ours.config.activation == activation
    x = ids(ours.config)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], theirs(x).logits, atol=1e-4, rtol=0)


def test_theirs_in_shards_loads_here_with_the_same_logits(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        **{"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 12, "vocab_size": 20, "bos_token_id": 0}
    )
    theirs = shaken(GPT2LMHeadModel(config))
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    characters(20).save(tmp_path / "tokenizer.json")
    ours, _ = load_folder(tmp_path)
    x = ids(ours.config)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], theirs(x).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_ours_exported_loads_there_with_the_same_logits(tmp_path, shape, tied, bias):
    from transformers import AutoModelForCausalLM

    config = GPTConfig(**shape, tied=tied, bias=bias, activation="gelu" if bias else "gelu_new")
    ours = shaken(GPT(config))
    export(ours, characters(config.vocab_size), tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    x = ids(config)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, ours(x)[0], atol=1e-4, rtol=0)


# ---- loss


def in_parts(monkeypatch, model, x, y, numbers=60):
    """Return loss and gradients with logits of so many numbers at most."""
    with monkeypatch.context() as patch:
        patch.setattr(model_file, "WHOLE_LOGITS", numbers)
        logits, loss = model(x, y)
    (3 * loss).backward()
    assert logits.numel() == 0
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("numbers", [1, 60, 479])
@pytest.mark.parametrize("frozen", ["", "wte", "h."])
@pytest.mark.parametrize("tied", [True, False])
def test_a_loss_in_parts_has_the_value_and_the_gradients_of_the_whole(monkeypatch, tied, frozen, numbers):
    model = shaken(GPT(replace(TINY, tied=tied)))
    for name, p in model.named_parameters():
        p.requires_grad_(not (frozen and frozen in name))
    x, y = ids(TINY), ids(TINY)
    y[0, 3:7] = -1
    loss = model(x, y)[1]
    (3 * loss).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    found, gradients = in_parts(monkeypatch, model, x, y, numbers)
    torch.testing.assert_close(found, loss.detach())
    torch.testing.assert_close(gradients, expected)


def test_a_loss_in_parts_follows_autocast(monkeypatch):
    model, x, y = shaken(GPT(TINY)), ids(TINY), ids(TINY)
    whole, gradients = in_parts(monkeypatch, model, x, y)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, near = in_parts(monkeypatch, model, x, y)
    assert rounded != whole and near.keys() == gradients.keys()
    torch.testing.assert_close(rounded, whole, rtol=0.02, atol=0.02)
    head = "transformer.wte.weight"
    assert (near[head] - gradients[head]).norm() < 0.05 * gradients[head].norm()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # the compiler looks at it, and means nothing by it
def test_a_compiled_model_has_the_same_loss_in_parts(monkeypatch):
    model, x, y = shaken(GPT(TINY)), ids(TINY), ids(TINY)
    expected, gradients = in_parts(monkeypatch, model, x, y)
    model.zero_grad(set_to_none=True)
    found, compiled_gradients = in_parts(monkeypatch, compiled(model, backend="eager"), x, y)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled_gradients, {f"_orig_mod.{name}": p for name, p in gradients.items()})


def test_a_loss_in_parts_without_gradients_is_the_same(monkeypatch):
    model, x, y = shaken(GPT(TINY)), ids(TINY), ids(TINY)
    whole = model(x, y)[1]
    monkeypatch.setattr(model_file, "WHOLE_LOGITS", 60)
    with torch.no_grad():
        loss = model(x, y)[1]
    assert not loss.requires_grad
    torch.testing.assert_close(loss, whole.detach())


def test_the_loss_is_the_mean_cross_entropy_of_the_targets():
    model, x, y = shaken(GPT(TINY)), ids(TINY), ids(TINY)
    logits, loss = model(x, y)
    expected = -logits.log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean()
    torch.testing.assert_close(loss, expected)


def test_a_target_of_minus_one_is_left_out():
    model, x, y = shaken(GPT(TINY)), ids(TINY), ids(TINY)
    masked = y.clone()
    masked[0] = -1
    torch.testing.assert_close(model(x, masked)[1], model(x[1:], y[1:])[1])


def test_a_new_model_knows_nothing():
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=100)
    loss = GPT(config).eval()(ids(config), ids(config))[1].item()
    assert abs(loss - math.log(100)) < 0.1


def test_a_token_sees_no_later_token():
    model, x = shaken(GPT(TINY)), ids(TINY)
    other = x.clone()
    other[:, 7:] = (other[:, 7:] + 1) % TINY.vocab_size
    before, after = model(x)[0][:, :7], model(other)[0][:, :7]
    assert torch.equal(before, after)


def test_dropout_acts_in_training_only():
    model, x = (
        GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=9, dropout=0.5)),
        torch.arange(8)[None],
    )
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


def test_short_attention_is_the_fused_one_with_the_same_gradients():
    ours = [torch.randn(2, 3, 7, 4, requires_grad=True) for _ in range(3)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    weight = torch.randn(2, 3, 7, 4)
    found = short_attention(*ours)
    expected = F.scaled_dot_product_attention(*theirs, is_causal=True)
    torch.testing.assert_close(found, expected)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# ---- cached decoding


class OneSequenceCache:
    """The least that a KV cache can be: everything seen so far, joined together."""

    def __init__(self):
        self.layers = {}

    def attend(self, layer, q, k, v):
        if layer in self.layers:
            old_k, old_v = self.layers[layer]
            k, v = torch.cat((old_k, k), 2), torch.cat((old_v, v), 2)
        self.layers[layer] = k, v
        past = k.size(2) - q.size(2)
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(past)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 1, 3, 2], [11, 1]])
def test_decoding_with_a_cache_gives_the_logits_of_the_whole(pieces):
    model, x, cache, found, at = shaken(GPT(TINY)), ids(TINY), OneSequenceCache(), [], 0
    for T in pieces:
        positions = torch.arange(at, at + T).expand(2, T)
        found.append(model(x[:, at : at + T], cache=cache, positions=positions)[0])
        at += T
    torch.testing.assert_close(torch.cat(found, 1), model(x)[0], atol=1e-5, rtol=1e-5)


# ---- generate


def test_greedy_takes_the_most_probable_token_each_time():
    model, x = shaken(GPT(TINY)), ids(TINY, 3)[:1]
    out = model.generate(x, 5, temperature=0)
    for t in range(3, 8):
        with torch.inference_mode():
            expected = model(out[:, :t])[0][0, -1].argmax()
        assert out[0, t] == expected


def test_generation_ends_after_max_new_tokens_or_with_the_context():
    model, x = shaken(GPT(TINY)), ids(TINY, 3)[:1]
    assert model.generate(x, 4).shape == (1, 7)
    assert model.generate(x, 99).shape == (1, TINY.block_size)
    assert model.generate(x, 0).equal(x)
    assert model.generate(ids(TINY)[:1], 5).shape == (1, TINY.block_size)


def test_generation_ends_with_the_end_of_text():
    model, x = shaken(GPT(TINY)), ids(TINY, 3)[:1]
    greedy = model.generate(x, 9, temperature=0)[0].tolist()
    eot = greedy[5]
    assert model.generate(x, 9, temperature=0, eot=eot)[0].tolist() == greedy[: greedy.index(eot, 3) + 1]


def test_one_seed_gives_one_text_and_top_k_1_is_greedy():
    model, x = shaken(GPT(TINY)), ids(TINY, 3)[:1]
    first, second = (model.generate(x, 9, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(model.generate(x, 9, top_k=1), model.generate(x, 9, temperature=0))


def test_top_k_leaves_only_the_k_most_probable_tokens():
    model, x = shaken(GPT(TINY)), ids(TINY, 3)[:1]
    allowed = set(model(x)[0][0, -1].topk(3).indices.tolist())
    seen = {model.generate(x, 1, temperature=9.0, top_k=3)[0, -1].item() for _ in range(60)}
    assert seen == allowed


# ---- configuration and sizes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layer", 0), ("n_layer", "12"), ("n_layer", True), ("n_layer", 1.0), ("n_head", 5), ("n_embd", 0),
        ("vocab_size", -5), ("block_size", None), ("dropout", 1.0), ("dropout", -0.1), ("activation", "relu"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_is_refused_by_field(field, value):
    with pytest.raises(ValueError, match=field):
        GPTConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 9, field: value})


def test_too_many_tokens_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="13 tokens do not fit the context of 12"):
        GPT(TINY)(torch.zeros(1, 13, dtype=torch.long))


@pytest.mark.parametrize(("n_layer", "n_embd", "n_head", "millions"), [(12, 768, 12, 124.4), (24, 1024, 16, 354.8)])
def test_gpt2_has_its_number_of_parameters(n_layer, n_embd, n_head, millions):
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_head))
    assert round(model.num_params() / 1e6, 1) == millions
    assert model.num_params() - model.num_params(embeddings=False) == 1024 * n_embd


def test_matrices_decay_and_biases_and_norms_do_not():
    model = GPT(TINY)
    decayed, kept = model.parameter_groups(0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"]) and all(p.dim() == 1 for p in kept["params"])
    assert sum(p.numel() for group in (decayed, kept) for p in group["params"]) == model.num_params()


@pytest.mark.parametrize(("width", "inner"), [(768, 0.02), (48, 0.08)])
def test_residual_projections_start_smaller_and_what_reads_a_narrow_stream_larger(width, inner):
    model = GPT(GPTConfig(n_layer=8, n_head=2, n_embd=width, block_size=8, vocab_size=99))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else inner if ".h." in name else 0.02
            assert abs(p.std().item() - expected) < 0.1 * expected, name


def test_the_embedding_and_a_tied_head_are_one_tensor_and_an_untied_one_is_another():
    assert (tied := GPT(TINY)).lm_head.weight is tied.transformer["wte"].weight
    untied = GPT(GPTConfig(**{**TINY.model_args(), "tied": False}))
    assert untied.num_params() == tied.num_params() + TINY.vocab_size * TINY.n_embd
