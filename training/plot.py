"""plot.svg: the losses of one run, or of several in one picture, written as SVG text without any library.

    points(rows, "val_loss")  rows of metrics ─► (iteration, loss), loss None where it was not a number
    svg([Curves(...)])        ─► a picture that reads on light and on dark pages

Nothing here reads a file. A picture stays small however long a run is: each pixel column keeps its extremes.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Point = tuple[int, float | None]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 62, 20, 44, 50  # pixels: the picture and its margins
COLUMNS = 340  # that keep their extremes: every second pixel
MOST_CURVES = 6
LEGEND_ROW, LETTER, LONGEST_NAME = 18, 6.9, 24  # pixels of a row and of a letter; letters
SPIKE = 1.5  # losses above so many times the first one leave the picture, else one spike would flatten the rest
COLOURS = ("#1f6fd0", "#d9480f", "#2b8a3e", "#9c36b5", "#b8860b", "#0b8793")
LIGHT = {  # attributes of each class: the picture needs no style sheet, which a browser may refuse to use
    "title": 'font-size="15" font-weight="600"',
    "faint": 'fill="#777"',
    "page": 'fill="#fff"',
    "box": 'fill="#fff" fill-opacity="0.85"',
    "grid": 'stroke="#e4e4e4"',
    "axis": 'stroke="#999" fill="none"',
    "train": 'opacity="0.5" fill="none" stroke-linecap="round" stroke-linejoin="round"',
    "val": 'stroke-width="2.2" fill="none" stroke-linecap="round" stroke-linejoin="round"',
    "best": 'stroke-width="2" fill="none"',
    **{f"c{k}": f'stroke="{colour}"' for k, colour in enumerate(COLOURS)},
}
DARK = (  # on dark pages, where style sheets are used
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.faint{fill:#999}.page,.box{fill:#16181c}.grid{stroke:#2c3036}"
    ".axis{stroke:#777}.c0{stroke:#6aa9f4}.c1{stroke:#ff8a5c}.c2{stroke:#69c77d}.c3{stroke:#d28be5}.c4{stroke:#e0b84a}"
    ".c5{stroke:#4cc9d6}}"
)


@dataclass(frozen=True)
class Curves:
    """The losses of a run, in nats per token; `bits_per_nat` turns them into bits per byte of text."""

    name: str
    train: Sequence[Point] = ()
    val: Sequence[Point] = ()
    bits_per_nat: float | None = None

    @classmethod
    def of(cls, name: str, rows: Iterable[dict[str, Any]]) -> "Curves":
        """Return the curves that rows of metrics hold."""
        rows, factor = list(rows), None
        for row in rows:
            if row.get("val_bits_per_byte") and row.get("val_loss"):
                factor = row["val_bits_per_byte"] / row["val_loss"]
        return cls(name, points(rows, "loss"), points(rows, "val_loss"), factor)

    def scaled(self, factor: float) -> "Curves":
        """Return the same curves in another unit."""
        train, val = ([(at, None if y is None else y * factor) for at, y in each] for each in (self.train, self.val))
        return Curves(self.name, train, val, self.bits_per_nat)

    def best(self) -> tuple[int, float] | None:
        """Return iteration and value of the lowest validation loss, None if there is none."""
        return min(_known(self.val), key=lambda point: point[1], default=None)


def points(rows: Iterable[dict[str, Any]], column: str) -> list[Point]:
    """Return the values of a column by iteration; None where the row has the column but no finite number in it."""
    found = ((row["iter_num"], row[column]) for row in rows if column in row)
    return [(at, y if isinstance(y, int | float) and math.isfinite(y) else None) for at, y in found]


def _known(series: Iterable[Point]) -> list[tuple[int, float]]:
    return [(at, y) for at, y in series if y is not None]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers from `low` to `high`, in steps of 1, 2 or 5 times a power of ten."""
    least = max(high - low, 1e-9) / most
    power = 10.0 ** math.floor(math.log10(least))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= least * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def labels(numbers: Sequence[float]) -> list[str]:
    """Return numbers with as many decimals as the one that needs most."""
    decimals = max((len(f"{number:.12g}".partition(".")[2]) for number in numbers), default=0)
    return [f"{number:,.{decimals}f}" for number in numbers]


def thin(series: Sequence[Point], last: float, columns: int = COLUMNS) -> list[Point]:
    """Return at most lowest, highest and a gap for each of `columns` parts of the range from 0 to `last`."""
    if len(series) <= 2 * columns:
        return list(series)
    parts: dict[int, list[Point]] = {}
    for point in series:
        parts.setdefault(int(point[0] / last * columns), []).append(point)
    kept: list[Point] = []
    for part in parts.values():
        known = _known(part)
        if known:
            extremes = {min(known, key=lambda point: point[1]), max(known, key=lambda point: point[1])}
            kept += sorted(extremes)
        if len(known) < len(part):
            kept.append((part[-1][0], None))
    return kept


