"""The picture as pixels: what another library reads from the PNG is what the SVG says."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from training.plot import COLOURS, HEIGHT, WIDTH, Curves, Frame, svg
from training.raster import SCALE, Canvas, colour, path_lines, png
from training.strokes import GLYPHS, lines

RUN = Curves("mine", [(0, 4.0), (10, 2.0)], [(0, 4.1), (5, 2.5), (10, 2.7)])
WHITE = [255, 255, 255]


def pixels(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        assert image.mode == "RGB"
        return np.asarray(image).astype(int)


def test_the_picture_has_the_size_of_the_drawing_twice_and_the_curves_where_they_are():
    found = pixels(png(svg([RUN])))
    assert found.shape == (SCALE * HEIGHT, SCALE * WIDTH, 3) and found[5, 5].tolist() == WHITE
    frame = Frame.around([RUN])
    for at, loss in ((2.5, 3.3), (7.5, 2.6)):  # on the lines between the validation losses
        x, y = round(frame.x(at) * SCALE), round(frame.y(loss) * SCALE)
        assert np.abs(found[y, x] - colour(COLOURS[1])).max() < 60


def test_every_glyph_that_a_picture_needs_has_strokes_and_another_is_a_box():
    named = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
    used = "".join(re.findall(r">([^<]+)</text>", svg([RUN, RUN]) + svg([])))
    assert set(named + used + "…·") <= GLYPHS.keys()
    assert lines("é", 12)[0] == lines("ü", 12)[0] != lines("e", 12)[0]
    assert all(len(stroke) > 0 for glyph in GLYPHS.values() for stroke in [glyph.replace(" ", "")] if glyph)
    assert all(len(stroke) % 2 == 0 and stroke.isdigit() for glyph in GLYPHS.values() for stroke in glyph.split())


def test_texts_are_as_long_as_their_letters_and_stand_where_they_are_anchored():
    assert lines("", 12) == ([], 0.0) and lines("ab", 24)[1] == 2 * lines("ab", 12)[1] > lines("a", 24)[1]
    found = {}
    for anchor in ("start", "end"):
        text = f'<svg xmlns="http://www.w3.org/2000/svg"><text x="300" y="100" text-anchor="{anchor}">HH</text></svg>'
        found[anchor] = np.flatnonzero((pixels(png(text)) < 200).any(axis=(0, 2))) / SCALE
    assert found["start"].min() >= 299 and found["end"].max() <= 301


def test_a_path_is_read_as_it_is_written():
    assert path_lines("M1 2h0L3.5 4M5 6H7v8") == [[(1, 2), (1, 2), (3.5, 4)], [(5, 6), (7, 6), (7, 14)]]


@pytest.mark.parametrize(
    "curves", [[], [Curves("a")], [Curves("a", [(0, 1.0)])], [RUN] * 6, [Curves("é" * 64, [(0, 1e300), (1, 1.0)])]]
)
def test_any_run_has_a_picture(curves):
    found = pixels(png(svg(curves)))
    assert 100 < (found != WHITE).any(axis=2).sum() < found.size / 6


def test_a_line_is_smooth_and_ends_where_the_picture_does():
    canvas = Canvas(20, 20)
    canvas.stroke([[(-50, 5), (90, 15)], [(4, 4)], []], 2.0, "#000", 0.5, (0, 0, 20, 20))
    canvas.stroke([[(100, 100), (120, 100)]], 2.0, "#000", 1.0, (0, 0, 20, 20))
    shades = np.unique(pixels(canvas.png()))
    assert shades.min() == 128 and len(shades) > 10
