"""The training step: its loss, and what each update sees."""

import numpy as np
import pytest
import torch

from naruto_lora import checkpoint, lora, models, recipe, step, train

CPU = torch.device("cpu")
SHAPE = (4, 8, 8)


def test_the_loss_is_ddpms_by_diffusers_own_scheduler(base, encoded):
    from diffusers import DDPMScheduler

    unet, alphas = models.load_unet(base, torch.float32, CPU), models.load_alphas_cumprod(base)
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    noise = torch.randn(4, *encoded.shapes[0], generator=torch.Generator().manual_seed(5))
    timesteps = torch.tensor([0, 250, 700, 999])
    no = torch.zeros(4, dtype=torch.bool)
    inputs = encoded.batch(range(4), torch.zeros_like(noise), dropped=no, flipped=no, device=CPU)
    with torch.no_grad():
        losses = step.diffusion_loss(unet, **inputs, timesteps=timesteps, noise=noise, alphas_cumprod=alphas)
        noisy = scheduler.add_noise(inputs["latents"], noise, timesteps)
        added = {"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]}
        predicted = unet(noisy, timesteps, inputs["prompt_embeds"], added_cond_kwargs=added).sample
    expected = torch.stack([torch.nn.functional.mse_loss(p, n) for p, n in zip(predicted, noise, strict=True)])
    assert losses.shape == (4,)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-7)


def test_the_noise_schedule_stays_fp32_under_a_half_precision_unet():
    """A U-Net that returns its input: it shows how precise the noisy latents are."""

    class Mirror(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float16))

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


