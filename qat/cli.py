"""The command `qat`: parses, calls, prints. No logic lives here."""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, subcommand

from edgeqat.extras import MissingExtra, naming_extra
from edgeqat.files import reason_of
from edgeqat.interrupts import Interrupted, Terminated, termination_raises
from edgeqat.terminal import printable, say
from qat.runs.given import with_files
from qat.runs.parts import Images
from qat.runs.ranges import COMMAND, out_of_range
from qat.runs.recipe import TRAINED, Recipe, described

SWEEP_FLAGS = ("out", "methods", "bits", "targets", "seeds")
CALIBRATIONS = {"minmax": "MinMax", "entropy": "Entropy"}  # our words -> the runtime's


@dataclass(frozen=True)
class Export:
    """Write the ONNX file of a trained run."""

    run: Positional[Path]
    """Run folder."""
    target: str = "ort-int8"
    """ort-int8: a byte per weight code; ort-packed: 1 to 7 bits each; ort-packed-int4: INT4 tensors; fp32: the float
    baseline; qonnx: for FINN; ort-native: edgeqat's own kernels; qdq, qdq-symmetric, qdq-int4: plain files for OpenVINO,
    TensorRT, QNN and others; and the device targets of export/targets.py. All but ort-native need nothing but an unmodified
    ONNX Runtime."""
    out: Path | None = None
    """File to write; by default model.onnx in the run folder."""


@dataclass(frozen=True)
class Certify:
    """Prove that a file holds the trained codes and that ONNX Runtime computes them. Exits 1 when it does not. `qat certify
    RUN model.onnx` is the whole proof; `qat certify model.onnx` checks the file's signature and kernels alone; `qat certify
    RUN RUN ensemble.onnx` proves every member of an ensemble, in its order."""

    paths: Positional[tuple[Path, ...]]
    """[RUN ...] model.onnx"""
    whole_target: bool = False
    """Also measure the file's accuracy on every test image of the target domain."""
    images: int | None = None
    """Certify on so many test images of the run's data instead of the images that the run keeps."""
    data_root: Path | None = None
    """Where the images are, if no longer where the run found them."""
    on: str = ""
    """Prove it on other processors too, comma-separated: arm64, wasm, x86 (those without VNNI), or one machine such as
    cortex-a72. They are emulated; what is not installed is named with the command that installs it."""


@dataclass(frozen=True)
class Bundle:
    """Write a folder that proves a file on a device: file, images, expected codes and check.py, which needs onnxruntime and
    numpy alone. On the device: `python check.py`."""

    run: Positional[Path]
    """Run folder."""
    model: Positional[Path]
    """The ONNX file that was exported from it."""
    out: Path = Path("bundle")
    """New folder to write."""
    images: int = 16
    """How many of the run's images it holds."""


@dataclass(frozen=True)
class Predict:
    """Classify images with an exported file; what it needs is read from the file."""

    model: Positional[Path]
    """The ONNX file."""
    images: Positional[tuple[Path, ...]]
    """Image files."""


@dataclass(frozen=True)
class Bench:
    """Speed, memory and size of exported runs against FP32 and ONNX Runtime's own static INT8."""

    runs: Positional[tuple[Path, ...]]
    """Run folders; each is exported for --target, the first also gives the FP32 and static INT8 files to compare with."""
    target: str = "ort-packed"
    """Export target."""
    threads: int = 1
    """Threads of the runtime."""
    batch: int = 1
    """Images a run."""
    rounds: int = 50
    """Interleaved rounds."""
    calibration: Literal["minmax", "entropy"] = "minmax"
    """How ONNX Runtime's static INT8 file is calibrated, on the images of the first run."""
    out: Path | None = None
    """Folder for bench.json and bench.svg, or profile.json; by default the first run."""
    profile: bool = False
    """Instead of comparing, say where each file's time goes: nodes, layout changes, float islands and what removes them."""


