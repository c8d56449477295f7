"""One door for image files: what ordinary ones hold is unchanged; all others are one error that names the file."""

import os
import socket
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from edgeqat import images
from edgeqat.images import ImageError, ImageHeader, check_image, image_header, open_image
from export.lowered import ExportError
from export.predict import preprocess
from qat.domains.batches import EvalImages
from qat.domains.domainnet import _check_jpegs
from qat.domains.folders import DataError, FolderImages, check_readable, read_domains
from qat.domains.splits import Subset

ROOT = Path(__file__).parent.parent


def picture(mode: str) -> Image.Image:
    ramp = np.arange(48 * 64, dtype=np.int64).reshape(48, 64)
    if mode == "I;16":
        return Image.fromarray((ramp * 20).astype(np.uint16))
    colours = np.stack([ramp % 251, ramp % 199, ramp % 97], axis=-1).astype(np.uint8)
    return Image.fromarray(colours).convert(mode)


ORDINARY = [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("RGB", "png"), ("RGBA", "png"), ("LA", "png"), ("P", "png"),
            ("1", "png"), ("RGB", "webp"), ("RGBA", "webp")]  # fmt: skip


@pytest.mark.parametrize(("mode", "suffix"), ORDINARY)
def test_pixels_are_those_of_pillow(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    picture(mode).save(path)
    with Image.open(path) as plain:
        expected = np.asarray(plain.convert("RGB"))
    found = open_image(path)
    assert found.mode == "RGB" and np.array_equal(np.asarray(found), expected)
    check_image(path)


def test_greys_of_16_bits_are_read_by_their_high_byte(tmp_path: Path) -> None:
    picture("I;16").save(tmp_path / "deep.png")
    found = np.asarray(open_image(tmp_path / "deep.png"))
    for row in range(0, 48, 5):
        for column in range(64):
            grey = ((row * 64 + column) * 20) // 256
            assert found[row, column].tolist() == [grey] * 3
    assert found.max() == 239
    check_image(tmp_path / "deep.png")


def test_headers_say_what_will_be_converted(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture("RGB").save(tmp_path / "turned.jpg", exif=exif)
    exif[0x0112] = 1
    picture("CMYK").save(tmp_path / "print.jpg", exif=exif)
    picture("P").save(tmp_path / "palette.png", transparency=3)
    picture("I;16").save(tmp_path / "deep.png")
    assert image_header(tmp_path / "turned.jpg") == ImageHeader("RGB", False, True)
    assert image_header(tmp_path / "print.jpg") == ImageHeader("CMYK", False, False)
    assert image_header(tmp_path / "palette.png") == ImageHeader("P", True, False)
    assert image_header(tmp_path / "deep.png") == ImageHeader("I;16", False, False)
    (tmp_path / "text.jpg").write_text("an image")
    with pytest.raises(ImageError, match=r"text\.jpg: not a readable image"):
        image_header(tmp_path / "text.jpg")


def test_orientation_is_not_applied_and_the_first_frame_counts(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture("RGB").save(tmp_path / "turned.jpg", exif=exif, quality=100)
    assert open_image(tmp_path / "turned.jpg").size == (64, 48)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    for suffix in ("png", "webp"):
        frames[0].save(tmp_path / f"moving.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
        assert open_image(tmp_path / f"moving.{suffix}").getpixel((3, 3)) == (250, 0, 0)


def png(width: int, height: int, *further: tuple[bytes, bytes]) -> bytes:
    """A PNG file that says its size and holds no pixels worth the name."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    chunks = [
        header,
        *(chunk(*one) for one in further),
        chunk(b"IDAT", zlib.compress(b"\0" * 100)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def saved(path: Path, kind: str) -> None:
    picture("RGB").save(path, kind)


def truncated(path: Path, kind: str) -> None:
    saved(path, kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # addresses are short
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file"),
    "pipe": (os.mkfifo, "not a regular file"),
    "folder": (lambda path: path.mkdir(), "not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "socket": (listening, "not a regular file"),
    "loop": (lambda path: path.symlink_to(path), "symbolic links"),
    "empty": (lambda path: path.write_bytes(b""), "no JPEG, PNG or WEBP file"),
    "text": (lambda path: path.write_text("an image"), "no JPEG, PNG or WEBP file"),
    "gif": (lambda path: saved(path, "GIF"), "no JPEG, PNG or WEBP file"),
    "bmp": (lambda path: saved(path, "BMP"), "no JPEG, PNG or WEBP file"),
    "tiff": (lambda path: saved(path, "TIFF"), "no JPEG, PNG or WEBP file"),
    "postscript": (lambda path: saved(path, "EPS"), "no JPEG, PNG or WEBP file"),
    "half a jpeg": (lambda path: truncated(path, "JPEG"), "truncated"),
    "half a png": (lambda path: truncated(path, "PNG"), "truncated"),
    "half a webp": (lambda path: truncated(path, "WEBP"), ""),
    "bomb": (lambda path: path.write_bytes(png(50_000, 50_000)), "at most 178,956,970 pixels are read"),
    "text bomb": (
        lambda path: path.write_bytes(png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26))))), ""
    ),
    "no width": (lambda path: path.write_bytes(png(0, 8)), ""),
    "too many bytes": (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), images.MAX_BYTES + 1), "bytes"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_every_other_file_is_one_error_that_names_it(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "image.jpg"
    make, reason = BROKEN[fault]
    make(path)
    for read in (open_image, check_image):
        with pytest.raises(ImageError) as found:
            read(path)
        assert str(found.value).startswith(f"{path}: ") and reason in str(found.value), str(found.value)
    with pytest.raises(DataError, match=r"image\.jpg"):
        FolderImages((path,))[0]
    with pytest.raises(DataError, match=r"image\.jpg"):
        check_readable([path])
    with pytest.raises(DataError, match=r"image\.jpg"):
        _check_jpegs([path])
    with pytest.raises(ExportError, match=r"image\.jpg"):
        preprocess(path, {"size": 8, "mean": (0.0,) * 3, "std": (1.0,) * 3})


def test_the_limit_holds_where_pillows_own_is_lifted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "image.png").write_bytes(png(50_000, 50_000))
    with pytest.raises(ImageError, match=r"has 50,000 × 50,000 pixels; at most 178,956,970 are read"):
        open_image(tmp_path / "image.png")


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """50,000 × 50,000 pixels that are there: three megabytes on disk, 7.5 GB in memory."""
    (tmp_path / "image.png").write_bytes(png(50_000, 50_000))
    code = (
        "import resource, sys; from pathlib import Path; from edgeqat.images import ImageError, open_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: open_image(Path(sys.argv[1]))\nexcept ImageError: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    out = subprocess.check_output([sys.executable, "-c", code, str(tmp_path / "image.png")], text=True, cwd=ROOT)
    assert int(out) < 50_000  # kilobytes


def test_what_pillow_warns_of_does_not_reach_the_user(tmp_path: Path) -> None:
    palette = picture("P")
    palette.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    large = tmp_path / "large.png"
    large.write_bytes(png(10_000, 10_000))  # above the size from which pillow warns
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        open_image(tmp_path / "palette.png")
        with pytest.raises(ImageError, match="large"):
            open_image(large)
        assert warnings.filters == filters
    assert seen == []


def test_filters_are_as_before_after_many_threads(tmp_path: Path) -> None:
    picture("RGB").save(tmp_path / "image.jpg")
    filters = list(warnings.filters)
    threads = [
        threading.Thread(target=lambda: [open_image(tmp_path / "image.jpg") for _ in range(20)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == filters


def test_an_image_that_breaks_under_a_loaders_worker_is_one_line_that_names_it(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for number in range(4):
            path = tmp_path / name / "cat" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture("RGB").save(path)
    domain = read_domains(tmp_path)[0]
    (tmp_path / "a/cat/2.png").write_bytes(b"\x89PNG")

    def transform(image: Image.Image) -> torch.Tensor:
        values: NDArray[np.uint8] = np.asarray(image)
        return torch.from_numpy(values.copy())

    data = EvalImages(Subset(domain, np.arange(4)), transform)
    loader = torch.utils.data.DataLoader(data, batch_size=1, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(DataError) as found:
        list(loader)
    message = str(found.value)
    assert message.startswith(f"{tmp_path / 'a/cat/2.png'}: not a readable image (") and "\n" not in message
