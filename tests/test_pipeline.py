"""Pictures: the base untouched by an adapter that is off, the adapter the same in a plain diffusers pipeline."""

import numpy as np
import pytest
import torch

from naruto_lora import pipeline

PROMPTS = ["a woman with long red hair smiling", "a bearded man with glasses in front of a blue wall"]
FEW = dict(steps=3, guidance_scale=2.0, resolution=32, batch=2)


def draw(pipe, *rest, **options):
    """(N, H, W, 3) of what `pipeline.draw` gives."""
    return np.stack([np.asarray(p) for p in pipeline.draw(pipe, PROMPTS, [3, 4], *rest, **{**FEW, **options})])


def draw_plainly(base, adapter=None):
    """The same by diffusers alone."""
    from diffusers import StableDiffusionXLPipeline

    plain = StableDiffusionXLPipeline.from_pretrained(base, torch_dtype=torch.float32, add_watermarker=False)
    plain.set_progress_bar_config(disable=True)
    if adapter:
        plain.load_lora_weights(adapter)
    images = plain(
        PROMPTS, generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)], num_inference_steps=3,
        guidance_scale=2.0, height=32, width=32,
    ).images
    return np.stack([np.asarray(image) for image in images])


@pytest.fixture(scope="module")
def untouched(base):
    """Pictures of a base that has never met an adapter."""
    return draw(pipeline.load(base))


def test_adapter_off_is_the_untouched_base_bit_for_bit(pipe, untouched, base):
    styled = draw(pipe, "style")
    assert (draw(pipe) == untouched).all()
    assert (draw(pipe, "style", 0) == untouched).all()
    assert (draw(pipe, "style", 0.0) == untouched).all()
    assert (draw(pipe, "style") == styled).all()  # and on again
    assert (untouched == draw_plainly(base)).all()


def test_the_saved_adapter_draws_the_same_in_plain_diffusers(pipe, trained, base, untouched):
    ours, theirs = draw(pipe, "style"), draw_plainly(base, trained.folder)
    assert (ours == theirs).all()
    assert np.abs(ours.astype(int) - untouched).mean() > 10  # the LoRA matters, so this says something


def test_the_scale_acts_by_degrees(pipe, untouched):
    apart = [np.abs(draw(pipe, "style", scale).astype(int) - untouched).mean() for scale in (0.1, 0.5, 1.0)]
    assert 0 < apart[0] < apart[1] < apart[2]


def test_two_adapters_stay_apart(pipe, trained):
    styled = draw(pipe, "style")
    pipeline.add_adapter(pipe, "second", trained.adapter)  # the file, where the folder was given before
    try:
        assert (draw(pipe, "second") == styled).all() and (draw(pipe, "style") == styled).all()
        pipeline.use_adapter(pipe, "second", 0.5)
        assert pipe.get_active_adapters() == ["second"]
    finally:
        pipe.delete_adapters("second")


def test_a_seed_means_one_picture_whatever_the_batch(pipe):
    together, one_by_one = draw(pipe), draw(pipe, batch=1)
    assert np.abs(together.astype(int) - one_by_one).max() <= 2
    assert (together[0] != together[1]).any()
    same = pipeline.draw(pipe, [PROMPTS[0]] * 2, 3, **FEW)
    assert same[0].tobytes() == same[1].tobytes() == draw(pipe)[0].tobytes()


def test_every_scheduler_draws_with_sdxls_noise_schedule(pipe):
    schedule, drawn = pipe.scheduler.alphas_cumprod, {}
    for name in pipeline.SCHEDULERS:
        drawn[name] = draw(pipe, scheduler=name).tobytes()
        assert type(pipe.scheduler).__name__ == pipeline.SCHEDULERS[name][0]
        torch.testing.assert_close(pipe.scheduler.alphas_cumprod, schedule)
        assert pipe.scheduler.config.prediction_type == "epsilon"
    assert len(set(drawn.values())) == len(pipeline.SCHEDULERS)
    assert draw(pipe, scheduler="euler").tobytes() == drawn["euler"]  # nothing of the others has stuck


def test_it_tells_how_far_it_is(pipe):
    told = []
    pipeline.draw(pipe, PROMPTS, 0, show=lambda *news: told.append(news), **FEW | {"batch": 1})
    assert told == [("drawing base", 1, 2), ("drawing base", 2, 2)]


def test_decoded_tensors_become_pictures():
    images = torch.zeros(2, 3, 4, 6)
    images[0, 0], images[1] = 1.2, -3
    first, second = pipeline.to_pictures(images)
    assert first.size == (6, 4) and first.getpixel((0, 0)) == (255, 128, 128)
    assert second.getpixel((5, 3)) == (0, 0, 0)
