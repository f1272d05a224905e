"""Letters as strokes, drawn for the pictures of raster.py: no font is needed, and none is read.

A glyph is a few strokes, each a row of points; a point is two digits, x to the right and y downwards. Capitals stand
from y 0 to 6, small letters begin at 2, and what hangs below the line goes to 8. Most glyphs are 4 wide.
"""

GLYPHS = {
    " ": "",
    "0": "103041453616050110",
    "1": "112026 1636",
    "2": "01103041420646",
    "3": "0110304142334445361605 1333",
    "4": "300444 3036",
    "5": "40000312324345361605",
    "6": "413010010516364544331304",
    "7": "004016",
    "8": "13020110304142331304051636454433",
    "9": "051636454130100102133342",
    "A": "062046 1434",
    "B": "06003041423303 3344453606",
    "C": "4130100105163645",
    "D": "00062644422000",
    "E": "40000646 0333",
    "F": "400006 0333",
    "G": "41301001051636454323",
    "H": "0006 4046 0343",
    "I": "0020 1016 0626",
    "J": "4045361605",
    "K": "0006 4004 1346",
    "L": "000646",
    "M": "0600234046",
    "N": "06004640",
    "O": "103041453616050110",
    "P": "06003041423303",
    "Q": "103041453616050110 2446",
    "R": "06003041423303 2346",
    "S": "413010010213334445361605",
    "T": "0040 2026",
    "U": "000516364540",
    "V": "002640",
    "W": "0016233640",
    "X": "0046 4006",
    "Y": "002340 2326",
    "Z": "00400646",
    "a": "4332120305163645 4246",
    "b": "0006 0312324345361605",
    "c": "4332120305163645",
    "d": "4046 4332120305163645",
    "e": "04444332120305163645",
    "f": "30201116 0232",
    "g": "4332120305163645 4247381807",
    "h": "0006 0312324346",
    "i": "0206 0000",
    "j": "121708 1010",
    "k": "0006 3205 1436",
    "l": "0006",
    "m": "0206 0312223336 3342526366",
    "n": "0206 0312324346",
    "o": "123243453616050312",
    "p": "0208 0312324345361605",
    "q": "4248 4332120305163645",
    "r": "0206 03122232",
    "s": "43321203143445361605",
    "t": "10152636 0232",
    "u": "0205163645 4246",
    "v": "022642",
    "w": "0216335662",
    "x": "0246 4206",
    "y": "0226 421808",
    "z": "02420646",
    ".": "0606",
    ",": "1607",
    ":": "0303 0606",
    "-": "0434",
    "_": "0747",
    "·": "0404",
    "…": "0606 2626 4646",
}
UNKNOWN = "0040460600"  # a box
SPACE, GAP, NARROW, BASE = 2.0, 2.0, 0.0875, 6  # widths in units of x; a unit of x, and the line that letters stand on
TALL = 0.12  # a unit of y; both in parts of the font's size

Point = tuple[float, float]


def _strokes(glyph: str) -> list[list[Point]]:
    return [[(int(s[i]), int(s[i + 1])) for i in range(0, len(s), 2)] for s in GLYPHS.get(glyph, UNKNOWN).split()]


def lines(text: str, size: float) -> tuple[list[list[Point]], float]:
    """Return the strokes of a text that begins at (0, 0), on the line it stands on, and its width; in pixels."""
    found, at = [], 0.0
    for glyph in text:
        strokes = _strokes(glyph)
        found += [[((at + x) * NARROW * size, (y - BASE) * TALL * size) for x, y in stroke] for stroke in strokes]
        at += GAP + max((x for stroke in strokes for x, _ in stroke), default=SPACE)
    return found, max(0.0, at - GAP) * NARROW * size
