"""Where compiled libraries are kept, and which of them may be loaded.

A library is code: whoever can write it, or a folder on the way to it, runs what he likes as this user. So a folder counts
only when it is a real one of this user that nobody else can write, with all folders above it; a library only when it is a
regular file of this user whose contents have the SHA-256 that its name carries:

    <name>-<64 hexadecimal digits>.so

Name and contents are written by one rename, so they cannot disagree, whoever builds beside us. What is damaged, cut off or
another user's is built again and never loaded (mapping a file that is cut off can end the process).

Places, in this order: the user's cache folder; beside the sources (a clone, a virtual environment), where whoever owns the
sources may own the library too, and where the user's own group, which has no other member, may write (some systems install
so); the user's runtime folder; a private temporary folder, which child processes share through
the variable EDGEQAT_TEMPORARY and which goes when the process that made it ends. Where the operating system has no user ids,
owners and modes are not looked at.
"""

import atexit
import contextlib
import hashlib
import os
import re
import shutil
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import util
from pathlib import Path
from types import FrameType

TEMPORARY = "EDGEQAT_TEMPORARY"
FOLDER = "edgeqat"
STAGING = ".making-"
STALE = 24 * 3600  # seconds after which what a killed compiler left is removed
ROOM = 4 << 20  # bytes that a folder must still take before a compiler runs there
BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class PlaceError(OSError):
    """A folder or file that cannot be trusted or used; the message names it and says why."""


@dataclass(frozen=True)
class _Place:
    """One candidate. missing: the folders, outermost first, that may be made for it. shared: lies beside the sources, so that
    their owner may own it; its mode is left as it is."""

    path: Path
    missing: tuple[Path, ...] = ()
    shared: bool = False

    def owners(self) -> set[int]:
        return {_user(), _owner_of_code()} if self.shared else {_user()}


def library(name: str, beside: Path, make: Callable[[Path], None]) -> Path:
    """Path of the library `name` ("kernels-1a2b.so": stem and hash of all that it is made of), made now where there is none.

    beside: folder of its sources. make: compiles it into the file it is given, whose folder is its own to use; what it raises
    other than OSError ends the search, unless the folder is full.
    Raises PlaceError when no folder can hold it.
    """
    for place in _places(beside):
        found = _found(place, name)
        if found is not None:
            return found
    refused: list[str] = []
    for place in _places(beside):
        made = _made(place, name, make, refused)
        if made is not None:
            return made
    try:
        return make_library(_temporary_folder(), name, make)
    except OSError as error:
        refused.append(_reason(error))
    raise PlaceError(
        f"no folder can hold compiled libraries ({'; '.join(refused)}); "
        "set XDG_CACHE_HOME to a folder that only you can write"
    )


