"""Text in other encodings than UTF-8, made UTF-8 while it is copied.

Which encoding a file has is for its owner to say: nothing is guessed here, and a byte that the encoding does not
have is refused with its place. What is not said is UTF-8, which documents.py checks.
"""

import codecs
from typing import BinaryIO

from storage.errors import BadName, NotLoadable
from storage.files import quoted

UTF8 = "utf-8"
ENCODINGS = (
    *(UTF8, "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "iso-8859-2", "iso-8859-5", "iso-8859-7"),
    *("iso-8859-9", "iso-8859-15", "windows-1250", "windows-1251", "windows-1252", "windows-1253", "windows-1254"),
    *("cp437", "cp850", "mac-roman", "koi8-r", "koi8-u", "shift_jis", "euc-jp", "euc-kr", "gb18030", "big5"),
)
_KNOWN = {codecs.lookup(name).name: name for name in ENCODINGS}


def check_encoding(name: object) -> str:
    """Return one of ENCODINGS by any of its names, UTF-8 for None; raises BadName."""
    if name is None:
        return UTF8
    try:
        return _KNOWN[codecs.lookup(name).name] if isinstance(name, str) and name.isascii() else _KNOWN[""]
    except (LookupError, ValueError):
        raise BadName(f"encoding is {quoted(name)}; it must be one of {', '.join(ENCODINGS)}") from None


class Transcoder:
    """Writes bytes of an encoding to a file as UTF-8, wherever they are cut."""

    def __init__(self, f: BinaryIO, encoding: str):
        self._f, self._encoding, self._consumed = f, encoding, 0
        self._decoder = codecs.getincrementaldecoder(encoding)()

    def write(self, data: bytes, final: bool = False) -> None:
        """Write the text of the next bytes, all of it if they are the last; raises NotLoadable naming a bad byte."""
        waiting = len(self._decoder.getstate()[0])  # bytes of a character that the last write cut in two
        try:
            text = self._decoder.decode(data, final)
        except UnicodeDecodeError as e:
            at = self._consumed - waiting + e.start
            raise NotLoadable(f"file is not {self._encoding} text at byte {at}") from None
        self._consumed += len(data)
        self._f.write(text.encode())
