"""One loaded model at work: its runner, its scheduler, and the step that turns rows into tokens.

Owned by the engine's thread. A lane that a newer model has replaced is retired: it runs what it has
accepted to the end and is then closed. `finish` is the one way out for every sequence.
"""

import ctypes
import logging
import math
import sys
import time
from collections.abc import Callable
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

from inference.admission import Admission
from inference.backend import ServedModel
from inference.lookahead import Lookahead, look_ahead
from inference.sampling import sample, score
from inference.scheduler import Scheduler, Share, Step
from inference.sequence import Failure, Finished, FinishReason, Sequence, Token
from inference.slots import Slots, whole_blocks
from inference.speculation import most_drafting

if TYPE_CHECKING:
    from inference.runner import ModelRunner

logger = logging.getLogger(__name__)


NO_FIGURES = dict.fromkeys(("cache_tokens", "cache_kept", "cache_capacity", "cache_bytes", "cache_saved"), 0)
NO_FIGURES |= {"drafted_tokens": 0, "accepted_tokens": 0}


class Lane:
    """Run the sequences of one model. `cache_memory` is the most bytes of keys and values; None: of full slots.

    `speculation` lets greedy sequences draft tokens where the runner's rows are independent.
    `beat` is called before each computation: one that failed is repeated share by share, which is slow and no stall.
    `undisturbed` says whether nothing has come in that the next step should wait for: then the runner begins it while
    the tokens of the one before are handed out.
    """

    def __init__(
        self,
        served: ServedModel,
        runner: "ModelRunner",
        admission: Admission,
        prefill_tokens: int,
        cache_memory: int | None = None,
        speculation: bool = False,
        beat: Callable[[], None] = lambda: None,
        undisturbed: Callable[[], bool] = lambda: True,
    ):
        self.served, self.runner, self.admission = served, runner, admission
        self._beat, self._undisturbed = beat, undisturbed
        self._begun: Step | None = None  # what the runner may be computing
        self._begun_at = 0.0
        self._known_at = 0.0  # when the tokens of the last step were known
        self._foreseen = False  # it has begun the next step before that was made
        positions = runner.slots * whole_blocks(runner.block_size)
        if cache_memory is not None:
            positions = min(positions, cache_memory // runner.position_bytes)
        self.slots = Slots(runner.slots, positions, runner.copy, runner.release)
        drafting = most_drafting(served.parameters) if speculation and runner.independent else 0
        self.scheduler = Scheduler(self.slots, prefill_tokens, drafting)
        self.vocab_size = min(served.vocab_size, served.tokenizer.n_vocab)  # ids above are padding: no text
        self.retired = False  # a newer model serves; this one ends what it has

    @property
    def busy(self) -> bool:
        """Say whether there is anything to compute."""
        return self.scheduler.busy

    @property
    def begun(self) -> bool:
        """Say whether the next step is under way."""
        return self._begun is not None

    def add(self, sequence: Sequence) -> None:
        """Take a sequence in; one that wants nothing ends at once."""
        self.scheduler.add(sequence)
        if sequence.output_limit == 0 and not sequence.params.prompt_logprobs:
            self.finish(sequence, FinishReason.LENGTH)

    def sweep(self) -> None:
        """End what was cancelled or took too long, waiting or running."""
        now = time.monotonic()
        for sequence in [*self.scheduler.waiting, *self.scheduler.running]:
            if sequence.cancelled:
                self.finish(sequence, FinishReason.CANCELLED)
            elif sequence.deadline is not None and now > sequence.deadline:
                self.finish(sequence, FinishReason.ERROR, Failure.OUT_OF_TIME)

    def step(self) -> int:
        """Compute one step and emit its tokens; return how many. A failure ends the sequence at fault, no other."""
        for sequence in self.scheduler.admit(time.monotonic()):
            self.admission.started(sequence)
        begun, self._begun = self._begun, None
        step = self.scheduler.next_step() if begun is None or begun.over else begun
        tokens = 0 if step is None else self._generate(step, self._begun_at if step is begun else time.monotonic())
        embedding = self.scheduler.next_embedding(decoding=step is not None and step.decoding > 0)
        if embedding is not None:
            self._embed(embedding)
            self._known_at = time.monotonic()  # what it has lasted is no part of the next step
        return tokens

    def _generate(self, step: Step, started: float) -> int:
        try:
            chosen = self._compute(step)
        except Exception:
            logger.exception("a step of %d sequences failed; each is tried alone", len(step.shares))
            return sum(self._step_alone(share) for share in step.shares if not share.over)
        since, self._known_at = self._known_at if step.decoding else started, time.monotonic()
        if not step.drafts:  # with drafts it lasts longer, for more tokens
            self.scheduler.budget.observe(step.decoding, step.prefilled, self._known_at - since)
        for share, tokens in zip(step.shares, chosen, strict=True):
            if share.draft and not share.over:
                self.scheduler.speculation.learn(share.sequence, len(share.draft), len(tokens) - 1)
        self._hand_out(list(zip(step.shares, chosen, strict=True)))
        return sum(map(len, chosen))

    def _hand_out(self, chosen: list[tuple[Share, list[Token | None]]]) -> None:
        """Emit the tokens that shares have chosen, with the next step begun as soon as they are noted."""
        going_on = [(share.sequence, self._note(share, tokens)) for share, tokens in chosen if not share.over]
        self._begin_next()
        for sequence, tokens in going_on:
            for token in tokens:
                sequence.events.put(token)

    def _may_begin(self) -> bool:
        """Say whether the next step may be begun before its turn: nobody is about to enter, who would wait for it."""
        enters = (self.scheduler.waiting and not self.slots.full) or any(s.embeds for s in self.scheduler.running)
        return not enters and self._undisturbed()

    def _look_ahead(self, step: Step) -> Lookahead | None:
        """Return what follows a step, if the runner can begin it, and tell the runner, which may do so by itself."""
        if self.runner.begin is None:
            return None
        following = look_ahead(step, len(self.scheduler.running))
        if following is not None and self.runner.follow is not None and self._may_begin():
            self.runner.follow(following.after, following.slots, following.positions, self.vocab_size)
        return following

    def _begin_foreseen(self, following: Lookahead | None, greatest: list[int] | None) -> bool:
        """Let the runner begin the step that follows, if it is certain now; say whether it did."""
        begin = self.runner.begin
        if following is None or greatest is None or begin is None or not self._may_begin():
            return False
        tokens = following.tokens(greatest, self.vocab_size)
        if tokens is None:
            return False
        self._begun_at = time.monotonic()
        begin(tokens, following.slots, following.positions, following.want, self.runner.greatest is not None)
        return True

    def _begin_next(self) -> None:
        """Make the next step, and let the runner begin it unless it has foreseen it."""
        begin = self.runner.begin
        if self._foreseen:
            self._begun = self.scheduler.next_step()
        elif begin is not None and self._may_begin():
            self._begun, self._begun_at = self.scheduler.next_step(), time.monotonic()
            if self._begun is not None:
                begin(*self._begun.rows, self.runner.greatest is not None and self._begun.plain)

    def _step_alone(self, share: Share) -> int:
        """Compute one share of a step that failed, without its draft; return how many tokens came of it.

        One that fails again ends its sequence.
        """
        sequence, step = share.sequence, Step()
        sequence.rewind()
        if sequence.slot is None:
            raise AssertionError(f"{sequence.id} runs without a slot")
        step.add(sequence, sequence.slot, share.count - len(share.draft))
        try:
            (tokens,) = self._compute(step)
        except Exception as error:
            logger.error("%s failed alone, too: %s", sequence.id, type(error).__name__)
            self.finish(sequence, FinishReason.ERROR, Failure.STEP)
            return 0
        for token in self._note(share, tokens):  # others may still be to compute: nothing is begun
            sequence.events.put(token)
        return len(tokens)

    def _compute(self, step: Step) -> list[list[Token | None]]:
        """Return the tokens that each share has chosen: none of a prompt's beginning, several with a good draft.

        The last one is None where its logits are unsound. What fails leaves the sequences as they were, but for their
        generators.
        """
        self._beat()
        following = self._look_ahead(step)
        best, logits = self._look(step)
        self._foreseen = self._begin_foreseen(following, best)
        row = 0
        last: list[int] = []  # the rows to choose tokens from
        choosing: list[Sequence] = []
        scored: list[tuple[Sequence, list[Token]]] = []
        for share in step.shares:
            sequence = share.sequence
            if share.scores and logits is not None:
                scored_ids = sequence.prompt_ids[sequence.computed + 1 :][: share.scores]
                asked, top = logits[row : row + share.scores], sequence.params.logprobs
                scores = score(asked, scored_ids, top, self.runner.logprobs)
                scored.append((sequence, scores))
            row += share.scores + share.samples
            last += range(row - share.samples, row)
            choosing += [sequence] * share.samples
        greatest = None if best is None else [best[row] for row in last]
        tokens: list[Token | None] = []
        if logits is None:
            tokens = [Token(token) for token in greatest or ()]
        elif last:
            rows = logits if len(last) == len(logits) else logits[last]
            tokens = sample(rows, choosing, greatest, self.runner.draw, self.runner.logprobs)
        chosen = iter(tokens)
        step.advance()
        for sequence, scores in scored:
            sequence.prompt_logprobs.extend(scores)
        return [share.accept(list(islice(chosen, share.samples))) for share in step.shares]

    def _look(self, step: Step) -> tuple[list[int] | None, Any]:
        """Compute a step; return where the greatest logits are, if that is known, and the logits, if they matter.

        They do not where all rows are greedy, unless a greatest one's id stands for no text, or is no finite number.
        """
        plain = step.plain
        greatest = self.runner.greatest if plain else None
        logits = None if greatest is not None else self.runner.rows(*step.rows)
        best = self.runner.last_argmax if greatest is None else greatest(*step.rows)
        if best is not None and plain and all(token < self.vocab_size for token in best):
            return best, None
        if logits is None:
            logits, best = self.runner.rows(*step.rows), self.runner.last_argmax
        return best, logits[:, : self.vocab_size]

    def _embed(self, step: Step) -> None:
        """Compute one step of sequences that embed; a failure ends the sequence at fault, no other."""
        self._beat()
        started = time.monotonic()
        try:
            hidden = self.runner.hidden(step.tokens, step.slots, step.positions, step.want)
            ends = list(accumulate(share.count for share in step.shares))
            sums = [
                hidden[end - share.count : end].sum(0).tolist() for share, end in zip(step.shares, ends, strict=True)
            ]
        except Exception as error:
            logger.error("a step of %d embeddings failed: %s", len(step.shares), type(error).__name__)
            self._embed_alone(step)
            return
        self.scheduler.budget.observe(0, len(step.tokens), time.monotonic() - started)
        step.advance()
        for share, values in zip(step.shares, sums, strict=True):
            sequence = share.sequence
            before = sequence.hidden_sum or [0.0] * len(values)
            sequence.hidden_sum = [a + b for a, b in zip(before, values, strict=True)]
            if not all(map(math.isfinite, values)):
                self.finish(sequence, FinishReason.ERROR, Failure.NOT_A_NUMBER)
            elif not sequence.in_prefill:
                self.finish(sequence, FinishReason.LENGTH)

    def _embed_alone(self, failed: Step) -> None:
        """Compute each share of a step that failed by itself; end the sequence of one that has been by itself."""
        for share in failed.shares:
            sequence, alone = share.sequence, Step()
            if len(failed.shares) == 1 or sequence.slot is None:
                self.finish(sequence, FinishReason.ERROR, Failure.STEP)
            else:
                alone.add(sequence, sequence.slot, share.count)
                self._embed(alone)

    def _note(self, share: Share, tokens: list[Token | None]) -> list[Token]:
        """Add a share's tokens to its sequence and return them to be put.

        Where they end it, which only the last one can, they are put and the sequence is ended.
        """
        sequence = share.sequence
        if share.scores and math.isnan(sequence.prompt_logprobs[-1].logprob or 0.0):
            self.finish(sequence, FinishReason.ERROR, Failure.NOT_A_NUMBER)
            return []
        if not share.samples:
            if sequence.output_limit == 0 and not sequence.in_prefill:
                self.finish(sequence, FinishReason.LENGTH)
            return []
        sound = [token for token in tokens if token is not None]
        if sound and sequence.first_token_at is None:
            sequence.first_token_at = time.monotonic()
        sequence.output_ids.extend(token.token_id for token in sound)
        reason, error = None, None
        if len(sound) < len(tokens):
            reason, error = FinishReason.ERROR, Failure.NOT_A_NUMBER
        elif sequence.output_ids[-1] in sequence.stop_ids:
            reason = FinishReason.STOP
        elif len(sequence.output_ids) >= sequence.output_limit:
            reason = FinishReason.LENGTH
        if reason is None:
            return sound
        for token in sound:
            sequence.events.put(token)
        self.finish(sequence, reason, error)
        return []

    def finish(self, sequence: Sequence, reason: FinishReason, error: Failure | None = None) -> None:
        """End a sequence: free its slot, note its figures, put its last event."""
        self.scheduler.remove(sequence, keep=reason is not FinishReason.ERROR)
        sequence.finish_reason, sequence.finished_at = reason, time.monotonic()
        self.admission.ended(sequence)
        sequence.events.put(Finished(reason, error))
        sequence.ended.set()

    def finish_all(self, error: Failure) -> None:
        """End every sequence with an error."""
        for sequence in [*self.scheduler.waiting, *self.scheduler.running]:
            self.finish(sequence, FinishReason.ERROR, error)

    def figures(self) -> dict[str, int]:
        """Return what the cache holds, may hold and has saved, and how drafts have gone; any thread may ask."""
        slots, speculation = self.slots, self.scheduler.speculation
        return {
            "cache_tokens": slots.held,  # reserved for running requests, or kept
            "cache_kept": slots.kept,  # of ended requests, for those that begin alike
            "cache_capacity": slots.positions,
            "cache_bytes": slots.held * self.runner.position_bytes,
            "cache_saved": slots.saved,
            "drafted_tokens": speculation.drafted,
            "accepted_tokens": speculation.accepted,
        }

    def close(self) -> None:
        """Give the model's memory back to the system; nothing here is in a cycle that would need gc."""
        self.runner.close()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
