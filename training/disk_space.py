"""How much disk a run will take, roughly and rather too much than too little, before it starts."""

from storage.runs import Run
from training.config import TrainConfig
from training.presets import PRESETS

BYTES_PER_PARAMETER = 12  # fp32 weights and AdamW's two moments
COPIES = 4  # latest, the one before, the one being written, and the best without moments; kept ones come to these
OTHER_BYTES = 50_000_000  # log, metrics, tokens of a small dataset
VOCABULARY = 50304


def parameters(n_layer: int, n_embd: int, block_size: int, vocab_size: int) -> int:
    """Return the number of weights of a GPT, biases and norms left out."""
    return 12 * n_layer * n_embd**2 + (vocab_size + block_size) * n_embd


def needed(config: TrainConfig) -> int:
    """Return the bytes that a resolved config's run may take."""
    copies = COPIES + config.kept()
    if config.init_from == "scratch":
        vocabulary = VOCABULARY if config.tokenizer == "gpt2" else 4096
        shape = (config.n_layer or 0, config.n_embd or 0, config.block_size or 0)
        return OTHER_BYTES + copies * BYTES_PER_PARAMETER * parameters(*shape, vocabulary)
    if config.model_type in PRESETS:
        preset = PRESETS[config.model_type]
        weights = parameters(preset["n_layer"], preset["n_embd"], preset["block_size"], VOCABULARY)
        return OTHER_BYTES + copies * BYTES_PER_PARAMETER * weights
    return OTHER_BYTES


def of_resumed(run: Run, config: TrainConfig) -> int:
    """Return the bytes that going on with a run may take: some text, one checkpoint more, and those yet to be kept."""
    sizes = [path.stat().st_size for path in (run.checkpoint, run.previous) if path.exists()]
    copies = 1 + max(0, config.kept() - len(run.kept()))
    return OTHER_BYTES + copies * max(sizes, default=0)
