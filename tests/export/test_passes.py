"""Each pass on the smallest graph that it changes: before and after, in ONNX's own text, and one that it leaves alone."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from export.lowered import DOMAIN, ExportError, LoweredLayer, LoweredModel, LoweredQuantizer
from export.passes.batch_norms import fold_batch_norms
from export.passes.clips import absorb_clips
from export.passes.dead_nodes import cut_weights_off, remove_dead_nodes
from export.passes.linears import gemms_from_classifiers, gemms_from_matmuls
from export.passes.marks import hoist_marks
from export.passes.pools import plain_average_pools, pools_from_means

IMAGE = "float[N,2,4,4] x"


def graph(text: str) -> ir.Model:
    """text: inputs => outputs <constants> { nodes }."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20, "{DOMAIN}": 1]> g {text}')
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def lowered(text: str, *, layer: str = "", codes: tuple[int, ...] = (2, 2, 1, 1), bits: int = 4) -> LoweredModel:
    """With an activation quantizer "q" of four bits, and a layer of weight codes 1 where one is named."""
    grid = LoweredQuantizer.in_storage("q", 0.5, bits, signed=False)
    layers = {}
    if layer:
        kind = "conv" if len(codes) == 4 else "linear"
        scale = np.full(codes[0], 0.25, np.float32)
        layers[f"{layer}.weight"] = LoweredLayer(layer, kind, np.ones(codes, np.int8), scale, 4)
    return LoweredModel(graph(text), layers, {"q": grid})


def nodes(model: LoweredModel) -> list[str]:
    """`Operator(inputs)`, an input being its name, or the operator that makes it."""

    def of(value: ir.Value | None) -> str:
        if value is None:
            return "-"
        producer = value.producer()
        return str(value.name) if producer is None else producer.op_type

    return [f"{node.op_type}({', '.join(of(value) for value in node.inputs)})" for node in model.skeleton.graph]


def test_a_batch_norm_goes_into_the_layer_before_it() -> None:
    text = f"""({IMAGE}) => (float[N,2,4,4] y)
      <float[2,2,1,1] w, float[2] gamma = {{6, -3}}, float[2] beta = {{1, 2}}, float[2] mean = {{5, 4}},
       float[2] var = {{8, 8}}> {{
        m = {DOMAIN}.Mark <name = "conv.weight"> (w)
        c = Conv (x, m)
        y = BatchNormalization <epsilon = 1.0> (c, gamma, beta, mean, var)
      }}"""
    model = lowered(text, layer="conv")
    assert fold_batch_norms(model)
    assert nodes(model) == ["Mark(w)", "Conv(x, Mark)"]
    layer = model.layers["conv.weight"]
    # gamma / sqrt(8 + 1) is 2 and -1; y = (conv - mean) · that + beta
    assert layer.scale.tolist() == [0.5, -0.25] and layer.codes.tolist() == [[[[1]], [[1]]]] * 2
    assert layer.bias is not None and layer.bias.tolist() == [1 - 2 * 5, 2 + 4]
    assert not fold_batch_norms(model)


def test_a_batch_norm_whose_layer_has_another_reader_stays() -> None:
    text = f"""({IMAGE}) => (float[N,2,4,4] y, float[N,2,4,4] c)
      <float[2,2,1,1] w, float[2] gamma = {{3, 3}}, float[2] beta = {{1, 2}}, float[2] mean = {{5, 0}},
       float[2] var = {{8, 8}}> {{
        m = {DOMAIN}.Mark <name = "conv.weight"> (w)
        c = Conv (x, m)
        y = BatchNormalization (c, gamma, beta, mean, var)
      }}"""
    model = lowered(text, layer="conv")
    before = nodes(model)
    assert not fold_batch_norms(model) and nodes(model) == before


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_matmul_on_three_axes_becomes_a_gemm(with_bias: bool) -> None:
    product = "p = MatMul (x, t) y = Add (p, b)" if with_bias else "y = MatMul (x, t)"
    text = f"""(float[N,5,3] x) => (float[N,5,2] y) <float[2,3] w, float[2] b = {{1, 2}}> {{
        m = {DOMAIN}.Mark <name = "fc.weight"> (w)
        t = Transpose <perm = [1, 0]> (m)
        {product}
      }}"""
    model = lowered(text, layer="fc", codes=(2, 3))
    assert gemms_from_matmuls(model)
    made = nodes(model)
    flat, restored = next(n for n in made if "shape_in" in n), next(n for n in made if "shape_out" in n)
    assert flat.startswith("Reshape(x, ") and restored.startswith("Reshape(Gemm, ")
    assert ("Gemm(Reshape, Mark, b)" if with_bias else "Gemm(Reshape, Mark)") in made
    bias = model.layers["fc.weight"].bias
    assert (bias is not None and bias.tolist() == [1, 2]) if with_bias else bias is None
    shapes = {
        name: value.const_value.numpy().tolist()
        for name, value in model.skeleton.graph.initializers.items()
        if "shape" in name
    }
    assert sorted(shapes.values()) == [[-1, 3], [-1, 5, 2]]


