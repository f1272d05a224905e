"""From token ids to text: what a reply says, piece by piece, and why it ended.

A `Completion` is the text over one `Generation`: whole characters only, nothing of a stop string, and a
reason at the end. `merged` takes pieces from several of them as they come. A reply that is not streamed
goes through the same steps, only less often, so both have the same text byte for byte. No HTTP here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from inference.sequence import EngineDown, Event, Failure, Finished, FinishReason, Generation, OutOfTime, Token
from storage.tokenizer import StopFinder, Tokenizer

MOST = 8  # events in one piece: a reader who is late gets larger pieces, not ever later ones


class GenerationFailed(Exception):
    """The engine ended a request with an error; the message is for the user."""


@dataclass(frozen=True)
class Piece:
    """What the events that were there brought: perhaps some text, perhaps tokens, perhaps the end."""

    completion: "Completion"
    text: str = ""
    tokens: tuple[Token, ...] = ()
    last: bool = False


class Completion:
    """The text of one generation. `ends` are the token ids that end the text and are no part of it."""

    def __init__(
        self, generation: Generation, tokenizer: Tokenizer, stops: Sequence[str], ends: frozenset[int], index: int = 0
    ):
        self.generation, self.index = generation, index
        self._ends = ends
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream_decoder()
        self._finder = StopFinder(stops)
        self._held: Token | None = None  # a token of `ends`, whose text is dropped if the engine stops there
        self._pieces: list[str] = []
        self._failed: Exception | None = None  # raised by the next poll: what came before it goes out first
        self.tokens: list[Token] = []  # every generated one, also those that are not in the text
        self.finish_reason: str | None = None  # "stop" or "length"
        self.stop_reason: str | int | None = None  # the stop string or token id that ended it

    @property
    def text(self) -> str:
        """Return the text so far."""
        return "".join(self._pieces)

    def cancel(self) -> None:
        """Have the engine stop, unless the end has come."""
        if self.generation.finish_reason is None:
            self.generation.cancel()

    def poll(self) -> Piece | None:
        """Return what the next event brings, with others that are there, or None when there is none.

        Raises GenerationFailed, OutOfTime, and EngineDown when the server stops.
        """
        if self._failed is not None:
            raise self._failed
        if not self.generation.ready or (event := self.generation.next(0.0)) is None:
            return None
        piece = self._piece(event)
        for _ in range(MOST - 1):
            if piece.last or not self.generation.ready or (event := self.generation.next(0.0)) is None:
                break
            try:
                more = self._piece(event)
            except Exception as error:
                self._failed = error
                break
            piece = Piece(self, piece.text + more.text, piece.tokens + more.tokens, more.last)
        return piece

    def _piece(self, event: Event) -> Piece:
        return self._end(event) if isinstance(event, Finished) else self._token(event)

    def _token(self, token: Token) -> Piece:
        self.tokens.append(token)
        if token.token_id in self._ends:
            self._held = token
            return Piece(self, tokens=(token,))
        text, stop = self._finder.push(self._decoder.push(token.token_id))
        if stop is not None:
            self.generation.cancel()
            return self._last(text, "stop", stop, (token,))
        self._pieces.append(text)
        return Piece(self, text, (token,))

    def _end(self, event: Finished) -> Piece:
        if event.reason not in (FinishReason.STOP, FinishReason.LENGTH):
            raise failure(event.error)
        text = ""
        if self._held is not None and event.reason is not FinishReason.STOP:
            text = self._decoder.push(self._held.token_id)
        text, stop = self._finder.push(text + self._decoder.flush())
        if stop is not None:
            return self._last(text, "stop", stop)
        text += self._finder.flush()
        if event.reason is FinishReason.STOP:
            return self._last(text, "stop", self.tokens[-1].token_id if self.tokens else None)
        return self._last(text, "length", None)

    def _last(self, text: str, reason: str, stop_reason: str | int | None, tokens: tuple[Token, ...] = ()) -> Piece:
        self._pieces.append(text)
        self.finish_reason, self.stop_reason = reason, stop_reason
        return Piece(self, text, tokens, last=True)


def failure(error: Failure | None) -> Exception:
    """Return what is raised for a sequence that ended with `error`; None is a cancelled one."""
    kind = {Failure.OUT_OF_TIME: OutOfTime, Failure.SHUTTING_DOWN: EngineDown, Failure.ENGINE: EngineDown}
    return GenerationFailed("the request was cancelled") if error is None else kind.get(error, GenerationFailed)(error)


def merged(completions: Sequence[Completion]) -> Iterator[Piece | None]:
    """Give the pieces of all completions that are there, and None whenever there is none; waits for nothing."""
    live = list(completions)
    while live:
        pieces = [piece for completion in live if (piece := completion.poll()) is not None]
        yield from pieces or (None,)
        live = [completion for completion in live if completion.finish_reason is None]


def settle(completions: Sequence[Completion], idle: float) -> Iterator[None]:
    """Take in all completions to their ends, with a moment for the caller every `idle` seconds at least.

    A token wakes nobody, which leaves the processor to the engine.
    """
    live = list(completions)
    while live:
        live[0].generation.wait_end(idle)
        for completion in live:
            while completion.finish_reason is None and completion.poll() is not None:
                pass
        live = [completion for completion in live if completion.finish_reason is None]
        yield
