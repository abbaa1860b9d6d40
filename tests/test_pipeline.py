"""Pictures: an inactive adapter leaves the base unchanged; an active one draws the same in plain diffusers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from naruto_lora import lora, pipeline

PROMPTS = ["a woman with long red hair smiling", "a bearded man with glasses in front of a blue wall"]
FEW = dict(steps=3, guidance_scale=2.0, resolution=32, batch=2)


def draw(pipe, *rest, **options):
    """The pictures of `pipeline.draw` as (N, H, W, 3)."""
    return np.stack([np.asarray(p) for p in pipeline.draw(pipe, PROMPTS, [3, 4], *rest, **{**FEW, **options})])


def draw_plainly(base, adapter=None):
    """The same pictures with diffusers only."""
    from diffusers import StableDiffusionXLPipeline

    plain = StableDiffusionXLPipeline.from_pretrained(base, torch_dtype=torch.float32, add_watermarker=False)
    plain.set_progress_bar_config(disable=True)
    if adapter:
        plain.load_lora_weights(adapter, weight_name=lora.FILE)
    options = dict(num_inference_steps=3, guidance_scale=2.0, height=32, width=32)
    images = [plain(prompt, generator=torch.Generator().manual_seed(seed), **options).images[0]
              for prompt, seed in zip(PROMPTS, (3, 4), strict=True)]
    return np.stack([np.asarray(image) for image in images])


@pytest.fixture(scope="module")
def plain_pipe(base):
    """A pipeline that never had an adapter."""
    return pipeline.load(base)


@pytest.fixture(scope="module")
def untouched(plain_pipe):
    """The base's pictures."""
    return draw(plain_pipe)


def test_adapter_off_is_the_untouched_base_bit_for_bit(pipe, untouched, plain_pipe, base):
    styled = draw(pipe, "style")
    assert (draw(pipe) == untouched).all()
    assert (draw(pipe, "style", 0) == untouched).all()
    assert (draw(pipe, "style", 0.0) == untouched).all()
    assert (draw(pipe, "style") == styled).all()  # and on again
    assert (draw(plain_pipe, batch=1) == draw_plainly(base)).all()


def test_the_saved_adapter_draws_the_same_in_plain_diffusers(pipe, trained, base, untouched):
    ours, theirs = draw(pipe, "style", batch=1), draw_plainly(base, trained.folder)
    assert (ours == theirs).all()
    assert np.abs(ours.astype(int) - untouched).mean() > 10  # the LoRA has an effect, so the comparison means something


def test_a_larger_scale_changes_pictures_more(pipe, untouched):
    changes = [np.abs(draw(pipe, "style", scale).astype(int) - untouched).mean() for scale in (0.1, 0.5, 1.0)]
    assert 0 < changes[0] < changes[1] < changes[2]


def test_two_adapters_do_not_mix(pipe, trained):
    styled = draw(pipe, "style")
    pipeline.add_adapter(pipe, "second", trained.adapter)  # its file instead of its folder
    try:
        assert (draw(pipe, "second") == styled).all() and (draw(pipe, "style") == styled).all()
        assert pipeline.use_adapter(pipe, "second", 0.5) == {"second": 0.5}
        assert pipe.get_active_adapters() == ["second"]
        pipeline.add_adapter(pipe, "second", trained.folder)  # the same LoRA again: nothing to do
        halves = draw(pipe, {"style": 0.25, "second": 0.75, "base": 1})
        assert np.abs(halves.astype(int) - styled).max() <= 2  # the same LoRA twice, with weights that add up to 1
        assert pipeline.use_adapter(pipe, {"style": 1, "second": 0}, 0.5) == {"style": 0.5}
    finally:
        pipe.delete_adapters("second")


def test_a_seed_gives_the_same_picture_in_any_batch(pipe):
    batched, one_by_one = draw(pipe), draw(pipe, batch=1)
    assert np.abs(batched.astype(int) - one_by_one).max() <= 2
    assert (batched[0] != batched[1]).any()
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
    assert draw(pipe, scheduler="euler").tobytes() == drawn["euler"]  # no option of the others is left


