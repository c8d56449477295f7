"""edgeqat beside other toolkits: step time, memory, file size, codes after export, coverage; in one run, on one machine.

    uv run tools/compare_toolkits.py --out comparison.jsonl                       # two nets, and eight taken once
    uv run tools/compare_toolkits.py --nets resnet18 --covered --rounds 5         # 20 minutes on a busy core
    uv run tools/compare_toolkits.py --only edgeqat brevitas --nets resnet18

Each toolkit runs in a separate environment, which `uv run --isolated` makes of the versions below, by the flow that its
documentation recommends. One that cannot be installed, fails, or lacks something is a row that says why.

All start from the same weights: a net trained here for a few steps to tell noisy patterns apart, from norms with random
gammas and betas. Then per toolkit, net and bits: quantize, calibrate on one batch, and time steps (forward, cross entropy,
backward) of full precision, 8 and 4 bits in turn, in one process, with one thread; ratios are medians over rounds. After a
few steps of SGD the net is exported as the toolkit exports. The file runs on ONNX Runtime as it comes, or without
optimisation where that fails, which its row says. It is compared with the toolkit's own fake-quantized net in PyTorch, on
the same images:

    answers differ   images whose top-1 is another
    logits differ    largest difference, in standard deviations of the logits
    weight codes     codes in the file that are not those of the net, of all of layers that were found in both
    size             the file and what lies beside it, over the FP32 file that torch writes
"""

import argparse
import copy
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # workers have no edgeqat, and the parent needs no torch
    import numpy as np
    import onnx
    from numpy.typing import NDArray
    from torch import Tensor, nn

    Codes = dict[str, Tensor]

CLASSES, SIDE, BATCH = 10, 64, 16
NETS = ("resnet18", "vit_tiny_patch16_224")
COVERED = (
    "resnet18",
    "mobilenetv3_small_050",
    "efficientnet_b0",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "regnety_002",
    "levit_128s",
)
TESTED = 256  # images that the file and the net answer
TAKES_SIZE = ("vit", "swin", "levit")


@dataclass
class Row:
    """What one toolkit did with one net in one width; None: not measured, and `reason` says why.

    kind: "net" for a measured one, "coverage" for a model of COVERED, "toolkit" for one that did nothing.
    """

    toolkit: str
    kind: str
    net: str = ""
    bits: int = 0
    step: float | None = None
    memory: float | None = None
    size: float | None = None
    answers: float | None = None
    logits: float | None = None
    codes: int | None = None
    codes_differ: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class Toolkit:
    """Requirements of its environment (none: this project's), and its flow.

    quantize: (float model, images, bits) -> model to train. export: (trained model, images, path).
    codes: trained model -> name -> integer weight codes.
    """

    requirements: tuple[str, ...]
    quantize: "Callable[[nn.Module, Tensor, int], nn.Module] | None" = None
    export: "Callable[[nn.Module, Tensor, Path], None] | None" = None
    codes: "Callable[[nn.Module], Codes] | None" = None
    evaluate: "Callable[[nn.Module], nn.Module]" = lambda model: model.eval()
    lacks: str = ""


def edgeqat_quantize(model: "nn.Module", images: "Tensor", bits: int) -> "nn.Module":
    import qat

    qat.quantize_(model, qat.uniform_rules(bits), images)
    qat.calibrate(model, [images])
    return model


def edgeqat_evaluate(model: "nn.Module") -> "nn.Module":
    import qat

    qat.settle_(model.eval())
    return model


def edgeqat_export(model: "nn.Module", images: "Tensor", path: Path) -> None:
    import qat

    qat.export_onnx(model, path, target="ort-packed")


def edgeqat_codes(model: "nn.Module") -> "Codes":
    layers = [(n, m) for n, m in model.named_modules() if getattr(m, "weight_quantizer", None) is not None]
    return {name: layer.weight_quantizer.codes(layer.weight) for name, layer in layers}  # type: ignore[union-attr, operator]


