"""One file from several quantized nets (EoQ, arXiv 2410.06020): members side by side on one input, their answers averaged.

    probabilities   logits = log(mean_i softmax(logits_i)), so that softmax(logits) is the mean probability
    logits          logits = mean_i logits_i, as ensembles of averages are usually written

Member i's nodes, tensors and layers carry the prefix `m<i>/`; nothing else about them changes, so that each can be taken out
again (`split_members`) and proven on its own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    metadata = []
    for member, name in zip(members, names, strict=True):
        metadata.append(read_metadata(member, name))
        _require_same(metadata[0], metadata[-1], f"{names[0]} and {name}")
    first = members[0].graph
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    outputs = []
    for index, member in enumerate(members):
        prefix = _prefix(index)
        own_nodes, own_tensors = _renamed(member.graph, prefix, first)
        nodes += own_nodes
        tensors += own_tensors
        outputs.append(prefix + member.graph.output[0].name)
    nodes += _averaging(outputs, first.output[0].name, average)
    graph = helper.make_graph(
        nodes,
        "edgeqat-ensemble",
        list(first.input),
        list(first.output),
        tensors,
    )
    merged = _model_like(members[0], graph)
    write_metadata(merged, _joined(metadata, names, average))
    return merged


def _prefix(index: int) -> str:
    """What the names of a member's nodes, tensors and layers begin with in the ensemble's file."""
    return f"m{index}/"


def _require_same(
    first: Mapping[str, Any], other: Mapping[str, Any], pair: str
) -> None:
    """Raises ExportError where the metadata of two members differ in what they must agree on."""
    for key in SAME:
        if other[key] != first[key]:
            raise ExportError(
                f"{pair} differ in {key}; the members of an ensemble must agree on it"
            )


def _model_like(model: onnx.ModelProto, graph: onnx.GraphProto) -> onnx.ModelProto:
    """`graph` with the operator sets of `model`."""
    return helper.make_model(
        graph,
        opset_imports=list(model.opset_import),
        ir_version=model.ir_version,
        producer_name="edgeqat",
    )


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
        codes = "the codes they compute alone"
        if self.different:
            counts = [f"{name} {count}" for name, count in self.different.items()]
            codes = f"other codes: {printable('; '.join(counts))}"
        verdict = "ok" if self.passed else "FAILED"
        return f"together   {self.members} members compute {codes}; averaged logits within {self.logits:.1e}  [{verdict}]"


def check_joined(
    proto: onnx.ModelProto,
    members: Sequence[onnx.ModelProto],
    images: NDArray[np.float32],
) -> JoinedCheck:
    """Run the ensemble and its `members` on `images` (N_3_H_W), all quantizers' codes visible."""
    metadata = read_metadata(proto, "the ensemble")
    together = _run_with_codes(proto, images)
    different: dict[str, int] = {}
    logits = []
    for index, member in enumerate(members):
        alone = _run_with_codes(member, images)
        wrong = 0
        for tensor in quantizer_tensors(member):
            in_ensemble = together[_prefix(index) + tensor]
            wrong += int((alone[tensor] != in_ensemble).sum())
        if wrong:
            different[metadata["members"][index]] = wrong
        logits.append(_logits(member, alone))
    expected = averaged(np.stack(logits), metadata["average"])
    difference = np.abs(expected - _logits(proto, together))
    return JoinedCheck(different, float(difference.max()), len(members))


def _run_with_codes(
    proto: onnx.ModelProto, images: NDArray[np.float32]
) -> dict[str, NDArray[np.generic]]:
    """The outputs of a file, and the codes of all its quantizers."""
    instrumented = session.with_outputs(proto, quantizer_tensors(proto))
    return session.load(instrumented).run(images)


def _logits(
    proto: onnx.ModelProto, outputs: Mapping[str, NDArray[np.generic]]
) -> NDArray[np.float64]:
    return np.asarray(outputs[proto.graph.output[0].name], np.float64)