class Scale(torch.nn.Module):
    """A U-Net that scales its input by one weight, and can be told to recompute."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight, self.device, self.recomputes = torch.nn.Parameter(torch.full((1,), 0.5, dtype=dtype)), CPU, None

    def forward(self, sample, timesteps, encoder_hidden_states, added_cond_kwargs):
        return type("Output", (), {"sample": sample * self.weight})

    def enable_gradient_checkpointing(self):
        self.recomputes = True

    def disable_gradient_checkpointing(self):
        self.recomputes = False


def test_the_plain_engine_recomputes_only_when_it_is_told_to():
    for asked, told in (({}, False), ({"recompute": False}, False), ({"recompute": True}, True)):
        unet = Scale()
        step.Plain(unet, [], **asked)
        assert unet.recomputes is told


def test_the_plain_engine_runs_a_half_precision_unet_under_autocast_and_no_other():
    for dtype, half in ((torch.float16, True), (torch.float32, False)):
        with step.Plain(Scale(dtype), []).context():
            assert torch.is_autocast_enabled("cpu") == half
            assert not half or torch.get_autocast_dtype("cpu") == torch.float16


def test_the_plain_engine_adds_up_gradients_weighted_by_the_seed():
    unet = Scale()
    engine, seed = step.Plain(unet, [unet.weight]), torch.tensor([0.25, 2.0])
    latents, noise = torch.randn(2, 2, *SHAPE, generator=torch.Generator().manual_seed(3))
    inputs = {
        "latents": latents, "prompt_embeds": torch.zeros(2, 3, 5), "pooled": torch.zeros(2, 2),
        "time_ids": torch.zeros(2, 6), "timesteps": torch.tensor([1, 0]), "noise": noise,
        "alphas_cumprod": torch.tensor([0.75, 0.19]),
    }  # fmt: skip
    signal, share = torch.tensor([0.19, 0.75]).view(2, 1, 1, 1).sqrt(), torch.tensor([0.9, 0.5]).view(2, 1, 1, 1)
    noisy = signal * latents + share * noise  # at the timesteps 1 and 0
    left = 0.5 * noisy - noise
    gradient = (seed * (2 * left * noisy).mean(dim=(1, 2, 3))).sum()
    losses = engine.accumulate(inputs, seed)
    torch.testing.assert_close(losses, left.square().mean(dim=(1, 2, 3)))
    assert not losses.requires_grad
    torch.testing.assert_close(unet.weight.grad, gradient[None])
    engine.accumulate(inputs, seed)
    torch.testing.assert_close(unet.weight.grad, 2 * gradient[None])
    engine.refresh()
    assert engine.release() is False and list(engine.notes) == []
    engine.zero_grad()
    assert unet.weight.grad is None


def small(**changes):
    plan = recipe.Recipe("small", (recipe.Leg(1000, 1e-3),), batch=2, accumulation=4, resolution=64, precision="fp32")
    return plan.replace(**changes)


def stacked(draw, name):
    return torch.stack(getattr(draw, name))


def test_1221_pictures_at_8_a_step_are_153_steps_an_epoch():
    assert step.steps_per_epoch(1221, recipe.RECIPES["naruto-1024"]) == 153
    assert [len(step.draw(small(), k, [SHAPE] * 1221).indices) for k in (0, 151, 152, 153, 305)] == [8, 8, 5, 8, 5]


def test_every_epoch_is_another_permutation():
    plan, orders = small(), []
    for epoch in range(3):
        draws = [step.draw(plan, epoch * 4 + k, [SHAPE] * 30) for k in range(4)]
        assert [len(d.indices) for d in draws] == [8, 8, 8, 6]
        orders.append(np.concatenate([d.indices for d in draws]).tolist())
        assert sorted(orders[-1]) == list(range(30))
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_draw_depends_only_on_seed_and_step():
    first = step.draw(small(), 7, [SHAPE] * 30)
    torch.randn(5)
    np.random.seed(3)
    again = step.draw(small(batch=8, accumulation=1, rank=3), 7, [SHAPE] * 30)
    for name in ("timesteps", "dropped", "flipped"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    for name in ("noise", "latent_noise"):
        assert torch.equal(stacked(first, name), stacked(again, name)), name
    assert (first.indices == again.indices).all()
    for other in (step.draw(small(), 8, [SHAPE] * 30), step.draw(small(seed=1), 7, [SHAPE] * 30)):
        assert not torch.equal(stacked(first, "noise"), stacked(other, "noise"))
        assert not torch.equal(first.timesteps, other.timesteps)
    assert not torch.equal(stacked(first, "noise"), stacked(first, "latent_noise"))
    assert stacked(first, "noise").std().item() == pytest.approx(1, abs=0.05)


def test_a_draw_stays_what_it_was_when_older_runs_were_begun():
    """A run that resumes under a newer version must see what it would have seen."""
    plan = small(seed=5)
    for k, epoch, place in ((0, 0, 0), (5, 1, 1), (7, 1, 3)):
        order = np.random.default_rng((5, epoch, 0)).permutation(30)
        rng = np.random.default_rng((5, k, 1))
        draw, count = step.draw(plan, k, [SHAPE] * 30), min(8, 30 - 8 * place)
        assert (draw.indices == order[8 * place : 8 * place + 8]).all()
        timesteps = (rng.permutation(count) + rng.random(count)) / count * 1000
        assert draw.timesteps.tolist() == timesteps.astype(int).tolist() and draw.timesteps.dtype == torch.int64


@pytest.mark.parametrize("bad, names", [
    ([1], ["1"]), ([0, 3, 4, 5], ["0", "3", "4", "5"]), ([0, 1, 2, 4, 5], ["0", "1", "2", "4", "1 more"]),
    ([], ["0", "1", "2", "3", "2 more"]),
])  # fmt: skip
def test_what_is_not_finite_is_named_four_at_most(bad, names):
    draw = step.draw(small(batch=2, accumulation=3), 2, [SHAPE] * 30)
    pictures = tuple(f"picture {n}" for n in range(30))
    losses = [float("nan") if k in bad else 1.0 for k in range(6)]
    expected = [f"'picture {draw.indices[int(name)]}' (timestep {draw.timesteps[int(name)]})" if name.isdigit()
                else name for name in names]
    text = step.describe_not_finite(3, draw, losses, pictures)
    what = "loss is" if bad else "gradients are"
    assert text.startswith(f"step 3: the {what} not finite for {' and '.join(expected)}; the run stops")


def test_timesteps_are_stratified_and_reach_both_ends():
    seen = []
    for k in range(300):
        timesteps = step.draw(small(), k, [SHAPE] * 8).timesteps
        assert sorted(timesteps // 125) == list(range(8))  # one in each eighth of 0..999
        seen.append(timesteps)
    seen = torch.stack(seen)
    assert seen.min() < 10 and seen.max() > 989
    assert (seen[:, 0] // 125).unique().numel() == 8  # in no fixed order


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_captions_are_dropped_at_their_rate(rate):
    dropped = torch.cat([step.draw(small(caption_dropout=rate), k, [(1, 1, 1)] * 8).dropped for k in range(500)])
    assert abs(dropped.float().mean().item() - rate) < 4 * (rate * (1 - rate) / 4000) ** 0.5 + 1e-9


def reference(recipe, k, count, shape):
    """(noise, latent noise, dropped) of the generators of (seed, step), for one shape, without flips."""
    rng = np.random.default_rng((recipe.seed, k, 1))
    rng.permutation(count), rng.random(count)  # the timesteps'
    dropped = rng.random(count) < recipe.caption_dropout
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    return *torch.randn(2, count, *shape, generator=generator), torch.from_numpy(dropped)


@pytest.mark.parametrize("shape", [SHAPE, (4, 3, 5), (1, 1, 1)])
def test_pictures_of_one_shape_get_the_noise_of_one_tensor_with_and_without_flips(shape):
    for k, count in ((0, 8), (3, 6)):  # the second is an epoch's short last update
        noise, latent_noise, dropped = reference(small(), k, count, shape)
        for flip in (False, True):
            draw = step.draw(small(flip=flip), k, [shape] * 30)
            assert torch.equal(stacked(draw, "noise"), noise)
            assert torch.equal(stacked(draw, "latent_noise"), latent_noise)
            assert torch.equal(draw.dropped, dropped)


def test_about_half_of_the_draws_are_flipped_and_none_without_flip():
    for flip, rate in ((True, 0.5), (False, 0.0)):
        flipped = torch.cat([step.draw(small(flip=flip), k, [(1, 1, 1)] * 8).flipped for k in range(500)])
        assert flipped.dtype == torch.bool
        assert abs(flipped.float().mean().item() - rate) < 4 * (rate * (1 - rate) / 4000) ** 0.5 + 1e-9


def test_micro_batches_have_one_shape_and_each_position_once():
    square, wide = SHAPE, (4, 6, 10)
    shapes = [(square, wide)[i % 3 == 0] for i in range(30)]
    draw = step.draw(small(), 1, shapes)
    assert [part.shape for part in draw.noise] == [shapes[i] for i in draw.indices]
    assert [part.shape for part in draw.latent_noise] == [shapes[i] for i in draw.indices]
    parts = step.micro_batches(draw, shapes, 3)
    assert sorted(position for part in parts for position in part) == list(range(8))
    assert all(len({shapes[draw.indices[position]] for position in part}) == 1 and len(part) <= 3 for part in parts)
    same = step.draw(small(), 1, [square] * 30)
    assert step.micro_batches(same, [square] * 30, 3) == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_gradients_over_mixed_shapes_are_the_mean_over_single_pictures(mixed, base, tmp_path):
    bucketed, encoded = mixed
    assert len(set(encoded.shapes)) == 3
    unet = models.load_unet(base, torch.float32, CPU)
    folder = checkpoint.RunFolder(tmp_path)
    run = train.Run(bucketed, unet, lora.inject(unet, 4, 10.0, 0), encoded, encoded.part(0, 0), folder)
    draw = step.draw(bucketed, 0, encoded.shapes)
    assert draw.flipped.any() and not draw.flipped.all()
    losses = run._accumulate(draw)
    gradient = torch.cat([p.grad.flatten() for p in run.parameters])
    run.unet.zero_grad()
    singles = []
    for k in range(6):
        one = slice(k, k + 1)
        inputs = encoded.batch(draw.indices[one], draw.latent_noise[one], draw.dropped[one], draw.flipped[one], CPU)
        singles.append(step.diffusion_loss(
            unet, **inputs, timesteps=draw.timesteps[one], noise=draw.noise[k][None], alphas_cumprod=run.alphas_cumprod
        ))
    torch.cat(singles).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in run.parameters])
    torch.testing.assert_close(losses, torch.cat(singles).detach(), rtol=1e-4, atol=1e-6)  # in the draw's order
    assert (gradient - expected).norm() < 1e-4 * expected.norm() and expected.norm() > 0
