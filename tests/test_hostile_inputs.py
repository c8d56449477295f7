"""Every command on damaged, impossible and careless input: one line that says what is wrong, exit code 2, nothing written.

A case is a command line and what is done to a copy of a small run first. `{fp}` is a full-precision run, `{run}` a quantized
one, `{file}` its ONNX file, `{image}` an image, `{data}` a folder of domains, `{box}` the folder that holds them all.
"""

import json
import os
import pickle
import re
import runpy
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qat import cli
from qat.deploy import export_run
from qat.domains.synthetic import synthetic_domains
from qat.runs.recipe import recipe_of
from qat.train.loop import run

ROOT = Path(__file__).parent.parent
SECONDS = 60  # a case takes one or two on an idle machine; one that hangs is stopped
TINY: dict[str, Any] = {
    "backbone": "test_resnet", "image_size": 32, "steps": 4, "batch_size": 4, "evaluate_every": 2, "workers": 0,
    "per_class": 6,
}  # fmt: skip
Prepare = Callable[[Path], None]


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the cases copy."""
    box = tmp_path_factory.mktemp("origin")
    domains = synthetic_domains(per_class=6, image_size=32, seed=0)
    run(recipe_of("fp", **TINY, out=box / "fp"), domains)
    run(recipe_of("gaqat", **TINY, out=box / "run", init_from=box / "fp", window=2, calibration_batches=2), domains)
    export_run(box / "run", out=box / "model.onnx")
    for domain in ("photo", "sketch"):
        for index, name in enumerate(("cat", "dog")):
            folder = box / "data" / domain / name
            folder.mkdir(parents=True)
            for number in range(6):
                pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
                Image.fromarray(np.where(index, pixels, 255 - pixels)).save(folder / f"{number}.png")
    shutil.copy(box / "data/photo/cat/0.png", box / "image.png")
    return box


# What is done to the copy.


def nothing(box: Path) -> None:
    pass


def text(name: str, content: str) -> Prepare:
    return lambda box: write(box / name, content.encode())


def data(name: str, content: bytes) -> Prepare:
    return lambda box: write(box / name, content)


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def cut(name: str, keep: float = 0.5) -> Prepare:
    """Keep so much of a file."""

    def prepare(box: Path) -> None:
        whole = (box / name).read_bytes()
        (box / name).write_bytes(whole[: int(len(whole) * keep)])

    return prepare


def flip(name: str) -> Prepare:
    """Flip one bit in the largest part of an archive."""

    def prepare(box: Path) -> None:
        path = box / name
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.compress_size)
        content = bytearray(path.read_bytes())
        content[largest.header_offset + 200 + largest.compress_size // 2] ^= 1
        path.write_bytes(content)

    return prepare


def remove(name: str) -> Prepare:
    def prepare(box: Path) -> None:
        path = box / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return prepare


def fifo(name: str) -> Prepare:
    def prepare(box: Path) -> None:
        (box / name).unlink(missing_ok=True)
        os.mkfifo(box / name)

    return prepare


def folder(name: str) -> Prepare:
    def prepare(box: Path) -> None:
        (box / name).unlink(missing_ok=True)
        (box / name).mkdir(parents=True)

    return prepare


def entry(name: str, **values: Any) -> Prepare:
    """Change entries of a JSON file; None removes one."""

    def prepare(box: Path) -> None:
        content = json.loads((box / name).read_text()) | values
        kept = {key: value for key, value in content.items() if value is not None}
        (box / name).write_text(json.dumps(kept))

    return prepare


def arrays(name: str, **values: Any) -> Prepare:
    """Change arrays of an .npz file; None removes one."""

    def prepare(box: Path) -> None:
        with np.load(box / name) as stored:
            content = {key: stored[key] for key in stored.files} | values
        np.savez(box / name, **{key: value for key, value in content.items() if value is not None})

    return prepare


def recipe(**values: Any) -> Prepare:
    return entry("run/recipe.json", **values)


def results(**values: Any) -> Prepare:
    return entry("run/results.json", **values)


def predictions(**values: Any) -> Prepare:
    """Change the arrays of the target domain."""
    return arrays("run/predictions.npz", **{f"sketch/{name}": value for name, value in values.items()})


def samples(**values: Any) -> Prepare:
    return arrays("run/samples.npz", **values)


SMALL_IMAGES = {
    "images": np.zeros((2, 3, 8, 8), np.float32), "labels": np.zeros(2, np.int64), "domains": np.array(["a", "a"]),
}  # fmt: skip
WHOLE_OF_NAN = np.full((2, 3, 32, 32), np.nan, np.float32)


def checkpoint(name: str, change: Callable[[dict[str, Any]], Any]) -> Prepare:
    """Have `change` edit a checkpoint; what it returns is saved, or the edited one."""

    def prepare(box: Path) -> None:
        state = torch.load(box / name, weights_only=True)
        torch.save(change(state) or state, box / name)

    return prepare


def put_nan(state: dict[str, Any]) -> None:
    name = next(name for name, value in state["model"].items() if isinstance(value, torch.Tensor) and value.dim() == 4)
    state["model"][name][0, 0, 0, 0] = float("nan")


def drop_the_classes(state: dict[str, Any]) -> None:
    del state["classes"]


def copy(source: str, to: str) -> Prepare:
    """Put a copy of a file or folder in another's place."""

    def prepare(box: Path) -> None:
        remove(to)(box)
        if (box / source).is_dir():
            shutil.copytree(box / source, box / to)
        else:
            shutil.copy(box / source, box / to)

    return prepare