@dataclass(frozen=True)
class Frame:
    """Where iterations and losses lie in the picture."""

    last: float  # iterations begin at 0
    low: float
    high: float

    @classmethod
    def around(cls, curves: Sequence[Curves]) -> "Frame":
        """Return the frame that holds all curves but their spikes."""
        all_series = [_known(series) for each in curves for series in (each.train, each.val)]
        losses = [y for series in all_series for _, y in series] or [0.0, 1.0]
        firsts = [series[0][1] for series in all_series if series]
        high = min(max(losses), SPIKE * max(firsts, default=1.0))
        low = min(losses)
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        last = max([1, *(at for series in all_series for at, _ in series)])
        return cls(last, low - pad, high + pad)

    def x(self, at: float) -> float:
        """Return the pixel of an iteration."""
        return LEFT + at / self.last * (WIDTH - LEFT - RIGHT)

    def y(self, loss: float) -> float:
        """Return the pixel of a loss; one that is far outside stays a number that viewers can draw."""
        share = (self.high - loss) / (self.high - self.low)
        return TOP + max(-9.0, share) * (HEIGHT - TOP - BOTTOM)

    def path(self, series: Sequence[Point], kind: str) -> str:
        """Return a line through the points, broken where a loss is None; a point between two breaks is a dot."""
        words, pen = [], "M"
        for at, loss in thin(series, self.last):
            if loss is not None:
                words.append(f"{pen}{self.x(at):.1f} {self.y(loss):.1f}" + ("h0" if pen == "M" else ""))
            pen = "M" if loss is None else "L"
        return f'<path class="{kind}" d="{"".join(words)}" clip-path="url(#inside)"/>' if words else ""

    def axes(self) -> str:
        """Return grid, axes, their numbers and what they mean."""
        right, bottom, parts = WIDTH - RIGHT, HEIGHT - BOTTOM, []
        losses = ticks(self.low, self.high, 7)
        for loss, label in zip(losses, labels(losses), strict=True):
            y = self.y(loss)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        for at in ticks(0, self.last, 8):
            if at == int(at):
                parts.append(f'<path class="axis" d="M{self.x(at):.1f} {bottom}v5"/>')
                parts.append(f'<text x="{self.x(at):.1f}" y="{bottom + 19}" text-anchor="middle">{at:,.0f}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
        middle = (LEFT + right) / 2
        parts.append(f'<text class="faint" x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">iteration</text>')
        return "".join(parts)

    def marked(self, best: tuple[int, float], kind: str) -> str:
        """Return a ring around the best validation loss."""
        return f'<circle class="best {kind}" cx="{self.x(best[0]):.1f}" cy="{self.y(best[1]):.1f}" r="5"/>'


def _legend(rows: Sequence[tuple[str, str]]) -> str:
    """Return a box at the top right, where falling losses leave room: a line's class and its words in each row."""
    width = 46 + LETTER * max(len(words) for _, words in rows)
    left, height = round(WIDTH - RIGHT - width), LEGEND_ROW * len(rows) + 10
    parts = [f'<rect class="box" x="{left}" y="{TOP + 4}" width="{width:.0f}" height="{height}" rx="4"/>']
    for number, (kind, words) in enumerate(rows):
        y = TOP + 22 + LEGEND_ROW * number
        parts.append(f'<path class="{kind}" d="M{left + 8} {y - 4}h22"/>')
        parts.append(f'<text x="{left + 38}" y="{y}">{escape(words)}</text>')
    return "".join(parts)


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _best_in_words(best: tuple[int, float] | None) -> str:
    return "" if best is None else f" best {best[1]:.4f} at {best[0]:,}"


def common_unit(curves: Sequence[Curves]) -> tuple[list[Curves], str]:
    """Return the curves in a unit that compares them: bits per byte if their tokens are not of the same size."""
    factors = [each.bits_per_nat for each in curves if each.train or each.val]
    known = [factor for factor in factors if factor is not None]
    if len(known) < len(factors) or not known or max(known) < 1.001 * min(known):
        return list(curves), "nats per token"
    return [each.scaled(each.bits_per_nat or 1.0) for each in curves], "bits per byte"


def _with_attributes(picture: str) -> str:
    """Return a picture whose classes have become attributes, too."""

    def attributes(match: re.Match[str]) -> str:
        return " ".join([match[0], *(LIGHT[name] for name in match[1].split())])

    return re.sub('class="([^"]*)"', attributes, picture)


def svg(curves: Sequence[Curves]) -> str:
    """Return the picture of up to MOST_CURVES runs: training losses thin, validation losses thick, the best ringed."""
    curves, unit = common_unit(curves)
    frame, lines, rings, rows = Frame.around(curves), [], [], []
    for number, run in enumerate(curves):
        train, val, best = f"train c{number}", f"val c{number + (len(curves) == 1)}", run.best()
        lines += [frame.path(run.train, train), frame.path(run.val, val)]
        if len(curves) == 1:
            rows += [(train, "train")] if run.train else []
            rows += [(val, f"val:{_best_in_words(best)}")] if best is not None else []
        else:
            rows.append((val, f"{_shortened(run.name)}:{_best_in_words(best) or ' not evaluated'}"))
        rings.append("" if best is None else frame.marked(best, val.split()[1]))
    title = " · ".join(_shortened(run.name) for run in curves[:3]) + (" …" if len(curves) > 3 else "")
    empty = not any(lines)
    nothing = f'<text class="faint" x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">no losses yet</text>'
    body = nothing if empty else frame.axes() + "".join(lines + rings) + _legend(rows)
    inside = f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"/>'
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return _with_attributes(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui,sans-serif" font-size="12" fill="#333">'
        f"<title>Losses of {escape(title)}</title><style>{DARK}</style>"
        f'<defs><clipPath id="inside">{inside}</clipPath></defs><rect class="page" width="100%" height="100%"/>'
        f'<text class="title" x="{LEFT}" y="26">{escape(title)}</text>'
        f'<text class="faint" x="{WIDTH - RIGHT}" y="26" text-anchor="end">loss, {unit}</text>{body}</svg>\n'
    )