def test_a_product_of_two_activations_stays() -> None:
    text = f"""(float[N,5,3] x, float[2,3] z) => (float[N,5,2] y) {{
        m = {DOMAIN}.Mark <name = "q"> (z)
        t = Transpose <perm = [1, 0]> (m)
        y = MatMul (x, t)
      }}"""
    model = lowered(text)
    assert not gemms_from_matmuls(model) and nodes(model)[-1] == "MatMul(x, Transpose)"


@pytest.mark.parametrize(("side", "changes"), [(1, True), (4, False)])
def test_a_convolution_on_one_pixel_that_is_the_answer_becomes_a_gemm(side: int, changes: bool) -> None:
    text = f"""(float[N,2,{side},{side}] x) => (float[N,2,{side},{side}] y) <float[2,2,1,1] w> {{
        m = {DOMAIN}.Mark <name = "head.weight"> (w)
        y = Conv (x, m)
      }}"""
    model = lowered(text, layer="head")
    assert gemms_from_classifiers(model) == changes
    after = ["Mark(w)", "Flatten(x)", "Gemm(Flatten, Mark)", "Reshape(Gemm, y/shape_out)"]
    assert nodes(model) == (after if changes else ["Mark(w)", "Conv(x, Mark)"])
    layer = model.layers["head.weight"]
    assert (layer.kind, layer.codes.shape) == (("linear", (2, 2)) if changes else ("conv", (2, 2, 1, 1)))


@pytest.mark.parametrize(
    ("axes", "keeps", "after"),
    [
        ("2, 3", 1, ["GlobalAveragePool(x)"]),
        ("-1, -2", 1, ["GlobalAveragePool(x)"]),
        ("2, 3", 0, ["GlobalAveragePool(x)", "Flatten(GlobalAveragePool)"]),
        ("1, 2", 1, ["ReduceMean(x, axes)"]),
    ],
)
def test_a_mean_over_height_and_width_becomes_a_pool(axes: str, keeps: int, after: list[str]) -> None:
    shape = {("1, 2", 1): "N,1,1,4"}.get((axes, keeps), "N,2,1,1" if keeps else "N,2")
    mean = f"y = ReduceMean <keepdims = {keeps}> (x, axes)"
    text = f"({IMAGE}) => (float[{shape}] y) <int64[2] axes = {{{axes}}}> {{ {mean} }}"
    model = lowered(text)
    assert pools_from_means(model) == (after[0] != "ReduceMean(x, axes)")
    assert nodes(model) == after


@pytest.mark.parametrize(("pads", "ceil", "counts"), [("0, 0, 0, 0", 1, 0), ("1, 1, 1, 1", 0, 1)])
def test_a_pool_without_padding_counts_what_is_inside(pads: str, ceil: int, counts: int) -> None:
    options = f"kernel_shape = [2, 2], strides = [2, 2], pads = [{pads}], ceil_mode = {ceil}, count_include_pad = 1"
    model = lowered(f"({IMAGE}) => (float[N,2,P,P] y) {{ y = AveragePool <{options}> (x) }}")
    assert plain_average_pools(model) == (counts == 0)
    (pool,) = model.skeleton.graph
    assert pool.attributes["count_include_pad"].as_int() == counts


