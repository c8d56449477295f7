"""What a sweep writes: table.md, table.tex, table.csv and one self-contained report.html."""

from pathlib import Path
from typing import Any

import numpy as np

import qat
from edgeqat.extras import require
from edgeqat.files import read_json, write_text
from qat.analysis.hardest import HardImage, hardest_images
from qat.domains.selection import mean_and_standard_error
from qat.runs.parts import RecipeError
from qat.runs.recipe import KNOWN
from qat.runs.records import results_of
from qat.runs.run_folder import RunFolder
from qat.sweep.engine import is_done
from qat.sweep.spec import Cell, Sweep
from qat.sweep.table import RowKey, Table, table_of


def write_tables(sweep: Sweep) -> tuple[Table, Path]:
    """Write the tables and the report of the cells that are done; returns the table and the report's path."""
    require("jinja2", "matplotlib")
    table = table_of(sweep)
    write_text(sweep.out / "table.md", table.markdown())
    write_text(sweep.out / "table.tex", table.latex())
    write_text(sweep.out / "table.csv", table.csv())
    report = sweep.out / "report.html"
    write_text(report, _html(sweep, table))
    return table, report


def _html(sweep: Sweep, table: Table) -> str:
    import jinja2

    header, *rows = table.entries()
    cells = sweep.cells()
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True
    ).get_template("report.html.j2")
    return template.render(
        title=f"Sweep {sweep.out.name}",
        version=qat.__version__,
        done=len(cells) - len(table.missing),
        cells=len(cells),
        missing=table.missing,
        header=header,
        rows=rows,
        tests=table.tests(),
        runs=_runs(sweep),
        bars=_bars(table),
        frontier=_frontier(sweep, table),
        disorder=_disorder(sweep),
        hardest=_hardest(sweep),
    )


def finished_cells(sweep: Sweep) -> dict[RowKey, list[Cell]]:
    """The cells with results, by the row of the table that they are in; without those that only cross-validate."""
    found: dict[RowKey, list[Cell]] = {}
    for cell in sweep.cells():
        if not cell.also_left_out and is_done(sweep, cell.name):
            found.setdefault((cell.method, cell.bits, cell.preset), []).append(cell)
    return found


def _frontier(sweep: Sweep, table: Table) -> Any:
    """Size, accuracy and latency of the rows of which a cell has been measured; None where none has."""
    from markupsafe import Markup

    from qat.analysis.figures import size_accuracy_latency

    rows: list[dict[str, Any]] = []
    accuracy: dict[str, float] = {}
    measured: dict[RowKey, list[dict[str, Any]]] = {}  # in full precision, quantized
    for key, cells in finished_cells(sweep).items():
        file = sweep.out / cells[0].name / "latency.json"
        if file.exists():
            measured[key] = read_json(file)
    for row in table.rows:
        averages = row.averages(table.targets)
        files = measured.get(row.key)
        if files is not None:
            found = files[-1]
        elif KNOWN[row.key[0]].quantization is None and measured:
            found = next(iter(measured.values()))[0]
        else:
            continue
        if averages:
            rows.append(found | {"name": row.name})
            accuracy[row.name] = mean_and_standard_error(averages)[0]
    if not rows:
        return None
    return Markup(size_accuracy_latency(rows, accuracy))


def _disorder(sweep: Sweep) -> list[tuple[str, Any]]:
    """(cell, figure) of the first cell of every row that kept a scale log."""
    from markupsafe import Markup

    from qat.analysis.scale_figures import disorder_curves
    from qat.analysis.scale_view import open_view

    figures = []
    for cells in finished_cells(sweep).values():
        path = sweep.out / cells[0].name
        if not (path / "scales.json").exists():
            continue
        try:
            view = open_view(path)
        except RecipeError:  # a run of one step
            continue
        figures.append((cells[0].name, Markup(disorder_curves(view))))
    return figures


def _hardest(sweep: Sweep) -> list[tuple[str, str, list[HardImage]]]:
    """For every target (its name, why there are no images, images that most cells answer wrongly).

    Cells of one target and one split of it are taken together, those of the first seed."""
    found = []
    for target in sweep.targets:
        of_target = []
        for cells in finished_cells(sweep).values():
            of_target += [c for c in cells if c.target == target]
        if not of_target:
            continue
        trial = of_target[0].recipe.images.trial_seed
        folders = []
        for cell in of_target:
            if cell.recipe.images.trial_seed == trial:
                folders.append(RunFolder.open(sweep.out / cell.name))
        try:
            found.append((target, "", hardest_images(folders)))
        except RecipeError as error:
            found.append((target, str(error), []))
    return found


def _runs(sweep: Sweep) -> list[dict[str, Any]]:
    """What each finished cell measured."""
    found = []
    for cell in sweep.cells():
        if not is_done(sweep, cell.name):
            continue
        results = results_of(RunFolder.open(sweep.out / cell.name))
        found.append(
            {
                "name": cell.name,
                "target": 100 * results["target"],
                "sources": 100
                * float(np.mean(list(results["source_validation"].values()))),
                "step": results["selected_step"],
                "seconds": results["train_seconds"],
            }
        )
    return found


def _bars(table: Table) -> Any:
    """Mean accuracy by target, a bar each row, its standard error, and a dot for each seed, as SVG."""
    from markupsafe import Markup

    from qat.analysis.figures import COLOURS, new_figure, shown, svg

    figure, axes = new_figure(9, 3.2)
    width = 0.8 / max(len(table.rows), 2)
    places = np.arange(len(table.targets))
    for index, row in enumerate(table.rows):
        offset = (index - (len(table.rows) - 1) / 2) * width
        colour = COLOURS[index % len(COLOURS)]
        for place, target in zip(places, table.targets, strict=True):
            values = row.of_target(target)
            if not values:
                continue
            mean, error = mean_and_standard_error(values)
            label = shown(row.name) if place == 0 else None
            at = place + offset
            axes.bar(at, mean, 0.92 * width, color=colour, label=label)
            axes.errorbar(at, mean, error, color="#222", capsize=2, linewidth=1)
            axes.plot([at] * len(values), values, ".", color="#222", markersize=3)
    axes.set_xticks(places, [shown(target) for target in table.targets])
    axes.set_ylim(0, 100)
    axes.set_ylabel("top-1 accuracy, %")
    axes.legend(
        frameon=False,
        ncols=min(max(len(table.rows), 1), 4),
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        fontsize=8,
    )
    rows = ", ".join(row.name for row in table.rows)
    says = f"Bars of mean target accuracy in percent, by target domain, of {rows}."
    return Markup(svg(figure, says))
