"""The images that a recipe names, split as it says."""

from pathlib import Path

from qat.domains.cifar import TORCHVISION, cifar10_split, read_cifar10, steps_per_epoch
from qat.domains.domainnet import is_domainnet, read_domainnet
from qat.domains.folders import read_domains
from qat.domains.splits import Split, leave_one_domain_out
from qat.domains.synthetic import synthetic_domains
from qat.runs.parts import RecipeError
from qat.runs.recipe import Recipe


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
    root = root or recipe.images.data_root
    if recipe.images.data == "cifar10":
        if root is None:
            raise RecipeError(
                "--data-root: give the CIFAR-10 folder (or where --download shall put it)"
            )
        return cifar10_split(
            *read_cifar10(root, download),
            recipe.images.holdout,
            recipe.images.trial_seed,
        )
    if root is None:
        domains = synthetic_domains(
            per_class=recipe.images.per_class,
            image_size=recipe.model.image_size,
            seed=recipe.optimization.seed,
        )
    elif is_domainnet(root):
        domains, _ = read_domainnet(root, check_images=check_images)
    else:
        domains = read_domains(root, check_images=check_images)
    return leave_one_domain_out(
        domains,
        recipe.images.test_domain,
        holdout_fraction=recipe.images.holdout,
        trial_seed=recipe.images.trial_seed,
    )


def layout_of(root: Path | None) -> str:
    """How the images under `root` lie: "domains", "folder" or "cifar10"; without a root, rendered domains."""
    if root is None:
        return "domains"
    return "cifar10" if (root / TORCHVISION).is_dir() else "domains"


def in_steps(recipe: Recipe, split: Split) -> Recipe:
    """The recipe with epochs counted out in steps of this split."""
    if recipe.optimization.epochs is None:
        return recipe
    each = steps_per_epoch(
        sum(len(s) for s in split.train),
        recipe.optimization.batch_size * recipe.optimization.accumulate,
    )
    return recipe.changed(
        steps=recipe.optimization.epochs * each,
        warmup=recipe.optimization.warmup * each,
        evaluate_every=each,
    )
