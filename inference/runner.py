"""The interface between the engine and a model: ragged rows in, logits out.

A step is a list of rows. A row is one token at one position of the sequence in one slot. Prefill,
decode and any mix of the two are the same call, so that the engine needs no case for either.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from inference.penalties import Penalties

if TYPE_CHECKING:
    from torch import Tensor


Greatest = Callable[[Sequence[int], Sequence[int], Sequence[int], Sequence[int]], list[int]]  # see ModelRunner.greatest
Begin = Callable[[Sequence[int], Sequence[int], Sequence[int], Sequence[int], bool], None]  # see ModelRunner.begin
Follow = Callable[[Sequence[int], Sequence[int], Sequence[int], int], bool]  # see ModelRunner.follow
Knobs = tuple[float, float, float, float, float]  # a random number from 0 to 1, temperature, top_p, min_p, top_k
UNSETTLED, UNSOUND = -1, -2  # instead of a token
Scored = tuple[float, tuple[tuple[int, float], ...]]  # a token's log-probability; the most probable ones and theirs
# see ModelRunner.draw and .logprobs
Draw = Callable[["Tensor", Sequence[int], Sequence[Knobs], Sequence[Penalties | None]], list[int]]
Logprobs = Callable[["Tensor", Sequence[int], Sequence[int], Sequence[int]], list[Scored]]


class ModelRunner(Protocol):
    """Own one model's weights and KV cache. Only the engine's thread calls it."""

    name: str  # "torch", "native"
    device: str  # "cpu", "cuda"
    dtype: str  # "fp32", "bf16", "int8"
    arithmetic: str  # six characters that differ where the same weights may give other bits: library, device
    slots: int  # rows of the KV cache: the most sequences that can run at once
    block_size: int  # the longest sequence, in tokens
    vocab_size: int
    own_threads: bool  # it computes in threads of its own; torch's would only wait for each other
    position_bytes: int  # of the keys and values of one position
    independent: (
        bool  # a row's logits are the same bits in any step, so that the engine may draft tokens and check them
    )
    # where the greatest logit of each row of the last result is, if that is known; vocab_size: it is no finite number
    last_argmax: list[int] | None

    def rows(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[int]
    ) -> "Tensor":
        """Compute one step and return float32 logits (len(want), vocab_size) of the rows whose indices are in `want`.

        Row i stores the keys and values of tokens[i] at positions[i] of slots[i], and attends to positions
        0 to positions[i] of that slot. Rows of one slot are neighbours, with positions rising by one; positions
        below the first must have been computed in earlier calls, or copied; what a slot held from there on is
        forgotten, so that a slot is reused by starting at 0 or after a prefix that stays.
        The result may live on the runner's device and is valid until the next call.
        """
        ...

    @property
    def greatest(self) -> Greatest | None:
        """Compute one step as `rows` does, but say only where the greatest logit of each wanted row is.

        It gives what `last_argmax` would be, sooner. None: that takes as long as `rows`.
        """
        ...

    @property
    def begin(self) -> Begin | None:
        """Begin what `rows`, or with True `greatest`, would compute and return at once; None: the runner cannot.

        The next call of it, if it has the same arguments, waits for it and returns the result; one with others
        forgets it. Raises ValueError as `rows` does. The result of the call before is no longer valid.
        """
        ...

    @property
    def follow(self) -> Follow | None:
        """Say what will follow the step that was begun, but for its tokens; None: the runner cannot begin it by itself.

        Row i's token will be where the greatest logit of row after[i] of the begun step's results is; slots and
        positions are given, and all rows are wanted. If all tokens are below the number given last, the step begins as
        soon as they are known. The next `begin`, if it is of just that, finds it so; what is anything else forgets it.
        Returns whether it may come so: then the logits of the begun step are not valid, only where the greatest are.
        """
        ...

    def hidden(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[int]
    ) -> "Tensor":
        """Compute one step as `rows` does, but return what the head reads of each wanted row: its final hidden state.

        Float32 (len(want), n_embd), after the last layer norm, as `GPT.hidden` gives it.
        """
        ...

    @property
    def draw(self) -> Draw | None:
        """Draw a token from each of the given rows of logits (n, w) by its knobs; None: it cannot, sampling.py has to.

        A row's penalties come first; the logits are as before when it returns. Gives UNSETTLED where so many logits tie
        with the k-th that sampling.py has to, and UNSOUND where the greatest is no finite number. Raises ValueError for
        rows or penalised ids out of bounds, and for penalties where a row comes twice.
        """
        ...

    @property
    def logprobs(self) -> Logprobs | None:
        """Give for each of the given rows of logits (n, w) the log-probability of ids[i], and the tops[i] greatest.

        These fall, equals by id; all are NaN where a logit is. None: it cannot, sampling.py has to. Raises ValueError
        for rows, ids or tops out of bounds.
        """
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first `length` positions of slot `target` those of slot `source`; what `target` held is forgotten.

        Raises ValueError for a slot or length out of bounds.
        """
        ...

    def release(self, slot: int) -> None:
        """Forget what a slot holds, and give its memory back where the device can.

        Raises ValueError for a slot out of bounds.
        """
        ...

    def close(self) -> None:
        """Give back weights and cache."""
        ...


def check_slot(runner: ModelRunner, slot: int) -> None:
    """Raise ValueError unless the slot exists."""
    if not 0 <= slot < runner.slots:
        raise ValueError(f"slot is {slot}; it must be 0 to {runner.slots - 1}")


def check_copy(runner: ModelRunner, source: int, target: int, length: int) -> None:
    """Raise ValueError unless both slots exist and `length` positions fit."""
    for name, value, most in (
        ("source", source, runner.slots - 1),
        ("target", target, runner.slots - 1),
        ("length", length, runner.block_size),
    ):
        if not 0 <= value <= most:
            raise ValueError(f"{name} is {value}; it must be 0 to {most}")
