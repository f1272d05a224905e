"""Batch: the sequences of one HTTP request, from submission to the last piece of text.

It admits all of them or none, notices a client that has gone, counts tokens, and whatever happens it
cancels what is left and gives its place back. Routes build one, then iterate over it or let it finish.
"""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from inference.backend import ServedModel
from inference.sequence import NoModel, PromptTooLong, SamplingParams
from storage.errors import NotFound
from storage.files import quoted
from storage.tokenizer import Tokenizer
from web.client import Client
from web.completion import Completion, Piece, merged, settle
from web.context import Context
from web.errors import Refused
from web.pump import looked_at
from web.security import key_digest, requester

LOOK = 0.1  # seconds between looks around while a whole reply is waited for
LONGEST_TOKEN = 512  # bytes; no vocabulary that is accepted has a longer one


def loaded_model(context: Context) -> ServedModel:
    """Return the model that serves. Raises Refused (503) while the first one loads, NoModel without one."""
    served = context.engine.served()
    if served is not None:
        return served
    if context.loader.starting:
        raise Refused(503, "the model is still being loaded", "loading", headers={"Retry-After": "1"})
    raise NoModel("no model is loaded; load one with POST /api/load_model")


@contextmanager
def using(context: Context, name: str | None) -> Iterator[ServedModel]:
    """Have the model that a request names stay loaded until the request is submitted; None is the current one.

    One that is known and not loaded is loaded now, beside the current one. Raises Refused (404 for an unknown name,
    503 while the first model loads), NoModel, and what loading raises.
    """
    reference = context.catalogue.reference(name)
    if reference is None or context.loader.starting:
        loaded_model(context)
    context.streams.enter()  # who waits for a load takes a thread, too
    with ExitStack() as stack:
        try:
            model = stack.enter_context(context.engine.using(reference))
        except ValueError as error:  # a device or precision that this machine or model does not have
            raise Refused(400, str(error), param="model") from None
        except NotFound:  # it was there a moment ago
            raise Refused(404, f"there is no model {quoted(name)} any more", "model_not_found", "model") from None
        finally:
            context.streams.leave()
        yield model


def context_tokens(context: Context, model: ServedModel) -> int:
    """Return the most tokens that prompt and reply may have together."""
    limits = (model.block_size, context.settings.max_context_tokens, model.reference.max_context_tokens)
    return min(limit for limit in limits if limit is not None)


def too_long(limit: int, prompt: str) -> PromptTooLong:
    """Return the refusal of a prompt, in the words that OpenAI's clients look for."""
    return PromptTooLong(f"This model's maximum context length is {limit} tokens. However, {prompt}")


def encode(text: str, tokenizer: Tokenizer, limit: int, param: str = "prompt") -> list[int]:
    """Return a prompt's token ids; an empty one is the end-of-text token. Raises PromptTooLong and Refused."""
    if not text:
        if tokenizer.eot is None:
            raise Refused(400, f"{param} is empty; this model has no end-of-text token to start from", param=param)
        return [tokenizer.eot]
    if len(text) > limit * LONGEST_TOKEN:
        raise too_long(limit, f"the {param} has {len(text)} characters")
    try:
        return tokenizer.encode(text)
    except ValueError as error:  # a character that a character vocabulary does not have
        raise Refused(400, f"{param}: {error}", param=param) from None


def draw_seed() -> int:
    """Return a random seed that every JSON reader can hold."""
    return secrets.randbits(48)


class Batch:
    """All sequences of one request: `n` for each prompt, prompt after prompt."""

    def __init__(
        self,
        context: Context,
        model: ServedModel,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        client: Client,
        request_id: str,
        n: int = 1,
        stops: Sequence[str] = (),
    ):
        self.model, self.prompts, self.n = model, prompts, n
        self.seed = draw_seed() if params.seed is None else params.seed
        self._context, self._client = context, client
        self._open, self._stops = True, bool(stops)
        self.completions: list[Completion] = []
        context.require_engine()
        context.streams.enter()
        try:
            for index in range(n * len(prompts)):
                own = replace(params, seed=(self.seed + index % n) % 2**63)
                name = request_id if index == 0 else f"{request_id}-{index}"
                generation = context.engine.submit(
                    model, prompts[index // n], own, name, owner=requester(), cache_scope=key_digest()
                )
                self.completions.append(Completion(generation, model.tokenizer, stops, generation.stop_ids, index))
        except ValueError as error:
            self.close()
            raise Refused(400, str(error)) from None
        except BaseException:
            self.close()
            raise

    @property
    def prompt_tokens(self) -> int:
        """Return the tokens of all prompts, each counted once."""
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def completion_tokens(self) -> int:
        """Return the tokens generated so far."""
        return sum(len(completion.tokens) for completion in self.completions)

    def usage(self) -> dict[str, Any]:
        """Return the token counts as replies have them."""
        prompt, generated = self.prompt_tokens, self.completion_tokens
        cached = sum(completion.generation.cached_tokens for completion in self.completions[:: self.n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def __iter__(self) -> Iterator[Piece | None]:
        """Give pieces of text as they come, and None whenever there is none; waits for nothing.

        Raises GenerationFailed, OutOfTime, EngineDown when the server stops or stalls, ClientGone when nobody listens.
        """
        try:
            for piece in merged(self.completions):
                self._client.check()
                self._context.require_engine()
                yield piece
        finally:
            self.close()

    def finish(self) -> "Batch":
        """Wait for the end of all completions; where a stop string may end one, each step is looked at."""
        if self._stops and self._context.pump.running:  # the engine goes on until the stop string is seen
            looked_at(iter(self), self._context.pump)
            return self
        try:
            for _ in settle(self.completions, LOOK):
                self._client.check()
                self._context.require_engine()
        finally:
            self.close()
        return self

    def close(self) -> None:
        """Cancel what still runs, count, and give the place back; once."""
        if not self._open:
            return
        self._open = False
        for completion in self.completions:
            completion.cancel()
        self._context.metrics.prompt_tokens.inc(self.prompt_tokens)
        self._context.metrics.generated_tokens.inc(self.completion_tokens)
        self._context.streams.leave()
