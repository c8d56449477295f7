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
from qat.runs.recipe import METHODS, RecipeError
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
        return cli.choose(script.PRESETS, script.__doc__, wrap=script.DomainNet)

    return chosen


@pytest.mark.parametrize("word", METHODS)
def test_every_method_starts_from_sagms_published_values(word: str, choose: Any) -> None:
    recipe = choose(word).recipe
    assert recipe.method == word and type(recipe) is type(METHODS[word])
    assert (recipe.steps, recipe.lr, recipe.weight_decay, recipe.dropout) == (15_001, 3e-5, 1e-6, 0.5)
    assert (recipe.batch_size, recipe.schedule, recipe.holdout) == (32, "constant", 0.2)
    assert getattr(recipe, "alpha", 5e-4) == 5e-4 and getattr(recipe, "rho", 0.05) == 0.05


def test_smoke_changes_what_the_command_line_left_alone(script: ModuleType, choose: Any) -> None:
    flags = choose("gaqat", "--smoke", "--steps", "4", "--bits", "3", "--lr", "0.01")
    recipe = script.smoke_test(flags.recipe)
    assert (recipe.steps, recipe.bits, recipe.lr, recipe.backbone) == (4, 3, 0.01, "test_resnet")
    assert recipe.data_root == Path("runs/domainnet-miniature") and recipe.dropout == 0.5


def test_faults_of_the_command_line(script: ModuleType, choose: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--data-root: give the DomainNet folder"):
        script.train(choose("fp"))
    with pytest.raises(RecipeError, match="leave --data-root out"):
        script.train(choose("fp", "--smoke", "--data-root", "somewhere"))
    with pytest.raises(DataError, match=r"--data-root .*: holds no DomainNet domain"):
        script.train(choose("fp", "--data-root", str(tmp_path)))


def test_fp_then_gaqat(script: ModuleType, choose: Any, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--smoke", "--steps", "2", "--test-domain", "quickdraw")
    assert script.train(choose("fp", *small, "--out", "runs/fp")) == 0
    assert script.train(choose("gaqat", *small, "--init-from", "runs/fp", "--out", "runs/gaqat")) == 0
    printed = capsys.readouterr().out
    assert printed.count("complete, 144 of 144 images") == 2 and "quickdraw (target)" in printed
    results = RunFolder.open(Path("runs/gaqat")).results()
    assert results["method"] == "gaqat" and results["classes"] == ["circle", "square", "star", "triangle"]
    assert set(results["source_validation"]) == {"clipart", "infograph", "painting", "real", "sketch"}


@pytest.mark.slow
@pytest.mark.parametrize("word", METHODS)
def test_every_method_runs(word: str, script: ModuleType, choose: Any) -> None:
    assert script.train(choose(word, "--smoke", "--out", f"runs/{word}")) == 0
    assert RunFolder.open(Path(f"runs/{word}")).results()["method"] == word
