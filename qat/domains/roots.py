"""Finds the folder that holds a data set's domains, and says where it is when --data-root is one folder off."""

from collections.abc import Sequence
from pathlib import Path

from edgeqat.terminal import printable
from qat.domains.folders import DataError, folders_in


def folder_of_domains(
    root: Path, data_set: str, domains: Sequence[str], folder: str
) -> Path:
    """The folder of `domains`: `root`, or `folder` in it, which is DomainBed's name for it in its --data_dir.

    Raises DataError for a root that is missing, one folder too high or too deep (the message names the right one), that
    has the domains by other names, or none of them.
    """
    layout = f"<root>/{{{','.join(domains)}}}/<class>/*.jpg"
    if not root.is_dir():
        raise DataError(f"--data-root {root}: no such folder; expected {layout}")
    for candidate in (root, root / folder):
        if _holds(candidate, domains):
            return candidate
    elsewhere = _near(root, domains)
    if elsewhere is not None:
        raise DataError(
            f"--data-root {printable(root)}: the domains of {data_set} are in {printable(elsewhere)}; "
            f"pass --data-root {printable(elsewhere)}"
        )
    _refuse_other_names(root, data_set, domains)
    raise DataError(
        f"--data-root {printable(root)}: holds no domain of {data_set}; expected {layout}, or {folder} in place of <root>"
    )


def _holds(folder: Path, domains: Sequence[str]) -> bool:
    return any((folder / name).is_dir() for name in domains)


def _near(root: Path, domains: Sequence[str]) -> Path | None:
    """Where the domains are if `root` is the folder above theirs, one domain, or one class of a domain."""
    above = root.resolve()
    for folder, name in (
        (above.parent, above.name),
        (above.parent.parent, above.parent.name),
    ):
        if name in domains and _holds(folder, domains):
            return folder
    for child in folders_in(root):
        if _holds(child, domains):
            return child
    return None


def _refuse_other_names(root: Path, data_set: str, domains: Sequence[str]) -> None:
    official = {_plain(name): name for name in domains}
    renamed = [
        f"{printable(folder.name)} to {official[_plain(folder.name)]!r}"
        for folder in folders_in(root)
        if _plain(folder.name) in official
    ]
    if renamed:
        raise DataError(
            f"--data-root {printable(root)}: has {data_set}'s domains by other names than DomainBed, which numbers them by "
            f"the alphabet; rename {', '.join(renamed)}"
        )


def _plain(name: str) -> str:
    """Letters and digits alone, in lower case."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())
