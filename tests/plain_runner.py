"""What the tests' stand-ins for a model runner have in common: one that only computes rows, and holds nothing."""


class PlainRunner:
    """Says of itself what a runner may, and can do nothing beside `rows`, which each stand-in has of its own."""

    device, dtype, arithmetic, position_bytes = "cpu", "fp32", "000000", 4
    independent, own_threads = False, False
    last_argmax: list[int] | None = None
    greatest = draw = logprobs = begin = follow = None

    def copy(self, source: int, target: int, length: int) -> None: ...

    def release(self, slot: int) -> None: ...

    def close(self) -> None: ...
