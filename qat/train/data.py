"""The images that a recipe names, split as it says."""

from dataclasses import replace
from pathlib import Path

from qat.domains.cifar import cifar10_split, read_cifar10, steps_per_epoch
from qat.domains.domainnet import is_domainnet, read_domainnet
from qat.domains.folders import read_domains
from qat.domains.splits import Split, leave_one_domain_out
from qat.domains.synthetic import synthetic_domains
from qat.runs.recipe import Recipe, RecipeError


def split_of(
    recipe: Recipe,
    root: Path | None = None,
    *,
    check_images: bool = False,
    download: bool = False,
) -> Split:
    """The recipe's data as train, validation and test parts.

    root: where the images are, if no longer where the recipe says. Raises ValueError naming the flag or folder at fault.
    """
    root = root or recipe.data_root
    if recipe.data == "cifar10":
        if root is None:
            raise RecipeError(
                "--data-root: give the CIFAR-10 folder (or where --download shall put it)"
            )
        return cifar10_split(
            *read_cifar10(root, download), recipe.holdout, recipe.trial_seed
        )
    if root is None:
        domains = synthetic_domains(
            per_class=recipe.per_class, image_size=recipe.image_size, seed=recipe.seed
        )
    elif is_domainnet(root):
        domains, _ = read_domainnet(root, check_images=check_images)
    else:
        domains = read_domains(root, check_images=check_images)
    return leave_one_domain_out(
        domains,
        recipe.test_domain,
        holdout_fraction=recipe.holdout,
        trial_seed=recipe.trial_seed,
    )


def in_steps(recipe: Recipe, split: Split) -> Recipe:
    """The recipe with epochs counted out in steps of this split."""
    if recipe.epochs is None:
        return recipe
    each = steps_per_epoch(
        sum(len(s) for s in split.train), recipe.batch_size * recipe.accumulate
    )
    return replace(
        recipe,
        steps=recipe.epochs * each,
        warmup=recipe.warmup * each,
        evaluate_every=each,
    )
