"""What training does otherwise than eval mode: further branches, and operations that shift the count of others."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable

from qat.surgery.frames import kind_in, path_of
from qat.surgery.trace import Trace

Kind = tuple[str, str]  # module path, kind of operation
Place = tuple[tuple[str, int], ...]  # the Python code at work, outwards


def in_training(
    evaluated: Trace, trained: Trace, addresses: Iterable[str]
) -> dict[str, str | None]:
    """Address in training mode -> address in eval mode, for operations that count otherwise; None where only training has it.

    addresses: of the operations with quantizers. Two operations are the same when the same code makes them.
    Raises ValueError naming a module that repeats such an operation more or less often in training.
    """
    there, here = _by_kind(evaluated), _by_kind(trained)
    shifted: dict[str, str | None] = {}
    for kind in sorted({(path_of(address), kind_in(address)) for address in addresses}):
        eval_addresses, training_addresses = there[kind], here[kind]
        places = [evaluated.where[address] for address in eval_addresses]
        training_places = [trained.where[address] for address in training_addresses]
        if places == training_places:
            continue
        often, often_in_training = Counter(places), Counter(training_places)
        for place, times in often.items():
            if times > 1 and often_in_training[place] not in (0, times):
                path, operation = kind
                raise ValueError(
                    f"{path or 'the model'}: one line makes {often_in_training[place]} operations of kind {operation} in "
                    f"training and {times} in eval mode, so quantize_ cannot tell their quantizers apart; move what is "
                    "repeated into a separate module"
                )
        by_place = dict(zip(_numbered(places), eval_addresses, strict=True))
        for numbered, address in zip(
            _numbered(training_places), training_addresses, strict=True
        ):
            same = by_place.get(numbered)
            if same != address:
                shifted[address] = same
    return shifted


def tallies(trained: Trace, addresses: Collection[str]) -> dict[str, dict[str, int]]:
    """How many operations of each kind a call of each module makes in training, for the kinds that have quantizers."""
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    by_kind = _by_kind(trained)
    for address in addresses:
        path = path_of(address)
        kind = kind_in(address)
        counts[path][kind] = len(by_kind[path, kind])
    return dict(counts)


def _by_kind(trace: Trace) -> dict[Kind, list[str]]:
    """Addresses of each module and kind, in the order of their ordinals."""
    addresses: dict[Kind, list[str]] = defaultdict(list)
    for address in trace.where:
        addresses[(path_of(address), kind_in(address))].append(address)
    return addresses


def _numbered(places: list[Place]) -> list[tuple[Place, int]]:
    """Each place with how often it came before."""
    seen: Counter[Place] = Counter()
    numbered = []
    for place in places:
        numbered.append((place, seen[place]))
        seen[place] += 1
    return numbered