def test_a_pool_that_no_kernel_computes_exactly_is_refused() -> None:
    options = "kernel_shape = [2, 2], strides = [2, 2], pads = [1, 1, 1, 1], ceil_mode = 1, count_include_pad = 1"
    model = lowered(f"({IMAGE}) => (float[N,2,3,3] y) {{ y = AveragePool <{options}> (x) }}")
    with pytest.raises(ExportError, match="AveragePool with padding, ceil_mode"):
        plain_average_pools(model)


@pytest.mark.parametrize(("fill", "moves"), [(0, True), (1, False)])
def test_a_quantizer_moves_before_operations_that_move_codes_alone(fill: int, moves: bool) -> None:
    text = f"""({IMAGE}) => (float[N,2,6,6] y) <int64[8] pads = {{0, 0, 1, 1, 0, 0, 1, 1}}, float fill = {{{fill}}}> {{
        s = Sigmoid (x)
        p = Pad (s, pads, fill)
        y = {DOMAIN}.Mark <name = "q"> (p)
      }}"""
    model = lowered(text)
    assert hoist_marks(model) == moves
    after = ["Sigmoid(x)", "Mark(Sigmoid)", "Pad(Mark, pads, fill)"]
    assert nodes(model) == (after if moves else ["Sigmoid(x)", "Pad(Sigmoid, pads, fill)", "Mark(Pad)"])
    assert list(model.trained_at) == (["q"] if moves else [])


def test_a_quantizer_of_one_bit_stays_after_padding() -> None:
    text = f"""({IMAGE}) => (float[N,2,6,6] y) <int64[8] pads = {{0, 0, 1, 1, 0, 0, 1, 1}}> {{
        s = Sigmoid (x)
        p = Pad (s, pads)
        y = {DOMAIN}.Mark <name = "q"> (p)
      }}"""
    model = lowered(text)
    model.quantizers["q"] = LoweredQuantizer.binary("q", 1.0, (0.0,))  # a zero is none of its codes
    assert not hoist_marks(model)


@pytest.mark.parametrize(
    ("clip", "bounds"),
    [("Relu (s)", (0, 15)), ("Clip (s, low, high)", (2, 8)), ("Clip (s, , high)", (0, 8)), ("Clip (s, low)", (2, 15))],
)
def test_a_clip_before_a_quantizer_becomes_its_bounds(clip: str, bounds: tuple[int, int]) -> None:
    """The grid's scale is ½, so 1 and 4 are codes 2 and 8."""
    text = f"""({IMAGE}) => (float[N,2,4,4] y) <float low = {{1}}, float high = {{4}}> {{
        s = Sigmoid (x)
        r = {clip}
        y = {DOMAIN}.Mark <name = "q"> (r)
      }}"""
    model = lowered(text)
    assert absorb_clips(model)
    assert nodes(model) == ["Sigmoid(x)", "Mark(Sigmoid)"]
    assert (model.quantizers["q"].low, model.quantizers["q"].high) == bounds


def test_a_clip_that_others_read_stays() -> None:
    text = f"""({IMAGE}) => (float[N,2,4,4] y, float[N,2,4,4] r) {{
        r = Relu (x)
        y = {DOMAIN}.Mark <name = "q"> (r)
      }}"""
    assert not absorb_clips(lowered(text))


def test_what_computed_a_weight_and_what_nobody_reads_go() -> None:
    text = f"""({IMAGE}) => (float[N,2,4,4] y) <float[2,2,1,1] v> {{
        w = Neg (v)
        m = {DOMAIN}.Mark <name = "conv.weight"> (w)
        unread = Sigmoid (x)
        y = Conv (x, m)
      }}"""
    model = lowered(text, layer="conv")
    assert cut_weights_off(model)
    assert nodes(model) == ["Neg(v)", "Mark(-)", "Sigmoid(x)", "Conv(x, Mark)"]
    assert remove_dead_nodes(model)
    assert nodes(model) == ["Mark(-)", "Conv(x, Mark)"]
    assert not cut_weights_off(model) and not remove_dead_nodes(model)
