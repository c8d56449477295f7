"""DomainNet's text files: `<domain>_{train,test}.txt` with "domain/class/file.jpg label", and the list of duplicates."""

from collections.abc import Iterator
from pathlib import Path

from qat.domains.folders import DataError

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
DUPLICATES = ("domain_net_duplicates.txt", "duplicates.txt")
PARTS = ("train", "test")


def read_lists(folder: Path, classes: int) -> dict[str, dict[str, int]]:
    """Domain -> image ("domain/class/file.jpg") -> 0-based label, for the domains that have lists in `folder`.

    Raises DataError naming file and line for a malformed line, a label outside 0..classes-1 or at odds with another line
    of any list, an image listed twice; naming the file for one list without the other.
    """
    found: dict[str, dict[str, int]] = {}
    labels: dict[str, tuple[int, str]] = {}  # class -> label, first place
    names: dict[int, tuple[str, str]] = {}  # label -> class, first place
    for domain in DOMAINS:
        paths = [folder / f"{domain}_{part}.txt" for part in PARTS]
        missing = [path for path in paths if not path.is_file()]
        if len(missing) == 1:
            other = next(path for path in paths if path not in missing)
            raise DataError(
                f"{missing[0]}: no such file beside {other.name}; a domain needs both lists, or none"
            )
        for path in paths if not missing else []:
            for where, image, label in _entries(path, domain, classes):
                if image in found.setdefault(domain, {}):
                    raise DataError(
                        f"{where}: {image} is listed twice in {domain}'s lists; remove one of the lines"
                    )
                found[domain][image] = label
                name = image.split("/")[1]
                known, first = labels.setdefault(name, (label, where))
                if known != label:
                    raise DataError(
                        f"{where}: class {name} has label {label}, but {known} in {first}"
                    )
                holder, first = names.setdefault(label, (name, where))
                if holder != name:
                    raise DataError(
                        f"{where}: label {label} is {name}, but {holder} in {first}"
                    )
    return found


def read_duplicates(folder: Path) -> frozenset[str] | None:
    """The images that `folder`'s list of duplicates names, as "domain/class/file.jpg"; None without such a list."""
    for path in (folder / name for name in DUPLICATES):
        if path.is_file():
            return frozenset(
                _image(where, text, DOMAINS) for where, text in _lines(path)
            )
    return None


def _entries(path: Path, domain: str, classes: int) -> Iterator[tuple[str, str, int]]:
    """(place, image, label) of every line."""
    for where, text in _lines(path):
        image, _, label = text.rpartition(" ")
        if not image:
            raise DataError(
                f"{where}: {text!r} has no label; expected '{domain}/<class>/<file> <label>'"
            )
        _image(where, image, (domain,))
        if not label.isdecimal() or int(label) >= classes:
            raise DataError(
                f"{where}: label {label!r}; expected a whole number from 0 to {classes - 1}"
            )
        yield where, image, int(label)


def _image(where: str, image: str, domains: tuple[str, ...]) -> str:
    parts = image.split("/")
    if len(parts) != 3 or not all(parts):
        raise DataError(f"{where}: {image!r}; expected <domain>/<class>/<file>")
    if parts[0] not in domains:
        raise DataError(
            f"{where}: domain {parts[0]!r}; expected {' or '.join(domains)}"
        )
    return image


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of every line that holds something."""
    # Invalid UTF-8 is replaced, so that the line is reported as naming a missing file.
    for number, line in enumerate(
        path.read_text("utf-8", errors="replace").splitlines(), 1
    ):
        if text := line.strip():
            yield f"{path}:{number}", text
