"""docs/walks.md names files and functions that are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS = re.findall(r"`([\w/]+\.py)::([\w.]+)`", (ROOT / "docs/walks.md").read_text())


def names_of(tree: ast.Module) -> set[str]:
    """Functions, classes, methods (Class.method) and constants of a file."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


@pytest.mark.parametrize(("file", "name"), STEPS, ids="::".join)
def test_it_is_there(file: str, name: str) -> None:
    assert name in names_of(ast.parse((ROOT / file).read_text()))


def test_six_walks_of_at_most_five_files() -> None:
    walks = (ROOT / "docs/walks.md").read_text().split("\n## ")[1:]
    assert len(walks) == 6
    for walk in walks:
        files = set(re.findall(r"`([\w/]+\.py)(?:::|`)", walk))
        assert 0 < len(files) <= 5, walk.splitlines()[0]
