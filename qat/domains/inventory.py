"""What a copy of DomainNet holds against the published counts (`docs/algorithms.md`, DomainBed protocol)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeqat.terminal import printable
from qat.domains.domainnet_lists import DUPLICATES
from qat.domains.folders import some


@dataclass(frozen=True)
class Counts:
    """Number of classes; images of every domain before and after the duplicates are dropped."""

    classes: int
    before: Mapping[str, int]
    after: Mapping[str, int]


PUBLISHED = Counts(
    345,
    {
        "clipart": 48_833,
        "infograph": 53_201,
        "painting": 75_759,
        "quickdraw": 172_500,
        "real": 175_327,
        "sketch": 70_386,
    },
    {
        "clipart": 48_129,
        "infograph": 51_605,
        "painting": 72_266,
        "quickdraw": 172_500,
        "real": 172_947,
        "sketch": 69_128,
    },
)


@dataclass(frozen=True)
class Found:
    """One domain's images on disk, how many of them are duplicates or used; names on disk but in no list, and listed
    but not on disk ("domain/class/file.jpg")."""

    on_disk: int = 0
    duplicates: int = 0
    used: int = 0
    unlisted: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inventory:
    """Counts of a copy in `folder`; its text is the report.

    found: by domain, for the domain folders there are. classes: by domain, those with images in use.
    duplicates: entries of the duplicates file by domain, None without one. listed: images in a domain's lists.
    strangers: folders that are no domain of DomainNet.
    """

    folder: Path
    published: Counts
    found: Mapping[str, Found]
    classes: Mapping[str, tuple[str, ...]]
    duplicates: Mapping[str, int] | None
    listed: Mapping[str, int]
    strangers: tuple[str, ...] = ()

    @property
    def used(self) -> int:
        """Images used, of all domains together."""
        return sum(found.used for found in self.found.values())

    @property
    def complete(self) -> bool:
        """Whether the images in use are the published ones, domain by domain and class by class."""
        return not any(self.problems())

    def problems(self) -> Iterator[str]:
        """One line for everything that differs from the published counts, and what to do."""
        every = sorted({c for classes in self.classes.values() for c in classes})
        gone = [d for d in self.published.after if d not in self.classes]
        if gone:
            yield (
                f"domains missing: {', '.join(gone)}; DomainBed seeds a domain's split by its place among all six, so the "
                "splits here may differ from its own"
            )
        if len(every) != self.published.classes:
            yield f"classes: {len(every)} of {self.published.classes} have images"
        differing = [d for d in self.classes if self._differs(d)]
        if bare := [
            f"{d}/{c}"
            for d in differing
            for c in every
            if c not in set(self.classes[d])
        ]:
            yield f"{len(bare)} class(es) without images: {some(bare)}"
        for domain in differing:
            yield from self._domain_problems(domain)
        if self.strangers and gone:
            yield f"folders that are no DomainNet domain, left out: {some(self.strangers)}"

    def _differs(self, domain: str) -> bool:
        found = self.found[domain]
        return bool(found.absent) or found.used != self.published.after[domain]

    def _domain_problems(self, domain: str) -> Iterator[str]:
        found, expected = self.found[domain], self.published.after[domain]
        listed = self.listed.get(domain, expected)
        if listed != expected:
            yield f"{domain}: its lists name {listed:,} images, {expected:,} published; download them again"
        if found.absent:
            yield f"{domain}: {len(found.absent):,} listed image(s) are not on disk: {some(found.absent)}"
        elif found.used < expected and domain not in self.listed:
            yield f"{domain}: {expected - found.used:,} image(s) missing; unpack its archive again"
        if found.used > expected:
            yield f"{domain}: {found.used - expected:,} image(s) more than published{self._remedy(domain)}"
        if found.unlisted:
            yield f"{domain}: {len(found.unlisted):,} image(s) are in no list and left out: {some(found.unlisted)}"
        dropped = self.published.before[domain] - expected
        if self.duplicates is not None and self.duplicates[domain] != dropped:
            yield f"{domain}: {self.duplicates[domain]:,} entries in the list of duplicates, {dropped:,} published"

    def _remedy(self, domain: str) -> str:
        if self.duplicates is not None or domain in self.listed:
            return ""
        return f", duplicates among them; put DomainBed's {DUPLICATES[0]} into {self.folder}"

    def __str__(self) -> str:
        every = {c for classes in self.classes.values() for c in classes}
        dropped = sum(found.duplicates for found in self.found.values())
        problems = list(self.problems())
        head = (
            f"DomainNet in {printable(self.folder)}: {'incomplete' if problems else 'complete'}, {self.used:,} of "
            f"{sum(self.published.after.values()):,} images, {len(every)} of {self.published.classes} classes, "
            f"{dropped:,} duplicates dropped"
        )
        if not problems:
            return head
        return "\n".join(
            [head, *self._table(), *(f"- {problem}" for problem in problems)]
        )

    def _table(self) -> Iterator[str]:
        yield f"  {'domain':10} {'on disk':>9} {'published':>9}  {'duplicates':>10}  {'used':>9} {'published':>9}"
        for domain, before in self.published.before.items():
            row = self.found.get(domain, Found())
            numbers = (
                f"{row.on_disk:9,} {before:9,}  {row.duplicates:10,}  {row.used:9,}"
            )
            yield f"  {domain:10} {numbers} {self.published.after[domain]:9,}"
