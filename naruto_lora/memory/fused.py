"""The lean step's arithmetic: the layers of a frozen U-Net with LoRA, as functions that keep few tensors.

Each autograd function states what it keeps for the backward pass. The plain functions at the top are bound by memory
traffic; they run as torch's own kernels, or fused by torch.compile. A backward pass writes the LoRA's gradients into
the buffers of `lean.Projection` and returns None for them to autograd.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.autograd import Function

aten = torch.ops.aten
SHAPES = 512  # that one function may be compiled for
KEYS_ALIGNED = 8  # fp16 matrix products need sides that are multiples of this; a caption has 77 tokens


def add_norm(x, delta, weight, bias, eps):
    """x + delta, its layer norm (both as x), and the norm's mean and rstd; `delta` may be None."""
    total = x if delta is None else x + delta
    return total, *torch.native_layer_norm(total, total.shape[-1:], weight, bias, eps)


def add_norm_backward(grad_total, grad_normed, total, mean, rstd, weight, bias):
    sides = total.shape[-1:]
    mask = [True, False, False]
    grad = aten.native_layer_norm_backward(grad_normed, total, sides, mean, rstd, weight, bias, mask)[0]
    return grad + grad_total


def geglu(projected):
    """(..., 2 D) to (..., D): the first half times the GELU of the second (arXiv 2002.05202)."""
    value, gate = projected.chunk(2, dim=-1)
    return value * F.gelu(gate)


def geglu_backward(grad, projected):
    value, gate = projected.chunk(2, dim=-1)
    if torch.compiler.is_compiling():
        return torch.cat([grad * F.gelu(gate), aten.gelu_backward(grad * value, gate)], dim=-1)
    whole = torch.empty_like(projected)
    first, second = whole.chunk(2, dim=-1)
    torch.mul(grad, F.gelu(gate), out=first)
    aten.gelu_backward.grad_input(grad * value, gate, grad_input=second)
    return whole


def group_norm(x, shift, weight, bias, groups, eps, silu):
    """Group norm of x (B, C, H, W) + shift (B, C) or None, through SiLU if asked; and the norm's mean and rstd.

    Eager, it computes in the dtype of `weight`; the result has the dtype of x.
    """
    if torch.compiler.is_compiling():
        scaled, mean, rstd = _normalised(x, shift, groups, eps, None, None)
        out = scaled.flatten(1, 2) * weight.float()[:, None, None] + bias.float()[:, None, None]
        out = (out * out.sigmoid() if silu else out).to(x.dtype)
        return out.contiguous(memory_format=torch.channels_last), mean.flatten(1), rstd.flatten(1)
    total, sizes = _sum(x, shift, groups, weight.dtype)
    out, mean, rstd = torch.native_group_norm(total, weight, bias, *sizes, eps)
    return (F.silu(out, inplace=True) if silu else out).to(x.dtype), mean, rstd


def _sum(x, shift, groups, dtype):
    """x + shift, contiguous and in `dtype`, and the sizes that torch's group norm takes."""
    total = (x if shift is None else x + shift[:, :, None, None]).to(dtype).contiguous()
    count, channels, high, wide = total.shape
    return total, (count, channels, high * wide, groups)


def _normalised(x, shift, groups, eps, mean, rstd):
    """x + shift as (B, groups, C / groups, H, W) in fp32, normalised by the given mean and rstd, or by its own."""
    total = x.float() if shift is None else x.float() + shift.float()[:, :, None, None]
    grouped = total.unflatten(1, (groups, -1))
    if mean is None:
        variance, mean = torch.var_mean(grouped, (2, 3, 4), correction=0, keepdim=True)
        rstd = torch.rsqrt(variance + eps)
    return (grouped - mean) * rstd, mean, rstd


