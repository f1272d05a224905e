"""plot.png: the picture of plot.py as pixels, for what cannot show SVG.

    png(svg([Curves(...)]))   the same drawing, at twice the size

It knows as much of SVG as plot.py writes: paths of straight lines, texts, rectangles and circles with their colours
as attributes. Lines are smooth: each pixel is covered as far as it is near. numpy and zlib do it; no library draws.
"""

import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from training.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from training.strokes import Point, lines

SCALE = 2  # pixels per unit of the drawing
INSIDE = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)  # where curves may be
EVERYWHERE = (0, 0, WIDTH, HEIGHT)
FONT_SIZE, INK = 12.0, "#333"
THIN, BOLD = 0.09, 0.125  # of strokes of letters, in parts of the font's size

Box = tuple[float, float, float, float]  # left, top, right, bottom


def path_lines(d: str) -> list[list[Point]]:
    """Return the lines of a path's `d`, each a row of points."""
    found: list[list[Point]] = []
    x = y = 0.0
    for command, numbers in re.findall(r"([MLHVhv])([^MLHVhv]*)", d):
        given = [float(number) for number in numbers.split()]
        if command in "ML":
            x, y = given
        elif command in "Hh":
            x = given[0] if command == "H" else x + given[0]
        else:
            y = given[0] if command == "V" else y + given[0]
        found += [[]] if command == "M" else []
        found[-1].append((x, y))
    return found


def colour(word: str) -> npt.NDArray[np.float32]:
    """Return a colour of three or six hex digits as red, green and blue from 0 to 255."""
    digits = word.removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    return np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)], dtype=np.float32)


class Canvas:
    """A white picture that is drawn on."""

    def __init__(self, width: int, height: int):
        self.pixels = np.full((height * SCALE, width * SCALE, 3), 255.0, dtype=np.float32)

    def _blend(self, cover: npt.NDArray[np.float32], ink: str, left: int, top: int) -> None:
        """Mix a colour into the pixels from (left, top) on, as far as each is covered, from 0 to 1."""
        part = self.pixels[top : top + cover.shape[0], left : left + cover.shape[1]]
        part += cover[..., None] * (colour(ink) - part)

    def stroke(self, strokes: Iterable[Sequence[Point]], width: float, ink: str, opacity: float, clip: Box) -> None:
        """Draw lines with round ends; where they cross each other, they are not darker."""
        reach = width * SCALE / 2 + 0.5
        rows = [SCALE * np.asarray(points, dtype=np.float64) for points in strokes if points]
        if not rows:
            return
        low, high = np.min([row.min(0) for row in rows], 0) - reach, np.max([row.max(0) for row in rows], 0) + reach + 1
        left, top = (max(round(edge * SCALE), int(least)) for edge, least in zip(clip[:2], low, strict=True))
        right, bottom = (min(round(edge * SCALE), int(most)) for edge, most in zip(clip[2:], high, strict=True))
        cover = np.zeros((max(0, bottom - top), max(0, right - left)), dtype=np.float32)
        for row in rows:
            points = (row - (left, top)).tolist()
            for start, end in zip(points, points[1:] or points, strict=False):
                _cover_segment(cover, start, end, reach)
        self._blend(opacity * cover, ink, left, top)

    def fill(self, box: Box, ink: str, opacity: float) -> None:
        """Fill a rectangle."""
        left, top, right, bottom = (round(edge * SCALE) for edge in box)
        self._blend(np.full((bottom - top, right - left), opacity, dtype=np.float32), ink, left, top)

    def png(self) -> bytes:
        """Return the picture as a PNG file."""
        rows = np.rint(self.pixels).astype(np.uint8)
        height, width, _ = rows.shape
        data = np.concatenate([np.zeros((height, 1), np.uint8), rows.reshape(height, -1)], axis=1).tobytes()
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits of red, green and blue
        parts = ((b"IHDR", head), (b"IDAT", zlib.compress(data, 6)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _cover_segment(cover: npt.NDArray[np.float32], a: Sequence[float], b: Sequence[float], reach: float) -> None:
    """Cover the pixels whose centres are nearer to a line from a to b than `reach`, the last pixel of it in part."""
    height, width = cover.shape
    left, right = int(max(0, min(a[0], b[0]) - reach)), int(min(width, max(a[0], b[0]) + reach + 1))
    top, bottom = int(max(0, min(a[1], b[1]) - reach)), int(min(height, max(a[1], b[1]) + reach + 1))
    if left >= right or top >= bottom:
        return
    x, y = np.arange(left, right) + 0.5 - a[0], (np.arange(top, bottom) + 0.5 - a[1])[:, None]
    dx, dy = b[0] - a[0], b[1] - a[1]
    along = np.clip((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-9), 0.0, 1.0)
    near = np.clip(reach - np.hypot(x - along * dx, y - along * dy), 0.0, 1.0)
    part = cover[top:bottom, left:right]
    np.maximum(part, near, out=part, casting="same_kind")


def _text(canvas: Canvas, element: ElementTree.Element) -> None:
    size = float(element.get("font-size", FONT_SIZE))
    strokes, width = lines(element.text or "", size)
    x = float(element.get("x", 0)) - width * {"middle": 0.5, "end": 1.0}.get(element.get("text-anchor", ""), 0.0)
    y = float(element.get("y", 0))
    moved = [[(x + at, y + down) for at, down in stroke] for stroke in strokes]
    canvas.stroke(moved, size * (BOLD if element.get("font-weight") else THIN), element.get("fill", INK), 1, EVERYWHERE)


def _rectangle(canvas: Canvas, element: ElementTree.Element) -> None:
    x, y = float(element.get("x", 0)), float(element.get("y", 0))
    whole = element.get("width") == "100%"
    box = EVERYWHERE if whole else (x, y, x + float(element.get("width", 0)), y + float(element.get("height", 0)))
    canvas.fill(box, element.get("fill", INK), float(element.get("fill-opacity", 1)))


def _line(canvas: Canvas, element: ElementTree.Element, strokes: list[list[Point]]) -> None:
    clip = INSIDE if element.get("clip-path") else EVERYWHERE
    ink, opacity = element.get("stroke", INK), float(element.get("opacity", 1))
    canvas.stroke(strokes, float(element.get("stroke-width", 1)), ink, opacity, clip)


def _ring(x: float, y: float, radius: float) -> list[Point]:
    angles = np.linspace(0, 2 * np.pi, 33)
    return [(x + radius * float(np.cos(angle)), y + radius * float(np.sin(angle))) for angle in angles]


def png(picture: str) -> bytes:
    """Return the picture of `plot.svg` as a PNG file."""
    canvas = Canvas(WIDTH, HEIGHT)
    for element in ElementTree.fromstring(picture):
        kind = element.tag.rpartition("}")[2]
        if kind == "path":
            _line(canvas, element, path_lines(element.get("d", "")))
        elif kind == "circle":
            x, y, radius = (float(element.get(name, 0)) for name in ("cx", "cy", "r"))
            _line(canvas, element, [_ring(x, y, radius)])
        elif kind == "text":
            _text(canvas, element)
        elif kind == "rect":
            _rectangle(canvas, element)
    return canvas.png()
