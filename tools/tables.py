"""Every number of a sweep's table and the run folder it comes from: the table, then a line for each cell with its command.

uv run tools/tables.py STUDY.toml [--out FOLDER]

Reads the run folders alone. A cell's command trains it again, from its own recipe.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

from qat.runs.parts import RecipeError
from qat.runs.records import results_of
from qat.runs.run_folder import RunFolder
from qat.sweep.report import finished_cells
from qat.sweep.spec import Cell, Sweep, read_sweep
from qat.sweep.table import table_of


@dataclass(frozen=True)
class Flags:
    study: Positional[Path]
    """The sweep's file."""
    out: Path | None = None
    """Folder of its cells, if not as the file says."""


def line(sweep: Sweep, cell: Cell) -> str:
    folder = RunFolder.open(sweep.out / cell.name)
    results = results_of(folder)
    recipe = folder.recipe()
    command = f"qat train {recipe.method} --config {folder / 'recipe.json'} --out NEW"
    steps = results.get("steps") or recipe.optimization.steps
    return (
        f"{100 * results['target']:6.2f} %  {cell.target}, seed {recipe.optimization.seed}, "
        f"{steps} steps, step {results['selected_step']} chosen ({results['selection']}); {command}"
    )


def main(flags: Flags) -> int:
    sweep = read_sweep(flags.study, out=flags.out)
    print(table_of(sweep).markdown())
    for cells in finished_cells(sweep).values():
        for cell in cells:
            print(line(sweep, cell))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Flags, description=__doc__)))
    except RecipeError as error:
        sys.exit(f"error: {error}")