def group_norm_backward(grad, x, shift, mean, rstd, weight, bias, groups, eps, silu):
    if torch.compiler.is_compiling():
        mean, rstd = (each[:, :, None, None, None] for each in (mean, rstd))
        scaled, _, _ = _normalised(x, shift, groups, eps, mean, rstd)
        grad = grad.float()
        if silu:
            out = scaled.flatten(1, 2) * weight.float()[:, None, None] + bias.float()[:, None, None]
            gate = out.sigmoid()
            grad = grad * gate * (1 + out * (1 - gate))
        inner = (grad * weight.float()[:, None, None]).unflatten(1, (groups, -1))
        over = (2, 3, 4)
        inner = inner - inner.mean(over, True) - scaled * (inner * scaled).mean(over, True)
        return (inner * rstd).flatten(1, 2).to(x.dtype).contiguous(memory_format=torch.channels_last)
    total, sizes = _sum(x, shift, groups, weight.dtype)
    grad = grad.to(weight.dtype)
    if silu:
        out = torch.native_group_norm(total, weight, bias, *sizes, eps)[0]
        grad = aten.silu_backward(grad, out)
    mean, rstd = mean.to(total.dtype), rstd.to(total.dtype)  # compiled, they were kept in fp32
    mask = [True, False, False]
    return aten.native_group_norm_backward(grad.contiguous(), total, mean, rstd, weight, *sizes, mask)[0].to(x.dtype)


def residual(x, delta, bias):
    """x + delta + bias; bias is (C,), along the second of four dimensions, or None."""
    return x + (delta if bias is None else delta + bias[:, None, None])


def softmax_backward(scores, grad, scale, keys):
    """The softmax over the first `keys` columns of scaled scores (N, T, K), and the gradient for the scores."""
    outside = torch.arange(scores.shape[-1], device=scores.device) >= keys
    share = (scores.float() * scale).masked_fill(outside, -torch.inf).softmax(-1)
    inner = share * grad.float()
    inner = (inner - share * inner.sum(-1, keepdim=True)) * scale
    return share.to(scores.dtype), inner.to(scores.dtype)


PLAIN = SimpleNamespace(
    add_norm=add_norm, add_norm_backward=add_norm_backward, geglu=geglu, geglu_backward=geglu_backward,
    group_norm=group_norm, group_norm_backward=group_norm_backward, residual=residual,
    softmax_backward=softmax_backward,
)  # fmt: skip


def compiled(device) -> SimpleNamespace:
    """The same functions, each fused into a kernel or two by torch.compile at its first call with a new shape.

    Raises RuntimeError with one line if torch.compile does not work on this machine.
    """
    ops = SimpleNamespace(**{name: _compiled(function) for name, function in vars(PLAIN).items()})
    try:
        ops.residual(*torch.zeros(2, 1, 1, 1, 1, device=device), None)
    except Exception as error:  # no C compiler, no Triton for this card: the types vary
        raise RuntimeError(f"{type(error).__name__}: {str(error).splitlines()[0][:120]}") from None
    return ops


def _compiled(function):
    """`function` compiled for each shape. The limit on shapes is set per thread: backward passes have their own."""
    compiled_function = torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def call(*arguments):
        import torch._dynamo.config as config

        if config.recompile_limit != SHAPES:
            config.recompile_limit, config.accumulated_recompile_limit = SHAPES, SHAPES * len(vars(PLAIN))
        return compiled_function(*arguments)

    return call


class AddNorm(Function):
    """(x + delta, its layer norm), `delta` may be None. Keeps the sum."""

    @staticmethod
    def forward(ctx, x, delta, norm, ops):
        total, normed, mean, rstd = ops.add_norm(x, delta, norm.weight, norm.bias, norm.eps)
        total = x.view_as(x) if delta is None else total
        ctx.save_for_backward(total, mean, rstd)
        ctx.norm, ctx.ops, ctx.two = norm, ops, delta is not None
        return total, normed

    @staticmethod
    def backward(ctx, grad_total, grad_normed):
        total, mean, rstd = ctx.saved_tensors
        grad = ctx.ops.add_norm_backward(
            grad_total, grad_normed, total, mean, rstd, ctx.norm.weight, ctx.norm.bias
        )
        return grad, grad if ctx.two else None, None, None


