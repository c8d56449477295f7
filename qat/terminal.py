"""Text for the terminal. What comes from files, folders and messages of other libraries cannot steer it.

A name may hold control characters (colours, cursor movements, titles, line breaks) or marks that reverse the order of
letters; each is shown as an escape instead: \\x1b, \\u202e.
"""

import re
import sys
from collections.abc import Iterable
from typing import TextIO

BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
BREAKS = "\u2028\u2029"  # of lines and paragraphs
INVISIBLE = "\u200b\u2060\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
HALVES = "\ud800-\udfff"  # what a file name holds in place of bytes that are not UTF-8; cannot be written anywhere
_UNPRINTABLE = re.compile(f"[\x00-\x1f\x7f-\x9f{BIDI}{BREAKS}{INVISIBLE}{HALVES}]")


def printable(text: object, *, newlines: bool = False) -> str:
    """`text` with every character that steers a terminal, or is invisible, as an escape.

    newlines: leave line feeds as they are; for text of several lines, not for a name within a line.
    """

    def escaped(found: re.Match[str]) -> str:
        code = ord(found[0])
        if newlines and found[0] == "\n":
            return "\n"
        if code < 0x100:
            return f"\\x{code:02x}"
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return _UNPRINTABLE.sub(escaped, str(text))


def in_lines(lines: Iterable[object]) -> str:
    """One line each, whatever they hold."""
    return "\n".join(map(printable, lines))


def say(text: object = "", *, file: TextIO | None = None) -> None:
    """Print `text`, which may have several lines, at once. `file`: standard output, unless given. A character that the
    terminal's encoding lacks is shown as an escape."""
    stream = sys.stdout if file is None else file
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = printable(text, newlines=True).encode(encoding, "backslashreplace").decode(encoding)
    print(shown, file=stream, flush=True)
