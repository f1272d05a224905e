"""The model: GPT-2 as nanoGPT writes it, with nanoGPT's names.

Read from top to bottom: configuration, layer norm, attention, MLP, block, GPT. One `forward`
serves training (with targets, it returns the loss) and cached decoding (with a cache, it
attends to earlier tokens through it). The naive `generate` at the end runs the whole context
for every token; it is slow and obvious, and it specifies what the inference engine must produce.

This file knows tensors only: no files, no text, no HTTP, and nothing else of this project.

Letters in shape comments: B batch, T time (tokens), C n_embd, nh n_head, hs head size, V vocab_size.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # exact; nanoGPT's
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),  # OpenAI's GPT-2 and its name in transformers
}
LAYER_NORM_EPS = 1e-5
WHOLE_LOGITS = 2**25  # numbers; more are computed a part at a time: 4 windows of 256 tokens with GPT-2's vocabulary are
SHORT = 64  # tokens; the backward of the CPU's flash attention in bf16 is slower than plain products up to here


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; nanoGPT's `model_args` and two more fields with GPT-2's meaning."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    vocab_size: int = 50257
    bias: bool = True  # biases in linears and layer norms
    dropout: float = 0.0
    activation: str = "gelu"
    tied: bool = True  # the head shares the token embedding's weight

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}; it must be one of {', '.join(ACTIVATIONS)}")

    @property
    def head_size(self) -> int:
        """Return the width of one attention head."""
        return self.n_embd // self.n_head

    def model_args(self) -> dict[str, Any]:
        """Return the fields that nanoGPT's GPTConfig takes, for a checkpoint's `model_args`."""
        args = asdict(self)
        del args["activation"], args["tied"]
        return args


class Cache(Protocol):
    """What attention needs of a KV cache: store this step's keys and values, and attend to all of them."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention output (B, nh, T, hs) of queries (B, nh, T, hs) after adding k and v."""
        ...


class LayerNorm(nn.Module):
    """Layer norm with an optional bias, which torch's own calls `elementwise_affine` and cannot split."""

    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, LAYER_NORM_EPS)


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention (B, nh, T, hs) as products and a softmax: what torch's fused operation means."""
    T, scale = q.size(-2), q.size(-1) ** -0.5
    later = torch.full((T, T), -math.inf, device=q.device).triu(1)
    out: Tensor = ((q @ k.mT).float() * scale + later).softmax(-1).to(v.dtype) @ v
    return out


class CausalSelfAttention(nn.Module):
    """Attention of several heads. Dropout is on its output, not on its weights as in nanoGPT: dropped weights
    have no flash kernel on CPUs, where they made a training step three times slower (6/6/192, block 256).
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.head_size, self.layer = config.n_head, config.head_size, layer

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, self.head_size)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, nh, T, hs)
        if cache is None and T <= SHORT and q.requires_grad and x.device.type == "cpu":
            y = short_attention(q, k, v)
        elif cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = cache.attend(self.layer, q, k, v)
        y = y.transpose(1, 2).reshape(B, T, C)
        out: Tensor = self.resid_dropout(self.c_proj(y))
        return out


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.c_proj(self.activation(self.c_fc(x))))
        return out


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


def embedding(rows: int, width: int) -> nn.Embedding:
    """Return an embedding whose weight is still unset; torch's own draws random numbers that GPT draws again."""
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


class LossInParts(torch.autograd.Function):
    """The mean cross-entropy of hidden states (N, C) under a head (V, C), with logits for a few rows at a time.

    Logits of all rows would be most of a training's memory. Their gradient is known as soon as they are, so the
    gradients of states and head are made in the forward pass, and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor, dtype: torch.dtype, gradients: bool) -> Tensor:
        """Return the loss; products are in `dtype`; target -1 is left out."""
        w, count = head.to(dtype), (targets != -1).sum()
        dx = torch.empty_like(x) if gradients and x.requires_grad else None
        dhead = torch.zeros_like(head) if gradients and head.requires_grad else None
        total = torch.zeros((), device=x.device)
        size = max(1, WHOLE_LOGITS // ((16 if dhead is None else 2) * len(head)))  # adding to a large dhead takes time
        for i in range(0, len(x), size):
            h, target = x[i : i + size].to(dtype), targets[i : i + size]
            kept, wanted = target != -1, target.clamp(min=0)[:, None]
            logits = (h @ w.T).float()
            norm = logits.logsumexp(-1, keepdim=True)
            total += (norm - logits.gather(-1, wanted))[kept].sum()
            if dx is None and dhead is None:
                continue
            slope = logits.sub_(norm).exp_()  # the gradient of the sum: softmax, less 1 at the target
            slope.scatter_add_(-1, wanted, slope.new_full(wanted.shape, -1.0))
            slope = slope.mul_(kept[:, None]).to(dtype)
            if dx is not None:
                dx[i : i + size] = (slope @ w / count).to(dx.dtype)
            if dhead is not None:
                dhead += slope.T @ h
        ctx.save_for_backward(dx, None if dhead is None else dhead.div_(count))
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients, as many as `forward` has arguments."""
        dx, dhead = (None if d is None else d * grad for d in ctx.saved_tensors)
        return dx, dhead, None, None, None


