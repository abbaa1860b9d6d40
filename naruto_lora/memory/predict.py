"""The GPU memory that a run needs, calculated from the U-Net's configuration before any weight is loaded.

A U-Net on meta tensors (no memory) gives the sizes of its layers. What each keeps for the backward pass follows from
what `fused`'s functions keep; the peak is found by walking through the forward and backward pass, layer by layer.
`tests/memory/test_predict.py` compares this with the real step, `tests/benchmarks/plan.py` the peaks with a GPU's.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields

import torch

from .. import models
from . import lean
from .fallback import Rung
from .gpu import CONTEXT, GIB

TOKENS = 77  # of a caption
SPLIT = 32  # torch's attention keeps one value a row; the number of rows is rounded up to a multiple of this
SMALLEST = 4096  # elements: bitsandbytes' Adam keeps the states of smaller tensors in 32 bits
WORKSPACE = 64 * 2**20  # cuBLAS's two on Hopper, and the most elsewhere
LOSS = 6  # fp32 tensors of the latents' size
GAPS = 0.04  # share of the activations that the allocator takes on top, measured on an H200
HOLES = {"int8": 0.055, "nf4": 0.235}  # share of the unpacked weights that stays as unusable gaps after packing (H200)
PAGES, GRAPHS = 0.1 * GIB, 0.3 * GIB  # the least that the allocator takes on top, without and with a CUDA graph
PLAIN = 1.77  # how much more the plain step keeps, by autocast's and peft's casts, besides a caption a block (H200)


@dataclass(frozen=True)
class Layer:
    """A layer of the U-Net and its sizes for one picture."""

    kind: str  # block, resnet, transformer (only its norm) or end (the last norm)
    place: int | None  # index in `lean.units`: rungs that recompute more than this many recompute it
    rows: int  # tokens or pixels
    width: int  # channels in
    out: int  # channels out
    heads: int  # of both attentions
    text: int  # channels of a caption's embedding
    first: bool  # no LoRA comes before it: its input needs no gradient
    joined: int  # input channels of a skip connection that needs a gradient and is already kept where it starts


@dataclass(frozen=True)
class Shape:
    """What a prediction needs to know about a U-Net at one size of latents."""

    layers: tuple[Layer, ...]  # in the order of the forward pass
    numbers: int  # frozen weights
    linear: int  # those in the transformer blocks' linear layers
    largest: int  # those in the largest of these layers
    sides: tuple[int, ...]  # of the LoRA's matrices: each has side * rank elements
    waiting: int  # elements a picture of skip connections that wait for the last up block and that no layer keeps
    skips: int  # elements a picture of all skip connections
    text: int  # channels of a caption's embedding
    pixels: int  # of the latents

    @property
    def units(self) -> int:
        """The number of layers that can be recomputed."""
        return sum(layer.place is not None for layer in self.layers)


@dataclass(frozen=True)
class Parts:
    """Bytes at the moment of the peak, by what takes them."""

    weights: float
    lora: float
    optimizer: float
    activations: float  # kept for the backward pass
    workspace: float  # short-lived: gradients, copies, kernels' scratch memory
    rounding: float  # reserved by the allocator and not used
    context: float  # CUDA's own, outside of the allocator

    @property
    def reserved(self) -> float:
        """What torch's allocator takes: `torch.cuda.max_memory_reserved()`."""
        return sum(getattr(self, part.name) for part in fields(self)) - self.context


