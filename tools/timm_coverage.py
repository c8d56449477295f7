"""How much of timm goes all the way: the smallest model of every timm model file, or models by name.

    uv run tools/timm_coverage.py --out coverage.jsonl                 # every family; run again to go on where it stopped
    uv run tools/timm_coverage.py --models vit_tiny_patch16_224 efficientnet_b0 --bits 4 --image-size 224

A model goes through: quantize at W4A4 -> calibrate -> two training steps, after which every quantizer parameter has had a
finite gradient that is not zero -> export (ort-int8) -> certificate, held to 0 mismatches at the levels EXTENDED and ALL.
Weights are random, images are noise: what is checked is arithmetic. Each model has a process, a time limit and a memory
limit of its own; a row is written as soon as it is known.

Weights are timm's own at first (`created`). Where these leave a quantizer without a gradient, or answers so near each other
that a code at a tie decides them, the model is tried once more with weights as large as trained ones (`fan-in`, see
`_sized_by_fan_in`), and its row says so. A quantizer whose result has no gradient in full precision either decides nothing in
that net, such as of tokens that nobody reads: the row counts it.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.certificate import Certificate

STAGES = ("create", "quantize", "calibrate", "train", "settle", "export", "certify")
CLASSES = 10
CREATED, FAN_IN = "created", "fan-in"
FAULT = " " * 11  # how a certificate's lines begin that say what failed


@dataclass
class Row:
    """How far one model came. `reason` is empty when it came through; shares are of all multiplies of one image.

    weights: CREATED or FAN_IN. idle: quantizers that decide nothing, in full precision either.
    """

    family: str
    model: str
    parameters: int = 0
    image_size: int = 0
    layers: int = 0
    products: int = 0
    float_share: float = 0.0
    float_kinds: list[str] = field(default_factory=list)
    codes: int = 0
    float_level_mismatches: int = 0
    stage: str = "create"
    reason: str = ""
    seconds: float = 0.0
    weights: str = CREATED
    idle: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.stage == "certify" and not self.reason

    def __str__(self) -> str:
        inexact = f", {self.float_level_mismatches} at DISABLE and BASIC" if self.float_level_mismatches else ""
        verdict = f"ok, {self.codes:,} codes{inexact}" if self.passed else f"{self.stage}: {self.reason}"
        verdict += self.remarks
        kinds = ", ".join(self.float_kinds)
        return (
            f"{self.family:<24} {self.model:<34} {self.parameters / 1e6:6.1f}M {self.image_size:4d} px "
            f"{self.layers:4d} layers {self.products:3d} products  float {self.float_share:6.2%} ({kinds})  "
            f"{self.seconds:4.0f} s  {verdict}"
        )

    @property
    def remarks(self) -> str:
        """What was special about the weights and the quantizers."""
        text = "" if self.weights == CREATED else f", weights {self.weights}"
        if self.idle:
            text += f", {len(self.idle)} quantizers idle in full precision too"
        return text


class NoGradient(ValueError):
    """Quantizer parameters that had none within the steps, though the net's results depend on them."""


class AnswersByChance(ValueError):
    """No code is wrong, but codes at ties change answers: those of a net that tells images hardly apart."""


def smallest_models(cache: Path) -> dict[str, str]:
    """Model file of timm -> its model of fewest parameters, counted without memory on the meta device; kept in `cache`."""
    if cache.is_file():
        return json.loads(cache.read_text())
    import timm
    import torch

    found: dict[str, tuple[int, str]] = {}
    for family in timm.list_modules():
        names = timm.list_models(module=family)
        for name in [n for n in names if not n.startswith("test_")] or names:  # timm's own test models are nobody's
            try:
                with torch.device("meta"):
                    size = sum(p.numel() for p in timm.create_model(name, num_classes=CLASSES).parameters())
            except Exception:  # a few constructors compute with values, which meta tensors do not have
                continue
            found[family] = min(found.get(family, (size, name)), (size, name))
        if names:
            found.setdefault(family, (0, names[0]))
    smallest = {family: name for family, (_, name) in sorted(found.items(), key=lambda entry: entry[1])}
    cache.write_text(json.dumps(smallest, indent=1))
    return smallest


