"""Where the time of a file goes: node by node, as ONNX Runtime's own profile has it.

A node is told apart by the types of what it reads and writes:

    codes     it computes on codes, or reads codes and writes floats (a classifier's logits)
    convert   it quantizes or dequantizes
    layout    it only moves numbers: Transpose, Reshape, Slice, ...
    float     it computes in floating point

A *float island* is a stretch of nodes, between two that compute on codes, that holds a `float` or `convert` one; the layout
changes in it belong to it. Stretches are taken in the order in which the runtime runs the nodes, so that two branches which
it runs by turns are cut into more islands than the graph has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter, itemgetter

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeqat.terminal import printable
from export import session
from export.lowered import DOMAIN

CODES, CONVERT, LAYOUT, FLOAT = "codes", "convert", "layout", "float"
KINDS = (CODES, LAYOUT, CONVERT, FLOAT)
CODE_TYPES = {"uint8", "int8"}
FLOAT_TYPES = {"float", "float16", "double"}
CONVERTERS = {"QuantizeLinear", "DequantizeLinear", "QImage"}
MOVERS = {
    "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "Pad", "ReorderInput", "ReorderOutput", "Reshape",
    "QTranspose", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
}  # fmt: skip
# Functions of one tensor
FUNCTIONS = {
    "BiasGelu", "Celu", "Elu", "Erf", "Exp", "FastGelu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu",
    "QuickGelu", "Selu", "Sigmoid", "Softplus", "Sqrt", "Tanh",
}  # fmt: skip
POOLS = {"AveragePool", "GlobalAveragePool", "ReduceMean"}
ELEMENTWISE = {"Abs", "Add", "Clip", "Div", "Mul", "Neg", "Relu", "Sub"}
LAYERS = {
    "Conv",
    "ConvTranspose",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "Gemm",
    "MatMul",
}
NORMS = {
    "BatchNormalization", "GroupNorm", "GroupNormalization", "InstanceNormalization", "LayerNormalization",
    "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
}  # fmt: skip
MOST_SHOWN = 12


@dataclass(frozen=True)
class NodeTime:
    """One node: its kind (`KINDS`), and the median of its milliseconds over the runs."""

    name: str
    operator: str
    kind: str
    milliseconds: float


@dataclass(frozen=True)
class Island:
    """Nodes between two that compute on codes, which are `after` and `before` (empty at the file's ends)."""

    after: str
    before: str
    operators: tuple[str, ...]
    milliseconds: float
    cure: str


@dataclass(frozen=True)
class Profile:
    """The nodes of one file in the order of their runs, and its float islands, the slowest first."""

    name: str
    nodes: tuple[NodeTime, ...]
    islands: tuple[Island, ...]

    @property
    def milliseconds(self) -> float:
        """Of all nodes; the runtime's own time between them is not in it."""
        return sum(node.milliseconds for node in self.nodes)

    def share(self, kind: str) -> float:
        """Part of the time that nodes of `kind` take, 0 to 1."""
        spent = sum(node.milliseconds for node in self.nodes if node.kind == kind)
        return spent / self.milliseconds if self.milliseconds else 0.0

    def to_json(self) -> dict[str, object]:
        """The same as plain data, for a JSON file."""
        shares = {kind: self.share(kind) for kind in KINDS}
        return asdict(self) | {"milliseconds": self.milliseconds, "shares": shares}

    def __str__(self) -> str:
        shares = ", ".join(f"{kind} {self.share(kind):.1%}" for kind in KINDS)
        lines = [
            f"{printable(self.name)}: {self.milliseconds:.2f} ms in nodes: {shares}"
        ]
        lines.append(
            f"  {'operator':<24} {'kind':<8} {'nodes':>5} {'ms':>9} {'share':>7}"
        )
        for operator, kind, count, spent in _by_operator(self.nodes):
            share = self._percent(spent)
            lines.append(
                f"  {printable(operator):<24} {kind:<8} {count:>5} {spent:>9.3f} {share}"
            )
        lines.append("  slowest nodes")
        slowest = sorted(self.nodes, key=attrgetter("milliseconds"), reverse=True)
        for node in slowest[:MOST_SHOWN]:
            share = self._percent(node.milliseconds)
            lines.append(
                f"  {printable(node.operator):<24} {node.kind:<8} {'':>5} {node.milliseconds:>9.3f} {share}  "
                f"{printable(node.name)}"
            )
        return "\n".join([*lines, *self._island_lines()])

    def _percent(self, milliseconds: float) -> str:
        share = milliseconds / self.milliseconds if self.milliseconds else 0.0
        return f"{share:>7.1%}"

    def _island_lines(self) -> list[str]:
        """The slowest float islands, and for all islands together what would remove how much."""
        if not self.islands:
            return ["  no float islands"]
        total = sum(island.milliseconds for island in self.islands)
        lines = [
            f"  {len(self.islands)} float islands, {self._percent(total).strip()} of the time"
        ]
        for island in self.islands[:MOST_SHOWN]:
            place = f"{island.after or 'input'} .. {island.before or 'output'}"
            operators = ", ".join(island.operators)
            lines.append(
                f"  {self._percent(island.milliseconds)}  {printable(place)}: {printable(operators)}"
            )
        by_cure: dict[str, float] = {}
        for island in self.islands:
            by_cure[island.cure] = by_cure.get(island.cure, 0.0) + island.milliseconds
        for cure, spent in sorted(by_cure.items(), key=itemgetter(1), reverse=True):
            lines.append(f"  {self._percent(spent)}  {cure}")
        return lines


def profile(
    files: Mapping[str, onnx.ModelProto],
    images: NDArray[np.float32],
    *,
    threads: int = 1,
    rounds: int = 10,
) -> list[Profile]:
    """Profiles of `files`, by name, on one batch of `images`. Raises ExportError for a file that cannot run."""
    profiles = []
    for name, proto in files.items():
        nodes = _nodes(session.timed(proto, images, threads, rounds))
        islands = islands_of(nodes, native=_has_our_operators(proto))
        profiles.append(Profile(name, tuple(nodes), tuple(islands)))
    return profiles


def _has_our_operators(proto: onnx.ModelProto) -> bool:
    return any(node.domain == DOMAIN for node in proto.graph.node)


def kind_of(operator: str, reads: Sequence[str], writes: Sequence[str]) -> str:
    """The kind of a node from its operator and the element types that it reads and writes."""
    if operator in CONVERTERS:
        return CONVERT
    if operator in MOVERS:
        return LAYOUT
    # What comes first is what is computed on; the rest are weights, scales and tables
    on_codes = bool(reads) and reads[0] in CODE_TYPES
    if on_codes or CODE_TYPES.intersection(writes):
        return CODES
    if FLOAT_TYPES.intersection(writes):
        return FLOAT
    return LAYOUT  # shapes and indices


def _nodes(runs: Sequence[Sequence[session.Timed]]) -> list[NodeTime]:
    """One entry per node, its time the median over the runs."""
    nodes = []
    for same in zip(*runs, strict=True):
        first = same[0]
        kind = kind_of(first.operator, first.reads, first.writes)
        taken = np.median([run.microseconds for run in same])
        nodes.append(NodeTime(first.node, first.operator, kind, float(taken) / 1e3))
    return nodes


def islands_of(nodes: Sequence[NodeTime], *, native: bool) -> list[Island]:
    """The float islands of a file, the slowest first."""
    islands: list[Island] = []
    stretch: list[NodeTime] = []
    after = ""
    for node in [*nodes, None]:
        if node is not None and node.kind != CODES:
            stretch.append(node)
            continue
        before = "" if node is None else node.name
        is_island = any(one.kind in (FLOAT, CONVERT) for one in stretch)
        if is_island:
            islands.append(_island(after, before, stretch, native))
        stretch = []
        after = before
    return sorted(islands, key=attrgetter("milliseconds"), reverse=True)


def _island(
    after: str, before: str, stretch: Sequence[NodeTime], native: bool
) -> Island:
    operators = tuple(dict.fromkeys(node.operator for node in stretch))
    spent = sum(node.milliseconds for node in stretch)
    at_an_end = not after or not before
    return Island(
        after, before, operators, spent, cure_of(operators, native, at_an_end)
    )


def cure_of(operators: Sequence[str], native: bool, at_an_end: bool) -> str:
    """Which rule or target would remove an island of these operators.

    native: whether the file is one of `ort-native` already. at_an_end: whether the island begins or ends the file.
    """
    computing = set(operators) - CONVERTERS - MOVERS
    if computing & LAYERS:
        return "a layer in floating point: a rule that gives its weight and input bits puts it on codes"
    if "Softmax" in computing:
        return "softmax: --target ort-native writes its codes in one node, where it is over the last axis"
    if computing & NORMS:
        return "norms: --target ort-native computes layer norms over the last axis on codes"
    if not computing and at_an_end:
        return "codes of the input or results of the output: needed"
    if native:
        return "stays in floating point between two quantizers: no target computes it on codes"
    if computing and computing <= FUNCTIONS | ELEMENTWISE | POOLS:
        return "functions and pools between two quantizers: --target ort-native computes them on codes"
    return "operations in floating point between two quantizers"


def _by_operator(nodes: Sequence[NodeTime]) -> list[tuple[str, str, int, float]]:
    """(operator, kind, how many, milliseconds), the slowest first."""
    counts: dict[tuple[str, str], int] = {}
    spent: dict[tuple[str, str], float] = {}
    for node in nodes:
        key = node.operator, node.kind
        counts[key] = counts.get(key, 0) + 1
        spent[key] = spent.get(key, 0.0) + node.milliseconds
    rows = [(*key, counts[key], taken) for key, taken in spent.items()]
    return sorted(rows, key=itemgetter(-1), reverse=True)
