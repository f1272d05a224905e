"""What each `model_type` means: the shape of a model from scratch, and training settings that suit it.

A preset only fills what the request leaves out. The names of GPT-2's sizes are shapes here, too; their
pretrained weights come from storage. FINE_TUNING holds the settings for a model that has already been trained.
"""

from typing import Any

SMALL: dict[str, Any] = {
    "bias": False,
    "optimizer": "muon",
    "schedule": "linear",
    "weight_decay": 0.1,
    "eval_iters": 20,
    "tokenizer": "auto",
}
LARGE: dict[str, Any] = {
    "bias": True,
    "block_size": 1024,
    "batch_size": 8,
    "gradient_accumulation_steps": 16,
    "eval_iters": 20,
    "tokenizer": "auto",
}
LARGE |= {"optimizer": "adamw", "schedule": "cosine", "learning_rate": 6e-4, "weight_decay": 0.1}
LARGE |= {"max_iters": 20_000, "warmup_iters": 500, "eval_interval": 500, "tokenizer": "gpt2"}

PRESETS: dict[str, dict[str, Any]] = {
    # nanoGPT's CPU recipe in shape, and as good after as many iterations as this; its GPU character recipe is `mini`
    "nano": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 32, "learning_rate": 2.5e-2}
    | {"max_iters": 200, "warmup_iters": 20, "eval_interval": 100}
    | SMALL,
    "micro": {"n_layer": 4, "n_head": 8, "n_embd": 256, "block_size": 128, "batch_size": 32, "learning_rate": 5e-3}
    | {"max_iters": 3000, "warmup_iters": 100, "eval_interval": 250}
    | SMALL,
    "mini": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64, "learning_rate": 2e-3}
    | {"max_iters": 3000, "warmup_iters": 100, "eval_interval": 250, "dropout": 0.2}
    | SMALL,
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768} | LARGE,
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024} | LARGE | {"learning_rate": 3e-4},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280} | LARGE | {"learning_rate": 2.5e-4},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600} | LARGE | {"learning_rate": 2e-4},
}

# Shape, context and tokenizer come with the model. A window below the context keeps memory small
# and leaves the model's context as it is.
FINE_TUNING: dict[str, Any] = {
    "window": 256,
    "batch_size": 4,
    "max_iters": 200,
    "warmup_iters": 10,
    "eval_interval": 50,
    "eval_iters": 5,
    "optimizer": "adamw",
    "schedule": "cosine",
    "weight_decay": 0.01,
    "sample_tokens": 32,
}

GPT2_WIDTH, GPT2_RATE, HIGHEST_RATE = 768, 3e-5, 3e-3
OF_ADAPTERS = 10  # times that of all weights: they start from nothing, and not from what is good already


def fine_tuning_rate(width: int, adapters: bool = False) -> float:
    """Return the learning rate that suits a trained model: GPT-2's, and more the fewer weights there are.

    The weights of a layer grow with the square of the width, and so the rate falls with it; models wider than GPT-2
    124M keep its rate, as none was tried here. Narrow ones learn next to nothing from it.
    """
    rate = min(GPT2_RATE * max(1.0, GPT2_WIDTH / width) ** 2, HIGHEST_RATE)
    return float(f"{rate * (OF_ADAPTERS if adapters else 1):.2g}")


# What no preset decides.
COMMON: dict[str, Any] = {"gradient_accumulation_steps": 1, "dropout": 0.0, "sample_tokens": 64}
