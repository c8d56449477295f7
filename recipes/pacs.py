"""PACS, leave one domain out: full precision, then a quantized run from it. The method is one word.

    uv run recipes/pacs.py fp    --data-root PACS --test-domain sketch --pretrained --out runs/fp
    uv run recipes/pacs.py lsq   --data-root PACS --test-domain sketch --bits 4 --init-from runs/fp --out runs/w4a4
    uv run recipes/pacs.py gaqat --data-root PACS --test-domain sketch --bits 4 --init-from runs/fp --out runs/gaqat

fp | sagm | lsq | sagm-lsq | gaqat | gaqat-<control> | qtdog; `PACS` is a folder of domains:
PACS/{art_painting,cartoon,photo,sketch}/<class>/*.jpg. A quantized run with --init-from is compared with that run; the exit
code is 1 when it lost more than a point.
"""

import sys

from qat.cli import choose, guarded
from qat.runs.parts import RecipeError
from qat.runs.recipe import METHODS, Recipe
from qat.training import train


def train_pacs(recipe: Recipe) -> int:
    if recipe.images.data != "domains":
        raise RecipeError(f"--data {recipe.images.data}: this recipe leaves a domain out; use recipes/cifar10.py")
    if recipe.images.data_root is None:
        raise RecipeError("--data-root: give the PACS folder, <root>/<domain>/<class>/*.jpg")
    return train(recipe)


if __name__ == "__main__":
    sys.exit(guarded(lambda: train_pacs(choose(METHODS, __doc__))))
