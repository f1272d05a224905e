"""Choose the next token of every row of logits at once.

For a row, in this order: logit_bias, repetition, presence and frequency penalties, no end before
min_tokens, temperature, top_k, top_p, min_p, then the inverse of the cumulative distribution at one
number from the sequence's own generator. Whatever else is in the batch, a row's choice is the same.

All filters keep the most probable tokens, so they act on candidates sorted by falling logit, equal
logits by rising id. Tokens that tie with the k-th are kept, as `GPT.generate` does.

Letters: n rows, V vocabulary, w candidates.
"""

import math
from collections import Counter

import torch
from torch import Tensor

from inference.sequence import SamplingParams, Sequence, Token


def sample(logits: Tensor, sequences: list[Sequence]) -> list[Token | None]:
    """Return one token per row of float32 logits (n, V); None where a row has no finite greatest logit.

    Log-probabilities are those of the raw logits, before penalties and temperature.
    """
    adjusted = _adjust(logits, sequences)
    best = adjusted.max(-1)  # NaN and +inf come out as the greatest
    sound = best.values.isfinite().tolist()
    ids = best.indices.tolist()
    drawn = [i for i, s in enumerate(sequences) if sound[i] and not s.params.greedy]
    if drawn:
        rows = adjusted if len(drawn) == len(sequences) else adjusted[drawn]
        for i, token_id in zip(drawn, _draw(rows, [sequences[i] for i in drawn]), strict=True):
            ids[i] = token_id
    return [_token(logits[i], ids[i], s.params.logprobs) if sound[i] else None for i, s in enumerate(sequences)]


def score(logits: Tensor, next_ids: list[int], top: int | None) -> list[Token]:
    """Return the given next tokens of rows of logits (n, V) with their log-probabilities, for prompts."""
    return [_token(row, token_id, top or 0) for row, token_id in zip(logits, next_ids, strict=True)]


def _token(row: Tensor, token_id: int, top: int | None) -> Token:
    if top is None:
        return Token(token_id)
    logprobs = row.log_softmax(-1)
    best = logprobs.topk(min(top, len(logprobs)))
    pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Token(token_id, float(logprobs[token_id]), pairs)


def _adjust(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Return the logits with biases, penalties and masks; the same tensor when no row has any."""
    rows = [i for i, s in enumerate(sequences) if _adjusts(s)]
    if not rows:
        return logits
    logits = logits.clone()
    for i in rows:
        _adjust_row(logits[i], sequences[i])
    return logits


def _adjusts(sequence: Sequence) -> bool:
    p = sequence.params
    penalties = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
    return penalties or bool(p.logit_bias) or len(sequence.output_ids) < p.min_tokens


def _adjust_row(row: Tensor, sequence: Sequence) -> None:
    """Change one row (V,) in place."""
    p = sequence.params
    for token_id, bias in p.logit_bias:
        row[token_id] += bias
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*sequence.prompt_ids, *sequence.output_ids}), device=row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if sequence.output_ids and (p.presence_penalty != 0.0 or p.frequency_penalty != 0.0):
        counts = Counter(sequence.output_ids)
        times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        row[torch.tensor(list(counts), device=row.device)] -= p.presence_penalty + p.frequency_penalty * times
    if len(sequence.output_ids) < p.min_tokens and sequence.stop_ids:
        row[torch.tensor(sorted(sequence.stop_ids), device=row.device)] = -math.inf


def _draw(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """Return a token id for each row (n, V), drawn with the sequence's own generator."""
    V = logits.size(-1)
    kinds: dict[str, list[int]] = {"top_k": [], "sorted": [], "plain": []}
    for i, s in enumerate(sequences):
        kinds[_kind(s.params, V)].append(i)
    ids = [0] * len(sequences)
    for kind, rows in kinds.items():
        if rows:
            part = logits if len(rows) == len(sequences) else logits[rows]
            for i, token_id in zip(rows, _draw_kind(kind, part, [sequences[i] for i in rows]), strict=True):
                ids[i] = token_id
    return ids


def _kind(p: SamplingParams, V: int) -> str:
    if 0 < p.top_k <= V // 16:
        return "top_k"  # few candidates are worth finding before they are sorted
    return "sorted" if 0 < p.top_k < V or p.top_p < 1.0 or p.min_p > 0.0 else "plain"


def _draw_kind(kind: str, logits: Tensor, sequences: list[Sequence]) -> list[int]:
    params = [s.params for s in sequences]

    def column(values: list[float]) -> Tensor:  # float64: sums over the vocabulary keep their last digits
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    u = column([s.generator.random() for s in sequences])
    temperature = column([p.temperature for p in params])
    if kind == "plain":
        weights = ((logits - logits.amax(-1, keepdim=True)).double() / temperature).exp()
        return _invert(weights, u).tolist()
    ks = torch.tensor([p.top_k or logits.size(-1) for p in params], device=logits.device)
    values, ids = _candidates(logits, ks) if kind == "top_k" else logits.sort(stable=True, dim=-1, descending=True)
    weights = ((values - values[:, :1]).double() / temperature).exp()
    kth = values.gather(1, ks.clamp(max=values.size(1))[:, None] - 1)
    weights.masked_fill_(values < kth, 0.0)
    weights = _cut(weights, column([p.top_p for p in params]), column([p.min_p for p in params]))
    return ids.gather(1, _invert(weights, u)[:, None])[:, 0].tolist()


def _candidates(logits: Tensor, ks: Tensor) -> tuple[Tensor, Tensor]:
    """Return values and ids (n, w) of each row's ks[i] greatest logits and a few more, sorted; -inf fills up.

    The k-th greatest of the peaks of groups of logits is reached by at least k logits: a threshold that
    costs one pass over the row, where a heap (`topk`) costs several.
    """
    n, V = logits.shape
    groups = min(V, max(512, 4 * int(ks.max())))
    size = V // groups
    peaks = logits[:, : groups * size].reshape(n, groups, size).amax(-1)
    threshold = peaks.topk(int(ks.max()), dim=1).values.gather(1, ks[:, None] - 1)
    chosen = logits >= threshold
    rows, ids = chosen.nonzero(as_tuple=True)
    counts = chosen.sum(-1)
    columns = torch.arange(len(rows), device=logits.device) - (counts.cumsum(0) - counts)[rows]
    values = logits.new_full((n, int(counts.max())), -math.inf)
    values[rows, columns] = logits[rows, ids]
    tokens = torch.zeros_like(values, dtype=torch.long)
    tokens[rows, columns] = ids
    values, order = values.sort(stable=True, dim=-1, descending=True)
    return values, tokens.gather(1, order)


def _cut(weights: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Return falling weights (n, w), the first of them 1, with top_p's and min_p's tail at 0."""
    total = weights.sum(-1, keepdim=True)
    before = weights.cumsum(-1) - weights  # mass of the more probable ones
    gone = (before >= top_p * total) & (top_p < 1.0)
    gone |= weights < min_p
    gone[:, 0] = False  # the most probable token always stays
    return weights.masked_fill(gone, 0.0)


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """Return (n,) the column where the cumulative weights (n, w) pass the part u (n, 1) of their sum."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))  # never past the last weight
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
