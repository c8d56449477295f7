"""Real data sets and weights, which are not in the repository: tests read them from the folder that EDGEQAT_DATA names.

    pacs96/            PACS by domain and class, 96 px
    domainnet_lists/   DomainNet's own lists, and its list of duplicates
    cifar10/           the test images as one sheet, and labels.npz
    weights/           resnet20-12fca82f.th, of pytorch-cifar-models

Where it is not set, the folder is data/ in the repository.
"""

import os
from pathlib import Path

import pytest

VARIABLE = "EDGEQAT_DATA"
FOLDER = Path(os.environ.get(VARIABLE, Path(__file__).parents[1] / "data"))


def needs(*names: str) -> pytest.MarkDecorator:
    """Skip a test, with a note that says how to run it, where `names` are not in the folder."""
    missing = [name for name in names if not (FOLDER / name).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"real data: set {VARIABLE} to a folder with {', '.join(missing)}")
