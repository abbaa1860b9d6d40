"""The lean step: the plain step's U-Net and LoRA with less memory traffic, fewer kept tensors and fewer launches.

`Lean(unet, ...)` replaces the U-Net's forward methods by `fused`'s functions: no autocast, none of peft's casts,
half-precision copies of the fp32 LoRA weights; q, k, v and the LoRA's inner values come from one product. peft still
injects, saves and loads. `tests/memory/test_lean.py` compares losses and gradients with the plain step's.
"""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .. import step
from . import fused, gpu

ALIGNED = 8  # attention kernels need rows that start at multiples of so many elements
RECORD_AFTER = 2  # micro-batches of one shape that run eagerly before their kernels are recorded as a CUDA graph


class Projection:
    """n frozen linear layers with LoRA that share their input, as `fused.Projected` takes them.

    `down` (n * rank, D) and `up` (n, out, rank) are the LoRA's half-precision copies, `grad_down` and `grad_up`
    their gradients, views of one flat buffer.
    """

    def __init__(self, layers, keep):
        first = layers[0]
        self.parts, self.scale = len(layers), first.scaling["default"]
        self.anchor = first.lora_A["default"].weight
        self.masters = [layer.lora_A["default"].weight for layer in layers]
        self.masters += [layer.lora_B["default"].weight for layer in layers]
        inner, width = self.parts * len(self.anchor), self.anchor.shape[1]
        spare = self.anchor.new_zeros(inner + -inner % ALIGNED, width, dtype=first.base_layer.weight.dtype)
        self.store, below = _store([layer.base_layer for layer in layers], keep, spare)
        self.together = below is not spare  # frozen weights and `down` are one matrix: one product gives both
        self.down, self.rows = below[:inner], sum(layer.base_layer.out_features for layer in layers)
        self.bias = first.base_layer.bias if self.parts == 1 else None
        if self.together and self.bias is not None:
            self.bias = torch.cat([self.bias, self.bias.new_zeros(len(spare))])

    def set_buffers(self, up, grads) -> None:
        """Sets the memory of `up` and of both gradients, which are parts of the flat buffer."""
        rank, out = self.masters[0].shape[0], self.masters[-1].shape[0]
        self.up, self.grad_up = (each.view(self.parts, out, rank) for each in (up, grads[1]))
        self.grad_down = grads[0].view(self.parts * rank, -1)

    def product(self, rows):
        """rows (T, D) times the frozen weights: n tensors (T, out); and times `down`: (T, n * rank)."""
        whole = F.linear(rows, self.store(), self.bias)
        inner = whole[:, self.rows :][:, : len(self.down)].contiguous() if self.together else rows @ self.down.T
        return whole[:, : self.rows].chunk(self.parts, dim=1), inner

    def weights(self):
        """The frozen weights: n tensors (out, D)."""
        return self.store()[: self.rows].chunk(self.parts)

    def split(self, inner):
        """(T, n * rank) as n views (T, rank)."""
        return inner.chunk(self.parts, dim=1)

    def __call__(self, x):
        return fused.Projected.apply(x, self.anchor, self)


