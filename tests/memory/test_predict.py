"""The prediction of memory: what the real step keeps, and its peak, compared with the formulas."""

import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from naruto_lora import lora, models, step
from naruto_lora.memory import lean, predict
from naruto_lora.memory.fallback import Rung

RANK, SIDE, FP32 = 4, 8, 4


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create, while they are alive."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id_of(tensor) for tensor in tensors((args, kwargs))}
        out = function(*args, **(kwargs or {}))
        for tensor in tensors(out):
            if id_of(tensor) not in given and id_of(tensor) not in self.seen:
                self.note(tensor.untyped_storage(), id_of(tensor))
        return out

    def note(self, storage, key):
        size = storage.nbytes()

        def gone(_):
            self.now -= size
            del self.seen[key]

        self.seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def id_of(tensor):
    return tensor.untyped_storage()._cdata


def inputs(unet, batch: int) -> dict:
    latents = torch.randn(batch, 4, SIDE, SIDE)
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    return {
        "latents": latents,
        "noise": torch.randn_like(latents),
        "prompt_embeds": torch.randn(batch, predict.TOKENS, unet.config.cross_attention_dim),
        "pooled": torch.randn(batch, pooled),
        "time_ids": torch.zeros(batch, 6),
        "timesteps": torch.zeros(batch, dtype=torch.int64),
        "alphas_cumprod": torch.linspace(0.99, 0.01, 1000),
    }


@pytest.mark.parametrize("recompute", [0, 12, 34])
@pytest.mark.parametrize("batch", [1, 3])
def test_what_the_lean_step_keeps_and_its_peak(base, batch, recompute):
    unet = models.load_unet(base, torch.float32, "cpu")
    rung = Rung(batch, recompute=recompute)
    assert len(lean.units(unet)) == predict.shape(base, SIDE).units == 34  # so the parameters are none, some and all
    lean.Lean(unet, lora.inject(unet, RANK, RANK), rung)
    given = inputs(unet, batch)
    with Live() as live:
        losses = step.diffusion_loss(unet, **given)
        kept = live.now
        losses.backward(torch.ones(batch))
    shape = predict.shape(base, SIDE)
    text = batch * predict.TOKENS * shape.text * FP32  # an input
    predicted = sum(predict.keeps(layer, rung, RANK, FP32) for layer in shape.layers)
    assert predicted * FP32 == pytest.approx(kept, rel=0.02)
    assert sum(predict.peak(shape, rung, RANK, FP32)) - text == pytest.approx(live.most, rel=0.03)


@pytest.mark.parametrize("kind", ["block", "resnet"])
def test_the_peak_of_one_layer(base, kind):
    unet = models.load_unet(base, torch.float32, "cpu")
    lean.Lean(unet, lora.inject(unet, RANK, RANK), Rung(2))
    layer = [each for each in predict.shape(base, SIDE).layers if each.kind == kind][-1]
    side, batch = math.isqrt(layer.rows), 2
    if kind == "block":
        x = torch.randn(batch, layer.rows, layer.width)
        given = {"encoder_hidden_states": torch.randn(batch, predict.TOKENS, layer.text)}
    else:
        x = torch.randn(batch, layer.width, side, side)
        given = {"temb": torch.randn(batch, unet.time_embedding.linear_2.out_features)}
    x.requires_grad_(True)
    with Live() as live:
        out = lean.units(unet)[layer.place](x, **given)
        out.backward(torch.ones_like(out))
    of = predict.cost(layer, batch, RANK, FP32)
    assert (of.inside + of.backward) * FP32 == pytest.approx(live.most, rel=0.1)


def test_weights_and_lora_are_counted_exactly(base):
    unet = models.load_unet(base, torch.float32, "cpu")
    frozen = sum(p.numel() for p in unet.parameters())
    trained = sum(p.numel() for p in lora.inject(unet, RANK, RANK))
    shape = predict.shape(base, SIDE)
    assert (shape.numbers, RANK * sum(shape.sides)) == (frozen, trained)
    blocks = [m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    linear = [p for b in blocks for n, p in b.named_parameters() if p.dim() == 2 and "lora_" not in n]
    assert shape.linear == sum(p.numel() for p in linear)
