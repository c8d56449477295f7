"""What image files say of themselves that changes the pixels a net sees (`edgeqat/images.py` reads them)."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgeqat.images import ImageHeader, image_header
from qat.domains.folders import some

TURNED = (
    "have an orientation that viewers apply and training does not, nor `qat predict`; turn the pixels once, for example "
    "with `exiftran -ai` or `mogrify -auto-orient`"
)
TRANSPARENT = (
    "have transparent pixels, which count with the colour stored beneath; flatten them onto a background if that is not "
    "what is shown"
)
DEEP = "are greys of 16 bits and are read by their high byte; stretch the range first if they use little of it"
CMYK = "are CMYK and are converted to RGB without a colour profile"


def file_notes(paths: Sequence[Path]) -> list[str]:
    """One line, with count and names, for each kind of file whose pixels are not simply its RGB. Raises ImageError."""
    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(image_header, paths))
    kinds: dict[str, list[str]] = {}
    for path, header in zip(paths, headers, strict=True):
        for kind in _kinds(header):
            kinds.setdefault(kind, []).append(str(path))
    notes = []
    for kind, names in sorted(kinds.items()):
        notes.append(f"{len(names):,} of {len(paths):,} images {kind}: {some(names)}")
    return notes


def _kinds(header: ImageHeader) -> list[str]:
    kinds = []
    if header.turned:
        kinds.append(TURNED)
    if header.transparent:
        kinds.append(TRANSPARENT)
    if header.mode.startswith("I;16"):
        kinds.append(DEEP)
    if header.mode == "CMYK":
        kinds.append(CMYK)
    return kinds
