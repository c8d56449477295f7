"""DomainNet, leave one domain out: full precision, then a quantized run from it. The method is one word.

    uv run recipes/domainnet.py fp    --data-root domain_net --test-domain sketch --pretrained --out runs/fp
    uv run recipes/domainnet.py sagm  --data-root domain_net --test-domain sketch --pretrained --out runs/sagm
    uv run recipes/domainnet.py gaqat --data-root domain_net --test-domain sketch --bits 4 --init-from runs/sagm
    uv run recipes/domainnet.py gaqat --smoke                    a few steps on a rendered miniature, in seconds

fp | sagm | lsq | sagm-lsq | gaqat | gaqat-<control> | qtdog; `domain_net` holds
{clipart,infograph,painting,quickdraw,real,sketch}/<345 classes>/*.jpg, the lists <domain>_{train,test}.txt where you have
them, and DomainBed's domain_net_duplicates.txt. Defaults are SAGM's published ones for DomainNet (arXiv 2303.10353).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from edgeqat.terminal import say
from qat.cli import choose, guarded
from qat.domains.domainnet import read_domainnet
from qat.domains.inventory import PUBLISHED
from qat.domains.miniature import MINIATURE, write_miniature
from qat.runs.parts import RecipeError
from qat.runs.recipe import METHODS, Recipe
from qat.runs.recipe_checks import check
from qat.training import train

DEFAULTS = {
    "backbone": "resnet50.tv_in1k", "steps": 15001, "batch_size": 32, "lr": 3e-5, "schedule": "constant",
    "weight_decay": 1e-6, "dropout": 0.5, "alpha": 5e-4, "rho": 0.05, "evaluate_every": 1000,
}  # fmt: skip
SMOKE = {
    "backbone": "test_resnet", "image_size": 32, "steps": 6, "batch_size": 2, "evaluate_every": 3, "workers": 0,
    "calibration_batches": 2, "window": 2, "quant_start_step": 2,
}  # fmt: skip


PRESETS = {word: recipe.changed_where_known(DEFAULTS) for word, recipe in METHODS.items()}


@dataclass(frozen=True)
class DomainNet:
    smoke: bool = False
    """Train a tiny net for a few steps on a rendered miniature of the data set, kept in runs/domainnet-miniature."""


def smoke_test(recipe: Recipe) -> Recipe:
    """`recipe` for the miniature; what the command line changed stays."""
    if recipe.images.data_root is not None:
        raise RecipeError("--smoke renders its own images; leave --data-root out")
    given, preset = recipe.entries(), PRESETS[recipe.method].entries()
    small = {name: value for name, value in SMOKE.items() if given.get(name) == preset.get(name)}
    return recipe.changed_where_known({**small, "data_root": write_miniature(Path("runs/domainnet-miniature"))})


def train_domainnet(recipe: Recipe, flags: DomainNet) -> int:
    if recipe.images.data != "domains":
        raise RecipeError(f"--data {recipe.images.data}: this recipe leaves a domain out; use recipes/cifar10.py")
    if flags.smoke:
        recipe = smoke_test(recipe)
    if recipe.images.data_root is None:
        raise RecipeError("--data-root: give the DomainNet folder, <root>/<domain>/<class>/*.jpg, or try --smoke")
    check(recipe)
    domains, inventory = read_domainnet(recipe.images.data_root, published=MINIATURE if flags.smoke else PUBLISHED)
    say(inventory)
    return train(recipe, domains)


if __name__ == "__main__":
    sys.exit(guarded(lambda: train_domainnet(*choose(PRESETS, __doc__, extra=DomainNet()))))