def other_weights(box: Path) -> None:
    torch.save({"a": torch.ones(1)}, box / "w.pt")


def drop_a_weight(state: dict[str, Any]) -> None:
    state["model"].pop(next(name for name in state["model"] if name.endswith("weight")))


class Bomb:
    """Unpickled without care, it makes a file."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


def bomb(name: str) -> Prepare:
    return lambda box: write(box / name, pickle.dumps({"model": Bomb(str(box / "canary"))}))


def bomb_in_torch(name: str) -> Prepare:
    return lambda box: torch.save({"model": Bomb(str(box / "canary"))}, box / name)


def bomb_in_numpy(name: str) -> Prepare:
    def prepare(box: Path) -> None:
        np.savez(box / name, images=np.array([Bomb(str(box / "canary"))], dtype=object))

    return prepare


@dataclass(frozen=True)
class Case:
    """words: a regular expression that the error line has. leaves: what may be left behind."""

    name: str
    line: str
    words: str
    prepare: Prepare = nothing
    leaves: str = ""


def run_cases() -> Iterator[Case]:
    """Damaged run folders, under every command that opens one."""
    commands = {
        "export": "qat export {run} --out {box}/new.onnx",
        "certify": "qat certify {run} {file}",
        "bundle": "qat bundle {run} {file} --out {box}/bundle",
        "bench": "qat bench {run} --rounds 1 --out {box}/bench",
        "compare": "qat compare {fp} {run} --json {box}/out.json",
        "ensemble": "qat ensemble {run} {fp} --out {box}/joined.onnx",
        "report": "qat report {run}",
        "inspect": "qat inspect {run} --json {box}/out.json",
    }
    for name, line in commands.items():
        yield Case(f"{name}: no such run", line.replace("{run}", "{box}/absent"), "absent: no such run folder")
        if name != "compare":  # which takes a file too
            yield Case(f"{name}: a file for a run", line.replace("{run}", "{file}"), r"model\.onnx: is a file")
        yield Case(f"{name}: an empty run", line.replace("{run}", "{box}/empty"), "no such file", folder("empty"))
    builds = ("export", "certify", "bundle", "bench", "ensemble", "report")
    for name in builds:
        yield Case(
            f"{name}: half a checkpoint", commands[name], r"checkpoint\.pt: is not a readable", cut("run/checkpoint.pt")
        )
        yield Case(f"{name}: one flipped bit", commands[name], r"checkpoint\.pt: is damaged", flip("run/checkpoint.pt"))
        yield Case(
            f"{name}: edited bits", commands[name], r"recipe\.json: was changed after training, which had --bits 4 \(now 2\)",
            recipe(bits=2),
        )  # fmt: skip
    export, compare, report, inspect = (commands[name] for name in ("export", "compare", "report", "inspect"))
    for case, words, prepare in (
        ("no recipe", r"recipe\.json: no such file", remove("run/recipe.json")),
        ("empty recipe", r"recipe\.json: is not JSON", text("run/recipe.json", "")),
        ("half a recipe", r"recipe\.json: is not JSON", cut("run/recipe.json")),
        ("recipe of bytes", r"recipe\.json: cannot be read as text", data("run/recipe.json", b"\xff\xfe\x00")),
        ("recipe of brackets", r"recipe\.json: is not JSON", text("run/recipe.json", "[" * 100_000)),
        ("recipe is a list", r"recipe\.json: holds no recipe", text("run/recipe.json", "[]")),
        ("recipe is a folder", r"recipe\.json: is not a regular file", folder("run/recipe.json")),
        ("recipe is a pipe", r"recipe\.json: is not a regular file", fifo("run/recipe.json")),
        ("unknown method", r"recipe\.json: unknown method 'magic'", recipe(method="magic")),
        ("method is a list", r"recipe\.json: unknown method", recipe(method=["lsq"])),
        ("unknown entry", r"recipe\.json: unknown entries colour", recipe(colour="red")),
        ("bits is text", r"recipe\.json: entry 'bits' cannot be \"4\"", recipe(bits="4")),
        ("bits is true", r"recipe\.json: entry 'bits' cannot be true", recipe(bits=True)),
        ("bits is 40", r"recipe\.json: --bits must be at least 2", recipe(bits=40)),
        ("lr is nan", r"recipe\.json: --lr must be", recipe(lr=float("nan"))),
        ("huge images", r"recipe\.json: --image-size must be", recipe(image_size=200_000)),
        ("other images", r"changed after training, which had --image-size 32", recipe(image_size=48)),
        ("other backbone", r"changed after training, .*--backbone", recipe(backbone="resnet18")),
        ("other mean", r"changed after training, .*--normalization", recipe(normalization="half")),
        ("other method", r"changed after training, .*--control", recipe(control="never")),
        ("path is a number", r"recipe\.json: entry 'init_from' cannot be 3", recipe(init_from=3)),
        ("no checkpoint", r"checkpoint\.pt: no such file", remove("run/checkpoint.pt")),
        ("empty checkpoint", r"checkpoint\.pt: is not a readable", text("run/checkpoint.pt", "")),
        ("checkpoint is a pipe", r"checkpoint\.pt: is not a regular", fifo("run/checkpoint.pt")),
        ("checkpoint is a pickle", r"checkpoint\.pt: is not a readable", bomb("run/checkpoint.pt")),
        ("checkpoint runs code", r"checkpoint\.pt: is not a readable", bomb_in_torch("run/checkpoint.pt")),
        ("checkpoint is a list", r"checkpoint\.pt: holds \[1\]", checkpoint("run/checkpoint.pt", lambda s: [1])),
        ("no classes", r"checkpoint\.pt: has no entry 'classes'", checkpoint("run/checkpoint.pt", drop_the_classes)),
        ("no such weight", r"checkpoint\.pt: does not fit", checkpoint("run/checkpoint.pt", drop_a_weight)),
        ("a weight is nan", r"checkpoint\.pt: .* holds values that are nan", checkpoint("run/checkpoint.pt", put_nan)),
        ("checkpoint of another run", r"does not fit|was changed after", copy("fp/checkpoint.pt", "run/checkpoint.pt")),
        ("no results", r"results\.json: no such file", remove("run/results.json")),
        ("half the results", r"results\.json: is not JSON", cut("run/results.json")),
        ("classes of numbers", r"results\.json: entry classes", results(classes=[1, 2])),
    ):  # fmt: skip
        yield Case(f"export: {case}", export, words, prepare)
    for case, words, prepare in (
        ("no predictions", r"predictions\.npz: no such file", remove("run/predictions.npz")),
        ("half the predictions", r"predictions\.npz: cannot be read", cut("run/predictions.npz")),
        ("predictions run code", r"predictions\.npz: cannot be read", bomb_in_numpy("run/predictions.npz")),
        ("predictions of text", r"predictions\.npz: cannot be read", text("run/predictions.npz", "no archive")),
        ("fewer labels", r"predictions\.npz: domain 'sketch' has no", predictions(label=np.zeros(3, np.int64))),
        ("no labels", r"predictions\.npz: domain 'sketch' has no", predictions(label=None)),
        ("labels of floats", r"predictions\.npz: domain 'sketch' has no", predictions(label=np.zeros(42))),
        ("another target", r"was tested on", results(test_domain="photo")),
        ("target is a list", r"results\.json: entry test_domain is", results(test_domain=["photo"])),
        ("renamed classes", r"have other classes", results(classes=["x"] * 7)),
    ):  # fmt: skip
        yield Case(f"compare: {case}", compare, words, prepare)
    for case, words, prepare in (
        ("no samples", r"samples\.npz: no such file", remove("run/samples.npz")),
        ("half the samples", r"samples\.npz: cannot be read", cut("run/samples.npz")),
        ("samples run code", r"samples\.npz: cannot be read", bomb_in_numpy("run/samples.npz")),
        ("samples without labels", r"samples\.npz: has no array 'labels'", samples(labels=None)),
        ("samples of nan", r"samples\.npz: its images are not", samples(images=WHOLE_OF_NAN)),
        ("samples of another shape", r"samples\.npz: its images are not", samples(images=np.zeros((2, 32, 32), np.float32))),
        ("samples of another size", r"samples\.npz", samples(**SMALL_IMAGES)),
        ("more labels than images", r"samples\.npz: holds", samples(labels=np.zeros(7, np.int64))),
    ):  # fmt: skip
        yield Case(f"certify: {case}", commands["certify"], words, prepare)
    for case, words, prepare in (
        ("accuracy of text", r'results\.json: entry target is "high", expected a number', results(target="high")),
        ("a domain's of text", r"entry source_validation.photo is", results(source_validation={"photo": "x"})),
        ("no target", r"results\.json: entry target is missing", results(target=None)),
        ("a damaged log line", r"metrics\.jsonl: line 1 is not JSON", text("run/metrics.jsonl", '{"step": \n{"step": 2}\n')),
        ("a log line without a step", r"line 1: has no entry 'step'", text("run/metrics.jsonl", '{"loss": 1.0}\n')),
        ("a log of bytes", r"metrics\.jsonl: cannot be read as text", data("run/metrics.jsonl", b"\xff\xff")),
        ("damaged scales.json", r"scales\.json: is not JSON", text("run/scales.json", "{")),
        ("no scales.f16", r"scales\.f16: ", remove("run/scales.f16")),
        ("another baseline", r"no such run folder", remove("fp")),
    ):  # fmt: skip
        yield Case(f"report: {case}", report, words, prepare)
    for case, words, prepare in (
        ("names of numbers", r"scales\.json", entry("run/scales.json", names=[1, 2])),
        ("no window", r"scales\.json: entry window is missing", entry("run/scales.json", window=None)),
        ("a window of 0", r"scales\.json", entry("run/scales.json", window=0)),
        ("other scales", r"scales\.json", entry("run/scales.json", names=["a.weight"])),
        ("an empty log", r"scales\.f16", text("run/scales.f16", "")),
        ("a full-precision run", r"scale", copy("fp", "run")),
    ):  # fmt: skip
        yield Case(f"inspect: {case}", inspect, words, prepare)


def flag_cases() -> Iterator[Case]:
    """Impossible values of flags."""
    for line, words in (
        ("qat export {run} --target warp", "target 'warp': unknown"),
        ("qat export {fp} --target ort-packed", "is a full-precision run"),
        ("qat export {run} --out {box}", "is a folder"),
        ("qat export {run} --out /dev/null", "/dev/null: is a folder, a device or a pipe"),
        ("qat export {run} --out {file}/x.onnx", "model.onnx/x.onnx: cannot be written"),
        ("qat certify", "qat certify takes model.onnx, or RUN"),
        ("qat certify {run} {file} --images 0", "--images must be at least 1"),
        ("qat certify {run} {file} --on mars", "mars"),
        ("qat certify {run} {box}/absent.onnx", "absent.onnx: no such file|absent.onnx"),
        ("qat certify {fp} {file}", "is a full-precision run"),
        ("qat certify {box}/absent.onnx", "absent.onnx"),
        ("qat bundle {run} {file} --out {box}", "exists"),
        ("qat bundle {run} {file} --out {box}/b --images -1", "--images must be at least 1"),
        ("qat bench {run} --threads 0", "--threads must be at least 1"),
        ("qat bench {run} --threads 100000", "--threads must be at least 1 and at most 1024"),
        ("qat bench {run} --batch 0", "--batch must be at least 1"),
        ("qat bench {run} --rounds 0", "--rounds must be at least 1"),
        ("qat bench {run} --out {file} --rounds 1", "model.onnx"),
        ("qat compare {fp} {run} --max-drop nan", "--max-drop must be"),
        ("qat compare {fp} {run} --max-drop -1", "--max-drop must be"),
        ("qat compare {fp} {run} --max-drop inf", "--max-drop must be"),
        ("qat compare {fp} {run} --alpha 0", "--alpha must be more than 0 and less than 1, got 0"),
        ("qat compare {fp} {run} --alpha nan", "--alpha must be"),
        ("qat compare {box}/base.json {run} --update-baseline --max-drop nan", "--max-drop must be"),
        ("qat compare {box}/absent.json {run}", "absent.json"),
        ("qat compare {image} {run}", "image.png"),
        ("qat compare {fp} {run} --json {box}", "is a folder"),
        ("qat compare {fp} {run} --markdown {file}/x.md", "cannot be written"),
        ("qat compare {fp} {file} --data-root {box}/absent", "absent"),
        ("qat ensemble {run}", "at least two"),
        ("qat ensemble {run} {run} --target fp32 --out {box}/e.onnx", "has no codes"),
        ("qat report {run} --baseline {box}/absent", "absent: no such run folder"),
        ("qat report {run} --beside {file}", "is a file"),
        ("qat inspect {run} --top 0", "--top must be at least 1"),
        ("qat predict {file} {box}/absent.png", "absent.png"),
        ("qat predict {file} {box}", "origin|box|regular"),
        ("qat predict {image} {image}", "image.png"),
        ("qat predict {box} {image}", "box|regular|folder"),
    ):
        yield Case(line, line, words)
    yield Case("stored baseline is a list", "qat compare {box}/base.json {run}", "base.json", text("base.json", "[]"))
    yield Case("stored baseline of text", "qat compare {box}/base.json {run}", "base.json",
               text("base.json", '{"target": "c", "domains": {"c": ["x", "y"]}}'))  # fmt: skip
    yield Case("stored baseline half", "qat compare {box}/base.json {run}", "base.json", text("base.json", '{"target"'))
    yield Case("text for an image", "qat predict {file} {box}/a.jpg", "a.jpg", text("a.jpg", "hello"))
    yield Case("half an image", "qat predict {file} {image}", "image.png", cut("image.png"))
    yield Case("no image at all", "qat predict {file} {image}", "image.png", text("image.png", ""))
    yield Case("pipe for an image", "qat predict {file} {box}/a.jpg", "a.jpg", fifo("a.jpg"))
    yield Case("empty file", "qat predict {file} {image}", "model.onnx", text("model.onnx", ""))
    yield Case("half a file", "qat predict {file} {image}", "model.onnx", cut("model.onnx"))
    yield Case("file of noise", "qat certify {file}", "model.onnx", data("model.onnx", bytes(range(256)) * 40))
    yield Case("pipe for a file", "qat certify {file}", "model.onnx", fifo("model.onnx"))


QUICK = "--backbone test_resnet --image-size 32 --steps 2 --batch-size 4 --evaluate-every 2 --workers 0 --out {box}/new"
PACS = f"recipes/pacs.py lsq --data-root {{data}} --test-domain sketch {QUICK}"
CIFAR = "recipes/cifar10.py biper --data-root {data} --out {box}/new"


def recipe_cases() -> Iterator[Case]:
    """Recipes: their data, weights and rules."""
    for case, flags, words, prepare in (
        ("data is absent", "--data-root {box}/absent", "absent: no such folder", nothing),
        ("data is a file", "--data-root {file}", "model.onnx", nothing),
        ("data is empty", "--data-root {box}/empty", "holds no domain folders", folder("empty")),
        ("no such domain", "--test-domain mars", "mars", nothing),
        ("a class is missing", "", "class folders missing: dog", remove("data/photo/dog")),
        ("an image of text", "", "unreadable image", text("data/photo/dog/0.png", "hello")),
        ("half an image", "", "unreadable image", cut("data/photo/dog/0.png")),
        ("an image is a pipe", "", "0.png", fifo("data/photo/dog/0.png")),
        ("no such backbone", "--backbone resnet1899", "timm has no such model", nothing),
        ("no such optimizer", "--optimizer adamant", "timm has no such optimizer", nothing),
        ("weights absent", "--weights {box}/absent.pt", "absent.pt: No such file", nothing),
        ("weights of text", "--weights {box}/w.pt", "w.pt: not a readable checkpoint", text("w.pt", "hello")),
        ("weights run code", "--weights {box}/w.pt", "w.pt: not a readable checkpoint", bomb_in_torch("w.pt")),
        ("weights in a pickle", "--weights {box}/w.pt", "w.pt: not a readable checkpoint", bomb("w.pt")),
        ("weights of another net", "--weights {box}/w.pt", "does not fit", other_weights),
        ("weights are a folder", "--weights {data}", "data: no such file|regular", nothing),
        ("rules absent", "--rules {box}/absent.toml", "absent.toml: No such file", nothing),
        ("rules of text", "--rules {box}/r.toml", "r.toml: not TOML", text("r.toml", "[[rules")),
        ("rules of bytes", "--rules {box}/r.toml", "r.toml", data("r.toml", b"\xff\xfe")),
        ("rules are a pipe", "--rules {box}/r.toml", "r.toml", fifo("r.toml")),
        ("start absent", "--init-from {box}/absent", "absent: no such run folder", nothing),
        ("start is quantized", "--init-from {run}", "--init-from .*start from a full-precision one", nothing),
        ("start of other data", "--init-from {fp}", "--init-from", nothing),
        ("teacher absent", "--teacher {box}/absent", "absent: no such run folder", nothing),
        ("refined from nothing", "--schedule refined --refine-from {box}/absent", "absent", nothing),
        ("refined without a run", "--schedule refined", "belong together", nothing),
        ("out is a file", "--out {file}", "model.onnx: is a file", nothing),
        ("out below a file", "--out {file}/x", "cannot be made|is a file", nothing),
        ("out holds a run", "--out {fp}", "holds a run already", nothing),
        ("resume what is not there", "--resume", "holds no interrupted run", nothing),
        ("resume by another recipe", "--resume --out {run}", "repeat the command|was begun with", nothing),
        ("images as large as a city", "--image-size 100000", "--image-size must be", nothing),
        ("images of a pixel", "--image-size 1", "--image-size must be at least 8", nothing),
        ("cifar in pacs", "--data cifar10", "use recipes/cifar10.py", nothing),
        ("rendered images' count", "--per-class 3", "--per-class has no effect with --data-root", nothing),
        ("teacher's weight alone", "--distill-weight 0.9", "--distill-weight has no effect without --teacher", nothing),
        ("averages' decay alone", "--ema-decay 0.9", "--ema-decay has no effect", nothing),
        ("clip mode alone", "--clip-mode agc", "--clip-mode has no effect without --clip", nothing),
        ("offsets of no activations", "--weight-only --activations lsq-plus", "--activations has no effect", nothing),
        ("both only", "--weight-only --activation-only", "exclude each other", nothing),
        ("both sources of weights", "--weights {file} --pretrained", "exclude each other", nothing),
    ):  # fmt: skip
        yield Case(f"pacs: {case}", f"{PACS} {flags}", words, prepare)
    for name in (
        "lr",
        "weight-decay",
        "dropout",
        "clip",
        "ema-decay",
        "holdout",
        "scale-lr-ratio",
        "distill-weight",
        "damping",
    ):
        for value in ("nan", "inf", "-1"):
            yield Case(f"pacs: --{name} {value}", f"{PACS} --{name} {value}", f"--{name} must be")
    for name in (
        "steps",
        "batch-size",
        "accumulate",
        "evaluate-every",
        "calibration-batches",
        "workers",
        "seed",
        "trial-seed",
        "warmup",
        "bits",
    ):
        yield Case(f"pacs: --{name} -1", f"{PACS} --{name} -1", f"--{name} must be")  # fmt: skip
    for flags, words in (
        ("--init gptq", "--init gptq"),
        ("--damping 0.1", "--damping: 1-bit layers"),
        ("--edge-bits 9", "--edge-bits must be 2 to 8, or 32"),
        ("--binarizer sign --frequency 3", "--frequency has no effect with --binarizer sign"),
        ("--binarizer recu --stage2-lr 3", "--stage2-lr has no effect"),
        ("--steps 80", "--steps has no effect with --epochs; add --epochs None"),
        ("--stage2-steps 80", "--stage2-steps has no effect with --epochs"),
        ("--epochs None --stage2-epochs 3", "--stage2-epochs has no effect without --epochs"),
        ("--test-domain sketch", "CIFAR-10"),
        ("--stage 2 --init-from {fp} --stage2-lr 1", "--stage2-lr has no effect with --stage 2, .*; use --lr"),
        ("--data domains", "use recipes/pacs.py"),
        ("--frequency nan", "--frequency must be"),
        ("--reg-tau -1", "--reg-tau must be"),
        ("", "data"),
    ):
        yield Case(f"biper: {flags}", f"{CIFAR} {flags}", words)
    gaqat = PACS.replace(" lsq ", " gaqat ")
    for flags, words in (
        ("--z nan", "--z must be"), ("--threshold 2", "--threshold must be"), ("--window 1", "--window must be at least 2"),
        ("--rho -1", "--rho must be"), ("--z 2 --threshold 0.1", "--z has no effect with --threshold"),
        ("--control never --rescale", "--rescale has no effect"), ("--mixed-precision fp16", "--mixed-precision fp16"),
    ):  # fmt: skip
        yield Case(f"gaqat: {flags}", f"{gaqat} {flags}", words)
    qtdog = PACS.replace(" lsq ", " qtdog ")
    yield Case("qtdog: starts too late", f"{qtdog} --quant-start-step 2", "must lie within --steps")
    for flags, words in (("--steps 0", "--steps must be at least 1"), ("--max-drop nan", "--max-drop must be"),
                         ("--bits 9", "--bits must be"), ("--image-size 1", "--image-size must be"),
                         ("--backbone no_net --per-class 2", "timm has no such model"),
                         ("--test-domain mars --per-class 2", "mars")):  # fmt: skip
        yield Case(f"quickstart: {flags}", f"recipes/quickstart.py --out {{box}}/new {flags}", words)
    yield Case("domainnet: no data", "recipes/domainnet.py lsq", "--data-root: give")
    yield Case("domainnet: data is absent", "recipes/domainnet.py lsq --data-root {box}/absent", "absent")
    yield Case("domainnet: two sources", "recipes/domainnet.py lsq --smoke --data-root {data}", "leave --data-root out")


CASES = [*run_cases(), *flag_cases(), *recipe_cases()]


def test_there_are_many_cases_and_every_command_has_some() -> None:
    assert len(CASES) >= 200 and len({case.name for case in CASES}) == len(CASES)
    commands = {
        " ".join(case.line.split()[:2]) if case.line.startswith("qat") else case.line.split()[0] for case in CASES
    }
    names = ("export", "certify", "bundle", "bench", "predict", "compare", "ensemble", "report", "inspect")
    recipes = {f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.py")}
    assert {f"qat {name}" for name in names} | recipes <= commands


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_line_says_what_is_wrong_and_nothing_is_written(
    case: Case, origin: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    box = tmp_path / "box"
    shutil.copytree(origin, box)
    recipe = json.loads((box / "run/recipe.json").read_text())
    (box / "run/recipe.json").write_text(json.dumps(recipe | {"init_from": str(box / "fp")}))
    case.prepare(box)
    places = {"fp": box / "fp", "run": box / "run", "file": box / "model.onnx", "image": box / "image.png"}
    words = case.line.format(**places, data=box / "data", box=box).split()
    before = contents(box)
    capfd.readouterr()
    code = execute(words, monkeypatch, box)
    out, err = capfd.readouterr()
    line = err.strip().splitlines()[-1] if err.strip() else ""
    assert code == 2, f"exit code {code}\n{out}\n{err}"
    assert "Traceback" not in out + err, err
    if not line.startswith("error: "):  # the parser's own errors are a box of several lines
        assert "╭" in err and case.line.count(" ") < 3, err
    assert re.search(case.words, " ".join(err.split())), err
    assert not (box / "canary").exists(), "a file that was read ran code"
    left = {name: what for name, what in contents(box).items() if not case.leaves or not name.startswith(case.leaves)}
    changed = sorted(name for name, _ in set(left.items()) ^ set(before.items()))
    assert not changed, f"changed or left behind: {changed}"


def execute(words: list[str], monkeypatch: pytest.MonkeyPatch, place: Path) -> int:
    """Run a command line in this process and return its exit code."""
    command, *arguments = words
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", [command, *arguments])

    def too_long(*_: object) -> None:
        raise TimeoutError(f"hangs: {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        if command == "qat":
            cli.main()
        else:
            runpy.run_path(str(ROOT / command), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return 0


def contents(box: Path) -> dict[str, bytes | str]:
    """Every file below `box` and what it holds."""
    found: dict[str, bytes | str] = {}
    for path in sorted(box.rglob("*")):
        name = str(path.relative_to(box))
        found[name] = path.read_bytes() if path.is_file() else "no file"
    return found