@dataclass(frozen=True)
class Compare:
    """Accuracy of a run, or of an exported file, against a full-precision baseline. Exits 1 when it lost more than --max-drop
    points."""

    baseline: Positional[Path]
    """Full-precision run folder, or a stored baseline file (.json)."""
    run: Positional[Path]
    """What to judge: a run folder, or the exported file that ships (.onnx), which then classifies the same images."""
    max_drop: float = 1.0
    """Percentage points that the target domain, and the source domains together, may lose."""
    alpha: float = 0.05
    """Level of the paired test: a drop fails when it exceeds --max-drop with this certainty."""
    markdown: Path | None = None
    """Also write the table as Markdown, for a pull request."""
    json: Path | None = None
    """Also write the comparison as JSON."""
    update_baseline: bool = False
    """Store RUN's predictions as the baseline file BASELINE (a .json) instead of comparing."""
    data_root: Path | None = None
    """For a file: where the images are, if no longer where the baseline's run found them."""


@dataclass(frozen=True)
class Ensemble:
    """Accuracy of runs that answer together (EoQ), per domain, beside each alone; with --out also one file of them all."""

    runs: Positional[tuple[Path, ...]]
    """Run folders of the same data, split and image size."""
    average: Literal["probabilities", "logits"] = "probabilities"
    """What is averaged: softmax probabilities, or logits."""
    out: Path | None = None
    """ONNX file to write, with every member's trained codes and the averaged answer."""
    target: str = "ort-packed"
    """Export target of that file."""
    data_root: Path | None = None
    """Where the images are, if no longer where the runs found them."""
    json: Path | None = None
    """Also write the table as JSON."""


@dataclass(frozen=True)
class Report:
    """Write report.html into a run folder."""

    run: Positional[Path]
    """Run folder."""
    baseline: Path | None = None
    """Full-precision run folder to show beside it; by default the run it started from."""
    beside: tuple[Path, ...] = ()
    """More run folders of the same test domain, shown side by side with this one."""
    max_drop: float = 1.0
    """Percentage points of accuracy that the verdict allows against the baseline."""


@dataclass(frozen=True)
class Inspect:
    """Print the scales whose task and smoothing gradients oppose each other most (runs of sagm-lsq, gaqat, its controls)."""

    run: Positional[Path]
    """Run folder."""
    top: int = 10
    """How many scales."""
    json: Path | None = None
    """Also write them as JSON."""


@dataclass(frozen=True)
class Explain:
    """Say why a layer or an operation of a run is quantized or not, who reads it, and with how many bits."""

    run: Positional[Path]
    """Run folder."""
    name: Positional[str]
    """Of a layer (layer1.0.conv1), an operation (layer1.0#add0) or a quantizer (layer1.0.conv1.weight)."""


@dataclass(frozen=True)
class Push:
    """Upload exported files of a run to the Hugging Face hub, with card, certificate, recipe and results."""

    run: Positional[Path]
    """Run folder."""
    repository: Positional[str]
    """OWNER/NAME; made, private, where there is none."""
    model: tuple[Path, ...] = ()
    """The files; by default every .onnx of the run folder. The first one's card is the repository's page."""
    checkpoint: bool = False
    """Also upload checkpoint.pt, the trained net in floating point."""
    public: bool = False
    """Make a new repository public."""


@dataclass(frozen=True)
class Pull:
    """Fetch what `qat push` uploaded into a new folder, if every file is as it was signed. Exits 1 when one is not."""

    repository: Positional[str]
    """OWNER/NAME."""
    folder: Positional[Path]
    """New folder to write."""
    revision: str = "main"
    """Branch, tag or commit."""


