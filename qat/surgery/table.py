"""What `quantize_` did, with every multiplication of the model accounted for."""

from collections import Counter
from dataclasses import dataclass

from qat.quantizers.spec import QuantSpec


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
    sites:    addresses of the 8-bit stream quantizers.
    products: products of two quantized activations: attention's, and gates.
    in_float: operations that multiply in floating point: softmax, norms, GELU, the inside of gates, tables of positions.
    witnessed: multiply-adds of one image that depend on it, as PyTorch's dispatcher counts them; all are in the rows.
    """

    rows: tuple[LayerRow, ...]
    sites: tuple[str, ...]
    products: tuple[OperationRow, ...] = ()
    in_float: tuple[OperationRow, ...] = ()
    witnessed: int = 0

    @property
    def multiplications(self) -> int:
        """All of one sample."""
        return sum(r.macs for r in self.rows) + sum(r.multiplications for r in (*self.products, *self.in_float))

    @property
    def float_share(self) -> float:
        """Share of the multiplications that stay in floating point, layers under a FLOAT rule included."""
        layers = sum(r.macs for r in self.rows if r.weight is None)
        return (layers + sum(r.multiplications for r in self.in_float)) / max(self.multiplications, 1)

    def __str__(self) -> str:
        width = max((len(r.name) for r in self.rows), default=5)
        lines = [f"{'layer':<{width}}  {'kind':<8} {'weight':>9} {'input':>7} {'MACs':>12} {'weights':>10}"]
        for row in self.rows:
            source = "stream" if row.reads_stream else str(row.input or "float")
            weight = str(row.weight or "float")
            lines.append(
                f"{row.name:<{width}}  {row.kind:<8} {weight:>9} {source:>7} {row.macs:>12,} {row.weights:>10,}"
            )
        low = sum(r.macs for r in self.rows if r.weight is not None) / max(sum(r.macs for r in self.rows), 1)
        lines.append(
            f"{len(self.rows)} layers, {low:.1%} of the MACs quantized; {len(self.sites)} stream quantizers of 8 bits"
        )
        if self.products:
            lines.append(f"products of activations, quantized: {_by_kind(self.products, self.multiplications)}")
        if self.in_float:
            lines.append(f"in floating point: {_by_kind(self.in_float, self.multiplications)}")
        lines.append(f"{self.multiplications:,} multiplications an image, {self.float_share:.2%} in floating point")
        lines.append(f"{self.witnessed:,} multiply-adds an image seen by PyTorch's dispatcher, none outside these rows")
        return "\n".join(lines)


def _by_kind(rows: tuple[OperationRow, ...], total: int) -> str:
    """Number of operations and share of all multiplications, kind by kind, the largest first."""
    counts = Counter(row.kind for row in rows)
    shares = Counter[str]()
    for row in rows:
        shares[row.kind] += row.multiplications
    return ", ".join(f"{counts[kind]} {kind} {share / total:.2%}" for kind, share in shares.most_common())
