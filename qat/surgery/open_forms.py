"""Products that PyTorch makes in one function, written out as the matrix products, linears and convolutions they consist of.

A fused attention or an einsum hides its products from whoever watches functions. Each form here computes the same from
`matmul`, `linear` and `conv2d`, which have addresses and can be quantized. Both the trace and the quantized model run them
in place of the function; the model's code stays as it is.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Form = Callable[..., Any]


class Unquantizable(ValueError):
    """An option of a function that has no open form."""


def open_form(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Form | None:
    """What computes the call of a function of this kind in the open; None where it is open already."""
    if kind == "matmul":
        return _matmul_form(args)
    if kind == "einsum":
        return _einsum if _is_open_einsum(args) else None
    return FORMS.get(kind)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q kᵀ · scale + mask) v; query: (..., L, E), key: (..., S, E), value: (..., S, V)."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(groups, -3)
        value = value.repeat_interleave(groups, -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        pairs = (query.shape[-2], key.shape[-2])
        allowed = torch.ones(pairs, dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        # Of booleans: True where a position may be seen, where `_masked` takes True to hide it
        mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask
        scores = _masked(scores, mask)
    weights = scores.softmax(dim=-1)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return weights @ value


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward`; query: (L, N, E) or (L, E), key and value: (S, N, E) or (S, E).

    Raises Unquantizable for options that no vision model uses: bias_k, add_zero_attn, static_k.
    """
    extra_keys = (bias_k, bias_v, static_k, static_v)
    if add_zero_attn or any(option is not None for option in extra_keys):
        raise Unquantizable(
            "MultiheadAttention with add_bias_kv, add_zero_attn or static keys cannot be quantized; build it without them"
        )
    is_batched = query.dim() == 3
    query, key, value = _samples_first(query, key, value)
    if key_padding_mask is not None and not is_batched:
        key_padding_mask = key_padding_mask.unsqueeze(0)

    separate = (q_proj_weight, k_proj_weight, v_proj_weight)
    q, k, v = _projected(query, key, value, in_proj_weight, in_proj_bias, separate)
    scores = _scores_of_heads(q, k, num_heads, attn_mask, key_padding_mask)
    weights = scores.softmax(dim=-1)
    if training and dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    values_of_heads = _heads(v, num_heads)
    mixed = _joined(weights @ values_of_heads)
    out = F.linear(mixed, out_proj_weight, out_proj_bias)
    out = out.transpose(0, 1)

    if not is_batched:
        out = out.squeeze(1)
        weights = weights.squeeze(0)
    if not need_weights:
        return out, None
    if average_attn_weights:
        weights = weights.mean(dim=-3)
    return out, weights