def make_library(folder: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Make the library `name` in an existing `folder`, whoever else does so at the same time; returns its path.

    Damaged ones of that name are removed. Raises OSError, and what `make` raises.
    """
    _remove_stale(folder)
    with tempfile.TemporaryDirectory(
        dir=folder, prefix=STAGING, ignore_cleanup_errors=True
    ) as staging:
        _require_room(Path(staging))
        made = Path(staging) / name
        make(made)
        made.chmod(0o644)
        path = folder / _named(name, _digest(made))
        _flush(made)
        made.replace(path)
    _flush(folder)
    for other in _libraries(folder, name):
        if other != path and not _is_good(other, name, {_user(), _owner_of_code()}):
            _unlink(other)
    return path


def cache_folder() -> Path | None:
    """The user's cache folder of edgeqat, whether it exists or not; None where there is no home folder."""
    base = _cache_base()
    return None if base is None else base / FOLDER


def distrust(folder: Path) -> str | None:
    """Why programs in an existing `folder` should not be run, or None: it or a folder above it is another user's, or others
    can write it."""
    try:
        _trusted_above(folder / "program", {_user(), _owner_of_code()})
    except OSError as error:
        return _reason(error)
    return None


def _places(beside: Path) -> Iterator[_Place]:
    base = _cache_base()
    if base is not None:
        named = "XDG_CACHE_HOME" in os.environ
        above = [
            folder for folder in reversed(base.parents) if named and not folder.exists()
        ]
        yield _Place(base / FOLDER, (*above, base, base / FOLDER))
    yield _Place(beside, shared=True)
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if Path(runtime).is_absolute():
        folder = Path(runtime) / FOLDER
        yield _Place(folder, (folder,))
    temporary = os.environ.get(TEMPORARY, "")
    if Path(temporary).is_absolute():
        yield _Place(Path(temporary))


def _cache_base() -> Path | None:
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():  # by the XDG specification a relative one does not count
        return named
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return None


def _found(place: _Place, name: str) -> Path | None:
    try:
        folder = _trusted(place)
        candidates = _libraries(folder, name)
    except (OSError, ValueError):
        return None
    return next(
        (
            path
            for path in candidates
            if _is_good(path, name, place.owners(), place.shared)
        ),
        None,
    )


def _made(
    place: _Place, name: str, make: Callable[[Path], None], refused: list[str]
) -> Path | None:
    """The library made in `place`, or None and a reason more in `refused`."""
    try:
        _create(place)
        folder = _trusted(place)
        _require_ours(folder)
        return make_library(folder, name, make)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        refused.append(_reason(error))
        return None
    except Exception:
        try:
            _require_room(folder)
        except OSError as error:  # the compiler failed for want of room
            refused.append(_reason(error))
            return None
        raise


def _create(place: _Place) -> None:
    """Make the folders of `place` that are missing, for this user alone, unless others can write one above them."""
    for folder in place.missing:
        if not folder.is_dir():
            _trusted_above(folder, place.owners())
            folder.mkdir(mode=0o700, exist_ok=True)


def _trusted(place: _Place) -> Path:
    """The folder of `place` without links on the way. Raises PlaceError saying why libraries in it may not be loaded.

    A folder of ours that others could write is closed to them; libraries in it may be theirs, so they go.
    """
    status = place.path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise PlaceError(f"{place.path}: is a link or a file, not a folder")
    folder = place.path.resolve()
    _trusted_above(folder, place.owners())
    if not _has_owners():
        return folder
    if status.st_uid not in place.owners():
        raise PlaceError(f"{folder}: belongs to another user")
    if place.shared and _others_can_write(status):
        raise PlaceError(f"{folder}: others can write it")
    if not place.shared and status.st_mode & BY_OTHERS:
        folder.chmod(0o700)
        for path in folder.glob("*.so"):
            _unlink(path)
    elif not place.shared and status.st_mode & 0o077:
        # A read-only folder that others can only read will do
        with contextlib.suppress(OSError):
            folder.chmod(0o700)
    if _forbids_loading(folder):
        raise PlaceError(f"{folder}: its file system is mounted noexec")
    return folder


def _trusted_above(folder: Path, owners: set[int]) -> None:
    """Raises PlaceError where another user can replace a folder above `folder`."""
    if not _has_owners():
        return
    above = folder.resolve().parents
    # Whoever owns "/" (in some containers not user 0) can do all that he likes already.
    allowed = owners | {0, above[-1].stat().st_uid}
    for parent in above:
        status = parent.stat()
        if status.st_uid not in allowed:
            raise PlaceError(f"{folder}: {parent} above it belongs to another user")
        if _others_can_write(status) and not status.st_mode & stat.S_ISVTX:
            raise PlaceError(f"{folder}: others can write {parent} above it")


def _others_can_write(status: os.stat_result) -> bool:
    """Whether anybody but the owner and the user can, which a group of the user's own does not make true."""
    by_others = stat.S_IWOTH if _is_own_group(status.st_gid) else BY_OTHERS
    return bool(status.st_mode & by_others)


def _is_own_group(group: int) -> bool:
    """Whether `group` is the one that many systems make for a single user, who is its one member."""
    import grp
    import pwd

    try:
        user, found = pwd.getpwuid(_user()), grp.getgrgid(group)
    except KeyError:
        return False
    members_beside = set(found.gr_mem) - {user.pw_name}
    return group == user.pw_gid and found.gr_name == user.pw_name and not members_beside


def _require_ours(folder: Path) -> None:
    if _has_owners() and folder.stat().st_uid != _user():
        raise PlaceError(f"{folder}: belongs to another user")
    if not os.access(folder, os.W_OK):
        raise PlaceError(f"{folder}: cannot be written")


def _require_room(folder: Path) -> None:
    """Raises OSError where `folder` takes no file of ROOM bytes. Free space is not asked: quotas are not in it."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"\0" * ROOM)
        probe.flush()
        os.fsync(probe.fileno())


def _forbids_loading(folder: Path) -> bool:
    flag = getattr(os, "ST_NOEXEC", 0)
    return bool(flag) and bool(os.statvfs(folder).f_flag & flag)


def _named(name: str, digest: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}-{digest}{dot}{suffix}"


def _libraries(folder: Path, name: str) -> list[Path]:
    """Files in `folder` that are named as versions of the library `name`."""
    head, tail = _named(name, "|").split("|")
    pattern = re.compile(rf"{re.escape(head)}[0-9a-f]{{64}}{re.escape(tail)}")
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))


def _is_good(path: Path, name: str, owners: set[int], shared: bool = False) -> bool:
    """Whether `path` is a regular file of one of `owners`, not writable by others, with the contents that it is named for.
    shared: it was installed with the sources, so that the user's own group may write it."""
    try:
        return path.name == _named(name, _digest(path, owners, shared))
    except OSError:
        return False


def _digest(path: Path, owners: set[int] | None = None, shared: bool = False) -> str:
    """SHA-256 of a file that `owners` may have written, and the user's own group if it is `shared`.

    The checks are of the file that is read: it is opened once, and no link, pipe or device is waited for.
    """
    flags = (
        os.O_RDONLY
        | getattr(os, "O_NOFOLLOW", 0)
        | getattr(os, "O_NONBLOCK", 0)
        | getattr(os, "O_BINARY", 0)
    )
    descriptor = os.open(path, flags)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PlaceError(f"{path}: is not a regular file")
        if owners is not None and _has_owners():
            if status.st_uid not in owners:
                raise PlaceError(f"{path}: belongs to another user")
            by_group = shared and not _others_can_write(status)
            if status.st_mode & BY_OTHERS and not by_group:
                raise PlaceError(f"{path}: others can write it")
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have what was written to a file or a folder reach the disk; folders only where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _remove_stale(folder: Path) -> None:
    """Remove the temporary files of builds that were killed."""
    oldest = time.time() - STALE
    for path in folder.glob(f"{STAGING}*"):
        with contextlib.suppress(OSError):
            if path.lstat().st_mtime < oldest:
                shutil.rmtree(path, ignore_errors=True)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _temporary_folder() -> Path:
    """A new private folder, for this process and its children; it goes when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}-"))
    maker = os.getpid()

    def remove() -> None:
        if os.getpid() == maker:  # a forked child leaves it
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    # Processes of `multiprocessing` do not run what atexit knows
    util.Finalize(None, remove, exitpriority=0)
    _before_termination(remove)
    _trusted_above(folder, {_user()})
    os.environ[TEMPORARY] = str(folder)
    return folder


def _before_termination(action: Callable[[], None]) -> None:
    """Run `action` before SIGTERM ends the process, where nobody else handles it."""
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return

    def stop(number: int, frame: FrameType | None) -> None:
        action()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, stop)


def _has_owners() -> bool:
    return hasattr(os, "getuid")


def _user() -> int:
    return os.getuid() if _has_owners() else 0


def _owner_of_code() -> int:
    """Whoever owns this file can already run code as this user."""
    return Path(__file__).stat().st_uid


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