class Resident:
    """A frozen weight that stays on the GPU as it is."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self):
        return self.weight


class OnHost:
    """A frozen weight in pinned host memory, copied to the GPU at each use: exact, and slow."""

    def __init__(self, weight):
        self.device = weight.device
        self.weight = weight.cpu().pin_memory() if weight.is_cuda else weight.cpu()

    def __call__(self):
        return self.weight.to(self.device, non_blocking=True)


class Int8:
    """A frozen weight in 8 bits by blocks of 256 (bitsandbytes, arXiv 2110.02861), dequantized at each use."""

    def __init__(self, weight):
        from bitsandbytes import functional

        self.dequantize = functional.dequantize_blockwise
        self.state = functional.quantize_blockwise(weight.contiguous(), blocksize=256)

    def __call__(self):
        return self.dequantize(*self.state)


class Nf4:
    """A frozen weight in 4-bit NormalFloat (QLoRA, arXiv 2305.14314), dequantized at each use."""

    def __init__(self, weight):
        from bitsandbytes import functional

        self.dequantize = functional.dequantize_4bit
        self.state = functional.quantize_4bit(weight.contiguous(), quant_type="nf4", blocksize=64)

    def __call__(self):
        return self.dequantize(*self.state)


def _store(layers, keep, spare=None):
    """Moves the stacked weights of `layers` into a store of class `keep`; returns (the store, `spare`).

    `Resident` gets the rows of `spare` below the weights: the layers then keep views of their parts, and the rows
    returned are that part of the store. Other stores leave the layers without weights. Weights that an earlier rung
    has stored are read from its store first.
    """
    weights = [layer.stored() if hasattr(layer, "stored") else layer.weight.data for layer in layers]
    rows, resident = sum(map(len, weights)), keep is Resident
    below = [spare] if resident and spare is not None else []
    whole = weights[0] if len(layers) == 1 and not below else torch.cat(weights + below)
    del weights
    store = keep(whole)
    for number, (layer, part) in enumerate(zip(layers, whole[:rows].chunk(len(layers)), strict=True)):
        layer.weight.data = part if resident else part.new_empty(0)
        layer.stored = functools.partial(_part, store, rows, number, len(layers))
    return store, whole[rows:] if below else spare


def _part(store, rows: int, number: int, count: int):
    return store()[:rows].chunk(count)[number]


STORES = {"resident": Resident, "host": OnHost, "int8": Int8, "nf4": Nf4}


class Lean:
    """The engine of a run's micro-batches: `accumulate` adds their gradients to the parameters' `.grad`."""

    def __init__(self, unet, parameters, rung):
        if reason := unsupported(unet):
            raise ValueError(f"the lean step can't run this U-Net: {reason}")
        self.unet, self.batch, self.graphed, self.notes = unet, rung.batch, rung.graphed, []
        self.fast = fused.PLAIN
        if rung.compiled:
            self._compile()
        self.projections = []
        _patch(self, unet, STORES[rung.weights], units(unet)[: rung.recompute])
        self._allocate(parameters)
        self.graph, self.shape, self.seen = None, None, 0  # recorded; the latents'; micro-batches of that shape so far
        self.refresh()

    def _compile(self) -> None:
        try:
            self.fast = fused.compiled(self.unet.device)
        except RuntimeError as error:
            self.notes.append(f"torch.compile does not work here ({error}): training continues without it, slower")
            return
        self.unet.to(memory_format=torch.channels_last)

    def _allocate(self, parameters) -> None:
        """Half-precision copies of the LoRA, and flat buffers of gradients, in the order of the projections."""
        self.masters = [p for projection in self.projections for p in projection.masters]
        if {id(p) for p in self.masters} != {id(p) for p in parameters}:
            raise ValueError("the lean step supports LoRA on to_q, to_k, to_v and to_out.0 only; use the plain step")
        device, dtype = self.unet.device, next(self.unet.parameters()).dtype
        sizes = [p.numel() for p in self.masters]
        self.micro_grads = torch.zeros(sum(sizes), device=device, dtype=dtype)
        self.grads = torch.zeros(sum(sizes), device=device)
        for p, grad in zip(self.masters, self.grads.split(sizes), strict=True):
            p.grad = grad.view_as(p)
        rest, self.copies = self.micro_grads, []
        for projection in self.projections:
            count = projection.parts
            halves = [sum(p.numel() for p in half) for half in (projection.masters[:count], projection.masters[count:])]
            *grads, rest = rest.split([*halves, len(rest) - sum(halves)])
            projection.set_buffers(torch.empty(halves[1], device=device, dtype=dtype), grads)
            self.copies += [*projection.down.chunk(count), *projection.up]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the fp32 LoRA weights to their half-precision copies; to call after each change of them."""
        torch._foreach_copy_(self.copies, self.masters)

    def context(self):
        """The context that the U-Net must run in, wherever it is used: no autocast."""
        return contextlib.nullcontext()

    def zero_grad(self) -> None:
        self.grads.zero_()

    def accumulate(self, inputs: dict[str, torch.Tensor], seed: torch.Tensor) -> torch.Tensor:
        """Losses (B,) of a micro-batch (what `step.diffusion_loss` takes); adds the gradients of seed (B,) * losses."""
        shape = tuple(inputs["latents"].shape)
        if not self.graphed or shape[0] < self.batch or shape != self.shape:
            self.release()  # its memory would come on top of what this shape needs
        if not self.graphed or shape[0] < self.batch:  # an epoch's last batch
            return self._micro_step(inputs, seed)
        self.seen = self.seen + 1 if shape == self.shape else 1
        self.shape = shape
        if self.graph is None and self.seen > RECORD_AFTER:
            self._record(inputs, seed)
        return self._micro_step(inputs, seed) if self.graph is None else self.graph(inputs, seed)

    def _record(self, inputs, seed) -> None:
        """Records a CUDA graph of this micro-step, if that is possible. Raises out-of-memory errors."""
        before = self.grads.clone()
        try:
            self.graph = _Graph(self, inputs, seed)
        except RuntimeError as error:
            if gpu.is_out_of_memory(error):
                raise
            self.graphed = False
            reason = str(error).splitlines()[0][:120]
            self.notes.append(f"no CUDA graph can be recorded here ({reason}): training continues without it")
        self.grads.copy_(before)

    def _micro_step(self, inputs, seed) -> torch.Tensor:
        losses = step.diffusion_loss(self.unet, **inputs)
        losses.backward(seed)
        self.grads += self.micro_grads
        return losses.detach()

    def release(self) -> bool:
        """Frees the recorded graph and its memory; False if there is none. It is recorded again when needed."""
        held, self.graph = self.graph is not None, None
        return held


