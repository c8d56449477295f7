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
        return sum(r.macs for r in self.rows) + sum(
            r.multiplications for r in (*self.products, *self.in_float)
        )

    @property
    def float_share(self) -> float:
        """Share of the multiplications that stay in floating point, layers under a FLOAT rule included."""
        layers = sum(r.macs for r in self.rows if r.weight is None)
        return (layers + sum(r.multiplications for r in self.in_float)) / max(
            self.multiplications, 1
        )

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
        low = sum(r.macs for r in self.rows if r.weight is not None) / max(
            sum(r.macs for r in self.rows), 1
        )
        lines.append(
            f"{len(self.rows)} layers, {low:.1%} of the MACs quantized; {len(self.points)} stream quantizers of 8 bits"
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
    rows = tuple(
        _row(name, seen, plan, quantized)
        for name in plan.specs
        if name in seen.layers or name in seen.calls
    )
    products, in_float = _operations(seen, plan)
    witnessed = sum(seen.witnessed.values()) // seen.samples
    return QuantizationTable(
        rows,
        plan.placement.points,
        products,
        in_float,
        witnessed,
        Explanation(seen, plan),
    )


def _row(
    name: str,
    seen: Observation,
    plan: QuantizationPlan,
    quantized: Mapping[str, nn.Module],
) -> LayerRow:
    spec, calls = (
        plan.specs[name],
        seen.calls.get(name) or seen.unquantizable.get(name, []),
    )
    linear = (
        calls[0].kind == "linear" if calls else isinstance(seen.layers[name], nn.Linear)
    )
    kind = seen.asleep.get(name, "linear" if linear else "conv")
    reads_stream = (
        name in quantized and getattr(quantized[name], "input_quantizer", None) is None
    )
    weights = math.prod(seen.layers[name].weight.shape) if name in seen.layers else 0  # type: ignore[arg-type]
    macs = sum(call.multiplications for call in calls) // seen.samples
    return LayerRow(name, kind, spec.weight, spec.input, reads_stream, macs, weights)


def _operations(
    seen: Observation, plan: QuantizationPlan
) -> tuple[tuple[OperationRow, ...], tuple[OperationRow, ...]]:
    """Products of activations that run on integers, and what multiplies in floating point."""
    products: list[OperationRow] = []
    in_float: list[OperationRow] = []
    others = {call.address for calls in seen.unquantizable.values() for call in calls}
    for call in seen.trace.calls:
        row = OperationRow(
            call.address, call.kind, call.multiplications // seen.samples
        )
        is_layer = call.kind in MULTIPLIES or call.address in others
        if (
            row.multiplications
            and not is_layer
            and call.address not in plan.placement.absorbed
        ):
            (products if is_merge(call) and plan.placement.points else in_float).append(
                row
            )
    for name, calls in seen.unquantizable.items():
        if name not in seen.layers:
            multiply_adds = _witnessed_in(name, calls[0].path, seen)
            in_float.append(
                OperationRow(name, calls[0].kind, multiply_adds // seen.samples)
            )
    return tuple(products), tuple(in_float)


def _witnessed_in(name: str, path: str, seen: Observation) -> int:
    if name == path:
        return sum(
            count
            for where, count in seen.witnessed.items()
            if f"{where}.".startswith(f"{path}.")
        )
    return sum(call.multiplications for call in seen.unquantizable[name])


def _by_kind(rows: tuple[OperationRow, ...], total: int) -> str:
    """Number of operations and share of all multiplications, kind by kind, the largest first."""
    counts = Counter(row.kind for row in rows)
    shares = Counter[str]()
    for row in rows:
        shares[row.kind] += row.multiplications
    return ", ".join(
        f"{counts[kind]} {kind} {share / total:.2%}"
        for kind, share in shares.most_common()
    )
