"""Trained model -> `LoweredModel`. The only file of `export` that knows `qat`.

The model is exported once with every quantizer replaced by a marker node that carries its name; codes come from the
quantizers themselves.
"""

import contextlib
import dataclasses
import inspect
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from export.lowered import (
    BIAS_PARAMETER,
    DOMAIN,
    MARK,
    ExportError,
    LoweredLayer,
    LoweredModel,
    LoweredQuantizer,
)
from export.names import bias_of, gamma_of, layer_of, run_again, weight_of
from export.passes import to_integers
from export.simplify import simplify
from export.skeleton import constant, modules_of
from export.targets import TARGETS, Target
from qat.quantizers.biper import PeriodicWeight
from qat.quantizers.bireal import BinaryActivation
from qat.quantizers.contract import Quantizer
from qat.surgery.example import (
    Arguments,
    Example,
    arguments_of,
    twice,
    with_leaves,
    with_tensors,
)
from qat.surgery.layers import QuantConv2d, QuantLinear
from qat.surgery.open_forms import scaled_dot_product_attention
from qat.surgery.operands import QuantOperands
from qat.surgery.swap import computed_weights, quantizers
from qat.surgery.witness import witness
from qat.surgery.wrappers import copied

OPSET = 20
TALKATIVE = ("torch.onnx", "onnx_ir", "onnxscript")  # names of loggers


def lower(
    model: nn.Module,
    example: Example,
    *,
    float_weights: bool = False,
    input_names: Sequence[str] = (),
) -> LoweredModel:
    """Lower a trained, quantized `model` in eval mode.

    example: what the model's forward takes, N_C_H_W float32 for images; its height and width become the file's, its batch
             size does not.
    input_names: of the file, one for each tensor of the example; `input` where there is one, else forward's own.
    float_weights: whether layers with a quantized input and a float weight may remain. The runtime's optimiser quantizes
             such weights by rules of its own, so the integer targets cannot keep their promise for them.
    Raises ExportError naming a quantizer without a scale, or the operation that has no ONNX form.
    """
    model = copied(model).cpu().eval()
    _require_scales(model)
    if not float_weights:
        _require_quantized_weights(model)
    example = with_tensors(example, lambda tensor: tensor[:1].cpu())
    arguments = arguments_of(model, example)
    _check_finite(model)
    # First: hooks such as prune's make a layer's weight anew in a forward pass
    with torch.no_grad():
        outputs = list(named_outputs(call(model, arguments)))
    layers, activations = _layers_and_quantizers(model, arguments)
    multiply_adds = sum(witness(model, example).values())
    passes = _Passes(model)
    for quantizer in quantizers(model).values():
        quantizer.forward = _marker(quantizer, passes)  # type: ignore[method-assign,assignment]
    inputs = input_names or names_of_inputs(model, example)
    skeleton = onnx_graph(model, arguments, inputs, outputs)
    _name_norm_biases(skeleton, model)
    _add_repeated(passes.repeated, layers, activations)
    return LoweredModel(
        skeleton,
        layers,
        activations,
        multiply_adds=multiply_adds,
        repeated=passes.repeated,
    )


def _require_scales(model: nn.Module) -> None:
    """Raises ExportError for a model without quantizers, or naming one that has no codes yet."""
    by_name = quantizers(model)
    if not by_name:
        raise ExportError(
            "the model has no quantizers: quantize_(model, rules) and train it first, or export target fp32"
        )
    for name, quantizer in by_name.items():
        if not quantizer.initialized:
            raise ExportError(
                f"quantizer {name!r} has no scale: calibrate or train the model before exporting it"
            )
    for name, quantizer in by_name.items():
        if isinstance(quantizer, PeriodicWeight) and quantizer.stage == 1:
            raise ExportError(
                f"quantizer {name!r} is in BiPer's stage 1, whose weights are real; train stage 2 from it"
            )


