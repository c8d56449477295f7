"""BiPer's two stages as one run: a sine wave first, then its sign, which begins from the first's selected checkpoint.

Stage 1 is a run folder of its own, `<out>/stage1`; latent weights, batch norms, scales and frequencies pass to stage 2 bit
for bit, the optimizer and its schedule begin anew, as published.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgeqat.interrupts import Interrupted
from qat.domains.folders import Domain
from qat.domains.splits import Split
from qat.runs.recipe import BiperRecipe, RecipeError
from qat.runs.recipe_checks import SECOND_ALONE, check
from qat.runs.run_folder import RunFolder, check_out, default_folder
from qat.train.loop import run


def run_stages(recipe: BiperRecipe, data: Sequence[Domain] | Split) -> RunFolder:
    """Train `recipe` on `data`; returns the folder of the last stage. With `resume`, goes on where it was interrupted."""
    if recipe.binarizer != "biper":
        return run(replace(recipe, stage=2), data)
    if recipe.stage == 2:
        return run(recipe, data)
    out = recipe.out or default_folder(recipe)
    first = out / "stage1"
    if recipe.resume and not first.exists():
        raise RecipeError(
            f"--resume: {out} holds no interrupted run; leave --resume out to begin it"
        )
    if not recipe.resume:
        check_out(recipe)
    check(_second(recipe, out, first))  # before hours of the first stage
    try:
        if not (recipe.resume and (first / "results.json").exists()):
            run(
                replace(
                    recipe,
                    out=first,
                    resume=recipe.resume and (first / "last.pt").exists(),
                ),
                data,
            )
        return run(_second(recipe, out, first), data)
    except Interrupted as stop:
        stopped = str(stop).split(",")[0]
        message = f"{stopped}, all saved; to go on with both stages, repeat the command with --resume --out {out}"
        raise Interrupted(stop.number, message) from None


def _second(recipe: BiperRecipe, out: Path, first: Path) -> BiperRecipe:
    """The recipe of stage 2 into `out`, from the stage-1 folder `first`."""
    # Used up by what follows
    given = {field: getattr(BiperRecipe(), field) for field in SECOND_ALONE}
    return replace(
        recipe,
        **given,
        stage=2,
        out=out,
        init_from=first,
        lr=recipe.stage2_lr,
        weight_decay=recipe.stage2_weight_decay,
        epochs=None if recipe.epochs is None else recipe.stage2_epochs,
        steps=recipe.stage2_steps,
        weights=None,
        pretrained=False,
        resume=recipe.resume and (out / "last.pt").exists(),
    )
