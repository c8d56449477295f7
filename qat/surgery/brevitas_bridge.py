"""The one door to brevitas: its post-training repairs as initialisers, our quantizers inside its layers, its own layers to
compare with.

    cle               cross-layer equalization (Nagel et al., arXiv 1906.04721), on the float model before `quantize_`
    gptq              GPTQ (Frantar et al., arXiv 2210.17323), weights moved so that their codes make less output error
    bias-correction   biases corrected for the mean output error (arXiv 1906.04721 §4.2)
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat.quantizers.contract import along
from qat.quantizers.lsq import LSQ
from qat.surgery.layers import QuantConv2d, QuantLinear

RELUS = (torch.relu, torch.relu_, nn.functional.relu, "relu", "relu_")
# Of the largest output; the net computes the same function, in other float32 roundings
EQUALIZATION_ERROR = 1e-4


class OurTensorQuant(nn.Module):
    """An LSQ quantizer as brevitas's `tensor_quant`: x -> (x̂, scale, zero point, bit width)."""

    def __init__(self, quantizer: LSQ) -> None:
        super().__init__()
        self.quantizer, self.int_quant = quantizer, _Unviewed()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x̂, scale, zero point, bit width) of x, as brevitas has them."""
        quantizer = self.quantizer
        scale = along(quantizer.scale, x, quantizer.spec.axis)
        return (
            quantizer(x),
            scale,
            torch.tensor(float(quantizer.zero_point)),
            torch.tensor(float(quantizer.spec.bits)),
        )


class _Unviewed(nn.Module):
    """Stands where brevitas asks how a weight is reshaped before it is quantized: not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.input_view_impl = nn.Identity()


def weight_quantizer_for_brevitas(quantizer: LSQ) -> Any:
    """What brevitas layers take as `weight_quant`. Raises ValueError for a quantizer without a scale."""
    from brevitas.inject import ExtendedInjector
    from brevitas.inject.enum import QuantType
    from brevitas.proxy import WeightQuantProxyFromInjector

    if not quantizer.initialized:
        raise ValueError(
            f"quantizer {quantizer.name!r} has no scale yet: calibrate the model before handing it to brevitas"
        )

    class OurWeightQuant(ExtendedInjector):
        proxy_class = WeightQuantProxyFromInjector
        quant_type = QuantType.INT
        signed = bool(quantizer.spec.signed)
        narrow_range = False
        bit_width = quantizer.spec.bits
        tensor_quant = OurTensorQuant(quantizer)

    return OurWeightQuant


def in_brevitas_layers(model: nn.Module) -> nn.Module:
    """A copy of a quantized model whose layers are brevitas's, with our quantizers inside: the same outputs, bit for bit."""
    model = copy.deepcopy(model)
    for name, layer in _quantized(model):
        made = _brevitas_twin(
            layer, weight_quant=weight_quantizer_for_brevitas(layer.weight_quantizer)
        )
        # Those that know the module's address
        made._forward_pre_hooks.update(layer._forward_pre_hooks)
        made._forward_hooks.update(layer._forward_hooks)
        if layer.input_quantizer is not None:
            made.add_module("input_quantizer", layer.input_quantizer)
        made.same_padding = getattr(layer, "same_padding", False)
        made.register_forward_pre_hook(_prepare_input)
        model.set_submodule(name, made)
    model.stream_quantizers.guests = True  # type: ignore[union-attr]
    return model