def _require_quantized_weights(model: nn.Module) -> None:
    """Raises ExportError naming a layer that reads codes with a float weight."""
    for name, module in model.named_modules():
        if _reads_codes_with_a_float_weight(module):
            raise ExportError(
                f"layer {name!r} has a quantized input and a float weight (activation-only): ONNX Runtime would quantize "
                "that weight by itself, and its codes would not be trained ones; export target fp32 or qonnx, or quantize "
                "weights too"
            )


def lower_to_integers(
    model: nn.Module,
    example: Example,
    target: Target = TARGETS["ort-int8"],
    *,
    input_names: Sequence[str] = (),
) -> LoweredModel:
    """The canonical model of a trained, quantized `model` for `target`: `lower`, then all passes (`export/passes`).

    Raises ExportError naming what cannot run on integers.
    """
    return to_integers(lower(model, example, input_names=input_names), target)


def lowered_anew(
    lowered: LoweredModel, model: nn.Module, example: Example
) -> LoweredModel:
    """`lower(model, example)` where `lowered`, as `lower` gave it, is of the same model and only its quantizers, quantized
    weights and the weights of its batch norms have changed since: the graph, which takes most of the time, is copied."""
    model = copied(model).cpu().eval()
    one_sample = with_tensors(example, lambda tensor: tensor[:1].cpu())
    arguments = arguments_of(model, one_sample)
    with torch.no_grad():  # see `lower`
        call(model, arguments)
    layers, activations = _layers_and_quantizers(model, arguments)
    _add_repeated(lowered.repeated, layers, activations)
    skeleton = lowered.skeleton.clone()
    parameters = dict(model.named_parameters())
    for node in skeleton.graph:
        beta = node.meta.get(BIAS_PARAMETER, "")
        gamma = parameters.get(gamma_of(beta))
        if beta and gamma is not None:
            _replace_gamma(node, gamma)
    return LoweredModel(
        skeleton,
        layers,
        activations,
        multiply_adds=lowered.multiply_adds,
        repeated=lowered.repeated,
    )


def _replace_gamma(norm: ir.Node, gamma: Tensor) -> None:
    """In the norm alone: the exporter writes tensors of equal values once, for all their readers."""
    before = constant(norm.inputs[1])
    now = gamma.detach().numpy()
    if before is None or norm.graph is None or np.array_equal(before, now):
        return
    value = ir.Value(name=f"{norm.name}/gamma", const_value=ir.tensor(now))
    norm.graph.register_initializer(value)
    norm.replace_input_with(1, value)


def _layers_and_quantizers(
    model: nn.Module, arguments: Arguments
) -> tuple[dict[str, LoweredLayer], dict[str, LoweredQuantizer]]:
    """Layers by the name of their weight's quantizer, and activation quantizers by their own."""
    layers = {}
    for layer in _layers(model, arguments):
        layers[weight_of(layer.name)] = layer
    activations: dict[str, LoweredQuantizer] = {}
    for name, quantizer in quantizers(model).items():
        if not quantizer.is_weight:
            activations[name] = _activation(quantizer)
    return layers, activations


def _add_repeated(
    repeated: Mapping[str, str],
    layers: dict[str, LoweredLayer],
    activations: dict[str, LoweredQuantizer],
) -> None:
    """Give the marks of modules that run again what their first ones have."""
    for again, first in repeated.items():
        if first in layers:
            name = layer_of(again)
            layers[again] = dataclasses.replace(layers[first], name=name)
        else:
            activations[again] = dataclasses.replace(activations[first], name=again)


def _name_norm_biases(skeleton: ir.Model, model: nn.Module) -> None:
    """Note at every batch norm which parameter its beta is. Its initializer does not tell: the exporter writes tensors of
    equal values once, under one of their names."""
    parameters = dict(model.named_parameters())
    for node in skeleton.graph:
        if node.op_type != "BatchNormalization":
            continue
        for path in modules_of(node):
            bias = bias_of(path)
            if bias in parameters:  # the innermost module comes last
                node.meta[BIAS_PARAMETER] = bias