def brevitas_quantize(model: "nn.Module", images: "Tensor", bits: int) -> "nn.Module":
    """Its graph mode with its own example's settings for torchvision; layer by layer where its tracer cannot follow."""
    import torch
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import preprocess_for_quantize
    from brevitas_examples.imagenet_classification.ptq.ptq_common import quantize_model

    backend = "fx"
    try:
        traced = preprocess_for_quantize(copy.deepcopy(model))
    except Exception:
        backend, traced = "layerwise", preprocess_for_quantize(model, trace_model=False, merge_bn=False)
    quantized = quantize_model(
        traced,
        backend=backend,
        weight_bit_width=bits,
        act_bit_width=bits,
        bias_bit_width=32,
        weight_quant_granularity="per_channel",
        act_quant_percentile=99.999,
        act_quant_type="sym",
        scale_factor_type="float_scale",
        quant_format="int",
        weight_narrow_range=True,
    )
    with torch.no_grad(), calibration_mode(quantized):
        quantized(images)
    return quantized


def brevitas_export(model: "nn.Module", images: "Tensor", path: Path) -> None:
    import torch
    from brevitas.export import export_onnx_qcdq

    with torch.no_grad():
        export_onnx_qcdq(model, args=(images,), export_path=str(path), dynamo=False)  # that of dynamo refuses biases


def brevitas_codes(model: "nn.Module") -> "Codes":
    layers = [(n, m) for n, m in model.named_modules() if hasattr(m, "quant_weight")]
    return {name: layer.quant_weight().int() for name, layer in layers}  # type: ignore[operator]


def codes_of_a_pass(model: "nn.Module", scale_of: "Callable[[nn.Module], Tensor | None]") -> "Codes":
    """What weight quantizers give in a forward pass, over their scale per output channel.

    scale_of: a quantizer of weights -> its scale, O_...; any other module -> None.
    """
    import torch

    codes: Codes = {}

    def watch(name: str, quantizer: "nn.Module", scale: "Tensor") -> "torch.utils.hooks.RemovableHandle":
        def keep(_: object, inputs: object, weight: "Tensor") -> None:
            codes[name] = (weight / scale.reshape(-1, *[1] * (weight.dim() - 1))).round()

        return quantizer.register_forward_hook(keep)

    scales = [(name, module, scale_of(module)) for name, module in model.named_modules()]
    handles = [watch(name, module, scale) for name, module, scale in scales if scale is not None]
    images, _ = next(batches(1, seed=2))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return codes


def torchao_quantize(model: "nn.Module", images: "Tensor", bits: int) -> "nn.Module":
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    if bits != 8:
        raise NotImplementedError("its quantizers for nets with convolutions (PT2E) are of 8 bits")
    graph = torch.export.export(model.train(), (images,)).module()
    config = get_default_x86_inductor_quantization_config(is_qat=True)
    prepared = prepare_qat_pt2e(graph, X86InductorQuantizer().set_global(config))
    prepared(images)
    return prepared


def torchao_evaluate(model: "nn.Module") -> "nn.Module":
    """Observers off, as its tutorial does late in training: they would go on to learn from the images of the test."""
    from torchao.quantization.pt2e import disable_observer, move_exported_model_to_eval

    return move_exported_model_to_eval(model.apply(disable_observer))


def torchao_codes(model: "nn.Module") -> "Codes":
    from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

    def scale_of(module: "nn.Module") -> "Tensor | None":
        of_weights = isinstance(module, FakeQuantizeBase) and module.scale.numel() > 1
        return module.scale if of_weights else None  # type: ignore[return-value]

    return codes_of_a_pass(model, scale_of)


def torchao_export(model: "nn.Module", images: "Tensor", path: Path) -> None:
    """Converts as documented; then torch's exporter, for its documentation deploys by Inductor or ExecuTorch."""
    import torch
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    converted = move_exported_model_to_eval(convert_pt2e(copy.deepcopy(model)))
    torch.onnx.export(converted, (images,), str(path), dynamo=True, opset_version=21, verbose=False)