def test_batches_are_even_and_no_larger_than_the_limit():
    assert [s.stop - s.start for s in pipeline.even_batches(7, 3)] == [2, 2, 3]
    assert [s.stop - s.start for s in pipeline.even_batches(16, 12)] == [8, 8]
    assert pipeline.even_batches(0, 4) == [] and pipeline.even_batches(2, 4) == [slice(0, 2)]


def test_on_a_gpu_the_batch_is_what_fits_in_memory(monkeypatch):
    """Several at 1024 px on a T4 with the fp16 pipeline; at least one; on a large card no more than is useful."""
    pipe = SimpleNamespace(unet=SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16))
    sizes = {}
    for free in (0, 7, 100):
        monkeypatch.setattr(pipeline.gpu, "available", lambda device, free=free: free * 2**30)
        sizes[free] = [pipeline.batch_size(pipe, side) for side in (1024, 512)]
    assert sizes[0] == [1, 1] and 1 < sizes[7][0] < sizes[7][1] <= 16 and sizes[7][0] < sizes[100][0] <= 16
    assert pipeline.batch_size(pipe, 1024, 3) == 3  # a requested size is used


def test_texts_are_encoded_once_for_base_and_lora(base, trained, monkeypatch):
    pipe, encoded = pipeline.load(base, adapters={"style": trained.folder}), []
    whole = pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda prompt=None, *rest, **options: (
        encoded.append(prompt), whole(prompt, *rest, **options))[1])
    prompts, seeds = pipeline.cross(PROMPTS, [3, 4, 5])
    assert prompts == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3 and seeds == [3, 4, 5] * 2
    for adapter in ("base", "style"):
        pipeline.draw(pipe, prompts, seeds, adapter, **FEW)
    assert sorted(filter(None, encoded)) == sorted(PROMPTS)  # each once; None: embeddings were given


def test_lcm_needs_its_adapter(pipe, trained):
    with pytest.raises(ValueError, match=r"'lcm' needs its LoRA: pipeline.add_adapter\(pipe, 'lcm'"):
        pipeline.set_scheduler(pipe, "lcm")
    pipeline.add_adapter(pipe, "lcm", trained.folder)
    try:
        with pytest.raises(ValueError, match="'lcm' needs adapter 'lcm' in use"):
            draw(pipe, "style", scheduler="lcm")
        assert draw(pipe, {"style": 0.5, "lcm": 1}, scheduler="lcm", guidance_scale=1.0).any()
        assert type(pipe.scheduler).__name__ == "LCMScheduler"
    finally:
        pipe.delete_adapters("lcm")
        pipeline.set_scheduler(pipe, "euler")


@pytest.mark.parametrize("interval, halves", [((0.0, 0.5), [2, 2, 1, 1]), ((0.5, 1.0), [1, 1, 2, 2]),
                                              ((0.25, 0.5), [1, 2, 1, 1]), ((0.0, 1.0), [2, 2, 2, 2])])
def test_guidance_in_a_part_of_the_steps(pipe, interval, halves, monkeypatch):
    """Steps without guidance see only the prompt, half the batch; steps with guidance do not change."""
    seen, forward = [], pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda sample, *rest, **options: (
        seen.append(len(sample)), forward(sample, *rest, **options))[1])
    drawn = draw(pipe, steps=4, guidance_interval=interval)
    assert seen == [2 * half for half in halves]
    plain = draw(pipe, steps=4)
    assert (drawn == plain).all() == (interval == (0.0, 1.0))
    none = draw(pipe, steps=4, guidance_interval=(0.0, 0.0))
    assert (none == draw(pipe, steps=4, guidance_scale=1.0)).all()
    if interval == (0.0, 1.0):
        return
    changes = [np.abs(drawn.astype(int) - other).mean() for other in (plain, none)]
    assert min(changes) > 0 and max(changes) < np.abs(plain.astype(int) - none).mean() * 1.5  # in between