class GPT(nn.Module):
    """A GPT-2 model. Parameter names are nanoGPT's, which are GPT-2's: wte, wpe, h, ln_f, lm_head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        wte = embedding(config.vocab_size, config.n_embd)
        self.transformer = nn.ModuleDict(
            {
                "wte": wte,
                "wpe": embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": LayerNorm(config.n_embd, config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = wte.weight
        if not self.lm_head.weight.is_meta:  # a meta model has no numbers yet: it is about to be given some
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as GPT-2: normal(0, 0.02), residual projections scaled by 1/sqrt(2 n_layer), biases 0.

        0.02 suits matrices of GPT-2's width of 768. What reads the residual stream gets as much of it at any width,
        which small models learn faster from.
        """
        std = {"c_proj.weight": 0.02 / math.sqrt(2 * self.config.n_layer)}
        std |= dict.fromkeys(("c_attn.weight", "c_fc.weight"), 0.02 * math.sqrt(768 / self.config.n_embd))
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=std.get(".".join(name.split(".")[-2:]), 0.02))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.lm_head.weight.device

    def parts(self, name: str) -> Iterator[Tensor]:
        """Give a parameter in parts, in order of its rows; here it is in memory already, so it is one."""
        yield self.get_parameter(name)

    def num_params(self, embeddings: bool = True) -> int:
        """Return the number of parameters, the position embedding left out if not `embeddings` (as nanoGPT counts)."""
        n = sum(p.numel() for p in self.parameters())
        return n if embeddings else n - self.config.block_size * self.config.n_embd

    def flops_per_token(self, T: int) -> int:
        """Return the floating point operations of forward and backward for one token in a context of T.

        Formula: 6 N + 12 n_layer C T, PaLM (arXiv 2204.02311), appendix B; N counts no position embedding. A
        parameter that is not trained needs no gradient of its own, which leaves it 4 of the 6.
        """
        fixed = sum(p.numel() for name, p in self.named_parameters() if not p.requires_grad and "wpe" not in name)
        weights = 6 * self.num_params(embeddings=False) - 2 * fixed
        return weights + 12 * self.config.n_layer * self.config.n_embd * T

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return optimizer groups: matrices and embeddings decay, biases and layer norms do not."""
        params = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]

    def hidden(self, idx: Tensor, cache: Cache | None = None, positions: Tensor | None = None) -> Tensor:
        """Return the final hidden states (B, T, C) of token ids (B, T), after the last layer norm.

        `positions` (B, T) are needed with a cache, where a row may start anywhere in its context; without
        one they are 0 to T-1. Raises ValueError when T exceeds the context.
        """
        T = idx.size(1)
        if positions is None:
            if T > self.config.block_size:
                raise ValueError(f"{T} tokens do not fit the context of {self.config.block_size}")
            positions = torch.arange(T, device=idx.device)
        x: Tensor = self.transformer["wte"](idx) + self.transformer["wpe"](positions)
        x = self.transformer["drop"](x)
        for block in self.transformer["h"].children():
            x = block(x, cache)
        x = self.transformer["ln_f"](x)
        return x

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return logits (B, T, V) and, with targets (B, T), their mean cross-entropy in nats; target -1 is left out.

        Where a loss has more than WHOLE_LOGITS logits, they are never there as a whole, and come back empty.
        """
        x = self.hidden(idx, cache, positions)
        if targets is not None and targets.numel() * self.config.vocab_size > WHOLE_LOGITS:
            return x.new_empty(0), self.loss_in_parts(x.flatten(0, 1), targets.flatten())
        logits = self.lm_head(x)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.view(-1), ignore_index=-1)
        return logits, loss

    def loss_in_parts(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of hidden states (N, C) for targets (N), in autocast's precision where it is on."""
        device, w = x.device.type, self.lm_head.weight
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else w.dtype
        with torch.autocast(device, enabled=False):
            loss: Tensor = LossInParts.apply(x, w, targets, dtype, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
        return loss

    @torch.inference_mode()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        eot: int | None = None,
    ) -> Tensor:
        """Continue token ids (1, T) one at a time, without a cache; return (1, T + new).

        Temperature 0 is greedy. Ends after `max_new_tokens`, at the end of the context, or after the token `eot`.
        """
        self.eval()
        for _ in range(min(max_new_tokens, self.config.block_size - idx.size(1))):
            logits = self(idx)[0][:, -1].float()  # (1, V)
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k is not None and top_k < logits.size(-1):
                    kth = logits.topk(top_k).values[:, [-1]]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            idx = torch.cat((idx, token), dim=1)
            if eot is not None and token.item() == eot:
                break
        return idx