def _samples_first(
    query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(L, N, E), or (L, E) of one sample, as (N, L, E); what is one tensor stays one, as self-attention is told by.

    Everything between is then laid out as images are, and the transposes meet those of batch_first.
    """
    is_self_attention = query is key and key is value
    if query.dim() == 2:
        query = query.unsqueeze(1)
        key = key.unsqueeze(1)
        value = value.unsqueeze(1)
    query = query.transpose(0, 1)
    if is_self_attention:
        return query, query, query
    return query, key.transpose(0, 1), value.transpose(0, 1)


def _scores_of_heads(
    q: Tensor,
    k: Tensor,
    heads: int,
    mask: Tensor | None,
    padding: Tensor | None,
) -> Tensor:
    """q kᵀ / √(E / heads), (N, heads, L, S), masked; q: (N, L, E), k: (N, S, E).

    mask: (L, S), or (N · heads, L, S). padding: (N, S).
    """
    samples, queries, width = q.shape
    keys = k.shape[1]
    scale = 1 / math.sqrt(width // heads)
    scaled_queries = _heads(q, heads) * scale
    scores = scaled_queries @ _heads(k, heads).transpose(-2, -1)
    if mask is not None:
        if mask.dim() == 3:
            mask = mask.reshape(samples, heads, queries, keys)
        scores = _masked(scores, mask)
    if padding is not None:
        scores = _masked(scores, padding.reshape(samples, 1, 1, keys))
    return scores


def _heads(x: Tensor, heads: int) -> Tensor:
    """(N, L, E) as (N, heads, L, E / heads)."""
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    """(N, heads, L, E / heads) as (N, L, E)."""
    batch, heads, length, width = x.shape
    return x.transpose(1, 2).reshape(batch, length, heads * width)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """In a boolean mask of `nn.MultiheadAttention`, True hides a position."""
    if mask.dtype == torch.bool:
        return scores.masked_fill(mask, -math.inf)
    return scores + mask


def _projected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    separate: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v: by one linear where all three come from one tensor, else by a linear each."""
    if weight is not None and query is key and key is value:
        q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
        return q, k, v
    width = query.shape[-1]
    projected = []
    for index, x in enumerate((query, key, value)):
        # A split would not become a constant
        part = slice(index * width, (index + 1) * width)
        own_weight = separate[index] if weight is None else weight[part]
        own_bias = None if bias is None else bias[part]
        assert own_weight is not None
        projected.append(F.linear(x, own_weight, own_bias))
    q, k, v = projected
    return q, k, v


def conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    """The convolution that a transposed one equals: of the image spread with zeros, with the kernel turned round.

    x: (N, C, H, W) or (C, H, W); weight: (C, O / groups, kH, kW).
    """
    if x.dim() == 3:
        one = x.unsqueeze(0)
        options = (stride, padding, output_padding, groups, dilation)
        return conv_transpose2d(one, weight, bias, *options).squeeze(0)
    dilations = _pair(dilation)
    pads = _pads(weight, dilations, _pair(padding), _pair(output_padding))
    spread = _padded_or_cut(_spread(x, _pair(stride)), pads)
    turned = _turned(weight, groups)
    return F.conv2d(spread, turned, bias, 1, 0, dilations, groups)


def _pads(
    weight: Tensor,
    dilations: tuple[int, int],
    paddings: tuple[int, int],
    extras: tuple[int, int],
) -> list[int]:
    """Zeros to add on the left, right, top and bottom, in this order of `F.pad`; below 0, pixels to cut off."""
    pads = []
    for axis in (1, 0):
        kernel = weight.shape[2 + axis]
        reach = dilations[axis] * (kernel - 1) - paddings[axis]
        pads += [reach, reach + extras[axis]]
    return pads


def _padded_or_cut(x: Tensor, pads: list[int]) -> Tensor:
    padded = F.pad(x, [max(pad, 0) for pad in pads])
    if min(pads) >= 0:
        return padded
    left, right, top, bottom = (max(-pad, 0) for pad in pads)
    height, width = padded.shape[-2:]
    return padded[..., top : height - bottom, left : width - right]


def _turned(weight: Tensor, groups: int) -> Tensor:
    """(C, O / groups, kH, kW) as (O, C / groups, kH, kW), every kernel turned round by half a turn."""
    inputs = weight.shape[0] // groups
    parts = weight.reshape(groups, inputs, *weight.shape[1:])
    swapped = parts.transpose(1, 2).reshape(-1, inputs, *weight.shape[2:])
    return swapped.flip(2, 3)


def _spread(x: Tensor, strides: tuple[int, int]) -> Tensor:
    """stride - 1 zeros between neighbours."""
    down, right = strides
    if (down, right) == (1, 1):
        return x
    batch, channels, height, width = x.shape
    cells = F.pad(
        x.reshape(batch, channels, height, 1, width, 1),
        [0, right - 1, 0, 0, 0, down - 1],
    )
    spread = cells.reshape(batch, channels, height * down, width * right)
    return spread[..., : (height - 1) * down + 1, : (width - 1) * right + 1]


def conv_transpose1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    """As `conv_transpose2d`, of (N, C, L) or (C, L), by way of one row."""
    row = conv_transpose2d(
        x.unsqueeze(-2),
        weight.unsqueeze(2),
        bias,
        stride=(1, _number(stride)),
        padding=(0, _number(padding)),
        output_padding=(0, _number(output_padding)),
        groups=groups,
        dilation=(1, _number(dilation)),
    )
    return row.squeeze(-2)


def _number(value: Any) -> int:
    return value if isinstance(value, int) else value[0]


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value * 2 if len(value) == 1 else value
    return int(first), int(second)


def addmm(
    base: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """beta · base + alpha · first @ second; also `baddbmm`, for (B, n, m) operands."""
    product = first @ second
    if alpha != 1:
        product = product * alpha
    if beta != 1:
        base = base * beta
    return product + base


def is_weight(operand: Any) -> bool:
    """Whether a matrix is a parameter, or a view of all of one, such as its transpose."""
    if not isinstance(operand, Tensor) or operand.dim() != 2:
        return False
    if isinstance(operand, nn.Parameter):
        return True
    base = operand._base
    return (
        isinstance(base, nn.Parameter)
        and base.dim() == 2
        and base.numel() == operand.numel()
    )


def _matmul_form(args: tuple[Any, ...]) -> Form | None:
    """x @ W, or W @ x, with a parameter W is a linear."""
    if len(args) != 2 or not all(isinstance(arg, Tensor) for arg in args):
        return None
    first, second = args
    if is_weight(second) and not is_weight(first) and first.dim() > 1:
        return _times_weight
    if is_weight(first) and not is_weight(second) and second.dim() > 1:
        return _weight_times
    return None


def _times_weight(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.t())


def _weight_times(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x.transpose(-2, -1), weight).transpose(-2, -1)


def _is_open_einsum(args: tuple[Any, ...]) -> bool:
    """Whether it multiplies two tensors, with every label once in a tensor and none left to broadcasting."""
    if not args or not isinstance(args[0], str):
        return False
    if "." in args[0] or len(_operands(args)) != 2:
        return False
    sources, _, _ = args[0].replace(" ", "").partition("->")
    first, _, second = sources.partition(",")
    return len(set(first)) == len(first) and len(set(second)) == len(second)


def _operands(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tensors of an einsum, which it takes one by one or in a list."""
    operands = args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        return tuple(operands[0])
    return operands


def _einsum(*args: Any) -> Tensor:
    """Two operands by one product: of matrices, or of a matrix and a weight, whose axes are put in order before and after."""
    first, second = _operands(args)
    left, right, result = _labels(args[0])
    if _is_parameter(first) and not _is_parameter(second):
        first, second, left, right = second, first, right, left
    first, left = _summed(first, left, right + result)
    second, right = _summed(second, right, left + result)
    both = [label for label in left if label in right]
    shared = [label for label in both if label in result]
    summed = [label for label in both if label not in result]
    own = [label for label in left if label not in right]
    others = [label for label in right if label not in left]
    if _is_parameter(second) and not shared:
        rows = _merged(first, left, [*own, summed])
        columns = _merged(second, right, [others, summed])
        product = F.linear(rows, columns)
    else:
        rows = _merged(first, left, [*shared, own, summed])
        columns = _merged(second, right, [*shared, summed, others])
        product = rows @ columns
    labels = [*shared, *own, *others]
    sizes = _sizes(left, first) | _sizes(right, second)
    product = product.reshape([sizes[label] for label in labels])
    return product.permute([labels.index(label) for label in result])


def _sizes(labels: str, tensor: Tensor) -> dict[str, int]:
    """Label -> length of its axis."""
    return dict(zip(labels, tensor.shape, strict=True))


def _labels(equation: str) -> tuple[str, str, str]:
    """Labels of the two operands and of the result; where the equation names none, those that stand once, sorted."""
    sources, arrow, result = equation.replace(" ", "").partition("->")
    left, _, right = sources.partition(",")
    if not arrow:
        both = left + right
        result = "".join(sorted(label for label in set(both) if both.count(label) == 1))
    return left, right, result


def _merged(tensor: Tensor, labels: str, groups: Sequence[str | list[str]]) -> Tensor:
    """The axes in the order of `groups`, each group merged into one axis; a label alone is a group of one."""
    sizes = _sizes(labels, tensor)
    axes = []
    shape = []
    for group in groups:
        axes += [labels.index(label) for label in group]
        shape.append(math.prod(sizes[label] for label in group))
    return tensor.permute(axes).reshape(shape)


def _is_parameter(operand: Tensor) -> bool:
    return isinstance(operand, nn.Parameter)


def _summed(tensor: Tensor, labels: str, wanted: str) -> tuple[Tensor, str]:
    """Sum over the labels that nobody else has."""
    for label in labels:
        if label not in wanted:
            tensor = tensor.sum(dim=labels.index(label))
            labels = labels.replace(label, "")
    return tensor, labels


FORMS: dict[str, Form] = {
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "multi_head_attention_forward": multi_head_attention,
    "conv_transpose2d": conv_transpose2d,
    "conv_transpose1d": conv_transpose1d,
    "addmm": addmm,
    "baddbmm": addmm,
}