def shape_of(recipe) -> Shape:
    """The sizes of a recipe's U-Net, for square pictures."""
    return shape(recipe.base, recipe.resolution // models.vae_scale_factor(recipe.base, recipe.vae))


@functools.cache
def shape(base: str, side: int) -> Shape:
    """The sizes of the U-Net of `base` (hub id or folder) for latents of `side` x `side`."""
    models.quiet()  # before diffusers is imported, and bitsandbytes with it
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(models.unet_config(base))
    return measure(unet, side)


def measure(unet, side: int) -> Shape:
    """`shape` of a U-Net on meta tensors, without LoRA."""
    calls, skips = _trace(unet, side)
    places = {id(unit): place for place, unit in enumerate(lean.units(unet))}
    joining = {id(resnet) for block in unet.up_blocks for resnet in block.resnets}
    layers, kept, first = [], set(), True
    taken = list(skips)
    for module, x, out in calls:
        kind = KINDS.get(type(module).__name__, "transformer")
        skip = taken.pop() if id(module) in joining else None
        joined = skip.shape[1] if skip is not None and id(skip) in kept else 0
        if module is unet.conv_norm_out:
            kind = "end"
        rows, width = (math.prod(x.shape[2:]), x.shape[1]) if x.dim() == 4 else x.shape[1:]
        heads = module.attn1.heads if kind == "block" else 0
        layers.append(Layer(kind, places.get(id(module)), rows, width, out.shape[-1 if kind == "block" else 1],
                            heads, unet.config.cross_attention_dim, first, joined))  # fmt: skip
        first = first and kind != "block"
        if not first and kind != "block":
            kept.add(id(x))
    blocks = [module for module in unet.modules() if type(module).__name__ == "BasicTransformerBlock"]
    linear = [m for block in blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    adapted = [m for b in blocks for a in (b.attn1, b.attn2) for m in (a.to_q, a.to_k, a.to_v, a.to_out[0])]
    last = len(unet.up_blocks[-1].resnets)
    return Shape(
        tuple(layers),
        sum(p.numel() for p in unet.parameters()),
        sum(m.weight.numel() for m in linear),
        max(m.weight.numel() for m in linear),
        tuple(side for m in adapted for side in m.weight.shape),
        sum(skip.numel() for skip in skips[:last] if id(skip) not in kept),
        sum(skip.numel() for skip in skips),
        unet.config.cross_attention_dim,
        side**2,
    )


KINDS = {"BasicTransformerBlock": "block", "ResnetBlock2D": "resnet"}


def _trace(unet, side: int):
    """A forward pass: [(module, input, output)] of its layers in order; the skip connections."""
    calls, skips = [], []

    def note(module, args, kwargs, out):
        calls.append((module, args[0] if args else kwargs["hidden_states"], out))

    hooks = [unet.conv_in.register_forward_hook(lambda _, __, out: skips.append(out))]
    hooks += [block.register_forward_hook(lambda _, __, out: skips.extend(out[1])) for block in unet.down_blocks]
    for module in unet.modules():
        noted = module.norm if type(module).__name__ == "Transformer2DModel" else module
        if noted is not module or type(module).__name__ in KINDS or module is unet.conv_norm_out:
            hooks.append(noted.register_forward_hook(note, with_kwargs=True))
    config, like = unet.config, {"device": "meta", "dtype": unet.dtype}
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    added = {"text_embeds": torch.empty(1, pooled, **like), "time_ids": torch.empty(1, 6, **like)}
    text = torch.empty(1, TOKENS, config.cross_attention_dim, **like)
    latents = torch.empty(1, config.in_channels, side, side, **like)
    with torch.no_grad():
        unet(latents, torch.empty(1, **like), encoder_hidden_states=text, added_cond_kwargs=added)
    for hook in hooks:
        hook.remove()
    return calls, skips


@dataclass(frozen=True)
class Cost:
    """Elements (in the compute dtype) that a layer holds, for a micro-batch."""

    entry: float = 0  # kept if it is recomputed
    kept: float = 0  # kept if it is not
    inside: float = 0  # kept while it is recomputed
    forward: float = 0  # short-lived ones in the forward pass
    backward: float = 0  # short-lived ones in the backward pass
    waits: float = 0  # gradients held until a later layer needs them


@functools.cache
def cost(layer: Layer, batch: int, rank: int, size: int) -> Cost:
    """What the lean step's functions keep of `layer` (see `fused`); `size` is the bytes of an element."""
    given, single = batch * layer.rows * layer.width, 4 / size  # the input's elements; an fp32 value in elements
    if layer.kind == "block":
        return _block_cost(layer, batch, rank, single)
    if layer.kind == "end":  # in fp32
        return Cost(0, given, 0, 2 * single * given, 4 * single * given)
    if layer.kind == "transformer":
        return Cost(0, 0 if layer.first else given, 0, 2 * given, 3 * given)
    after = batch * layer.rows * layer.out
    forward = max(2 * given, 3 * after) + after
    if layer.first:
        return Cost(forward=forward)
    backward = max(5 * after, 5 * given + after)
    entry = given - batch * layer.rows * layer.joined
    return Cost(entry, given + after, given - entry + after, forward, backward, given if layer.joined else 0)


def _block_cost(layer: Layer, batch: int, rank: int, single: float) -> Cost:
    given, rows = batch * layer.rows * layer.width, batch * layer.rows
    widths = 3 + 1 + 1 + 1 + 1 + 1 + 8 + 2  # qkv, out, sum, q, out, sum, GEGLU's input; two norms
    statistics = rows * (3 * 2) + batch * layer.heads * math.ceil(layer.rows / SPLIT) * SPLIT * (1 if batch == 1 else 2)
    text = batch * TOKENS * (2 * layer.width + 4 * rank)
    inside = widths * given + (6 + 4) * rank * rows + statistics * single + text  # inner values, some twice
    return Cost(given, inside + (0 if layer.first else given), inside, 10 * given, 17 * given)


def keeps(layer: Layer, rung: Rung, rank: int, size: int) -> float:
    """Elements (of `size` bytes) that `rung` keeps of a layer for the backward pass."""
    of = cost(layer, rung.batch, rank, size)
    if _is_recomputed(layer, rung):
        return of.entry
    if rung.lean:
        return of.kept
    return PLAIN * of.kept + (rung.batch * TOKENS * layer.text if layer.kind == "block" else 0)


def _is_recomputed(layer: Layer, rung: Rung) -> bool:
    """Whether the layer's forward pass runs again in the backward pass."""
    return layer.place is not None and layer.place < rung.recompute


def peak(shape: Shape, rung: Rung, rank: int, size: int) -> tuple[float, float]:
    """Bytes at the peak of a micro-step: kept for the backward pass, and short-lived."""
    scale = 1 if rung.lean else PLAIN
    kept = rung.batch * TOKENS * shape.text + LOSS * 4 / size * rung.batch * 4 * shape.pixels
    kept += sum(keeps(layer, rung, rank, size) for layer in shape.layers)
    last = cost(shape.layers[-1], rung.batch, rank, size)
    found = [(kept, rung.batch * shape.waiting + scale * last.forward)]  # the end of the forward pass
    waits = 0.0
    for layer in reversed(shape.layers):
        of = cost(layer, rung.batch, rank, size)
        found.append((kept, waits + scale * (of.backward + (of.inside if _is_recomputed(layer, rung) else 0))))
        kept, waits = kept - keeps(layer, rung, rank, size), waits + of.waits
    kept, moment = max(found, key=sum)
    return kept * size, moment * size


def evaluation(shape: Shape, rung: Rung, rank: int, size: int) -> float:
    """Elements at the peak of a forward pass without gradients."""
    most = max(cost(layer, rung.batch, rank, size).forward for layer in shape.layers)
    return rung.batch * (shape.skips + TOKENS * shape.text) + most


def predict(shape: Shape, rung: Rung, recipe, cuda: bool = True) -> Parts:
    """Bytes that `rung` takes at the peak of a step, by part."""
    size = models.DTYPES[recipe.precision].itemsize
    trained = recipe.rank * sum(shape.sides)
    kept, moment = peak(shape, rung, recipe.rank, size)
    copies = 2 * size if rung.lean else size  # autocast keeps one
    if rung.weights != "resident":
        moment += shape.largest * size
    if rung.graphed:  # on top of the graph's memory: the hold-out's forward passes, cuBLAS's workspaces again
        moment += WORKSPACE + size * evaluation(shape, rung, recipe.rank, size)
    held = (
        (shape.numbers - shape.linear) * size + shape.linear * stored(rung.weights, size),
        trained * (4 + 4 + copies),
        sum(_adam(side * recipe.rank, cuda) for side in shape.sides),
        kept,
        moment + WORKSPACE * cuda,
    )
    rounding = max(GRAPHS if rung.graphed else PAGES, GAPS * kept) + HOLES.get(rung.weights, 0) * shape.linear * size
    step = Parts(*held, rounding * cuda, CONTEXT * cuda)
    if rung.weights == "resident":
        return step
    loading = (shape.numbers * size, trained * 4, 0, 0, 3 * shape.largest * size, PAGES * cuda, CONTEXT * cuda)
    return max(step, Parts(*loading), key=lambda parts: parts.reserved)  # unpacked at first


def stored(weights: str, size: int) -> float:
    """Bytes of a frozen weight on the GPU: 8 and 4 bits have an fp32 scale a block (bitsandbytes)."""
    return {"resident": size, "host": 0, "int8": 1 + 4 / 256, "nf4": 0.5 + 4 / 64}[weights]


def _adam(numbers: int, cuda: bool) -> float:
    """Bytes of Adam's two states of a tensor: 8 bits with an fp32 scale a block of 256; 32 bits if it is small."""
    return 8 * numbers if not cuda or numbers < SMALLEST else 2 * (numbers + 4 * math.ceil(numbers / 256))
