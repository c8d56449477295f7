"""CIFAR-10: full precision, LSQ, or 1-bit networks (BiPer). The method is one word.

    uv run recipes/cifar10.py fp    --data-root CIFAR --backbone cifar_resnet20 --out runs/fp
    uv run recipes/cifar10.py lsq   --data-root CIFAR --init-from runs/fp --bits 2 --epochs 10 --out runs/w2a2
    uv run recipes/cifar10.py biper --data-root CIFAR --out runs/w1a1

`CIFAR` is CIFAR/{train,test}/<class>/*.png or torchvision's folder; `--download` has torchvision fetch it. `--weights FILE
--epochs 0` with fp measures a checkpoint. A tenth of the training images is held out and selects the checkpoint; with
`--select last` nothing selects. The test images are measured once, at the end.
"""

import sys
from dataclasses import dataclass

from qat.cli import choose, guarded
from qat.runs.parts import RecipeError
from qat.runs.recipe import Recipe, recipe_of
from qat.runs.recipe_checks import check
from qat.train.data import split_of
from qat.training import train

CIFAR = {
    "data": "cifar10", "test_domain": "test", "backbone": "cifar_resnet20", "image_size": 32, "batch_size": 128,
    "augmentation": "crop-flip", "normalization": "imagenet", "optimizer": "momentum", "decay_norms": True, "holdout": 0.1,
    "workers": 0,
}  # fmt: skip
METHODS = {
    # He et al.'s CIFAR recipe with a cosine; LSQ's with its learning rate for SGD (steps move as fast as weights).
    "fp": recipe_of("fp", **CIFAR, epochs=200, lr=0.1, weight_decay=1e-4),
    "lsq": recipe_of("lsq", **CIFAR, epochs=90, lr=0.01, weight_decay=1e-4, scale_lr_unit="absolute"),
    "biper": recipe_of(
        "biper", **CIFAR | {"backbone": "bireal_cifar_resnet20", "batch_size": 256}, scale_lr_unit="absolute"
    ),
}


@dataclass(frozen=True)
class Cifar10:
    download: bool = False
    """Have torchvision fetch the data set into --data-root first."""


def train_cifar10(recipe: Recipe, flags: Cifar10) -> int:
    if recipe.images.data != "cifar10":
        raise RecipeError(f"--data {recipe.images.data}: this recipe is for CIFAR-10; use recipes/pacs.py")
    check(recipe)
    return train(recipe, split_of(recipe, download=flags.download))


if __name__ == "__main__":
    sys.exit(guarded(lambda: train_cifar10(*choose(METHODS, __doc__, extra=Cifar10()))))