def averaged(logits: NDArray[np.float64], average: Average) -> NDArray[np.float64]:
    """Members' logits M_N_K -> the ensemble's N_K."""
    if average == "logits":
        return logits.mean(0)
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = exponentials / exponentials.sum(-1, keepdims=True)
    return np.log(probabilities.mean(0))


def _averaging(
    outputs: list[str], result: str, average: Average
) -> list[onnx.NodeProto]:
    if average == "logits":
        return [helper.make_node("Mean", outputs, [result])]
    nodes = []
    probabilities = []
    for index, logits in enumerate(outputs):
        share = f"share{index}"
        nodes.append(helper.make_node("Softmax", [logits], [share], axis=-1))
        probabilities.append(share)
    nodes.append(helper.make_node("Mean", probabilities, ["mean"]))
    nodes.append(helper.make_node("Log", ["mean"], [result]))
    return nodes


def _renamed(
    graph: onnx.GraphProto, prefix: str, first: onnx.GraphProto
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes and initialisers with every name prefixed, but the input, which is the first member's."""
    own_input = graph.input[0].name
    shared_input = first.input[0].name

    def renamed(name: str) -> str:
        return shared_input if name == own_input else prefix + name

    return _copies(graph.node, graph.initializer, renamed)


def _copies(
    nodes: Iterable[onnx.NodeProto],
    tensors: Iterable[onnx.TensorProto],
    rename: Callable[[str], str],
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Copies with every name that is not empty (an absent operand, an unnamed node) put through `rename`."""

    def renamed(name: str) -> str:
        return rename(name) if name else name

    node_copies = []
    for node in nodes:
        node_copy = onnx.NodeProto()
        node_copy.CopyFrom(node)
        if node.name:
            node_copy.name = renamed(node.name)
        node_copy.input[:] = map(renamed, node.input)
        node_copy.output[:] = map(renamed, node.output)
        node_copies.append(node_copy)
    tensor_copies = []
    for tensor in tensors:
        tensor_copy = onnx.TensorProto()
        tensor_copy.CopyFrom(tensor)
        tensor_copy.name = renamed(tensor.name)
        tensor_copies.append(tensor_copy)
    return node_copies, tensor_copies


def _joined(
    metadata: Sequence[dict[str, Any]], names: Sequence[str], average: Average
) -> dict[str, Any]:
    """The ensemble's metadata, from those of its members; `names` are for people."""
    layers = []
    moved = {}
    for index, of_member in enumerate(metadata):
        prefix = _prefix(index)
        for entry in of_member["layers"]:
            layers.append(entry | {"name": prefix + entry["name"]})
        for quantizer, ppm in of_member.get(MOVED, {}).items():
            moved[prefix + quantizer] = ppm
    return metadata[0] | {
        "layers": layers,
        MOVED: moved,
        "members": list(names),
        "average": average,
    }


def _member(
    proto: onnx.ModelProto, metadata: dict[str, Any], index: int
) -> onnx.ModelProto:
    """The file of one member, as it was before it was merged."""
    prefix = _prefix(index)
    graph = proto.graph
    own_nodes = [node for node in graph.node if node.output[0].startswith(prefix)]
    own_tensors = [one for one in graph.initializer if one.name.startswith(prefix)]
    nodes, tensors = _copies(
        own_nodes, own_tensors, lambda name: name.removeprefix(prefix)
    )
    inputs = list(graph.input)
    alone = helper.make_graph(nodes, "edgeqat", inputs, [graph.output[0]], tensors)
    member = _model_like(proto, alone)
    write_metadata(member, _metadata_of_member(metadata, prefix))
    return member


def _metadata_of_member(metadata: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What the member with this prefix said of itself."""
    layers = []
    for entry in metadata["layers"]:
        if entry["name"].startswith(prefix):
            layers.append(entry | {"name": entry["name"].removeprefix(prefix)})
    moved = {}
    for quantizer, ppm in metadata.get(MOVED, {}).items():
        if quantizer.startswith(prefix):
            moved[quantizer.removeprefix(prefix)] = ppm
    own = {**metadata, "layers": layers, MOVED: moved}
    del own["members"], own["average"]
    return own
