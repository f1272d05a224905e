"""Choose the next token of every row of logits at once.

For a row, in this order: logit_bias, repetition, presence and frequency penalties, no end before
min_tokens, temperature, top_k, top_p, min_p, then the inverse of the cumulative distribution at one
number from the sequence's own generator. Whatever else is in the batch, a row's choice is the same.
Tokens that tie with the k-th stay, as in `GPT.generate`; elsewhere equals are ordered by id. The distribution
is laid out by falling probability where there is top_k, else by id.

A row has 50 000 logits, so passes over it are what costs. One pass takes the greatest logit of each
group of 64 neighbours; whatever needs the largest logits then looks into few groups. A runner that draws
itself (native/draw.h) needs 0.2 to 0.4 ms for 16 rows instead of 1.6 to 20.

Letters: n rows, V vocabulary, G groups, w candidates.
"""

import math
from array import array
from itertools import islice

import torch
from torch import Tensor

from inference.penalties import Penalties
from inference.runner import UNSETTLED, UNSOUND, Draw, Knobs, Logprobs
from inference.sequence import SamplingParams, Sequence, Token

GROUP = 64


def sample(
    logits: Tensor,
    sequences: list[Sequence],
    greatest: list[int] | None = None,
    draw: Draw | None = None,
    logprobs: Logprobs | None = None,
) -> list[Token | None]:
    """Return one token per row of float32 logits (n, V); None where a row has no finite greatest logit.

    Log-probabilities are those of the raw logits, before penalties and temperature. `greatest` says where each row's
    greatest logit is, if a runner knows; at V or above it is no token, or no finite number. Plain greedy rows then
    need no pass, nor do others if there is `draw`, by which a runner draws them, nor log-probabilities with `logprobs`.
    """
    found, V = {} if greatest is None else _known(logits, sequences, greatest), logits.size(-1)
    if greatest is not None and draw is not None:
        some = [i for i, place in enumerate(greatest) if place < V and i not in found]
        if some:
            found |= zip(some, _drawn(logits, some, [sequences[i] for i in some], draw), strict=True)
    rows = sorted(found)
    tops = [sequences[i].params.logprobs for i in rows]
    tokens = dict(zip(rows, _named(logits, rows, [found[i] for i in rows], tops, logprobs), strict=True))
    rest = [i for i in range(len(sequences)) if i not in found]
    if rest:
        part = logits if len(rest) == len(sequences) else logits[rest]
        tokens |= zip(rest, _sample(part, [sequences[i] for i in rest]), strict=True)
    return [tokens[i] for i in range(len(sequences))]


def penalize(logits: Tensor, penalties: list[Penalties | None]) -> Tensor:
    """Return logits (n, V) with what changes each row; the same tensor when nothing does."""
    # arrays, because a tensor of a list is made number by number
    rows, ids, values = array("q"), array("q"), array("f")
    for row, p in enumerate(penalties):
        if p is not None:
            rows += array("q", [row]) * len(p.ids)
            ids += p.ids
            values += p.values
    if not rows:
        return logits
    places = tuple(torch.frombuffer(x, dtype=torch.long).to(logits.device) for x in (rows, ids))
    bias, repetition, cut = torch.frombuffer(values, dtype=torch.float32).to(logits.device).view(-1, 3).unbind(1)
    z = logits[places] + bias
    z = torch.where(z > 0, z / repetition, z * repetition) - cut
    logits = logits.clone()
    logits[places] = z.masked_fill(cut == math.inf, -math.inf)  # whatever was there
    return logits


def _known(logits: Tensor, sequences: list[Sequence], greatest: list[int]) -> dict[int, int]:
    """Return the token ids, by row, of the rows whose choice is their greatest logit."""
    V = logits.size(-1)
    return {i: greatest[i] for i, s in enumerate(sequences) if s.takes_greatest and greatest[i] < V}


def _drawn(logits: Tensor, rows: list[int], sequences: list[Sequence], draw: Draw) -> list[int]:
    """Return the token ids that the runner draws from rows of logits, one for each sequence; UNSOUND where none is."""
    V = logits.size(-1)
    knobs, penalties = [_knobs(s, V) for s in sequences], [s.penalties for s in sequences]
    ids = draw(logits, rows, knobs, penalties)
    kinds = {i: _kind(sequences[i].params, V) for i, token_id in enumerate(ids) if token_id == UNSETTLED}
    for kind in set(kinds.values()):
        left = [i for i in kinds if kinds[i] == kind]
        part = penalize(logits[[rows[i] for i in left]], [penalties[i] for i in left])
        peaks = _peaks(part)
        settled = _draw(kind, part, peaks, peaks.amax(-1), [knobs[i] for i in left]).tolist()
        ids = [settled[left.index(i)] if i in left else token_id for i, token_id in enumerate(ids)]
    return ids


