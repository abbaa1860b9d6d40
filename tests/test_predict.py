"""The prediction of memory: what the real step keeps for its backward pass, counted beside what the formulas say."""

import pytest
import torch

from naruto_lora import lean, lora, memory, models, predict, recipe, step

RANK, SIDE = 4, 64


@pytest.fixture(scope="module")
def unet_of(base):
    """A fresh U-Net with LoRA, and the LoRA's parameters."""

    def load():
        unet = models.load_unet(base, torch.float32, "cpu")
        return unet, lora.inject(unet, RANK, RANK)

    return load


def inputs(unet, batch: int) -> dict:
    latents = torch.randn(batch, 4, SIDE // 8, SIDE // 8)
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


def kept_bytes(unet, batch: int) -> int:
    """Of the storages that a forward pass keeps, each once, frozen weights and LoRA not counted."""
    own = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = step.diffusion_loss(unet, **inputs(unet, batch))
    assert losses.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("batch", [1, 3])
def test_what_the_lean_step_keeps(unet_of, base, batch):
    unet, parameters = unet_of()
    lean.Lean(unet, parameters, memory.Rung(batch))
    shape = predict.shape(base, SIDE)
    kept = sum(predict.cost(layer, batch, RANK, 4).kept for layer in shape.layers)
    kept += batch * predict.TOKENS * shape.text
    assert kept * 4 == pytest.approx(kept_bytes(unet, batch), rel=0.01)