def nncf_quantize(model: "nn.Module", images: "Tensor", bits: int) -> "nn.Module":
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters

    advanced, device, left_out = None, nncf.TargetDevice.ANY, None
    if bits != 8:
        device = nncf.TargetDevice.NPU  # the only one of 4 bits, and not for pooling
        left_out = nncf.IgnoredScope(types=["adaptive_avg_pool2d"], validate=False)
        width = QuantizationParameters(num_bits=bits)
        advanced = AdvancedQuantizationParameters(
            activations_quantization_params=width, weights_quantization_params=width
        )
    kind = nncf.ModelType.TRANSFORMER if any("attn" in name for name, _ in model.named_modules()) else None
    return nncf.quantize(
        model.eval(),
        nncf.Dataset([images]),
        target_device=device,
        model_type=kind,
        ignored_scope=left_out,
        advanced_parameters=advanced,
    )


def nncf_codes(model: "nn.Module") -> "Codes":
    from nncf.torch.quantization.layers import BaseQuantizer

    def scale_of(module: "nn.Module") -> "Tensor | None":
        of_weights = isinstance(module, BaseQuantizer) and module.per_channel
        return module.get_parameters_for_torch_fq()[2] if of_weights else None  # type: ignore[operator]

    return codes_of_a_pass(model, scale_of)


def nncf_export(model: "nn.Module", images: "Tensor", path: Path) -> None:
    import nncf
    import torch

    stripped = nncf.strip(model, example_input=images)
    torch.onnx.export(stripped, (images,), str(path), dynamo=False, opset_version=17)


def aimet_quantize(model: "nn.Module", images: "Tensor", bits: int) -> "nn.Module":
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
    from aimet_torch.quantsim import QuantizationSimModel

    model.eval()
    fold_all_batch_norms(model, None, images)
    sim = QuantizationSimModel(
        model,
        images,
        default_output_bw=bits,
        default_param_bw=bits,
        config_file=get_path_for_per_channel_config(),
    )
    sim.compute_encodings(lambda simulated: simulated(images))
    return sim.model


def aimet_export(model: "nn.Module", images: "Tensor", path: Path) -> None:
    import aimet_torch

    aimet_torch.onnx.export(
        model,
        (images,),
        str(path),
        dynamo=False,
        opset_version=21,
        prequantize_constants=True,
        export_int32_bias=False,  # the file would round biases that training does not
        input_names=["images"],
        output_names=["logits"],
    )


def aimet_codes(model: "nn.Module") -> "Codes":
    codes = {}
    for name, layer in model.named_modules():
        quantizers = getattr(layer, "param_quantizers", {})
        if "weight" in quantizers and quantizers["weight"] is not None and layer.weight.dim() > 1:  # type: ignore[union-attr, operator]
            codes[name] = quantizers["weight"](layer.weight).quantize()
    return codes


def modelopt_quantize(model: "nn.Module", images: "Tensor", bits: int) -> "nn.Module":
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    for entry in config["quant_cfg"]:
        if isinstance(entry.get("cfg"), dict) and entry["cfg"].get("num_bits") == 8:
            entry["cfg"]["num_bits"] = bits
    return mtq.quantize(model.eval(), config, lambda quantized: quantized(images))


def modelopt_export(model: "nn.Module", images: "Tensor", path: Path) -> None:
    from modelopt.torch._deploy.utils import OnnxBytes, get_onnx_bytes_and_metadata

    content, _ = get_onnx_bytes_and_metadata(model, (images,), model_name="net")
    own_folder = path.parent / path.stem  # which it empties first
    OnnxBytes.from_bytes(content).write_to_disk(str(own_folder))
    (own_folder / "net.onnx").rename(path)


def modelopt_codes(model: "nn.Module") -> "Codes":
    codes = {}
    for name, layer in model.named_modules():
        quantizer = getattr(layer, "weight_quantizer", None)
        if quantizer is not None and quantizer.is_enabled:
            scale = quantizer.amax / (2 ** (quantizer.num_bits - 1) - 1)
            codes[name] = (quantizer(layer.weight) / scale).round()
    return codes