def _named(
    logits: Tensor, rows: list[int], ids: list[int], tops: list[int | None], logprobs: Logprobs | None
) -> list[Token | None]:
    """Return the tokens of ids chosen in rising rows of logits, None for UNSOUND; tops as in `_tokens`."""
    if not rows:
        return []
    if logprobs is None:
        part, chosen = logits if len(rows) == len(logits) else logits[rows], torch.tensor(ids, dtype=torch.long)
        return _tokens(part, chosen.clamp(min=0).to(logits.device), chosen != UNSOUND, tops)
    asked = {i: min(top, logits.size(-1)) for i, top in enumerate(tops) if top is not None and ids[i] != UNSOUND}
    places, chosen_ids, most = [rows[i] for i in asked], [ids[i] for i in asked], list(asked.values())
    scored = dict(zip(asked, logprobs(logits, places, chosen_ids, most), strict=True)) if asked else {}
    return [None if ids[i] == UNSOUND else Token(ids[i], *scored.get(i, ())) for i in range(len(ids))]


def _sample(logits: Tensor, sequences: list[Sequence]) -> list[Token | None]:
    """Choose by passes over the logits. Greedy and plain rows wait for the device once, when all is chosen."""
    adjusted = penalize(logits, [s.penalties for s in sequences])
    peaks = _peaks(adjusted)
    best = peaks.amax(-1)  # NaN and +inf come out as the greatest
    sound = best.isfinite()
    knobs = [_knobs(s, logits.size(-1)) for s in sequences]
    kinds: dict[str, list[int]] = {}
    for i, s in enumerate(sequences):
        kinds.setdefault(_kind(s.params, logits.size(-1)), []).append(i)
    if not kinds.keys() <= {"greedy", "plain"}:  # candidates are looked for among numbers alone
        whole = sound.tolist()
        kinds = {kind: [i for i in rows if whole[i]] for kind, rows in kinds.items()}
    ids = torch.zeros(len(sequences), dtype=torch.long, device=logits.device)
    for kind, rows in kinds.items():
        if len(rows) == len(sequences):
            ids = _draw(kind, adjusted, peaks, best, knobs)
        elif rows:
            ids[rows] = _draw(kind, adjusted[rows], peaks[rows], best[rows], [knobs[i] for i in rows])
    ids = ids.clamp(max=logits.size(-1) - 1)  # of what is no number any id may come
    return _tokens(logits, ids, sound, [s.params.logprobs for s in sequences])


def score(logits: Tensor, next_ids: list[int], top: int | None, logprobs: Logprobs | None = None) -> list[Token]:
    """Return the given next tokens of rows of logits (n, V) with their log-probabilities, for prompts."""
    rows = list(range(len(next_ids)))
    tokens = _named(logits, rows, next_ids, [top or 0] * len(rows), logprobs)
    return [token for token in tokens if token is not None]


def _tokens(logits: Tensor, ids: Tensor, sound: Tensor, tops: list[int | None]) -> list[Token | None]:
    """Return the tokens of ids (n,), None where they are not sound (n,); the device is read once, for logprobs twice.

    tops[i] is how many of the most probable tokens go with row i's log-probability; None asks for neither.
    """
    wanted: dict[int, list[int]] = {}
    for i, top in enumerate(tops):
        if top is not None:
            wanted.setdefault(min(top, logits.size(-1)), []).append(i)
    whole, real = [ids, sound.long()], []
    for top, rows in wanted.items():
        every = len(rows) == len(tops)
        logprobs = (logits if every else logits[rows]).log_softmax(-1)
        best = logprobs.topk(top)
        whole.append(best.indices.flatten())
        chosen = logprobs.gather(1, (ids if every else ids[rows])[:, None])
        real.append(torch.cat((chosen, best.values), dim=1).flatten())
    numbers, logs = iter(torch.cat(whole).tolist()), iter(torch.cat(real).tolist() if real else ())
    found, fine = [Token(token_id) for token_id in islice(numbers, len(tops))], list(islice(numbers, len(tops)))
    for top, rows in wanted.items():
        for i in rows:
            logprob = next(logs)
            found[i] = Token(
                found[i].token_id, logprob, tuple(zip(islice(numbers, top), islice(logs, top), strict=True))
            )
    return [token if good else None for token, good in zip(found, fine, strict=True)]


def _kind(p: SamplingParams, V: int) -> str:
    """Say by which way a row's token is found."""
    if p.greedy:
        return "greedy"
    if 0 < p.top_k < V:
        return "top_k" if p.top_k <= V // GROUP // 4 else "sorted"
    return "plain" if p.top_p == 1.0 and p.min_p == 0.0 else "tail"