class GroupNorm(Function):
    """Group norm of x (B, C, H, W) + shift (B, C) or None, through SiLU if asked. Keeps x and the frozen shift."""

    @staticmethod
    def forward(ctx, x, shift, norm, silu, ops):
        setting = (norm.weight, norm.bias, norm.num_groups, norm.eps, silu)
        out, mean, rstd = ops.group_norm(x, shift, *setting)
        ctx.save_for_backward(x, shift, mean, rstd)
        ctx.setting, ctx.ops = setting, ops
        return out

    @staticmethod
    def backward(ctx, grad):
        x, shift, mean, rstd = ctx.saved_tensors
        return ctx.ops.group_norm_backward(grad, x, shift, mean, rstd, *ctx.setting), None, None, None, None


class Residual(Function):
    """x + delta (+ bias). Keeps nothing."""

    @staticmethod
    def forward(ctx, x, delta, bias, ops):
        return ops.residual(x, delta, bias)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad, None, None


class Convolution(Function):
    """A frozen convolution, with its bias if `with_bias`. Keeps nothing."""

    @staticmethod
    def forward(ctx, x, conv, with_bias):
        ctx.conv, ctx.shape = conv, x.shape
        return _convolve(x, conv, conv.bias if with_bias else None)

    @staticmethod
    def backward(ctx, grad):
        return _convolve_backward(grad, ctx.conv, ctx.shape), None, None


def _convolve(x, conv, bias):
    return F.conv2d(x, conv.weight, bias, conv.stride, conv.padding, conv.dilation)


def _convolve_backward(grad, conv, shape):
    """The gradient for an input of `shape` (B, C, H, W), which may be only the first channels of the convolved one."""
    weight = conv.weight
    if shape[1] < weight.shape[1]:
        last = weight.is_contiguous(memory_format=torch.channels_last)
        kind = torch.channels_last if last else torch.contiguous_format
        weight = weight[:, : shape[1]].contiguous(memory_format=kind)
    shape_only = grad.new_empty(1).expand(shape)
    return aten.convolution_backward(
        grad, shape_only, weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], 1,
        [True, False, False],
    )[0]


