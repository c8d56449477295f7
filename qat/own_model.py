"""Export and certify a quantized model that a user brings, trained in a loop of theirs: no recipe, no run folder.

`export` is imported inside the functions: training needs neither onnx nor onnxruntime.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgeqat.extras import require
from edgeqat.files import write_atomically
from qat import __version__
from qat.proof import recorded
from qat.surgery.batches import inputs_of
from qat.surgery.example import (
    Example,
    arguments_of,
    tensors_in,
    with_leaves,
    with_tensors,
)
from qat.surgery.points import example_of
from qat.surgery.wrappers import copied, require_float32, unwrapped

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

    from export.agreement import Agreement
    from export.certificate import Certificate
    from export.feeds import Feeds
    from export.metadata import Preprocessing, Tensors

PRODUCER = f"edgeqat {__version__}"
PathLike = str | os.PathLike[str]


def export_onnx(
    model: nn.Module,
    path: PathLike,
    target: str = "ort-int8",
    *,
    example: Example | None = None,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Path:
    """Write the ONNX file of a trained, quantized `model`; returns its path. Nothing is left when the export fails.

    target:    one of export/targets.py, such as "ort-int8", "ort-packed" or "ort-native"; "fp32", "fp16" or "qonnx" for float
               files.
    example:   what forward takes, where another size is wanted than that of `quantize_`; the batch stays open.
    classes, mean, std: names of the answers, and of the red, green and blue channels in [0, 1], for an image classifier. All
               three make a file that `qat predict FILE IMAGES` runs; without them it takes tensors.

    Inputs have the names of forward's parameters; outputs their keys where forward returns a dict, else `logits`, or
    `output0` and so on. Call `qat.settle_` after training and before measuring: it rounds what the file will round. A model
    that is compiled or wrapped for several processes is exported without its wrapper.
    Raises ExportError naming the layer or operation that the target cannot have, or a name that two tensors of the file would
    have; ValueError for a model that is not float32, or for classes, mean and std that do not go with it.
    """
    require("onnx", "onnxruntime", "onnxscript")
    import onnx

    from export.metadata import read_metadata

    destination = Path(path)
    model = unwrapped(model)
    given = example_of(model, example)
    require_float32(model, "export_onnx")
    from export.lower import input_names_of

    source = _preprocessing(model, given, classes, mean, std)
    proto = onnx_of(model, target, given, source, input_names_of(model, given))
    _require_distinct_names(proto)
    read_metadata(proto, str(destination))  # as whoever gets the file will read it
    _require_as_many(classes, proto)
    require_valid(proto)
    write_atomically(destination, lambda part: onnx.save(proto, str(part)))
    return destination


def onnx_of(
    model: nn.Module,
    target: str,
    given: Example,
    source: Preprocessing | Tensors,
    input_names: Sequence[str] = (),
) -> onnx.ModelProto:
    """The ONNX model of `model` for `target`, signed.

    given: what forward takes, of the size the file will have. source: what the file says of its inputs. input_names: see
    `export.lower.lower`.
    """
    from export import session
    from export.lower import lower, lower_float, lower_to_integers
    from export.metadata import sign, sign_float
    from export.metadata_entries import FLOAT_TARGETS
    from export.native_graph import emit
    from export.qonnx import emit_qonnx
    from export.targets import target_named

    if target in FLOAT_TARGETS:
        if target == "qonnx":
            file = emit_qonnx(
                lower(model, given, float_weights=True, input_names=input_names)
            )
        else:
            file = lower_float(model, given, input_names)
        if target == "fp16":
            file = session.fp16(file)
        return sign_float(file, target, source, PRODUCER)
    chosen = target_named(target)
    lowered = lower_to_integers(model, given, chosen, input_names=input_names)
    return sign(emit(lowered, chosen), lowered, chosen, source, PRODUCER)


def certify(
    model: nn.Module,
    path: PathLike,
    images: Any,
    labels: Any = None,
    *,
    example: Example | None = None,
    on: str = "",
) -> Certificate | Agreement:
    """Prove that a file holds the codes of `model` and that ONNX Runtime computes what `model` computes, on `images`.

    images:  a tensor or array N_..., as forward takes it; a tuple or a dict of them where forward takes several; or a batch
             of your loader, whose labels are left out. 16 real ones are a beginning; all of a test set is better.
    labels:  (N,) classes, for accuracies; may be left out.
    example: as it was given to `export_onnx`.
    on:      other platforms to prove it on, comma-separated: "arm64,wasm" (emulated; what is missing is named).

    Returns the whole certificate (print it; `passed` tells), which is also recorded in the file when it passes. What the file
    says of classes and preprocessing is not compared: the model does not know them. A plain QDQ file, whose arithmetic the
    runtime chooses, gets an `Agreement`.
    Raises ExportError when the file is damaged or is not of this model; ValueError for images or labels that do not go with
    it, or a model that is not float32.
    """
    require("onnx", "onnxruntime", "onnxscript")
    from export.agreement import agree
    from export.certificate import certify as certify_lowered
    from export.elsewhere import machines_of
    from export.lower import input_names_of, lower_to_integers
    from export.lowered import ExportError
    from export.metadata import describe, read_metadata
    from export.metadata_entries import FLOAT_TARGETS
    from export.onnx_file import read
    from export.targets import target_named

    model = unwrapped(model)
    given = example_of(model, example)
    require_float32(model, "certify")
    file = Path(path)
    metadata = read_metadata(read(file), str(file))
    if metadata["target"] in FLOAT_TARGETS:
        raise ExportError(
            f"{file}: is a float file (target {metadata['target']}), it has no codes to certify"
        )
    target = target_named(metadata["target"])
    machines = machines_of(on)
    names = input_names_of(model, given)
    feeds = _feeds(model, images, given, names)
    answers = _answers(labels, len(feeds))
    lowered = lower_to_integers(model, given, target, input_names=names)
    on_cpu = copied(model).cpu().eval()  # where the file runs

    def trained(
        part: Any,
    ) -> tuple[Mapping[str, NDArray[np.uint8]], Mapping[str, NDArray[np.float32]]]:
        return _trained(on_cpu, part, given, names)

    if target.qdq:
        return agree(lowered, file, target.name, feeds, answers, trained)
    # The model knows neither classes nor preprocessing
    described = describe(lowered, target, {}, PRODUCER)
    certificate = certify_lowered(
        lowered, file, feeds, answers, trained, machines, described
    )
    return recorded(certificate, file)


def _trained(model: nn.Module, part: Any, given: Example, names: Sequence[str]) -> Any:
    """Codes and outputs of the model for arrays, put where the example has its tensors."""
    from export.feeds import Feeds
    from export.lower import codes_and_outputs

    arrays = part.arrays if isinstance(part, Feeds) else {names[0]: part}
    tensors = iter([torch.from_numpy(arrays[name]) for name in names])
    args, kwargs = with_tensors(
        list(arguments_of(model, given)), lambda tensor: next(tensors)
    )
    return codes_and_outputs(model, (args, kwargs))


def _feeds(
    model: nn.Module, images: Any, given: Example, names: Sequence[str]
) -> NDArray[np.float32] | Feeds:
    """What the user gave as arrays, by name where the net has several inputs.

    Raises ValueError for what the file, made from `given`, does not take: another type, number of axes or size; no image at
    all; NaN or infinity.
    """
    import numpy as np

    from export.feeds import Feeds

    tensors_given = with_leaves(
        images,
        lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf,
    )
    taken = inputs_of(model, tensors_given, "certify: images", given)
    tensors = [tensor.detach().cpu() for tensor in tensors_in(list(taken))]
    wanted = list(tensors_in(list(arguments_of(model, given))))
    if len(tensors) != len(wanted):
        raise ValueError(
            f"certify: images hold {len(tensors)} tensors, the file takes {len(wanted)}: {', '.join(names)}"
        )
    arrays = {}
    for name, tensor, like in zip(names, tensors, wanted, strict=True):
        _require_fitting(name, tensor, like)
        arrays[name] = tensor.numpy()
    return arrays[names[0]] if len(names) == 1 else Feeds(arrays)


def _require_fitting(name: str, images: torch.Tensor, like: torch.Tensor) -> None:
    """Raises ValueError for images that are not of the shape of `like`, none, or not finite."""
    if images.shape[1:] != like.shape[1:]:
        raise ValueError(
            f"certify: images for {name!r} have shape {list(images.shape)}, the file takes {['N', *like.shape[1:]]}; "
            "pass images of that size, or the example= that the file was exported with"
        )
    if not len(images):
        raise ValueError(f"certify: images for {name!r} are none; pass a few real ones")
    if images.is_floating_point() and not bool(images.isfinite().all()):
        raise ValueError(
            f"certify: images for {name!r} hold NaN or infinity; pass finite ones"
        )


def _answers(labels: Any, samples: int) -> NDArray[np.int64]:
    """Labels as (N,) integers, none where there are none. Raises ValueError for what are no classes of N images."""
    import numpy as np

    if labels is None:
        return np.zeros(0, np.int64)
    if isinstance(labels, torch.Tensor):
        labels = labels.detach().cpu()
    classes = np.asarray(labels)
    if classes.shape != (samples,) or classes.dtype.kind not in "iu":
        raise ValueError(
            f"certify: labels are {classes.dtype} {list(classes.shape)}; {samples} images need {samples} class numbers, or "
            "leave labels out"
        )
    return classes.astype(np.int64)


def require_valid(proto: onnx.ModelProto) -> None:
    """Raises ExportError for a graph that PyTorch's exporter has written wrong, such as that of a MaxUnpool2d, and for one
    that `predict` and `certify` would not take."""
    import onnx

    from export.lowered import ExportError
    from export.metadata import read_metadata
    from export.onnx_file import check

    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        reason = " ".join(str(error).split())
        raise ExportError(
            f"the model's graph, as torch.onnx exports it, is not a valid ONNX file: {reason[:300]}"
        ) from error
    name = "the model's file"
    if read_metadata(proto, name)["target"] != "qonnx":  # which is for other programs
        check(proto, name)


def _require_distinct_names(proto: onnx.ModelProto) -> None:
    """Raises ExportError where an input or output of the model has the name of another tensor of its file."""
    from export.lowered import ExportError

    graph = proto.graph
    written = [name for node in graph.node for name in node.output if name]
    stored = [tensor.name for tensor in graph.initializer]
    counts = Counter([*(value.name for value in graph.input), *stored, *written])
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ExportError(
            f"export_onnx: two tensors of the file would have the name {twice[0]!r}; rename the parameter of forward, or the "
            "key of what it returns, that has it"
        )


def _require_as_many(classes: Sequence[str] | None, proto: onnx.ModelProto) -> None:
    """Raises ValueError where the file's first output is not one number for each of `classes`."""
    if classes is None:
        return
    sizes = [dim.dim_value for dim in proto.graph.output[0].type.tensor_type.shape.dim]
    if len(sizes) != 2 or sizes[1] != len(classes):
        name = proto.graph.output[0].name
        raise ValueError(
            f"export_onnx: classes has {len(classes)} names, and the first output, {name!r}, has sizes "
            f"{['N', *sizes[1:]]}; give one name for each number of an image"
        )


