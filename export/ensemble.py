"""One file from several quantized nets (EoQ, arXiv 2410.06020): members side by side on one input, their answers averaged.

    probabilities   logits = log(mean_i softmax(logits_i)), so that softmax(logits) is the mean probability
    logits          logits = mean_i logits_i, as ensembles of averages are usually written

Member i's nodes, tensors and layers carry the prefix `m<i>/`; nothing else about them changes, so that each can be taken out
again (`split_members`) and proven on its own.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from edgeqat.terminal import printable
from export import session
from export.lowered import ExportError
from export.metadata import MOVED, read_metadata, write_metadata
from export.runtime_checks import quantizer_tensors

Average = Literal["probabilities", "logits"]
AVERAGES: tuple[Average, ...] = get_args(Average)
SAME = ("target", "storage", "runtime", "session_options", "input")


def merge_members(
    members: Sequence[onnx.ModelProto],
    names: Sequence[str],
    average: Average = "probabilities",
) -> onnx.ModelProto:
    """One signed file of signed `members`, which `names` names for people.

    Raises ExportError when there are fewer than two, or naming two that differ in target or preprocessing.
    """
    if len(members) < 2:
        raise ExportError("an ensemble needs at least two members")
    if average not in AVERAGES:
        raise ExportError(
            f"average {average!r}: unknown; there are {', '.join(AVERAGES)}"
        )
    metadata = [
        read_metadata(member, name) for member, name in zip(members, names, strict=True)
    ]
    for found, name in zip(metadata[1:], names[1:], strict=True):
        for key in SAME:
            if found[key] != metadata[0][key]:
                raise ExportError(
                    f"{names[0]} and {name} differ in {key}; the members of an ensemble must agree on it"
                )
    first = members[0].graph
    renamed = [
        _renamed(member.graph, f"m{i}/", first) for i, member in enumerate(members)
    ]
    outputs = [
        f"m{i}/{member.graph.output[0].name}" for i, member in enumerate(members)
    ]
    graph = helper.make_graph(
        [node for nodes, _ in renamed for node in nodes]
        + _averaging(outputs, first.output[0].name, average),
        "edgeqat-ensemble",
        list(first.input),
        list(first.output),
        [t for _, tensors in renamed for t in tensors],
    )
    merged = helper.make_model(
        graph,
        opset_imports=list(members[0].opset_import),
        ir_version=members[0].ir_version,
        producer_name="edgeqat",
    )
    write_metadata(merged, _joined(metadata, names, average))
    return merged


def split_members(proto: onnx.ModelProto, name: str) -> list[onnx.ModelProto]:
    """The members of the ensemble file `name`, each a file as it was before. Raises ExportError for any other file."""
    metadata = read_metadata(proto, name)
    if "members" not in metadata:
        raise ExportError(
            f"{name}: is not an ensemble; certify it with the one run that it came from"
        )
    return [_member(proto, metadata, i) for i in range(len(metadata["members"]))]


@dataclass(frozen=True)
class JoinedCheck:
    """Whether the merged file computes what its members compute alone.

    different: member -> wrong quantizer codes; logits: largest difference between the file's logits and the average of its
    members' computed here in float64.
    """

    different: dict[str, int]
    logits: float
    members: int

    @property
    def passed(self) -> bool:
        """Whether members' codes are theirs alone and the joined logits are the mean's."""
        # float32 softmax, mean and logarithm: a few units in the last place of logits below 100
        return not self.different and self.logits <= 1e-4

    def __str__(self) -> str:
        wrong = printable(
            "; ".join(f"{name} {count}" for name, count in self.different.items())
        )
        codes = f"other codes: {wrong}" if wrong else "the codes they compute alone"
        verdict = "ok" if self.passed else "FAILED"
        return f"together   {self.members} members compute {codes}; averaged logits within {self.logits:.1e}  [{verdict}]"


def check_joined(
    proto: onnx.ModelProto,
    members: Sequence[onnx.ModelProto],
    images: NDArray[np.float32],
) -> JoinedCheck:
    """Run the ensemble and its `members` on `images` (N_3_H_W), all quantizers' codes visible."""
    metadata = read_metadata(proto, "the ensemble")
    together = session.load(session.with_outputs(proto, quantizer_tensors(proto))).run(
        images
    )
    different, logits = {}, []
    for i, member in enumerate(members):
        names = quantizer_tensors(member)
        alone = session.load(session.with_outputs(member, names)).run(images)
        wrong = sum(int((alone[n] != together[f"m{i}/{n}"]).sum()) for n in names)
        if wrong:
            different[metadata["members"][i]] = wrong
        logits.append(np.asarray(alone[member.graph.output[0].name], np.float64))
    expected = averaged(np.stack(logits), metadata["average"])
    return JoinedCheck(
        different,
        float(
            np.abs(
                expected - np.asarray(together[proto.graph.output[0].name], np.float64)
            ).max()
        ),
        len(members),
    )


