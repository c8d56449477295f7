"""What `quantize_` did, with every multiplication of the model accounted for."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from qat.quantizers.spec import QuantSpec
from qat.surgery.decide import QuantizationPlan
from qat.surgery.explain import Explanation
from qat.surgery.observe import Observation
from qat.surgery.plan import is_merge
from qat.surgery.trace import MULTIPLIES


@dataclass(frozen=True)
class LayerRow:
    """One conv or linear: its specs (None: float), multiply-accumulates per sample, and weights.

    kind: "conv" or "linear"; "constant" for one that only ever sees what does not depend on the image, and "idle" for one
    that the example's pass does not run: neither is quantized, neither costs time in the file.
    """

    name: str
    kind: str
    weight: QuantSpec | None
    input: QuantSpec | None
    reads_stream: bool
    macs: int
    weights: int


@dataclass(frozen=True)
class OperationRow:
    """An operation without weights of its own: multiplications per sample."""

    address: str
    kind: str
    multiplications: int


@dataclass(frozen=True)
class QuantizationTable:
    """What `quantize_` did.

    rows:     every conv and linear.
    points:   addresses of the 8-bit stream quantizers.
    products: products of two quantized activations: attention's, and gates.
    in_float: operations that multiply in floating point: softmax, norms, GELU, the inside of gates, tables of positions.
    witnessed: multiply-adds of one image that depend on it, as PyTorch's dispatcher counts them; all are in the rows.
    """

    rows: tuple[LayerRow, ...]
    points: tuple[str, ...]
    products: tuple[OperationRow, ...] = ()
    in_float: tuple[OperationRow, ...] = ()
    witnessed: int = 0
    explanation: Explanation | None = field(default=None, repr=False, compare=False)

    def explain(self, name: str) -> str:
        """Why a layer, an operation or a quantizer is as it is; see `Explanation.of`."""
        if self.explanation is None:
            raise ValueError(
                "this table was not made by quantize_, so it explains nothing"
            )
        return self.explanation.of(name)

    @property
    def multiplications(self) -> int:
        """All of one sample."""
        count = sum(row.macs for row in self.rows)
        for operation in (*self.products, *self.in_float):
            count += operation.multiplications
        return count

    @property
    def float_share(self) -> float:
        """Share of the multiplications that stay in floating point, layers under a FLOAT rule included."""
        count = sum(row.macs for row in self.rows if row.weight is None)
        count += sum(operation.multiplications for operation in self.in_float)
        return count / max(self.multiplications, 1)

    @property
    def quantized_share(self) -> float:
        """Share of the layers' MACs that are of quantized layers."""
        all_macs = sum(row.macs for row in self.rows)
        quantized = sum(row.macs for row in self.rows if row.weight is not None)
        return quantized / max(all_macs, 1)

    def __str__(self) -> str:
        width = max((len(r.name) for r in self.rows), default=5)
        lines = [
            f"{'layer':<{width}}  {'kind':<8} {'weight':>9} {'input':>7} {'MACs':>12} {'weights':>10}"
        ]
        for row in self.rows:
            source = "stream" if row.reads_stream else str(row.input or "float")
            weight = str(row.weight or "float")
            lines.append(
                f"{row.name:<{width}}  {row.kind:<8} {weight:>9} {source:>7} {row.macs:>12,} {row.weights:>10,}"
            )
        lines.append(
            f"{len(self.rows)} layers, {self.quantized_share:.1%} of the MACs quantized; {len(self.points)} stream "
            "quantizers of 8 bits"
        )
        if self.products:
            lines.append(
                f"products of activations, quantized: {_by_kind(self.products, self.multiplications)}"
            )
        if self.in_float:
            lines.append(
                f"in floating point: {_by_kind(self.in_float, self.multiplications)}"
            )
        lines.append(
            f"{self.multiplications:,} multiplications an image, {self.float_share:.2%} in floating point"
        )
        lines.append(
            f"{self.witnessed:,} multiply-adds an image seen by PyTorch's dispatcher, none outside these rows"
        )
        return "\n".join(lines)


def table_of(
    seen: Observation, plan: QuantizationPlan, quantized: Mapping[str, nn.Module]
) -> QuantizationTable:
    """What was done to an observed model by a plan that gave these quantized layers."""
    rows = []
    for name in plan.specs:
        if name in seen.layers or name in seen.calls:
            rows.append(_row(name, seen, plan, quantized))
    products, in_float = _operations(seen, plan)
    return QuantizationTable(
        rows=tuple(rows),
        points=plan.placement.points,
        products=products,
        in_float=in_float,
        witnessed=sum(seen.witnessed.values()) // seen.samples,
        explanation=Explanation(seen, plan),
    )


def _row(
    name: str,
    seen: Observation,
    plan: QuantizationPlan,
    quantized: Mapping[str, nn.Module],
) -> LayerRow:
    spec = plan.specs[name]
    calls = seen.calls.get(name) or seen.unquantizable.get(name, [])
    is_linear = isinstance(seen.layers.get(name), nn.Linear)
    if calls:
        is_linear = calls[0].kind == "linear"
    reads_stream = False
    if name in quantized:
        reads_stream = getattr(quantized[name], "input_quantizer", None) is None
    weights = 0
    if name in seen.layers:
        weights = math.prod(seen.layers[name].weight.shape)  # type: ignore[arg-type]
    return LayerRow(
        name=name,
        kind=seen.asleep.get(name, "linear" if is_linear else "conv"),
        weight=spec.weight,
        input=spec.input,
        reads_stream=reads_stream,
        macs=sum(call.multiplications for call in calls) // seen.samples,
        weights=weights,
    )


def _operations(
    seen: Observation, plan: QuantizationPlan
) -> tuple[tuple[OperationRow, ...], tuple[OperationRow, ...]]:
    """Products of activations that run on integers, and what multiplies in floating point."""
    products: list[OperationRow] = []
    in_float: list[OperationRow] = []
    placement = plan.placement
    counted = set(placement.absorbed)
    for calls in seen.unquantizable.values():
        counted.update(call.address for call in calls)
    for call in seen.trace.calls:
        multiplications = call.multiplications // seen.samples
        is_layer = call.kind in MULTIPLIES
        if not multiplications or is_layer or call.address in counted:
            continue
        row = OperationRow(call.address, call.kind, multiplications)
        if is_merge(call) and placement.points:
            products.append(row)
        else:
            in_float.append(row)
    for name, calls in seen.unquantizable.items():
        if name not in seen.layers:
            first = calls[0]
            multiply_adds = _witnessed_in(name, first.path, seen)
            row = OperationRow(name, first.kind, multiply_adds // seen.samples)
            in_float.append(row)
    return tuple(products), tuple(in_float)


def _witnessed_in(name: str, path: str, seen: Observation) -> int:
    """Multiply-adds of a module and all in it; of an operation that the model makes itself, its own."""
    if name != path:
        return sum(call.multiplications for call in seen.unquantizable[name])
    count = 0
    for where, multiply_adds in seen.witnessed.items():
        if f"{where}.".startswith(f"{path}."):
            count += multiply_adds
    return count


def _by_kind(rows: tuple[OperationRow, ...], total: int) -> str:
    """Number of operations and share of all multiplications, kind by kind, the largest first."""
    counts = Counter[str]()
    multiplications = Counter[str]()
    for row in rows:
        counts[row.kind] += 1
        multiplications[row.kind] += row.multiplications
    parts = []
    for kind, count in multiplications.most_common():
        parts.append(f"{counts[kind]} {kind} {count / total:.2%}")
    return ", ".join(parts)
