"""Text for the terminal. What comes from files, folders and messages of other libraries cannot steer it.

A name may hold control characters (colours, cursor movements, titles, line breaks) or marks that reverse the order of
letters; each is shown as an escape instead: \\x1b, \\u202e.
"""

import sys
import unicodedata
from collections.abc import Iterable
from typing import TextIO

# Unicode's categories of control characters, formats (marks of direction, invisible letters), halves of surrogate pairs (what
# a file name holds in place of bytes that are not UTF-8), and separators of lines and paragraphs.
STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")
WITHIN_WORDS = "\u00ad\u200c\u200d"  # soft hyphen and joiners


def printable(text: object, *, newlines: bool = False) -> str:
    """`text` with every character that steers a terminal, or is invisible, as an escape.

    newlines: leave line feeds as they are; for text of several lines, not for a name within a line.
    """

    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(
        _escaped(letter) if _steers(letter, newlines) else letter for letter in plain
    )


def _steers(letter: str, newlines: bool) -> bool:
    if letter == "\n":
        return not newlines
    return unicodedata.category(letter) in STEERING and letter not in WITHIN_WORDS


def _escaped(letter: str) -> str:
    code = ord(letter)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def in_lines(lines: Iterable[object]) -> str:
    """One line each, whatever they hold."""
    return "\n".join(map(printable, lines))


def say(text: object = "", *, file: TextIO | None = None) -> None:
    """Print `text`, which may have several lines, at once. `file`: standard output, unless given. A character that the
    terminal's encoding lacks is shown as an escape."""
    stream = sys.stdout if file is None else file
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = (
        printable(text, newlines=True)
        .encode(encoding, "backslashreplace")
        .decode(encoding)
    )
    print(shown, file=stream, flush=True)