def _preprocessing(
    model: nn.Module,
    given: Example,
    classes: Sequence[str] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Preprocessing | Tensors:
    """What the file says of its input: how an image becomes it, or its tensors alone.

    Raises ValueError for some of classes, mean and std without the others, or for a model that takes no image.
    """
    from export.lower import input_names_of
    from export.metadata import Preprocessing, Tensors

    tensors = list(tensors_in(list(arguments_of(model, given))))
    parts = {"classes": classes, "mean": mean, "std": std}
    missing = [name for name, value in parts.items() if value is None]
    if len(missing) == len(parts):
        return Tensors.of(input_names_of(model, given), tensors)
    if missing or classes is None or mean is None or std is None:
        raise ValueError(
            f"export_onnx: {', '.join(missing)} missing; a file for image files says classes, mean and std, all three"
        )
    if isinstance(classes, str):
        raise ValueError(
            f"export_onnx: classes is the text {classes!r}; give a list of names"
        )
    shape = tuple(tensors[0].shape[1:])
    if len(tensors) > 1 or len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2]:
        raise ValueError(
            f"export_onnx: classes, mean and std describe square images of 3 channels, the model takes {shape}; leave them "
            "out"
        )
    return Preprocessing(
        shape[1], _three("mean", mean), _three("std", std), tuple(classes)
    )


def _three(name: str, numbers: Sequence[float]) -> tuple[float, float, float]:
    """Raises ValueError where `numbers` are not three, one for each channel."""
    try:
        red, green, blue = (float(number) for number in numbers)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"export_onnx: {name} is {numbers!r}; it needs three numbers, of red, green and blue"
        ) from error
    return red, green, blue
