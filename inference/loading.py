"""From a model's name to what serves it: read, checked, built into a runner, and tried.

Runs while the caller of `Engine.load` waits, beside whatever the engine computes. It knows nothing of
requests, nor of what is served now: a failed load leaves nothing behind.
"""

import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from inference.backend import Footprint, ServedModel
from inference.build import NotFinite, RunnerOptions, fingerprint
from inference.footprint import measure, memory_bytes
from inference.slots import whole_blocks
from storage.architecture import count_parameters
from storage.errors import NotLoadable

if TYPE_CHECKING:
    from collections.abc import Callable

    from inference.runner import ModelRunner
    from model import GPT
    from storage.checkpoints import Loaded, Opened
    from storage.pretrained import StoredModel
    from storage.registry import ModelReference
    from storage.runs import Workspace

    Loader = Callable[[ModelReference, Workspace], Loaded | Opened]
    Builder = Callable[[GPT | StoredModel, RunnerOptions], tuple[ModelRunner, str]]

logger = logging.getLogger(__name__)

MIB = 2**20


class ModelSource:
    """Load models with one set of options. `loader` and `build` stand between files and runners."""

    def __init__(self, workspace: "Workspace", options: RunnerOptions, loader: "Loader", build: "Builder"):
        self._workspace, self._options = workspace, options
        self._loader, self._build = loader, build

    def _options_of(self, reference: "ModelReference") -> RunnerOptions:
        """Return the options, with what a registry file says of this model."""
        usual = self._options
        return replace(usual, device=reference.device or usual.device, dtype=reference.dtype or usual.dtype)

    def measure(self, reference: "ModelReference") -> Footprint:
        """Return what a model would take; see footprint.measure."""
        return measure(reference, self._workspace, self._options_of(reference))

    def load(self, reference: "ModelReference") -> tuple[ServedModel, "ModelRunner"]:
        """Read a model, build its runner and try it. Raises what the loader raises, NotLoadable and ValueError.

        In a thread that ends with it: OpenMP's helpers of a thread stay as long as it does, and where there are more
        of them than cores, libgomp lets all sleep between operations. The torch runner's steps of one row took 1.45
        times as long after a load in a thread that stayed.
        """
        with ThreadPoolExecutor(1, "load") as thread:
            return thread.submit(self._load, reference).result()

    def _load(self, reference: "ModelReference") -> tuple[ServedModel, "ModelRunner"]:
        started, options = time.monotonic(), self._options_of(reference)
        loaded = self._loader(reference, self._workspace)
        model, tokenizer = loaded.model, loaded.tokenizer
        try:
            weights = fingerprint(model)
        except NotFinite as e:
            raise NotLoadable(f"{reference.label} holds {e}.") from e
        config = model.config
        runner, reason = self._build(model, options)
        del model, loaded
        served = ServedModel(
            id=reference.id,
            reference=reference,
            tokenizer=tokenizer,
            block_size=runner.block_size,
            vocab_size=runner.vocab_size,
            n_embd=config.n_embd,
            parameters=count_parameters(asdict(config)),
            memory_bytes=memory_bytes(
                config,
                runner.name,
                runner.device,
                runner.dtype,
                runner.slots,
                options.cache_memory,
                getattr(runner, "packed_bytes", None),  # which the native runner alone has
            ),
            runner=runner.name,
            runner_reason=reason,
            device=runner.device,
            dtype=runner.dtype,
            fingerprint=f"fp_{weights}_{tokenizer.fingerprint[:6]}_{runner.name}_{runner.dtype}_{runner.arithmetic}",
            loaded_at=time.time(),
            load_seconds=time.monotonic() - started,
        )
        try:
            self._check_cache(reference, runner)
            runner.rows([0], [0], [0], [0])  # what cannot compute one row must not replace what can
        except BaseException:
            runner.close()
            raise
        what = (served.id, served.runner, served.device, served.dtype, served.load_seconds, served.memory_bytes / 1e6)
        logger.info("loaded %s (%s, %s, %s) in %.1f s; weights and a full cache are %.0f MB", *what)
        return served, runner

    def _check_cache(self, reference: "ModelReference", runner: "ModelRunner") -> None:
        """Raise ValueError unless the memory for keys and values has room for a sequence of full length."""
        given, need = self._options.cache_memory, whole_blocks(runner.block_size) * runner.position_bytes
        if given is not None and given < need:
            raise ValueError(
                f"cache_memory is {given / MIB:,.1f} MiB; {reference.label} needs {math.ceil(need / MIB):,} MiB "
                f"for one sequence of {runner.block_size} tokens in {runner.dtype}"
            )