@dataclass(frozen=True)
class Sweep:
    """Run a grid, methods × bits × targets × seeds × presets, and print its table. The same command goes on where it stopped,
    and runs nothing twice. Exits 1 when a cell failed or is left."""

    spec: Positional[Path]
    """TOML, YAML or JSON file; `qat/sweep/spec.py` shows all of it."""
    out: Path | None = None
    """Folder of the cells and tables; by default named as the file is."""
    methods: tuple[str, ...] | None = None
    """Instead of the file's."""
    bits: tuple[int, ...] | None = None
    """Instead of the file's."""
    targets: tuple[str, ...] | None = None
    """Instead of the file's."""
    seeds: tuple[int, ...] | None = None
    """Instead of the file's."""
    jobs: int = 1
    """Cells at a time."""
    minutes: float | None = None
    """Stop cleanly after so many, all saved; by default when every cell is done."""
    engine: Literal["here", "submitit-local", "slurm"] = "here"
    """Where cells run: processes of this machine, or jobs of submitit."""
    table_only: bool = False
    """Run nothing; write the table of what is done."""
    target: str | None = None
    """Also export the first finished cell of every quantized row for this target, measure its size and latency, once, for
    the report."""


@dataclass(frozen=True)
class Train:
    """Train a method on images, in full precision or quantized: `qat train --help`."""


Command = (
    Annotated[Train, subcommand("train")]
    | Annotated[Sweep, subcommand("sweep")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Certify, subcommand("certify")]
    | Annotated[Bundle, subcommand("bundle")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Predict, subcommand("predict")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Ensemble, subcommand("ensemble")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Inspect, subcommand("inspect")]
    | Annotated[Explain, subcommand("explain")]
    | Annotated[Push, subcommand("push")]
    | Annotated[Pull, subcommand("pull")]
)


DEBUG = "--debug"  # a flag of every command and recipe


def main() -> None:
    """Console entry point: exit 0 when all is well, 1 when a check failed, 2 when something could not be done, 130 after
    Ctrl-C, 143 after SIGTERM."""

    def parse_and_execute() -> int:
        if arguments()[:1] == ["train"]:
            return _train(arguments()[1:])
        command: Any = tyro.cli(
            Command,
            prog="qat",
            description=f"{DESCRIPTION} {DEBUG_HELP}",
            args=arguments(),
        )
        return execute(command)

    sys.exit(guarded(parse_and_execute))


DESCRIPTION = (
    "From a trained run to a proven file: export, certify, bench, compare, report."
)
CONFIG_HELP = (
    "--config FILE reads flags from TOML, YAML or JSON, such as another run's recipe.json, and --preset NAME takes those of "
    "domainbed, swad, sagm or authors; flags beside them win."
)
DEBUG_HELP = (
    f"{DEBUG}, anywhere on the line, shows where in the program an error came from."
)


def arguments() -> list[str]:
    """The command line without `--debug`, which `guarded` reads."""
    return [word for word in sys.argv[1:] if word != DEBUG]


def choose(
    methods: Mapping[str, Recipe],
    description: str | None,
    *,
    extra: Any = None,
    args: list[str] | None = None,
    prog: str | None = None,
) -> Any:
    """The recipe a command line asks for: one word of `methods`, then its flags, in a group for each part.

    extra: a dataclass of further flags, with its defaults; given, (recipe, extra) is returned.
    Raises RecipeError or FileError for a file that the command line names and that cannot be used.
    """
    given = arguments() if args is None else args
    if given and given[0] in methods:
        recipe, rest = with_files(methods[given[0]], given[1:])
        methods = {**methods, given[0]: recipe}
        given = [given[0], *rest]
    words = {
        word: (described(word), _flags(recipe, extra))
        for word, recipe in methods.items()
    }
    flags = tyro.extras.overridable_config_cli(
        words,
        prog=prog,
        description=f"{description}\n\n{CONFIG_HELP} {DEBUG_HELP}",
        args=given,
        # Every flag has a name of its own, whichever part it belongs to
        config=(tyro.conf.OmitArgPrefixes,),
    )
    parts = dict(vars(flags))
    further = parts.pop("extra", None)
    recipe = Recipe(**parts)
    return recipe if extra is None else (recipe, further)


def _flags(recipe: Recipe, extra: Any) -> Any:
    """The parts that `recipe` has, as an instance of a dataclass of its own: a part that is absent has no flags."""
    groups: dict[str, Any] = dict(recipe.parts)
    if extra is not None:
        groups["extra"] = extra
    fields = [
        (name, type(group), dataclasses.field(default=group))
        for name, group in groups.items()
    ]
    return dataclasses.make_dataclass("Flags", fields, frozen=True)()