class _Passes:
    """Names of quantizer calls within a forward pass: a module that runs again has marks of its own in the file."""

    def __init__(self, model: nn.Module) -> None:
        self.counts: Counter[str] = Counter()
        self.repeated: dict[str, str] = {}
        self.handle = model.register_forward_pre_hook(
            lambda module, args: self.counts.clear()
        )

    def name(self, quantizer: Quantizer) -> str:
        """`layer.input` the first time, then `layer.input@1`; `layer@1.weight` for weights."""
        first = quantizer.name
        count = self.counts[first]
        self.counts[first] += 1
        if not count:
            return first
        again = run_again(first, count)
        self.repeated[again] = first
        return again


def _reads_codes_with_a_float_weight(module: nn.Module) -> bool:
    if not isinstance(module, (QuantConv2d, QuantLinear, QuantOperands)):
        return False
    return module.weight_quantizer is None


def _check_finite(model: nn.Module) -> None:
    """Infinity is refused where training left it; a buffer of a layer's own may say so that it clips nothing."""
    trained = {id(parameter) for parameter in model.parameters()}
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            trained.update(id(buffer) for buffer in module.buffers())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        is_wrong = tensor.isnan()
        if id(tensor) in trained:
            is_wrong = tensor.isfinite().logical_not()
        if bool(is_wrong.any()):
            raise ExportError(
                f"{name}: holds NaN or infinity; the training diverged, export an earlier checkpoint"
            )


def lower_float(
    model: nn.Module, example: Example, input_names: Sequence[str] = ()
) -> onnx.ModelProto:
    """The same trained model in full precision, quantizers passing everything through: the FP32 file to compare with."""
    model = copied(model).cpu().eval()
    for quantizer in quantizers(model).values():
        quantizer.forward = _identity  # type: ignore[method-assign]
    example = with_tensors(example, lambda tensor: tensor[:1].cpu())
    arguments = arguments_of(model, example)
    with torch.no_grad():
        outputs = list(named_outputs(call(model, arguments)))
    inputs = input_names or names_of_inputs(model, example)
    with _AttentionInTheOpen():
        return ir.to_proto(onnx_graph(model, arguments, inputs, outputs))


class _AttentionInTheOpen(TorchFunctionMode):
    """Fused attention as the products that it consists of. PyTorch's exporter writes those too, but takes their result to lie
    in memory as the fused one's does, which fails where it has a mask and a view reads it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return scaled_dot_product_attention(*args, **options)
        return func(*args, **options)


def _identity(x: Tensor) -> Tensor:
    return x


def trained_codes(
    model: nn.Module, images: NDArray[np.float32]
) -> tuple[dict[str, NDArray[np.uint8]], dict[str, NDArray[np.float32]]]:
    """What the trained net of one input computes for `images` (N_C_H_W); see `codes_and_outputs`."""
    return codes_and_outputs(model, ((torch.from_numpy(images),), {}))


@torch.no_grad()
def codes_and_outputs(
    model: nn.Module, arguments: Arguments
) -> tuple[dict[str, NDArray[np.uint8]], dict[str, NDArray[np.float32]]]:
    """What the trained net itself computes in eval mode: storage codes of every activation quantizer, and its outputs by
    name."""
    codes: dict[str, NDArray[np.uint8]] = {}
    passes = _Passes(model)
    handles = [passes.handle]
    for quantizer in quantizers(model).values():
        if not quantizer.is_weight:
            hook = _recorder(passes, codes)
            handles.append(quantizer.register_forward_hook(hook))
    try:
        outputs = named_outputs(call(model, arguments))
    finally:
        for handle in handles:
            handle.remove()
    return codes, {name: output.numpy() for name, output in outputs.items()}


def named_outputs(outputs: object) -> dict[str, Tensor]:
    """What a model returns, by name: `logits` for a tensor, a dict's own keys, `output0` and so on for a tuple or list.

    Raises ExportError for anything else.
    """
    if isinstance(outputs, Tensor):
        return {"logits": outputs}
    named: dict[str, object] = {}
    if isinstance(outputs, Mapping):
        named = {str(key): value for key, value in outputs.items()}
    elif isinstance(outputs, (tuple, list)):
        named = {f"output{index}": value for index, value in enumerate(outputs)}
    if not named:
        raise _unwritable(f"it is a {type(outputs).__name__}")
    tensors = {}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise _unwritable(f"its output {name!r} is a {type(value).__name__}")
        tensors[name] = value
    return tensors


def _unwritable(what: str) -> ExportError:
    return ExportError(
        f"the model's result cannot be written: {what}; return a tensor, or a dict, tuple or list of tensors"
    )


def _recorder(
    passes: _Passes, codes: dict[str, NDArray[np.uint8]]
) -> Callable[[Quantizer, tuple[Tensor], Tensor], None]:
    def record(quantizer: Quantizer, inputs: tuple[Tensor], output: Tensor) -> None:
        grid = _activation(quantizer)
        centred = quantizer.codes(inputs[0]) - quantizer.zero_point
        stored = centred * grid.gain + grid.zero_point
        codes[passes.name(quantizer)] = stored.to(torch.uint8).numpy()

    return record


def call(model: nn.Module, arguments: Arguments) -> Any:
    """The model's result for the arguments."""
    args, kwargs = arguments
    return model(*args, **kwargs)


