"""What settling does to trained nets: accuracy before and after, and how often the file answers as the net.

    python tools/bench_settling.py runs/mnv2-s0 runs/mnv2-s1 --data-root PACS --images 1000

For each run: the net of its last step (`last.pt`), before it was settled. On `--images` images of the target domain, spread
evenly: accuracy of the net before and after `qat.settle`, and how many answers of the file (ONNX Runtime, run freely from the
image on) are the net's, before and after.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from export import session
from export.lower import lower_to_integers
from export.native_graph import emit
from export.targets import target_named
from qat.runs.build import Built, load_run, load_state
from qat.runs.recipe import Recipe
from qat.runs.run_folder import Samples
from qat.settle import settle_
from qat.train.data import split_of
from qat.train.loaders import samples_of_test

BATCH = 32


def answers_of_net(built: Built, images: NDArray[np.float32]) -> NDArray[np.int64]:
    with torch.no_grad():
        parts = [built.model(torch.from_numpy(images[i : i + BATCH])).argmax(1) for i in range(0, len(images), BATCH)]
    return torch.cat(parts).numpy()


def answers_of_file(built: Built, recipe: Recipe, target: str, images: NDArray[np.float32]) -> NDArray[np.int64]:
    chosen = target_named(target)
    example = torch.zeros(1, 3, recipe.model.image_size, recipe.model.image_size)
    loaded = session.load(emit(lower_to_integers(built.model, example, chosen), chosen), threads=2)
    parts = [loaded.run(images[i : i + BATCH])["logits"].argmax(1) for i in range(0, len(images), BATCH)]
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--target", default="ort-packed")
    options = parser.parse_args()
    print(
        "| run | accuracy before, after, % | answers alike before, after | bias shift | weight scales moved | scales moved |"
    )
    print("|---|---|---|---|---|---|")
    for run in options.runs:
        folder, recipe, built = load_run(run)
        load_state(built.model, folder.load("last.pt"), folder / "last.pt")
        built.model.eval()
        samples = samples_of_test(split_of(recipe, options.data_root), recipe, built, options.images)
        before = measured(built, recipe, options.target, samples)
        settlement = settle_(built.model, torch.zeros(1, 3, recipe.model.image_size, recipe.model.image_size))
        after = measured(built, recipe, options.target, samples)
        shift = max(settlement.shifts.values(), default=0.0)
        print(
            f"| {run.name} | {before[0]:.1f}, {after[0]:.1f} | {before[1]}, {after[1]} of {len(samples.labels)} | "
            f"{shift:.2g} codes | {settlement.scaled} layers | {len(settlement.moved)} |",
            flush=True,
        )


def measured(built: Built, recipe: Recipe, target: str, samples: Samples) -> tuple[float, int]:
    """(accuracy of the net in percent, answers of its file that are the net's)."""
    net = answers_of_net(built, samples.images)
    file = answers_of_file(built, recipe, target, samples.images)
    return 100 * float((net == samples.labels).mean()), int((net == file).sum())


if __name__ == "__main__":
    main()