def guarded(action: Callable[[], int]) -> int:
    """Run `action` and return its exit code. An error becomes one line on stderr and exit code 2, unless `--debug` asks for
    its traceback; a signal becomes 128 and its number."""
    try:
        with termination_raises():
            code = action()
            # A full disk or a closed pipe shows here, and not after the program's end
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        # Whoever read our output stopped reading. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Interrupted as stop:
        return _ended(str(stop), 128 + stop.number)
    except KeyboardInterrupt:
        return _ended("interrupted", 128 + signal.SIGINT)
    except Terminated:
        return _ended("terminated", 128 + signal.SIGTERM)
    except Exception as error:
        if DEBUG in sys.argv:
            raise
        return _ended(f"error: {explained(error)}", 2)


def _ended(message: str, code: int) -> int:
    say(printable(message), file=sys.stderr)
    return code


def explained(error: Exception) -> str:
    """What a user is told of `error`: its own words where they were written for users, else also how to learn more."""
    if isinstance(error, OSError) and error.strerror:
        names = [
            str(name) for name in (error.filename, error.filename2) if name is not None
        ]
        return ": ".join([*names, error.strerror])
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return f"out of memory; use a smaller --batch-size or --image-size ({reason_of(error)})"
    if isinstance(error, ModuleNotFoundError):
        error = naming_extra(error)
    if isinstance(error, ValueError | MissingExtra) and str(error):
        return " ".join(str(error).split())
    return (
        f"{type(error).__name__}: {reason_of(error)}; {DEBUG} shows where it came from"
    )


def execute(command: Any) -> int:
    """Run a parsed command; returns its exit code."""
    if problem := out_of_range(command, COMMAND):
        raise ValueError(problem)
    action = ACTIONS.get(type(command))
    if action is not None:
        return action(command)
    from qat import deploy

    match command:
        case Export(run, target, out):
            say(deploy.export_run(run, target, out))
        case Bundle(run, model, out, images):
            say(deploy.bundle_run(run, model, out, images))
        case Report(run, baseline, beside, max_drop):
            say(deploy.write_report(run, baseline, beside, max_drop))
        case Explain(run, name):
            say(printable(deploy.explain(run, name)))
    return 0


@dataclass(frozen=True)
class TrainOn:
    """The images, and what a comparison with the run it starts from allows."""

    data: Positional[Path | None] = None
    """Folder of images: <class>/*, {train,val,test}/<class>/*, or <domain>/<class>/* with --test-domain; the same as
    --data-root. Without it, the images of --init-from, or rendered ones."""
    max_drop: float = 1.0
    """Percentage points that a quantized run may lose against the run it starts from; beyond that the exit code is 1."""


def _train(words: list[str]) -> int:
    description = "Train a method on a folder of images."
    recipe, given = choose(
        TRAINED,
        description,
        extra=TrainOn(),
        args=words,
        prog="qat train",
    )
    from qat.training import train

    if given.data is not None:
        # What was inherited described other images
        default = Images()
        recipe = recipe.changed(
            data_root=given.data, data="auto", per_class=default.per_class
        )
    return train(recipe, max_drop=given.max_drop)


def _sweep(command: Sweep) -> int:
    from qat.sweep.engine import run_sweep
    from qat.sweep.report import write_tables
    from qat.sweep.spec import read_sweep

    flags = {name: getattr(command, name) for name in SWEEP_FLAGS}
    sweep = read_sweep(command.spec, **flags)
    code = 0
    if not command.table_only:
        progress = run_sweep(
            sweep,
            jobs=command.jobs,
            minutes=command.minutes,
            engine=command.engine,
            say=say,
        )
        say(progress)
        code = 1 if progress.failed or progress.left else 0
    if command.target is not None:
        from qat.deploy import measure_sweep

        for name, reason in measure_sweep(sweep, command.target).items():
            say(f"{name}: not measured: {reason}")
    table, report = write_tables(sweep)
    say(f"\n{table.markdown()}\n{report}")
    return code


