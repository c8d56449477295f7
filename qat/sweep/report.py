"""What a sweep writes: table.md, table.tex, table.csv and one self-contained report.html."""

from pathlib import Path
from typing import Any

import numpy as np

import qat
from edgeqat.extras import require
from edgeqat.files import write_text
from qat.domains.selection import mean_and_standard_error
from qat.runs.records import results_of
from qat.runs.run_folder import RunFolder
from qat.sweep.spec import Sweep
from qat.sweep.table import Table, table_of


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
    )


def _runs(sweep: Sweep) -> list[dict[str, Any]]:
    """What each finished cell measured."""
    found = []
    for cell in sweep.cells():
        folder = sweep.out / cell.name
        if not (folder / "results.json").exists():
            continue
        results = results_of(RunFolder.open(folder))
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
    return Markup(svg(figure))
