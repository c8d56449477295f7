"""From a recipe to a trained run that is compared with the one it began from: what `qat train` and the recipes do."""

from collections.abc import Sequence

from edgeqat.terminal import say
from qat.analysis.compare import compare_runs
from qat.analysis.results import table
from qat.domains.folders import Domain
from qat.domains.splits import Split
from qat.runs.recipe import Recipe
from qat.runs.recipe_checks import check
from qat.surgery.backbones import own_image_size
from qat.train.data import layout_of, split_of
from qat.train.loop import run
from qat.train.two_stages import run_stages


def train(
    recipe: Recipe,
    data: Sequence[Domain] | Split | None = None,
    *,
    max_drop: float = 1.0,
) -> int:
    """Train, print the accuracies, and compare with --init-from; returns the exit code.

    data:     the images, where the caller has read them: domains of which one is left out, or a split.
    max_drop: percentage points that a quantized run may lose against a full-precision one; beyond that the code is 1.
    Raises ValueError for bad input, before training starts.
    """
    recipe = resolved(recipe)
    check(recipe)
    if data is None:
        notes: list[str] = []
        data = split_of(recipe, check_images=True, notes=notes)
        for note in notes:
            say(note)
    binarization = recipe.binarization
    folder = run(recipe, data) if binarization is None else run_stages(recipe, data)
    say(table(folder))
    # A 1-bit net does not keep what full precision had, and stage 2 begins from a net of one bit
    if recipe.init_from is None or binarization is not None:
        return 0
    comparison = compare_runs(recipe.init_from, folder.path, max_drop=max_drop)
    say(comparison)
    return 0 if comparison.passed else 1


def resolved(recipe: Recipe) -> Recipe:
    """`recipe` with what depends on the backbone and on the folder of images looked up."""
    values: dict[str, object] = {}
    if recipe.model.image_size == 0:
        values["image_size"] = own_image_size(recipe.model.backbone)
    if recipe.images.data == "auto":
        layout = layout_of(recipe.images.data_root)
        values["data"] = layout
        if layout != "domains":
            values["test_domain"] = "test"
    return recipe.changed(**values)