def _draw(kind: str, logits: Tensor, peaks: Tensor, best: Tensor, rows: list[Knobs]) -> Tensor:
    """Return token ids (n,) for rows of one kind."""
    if kind == "greedy":
        groups = peaks.argmax(-1)
        return groups * GROUP + _open(logits, torch.arange(len(logits), device=logits.device), groups).argmax(-1)
    knobs = torch.tensor(rows, dtype=torch.float64, device=logits.device)  # double: sums keep their last digits
    if kind == "plain":
        return _draw_weights(_weights(logits, best, knobs), knobs)
    if kind == "tail":
        return _draw_tail(logits, peaks, best, knobs)
    values, ids = _candidates(logits, peaks, knobs[:, 4].long()) if kind == "top_k" else _sorted(logits)
    weights = _falling(values, knobs)[0]
    return ids.gather(1, _invert(weights, knobs[:, :1])[:, None])[:, 0]


def _knobs(s: Sequence, V: int) -> Knobs:
    """Return the next random number of a sequence, and how it draws; a top_k of 0 is off, 1 takes the greatest."""
    p = s.params
    if p.greedy:
        return 0.0, 1.0, 1.0, 0.0, 1
    return s.generator.random(), p.temperature, p.top_p, p.min_p, p.top_k if p.top_k < V else 0


