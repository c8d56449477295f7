"""Opens image files: regular files of a few named formats, of a bounded size, as RGB.

Pixels are those of `PIL.Image.open(path).convert("RGB")`, as torchvision's ImageFolder has them: the first frame,
transparency dropped, the camera's orientation not applied. Greys of 16 bits are an exception. Pillow clips them at 255,
which leaves white; here they are read by their high byte, as pillow reads colours of 16 bits.
"""

import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 178_956_970  # where pillow itself stops by default
MAX_BYTES = 1 << 30
UPRIGHT = 1  # orientation of pixels that are stored as they are shown


class ImageError(ValueError):
    """A file cannot be read as an image; the message names it and says why."""


def open_image(path: Path) -> Image.Image:
    """The image in the file `path`, RGB, decoded. Raises ImageError."""
    with _opened(path) as image:
        return _as_rgb(image)


@dataclass(frozen=True)
class ImageHeader:
    """What a file says of its image before it is decoded.

    mode: pillow's name for its pixels ("RGB", "L", "P", "CMYK", "I;16"). transparent: whether pixels may be.
    turned: whether the camera's orientation asks viewers to turn or mirror the stored pixels.
    """

    mode: str
    transparent: bool
    turned: bool


def image_header(path: Path) -> ImageHeader:
    """Mode, transparency and orientation of the image in the file `path`. Raises ImageError."""
    with _opened(path) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
        return ImageHeader(
            image.mode, image.has_transparency_data, orientation != UPRIGHT
        )


def _as_rgb(image: Image.Image) -> Image.Image:
    if not image.mode.startswith("I;16"):
        return image.convert("RGB")
    high_byte = (np.asarray(image) >> 8).astype(np.uint8)
    return Image.fromarray(high_byte).convert("RGB")


def check_image(path: Path) -> None:
    """Raises ImageError where `open_image` would, in less time."""
    with _opened(path) as image:
        # A JPEG decodes to an eighth of its size: a truncated one fails, quickly
        image.draft("RGB", (8, 8))
        image.load()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    with (
        _errors_of(path),
        _regular_file(path) as file,
        _without_warnings(),
        Image.open(file, formats=FORMATS) as image,
    ):
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ImageError(
                f"{path}: has {width:,} × {height:,} pixels; at most {MAX_PIXELS:,} are read"
            )
        yield image


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Every error names the file. On damaged bytes decoders raise almost anything, so almost anything is caught."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(
            f"{path}: not a readable image (no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file)"
        ) from None
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{path}: not a readable image (at most {MAX_PIXELS:,} pixels are read: {error})"
        ) from error
    except OSError as error:
        raise ImageError(
            f"{path}: not a readable image ({error.strerror or error})"
        ) from error
    except Exception as error:
        raise ImageError(
            f"{path}: not a readable image ({type(error).__name__}: {error})"
        ) from error


@contextmanager
def _regular_file(path: Path) -> Iterator[BinaryIO]:
    """`path`, opened. A pipe would wait for its writer for ever, and a device may act when it is opened."""
    _require_regular(path, path.stat())
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        _require_regular(path, status)
        if status.st_size > MAX_BYTES:
            raise ImageError(
                f"{path}: has {status.st_size:,} bytes; at most {MAX_BYTES:,} are read"
            )
        yield file


def _require_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{path}: not a readable image (not a regular file)")


_lock = threading.Lock()
_readers = 0
_quiet = warnings.catch_warnings()


@contextmanager
def _without_warnings() -> Iterator[None]:
    """No warnings of pillow's about what it meets in a file, while any thread reads one: filters are the whole process's."""
    global _readers, _quiet
    with _lock:
        if _readers == 0:
            _quiet = warnings.catch_warnings()
            _quiet.__enter__()
            warnings.simplefilter("ignore")
        _readers += 1
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if _readers == 0:
                _quiet.__exit__(None, None, None)
