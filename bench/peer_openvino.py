"""OpenVINO as a contestant: `python -m bench.peer_openvino FOLDER --dtype bf16 --work FOLDER`.

GPT-2 is written here as a function of token ids and a cache, converted once, its cache made a state of the
model, and for int8 its weights compressed by nncf. `int8` runs with dynamically quantised activations,
which was its faster way in each measurement. Needs torch, openvino, nncf, safetensors; nothing of ours.
Letters: B sequences, T new positions, S all positions, H heads, D head size, C width.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.contestant import serve

FILES = {"fp32": "fp.xml", "bf16": "fp.xml", "int8": "int8.xml"}
HINTS = {
    "fp32": {"INFERENCE_PRECISION_HINT": "f32"},
    "bf16": {"INFERENCE_PRECISION_HINT": "bf16"},
    "int8": {"INFERENCE_PRECISION_HINT": "bf16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"},
}


def functional_gpt2(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return GPT-2 as a module (ids, positions, mask, beam, *cache) -> (last logits, *cache), and its config."""
    import torch
    from safetensors.torch import load_file
    from torch.nn import functional as F

    config = json.loads((folder / "config.json").read_text())
    weights = {
        name.removeprefix("transformer."): w.float() for name, w in load_file(folder / "model.safetensors").items()
    }
    heads, width = config["n_head"], config["n_embd"]

    class GPT2(torch.nn.Module):
        def forward(self, ids: Any, positions: Any, mask: Any, beam: Any, *cache: Any) -> tuple[Any, ...]:
            B, T = ids.shape
            x = weights["wte.weight"][ids] + weights["wpe.weight"][positions]
            kept = []
            for layer in range(config["n_layer"]):
                h = f"h.{layer}."
                heads_of = linear(norm(x, h + "ln_1"), h + "attn.c_attn").view(B, T, 3, heads, width // heads)
                q, k, v = heads_of.permute(2, 0, 3, 1, 4).unbind(0)
                k = torch.cat([cache[2 * layer].index_select(0, beam), k], dim=2)
                v = torch.cat([cache[2 * layer + 1].index_select(0, beam), v], dim=2)
                kept += [k, v]
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                x = x + linear(y.transpose(1, 2).reshape(B, T, width), h + "attn.c_proj")
                up = F.gelu(linear(norm(x, h + "ln_2"), h + "mlp.c_fc"), approximate="tanh")
                x = x + linear(up, h + "mlp.c_proj")
            return (F.linear(norm(x[:, -1:], "ln_f"), weights["wte.weight"]), *kept)

    def norm(x: Any, name: str) -> Any:
        return F.layer_norm(x, (width,), weights[name + ".weight"], weights[name + ".bias"])

    def linear(x: Any, name: str) -> Any:
        return F.linear(x, turned[name], weights[name + ".bias"])

    turned = {
        name.removesuffix(".weight"): w.t().contiguous()  # GPT-2's files keep (in, out)
        for name, w in weights.items()
        if w.dim() == 2 and name.startswith("h.")
    }
    return GPT2().eval(), config


def convert(folder: Path, work: Path) -> None:
    """Write fp.xml and int8.xml into `work`."""
    import nncf
    import openvino as ov
    import torch
    from openvino import opset13, passes

    model, config = functional_gpt2(folder)
    H, D, layers = config["n_head"], config["n_embd"] // config["n_head"], config["n_layer"]
    ids = torch.zeros(1, 2, dtype=torch.long)
    past = [torch.zeros(1, H, 3, D) for _ in range(2 * layers)]
    with torch.no_grad():
        graph = ov.convert_model(
            model, example_input=(ids, ids, torch.zeros(1, 1, 2, 5), torch.zeros(1, dtype=torch.int32), *past)
        )
    shapes = {"ids": [-1, -1], "positions": [-1, -1], "mask": [-1, 1, -1, -1], "beam_idx": [-1]}
    inputs = [*shapes, *(f"past.{i}" for i in range(2 * layers))]
    for name, port in zip(inputs, graph.inputs, strict=True):
        port.get_tensor().set_names({name})
    for name, port in zip(["logits", *(f"present.{i}" for i in range(2 * layers))], graph.outputs, strict=True):
        port.get_tensor().set_names({name})
    graph.reshape(
        {
            port: ov.PartialShape(shapes.get(name, [-1, H, -1, D]))
            for name, port in zip(inputs, graph.inputs, strict=True)
        }
    )
    manager = passes.Manager()
    manager.register_pass(passes.MakeStateful({f"past.{i}": f"present.{i}" for i in range(2 * layers)}))
    manager.run_passes(graph)
    _begin_empty(graph, opset13, H, D)
    work.mkdir(parents=True, exist_ok=True)
    ov.save_model(graph, work / "fp.xml", compress_to_fp16=False)
    small = nncf.compress_weights(ov.Core().read_model(work / "fp.xml"), mode=nncf.CompressWeightsMode.INT8_SYM)
    ov.save_model(small, work / "int8.xml")


def _begin_empty(graph: Any, ops: Any, H: int, D: int) -> None:
    """Let each state begin with no positions, for as many sequences as the ids have."""
    import numpy as np

    ids = graph.input("ids")
    count = ops.gather(ops.shape_of(ids, output_type="i64"), ops.constant(np.array([0])), ops.constant(0))
    for op in graph.get_ops():
        if op.get_type_name() == "ReadValue":
            shape = ops.concat([count, *(ops.constant(np.array([n])) for n in (H, 0, D))], axis=0)
            op.set_arguments([ops.broadcast(ops.constant(0.0, dtype=op.get_output_element_type(0)), shape)])
    graph.validate_nodes_and_infer_types()


def prepare(args: argparse.Namespace) -> tuple[str, Callable[[list[list[int]], int], float]]:
    """Convert the model if need be and compile it; return versions and the work."""
    import numpy as np
    import openvino as ov

    if not (args.work / "int8.xml").exists():
        convert(args.folder, args.work)
    core = ov.Core()
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": args.threads})
    settings = {"PERFORMANCE_HINT": "LATENCY", **HINTS[args.dtype]}
    request = core.compile_model(args.work / FILES[args.dtype], "CPU", settings).create_infer_request()

    def step(ids: Any, start: int) -> Any:
        B, T = ids.shape
        mask = np.zeros((B, 1, T, start + T), np.float32)
        if T > 1:
            mask += np.triu(np.full((T, start + T), -1e9, np.float32), 1 + start)
        positions = np.broadcast_to(np.arange(start, start + T), ids.shape).copy()
        request.infer({"ids": ids, "positions": positions, "mask": mask, "beam_idx": np.arange(B, dtype=np.int32)})
        return request.get_tensor("logits").data[:, -1].argmax(-1)[:, None]

    def work(prompts: list[list[int]], new: int) -> float:
        request.reset_state()
        start = time.perf_counter()
        token = step(np.array(prompts), 0)
        first = time.perf_counter() - start
        for i in range(new - 1):
            token = step(token, len(prompts[0]) + i)
        return first

    return f"OpenVINO {ov.__version__.split('-')[0]}", work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=tuple(FILES), default="bf16")
    parser.add_argument("--work", type=Path, required=True, help="folder for the converted model")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    serve(lambda: prepare(args))


if __name__ == "__main__":
    main()
