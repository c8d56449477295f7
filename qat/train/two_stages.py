"""BiPer's two stages as one run: a sine wave first, then its sign, which begins from the first's selected checkpoint.

Stage 1 is a run folder of its own, `<out>/stage1`; latent weights, batch norms, scales and frequencies pass to stage 2 bit
for bit, the optimizer and its schedule begin anew, as published.
"""

from collections.abc import Sequence
from pathlib import Path

from edgeqat.interrupts import Interrupted
from qat.domains.folders import Domain
from qat.domains.splits import Split
from qat.runs.parts import SECOND_STAGE, Binarization, RecipeError
from qat.runs.recipe import Recipe
from qat.runs.recipe_checks import check
from qat.runs.run_folder import RunFolder, check_out, default_folder
from qat.train.loop import run


def run_stages(recipe: Recipe, data: Sequence[Domain] | Split) -> RunFolder:
    """Train `recipe` on `data`; returns the folder of the last stage. With `resume`, goes on where it was interrupted."""
    binarization = recipe.binarization
    assert binarization is not None
    if binarization.binarizer != "biper":
        return run(recipe.changed(stage=2), data)
    if binarization.stage == 2:
        return run(recipe, data)
    out = recipe.tracking.out or default_folder(recipe)
    first = out / "stage1"
    if recipe.tracking.resume and not first.exists():
        raise RecipeError(
            f"--resume: {out} holds no interrupted run; leave --resume out to begin it"
        )
    if not recipe.tracking.resume:
        check_out(recipe)
    check(_second(recipe, out, first))  # before hours of the first stage
    try:
        if not (recipe.tracking.resume and (first / "results.json").exists()):
            run(
                recipe.changed(
                    out=first,
                    resume=recipe.tracking.resume and (first / "last.pt").exists(),
                ),
                data,
            )
        return run(_second(recipe, out, first), data)
    except Interrupted as stop:
        stopped = str(stop).split(",")[0]
        message = f"{stopped}, all saved; to go on with both stages, repeat the command with --resume --out {out}"
        raise Interrupted(stop.number, message) from None


def _second(recipe: Recipe, out: Path, first: Path) -> Recipe:
    """The recipe of stage 2 into `out`, from the stage-1 folder `first`."""
    binarization, default = recipe.binarization, Binarization()
    assert binarization is not None
    # Used up by what follows
    used = {name: getattr(default, name) for name in SECOND_STAGE}
    in_epochs = recipe.optimization.epochs is not None
    return recipe.changed(
        **used,
        stage=2,
        out=out,
        init_from=first,
        lr=binarization.stage2_lr,
        weight_decay=binarization.stage2_weight_decay,
        epochs=binarization.stage2_epochs if in_epochs else None,
        steps=binarization.stage2_steps,
        weights=None,
        pretrained=False,
        resume=recipe.tracking.resume and (out / "last.pt").exists(),
    )