RUN_WITH = ("torch", "timm", "onnx", "onnxruntime", "onnxscript")
TOOLKITS = {
    "edgeqat": Toolkit((), edgeqat_quantize, edgeqat_export, edgeqat_codes, edgeqat_evaluate),
    "brevitas": Toolkit(
        ("brevitas==0.13.4", "tqdm", "onnxoptimizer"), brevitas_quantize, brevitas_export, brevitas_codes
    ),
    "torchao": Toolkit(("torchao==0.18.0",), torchao_quantize, torchao_export, torchao_codes, torchao_evaluate),
    "nncf": Toolkit(("nncf==3.4.0", "torchao==0.18.0"), nncf_quantize, nncf_export, nncf_codes),  # strip asks for it
    "aimet-torch": Toolkit(("aimet-torch==2.42.0",), aimet_quantize, aimet_export, aimet_codes),
    "nvidia-modelopt": Toolkit(
        ("nvidia-modelopt[onnx]==0.47.0", "requests"), modelopt_quantize, modelopt_export, modelopt_codes
    ),
    "aimet-onnx": Toolkit(
        ("aimet-onnx==2.42.0",), lacks="quantizes ONNX files after training; no training of its own to measure"
    ),
    "ultralytics": Toolkit(
        ("ultralytics==8.4.190",),
        lacks="its own YOLO nets alone, by NVIDIA ModelOpt (training) and ONNX Runtime's quantizer (after training)",
    ),
}


def float_net(name: str) -> "nn.Module":
    """A timm net with norms as random as trained ones have them; the same in every process."""
    import timm
    import torch

    torch.manual_seed(0)
    size = {"img_size": SIDE} if name.startswith(TAKES_SIZE[:2]) else {}
    model: nn.Module = timm.create_model(name, num_classes=CLASSES, **size)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
    return model


def batches(count: int, seed: int) -> "Iterator[tuple[Tensor, Tensor]]":
    """Images of one coarse pattern per class, under twice as much noise, with their classes."""
    import torch

    fixed = torch.Generator().manual_seed(1)
    coarse = torch.randn(CLASSES, 3, 8, 8, generator=fixed)
    patterns = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
        yield 0.5 * patterns[labels] + torch.randn(BATCH, 3, SIDE, SIDE, generator=generator), labels


def train(model: "nn.Module", steps: int, rate: float, seed: int) -> None:
    import torch

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate, momentum=0.9)
    for images, labels in batches(steps, seed):
        take_step(model, images, labels)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def take_step(model: "nn.Module", images: "Tensor", labels: "Tensor") -> None:
    import torch

    for parameter in model.parameters():
        parameter.grad = None
    torch.nn.functional.cross_entropy(model(images), labels).backward()


def peak_bytes(model: "nn.Module", images: "Tensor", labels: "Tensor") -> int:
    """The most that a step has allocated at any time, from PyTorch's allocation events, and what the model holds."""
    import torch

    for parameter in model.parameters():
        parameter.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        take_step(model, images, labels)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak + sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def file_bytes(path: Path) -> int:
    """The file's and those of its weights, where they lie beside it."""
    return sum(p.stat().st_size for p in path.parent.iterdir() if p.name.startswith(path.name))


def logits_of_file(path: Path, images: "Iterable[Tensor]", level: str = "ORT_ENABLE_ALL") -> "NDArray[np.float32]":
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: batch.numpy()})[0] for batch in images])


# Operator -> the place of its weights among its inputs, and that of their zero point where it has one
WEIGHTS = {
    "Conv": 1,
    "Gemm": 1,
    "MatMul": 1,
    "ConvInteger": 1,
    "MatMulInteger": 1,
    "QLinearConv": 3,
    "QLinearMatMul": 3,
}
ZERO_POINTS = {"ConvInteger": 3, "MatMulInteger": 3, "QLinearConv": 5, "QLinearMatMul": 5}


def weights_of_file(path: Path) -> "list[NDArray[np.float32]]":
    """What the file multiplies by: every operand of a convolution or product that depends on no input, as ONNX Runtime
    computes it without optimisation; of integer operators minus the zero point."""
    import numpy as np
    import onnx

    model = onnx.load(str(path))
    operands = constant_operands(model)
    names = dict.fromkeys(name for pair in operands for name in pair if name)
    read = values_in_file(model, list(names))
    weights = []
    for name, zero_name in operands:
        value = read[name].astype(np.float32)
        if zero_name:
            zeros = read[zero_name].astype(np.float32)
            per_channel = (-1, *[1] * (value.ndim - 1))
            value = value - (zeros.reshape(per_channel) if zeros.size > 1 else zeros.item())
        weights.append(value)
    return weights