def _verify(model: Path) -> int:
    from export.verify import verify_file

    check = verify_file(model)
    say(check)
    return 0 if check.passed else 1


def _push(command: Push) -> int:
    from qat.hub import push_run

    pushed = push_run(
        command.run,
        command.repository,
        command.model,
        checkpoint=command.checkpoint,
        public=command.public,
    )
    say(printable(pushed))
    return 0


def _pull(command: Pull) -> int:
    from qat.hub import pull

    pulled = pull(command.repository, command.folder, command.revision)
    say(printable(pulled, newlines=True))
    return 0 if pulled.passed else 1


def _predict(command: Predict) -> int:
    from export.predict import predict

    for found in predict(command.model, command.images):
        say(printable(f"{found.image}: {found.label} ({found.probability:.1%})"))
    return 0


def _certify(command: Certify) -> int:
    if len(command.paths) == 1:
        return _verify(command.paths[0])
    from qat import deploy

    match command.paths:
        case (run, model):
            certificate = deploy.certify_run(
                run, model, command.images, command.data_root, command.on
            )
            say(certificate)
            if command.whole_target:
                for name, value in deploy.target_accuracy(
                    run, model, command.data_root
                ).items():
                    say(f"  target     {name} {value:.2%} on the whole target domain")
            return 0 if certificate.passed else 1
        case (*runs, model):
            certificates, joined = deploy.certify_ensemble(runs, model)
            say("\n".join(map(str, [*certificates, joined])))
            return 0 if joined.passed and all(c.passed for c in certificates) else 1
    raise ValueError(
        "qat certify takes model.onnx, or RUN and model.onnx, or the RUNs of an ensemble and its file"
    )


def _bench(command: Bench) -> int:
    from qat import deploy

    measure = deploy.profile_runs if command.profile else deploy.bench_runs
    found = measure(
        command.runs,
        command.target,
        threads=command.threads,
        batch=command.batch,
        rounds=command.rounds,
        calibration=CALIBRATIONS[command.calibration],
        out=command.out,
    )
    say("\n\n".join(map(str, found)) if isinstance(found, list) else found)
    return 0


def _compare(command: Compare) -> int:
    from edgeqat.files import write_json, write_text
    from qat import deploy
    from qat.analysis.compare import compare_runs, write_baseline

    if command.update_baseline:
        write_baseline(command.run, command.baseline)
        say(command.baseline)
        return 0
    if command.run.suffix == ".onnx":
        comparison = deploy.compare_file(
            command.baseline,
            command.run,
            command.max_drop,
            command.alpha,
            command.data_root,
        )
    else:
        comparison = compare_runs(
            command.baseline, command.run, command.max_drop, command.alpha
        )
    say(comparison)
    if command.markdown is not None:
        write_text(command.markdown, comparison.markdown() + "\n")
    if command.json is not None:
        write_json(command.json, comparison.to_json())
    return 0 if comparison.passed else 1


def _inspect(command: Inspect) -> int:
    from edgeqat.files import write_json
    from qat.analysis.inspection import inspect_run

    inspection = inspect_run(command.run, command.top)
    say(inspection)
    if command.json is not None:
        write_json(command.json, inspection.to_json())
    return 0


def _ensemble(command: Ensemble) -> int:
    from edgeqat.files import write_json
    from qat import deploy
    from qat.analysis.ensemble import evaluate_ensemble

    table = evaluate_ensemble(command.runs, command.average, command.data_root)
    say(table)
    if command.json is not None:
        write_json(command.json, table.to_json())
    if command.out is not None:
        say(
            deploy.export_ensemble(
                command.runs, command.target, command.out, command.average
            )
        )
    return 0


# Commands with a function of their own, which imports what it needs: a device that runs files has no PyTorch.
ACTIONS: dict[type, Callable[[Any], int]] = {
    Bench: _bench,
    Certify: _certify,
    Compare: _compare,
    Ensemble: _ensemble,
    Inspect: _inspect,
    Predict: _predict,
    Pull: _pull,
    Push: _push,
    Sweep: _sweep,
}


if __name__ == "__main__":
    main()
