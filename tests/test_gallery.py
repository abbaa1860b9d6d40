"""Pictures on disk: each has its settings as metadata, can be redrawn from its file, and isn't drawn twice."""

import json
import os
import resource

import numpy as np
import pytest
from PIL import Image

from naruto_lora import gallery, pipeline

PROMPTS = ["a woman with long red hair, smiling", "ein Mädchen mit Brille 少女", "a man"]
FEW = dict(steps=3, guidance_scale=2.0, resolution=32)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def counted(monkeypatch):
    """The sizes of the batches that are drawn."""
    sizes, whole = [], pipeline._draw_batch
    monkeypatch.setattr(pipeline, "_draw_batch", lambda pipe, settings, *rest: (
        sizes.append(len(settings)), whole(pipe, settings, *rest))[1])
    return sizes


@pytest.mark.parametrize("options", [dict(batch=3), dict(batch=2, scheduler="euler_a", adapter="style", scale=0.75),
                                     dict(batch=1, adapter={"style": 1.2}, guidance_interval=(0.3, 1.0))])
def test_a_picture_is_redrawn_from_its_file(pipe, base, trained, tmp_path, options):
    """Bit for bit, in another pipeline, where the adapter has another name, from any batch."""
    paths = gallery.draw_to(tmp_path, pipe, PROMPTS, [3, 4, 5], **options, **FEW)
    other = pipeline.load(base, adapters={"mine": trained.adapter} if "adapter" in options else {})
    for path in paths:
        assert (np.asarray(gallery.redraw(other, path)) == pixels(path)).all()


def test_the_settings_in_the_file(pipe, tmp_path):
    path, = gallery.draw_to(tmp_path, pipe, PROMPTS[1:2], 7, "style", 0.5, scheduler="ddim", **FEW)
    with Image.open(path) as image:
        settings = json.loads(image.text["naruto_lora"])
        assert image.text["parameters"] == (
            f"{PROMPTS[1]} <lora:style:0.5>\nSteps: 3, Sampler: ddim, CFG scale: 2, Seed: 7, Size: 32x32")
    assert settings == gallery.settings(path)
    expected = dict(prompt=PROMPTS[1], seed=7, scheduler="ddim", steps=3, guidance_scale=2.0, resolution=32,
                    guidance_interval=[0.0, 1.0], precision="float32", batch=[1, 0], **pipe.sources)
    adapters = settings.pop("adapters")
    assert settings == expected
    assert adapters == {"style": {"weight": 0.5, "identity": pipe.adapter_identities["style"]}}


def test_the_same_grid_gives_the_same_files_and_is_drawn_once(pipe, tmp_path, monkeypatch):
    paths = gallery.draw_to(tmp_path / "one", pipe, PROMPTS, 3, "style", batch=2, **FEW)
    again = gallery.draw_to(tmp_path / "two", pipe, PROMPTS, 3, "style", batch=2, **FEW)
    assert [p.name for p in paths] == [p.name for p in again] and len(set(paths)) == 3
    assert all(one.read_bytes() == two.read_bytes() for one, two in zip(paths, again, strict=True))
    sizes = counted(monkeypatch)
    assert gallery.draw_to(tmp_path / "one", pipe, PROMPTS, 3, "style", batch=2, **FEW) == paths and not sizes
    for change in (dict(seeds=4), dict(adapter="base"), dict(scale=0.9), dict(steps=4), dict(scheduler="ddim")):
        options = dict(seeds=3, adapter="style", scale=1.0, batch=3) | FEW | change
        gallery.draw_to(tmp_path / "one", pipe, PROMPTS[:1], **options)
    assert sizes == [1] * 5 and len(list((tmp_path / "one").iterdir())) == 3 + 5


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_killed_call_resumes_and_gives_the_same_files_as_an_unbroken_one(pipe, tmp_path, monkeypatch, after):
    """Killed after it has saved `after` pictures, in batches of two; whole saved batches aren't drawn again."""
    prompts, seeds = pipeline.cross(PROMPTS, [0, 1])
    whole = gallery.draw_to(tmp_path / "whole", pipe, prompts, seeds, batch=2, **FEW)
    saved, save = [], gallery.save

    def killed(picture, path):
        if len(saved) == after:
            raise KeyboardInterrupt
        saved.append(path)
        save(picture, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gallery, "save", killed)
        gallery.draw_to(tmp_path / "cut", pipe, prompts, seeds, batch=2, **FEW)
    (tmp_path / "cut" / whole[0].name).write_bytes(whole[0].read_bytes()[:-200])  # and one file is truncated
    sizes = counted(monkeypatch)
    paths = gallery.draw_to(tmp_path / "cut", pipe, prompts, seeds, batch=2, **FEW)
    assert len(sizes) == 3 - after // 2 + (after >= 2)
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in whole]


def test_progress_counts_all_pictures_and_stop_keeps_the_finished_ones(pipe, tmp_path):
    reports = []
    with pytest.raises(pipeline.Stopped):
        gallery.draw_to(tmp_path, pipe, PROMPTS, 0, batch=1, show=lambda *report: reports.append(report),
                        stop=lambda: len(reports) == 5, **FEW)
    assert reports == [("drawing base", step, 9) for step in range(1, 6)] and len(list(tmp_path.iterdir())) == 1


def test_the_errors_of_redraw_and_settings(pipe, plain_pipe, tmp_path):
    path, = gallery.draw_to(tmp_path, pipe, PROMPTS[:1], 0, "style", **FEW)
    with pytest.raises(ValueError, match="drawn with an adapter 'style' that is not loaded; add it"):
        gallery.redraw(plain_pipe, path)
    plain_pipe.sources["vae"] = "another"
    with pytest.raises(ValueError, match="drawn with another vae .*; load a pipeline with it"):
        gallery.redraw(plain_pipe, path)
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("plain.png", "text.png"):
        with pytest.raises(ValueError, match=f"{name}' has no readable settings; use a PNG"):
            gallery.settings(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no picture"):
        gallery.settings(tmp_path / "none.png")


def test_many_pictures_are_loaded_where_few_files_can_be_open(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, most[1]))
    try:
        pictures = gallery.load([tmp_path / "a.png"] * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)
    assert len(pictures) == 100 and pictures[99].getpixel((2, 2)) == (255, 0, 0)


@pytest.fixture
def plain_pipe(base):
    return pipeline.load(base)
