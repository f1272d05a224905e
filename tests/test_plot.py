"""The picture of losses: what it holds, its unit, its gaps, and that it stays small and whole for any run."""

import math
import re
from xml.etree import ElementTree

import pytest

from training.plot import MOST_CURVES, Curves, Frame, labels, points, svg, thin, ticks


def rows(losses, **columns):
    return [{"iter_num": k, "loss": loss} | columns for k, loss in enumerate(losses)]


def parts(picture, tag, kind=""):
    found = ElementTree.fromstring(picture).iter(f"{{http://www.w3.org/2000/svg}}{tag}")
    return [part for part in found if kind in (part.get("class") or "").split()] if kind else list(found)


def curve(picture, kind):
    """Return the drawn lines of a class, without the legend's."""
    return [path.get("d") for path in parts(picture, "path", kind) if path.get("clip-path")]


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0, 10, 5, [0, 2, 4, 6, 8, 10]),
        (1.47, 4.2, 6, [1.5, 2, 2.5, 3, 3.5, 4]),
        (0, 100_000, 4, [0, 50_000, 100_000]),
        (0.3001, 0.3004, 3, [0.3001, 0.3002, 0.3003, 0.3004]),
        (-1, 1, 2, [-1, 0, 1]),
    ],
)
def test_ticks_are_round_numbers_inside_the_range(low, high, most, expected):
    assert ticks(low, high, most) == expected


def test_labels_have_the_same_decimals():
    assert labels([1, 1.25, 1.5]) == ["1.00", "1.25", "1.50"] and labels([1000.0, 2000.0]) == ["1,000", "2,000"]


def test_a_run_has_a_line_for_train_and_val_and_a_ring_at_the_best():
    picture = svg([Curves("mine", [(0, 4.0), (10, 2.0)], [(0, 4.1), (5, 2.5), (10, 2.7)])])
    (train,), (val,), (ring,) = curve(picture, "train"), curve(picture, "val"), parts(picture, "circle")
    assert train.count("L") == 1 and val.count("L") == 2
    assert f"L{float(ring.get('cx')):.1f} {float(ring.get('cy')):.1f}" in val
    assert "val: best 2.5000 at 5" in picture and "nats per token" in picture


def test_a_lower_loss_is_lower_in_the_picture_and_a_later_one_further_right():
    frame = Frame(100, 1.0, 3.0)
    assert frame.y(1.5) > frame.y(2.5) and frame.x(90) > frame.x(10)


def test_a_loss_that_is_no_number_is_a_gap():
    picture = svg([Curves.of("mine", rows([3.0, 2.0, None, math.nan, 1.5, 1.4]))])
    (train,) = curve(picture, "train")
    assert train.count("M") == 2 and "nan" not in picture


def test_a_column_that_a_row_lacks_is_no_gap():
    assert points(
        [{"iter_num": 0, "val_loss": 4.0}, {"iter_num": 1}, {"iter_num": 2, "val_loss": 3.0}], "val_loss"
    ) == [
        (0, 4.0),
        (2, 3.0),
    ]


def test_a_run_without_losses_says_so():
    assert "no losses yet" in svg([Curves("mine")])
    assert "no losses yet" in svg([Curves.of("mine", rows([None]))])


@pytest.mark.parametrize("losses", [[2.0], [2.0, 2.0], [0.0], [1e9], [1e-12, 2e-12]])
def test_single_and_equal_losses_are_drawn(losses):
    picture = svg([Curves.of("mine", rows(losses))])
    assert curve(picture, "train") and not re.search(
        r"nan|inf[^e]", picture.partition("</style>")[2].replace("inside", "")
    )


def test_a_long_run_makes_a_small_picture_that_keeps_its_extremes():
    losses = [5 - k / 50_000 for k in range(100_000)]
    losses[12_345], losses[70_000] = 6.5, 1.25
    kept = thin(list(enumerate(losses)), 100_000)
    assert (12_345, 6.5) in kept and (70_000, 1.25) in kept and len(kept) < 1000
    assert [at for at, _ in kept] == sorted(at for at, _ in kept)
    assert len(svg([Curves.of("mine", rows(losses))])) < 40_000


def test_thinning_keeps_gaps():
    losses = [None if 30_000 < k < 40_000 else 2.0 for k in range(100_000)]
    (train,) = curve(svg([Curves.of("mine", rows(losses))]), "train")
    assert train.count("M") == 2


def test_a_spike_does_not_flatten_the_rest():
    frame = Frame.around([Curves.of("mine", rows([4.0, 3.0, 1e30, 2.0]))])
    assert frame.high < 7 and abs(frame.y(1e30)) < 10_000


def test_several_runs_have_a_colour_and_a_legend_each():
    picture = svg([Curves(f"run{k}", [(0, 4.0), (9, 3.0)], [(9, 3.5 - k / 10)]) for k in range(MOST_CURVES)])
    assert len(parts(picture, "circle")) == MOST_CURVES
    assert all(
        f"run{k}: best {3.5 - k / 10:.4f} at 9" in picture and curve(picture, f"c{k}") for k in range(MOST_CURVES)
    )


def test_runs_with_different_tokens_are_compared_in_bits_per_byte():
    evaluated = {"val_loss": 2.0, "val_bits_per_byte": 2.5}
    picture = svg(
        [
            Curves.of("chars", rows([2.0], **evaluated)),
            Curves.of("words", rows([4.0], val_loss=4.0, val_bits_per_byte=1.5)),
        ]
    )
    assert "bits per byte" in picture and "chars: best 2.5000" in picture and "words: best 1.5000" in picture
    assert "nats per token" in svg([Curves.of(name, rows([2.0], **evaluated)) for name in "ab"])


def test_names_are_escaped_and_shortened():
    picture = svg([Curves("<b>&" + "x" * 60, [(0, 1.0)])])
    assert "&lt;b&gt;&amp;" in picture and "x" * 30 not in picture.partition("</title>")[2]


def test_it_can_be_read_without_its_style_sheet():
    for path in parts(svg([Curves("mine", [(0, 2.0), (1, 1.0)])]), "path"):
        assert path.get("stroke", "").startswith("#")