def constant_operands(model: "onnx.ModelProto") -> list[tuple[str, str]]:
    """(weights, their zero point or "") of every convolution and product whose weights depend on no input of the graph."""
    constants = {value.name for value in model.graph.initializer}
    fed = {value.name for value in model.graph.input} - constants
    found = []
    for node in model.graph.node:
        if any(name in fed for name in node.input):
            fed.update(node.output)
        place = WEIGHTS.get(node.op_type)
        if place is None or node.input[place] in fed:
            continue
        zero_place = ZERO_POINTS.get(node.op_type, len(node.input))
        zero_name = node.input[zero_place] if zero_place < len(node.input) else ""
        found.append((node.input[place], zero_name))
    return found


def values_in_file(model: "onnx.ModelProto", names: list[str]) -> "dict[str, NDArray[np.float32]]":
    """Values of `model` that depend on no input, by name, from ONNX Runtime; the model's outputs are replaced."""
    import numpy as np
    import onnxruntime

    del model.graph.output[:]
    for number, name in enumerate(names):
        model.graph.node.add(op_type="Identity", input=[name], output=[f"read{number}"])
        model.graph.output.add(name=f"read{number}")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in value.shape]
        feeds[value.name] = np.zeros(shape, np.float32)
    return dict(zip(names, session.run(None, feeds), strict=True))


def different_codes(trained: "NDArray[np.float32]", stored: "NDArray[np.float32]") -> int:
    """Codes of `trained` that `stored` does not have, whatever positive or negative scale each output channel has there.

    trained: O_... integers. stored: as many numbers in the same order.
    """
    import numpy as np

    codes, values = trained.reshape(len(trained), -1), stored.reshape(len(trained), -1)
    scale = (values * codes).sum(1, keepdims=True) / np.maximum((values * values).sum(1, keepdims=True), 1e-30)
    return int(np.count_nonzero(np.rint(values * scale) != np.rint(codes)))


def compare_codes(trained: "Iterable[NDArray[np.float32]]", stored: "list[NDArray[np.float32]]") -> tuple[int, int]:
    """(codes found in the file, of those different): each layer against the nearest operand of its shape, taken once."""
    found = different = 0
    left = list(stored)
    for codes in trained:
        candidates: list[tuple[int, int]] = []
        for number, values in enumerate(left):
            if values.shape == codes.shape:
                candidates.append((different_codes(codes, values), number))
            if values.ndim == 2 and values.T.shape == codes.shape:
                candidates.append((different_codes(codes, values.T), number))
        if candidates:
            least, number = min(candidates)
            left.pop(number)
            found, different = found + codes.size, different + least
    return found, different


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:140]}"