def names_of_inputs(model: nn.Module, example: Example) -> list[str]:
    """`input` for a model of one tensor, as recipes write it; else forward's own names."""
    return ["input"] if isinstance(example, Tensor) else input_names_of(model, example)


def input_names_of(model: nn.Module, example: Example) -> list[str]:
    """Name of each tensor of the example: of forward's parameter, of its key in a dict, numbered within a list."""
    args, kwargs = arguments_of(model, example)
    signature = inspect.signature(model.forward)
    bound = signature.bind(*args, **kwargs)
    names: list[str] = []
    for parameter, value in bound.arguments.items():
        _collect_names(parameter, value, names)
    return names


def _collect_names(name: str, value: object, names: list[str]) -> None:
    if isinstance(value, Tensor):
        names.append(name)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _collect_names(str(key), inner, names)
    elif isinstance(value, (tuple, list)):
        for index, inner in enumerate(value):
            _collect_names(f"{name}{index}", inner, names)


def onnx_graph(
    model: nn.Module,
    arguments: Arguments,
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> ir.Model:
    """torch.onnx export with one dynamic batch dimension, the first of every tensor; inputs and outputs of the given names.

    arguments: of one call on one sample.
    """
    # A batch of one would be taken for a constant.
    args, kwargs = twice(arguments)
    batch = torch.export.Dim("batch")
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    shapes = with_leaves(dict(bound), lambda leaf: _dynamic(leaf, batch))
    try:
        with _quiet():
            captured = _captured(model, args, kwargs, shapes)
            program = torch.onnx.export(
                captured,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
            assert program is not None, "torch.onnx gave no program"
            simplify(program.model)
            _require_batch(program.model.graph.outputs, outputs)
            # After `simplify`, which gives values of one name two
            _name(program.model.graph.inputs, inputs)
            _name(program.model.graph.outputs, outputs)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"torch.onnx could not export the model: {_root_cause(error)}"
        ) from error
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings, prints and notes of the exporter, which tell its developers more than our users."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _has_batch(output: ir.Value) -> bool:
    """Whether its first axis may have any length."""
    if output.const_value is not None:
        return False
    shape = output.shape
    if shape is None:
        return True
    return len(shape) > 0 and not isinstance(shape[0], int)


def _require_batch(outputs: Sequence[ir.Value], names: Sequence[str]) -> None:
    """Raises ExportError for an output that is not one answer for each sample: a file runs any number of them."""
    for output, name in zip(outputs, names, strict=True):
        if not _has_batch(output):
            raise ExportError(
                f"the model's output {name!r} has no batch as its first axis, so it is not an answer for each sample; leave "
                "it out of what forward returns in eval mode, or return it for each sample"
            )


def _name(values: Sequence[ir.Value], names: Sequence[str]) -> None:
    for value, name in zip(values, names, strict=True):
        value.name = name


def _captured(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> Any:
    """The model's graph, with its batch open.

    Captured here and not by torch.onnx, which tries other ways where the batch turns out to be a number, and fixes it.
    """
    try:
        return torch.export.export(
            model, args, kwargs, dynamic_shapes=shapes, strict=False
        )
    except Exception as error:
        if "Constraints violated" not in str(error):
            raise
        if "generated guard" in str(error):
            raise ExportError(
                "the model computes otherwise for some numbers of images, and its file would hold one way alone; torch.cdist "
                "needs compute_mode='use_mm_for_euclid_dist', and what asks for x.shape[0] in an if, a torch.where: "
                f"{_guard_in(str(error))}"
            ) from error
        raise ExportError(
            "the model fixes its batch to a number, so its file would run no other: write x.shape[0] where its forward has "
            "len(x) or a number"
        ) from error


def _guard_in(message: str) -> str:
    """The sentence of torch.export that says which batches a graph would be right for."""
    lines = [line.strip(" -") for line in message.splitlines()]
    return next(line for line in lines if "generated guard" in line)


def _dynamic(leaf: object, batch: Any) -> Any:
    return {0: batch} if isinstance(leaf, Tensor) and leaf.dim() else None


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _marker(quantizer: Quantizer, passes: _Passes) -> Callable[[Tensor], Tensor]:
    def mark(x: Tensor) -> Tensor:
        x = x if x.is_floating_point() else x.float()  # as `Quantizer.forward` does
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{MARK}",
            (x,),
            {"name": passes.name(quantizer)},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )

    return mark


def _layers(model: nn.Module, arguments: Arguments) -> Iterator[LoweredLayer]:
    """All layers with a quantized weight. A weight that is computed is taken from a forward pass."""
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        if not isinstance(module, (QuantConv2d, QuantLinear)):
            continue
        quantizer = module.weight_quantizer
        if quantizer is not None:
            kind = "conv" if isinstance(module, QuantConv2d) else "linear"
            yield _layer(quantizer, module.weight, module.bias, kind, parameters)
    for operands, weight, bias in _computed(model, arguments):
        assert operands.weight_quantizer is not None
        kind = "linear" if operands.kind == "linear" else "conv"
        yield _layer(operands.weight_quantizer, weight, bias, kind, parameters)


def _layer(
    quantizer: Quantizer,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    parameters: dict[int, str],
) -> LoweredLayer:
    """parameters: names of the model's parameters by identity."""
    return LoweredLayer(
        name=layer_of(quantizer.name),
        kind=kind,
        codes=quantizer.codes(weight).numpy().astype(np.int8),
        scale=quantizer.scale.float().expand(len(weight)).numpy().copy(),
        bits=quantizer.spec.bits,
        bias=None if bias is None else bias.detach().double().numpy(),
        bias_parameter=parameters.get(id(bias), ""),
    )


@torch.no_grad()
def _computed(
    model: nn.Module, arguments: Arguments
) -> list[tuple[QuantOperands, Tensor, Tensor | None]]:
    """Every `QuantOperands` with the weight and bias it is given in a forward pass."""
    seen: list[tuple[QuantOperands, Tensor, Tensor | None]] = []

    def record(module: nn.Module, args: tuple[Tensor, Tensor, Tensor | None]) -> None:
        if isinstance(module, QuantOperands) and module.weight_quantizer is not None:
            seen.append((module, args[1].detach(), args[2]))

    modules = computed_weights(model)
    handles = [module.register_forward_pre_hook(record) for module in modules]
    try:
        if modules:
            call(model, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _activation(quantizer: Quantizer) -> LoweredQuantizer:
    name = quantizer.name
    spec = quantizer.spec
    scale = float(quantizer.scale)
    if isinstance(quantizer, BinaryActivation):
        thresholds: tuple[float, ...] = (0.0,)
        if quantizer.threshold is not None:
            thresholds = tuple(quantizer.threshold.detach().tolist())
        return LoweredQuantizer.binary(name, scale, thresholds)
    zero_point = quantizer.zero_point if spec.offset else None
    grid = LoweredQuantizer.in_storage(
        name, scale, spec.bits, bool(spec.signed), zero_point
    )
    return dataclasses.replace(grid, is_fixed=spec.power_of_two)