class FrozenSkip(Function):
    """The start of a ResNet on x (B, C, H, W) joined with a skip connection that needs no gradient.

    Returns the first convolution (without bias) after norm and SiLU, and the shortcut. Keeps the joined input; the
    backward pass leaves out the channels of the skip connection.
    """

    @staticmethod
    def forward(ctx, x, skip, block, ops):
        both, norm = torch.cat([x, skip], dim=1), block.norm1
        normed, mean, rstd = ops.group_norm(both, None, norm.weight, norm.bias, norm.num_groups, norm.eps, True)
        ctx.save_for_backward(both, mean, rstd)
        ctx.block, ctx.ops, ctx.shape = block, ops, x.shape
        return _convolve(normed, block.conv1, None), _convolve(both, block.conv_shortcut, block.conv_shortcut.bias)

    @staticmethod
    def backward(ctx, grad, grad_shortcut):
        both, mean, rstd = ctx.saved_tensors
        norm, count = ctx.block.norm1, ctx.shape[1]
        size = norm.num_channels // norm.num_groups
        groups = -(-count // size)  # those with channels of x
        some = both[:, : groups * size]
        weight, bias = norm.weight[: groups * size], norm.bias[: groups * size]
        grad = _convolve_backward(grad, ctx.block.conv1, some.shape)
        stats = mean[:, :groups].contiguous(), rstd[:, :groups].contiguous()
        grad = ctx.ops.group_norm_backward(grad, some, None, *stats, weight, bias, groups, norm.eps, True)
        return grad[:, :count] + _convolve_backward(grad_shortcut, ctx.block.conv_shortcut, ctx.shape), None, None, None


class FeedForward(Function):
    """Linear, GEGLU, linear, all frozen, on (..., D). Keeps the output of the first."""

    @staticmethod
    def forward(ctx, x, first, first_bias, second, second_bias, ops):
        projected = F.linear(x, first(), first_bias)
        ctx.save_for_backward(projected)
        ctx.first, ctx.second, ctx.ops = first, second, ops
        return F.linear(ops.geglu(projected), second(), second_bias)

    @staticmethod
    def backward(ctx, grad):
        (projected,) = ctx.saved_tensors
        grad = ctx.ops.geglu_backward(grad @ ctx.second(), projected)
        return grad @ ctx.first(), None, None, None, None, None


class Projected(Function):
    """x (..., D) through the n linear layers with LoRA of `projection`: n tensors (..., out).

    Keeps x and the LoRA's inner values (..., n * rank). `anchor` is any tensor that requires a gradient: without it
    autograd would skip a layer whose input requires none.
    """

    @staticmethod
    def forward(ctx, x, anchor, projection):
        rows = x.reshape(-1, x.shape[-1])  # (T, D)
        outs, inner = projection.product(rows)
        for out, up, part in zip(outs, projection.up, projection.split(inner), strict=True):
            out.addmm_(part, up.T, alpha=projection.scale)
        ctx.save_for_backward(rows, inner)
        ctx.projection, ctx.shape = projection, x.shape
        return tuple(out.unflatten(0, x.shape[:-1]) for out in outs)

    @staticmethod
    def backward(ctx, *grads):
        rows, inner = ctx.saved_tensors
        projection = ctx.projection
        flat = [grad.reshape(len(rows), -1) for grad in grads]  # n times (T, out)
        grad_inner = torch.empty_like(inner)
        parts = zip(flat, projection.split(inner), projection.split(grad_inner), strict=True)
        for number, (grad, part, grad_part) in enumerate(parts):
            grad_part.addmm_(grad, projection.up[number], beta=0, alpha=projection.scale)
            projection.grad_up[number].addmm_(grad.T, part, beta=0, alpha=projection.scale)
        torch.mm(grad_inner.T, rows, out=projection.grad_down)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        grad_rows = grad_inner @ projection.down
        for grad, weight in zip(flat, projection.weights(), strict=True):
            grad_rows.addmm_(grad, weight)
        return grad_rows.view(ctx.shape), None, None


class SingleCrossAttention(Function):
    """Attention of one picture's q (1, T, C) to few keys and values k, v (1, L, C). Keeps all three.

    Its backward pass is written out: torch's memory-efficient kernel splits a head's work by keys, and with 77 keys
    and one picture most of the GPU would be idle.
    """

    @staticmethod
    def forward(ctx, q, k, v, heads, ops):
        ctx.save_for_backward(q, k, v)
        ctx.heads, ctx.ops = heads, ops
        return attention(q, k, v, heads)

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        heads, keys = ctx.heads, k.shape[1]
        k, v = (F.pad(each, (0, 0, 0, -keys % KEYS_ALIGNED)) for each in (k, v))
        grads = [torch.empty(each.shape, dtype=q.dtype, device=q.device) for each in (q, k, v)]
        into_q, into_k, into_v = (by_head(each, heads)[0] for each in grads)  # (heads, T or L, D)
        q, grad, k, v = (by_head(each, heads)[0] for each in (q, grad, k, v))
        share, scores = ctx.ops.softmax_backward(q @ k.mT, grad @ v.mT, q.shape[-1] ** -0.5, keys)
        torch.bmm(scores, k, out=into_q)
        torch.bmm(scores.mT, q, out=into_k)
        torch.bmm(share.mT, grad, out=into_v)
        return grads[0], grads[1][:, :keys], grads[2][:, :keys], None, None


def cross_attention(q, k, v, heads, ops):
    """Attention of q (B, T, C) to a caption's k and v (B, L, C): (B, T, C)."""
    return SingleCrossAttention.apply(q, k, v, heads, ops) if len(q) == 1 else attention(q, k, v, heads)


def attention(q, k, v, heads):
    """Attention of q (B, T, C) to k and v (B, L, C) by torch's own kernels: (B, T, C)."""
    out = F.scaled_dot_product_attention(*(by_head(each, heads) for each in (q, k, v)))
    return out.transpose(1, 2).flatten(2)


def by_head(x, heads):
    """(B, T, heads * D) viewed as (B, heads, T, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
