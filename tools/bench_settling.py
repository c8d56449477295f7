"""What settling does to trained nets: accuracy before and after, and how often the file answers as the net.

    python tools/bench_settling.py runs/mnv2-s0 runs/mnv2-s1 --data-root PACS --images 1000

For each run: the net of its last step (`last.pt`), before it was settled; accuracy on the held-out source images and on
the target domain before and after `qat.settle`; and on `--images` images, spread evenly over source and target, how many get
the same answer from ONNX Runtime (the file runs freely, from the image on) as from the net, before and after settling.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from export import session
from export.lower import lower
from export.native_graph import emit
from export.passes import to_integers
from export.targets import target_named
from qat.settle import settle_
from qat.training.checkpoint import Built, load_run, load_state
from qat.training.data import split_of
from qat.training.evaluate import accuracy
from qat.training.loaders import eval_batches, samples_of_test
from qat.training.recipe import Recipe

BATCH = 32


def answers_of_net(built: Built, images: NDArray[np.float32]) -> NDArray[np.int64]:
    with torch.no_grad():
        parts = [built.model(torch.from_numpy(images[i : i + BATCH])).argmax(1) for i in range(0, len(images), BATCH)]
    return torch.cat(parts).numpy()


def answers_of_file(built: Built, recipe: Recipe, target: str, images: NDArray[np.float32]) -> NDArray[np.int64]:
    chosen = target_named(target)
    example = torch.zeros(1, 3, recipe.image_size, recipe.image_size)
    loaded = session.load(emit(to_integers(lower(built.model, example), chosen), chosen), threads=2)
    parts = [loaded.run(images[i : i + BATCH])["logits"].argmax(1) for i in range(0, len(images), BATCH)]
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--target", default="ort-packed")
    parser.add_argument("--agreement-only", action="store_true", help="skip the accuracies")
    options = parser.parse_args()
    print("| run | source, % | target, % | alike before | alike after | bias shift | scales moved |")
    print("|---|---|---|---|---|---|---|")
    for run in options.runs:
        folder, recipe, built = load_run(run)
        load_state(built.model, folder.load("last.pt"), folder / "last.pt")
        built.model.eval()
        split = split_of(recipe, options.data_root)
        images = samples_of_test(split, recipe, built, options.images).images

        def measured() -> tuple[float, float]:
            if options.agreement_only:
                return float("nan"), float("nan")
            with torch.no_grad():
                found = [
                    accuracy(built.model, eval_batches(s, recipe, built), len(split.classes))  # noqa: B023
                    for s in (*split.validation, split.target_in)  # noqa: B023
                ]
            return 100 * float(np.mean(found[:-1])), 100 * found[-1]

        def alike() -> str:
            net = answers_of_net(built, images)  # noqa: B023
            file = answers_of_file(built, recipe, options.target, images)  # noqa: B023
            return f"{int((net == file).sum())} of {len(net)}"

        before, alike_before = measured(), alike()
        example = torch.zeros(1, 3, recipe.image_size, recipe.image_size)
        settlement = settle_(built.model, example)
        after, alike_after = measured(), alike()
        shift = max(settlement.shifts.values(), default=0.0)
        print(
            f"| {run.name} | {before[0]:.2f} -> {after[0]:.2f} | {before[1]:.2f} -> {after[1]:.2f} | {alike_before} | "
            f"{alike_after} | {shift:.2g} codes | {len(settlement.moved)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
