"""Constant folding and rewriting of a fresh export, in time that grows with the graph and not with its square.

These are the passes that torch.onnx runs itself, less one rule: its search for two slices that make a split looks, at every
node, at every other node of the graph, which was half of the time to export a large transformer. Two slices stay two slices.
"""

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewritePass, RewriteRule
from onnxscript.rewriter.rules import common

ROUNDS = 2  # of folding and rewriting: a rewritten node may be a constant
RULES: tuple[RewriteRule, ...] = (
    *common.mul_by_1_rule.commute(),
    *common.add_0_rule.commute(),
    common.sub_0_rule,
    common.div_by_1_rule,
    common.dropout_zero_rule,
    common.dropout_inference_rule,
    common.two_reshapes_matmul_reshape_rule,
    common.one_reshape_matmul_reshape_rule,
    common.cast_constant_of_shape_rule,
    common.cast_constant_of_shape_without_value_rule,
    common.collapse_slice_rule,
    common.collapse_slice2_rule,
    common.materialize_reshape_shape_rule,
    common.min_min_rule,
    common.max_max_rule,
    common.min_max_rule,
    common.max_min_rule,
    common.successive_clip_relu_rule,
    common.successive_relu_clip_rule,
    common.successive_relu_rule,
    common.successive_clip_rule,
    common.cast_cast_rule,
    common.no_op_cast_rule,
    common.no_op_expand_rule,
    # Before reshapes of reshapes, which take its result
    common.flatten_to_reshape_rule,
    common.reshape_reshape_rule,
    common.no_op_transpose_rule,
    common.transpose_transpose_rule,
    common.unsqueeze_unsqueeze_rule,
    common.squeeze_reshape_1d_rule,
    common.no_op_dynamic_scatter_nd_rule,
    common.no_op_static_scatter_nd_rule,
    common.normalize_pad_format_conv_rule,
    common.fuse_pad_into_conv_rule,
    common.fuse_batchnorm_into_conv_rule,
    common.fuse_batchnorm_into_conv_transpose_rule,
    common.fuse_batchnorm_into_gemm_rule,
    common.remove_optional_bias_from_conv_rule,
    common.remove_optional_bias_from_conv_transpose_rule,
    common.remove_optional_bias_from_gemm_rule,
)


def simplify(model: ir.Model) -> None:
    """Fold constants, apply `RULES` and remove what nobody reads, in place."""
    passes.InlinePass()(model)
    rewrite = RewritePass(RULES)
    for _ in range(ROUNDS):
        folded = fold_constants(model, onnx_shape_inference=True).modified
        rewritten = rewrite(model).modified
        _register_constants(model.graph)
        passes.RemoveUnusedNodesPass()(model)
        if not folded and not rewritten:
            break
    passes.RemoveUnusedFunctionsPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.LiftSubgraphInitializersToMainGraphPass()(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.OutputFixPass()(model)
    passes.NameFixPass()(model)


def _register_constants(graph: ir.Graph) -> None:
    """Give the graph the constants that its nodes read and it does not hold: rules that make a clip name its bounds after
    what it clips, so that those of a second clip take the place of the first one's."""
    count = 0
    for node in graph:
        for value in node.inputs:
            if (
                value is None
                or value.const_value is None
                or value.producer() is not None
            ):
                continue
            assert value.name is not None
            if graph.initializers.get(value.name) is value:
                continue
            while value.name in graph.initializers:
                count += 1
                value.name = f"constant_{count}"
            graph.register_initializer(value)
