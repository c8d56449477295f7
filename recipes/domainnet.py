"""DomainNet, leave one domain out: full precision, then a quantized run from it. The method is one word.

    uv run recipes/domainnet.py fp    --data-root domain_net --test-domain sketch --pretrained --out runs/fp
    uv run recipes/domainnet.py sagm  --data-root domain_net --test-domain sketch --pretrained --out runs/sagm
    uv run recipes/domainnet.py gaqat --data-root domain_net --test-domain sketch --bits 4 --init-from runs/sagm
    uv run recipes/domainnet.py gaqat --smoke                    a few steps on a rendered miniature, in seconds

fp | sagm | lsq | sagm-lsq | gaqat | gaqat-<control> | qtdog; `domain_net` holds
{clipart,infograph,painting,quickdraw,real,sketch}/<345 classes>/*.jpg, the lists <domain>_{train,test}.txt where you have
them, and DomainBed's domain_net_duplicates.txt. Defaults are SAGM's published ones for DomainNet (arXiv 2303.10353).
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from edgeqat.terminal import say
from qat.analysis.compare import compare_runs
from qat.analysis.results import table
from qat.cli import choose, guarded
from qat.domains.domainnet import read_domainnet
from qat.domains.inventory import PUBLISHED
from qat.domains.miniature import MINIATURE, write_miniature
from qat.runs.recipe import METHODS, LsqRecipe, Recipe, RecipeError
from qat.runs.recipe_checks import check
from qat.train.loop import run

DEFAULTS = {
    "backbone": "resnet50.tv_in1k", "steps": 15001, "batch_size": 32, "lr": 3e-5, "schedule": "constant",
    "weight_decay": 1e-6, "dropout": 0.5, "alpha": 5e-4, "rho": 0.05, "evaluate_every": 1000,
}  # fmt: skip
SMOKE = {
    "backbone": "test_resnet", "image_size": 32, "steps": 6, "batch_size": 2, "evaluate_every": 3, "workers": 0,
    "calibration_batches": 2, "window": 2, "quant_start_step": 2,
}  # fmt: skip


def with_values(recipe: Recipe, values: dict[str, object]) -> Recipe:
    """`recipe` with those of `values` that it has fields for."""
    return dataclasses.replace(recipe, **{k: v for k, v in values.items() if hasattr(recipe, k)})


PRESETS = {word: with_values(recipe, DEFAULTS) for word, recipe in METHODS.items()}


@dataclass(frozen=True)
class DomainNet:
    recipe: OmitArgPrefixes[Recipe]
    smoke: bool = False
    """Train a tiny net for a few steps on a rendered miniature of the data set, kept in runs/domainnet-miniature."""


def smoke_test(recipe: Recipe) -> Recipe:
    """`recipe` for the miniature; what the command line changed stays."""
    if recipe.data_root is not None:
        raise RecipeError("--smoke renders its own images; leave --data-root out")
    preset = PRESETS[recipe.method]
    small = {k: v for k, v in SMOKE.items() if getattr(recipe, k, None) == getattr(preset, k, None)}
    return with_values(recipe, {**small, "data_root": write_miniature(Path("runs/domainnet-miniature"))})


def train(flags: DomainNet) -> int:
    if flags.recipe.data != "domains":
        raise RecipeError(f"--data {flags.recipe.data}: this recipe leaves a domain out; use recipes/cifar10.py")
    recipe = smoke_test(flags.recipe) if flags.smoke else flags.recipe
    if recipe.data_root is None:
        raise RecipeError("--data-root: give the DomainNet folder, <root>/<domain>/<class>/*.jpg, or try --smoke")
    check(recipe)
    domains, inventory = read_domainnet(recipe.data_root, published=MINIATURE if flags.smoke else PUBLISHED)
    say(inventory)
    folder = run(recipe, domains)
    say(table(folder))
    if isinstance(recipe, LsqRecipe) and recipe.init_from is not None:
        comparison = compare_runs(recipe.init_from, folder.path, max_drop=1.0)
        say(comparison)
        return 0 if comparison.passed else 1
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: train(choose(PRESETS, __doc__, wrap=DomainNet))))
