"""This machine's speed, measured in under a minute: by precision, and for a recipe."""

from __future__ import annotations

import time

import torch
from torch.nn.functional import conv2d

from .. import lora, models
from . import gpu, lean
from . import plan as plans
from .fallback import Rung, make_engine

SIDE = 4096  # of the square matrices that are multiplied
WARM, TIMED = 3, 3  # micro-steps before the measurement, and in it


def precisions(side: int = SIDE) -> list[dict]:
    """Table rows: TFLOP/s of a matrix product and of a 3 x 3 convolution in each precision, and the gain over fp32.

    On a CPU only in fp32.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    rows: list[dict] = []
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        if cuda or name == "fp32":
            a = torch.randn(side, side, device=device, dtype=dtype)
            x = torch.randn(1, side // 16, side // 64, side // 64, device=device, dtype=dtype)
            kernel = torch.randn(side // 16, side // 16, 3, 3, device=device, dtype=dtype)
            products = 2 * side**3 / _seconds(lambda a=a: a @ a, device)
            flops = 2 * 9 * (side // 16) ** 2 * (side // 64) ** 2
            convolved = flops / _seconds(lambda x=x, k=kernel: conv2d(x, k, padding=1), device)
            rows.append({"precision": name, "matrix product": products, "convolution": convolved})
    slowest = rows[-1]
    return [
        {"precision": row["precision"]}
        | {f"{what}, TFLOP/s": f"{row[what] / 1e12:.3g}" for what in ("matrix product", "convolution")}
        | {"against fp32": f"{row['matrix product'] / slowest['matrix product']:.2g} x"}
        for row in rows
    ]


def _seconds(work, device, least: float = 0.3) -> float:
    """Seconds of `work()`: the mean over as many calls as take `least` seconds."""
    work()
    count = 1
    while True:
        _wait(device)
        begun = time.perf_counter()
        for _ in range(count):
            work()
        _wait(device)
        took = time.perf_counter() - begun
        if took >= least:
            return took / count
        count = max(2 * count, int(count * least / max(took, 1e-4)))


def _wait(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def steps(recipes, show=None) -> list[dict]:
    """Table rows: the time of each recipe's steps on this machine, on random inputs.

    Each is measured on the rung that `plan.plan` chooses, but not compiled, as compiling would take too long.
    The recipes share a base. Raises what loading the U-Net raises.
    """
    recipes = list(recipes)
    device = models.device_for(recipes[0].precision)
    chosen = [plans.here(recipe, steps_left=0).rung for recipe in recipes]
    unet = models.load_unet(recipes[0].base, models.DTYPES[recipes[0].precision], device)
    rows: list[dict] = []
    for number, (recipe, rung) in enumerate(zip(recipes, chosen, strict=True)):
        seconds = _micro_step(unet, recipe, rung, device)
        a_step = seconds * recipe.pictures_per_step / rung.batch
        rows.append(
            {
                "recipe": recipe.name,
                "micro-batch": rung.batch,
                "ms a micro-batch": f"{seconds * 1000:,.0f}",
                "s a step": f"{a_step:.3g}",
                "minutes in total": f"{a_step * recipe.steps / 60:,.0f}",
                "GiB": "-" if device.type == "cpu" else f"{gpu.peak_gib():.1f}",
            }
        )
        unet.delete_adapters("default")
        if show:
            show("measuring", number + 1, len(recipes))
    return rows


def _micro_step(unet, recipe, rung, device) -> float:
    """Seconds of one micro-step of `recipe` as `rung` says, on random inputs."""
    gpu.reset_peak()
    parameters = lora.inject(unet, recipe.rank, recipe.alpha)
    if rung.lean and lean.unsupported(unet):
        rung = Rung(rung.batch, rung.recompute, lean=False)
    engine = make_engine(unet, parameters, rung)
    side = recipe.resolution // models.vae_scale_factor(recipe.base, recipe.vae)
    inputs = random_inputs(unet, rung.batch, side, device)
    inputs["alphas_cumprod"] = models.load_alphas_cumprod(recipe.base).to(device)
    seed = torch.ones(rung.batch, device=device)
    for _ in range(WARM):
        engine.accumulate(inputs, seed)
    _wait(device)
    begun = time.perf_counter()
    for _ in range(TIMED):
        engine.accumulate(inputs, seed)
    _wait(device)
    return (time.perf_counter() - begun) / TIMED


def random_inputs(unet, batch: int, side: int, device, tokens: int = 77) -> dict[str, torch.Tensor]:
    """The inputs of `step.diffusion_loss` without the noise schedule, for `unet`: latents (B, 4, side, side)."""
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    latents, noise = torch.randn(2, batch, config.in_channels, side, side, device=device)
    return {
        "latents": latents,
        "noise": noise,
        "prompt_embeds": torch.randn(batch, tokens, config.cross_attention_dim, device=device),
        "pooled": torch.randn(batch, pooled, device=device),
        "time_ids": torch.tensor([[8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side]] * batch, device=device),
        "timesteps": torch.randint(1000, (batch,), device=device),
    }