def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(base, monkeypatch):
    pipe, whole, sizes, notes = pipeline.load(base), pipeline._draw_batch, [], []

    def scarce(pipe, settings, step_done):
        sizes.append(len(settings))
        if len(settings) > 2 or (len(settings) == 1 and not pipe.vae.use_tiling):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(pipe, settings, step_done)

    class Show:
        def __call__(self, phase, done, total):
            pass

        def note(self, text):
            notes.append(text)

    prompts, seeds = pipeline.cross(PROMPTS, [0, 1, 2])
    expected = pipeline.draw(pipe, prompts, seeds, **FEW | {"batch": 1})
    monkeypatch.setattr(pipeline, "_draw_batch", scarce)
    drawn = pipeline.draw(pipe, prompts, seeds, **FEW | {"batch": 5}, show=Show())
    assert sizes == [3, 1, 1, 2, 1, 2] and len(notes) == 2  # a single picture in tiles
    assert drawn[1].info["settings"]["batch"] == [2, 0]
    for one, two in zip(drawn, expected, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(two, int)).max() <= 2
    sizes.clear()
    pipeline.draw(pipe, prompts, seeds, **FEW | {"batch": 5})
    assert sizes == [2] * 3  # a size that ran out of memory isn't tried again
    monkeypatch.setattr(pipeline, "_draw_batch", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(RuntimeError, match="memory does not hold one picture of 32 px; choose a lower resolution"):
        pipeline.draw(pipe, prompts[:1], **FEW)


def test_it_reports_progress_at_each_step(pipe):
    reports = []
    pipeline.draw(pipe, PROMPTS, 0, "style", show=lambda *report: reports.append(report), **FEW | {"batch": 1})
    assert reports == [("drawing style", step, 6) for step in range(1, 7)]


def test_it_stops_when_asked_and_stays_usable(pipe, untouched):
    """Stopped in the second picture: Stopped has the first; the next call is not affected, not even its guidance."""
    asked = []
    with pytest.raises(pipeline.Stopped) as caught:
        pipeline.draw(pipe, PROMPTS, [3, 4], "style", guidance_interval=(0.0, 0.3), **FEW | {"batch": 1},
                      stop=lambda: asked.append(1) or len(asked) == 5)
    assert len(caught.value.pictures) == 1 and len(asked) == 5
    assert (draw(pipe) == untouched).all()


def test_an_interrupt_leaves_it_usable(pipe, untouched, monkeypatch):
    """Also during decoding, when a VAE that overflows in fp16 has another dtype."""
    def interrupted(*_, **__):
        pipe.vae.to(torch.float64)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipe.vae, "decode", interrupted)
        draw(pipe, "style")
    assert (draw(pipe) == untouched).all()


def test_prompts_come_from_lists_files_and_the_holdout(tmp_path, plan, examples):
    assert pipeline.read_prompts(PROMPTS) == PROMPTS
    (tmp_path / "prompts.txt").write_text("\ufeff" + PROMPTS[0] + "\n\n" + PROMPTS[1] + "\n", encoding="utf-8")
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    for name in ("prompts.txt", "prompts.json"):
        assert pipeline.read_prompts(tmp_path / name) == PROMPTS
    assert pipeline.holdout_prompts(plan.dataset, plan.holdout) == [example.caption for example in examples[1]]
    assert len(pipeline.holdout_prompts(plan.dataset, 0)) == sum(map(len, examples))
    for content in ("", "{", '{"a": 1}', "[1, 2]"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="bad.json' holds no prompts; a .txt needs one per line"):
            pipeline.read_prompts(tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError, match="no file '.*none.txt'"):
        pipeline.read_prompts(tmp_path / "none.txt")


def test_decoded_tensors_become_pictures():
    images = torch.zeros(2, 3, 4, 6)
    images[0, 0], images[1] = 1.2, -3
    first, second = pipeline.to_pictures(images)
    assert first.size == (6, 4) and first.getpixel((0, 0)) == (255, 128, 128)
    assert second.getpixel((5, 3)) == (0, 0, 0)
