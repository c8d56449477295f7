"""recipes/domainnet.py as a script: its presets, and runs of a few steps on the miniature through the real loader."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qat import cli
from qat.domains.folders import DataError
from qat.runs.parts import RecipeError
from qat.runs.recipe import METHODS
from qat.runs.run_folder import RunFolder

SCRIPT = Path(__file__).parents[2] / "recipes/domainnet.py"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("domainnet_recipe", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def choose(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What a command line gives; the working folder is an empty one."""
    monkeypatch.chdir(tmp_path)

    def chosen(*words: str) -> Any:
        monkeypatch.setattr("sys.argv", ["domainnet.py", *words])
        return cli.choose(script.PRESETS, script.__doc__, extra=script.DomainNet())

    return chosen


@pytest.mark.parametrize("word", METHODS)
def test_every_method_starts_from_sagms_published_values(word: str, choose: Any) -> None:
    recipe, _ = choose(word)
    assert recipe.method == word and recipe.parts.keys() == METHODS[word].parts.keys()
    published = {
        "steps": 15_001, "lr": 3e-5, "weight_decay": 1e-6, "dropout": 0.5, "batch_size": 32, "schedule": "constant",
        "holdout": 0.2,
    }  # fmt: skip
    if recipe.sharpness is not None:
        published |= {"alpha": 5e-4, "rho": 0.05}
    assert {name: recipe.entries()[name] for name in published} == published


def test_smoke_changes_what_the_command_line_left_alone(script: ModuleType, choose: Any) -> None:
    given, _ = choose("gaqat", "--smoke", "--steps", "4", "--bits", "3", "--lr", "0.01")
    recipe = script.smoke_test(given)
    assert (recipe.optimization.steps, recipe.grids.bits, recipe.optimization.lr) == (4, 3, 0.01)
    assert recipe.model.backbone == "test_resnet" and recipe.model.dropout == 0.5
    assert recipe.images.data_root == Path("runs/domainnet-miniature")


def test_faults_of_the_command_line(script: ModuleType, choose: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--data-root: give the DomainNet folder"):
        script.train_domainnet(*choose("fp"))
    with pytest.raises(RecipeError, match="leave --data-root out"):
        script.train_domainnet(*choose("fp", "--smoke", "--data-root", "somewhere"))
    with pytest.raises(DataError, match=r"--data-root .*: holds no domain of DomainNet"):
        script.train_domainnet(*choose("fp", "--data-root", str(tmp_path)))


@pytest.mark.slow
def test_fp_then_gaqat(script: ModuleType, choose: Any, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--smoke", "--steps", "2", "--test-domain", "quickdraw")
    assert script.train_domainnet(*choose("fp", *small, "--out", "runs/fp")) == 0
    assert script.train_domainnet(*choose("gaqat", *small, "--init-from", "runs/fp", "--out", "runs/gaqat")) == 0
    printed = capsys.readouterr().out
    assert printed.count("complete, 144 of 144 images") == 2 and "quickdraw (target)" in printed
    results = RunFolder.open(Path("runs/gaqat")).results()
    assert results["method"] == "gaqat" and results["classes"] == ["circle", "square", "star", "triangle"]
    assert set(results["source_validation"]) == {"clipart", "infograph", "painting", "real", "sketch"}


@pytest.mark.slow
@pytest.mark.parametrize("word", METHODS)
def test_every_method_runs(word: str, script: ModuleType, choose: Any) -> None:
    assert script.train_domainnet(*choose(word, "--smoke", "--out", f"runs/{word}")) == 0
    assert RunFolder.open(Path(f"runs/{word}")).results()["method"] == word