class _Graph:
    """One micro-step's kernels as a CUDA graph, replayed on inputs of the same shapes."""

    def __init__(self, lean, inputs, seed):
        self.inputs, self.seed = {name: value.clone() for name, value in inputs.items()}, seed.clone()
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(self.graph):
                self.losses = lean._micro_step(self.inputs, self.seed)
        finally:
            torch.cuda.set_stream(stream)  # a recording that fails leaves its own stream set

    def __call__(self, inputs, seed):
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self.seed.copy_(seed)
        self.graph.replay()
        return self.losses.clone()


def units(unet) -> list[torch.nn.Module]:
    """The modules that gradient checkpointing can recompute, in its order: transformer blocks, then ResNets.

    The blocks with the most pixels come first: each frees the most memory.
    """
    kinds: dict[str, list] = {"BasicTransformerBlock": [], "ResnetBlock2D": []}
    for module in unet.modules():
        kinds.get(type(module).__name__, []).append(module)
    return sorted(kinds["BasicTransformerBlock"], key=lambda block: block.dim) + kinds["ResnetBlock2D"]


def unsupported(unet) -> str | None:
    """Why the lean step can't run this U-Net; None if it can. It supports the kinds of layer that SDXL has."""
    if not (isinstance(unet.conv_norm_out, torch.nn.GroupNorm) and isinstance(unet.conv_act, torch.nn.SiLU)):
        return "its last layers are not SDXL's"
    for name, module in unet.named_modules():
        kind = type(module).__name__
        if kind == "BasicTransformerBlock":
            fits = module.norm_type == "layer_norm" and module.activation_fn == "geglu" and module.attn2 is not None
            fits = fits and not (module.only_cross_attention or module.double_self_attention or module.pos_embed)
            fits = fits and all(_is_plain(attention) for attention in (module.attn1, module.attn2))
        elif kind == "Transformer2DModel":
            fits = module.is_input_continuous and module.use_linear_projection
        elif kind == "ResnetBlock2D":
            fits = module.time_embedding_norm == "default" and module.output_scale_factor == 1
            fits = fits and not (module.up or module.down or module.skip_time_act)
            fits = fits and isinstance(module.nonlinearity, torch.nn.SiLU) and module.time_emb_proj is not None
        else:
            fits = not (isinstance(module, torch.nn.Conv2d) and (module.groups > 1 or module.padding_mode != "zeros"))
        if not fits:
            return f"'{name}' has settings that no SDXL has"
    return None


def _is_plain(attention) -> bool:
    """Whether this attention is plain scaled dot-product attention with LoRA on its four projections."""
    layers = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
    lora = all(hasattr(layer, "base_layer") and list(layer.lora_A) == ["default"] for layer in layers)
    no_bias = lora and all(layer.base_layer.bias is None for layer in layers[:3])
    other = (attention.spatial_norm, attention.group_norm, attention.norm_q, attention.norm_k, attention.norm_cross)
    plain = not any(other) and attention.rescale_output_factor == 1 and not attention.residual_connection
    return no_bias and plain


def _patch(lean, unet, keep, recomputed) -> None:
    """Replaces the forward methods of `unet`'s modules; `keep` is the class that stores their linear weights."""
    recomputed = {id(module) for module in recomputed}
    for module in unet.modules():
        kind = type(module).__name__
        if kind == "BasicTransformerBlock":
            forward = _transformer_block(lean, module, keep)
        elif kind == "ResnetBlock2D":
            forward = functools.partial(_resnet, lean.fast, module)
        elif kind == "Transformer2DModel":
            forward = functools.partial(_transformer, lean.fast, module)
        elif kind in ("UpBlock2D", "CrossAttnUpBlock2D"):
            forward = functools.partial(_up_block, module)
        elif isinstance(module, torch.nn.Conv2d):
            forward = functools.partial(_convolution, module)
        else:
            continue
        module.forward = _recomputing(forward) if id(module) in recomputed else forward
    unet.conv_norm_out.forward = _last_norm(lean.fast, unet.conv_norm_out)
    unet.conv_act.forward = lambda x: x  # the SiLU is in the norm


def _last_norm(fast, norm):
    """The forward method of the U-Net's last group norm and its SiLU, computed in fp32: x (B, C, H, W) -> the same.

    With fp16 input CUDA's kernel rounds a group's mean and rstd to fp16. In the layers before that is noise; here it
    scales the whole prediction, and the loss with it.
    """
    exact = SimpleNamespace(
        weight=norm.weight.float(), bias=norm.bias.float(), num_groups=norm.num_groups, eps=norm.eps
    )
    return lambda x: fused.GroupNorm.apply(x, None, exact, True, _ops(fast))


