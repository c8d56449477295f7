"""Files on disk: written whole or not at all, and read with one error that names the file.

Standard library only: training and export both use this.
"""

import json
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Kind = type | tuple[type, ...]
NUMBER = (int, float)


class FileError(ValueError):
    """A file cannot be read or written, or holds something else; the message names it."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a temporary file beside `path`, then rename it: readers see the old file or the new one.

    Missing parent folders are made. A link is followed. What was written is on the disk before the old file goes, so that a
    power cut leaves one of the two whole. Raises FileError naming `path` when it cannot be written.
    """
    try:
        place = path.resolve()
        require_replaceable(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=place.parent, prefix=f".{place.name}.", suffix=".partial"
        )
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(_usual_mode())
            _sync(temporary)
            temporary.replace(place)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(place.parent)
    # Torch says a full disk with a RuntimeError
    except (OSError, RuntimeError) as error:
        raise FileError(f"{path}: cannot be written ({reason_of(error)})") from error


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all. Raises FileError."""
    write_atomically(path, lambda temporary: _write_utf8(temporary, text))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all. Raises FileError."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def _write_utf8(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing. Raises FileError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"{path}: cannot be made a folder ({reason_of(error)})"
        ) from error


def require_replaceable(path: Path) -> None:
    """Raises FileError where `path` is something that a file must not replace: a folder, a device, a pipe."""
    if path.exists() and not path.is_file():
        raise FileError(
            f"{path}: is a folder, a device or a pipe; name a file to write"
        )


def require_readable(path: Path) -> None:
    """Raises FileError unless `path` is a regular file: a pipe would wait for a writer for ever."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise FileError(f"{path}: {reason_of(error)}") from error
    if not stat.S_ISREG(mode):
        raise FileError(f"{path}: is not a regular file")


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. Raises FileError."""
    require_readable(path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(
            f"{path}: cannot be read as text ({reason_of(error)})"
        ) from error


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises FileError for a missing or damaged one."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FileError(f"{path}: is not JSON ({reason_of(error)})") from error


def require_entries(
    value: Any, kinds: Mapping[str, Kind], where: str
) -> dict[str, Any]:
    """`value` as a dictionary that has every entry of `kinds`, each of its type. True and False are not numbers.

    Raises FileError naming `where`, the entry and what it should be.
    """
    if not isinstance(value, dict):
        raise FileError(f"{where}: holds {_short(value)}, not named entries")
    for name, kind in kinds.items():
        if name not in value:
            raise FileError(f"{where}: has no entry {name!r}")
        found = value[name]
        is_stray_bool = isinstance(found, bool) and kind is not bool
        if is_stray_bool or not isinstance(found, kind):
            raise FileError(
                f"{where}: entry {name!r} is {_short(found)}, not {_name_of(kind)}"
            )
    return value


def _name_of(kind: Kind) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join("null" if one is type(None) else one.__name__ for one in kinds)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def reason_of(error: BaseException) -> str:
    """One line that says why: the system's own words for an OSError, else the first line of the message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Folders of some systems cannot be opened for it."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def _usual_mode() -> int:
    """The mode that a new file gets: temporary files are for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
