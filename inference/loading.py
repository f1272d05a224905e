"""From a model's name to what serves it: read, checked, built into a runner, and tried.

Runs in the thread of the caller of `Engine.load`, beside whatever the engine computes. It knows nothing of
requests, nor of what is served now: a failed load leaves nothing behind.
"""

import logging
import time
from typing import TYPE_CHECKING

from inference.backend import ServedModel
from inference.build import RunnerOptions, fingerprint, finite
from storage.errors import NotLoadable

if TYPE_CHECKING:
    from collections.abc import Callable

    from inference.runner import ModelRunner
    from model import GPT
    from storage.checkpoints import Loaded
    from storage.registry import ModelReference
    from storage.runs import Workspace

    Loader = Callable[[ModelReference, Workspace], Loaded]
    Builder = Callable[[GPT, RunnerOptions], tuple[ModelRunner, str]]

logger = logging.getLogger(__name__)


class ModelSource:
    """Load models with one set of options. `loader` and `build` stand between files and runners."""

    def __init__(self, workspace: "Workspace", options: RunnerOptions, loader: "Loader", build: "Builder"):
        self._workspace, self._options = workspace, options
        self._loader, self._build = loader, build

    def load(self, reference: "ModelReference") -> tuple[ServedModel, "ModelRunner"]:
        """Read a model, build its runner and try it. Raises what the loader raises, NotLoadable and ValueError."""
        started = time.monotonic()
        loaded = self._loader(reference, self._workspace)
        model, tokenizer = loaded.model, loaded.tokenizer
        if not finite(model):
            raise NotLoadable(f"{reference.label} holds weights that are no finite numbers.")
        parameters, weights = model.num_params(), fingerprint(model)
        runner, reason = self._build(model, self._options)
        del model, loaded
        served = ServedModel(
            id=reference.id,
            reference=reference,
            tokenizer=tokenizer,
            block_size=runner.block_size,
            vocab_size=runner.vocab_size,
            parameters=parameters,
            runner=runner.name,
            runner_reason=reason,
            device=runner.device,
            dtype=runner.dtype,
            fingerprint=f"fp_{weights}_{tokenizer.fingerprint[:6]}_{runner.name}_{runner.dtype}",
            loaded_at=time.time(),
            load_seconds=time.monotonic() - started,
        )
        try:
            runner.rows([0], [0], [0], [0])  # what cannot compute one row must not replace what can
        except BaseException:
            runner.close()
            raise
        logger.info("loaded %s (%s, %s, %s)", served.id, served.runner, served.device, served.dtype)
        return served, runner
