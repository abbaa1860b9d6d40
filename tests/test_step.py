"""The training step: its loss, and what each update sees."""

import numpy as np
import pytest
import torch

from naruto_lora import models, recipe, step

CPU = torch.device("cpu")
SHAPE = (4, 8, 8)


def test_the_loss_is_ddpms_by_diffusers_own_scheduler(base, encoded):
    from diffusers import DDPMScheduler

    unet, alphas = models.load_unet(base, torch.float32, CPU), models.load_alphas_cumprod(base)
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    noise = torch.randn(4, *encoded.shape, generator=torch.Generator().manual_seed(5))
    timesteps = torch.tensor([0, 250, 700, 999])
    inputs = encoded.batch(range(4), torch.zeros_like(noise), torch.zeros(4, dtype=torch.bool), CPU)
    with torch.no_grad():
        losses = step.diffusion_loss(unet, **inputs, timesteps=timesteps, noise=noise, alphas_cumprod=alphas)
        noisy = scheduler.add_noise(inputs["latents"], noise, timesteps)
        added = {"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]}
        predicted = unet(noisy, timesteps, inputs["prompt_embeds"], added_cond_kwargs=added).sample
    expected = torch.stack([torch.nn.functional.mse_loss(p, n) for p, n in zip(predicted, noise, strict=True)])
    assert losses.shape == (4,)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-7)


def test_the_noise_schedule_stays_fp32_under_a_half_precision_unet():
    """A U-Net that gives back what it is shown: the loss says how exactly the noisy latents were made."""

    class Mirror(torch.nn.Module):
        dtype = torch.float16

        def forward(self, sample, timesteps, encoder_hidden_states, added_cond_kwargs):
            assert sample.dtype == encoder_hidden_states.dtype == torch.float16
            self.seen = sample
            return type("Output", (), {"sample": sample})

    alphas = torch.linspace(1 - 1e-5, 0.99, 1000)  # in fp16 the first of them would be 1: no noise at all
    mirror, noise = Mirror(), torch.ones(1, *SHAPE)
    step.diffusion_loss(
        mirror, torch.zeros(1, *SHAPE), torch.zeros(1, 3, 5), torch.zeros(1, 2), torch.zeros(1, 6),
        torch.tensor([0]), noise, alphas,
    )
    assert mirror.seen.mean().item() == pytest.approx(1e-5**0.5, rel=0.02)


def small(**changes):
    plan = recipe.Recipe("small", (recipe.Leg(1000, 1e-3),), batch=2, accumulation=4, resolution=64, precision="fp32")
    return plan.replace(**changes)


def test_1221_pictures_at_8_a_step_are_153_steps_an_epoch():
    assert step.steps_per_epoch(1221, recipe.RECIPES["naruto-1024"]) == 153
    assert [len(step.draw(small(), k, 1221, SHAPE).indices) for k in (0, 151, 152, 153, 305)] == [8, 8, 5, 8, 5]


def test_every_epoch_is_another_permutation():
    plan, orders = small(), []
    for epoch in range(3):
        draws = [step.draw(plan, epoch * 4 + k, 30, SHAPE) for k in range(4)]
        assert [len(d.indices) for d in draws] == [8, 8, 8, 6]
        orders.append(np.concatenate([d.indices for d in draws]).tolist())
        assert sorted(orders[-1]) == list(range(30))
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_draw_depends_on_seed_and_step_alone():
    first = step.draw(small(), 7, 30, SHAPE)
    torch.randn(5)
    np.random.seed(3)
    again = step.draw(small(batch=8, accumulation=1, rank=3), 7, 30, SHAPE)
    for name in ("timesteps", "noise", "latent_noise", "dropped"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    assert (first.indices == again.indices).all()
    for other in (step.draw(small(), 8, 30, SHAPE), step.draw(small(seed=1), 7, 30, SHAPE)):
        assert not torch.equal(first.noise, other.noise) and not torch.equal(first.timesteps, other.timesteps)
    assert not torch.equal(first.noise, first.latent_noise)
    assert first.noise.std().item() == pytest.approx(1, abs=0.05)


def test_timesteps_are_stratified_and_reach_both_ends():
    seen = []
    for k in range(300):
        timesteps = step.draw(small(), k, 8, SHAPE).timesteps
        assert sorted(timesteps // 125) == list(range(8))  # one in each eighth of 0..999
        seen.append(timesteps)
    seen = torch.stack(seen)
    assert seen.min() < 10 and seen.max() > 989
    assert (seen[:, 0] // 125).unique().numel() == 8  # in no fixed order


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_captions_are_dropped_at_their_rate(rate):
    dropped = torch.cat([step.draw(small(caption_dropout=rate), k, 8, (1, 1, 1)).dropped for k in range(500)])
    assert abs(dropped.float().mean().item() - rate) < 4 * (rate * (1 - rate) / 4000) ** 0.5 + 1e-9


def test_holdout_losses_are_the_same_whatever_the_batch_and_the_random_state(base, encoded):
    unet, alphas = models.load_unet(base, torch.float32, CPU), models.load_alphas_cumprod(base)
    one = step.holdout_losses(unet, encoded, alphas, CPU, batch=3, draws=2)
    torch.manual_seed(77)
    two = step.holdout_losses(unet, encoded, alphas, CPU, batch=len(encoded), draws=2)
    assert one.shape == (len(encoded), 2)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert not one.requires_grad
