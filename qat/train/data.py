"""The images that a recipe names, split as it says."""

from collections.abc import Sequence
from pathlib import Path

from qat.domains.benchmarks import Benchmark, read_benchmark, recognised
from qat.domains.cifar import TORCHVISION, cifar10_split, read_cifar10, steps_per_epoch
from qat.domains.folders import Domain, folders_in, read_domains
from qat.domains.image_folders import read_image_folders, recognised_layout
from qat.domains.pacs_lists import official_split
from qat.domains.splits import Split, leave_one_domain_out
from qat.domains.synthetic import synthetic_domains
from qat.runs.parts import Images, RecipeError
from qat.runs.recipe import Recipe


def split_of(
    recipe: Recipe,
    root: Path | None = None,
    *,
    check_images: bool = False,
    download: bool = False,
    notes: list[str] | None = None,
) -> Split:
    """The recipe's data as train, validation and test parts.

    root:  where the images are, if no longer where the recipe says.
    notes: filled with lines about the images that their owner should know.
    Raises ValueError naming the flag or folder at fault.
    """
    images = recipe.images
    root = root or images.data_root
    said = [] if notes is None else notes
    if images.data == "cifar10":
        if root is None:
            raise RecipeError(
                "--data-root: give the CIFAR-10 folder (or where --download shall put it)"
            )
        train, test = read_cifar10(root, download)
        return cifar10_split(train, test, images.holdout, images.trial_seed)
    if images.data == "folder":
        if root is None:
            raise RecipeError("--data folder: name the folder of images")
        found = read_image_folders(
            root,
            holdout=images.holdout,
            trial_seed=images.trial_seed,
            check_images=check_images,
        )
        said += found.notes
        return found.split
    if root is None:
        domains: Sequence[Domain] = synthetic_domains(
            per_class=images.per_class,
            image_size=recipe.model.image_size,
            seed=recipe.optimization.seed,
        )
    else:
        domains = _domains(root, check_images, said)
    return split_domains(images, domains)


def split_domains(images: Images, domains: Sequence[Domain]) -> Split:
    """`domains` with one left out: split as DomainBed draws, or by PACS's own lists."""
    if images.official_lists is not None:
        return official_split(domains, images.official_lists, images.test_domain)
    return leave_one_domain_out(
        domains,
        images.test_domain,
        also_left_out=images.also_left_out,
        holdout_fraction=images.holdout,
        trial_seed=images.trial_seed,
    )


def _domains(root: Path, check_images: bool, notes: list[str]) -> list[Domain]:
    benchmark = recognised(root)
    if benchmark is None or not _has_classes_of(benchmark, root):
        return read_domains(root, check_images=check_images)
    domains, inventory = read_benchmark(root, benchmark, check_images=check_images)
    notes.append(str(inventory))
    return domains


def _has_classes_of(benchmark: Benchmark, root: Path) -> bool:
    """Whether folders that are named as a benchmark's domains hold its classes, too, and not somebody's own."""
    for name in benchmark.environments:
        for folder in (root / name, root / benchmark.folder / name):
            if folder.is_dir() and benchmark.classes:
                classes = {inner.name for inner in folders_in(folder)}
                return classes <= set(benchmark.classes)
    return True


def layout_of(root: Path | None) -> str:
    """How the images under `root` lie: "domains", "folder" or "cifar10"; without a root, rendered domains.

    Raises DataError where they lie otherwise.
    """
    if root is None:
        return "domains"
    if (root / TORCHVISION).is_dir():
        return "cifar10"
    if recognised(root) is not None:
        return "domains"
    return "domains" if recognised_layout(root) == "domains" else "folder"


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