def _convolution(conv, x):
    return fused.Convolution.apply(x, conv, True)


def _ops(fast):
    """The element-wise functions: `fast` ones in training, torch's own for the few forward passes without gradients."""
    return fast if torch.is_grad_enabled() else fused.PLAIN


def _recomputing(forward):
    """`forward` under gradient checkpointing: it keeps only its input, and runs again in the backward pass."""

    def run(x, *rest, **named):
        if not torch.is_grad_enabled():
            return forward(x, *rest, **named)
        return checkpoint(
            forward, x, *rest, use_reentrant=False, preserve_rng_state=False, determinism_check="none", **named
        )

    return run


def _transformer_block(lean, block, keep):
    """The forward method of a BasicTransformerBlock: x (B, T, C), encoder_hidden_states (B, L, D) -> (B, T, C)."""
    own, cross, fast = block.attn1, block.attn2, lean.fast  # a method that held the engine would keep it in memory
    qkv = Projection([own.to_q, own.to_k, own.to_v], keep)
    own_out = Projection([own.to_out[0]], keep)
    q = Projection([cross.to_q], keep)
    kv = Projection([cross.to_k, cross.to_v], keep)
    cross_out = Projection([cross.to_out[0]], keep)
    lean.projections += [qkv, own_out, q, kv, cross_out]
    first, second = block.ff.net[0].proj, block.ff.net[2]
    stores = [_store([layer], keep)[0] for layer in (first, second)]

    def forward(x, attention_mask=None, encoder_hidden_states=None, **_):
        ops = _ops(fast)
        x, normed = fused.AddNorm.apply(x, None, block.norm1, ops)
        (delta,) = own_out(fused.attention(*qkv(normed), own.heads))
        x, normed = fused.AddNorm.apply(x, delta, block.norm2, ops)
        (delta,) = cross_out(fused.cross_attention(*q(normed), *kv(encoder_hidden_states), cross.heads, ops))
        x, normed = fused.AddNorm.apply(x, delta, block.norm3, ops)
        delta = fused.FeedForward.apply(normed, stores[0], first.bias, stores[1], second.bias, ops)
        return fused.Residual.apply(x, delta, None, ops)

    return forward


def _transformer(fast, model, x, encoder_hidden_states=None, **_):
    """The forward method of a Transformer2DModel: x (B, C, H, W) -> ((B, C, H, W),)."""
    ops, (high, wide) = _ops(fast), x.shape[2:]
    hidden = fused.GroupNorm.apply(x, None, model.norm, False, ops)
    hidden = model.proj_in(hidden.permute(0, 2, 3, 1).flatten(1, 2))  # (B, H W, C)
    for block in model.transformer_blocks:
        hidden = block(hidden, encoder_hidden_states=encoder_hidden_states)
    hidden = model.proj_out(hidden).unflatten(1, (high, wide)).permute(0, 3, 1, 2)
    return (fused.Residual.apply(x, hidden, None, ops),)


def _up_block(block, hidden_states, res_hidden_states_tuple, temb, encoder_hidden_states=None, upsample_size=None, **_):
    """The forward method of an up block; its ResNets join x with the skip connections."""
    x, skips = hidden_states, list(res_hidden_states_tuple)
    attentions = getattr(block, "attentions", [None] * len(block.resnets))
    for resnet, attention in zip(block.resnets, attentions, strict=True):
        x = resnet(x, temb, skip=skips.pop())
        if attention is not None:
            (x,) = attention(x, encoder_hidden_states=encoder_hidden_states)
    for upsampler in block.upsamplers or ():
        x = upsampler(x, upsample_size)
    return x


def _resnet(fast, block, x, temb, skip=None, **_):
    """The forward method of a ResnetBlock2D: x (B, C, H, W), joined with `skip`, temb (B, E) -> (B, C', H, W)."""
    ops = _ops(fast)
    if skip is not None and not skip.requires_grad and x.requires_grad:
        hidden, shortcut = fused.FrozenSkip.apply(x, skip, block, ops)
    else:
        x = x if skip is None else torch.cat([x, skip], dim=1)
        hidden = fused.GroupNorm.apply(x, None, block.norm1, True, ops)
        hidden = fused.Convolution.apply(hidden, block.conv1, False)
        shortcut = x if block.conv_shortcut is None else block.conv_shortcut(x)
    shift = block.time_emb_proj(block.nonlinearity(temb)) + block.conv1.bias
    hidden = fused.GroupNorm.apply(hidden, shift, block.norm2, True, ops)
    hidden = fused.Convolution.apply(hidden, block.conv2, False)
    return fused.Residual.apply(shortcut, hidden, block.conv2.bias, ops)