def averaged(logits: NDArray[np.float64], average: Average) -> NDArray[np.float64]:
    """Members' logits M_N_K -> the ensemble's N_K."""
    if average == "logits":
        return logits.mean(0)
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return np.log((shifted / shifted.sum(-1, keepdims=True)).mean(0))


def _averaging(
    outputs: list[str], result: str, average: Average
) -> list[onnx.NodeProto]:
    if average == "logits":
        return [helper.make_node("Mean", outputs, [result])]
    shares = [f"share{i}" for i in range(len(outputs))]
    return [
        *(
            helper.make_node("Softmax", [name], [share], axis=-1)
            for name, share in zip(outputs, shares, strict=True)
        ),
        helper.make_node("Mean", shares, ["mean"]),
        helper.make_node("Log", ["mean"], [result]),
    ]


def _renamed(
    graph: onnx.GraphProto, prefix: str, first: onnx.GraphProto
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes and initialisers with every name prefixed, but the input, which is the first member's."""
    source = {graph.input[0].name: first.input[0].name}
    return _copies(
        graph.node, graph.initializer, lambda value: source.get(value, prefix + value)
    )


def _copies(
    nodes: Iterable[onnx.NodeProto],
    tensors: Iterable[onnx.TensorProto],
    name: Callable[[str], str],
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Copies with every name that is not empty (an absent operand, an unnamed node) put through `name`."""
    copied, kept = [], []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        if node.name:
            copy.name = name(node.name)
        copy.input[:] = [name(v) if v else v for v in node.input]
        copy.output[:] = [name(v) if v else v for v in node.output]
        copied.append(copy)
    for tensor in tensors:
        renamed = onnx.TensorProto()
        renamed.CopyFrom(tensor)
        renamed.name = name(tensor.name)
        kept.append(renamed)
    return copied, kept


def _joined(
    metadata: Sequence[dict[str, Any]], names: Sequence[str], average: Average
) -> dict[str, Any]:
    layers = [
        entry | {"name": f"m{i}/{entry['name']}"}
        for i, m in enumerate(metadata)
        for entry in m["layers"]
    ]
    moved = {
        f"m{i}/{name}": ppm
        for i, m in enumerate(metadata)
        for name, ppm in m.get(MOVED, {}).items()
    }
    joined = {
        "layers": layers,
        MOVED: moved,
        "members": list(names),
        "average": average,
    }
    return metadata[0] | joined


def _member(
    proto: onnx.ModelProto, metadata: dict[str, Any], index: int
) -> onnx.ModelProto:
    prefix = f"m{index}/"
    result = proto.graph.output[0]
    nodes, tensors = _copies(
        [node for node in proto.graph.node if node.output[0].startswith(prefix)],
        [
            tensor
            for tensor in proto.graph.initializer
            if tensor.name.startswith(prefix)
        ],
        lambda name: name.removeprefix(prefix),
    )
    graph = helper.make_graph(
        nodes, "edgeqat", list(proto.graph.input), [result], tensors
    )
    member = helper.make_model(
        graph,
        opset_imports=list(proto.opset_import),
        ir_version=proto.ir_version,
        producer_name="edgeqat",
    )
    layers = [
        entry | {"name": entry["name"].removeprefix(prefix)}
        for entry in metadata["layers"]
        if entry["name"].startswith(prefix)
    ]
    moved = {
        name.removeprefix(prefix): ppm
        for name, ppm in metadata.get(MOVED, {}).items()
        if name.startswith(prefix)
    }
    alone = {
        key: value
        for key, value in metadata.items()
        if key not in ("members", "average")
    }
    write_metadata(member, alone | {"layers": layers, MOVED: moved})
    return member
