"""What training does otherwise than eval mode: branches of its own, and operations that shift the count of others."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable

from qat.surgery.plan import path_of
from qat.surgery.trace import Trace

Kind = tuple[str, str]  # module path, kind of operation


def in_training(evaluated: Trace, trained: Trace, addresses: Iterable[str]) -> dict[str, str | None]:
    """Address in training mode -> address in eval mode, for operations that count otherwise; None where only training has it.

    addresses: of the operations with quantizers. Two operations are the same when the same code makes them.
    Raises ValueError naming a module that repeats such an operation more or less often in training.
    """
    there, here = _by_kind(evaluated), _by_kind(trained)
    shifted: dict[str, str | None] = {}
    for kind in sorted({_kind_of(address) for address in addresses}):
        eval_addresses, training_addresses = there[kind], here[kind]
        codes = [evaluated.where[address] for address in eval_addresses]
        training_codes = [trained.where[address] for address in training_addresses]
        if codes == training_codes:
            continue
        often, often_in_training = Counter(codes), Counter(training_codes)
        for code, times in often.items():
            if times > 1 and often_in_training[code] not in (0, times):
                path, operation = kind
                raise ValueError(
                    f"{path or 'the model'}: one line makes {often_in_training[code]} operations of kind {operation} in "
                    f"training and {times} in eval mode, so quantize_ cannot tell their quantizers apart; move what is "
                    "repeated into a module of its own"
                )
        by_code = dict(zip(_numbered(codes), eval_addresses, strict=True))
        for numbered, address in zip(_numbered(training_codes), training_addresses, strict=True):
            same = by_code.get(numbered)
            if same != address:
                shifted[address] = same
    return shifted


def tallies(trained: Trace, addresses: Collection[str]) -> dict[str, dict[str, int]]:
    """How many operations of each kind a call of each module makes in training, for the kinds that have quantizers."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    by_kind = _by_kind(trained)
    for path, kind in {_kind_of(address) for address in addresses}:
        found[path][kind] = len(by_kind[path, kind])
    return dict(found)


def _kind_of(address: str) -> Kind:
    return path_of(address), address.partition("#")[2].rstrip("0123456789")


def _by_kind(trace: Trace) -> dict[Kind, list[str]]:
    """Addresses of each module and kind, in the order of their ordinals."""
    addresses: dict[Kind, list[str]] = defaultdict(list)
    for address in trace.where:
        addresses[_kind_of(address)].append(address)
    return addresses


def _numbered(codes: list[tuple[tuple[str, int], ...]]) -> list[tuple[tuple[tuple[str, int], ...], int]]:
    """Each code with how often it came before."""
    seen: Counter[tuple[tuple[str, int], ...]] = Counter()
    numbered = []
    for code in codes:
        numbered.append((code, seen[code]))
        seen[code] += 1
    return numbered
