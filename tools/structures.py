"""Which of the small models of tests/export/structures.py come through, per target. A line each, then totals.

uv run tools/structures.py                       # all, on three targets: minutes
uv run tools/structures.py unet recurrent --targets ort-int8
"""

import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro
from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.export.outcomes import outcome
from tests.export.structures import STRUCTURES


@dataclass(frozen=True)
class Flags:
    names: Positional[tuple[str, ...]] = ()
    """Of structures; all, if none is given."""
    targets: tuple[str, ...] = ("ort-int8", "ort-packed", "ort-native")


def main(flags: Flags) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    totals: dict[str, Counter[str]] = {target: Counter() for target in flags.targets}
    for name in flags.names or STRUCTURES:
        for target in flags.targets:
            torch.manual_seed(0)
            model, example = STRUCTURES[name]()
            with TemporaryDirectory() as folder:
                verdict, details = outcome(model, example, target, Path(folder))
            totals[target][verdict] += 1
            print(f"{verdict:<9} {target:<10} {name}: {' '.join(details.split())[:600]}", flush=True)
    for target, counts in totals.items():
        print(f"{target}: {sum(counts.values())} models, " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    return int(any(counts["fault"] for counts in totals.values()))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Flags, description=__doc__)))