def check(family: str, name: str, options: argparse.Namespace) -> Row:
    """Take one model through all stages; an exception ends in its row."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    began = time.perf_counter()
    row = Row(family, name)
    for weights in (CREATED, FAN_IN):
        torch.manual_seed(0)
        row = Row(family, name, weights=weights)
        try:
            _go_through(row, options)
        except Exception as error:
            row.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            if isinstance(error, (NoGradient, AnswersByChance)):
                continue
        break
    row.seconds = time.perf_counter() - began
    return row


def _go_through(row: Row, options: argparse.Namespace) -> None:
    import torch

    from qat.settle import settle_
    from qat.surgery.backbones import create_backbone, first_and_last
    from qat.surgery.calibrate import calibrate
    from qat.surgery.swap import quantize_, uniform_rules

    model, row.image_size = _with_logits(*_create(create_backbone, row.model, options.image_size))
    row.parameters = sum(p.numel() for p in model.parameters())
    images = torch.randn(options.batch, 3, row.image_size, row.image_size)
    row.stage = "quantize"
    table = quantize_(
        model, uniform_rules(options.bits, options.bits, first_and_last(model)), images[:2], weight_init="mse"
    )
    row.layers, row.products = len(table.rows), len(table.products)
    row.float_share, row.float_kinds = table.float_share, sorted({r.kind for r in table.in_float})
    row.stage = "calibrate"
    if row.weights == FAN_IN:
        _sized_by_fan_in(model)
    _as_if_trained(model, images)
    calibrate(model, [images])
    row.stage = "train"
    row.idle = _train(model, images)
    row.stage = "settle"
    settle_(model.eval(), images[:1])
    row.stage = "export"
    with tempfile.TemporaryDirectory() as folder:
        _export_and_certify(row, model, images, Path(folder) / "model.onnx")


def _with_logits(model: Any, size: int) -> tuple[Any, int]:
    """The model, or where it is an encoder without a head, which returns tokens, the mean of its tokens."""
    import torch

    class MeanOfTokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.encoder(x).mean(1)

    with torch.no_grad():
        returns_tokens = model.eval()(torch.zeros(1, 3, size, size)).dim() == 3
    return (MeanOfTokens() if returns_tokens else model), size


def _as_if_trained(model: Any, images: Any) -> None:
    """Batch norm statistics of the data, and nothing left at the zeros it was initialised with.

    A branch multiplied with a gain of 0 has no gradient, nor has a class token of one value after a LayerNorm, nor
    anything after a LayerNorm of one channel without its bias.
    """
    import torch

    from qat.surgery.batchnorm import restore_norm_statistics
    from qat.surgery.calibrate import in_full_precision

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 3 and parameter.numel() == parameter.shape[-1]:
                parameter.normal_()  # a class token is at most 0.02 at first: less than a scale of the image's tokens
            if parameter.any():
                continue
            if parameter.numel() == max(parameter.shape, default=1) and not name.endswith("bias"):
                parameter.uniform_(0.25, 0.75)
            else:
                parameter.normal_(std=0.02)
    with in_full_precision(model):
        restore_norm_statistics(model, [images])


def _sized_by_fan_in(model: Any) -> None:
    """Weights of variance 1 / fan-in, so that no branch is lost beside its stream, as it is by timm's deviation of 0.02 in
    narrow layers; shifts of layer norms that tell one channel from the next.

    A depthwise convolution that is added to what it reads, as positional encodings are, would lengthen it in every block:
    the magnitudes of its taps add up to 1/4.
    """
    import torch

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm) and module.bias is not None:
                module.bias.normal_(std=0.5)
            if not isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Linear)):
                continue
            weight = module.weight
            weight.normal_(std=weight[0].numel() ** -0.5)
            if weight.dim() == 4 and weight.shape[1] == 1 and module.groups > 1:
                weight.mul_(0.25 / weight.abs().flatten(1).sum(1).view(-1, 1, 1, 1))


def _create(create: Callable[..., Any], name: str, wanted: int) -> tuple[Any, int]:
    """The model for images of `wanted` pixels, or where it takes no such images, for those it was designed for."""
    import torch

    for settings in ({"img_size": wanted}, {}):
        try:
            model, config = create(name, CLASSES, **settings)
            if settings or not model.default_cfg.get("fixed_input_size"):
                with torch.no_grad():
                    model.eval()(torch.zeros(1, 3, wanted, wanted))
                return model, wanted
        except Exception:
            continue
    model, config = create(name, CLASSES)
    return model, config.image_size


def _train(model: object, images: object) -> list[str]:
    """Two AdamW steps; returns the quantizers that decide nothing in full precision either.

    Raises NoGradient naming a quantizer parameter that had no gradient, or zeros alone, though the full-precision net has
    one there; ValueError where one is not finite.
    """
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    from qat.surgery.swap import parameter_groups, quantizers, sizes_of_scales

    assert isinstance(model, nn.Module) and isinstance(images, Tensor)
    groups = parameter_groups(model.train(), 1e-4, 1e-4, scale_sizes=sizes_of_scales(model))
    optimizer = torch.optim.AdamW(groups, lr=1e-4)
    parameters = {f"{n}.{p}": v for n, q in quantizers(model).items() for p, v in q.named_parameters()}
    moved = dict.fromkeys(parameters, False)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images), torch.arange(len(images)) % CLASSES).backward()
        for name, parameter in parameters.items():
            gradient = parameter.grad
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                raise ValueError(f"the gradient of {name} is not finite")
            moved[name] |= gradient is not None and bool(gradient.any())
        optimizer.step()
    still = [name for name, has in moved.items() if not has]
    if not still:
        return []
    idle = _idle_in_full_precision(model, images)
    lost = [name for name in still if name.rpartition(".")[0] not in idle]
    if lost:
        raise NoGradient(f"{len(lost)} of {len(moved)} quantizer parameters had no gradient: {', '.join(lost[:3])}")
    return sorted({name.rpartition(".")[0] for name in still})


def _idle_in_full_precision(model: Any, images: Any) -> set[str]:
    """Quantizers whose results have a gradient of exactly zero where all of them pass everything through."""
    import torch
    import torch.nn.functional as F

    from qat.surgery.calibrate import in_full_precision
    from qat.surgery.swap import quantizers

    by_name = quantizers(model)
    idle: set[str] = set()
    busy: set[str] = set()

    def watch(name: str) -> Callable[..., Any]:
        def note(gradient: Any) -> None:
            found = busy if bool(gradient.any()) else idle
            found.add(name)

        def hook(module: Any, inputs: Any, output: Any) -> Any:
            # What passes through is the tensor that others read too
            own = output.view_as(output)
            if own.requires_grad:
                own.register_hook(note)
            return own

        return hook

    handles = [quantizer.register_forward_hook(watch(name)) for name, quantizer in by_name.items()]
    with in_full_precision(model):
        F.cross_entropy(model(images), torch.arange(len(images)) % CLASSES).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return idle - busy


def _export_and_certify(row: Row, model: object, images: object, path: Path) -> None:
    import numpy as np
    import onnx
    import torch
    from torch import Tensor, nn

    from export.certificate import certify
    from export.graph import emit_qdq
    from export.lower import lower_to_integers, trained_codes
    from export.metadata import Preprocessing, sign
    from export.targets import TARGETS

    assert isinstance(model, nn.Module) and isinstance(images, Tensor)
    target = TARGETS["ort-int8"]
    lowered = lower_to_integers(model, images[:1], target)
    seen = Preprocessing(row.image_size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), tuple(map(str, range(CLASSES))))
    onnx.save(sign(emit_qdq(lowered, target), lowered, target, seen, "timm_coverage"), str(path))
    row.stage = "certify"
    labels = np.zeros(len(images), np.int64)
    with torch.no_grad():
        certificate = certify(lowered, path, images.numpy(), labels, lambda batch: trained_codes(model, batch))
    _judge(row, certificate)


def _judge(row: Row, certificate: "Certificate") -> None:
    """Note in the row what the certificate says. Raises AnswersByChance where it fails for differing answers alone."""
    from export.certificate import EXACT_LEVELS

    row.codes = max(level.codes for level in certificate.levels)
    inexact = [level for level in certificate.levels if level.level not in EXACT_LEVELS]
    row.float_level_mismatches = sum(level.total for level in inexact)
    exact = replace(certificate, levels=tuple(x for x in certificate.levels if x not in inexact))
    if exact.passed:
        return
    fidelity = exact.fidelity
    if replace(exact, fidelity=replace(fidelity, same=fidelity.answers)).passed:
        raise AnswersByChance(f"{fidelity.same} of {fidelity.answers} answers alike")
    lines = str(certificate).splitlines()[2:]
    faults = [line.strip() for line in lines if line.endswith("[FAILED]") or line.startswith(FAULT)]
    row.reason = " | ".join(faults)[:400]


def in_processes(models: dict[str, str], options: argparse.Namespace) -> Iterator[Row]:
    """Rows of `models` (name -> family) as they come, `--jobs` at a time, each from a bounded process of its own.

    The processes are forks of this one, which has loaded what takes longest to load.
    """
    import torch

    import export.certificate
    import export.lower  # noqa: F401
    import qat.surgery.backbones  # noqa: F401

    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    context = multiprocessing.get_context("fork")
    waiting, running = list(models.items()), dict[Connection, tuple[Any, str, float]]()
    while waiting or running:
        while waiting and len(running) < options.jobs:
            name, family = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_bounded, args=(theirs, family, name, options))
            process.start()
            theirs.close()
            running[ours] = process, name, time.perf_counter()
        for ours in wait(list(running), timeout=1):
            assert isinstance(ours, Connection)
            process, name, began = running.pop(ours)
            try:
                row = ours.recv()
            except EOFError:
                process.join()
                row = _lost(models[name], name, f"its process ended with code {process.exitcode}", began)
            process.join()
            yield row
        for ours, (process, name, began) in list(running.items()):
            if time.perf_counter() - began > options.timeout:
                process.kill()
                running.pop(ours)
                yield _lost(models[name], name, f"took longer than {options.timeout:.0f} s", began)


def _lost(family: str, name: str, reason: str, began: float) -> Row:
    return Row(family, name, reason=reason, seconds=time.perf_counter() - began)


def _bounded(connection: Connection, family: str, name: str, options: argparse.Namespace) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (int(options.memory * 2**30),) * 2)
    connection.send(check(family, name, options))


def summary(rows: Iterable[Row]) -> str:
    """A Markdown table, models that did not come through first, and the total."""
    rows = sorted(rows, key=lambda r: (r.passed, STAGES.index(r.stage), r.family))
    lines = [
        "| family | model | px | layers | products | in floating point | codes compared | |",
        "|---|---|" + "---|" * 6,
    ]
    for row in rows:
        share = f"{row.float_share:.2%} {', '.join(row.float_kinds)}"
        reason = f"ok{row.remarks}" if row.passed else f"{row.stage}: {row.reason}".replace("|", "/")[:160]
        cells = (row.family, row.model, row.image_size, row.layers, row.products, share, f"{row.codes:,}", reason)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    through = sum(row.passed for row in rows)
    return "\n".join([*lines, "", f"{through} of {len(rows)} models came through ({through / max(len(rows), 1):.1%})"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[], help="timm names; by default the smallest of every family")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=64, help="where the model takes images of that size")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a model may take")
    parser.add_argument("--memory", type=float, default=12, help="GiB a model may take")
    parser.add_argument("--out", type=Path, default=Path("runs/timm_coverage.jsonl"), help="rows; known ones are kept")
    parser.add_argument("--retry", action="store_true", help="run the models again that did not come through")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.models:
        models = dict.fromkeys(options.models, "")
    else:
        smallest = smallest_models(options.out.with_suffix(".models.json"))
        models = {name: family for family, name in smallest.items()}
    known = [Row(**json.loads(line)) for line in options.out.read_text().splitlines()] if options.out.is_file() else []
    rows = {row.model: row for row in known if row.model in models and (row.passed or not options.retry)}
    for row in in_processes({n: f for n, f in models.items() if n not in rows}, options):
        rows[row.model] = row
        with options.out.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(row, flush=True)
    print(summary(rows.values()))


if __name__ == "__main__":
    main()
