"""Write the random GPT-2 as a GGUF file for llama.cpp: `python -m bench.write_gguf FOLDER OUT.gguf --dtype Q8_0`.

Matrices take the asked type, the position table, norms and biases stay F32, as llama.cpp's own converter has
it. The vocabulary is made up (t0, t1, ...): the benchmark speaks in token ids. Needs numpy, torch,
safetensors and gguf, nothing of ours.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DTYPES = ("F32", "BF16", "Q8_0")
WHOLE = {"wte.weight": "token_embd.weight", "wpe.weight": "position_embd.weight"}
PARTS = {
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def renamed(name: str) -> str:
    """Return llama.cpp's name of a tensor of GPT-2."""
    if name in WHOLE:
        return WHOLE[name]
    part, _, kind = name.rpartition(".")
    if not part.startswith("h."):
        return f"{PARTS[part]}.{kind}"
    _, layer, part = part.split(".", 2)
    return f"blk.{layer}.{PARTS[part]}.{kind}"


def tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield llama.cpp's names and fp32 arrays, matrices as (out, in)."""
    from safetensors.torch import load_file

    for name, w in load_file(folder / "model.safetensors").items():
        name = name.removeprefix("transformer.")
        if name == "lm_head.weight":  # tied
            continue
        turned = w.dim() == 2 and name.startswith("h.")
        yield renamed(name), (w.t() if turned else w).float().contiguous().numpy()


def write(folder: Path, out: Path, dtype: str) -> None:
    """Write the file, whole or not at all."""
    import gguf
    import numpy as np

    config = json.loads((folder / "config.json").read_text())
    temporary = out.with_suffix(".part")
    writer = gguf.GGUFWriter(temporary, "gpt2")
    writer.add_name("random")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(config["vocab_size"] - 1)
    kind = gguf.GGMLQuantizationType[dtype]
    for name, array in tensors(folder):
        if array.ndim == 2 and name != "position_embd.weight" and dtype != "F32":
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="BF16")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write(args.folder, args.out, args.dtype)


if __name__ == "__main__":
    main()
