"""What a command line takes from presets, files and the run it starts from."""

import json
from pathlib import Path
from typing import Any

import pytest

from edgeqat.files import FileError
from qat import cli
from qat.runs.given import with_files
from qat.runs.parts import RecipeError
from qat.runs.recipe import KNOWN, TRAINED, Recipe, from_json, recipe_of, to_json


def given(method: str, *words: str, recipe: Recipe | None = None) -> dict[str, Any]:
    return with_files(recipe or KNOWN[method], words)[0].entries()


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_files_of_three_kinds_give_the_same(tmp_path: Path) -> None:
    files = (
        written(tmp_path / "a.toml", 'method = "lsq"\nlr = 0.5\nimage-size = 64\n[grids]\nbits = 3\n'),
        written(tmp_path / "a.yaml", "method: lsq\nlr: 0.5\nimage_size: 64\nbits: 3\n"),
        written(tmp_path / "a.json", '{"lr": 0.5, "image_size": 64, "grids": {"bits": 3}}'),
    )
    for file in files:
        values = given("lsq", "--config", str(file), "--seed", "3")
        assert (values["lr"], values["image_size"], values["bits"]) == (0.5, 64, 3)
        assert given("lsq", f"--config={file}") == values


def test_words_that_are_used_up_are_gone_and_others_stay(tmp_path: Path) -> None:
    file = written(tmp_path / "a.toml", "lr = 0.5")
    words = ["--seed", "3", "--config", str(file), "--preset=sagm", "--init-from", str(tmp_path)]
    assert with_files(KNOWN["lsq"], words)[1] == ["--seed", "3", "--init-from", str(tmp_path)]


def test_a_recipe_of_another_run_is_a_configuration(tmp_path: Path) -> None:
    before = recipe_of("gaqat", window=7, bits=3, out=tmp_path / "run", resume=True)
    file = written(tmp_path / "recipe.json", json.dumps(to_json(before)))
    values = given("gaqat", "--config", str(file))
    assert values == before.entries() | {"out": None, "resume": False}


def test_a_preset_comes_first_then_the_file(tmp_path: Path) -> None:
    file = written(tmp_path / "a.toml", "lr = 0.5")
    values = given("sagm", "--preset", "sagm", "--config", str(file))
    assert (values["lr"], values["dropout"], values["alpha"]) == (0.5, 0.5, 1e-3)
    assert "alpha" not in given("fp", "--preset", "sagm")


def test_a_resumed_run_needs_no_flag_twice(tmp_path: Path) -> None:
    begun = recipe_of("lsq", steps=9, lr=0.3, out=tmp_path)
    written(tmp_path / "recipe.json", json.dumps(to_json(begun)))
    values = given("lsq", "--resume", "--out", str(tmp_path))
    assert (values["steps"], values["lr"]) == (9, 0.3)
    assert given("lsq", "--out", str(tmp_path))["lr"] == 5e-4


@pytest.mark.parametrize("flags", [[], ["--image-size", "40"]])
def test_a_run_inherits_what_it_must_share_and_flags_win(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = recipe_of("fp", backbone="test_resnet", image_size=32, test_domain="photo", trial_seed=4, lr=0.3)
    written(tmp_path / "recipe.json", json.dumps(to_json(start)))
    words = ["lsq", "--init-from", str(tmp_path), *flags]
    recipe, _ = cli.choose(TRAINED, "", extra=cli.TrainOn(), args=words)
    values = recipe.entries()
    assert (values["backbone"], values["test_domain"], values["trial_seed"]) == ("test_resnet", "photo", 4)
    assert values["image_size"] == (40 if flags else 32) and values["lr"] == 5e-4 and values["data"] == "domains"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "lr = ", "cannot be read"),
        ("a.yaml", "- lr\n- 3", "holds no entries"),
        ("a.txt", "lr = 3", "must end in .toml"),
        ("a.toml", "colour = 3", r"a\.toml: unknown entries colour"),
        ("a.toml", "lr = 'fast'", r"a\.toml: entry 'lr' cannot be"),
        ("a.toml", "lr = -1", r"a\.toml: --lr must be more than 0"),
        ("a.toml", "[colours]\nlr = 3", "lsq has no part 'colours'; it has images,"),
        ("a.toml", "bits = 3\n[grids]\nbits = 4", "gives bits twice"),
        ("a.toml", "method = 'fp'", "is of the method 'fp', the command line says 'lsq'"),
    ],
)
def test_faults_name_the_file(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        given("lsq", "--config", str(written(tmp_path / name, text)))


def test_a_file_or_preset_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"a\.toml"):
        given("lsq", "--config", str(tmp_path / "a.toml"))
    with pytest.raises(RecipeError, match="--preset x: no such preset; known: domainbed"):
        given("lsq", "--preset", "x")


@pytest.mark.parametrize("method", TRAINED)
def test_a_recipe_is_read_from_json_and_from_a_checkpoint_which_keeps_tuples(method: str) -> None:
    recipe = TRAINED[method].changed(trackers=("wandb",))
    values = to_json(recipe)
    assert from_json(values, Path("checkpoint.pt")) == recipe
    assert from_json(json.loads(json.dumps(values)), Path("recipe.json")) == recipe
    values["trackers"] = ("wandb",)
    assert from_json(values, Path("checkpoint.pt")) == recipe
    values["trackers"] = ["nobody"]
    with pytest.raises(RecipeError, match=r"checkpoint\.pt: entry 'trackers' cannot be \"nobody\""):
        from_json(values, Path("checkpoint.pt"))
