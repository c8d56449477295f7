"""PACS, leave one domain out: full precision, then a quantized run from it. The method is one word.

    uv run recipes/pacs.py fp    --data-root PACS --test-domain sketch --pretrained --out runs/fp
    uv run recipes/pacs.py lsq   --data-root PACS --test-domain sketch --bits 4 --init-from runs/fp --out runs/w4a4
    uv run recipes/pacs.py gaqat --data-root PACS --test-domain sketch --bits 4 --init-from runs/fp --out runs/gaqat

fp | sagm | lsq | sagm-lsq | gaqat | gaqat-<control> | qtdog; `PACS` is a folder of domains:
PACS/{art_painting,cartoon,photo,sketch}/<class>/*.jpg. A quantized run with --init-from is compared with that run; the exit
code is 1 when it lost more than a point.
"""

import sys

from edgeqat.terminal import say
from qat.analysis.compare import compare_runs
from qat.analysis.results import table
from qat.cli import choose, guarded
from qat.domains.folders import read_domains
from qat.runs.recipe import METHODS, LsqRecipe, Recipe, RecipeError
from qat.runs.recipe_checks import check
from qat.train.loop import run


def train(recipe: Recipe) -> int:
    if recipe.data != "domains":
        raise RecipeError(f"--data {recipe.data}: this recipe leaves a domain out; use recipes/cifar10.py")
    if recipe.data_root is None:
        raise RecipeError("--data-root: give the PACS folder, <root>/<domain>/<class>/*.jpg")
    check(recipe)
    folder = run(recipe, read_domains(recipe.data_root))
    say(table(folder))
    if isinstance(recipe, LsqRecipe) and recipe.init_from is not None:
        comparison = compare_runs(recipe.init_from, folder.path, max_drop=1.0)
        say(comparison)
        return 0 if comparison.passed else 1
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: train(choose(METHODS, __doc__))))