def measure(toolkit: str, net: str, weights: Path, rounds: int, folder: Path) -> Iterator[Row]:
    """A row per width, after timing full precision, 8 and 4 bits in turn."""
    import torch

    own = TOOLKITS[toolkit]
    assert own.quantize is not None
    baseline = float_net(net)
    baseline.load_state_dict(torch.load(weights))
    images, labels = next(batches(1, seed=2))
    rows, models = dict[int, Row](), {32: copy.deepcopy(baseline).train()}
    for bits in (8, 4):
        rows[bits] = Row(toolkit, "net", net, bits)
        try:
            model = own.quantize(copy.deepcopy(baseline), images, bits)
            models[bits] = model if toolkit == "torchao" else model.train()
            take_step(models[bits], images, labels)
        except Exception as error:
            models.pop(bits, None)
            rows[bits].reason = f"training: {short(error)}"
    take_step(models[32], images, labels)
    times = {bits: list[float]() for bits in models}
    for number in range(rounds):
        for bits in list(models)[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            take_step(models[bits], images, labels)
            times[bits].append(time.perf_counter() - began)
    memory = {bits: peak_bytes(model, images, labels) for bits, model in models.items()}
    plain = folder / "fp32.onnx"
    torch.onnx.export(baseline.eval(), (images,), str(plain), dynamo=False)
    for bits, row in rows.items():
        if bits in models:
            row.step = statistics.median(a / b for a, b in zip(times[bits], times[32], strict=True))
            row.memory = memory[bits] / memory[32]
            try:
                after_export(row, models[bits], images, folder / f"w{bits}.onnx", file_bytes(plain))
            except Exception as error:
                row.reason = f"export: {short(error)}"
        yield row


def after_export(row: Row, model: "nn.Module", images: "Tensor", path: Path, plain_bytes: int) -> None:
    import torch

    own = TOOLKITS[row.toolkit]
    assert own.export is not None
    train(model, steps=5, rate=0.001, seed=3)
    model = own.evaluate(model)
    shown = [batch for batch, _ in batches(TESTED // BATCH, seed=4)]
    with torch.no_grad():
        expected = torch.cat([model(batch) for batch in shown]).numpy()
        trained = (
            {name: codes.detach().float().numpy() for name, codes in own.codes(model).items()} if own.codes else {}
        )
    path.parent.mkdir(exist_ok=True)
    own.export(model, images, path)
    row.size = file_bytes(path) / plain_bytes
    try:
        found = logits_of_file(path, shown)
    except Exception as error:
        found = logits_of_file(path, shown, level="ORT_DISABLE_ALL")
        row.reason = f"without ONNX Runtime's optimisation, with which it fails: {short(error)}"
    row.answers = float((found.argmax(1) != expected.argmax(1)).mean())
    row.logits = float(abs(found - expected).max() / expected.std())
    if trained:
        row.codes, row.codes_differ = compare_codes(trained.values(), weights_of_file(path))


def cover(toolkit: str, net: str, folder: Path) -> Row:
    """Whether a net quantizes in 8 bits, takes a step, and exports to a file that ONNX Runtime runs."""
    import numpy as np

    own, row, stage = TOOLKITS[toolkit], Row(toolkit, "coverage", net, 8), "quantize"
    assert own.quantize is not None and own.export is not None
    images, _ = next(batches(1, seed=2))
    try:
        model = own.quantize(float_net(net), images, 8)
        model = model if toolkit == "torchao" else model.train()
        stage = "step"
        train(model, steps=1, rate=0.001, seed=3)
        stage = "export"
        model = own.evaluate(model)
        own.export(model, images, folder / f"{net}.onnx")
        stage = "ONNX Runtime"
        try:
            logits = logits_of_file(folder / f"{net}.onnx", [images])
        except Exception:
            logits = logits_of_file(folder / f"{net}.onnx", [images], level="ORT_DISABLE_ALL")
        if not np.isfinite(logits).all():
            row.reason = "ONNX Runtime: results that are not finite"
    except Exception as error:
        row.reason = f"{stage}: {short(error)}"
    return row


def work(toolkit: str, options: argparse.Namespace) -> None:
    """One toolkit's rows, each written as soon as it is known; in that toolkit's environment."""
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, options.rows.open("a") as file:
        for net in options.nets:
            folder = Path(scratch) / net
            folder.mkdir()
            for row in measure(toolkit, net, options.weights / f"{net}.pt", options.rounds, folder):
                file.write(json.dumps(asdict(row)) + "\n")
                file.flush()
        for net in options.covered:
            file.write(json.dumps(asdict(cover(toolkit, net, Path(scratch)))) + "\n")
            file.flush()


def make_weights(nets: Iterable[str], folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    for net in nets:
        model = float_net(net).train()
        train(model, steps=60, rate=0.02, seed=5)
        torch.save(model.state_dict(), folder / f"{net}.pt")


def in_its_environment(toolkit: str, arguments: list[str], timeout: float) -> str:
    """Run a worker; "" or why it ended early, in one line."""
    needed = TOOLKITS[toolkit].requirements
    command = [sys.executable]
    if needed:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        command = ["uv", "run", "--isolated", "--no-project", "--python", version]
        for requirement in (*needed, *RUN_WITH):
            command += ["--with", requirement]
        command += ["python"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NNCF_EXTENSION_LOAD_TIMEOUT": "0"}
    worker = subprocess.Popen(
        [*command, __file__, "--worker", toolkit, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        _, errors = worker.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, signal.SIGKILL)  # uv's process and its child, which does the work
        worker.communicate()
        return f"took longer than {timeout:.0f} s"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return "" if worker.returncode == 0 else f"ended with code {worker.returncode}: {lines[-1] if lines else ''}"[:180]


def ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def cells(row: Row) -> list[str]:
    """A measured net's row: what is None is a dash."""
    codes = "–" if row.codes is None else f"{row.codes_differ:,} of {row.codes:,}"
    answers = "–" if row.answers is None else f"{row.answers:.1%}"
    logits = "–" if row.logits is None else f"{row.logits:.2g}"
    width = f"W{row.bits}A{row.bits}" if row.bits else "–"
    remark = row.reason.replace("|", "/")
    return [row.toolkit, width, ratio(row.step), ratio(row.memory), ratio(row.size), answers, logits, codes, remark]


COLUMNS = (
    "toolkit",
    "bits",
    "step / FP",
    "memory / FP",
    "size / FP32",
    "answers differ",
    "logits differ",
    "weight codes",
    "",
)


def tables(rows: Iterable[Row]) -> str:
    """Markdown: a table per net, then how many nets each toolkit takes; a toolkit that did nothing is in every table."""
    rows = list(rows)
    idle = [row for row in rows if row.kind == "toolkit"]
    lines: list[str] = []
    for net in dict.fromkeys(row.net for row in rows if row.kind == "net"):
        measured = [row for row in rows if row.kind == "net" and row.net == net]
        lines += [f"**{net}**", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join(cells(row))} |" for row in (*measured, *idle)] + [""]
    lines += ["| toolkit | nets that came through | which did not, and why |", "|---|---|---|"]
    covered = [row for row in rows if row.kind == "coverage"]
    for toolkit in dict.fromkeys(row.toolkit for row in covered):
        tried = [row for row in covered if row.toolkit == toolkit]
        failed = [f"{row.net} ({row.reason})".replace("|", "/") for row in tried if row.reason]
        lines.append(f"| {toolkit} | {len(tried) - len(failed)} of {len(tried)} | {'; '.join(failed)} |")
    lines += [f"| {row.toolkit} | – | {row.reason} |".replace("||", "|") for row in idle]
    return "\n".join(lines)


def read_rows(path: Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(TOOLKITS), default=list(TOOLKITS))
    parser.add_argument("--nets", nargs="*", default=list(NETS), help="nets that are timed, exported and compared")
    parser.add_argument("--covered", nargs="*", default=list(COVERED), help="nets that are taken once all the way")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--timeout", type=float, default=1200, help="seconds a toolkit may take")
    parser.add_argument("--out", type=Path, help="also keep the rows as JSON lines")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options)
        return
    from processor import processor

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        make_weights(options.nets, Path(scratch))
        for toolkit in options.only:
            file = Path(scratch) / f"{toolkit}.jsonl"
            reason = TOOLKITS[toolkit].lacks
            if not reason:
                arguments = ["--weights", scratch, "--rows", str(file), "--rounds", str(options.rounds)]
                arguments += ["--nets", *options.nets, "--covered", *options.covered]
                reason = in_its_environment(toolkit, arguments, options.timeout)
            own = read_rows(file)
            rows += own + ([Row(toolkit, "toolkit", reason=reason)] if reason else [])
            print(f"{toolkit}: {len(own)} rows {reason}", file=sys.stderr, flush=True)
            if options.out is not None:
                options.out.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    versions = [", ".join(TOOLKITS[name].requirements[:1]) or name for name in options.only]
    print(f"{datetime.date.today()}, {processor()}, one thread, {SIDE} px, batch {BATCH}: {', '.join(versions)}\n")
    print(tables(rows))


if __name__ == "__main__":
    main()
