"""Our one architecture, as numbers: what a configuration may be and which tensors it means.

Every field is bounded before anything is computed from it, and the tensors a file has must be exactly those of
its configuration. No torch, no files; model.py is the same architecture as code.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from storage.errors import NotLoadable
from storage.files import quoted

BOUNDS = {"n_layer": 1000, "n_head": 65536, "n_embd": 65536, "block_size": 2**20, "vocab_size": 2**24}
MAX_PARAMETERS = 20_000_000_000
ACTIVATIONS = ("gelu", "gelu_new")
WEIGHT_TYPES = ("F32", "F16", "BF16")
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # in transformers
MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks that old files carry; not c_attn.bias

Shape = tuple[int, ...]


def whole(args: Mapping[str, Any], name: str, shown: str) -> int:
    """Return a field of `args` that is a whole number within its bound; raises NotLoadable."""
    value = args.get(name)
    if type(value) is not int or not 1 <= value <= BOUNDS[name]:
        given = f"is {quoted(value)}" if name in args else "is missing"
        raise NotLoadable(f"{name} of {shown} {given}; it must be a whole number from 1 to {BOUNDS[name]}")
    return value


def checked_args(args: Mapping[str, Any], shown: str) -> dict[str, Any]:
    """Return GPTConfig's fields from `args`, each checked against its bounds."""
    checked: dict[str, Any] = {name: whole(args, name, shown) for name in BOUNDS}
    if checked["n_embd"] % checked["n_head"]:
        raise NotLoadable(
            f"n_embd of {shown} is {checked['n_embd']}, which is not a multiple of n_head {checked['n_head']}"
        )
    dropout = args.get("dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise NotLoadable(f"dropout of {shown} is {quoted(dropout)}; it must be at least 0 and below 1")
    for name in ("bias", "tied"):
        if type(args[name]) is not bool:
            raise NotLoadable(f"{name} of {shown} is {quoted(args[name])}; it must be true or false")
        checked[name] = args[name]
    if args["activation"] not in ACTIVATIONS:
        raise NotLoadable(f"activation of {shown} is {quoted(args['activation'])}; it must be gelu or gelu_new")
    checked["dropout"], checked["activation"] = float(dropout), args["activation"]
    parameters = count_parameters(checked)
    if parameters > MAX_PARAMETERS:
        raise NotLoadable(f"{shown} describes {parameters} parameters; at most {MAX_PARAMETERS} are loaded")
    return checked


def count_parameters(args: Mapping[str, Any]) -> int:
    """Return the number of parameters that checked GPTConfig fields mean."""
    C, V = args["n_embd"], args["vocab_size"]
    biases = args["n_layer"] * 11 * C + C if args["bias"] else 0
    matrices = 12 * args["n_layer"] * C * C + (2 * args["n_layer"] + 1) * C
    embeddings = (V if args["tied"] else 2 * V) * C + args["block_size"] * C
    return int(matrices + biases + embeddings)


def expected_shapes(args: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Give every parameter's name and shape in our layout; the head only if it is not tied."""
    C, V = args["n_embd"], args["vocab_size"]
    block = {
        "ln_1": (C,),
        "attn.c_attn": (3 * C, C),
        "attn.c_proj": (C, C),
        "ln_2": (C,),
        "mlp.c_fc": (4 * C, C),
        "mlp.c_proj": (C, 4 * C),
    }
    yield "transformer.wte.weight", (V, C)
    yield "transformer.wpe.weight", (args["block_size"], C)
    modules = [(f"h.{i}.{name}", shape) for i in range(args["n_layer"]) for name, shape in block.items()]
    for name, shape in [*modules, ("ln_f", (C,))]:
        yield f"transformer.{name}.weight", shape
        if args["bias"]:
            yield f"transformer.{name}.bias", shape[:1]
    if not args["tied"]:
        yield "lm_head.weight", (V, C)


def some(names: Iterable[str]) -> str:
    """Return at most three names for a message, and how many more there are."""
    names = sorted(names)
    return ", ".join(map(quoted, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def require_tensors(
    found: Mapping[str, tuple[str, Shape]], args: Mapping[str, Any], shown: str, transposed: bool
) -> None:
    """Raise NotLoadable unless `found` (our name -> type, shape) is exactly what the configuration means."""
    expected = dict(expected_shapes(args))
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing:
        but = f" and has {some(unexpected)}" if unexpected else ""
        raise NotLoadable(f"{shown} is not this kind of GPT-2: it lacks {some(missing)}{but}")
    if unexpected:
        raise NotLoadable(f"{shown} is not this kind of GPT-2: it has {some(unexpected)}")
    for name, shape in expected.items():
        dtype, actual = found[name]
        wanted = shape[::-1] if transposed and name.endswith(TRANSPOSED) else shape
        if actual != wanted:
            raise NotLoadable(f"{name} in {shown} has the shape {actual}; its configuration means {wanted}")
        if dtype not in WEIGHT_TYPES:
            raise NotLoadable(f"{name} in {shown} has the type {dtype}; it must be one of {', '.join(WEIGHT_TYPES)}")