def _prepare_input(layer: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    from qat.surgery.layers import pad_same

    x, *rest = args
    quantizer = layer._modules.get("input_quantizer")
    x = x if quantizer is None else quantizer(x)
    if layer.same_padding:
        x = pad_same(x, layer.kernel_size, layer.stride, layer.dilation)
    return (x, *rest)


@torch.no_grad()
def gptq_(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Move the weights of a calibrated, quantized `model` by GPTQ on `batches` of N_C_H_W images; scales stay."""
    from brevitas.graph.gptq import gptq_mode

    theirs = in_brevitas_layers(model).eval()
    with (
        _quiet(),
        gptq_mode(theirs, create_weight_orig=False, use_quant_activations=True) as gptq,
    ):
        for _ in range(gptq.num_layers):
            for images in batches:
                gptq.model(images)
            gptq.update()
    _take_over(model, theirs, "weight")


@torch.no_grad()
def correct_biases_(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Correct the biases of a calibrated, quantized `model` for the mean error of its layers on `batches`.

    Layers without a bias keep none: what follows them is a batch norm, whose statistics `--norm-batches` takes again.
    """
    from brevitas.graph.calibrate import bias_correction_mode

    theirs = in_brevitas_layers(model).eval()
    with _quiet(), bias_correction_mode(theirs, skip_if_no_bias=True):
        for images in batches:
            theirs(images)
    _take_over(model, theirs, "bias")


def _take_over(model: nn.Module, theirs: nn.Module, name: str) -> None:
    for path, layer in _quantized(model):
        own, other = getattr(layer, name), getattr(theirs.get_submodule(path), name)
        if own is not None:
            own.copy_(other)


@torch.no_grad()
def equalize_(model: nn.Module, example: Tensor) -> None:
    """Equalize the ranges of neighbouring layers of a float `model` in place.

    Raises ValueError when the model cannot be traced, when it has no pair of layers with nothing but a ReLU between (batch
    norms that timm joins to an activation hide them: fold them first), or when its outputs change, which they must not.
    """
    from brevitas.graph.equalize import EqualizeGraph

    model.eval()
    before = model(example)
    try:
        with _quiet():
            traced = _relus_as_modules(torch.fx.symbolic_trace(model))
            _, regions = EqualizeGraph(return_regions=True).apply(traced)
    except Exception as error:
        raise ValueError(
            f"--init cle: brevitas could not equalize this backbone ({error}); use another --init"
        ) from error
    if not regions:
        raise ValueError(
            "--init cle: no pair of layers can be equalized; try --fold-norms, or use another --init"
        )
    _bring_back(model, traced)
    change = float(
        (model(example) - before).abs().max() / before.abs().max().clamp_min(1e-30)
    )
    if not change <= EQUALIZATION_ERROR:
        raise ValueError(
            f"--init cle: equalization changed the net's outputs by {change:.1e} of the largest; use another --init"
        )


def _relus_as_modules(traced: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Brevitas looks through `nn.ReLU` and not through a function of the same name."""
    for node in list(traced.graph.nodes):
        if node.op in ("call_function", "call_method") and node.target in RELUS:
            name = f"relu_of_{node.name}"
            traced.add_submodule(name, nn.ReLU())
            with traced.graph.inserting_before(node):
                node.replace_all_uses_with(
                    traced.graph.call_module(name, (node.args[0],))
                )
            traced.graph.erase_node(node)
    traced.recompile()
    return traced


def _bring_back(model: nn.Module, traced: nn.Module) -> None:
    """Parameters that brevitas replaced in the traced model, where they differ from the model's own objects."""
    found = dict(traced.named_parameters())
    for name, parameter in model.named_parameters():
        if name in found and found[name] is not parameter:
            parameter.copy_(found[name])


def brevitas_layer(layer: nn.Module, bits: int) -> nn.Module:
    """A conv or linear as brevitas users write it: learned per-tensor scales, weight and input at `bits`."""
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat

    return _brevitas_twin(
        layer,
        weight_quant=Int8WeightPerTensorFloat,
        weight_bit_width=bits,
        input_quant=Int8ActPerTensorFloat,
        input_bit_width=bits,
    )


def _brevitas_twin(layer: nn.Module, **quantization: Any) -> Any:
    """A brevitas layer of `layer`'s shape that shares its parameters."""
    import brevitas.nn as qnn

    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        made = qnn.QuantLinear(
            layer.in_features, layer.out_features, bias, **quantization
        )
    elif isinstance(layer, nn.Conv2d):
        made = qnn.QuantConv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            bias=bias,
            **quantization,
        )
    else:
        raise ValueError(
            f"{type(layer).__name__} has no twin among brevitas's layers that this bridge knows"
        )
    made.weight, made.bias = layer.weight, layer.bias
    return made


def _quantized(model: nn.Module) -> list[tuple[str, Any]]:
    """Names and layers whose weight is quantized."""
    layers = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, (QuantConv2d, QuantLinear))
    ]
    return [
        (name, layer) for name, layer in layers if layer.weight_quantizer is not None
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
