"""The table of GAQAT's controls, row by row."""

from typing import get_args

from qat.objectives.conflict import COMBINE
from qat.objectives.controls import CONTROLS, ControlName


def test_every_name_has_its_row_in_the_order_of_the_command_line() -> None:
    assert tuple(CONTROLS) == get_args(ControlName)


def test_a_control_differs_from_the_method_in_one_thing() -> None:
    """policy, branch, above, combined; what combines gradients freezes nothing."""
    rows = {name: (row.policy, row.branch, row.above, row.combined) for name, row in CONTROLS.items()}
    method = ("disorder", "task", False, "")
    assert rows["gaqat"] == method
    for name, row in rows.items():
        differing = [found for found, usual in zip(row, method, strict=True) if found != usual]
        assert len(differing) == (2 if row[3] else name != "gaqat"), name
        assert not row[3] or row[0] == "never"
    assert {row[3] for row in rows.values()} == {"", "alternate", *COMBINE}
