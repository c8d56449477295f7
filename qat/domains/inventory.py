"""What a copy of a benchmark holds against the published counts (`docs/algorithms.md`, DomainBed protocol)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgeqat.terminal import printable
from qat.domains.domainnet_lists import DUPLICATES
from qat.domains.folders import some


@dataclass(frozen=True)
class Counts:
    """What was published of a data set.

    classes: how many. before, after: images of every domain before and after duplicates are dropped, "after" those in use.
    by_class: domain -> class -> images in use, where that is published. uncounted: domains without published counts.
    """

    classes: int
    before: Mapping[str, int]
    after: Mapping[str, int]
    by_class: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains' folders."""
        return (*self.after, *self.uncounted)


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
    but not on disk ("domain/class/file.jpg"); by_class: images used of each class."""

    on_disk: int = 0
    duplicates: int = 0
    used: int = 0
    unlisted: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    by_class: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Inventory:
    """Counts of a copy in `folder`; its text is the report.

    name: of the data set. note: what its counts do not say, added to the report.
    found: by domain, for the domain folders there are. classes: by domain, those with images in use.
    duplicates: entries of the duplicates file by domain, None without one. listed: images in a domain's lists.
    strangers: folders that are not domains of the data set.
    """

    folder: Path
    published: Counts
    found: Mapping[str, Found]
    classes: Mapping[str, tuple[str, ...]]
    duplicates: Mapping[str, int] | None
    listed: Mapping[str, int]
    strangers: tuple[str, ...] = ()
    name: str = "DomainNet"
    note: str = ""

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
        classes = self._all_classes()
        missing = [name for name in self.published.domains if name not in self.classes]
        if missing:
            yield (
                f"domains missing: {', '.join(missing)}; DomainBed seeds a domain's split by its place among all, so the "
                "splits here may differ from its own"
            )
        if len(classes) != self.published.classes:
            yield f"classes: {len(classes)} of {self.published.classes} have images"
        differing = [domain for domain in self.classes if self._differs(domain)]
        empty = []
        for domain in differing:
            for name in sorted(classes.difference(self.classes[domain])):
                empty.append(f"{domain}/{name}")
        if empty:
            yield f"{len(empty)} class(es) without images: {some(empty)}"
        for domain in differing:
            yield from self._domain_problems(domain)
        if self.strangers and missing:
            yield f"folders that are not domains of {self.name}, left out: {some(self.strangers)}"

    def _all_classes(self) -> set[str]:
        """Those with images in any domain."""
        classes: set[str] = set()
        for of_domain in self.classes.values():
            classes.update(of_domain)
        return classes

    def _differs(self, domain: str) -> bool:
        """Whether a domain lacks images, or has not as many as published, in all or of a class."""
        images = self.found[domain]
        if images.absent:
            return True
        if domain not in self.published.after:
            return False
        if images.used != self.published.after[domain]:
            return True
        return any(self._class_differences(domain))

    def _class_differences(self, domain: str) -> Iterator[str]:
        """Classes that have other numbers of images than published: "dog -2"."""
        used = self.found[domain].by_class
        for name, count in self.published.by_class.get(domain, {}).items():
            difference = used.get(name, 0) - count
            if difference:
                yield f"{name} {difference:+,}"

    def _domain_problems(self, domain: str) -> Iterator[str]:
        found = self.found[domain]
        if domain not in self.published.after:
            yield f"{domain}: {len(found.absent):,} listed image(s) are not on disk: {some(found.absent)}"
            return
        expected = self.published.after[domain]
        listed = self.listed.get(domain, expected)
        if listed != expected:
            yield f"{domain}: its lists name {listed:,} images, {expected:,} published; download them again"
        if found.absent:
            yield f"{domain}: {len(found.absent):,} listed image(s) are not on disk: {some(found.absent)}"
        elif found.used < expected and domain not in self.listed:
            yield f"{domain}: {expected - found.used:,} image(s) missing; unpack its archive again"
        if found.used > expected:
            yield f"{domain}: {found.used - expected:,} image(s) more than published{self._remedy(domain)}"
        if differences := list(self._class_differences(domain)):
            yield f"{domain}: images of a class, against the published: {some(differences)}"
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
        problems = list(self.problems())
        head = f"{self.name} in {printable(self.folder)}: {'incomplete' if problems else 'complete'}, {self._sums()}"
        lines = [head]
        if problems:
            lines += [*self._table(), *(f"- {problem}" for problem in problems)]
        if self.note:
            lines.append(f"- {self.note}")
        return "\n".join(lines)

    def _sums(self) -> str:
        classes = self._all_classes()
        images = f"{self.used:,} images"
        if not self.published.uncounted:
            images = f"{self.used:,} of {sum(self.published.after.values()):,} images"
        text = f"{images}, {len(classes)} of {self.published.classes} classes"
        if self.published.before == self.published.after:
            return text
        dropped = sum(found.duplicates for found in self.found.values())
        return f"{text}, {dropped:,} duplicates dropped"

    def _table(self) -> Iterator[str]:
        yield f"  {'domain':12} {'on disk':>9} {'published':>9}  {'duplicates':>10}  {'used':>9} {'published':>9}"
        for domain in self.published.domains:
            row = self.found.get(domain, Found())
            before = _number(self.published.before.get(domain))
            after = _number(self.published.after.get(domain))
            yield (
                f"  {domain:12} {row.on_disk:9,} {before:>9}  {row.duplicates:10,}  {row.used:9,} {after:>9}"
            )


def _number(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"