def _peaks(logits: Tensor) -> Tensor:
    """Return the greatest logit of each group (n, G); the last group may be shorter."""
    n, V = logits.shape
    even = V - V % GROUP
    peaks = logits[:, :even].reshape(n, even // GROUP, GROUP).amax(-1)
    return peaks if even == V else torch.cat((peaks, logits[:, even:].amax(-1, keepdim=True)), dim=1)


def _open(logits: Tensor, rows: Tensor, groups: Tensor) -> Tensor:
    """Return the logits (m, GROUP) of groups (m,) of rows (m,); -inf stands for ids past the vocabulary."""
    n, V = logits.shape
    whole = V // GROUP
    rest = torch.nn.functional.pad(logits[:, whole * GROUP :], (0, -V % GROUP), value=-math.inf)
    if whole == 0:
        return rest[rows]
    values = logits[:, : whole * GROUP].reshape(n, whole, GROUP)[rows, groups.clamp(max=whole - 1)]
    return values if V % GROUP == 0 else torch.where((groups == whole)[:, None], rest[rows], values)


def _sorted(logits: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = logits.sort(stable=True, dim=-1, descending=True)
    return values, ids


def _candidates(logits: Tensor, peaks: Tensor, ks: Tensor) -> tuple[Tensor, Tensor]:
    """Return values and ids (n, w) of each row's ks[i] greatest logits and a few more, sorted; -inf fills up.

    At least k logits reach the k-th greatest peak, and all that do are in groups whose peak does.
    """
    threshold = peaks.topk(int(ks.max()), dim=1).values.gather(1, ks[:, None] - 1)
    rows, groups = (peaks >= threshold).nonzero(as_tuple=True)
    values = _open(logits, rows, groups)
    some, places = (values >= threshold[rows]).nonzero(as_tuple=True)
    return _align(len(logits), rows[some], groups[some] * GROUP + places, values[some, places])


def _align(n: int, rows: Tensor, ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return entries (m,), whose rows and ids rise, as falling values and their ids (n, w); -inf fills up."""
    counts = rows.bincount(minlength=n)
    columns = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    dense = values.new_full((n, int(counts.max())), -math.inf)
    dense[rows, columns] = values
    tokens = torch.zeros_like(dense, dtype=torch.long)
    tokens[rows, columns] = ids
    dense, order = dense.sort(stable=True, dim=-1, descending=True)
    return dense, tokens.gather(1, order)


def _falling(values: Tensor, knobs: Tensor, total: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the weights (n, w) of falling values, 0 where they are cut, and in which rows (n,) something was cut.

    `total` (n, 1) is the mass of the row where the candidates are not all of it.
    """
    _, temperature, top_p, min_p, top_k = knobs[:, :, None].unbind(1)
    weights = ((values - values[:, :1]).double() / temperature).exp()  # the first is 1
    if total is None:
        kth = values.gather(1, top_k.long().clamp(max=values.size(1)) - 1)
        weights = weights.masked_fill(values < kth, 0.0)
    sums = weights.cumsum(-1)  # one after the other: what fills up changes no digit
    before = sums - weights  # mass of the more probable ones
    total = sums[:, -1:] if total is None else total
    gone = ((before >= top_p * total) & (top_p < 1.0)) | (weights < min_p)
    gone &= values > -math.inf  # not what fills up
    gone[:, 0] = False  # the most probable token always stays
    return weights.masked_fill(gone, 0.0), gone.any(-1)


def _draw_tail(logits: Tensor, peaks: Tensor, best: Tensor, knobs: Tensor) -> Tensor:
    """Choose where top_p or min_p cut the tail without top_k: mostly among few candidates, else from the whole row."""
    weights = _weights(logits, best, knobs)
    total = weights.sum(-1).double().sum(-1, keepdim=True)
    few = torch.full((len(logits),), max(1, peaks.size(1) // 4), device=logits.device)
    values, ids = _candidates(logits, peaks, few)
    some, settled = _falling(values, knobs, total)
    ids, order = ids.sort(dim=-1)
    chosen = ids.gather(1, _invert(some.gather(1, order), knobs[:, :1])[:, None])[:, 0]
    left = (~settled).nonzero()[:, 0]  # nothing was cut, so that others may have a chance
    if len(left) > 0:
        chosen[left] = _draw_weights(_cut(weights[left], knobs[left], total[left]), knobs[left])
    return chosen


def _cut(weights: Tensor, knobs: Tensor, total: Tensor) -> Tensor:
    """Return weights (n, G, GROUP) with top_p's and min_p's tail at 0.

    Sorting a row takes 4 ms; so the masses of bins are added up, 64 bins for each power of two, and only
    the bin in which top_p is reached is sorted. The bits of weights between 0 and 1 are in their order.
    """
    n, flat = len(weights), weights.flatten(1)
    top_p, min_p = knobs[:, 2:3], knobs[:, 3:4]
    goal = torch.where(top_p < 1.0, (top_p * total).clamp(min=1e-9), math.inf)  # the greatest always stays
    bins, count = flat.view(torch.int32) >> 17, (0x3F800000 >> 17) + 1  # the bits of 1.0
    numbers = bins + torch.arange(n, dtype=torch.int32, device=flat.device)[:, None] * count
    mass = torch.bincount(numbers.flatten(), flat.flatten().double(), n * count).view(n, count)
    above = mass.flip(-1).cumsum(-1).flip(-1)  # of a bin and all higher ones
    last = (above >= goal).sum(-1, keepdim=True) - 1  # the bin in which the goal is reached; -1: in none
    border = last.to(bins.dtype)
    rows, ids = (bins == border).nonzero(as_tuple=True)
    kept = flat.masked_fill((bins < border) | (flat < min_p.to(flat.dtype)), 0.0)
    if len(rows) > 0:
        values, ids = _align(n, rows, ids, flat[rows, ids])
        inside = values.clamp(min=0.0).double()
        before = inside.cumsum(-1) - inside + above.gather(1, last.clamp(min=0)) - inside.sum(-1, keepdim=True)
        rows, columns = ((before >= goal) & (values > -math.inf)).nonzero(as_tuple=True)
        kept[rows, ids[rows, columns]] = 0.0
    return kept.view_as(weights)


def _draw_weights(weights: Tensor, knobs: Tensor) -> Tensor:
    """Choose by all weights (n, G, GROUP) of the rows: first the group, then the token in it."""
    u = knobs[:, :1]
    masses = weights.sum(-1).double()
    cumulative = masses.cumsum(-1)
    target = u * cumulative[:, -1:]
    group = _place(cumulative, target)
    before = cumulative.gather(1, group) - masses.gather(1, group)
    inside = weights[torch.arange(len(weights), device=u.device), group[:, 0]].double().cumsum(-1)
    return (group * GROUP + _place(inside, target - before))[:, 0]


def _weights(logits: Tensor, best: Tensor, knobs: Tensor) -> Tensor:
    """Return exp of logits over temperature (n, G, GROUP), the greatest being 1; 0 past the vocabulary."""
    n, V = logits.shape
    weights = logits.new_zeros(n, -(-V // GROUP) * GROUP)
    torch.sub(logits, best[:, None], out=weights[:, :V])
    weights[:, :V].div_(knobs[:, 1:2].to(logits.dtype)).exp_()
    return weights.view(n, -1, GROUP)


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """Return (n,) the column where the cumulative weights (n, w) pass the part u (n, 1) of their sum."""
    cumulative = weights.cumsum(-1)
    return _place(cumulative, u * cumulative[:, -1:])[:, 0]


def _place(cumulative: Tensor, target: Tensor) -> Tensor:
    """Return (n, 1) the first column that passes the target (n, 1); rounding never takes it past the last weight,

    and what is no number finds some column.
    """
    total = cumulative[:, -1:]
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target.contiguous(), right=True).clamp(max=cumulative.size(-1) - 1)
