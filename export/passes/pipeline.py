"""Every pass, in its order."""

from collections.abc import Callable

from export.lowered import LoweredModel
from export.passes.batch_norms import fold_batch_norms
from export.passes.biases import float_biases, quantize_biases
from export.passes.clips import absorb_clips
from export.passes.dead_nodes import cut_weights_off, remove_dead_nodes
from export.passes.linears import gemms_from_classifiers, gemms_from_matmuls
from export.passes.marks import hoist_marks
from export.passes.pools import plain_average_pools, pools_from_means
from export.passes.scales import positive_scales
from export.targets import TARGETS, Target, check_quantizer
from export.ties import avoid_ties


def to_integers(
    model: LoweredModel, target: Target = TARGETS["ort-int8"]
) -> LoweredModel:
    """Run all passes in place and return the canonical model for `target`.

    Raises ExportError naming what cannot run on integers.
    """
    once: list[Callable[[LoweredModel], bool]] = [
        gemms_from_matmuls,
        gemms_from_classifiers,
        fold_batch_norms,
        pools_from_means,
        plain_average_pools,
    ]
    for apply in once:
        apply(model)
    for apply in (hoist_marks, absorb_clips, hoist_marks):
        while apply(model):
            pass
    cut_weights_off(model)
    remove_dead_nodes(model)
    model.exact_norms = target.native
    for quantizer in model.quantizers.values():
        check_quantizer(target, quantizer)
    avoid_ties(model, may_move=not target.keeps_scales)
    quantize_biases(model, target)
    if target.qdq:
        # Quantized all the same: what 32 bits cannot hold is refused for every target
        float_biases(model)
        positive_scales(model, target)
    return model
