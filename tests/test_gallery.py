"""Pictures on disk: each says what it was drawn from, comes again from that alone, and isn't drawn twice."""

import json

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
    monkeypatch.setattr(pipeline, "_draw_batch", lambda pipe, told, *rest: (
        sizes.append(len(told)), whole(pipe, told, *rest))[1])
    return sizes


@pytest.mark.parametrize("look", [dict(batch=3), dict(batch=2, scheduler="euler_a", adapter="style", scale=0.75),
                                  dict(batch=1, adapter={"style": 1.2}, guidance_interval=(0.3, 1.0))])
def test_a_picture_comes_again_from_its_file_alone(pipe, base, trained, tmp_path, look):
    """Bit for bit, in another pipeline, where the adapter has another name, whatever batch it was drawn in."""
    paths = gallery.draw_to(tmp_path, pipe, PROMPTS, [3, 4, 5], **look, **FEW)
    other = pipeline.load(base, adapters={"mine": trained.adapter} if "adapter" in look else {})
    for path in paths:
        assert (np.asarray(gallery.redraw(other, path)) == pixels(path)).all()


def test_what_stands_in_the_file(pipe, tmp_path):
    path, = gallery.draw_to(tmp_path, pipe, PROMPTS[1:2], 7, "style", 0.5, scheduler="ddim", **FEW)
    with Image.open(path) as image:
        told = json.loads(image.text["naruto_lora"])
        assert image.text["parameters"] == (
            f"{PROMPTS[1]} <lora:style:0.5>\nSteps: 3, Sampler: ddim, CFG scale: 2, Seed: 7, Size: 32x32")
    assert told == gallery.settings(path)
    expected = dict(prompt=PROMPTS[1], seed=7, scheduler="ddim", steps=3, guidance_scale=2.0, resolution=32,
                    guidance_interval=[0.0, 1.0], precision="float32", batch=[1, 0], **pipe.sources)
    adapters = told.pop("adapters")
    assert told == expected and adapters == {"style": {"weight": 0.5, "identity": pipe.adapter_identities["style"]}}


def test_the_same_grid_twice_is_the_same_and_drawn_once(pipe, tmp_path, monkeypatch):
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
def test_cut_short_it_goes_on_and_ends_as_if_unbroken(pipe, tmp_path, monkeypatch, after):
    """Killed before the `after`-th picture is kept, in batches of two; what was kept isn't drawn again."""
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
    (tmp_path / "cut" / whole[0].name).write_bytes(whole[0].read_bytes()[:-200])  # and one is spoilt
    sizes = counted(monkeypatch)
    paths = gallery.draw_to(tmp_path / "cut", pipe, prompts, seeds, batch=2, **FEW)
    assert len(sizes) == 3 - after // 2 + (after >= 2)
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in whole]


def test_progress_counts_the_whole_and_stop_keeps_what_is_done(pipe, tmp_path):
    told = []
    with pytest.raises(pipeline.Stopped):
        gallery.draw_to(tmp_path, pipe, PROMPTS, 0, batch=1, show=lambda *news: told.append(news),
                        stop=lambda: len(told) == 5, **FEW)
    assert told == [("drawing base", step, 9) for step in range(1, 6)] and len(list(tmp_path.iterdir())) == 1


def test_what_does_not_fit_is_named(pipe, alone_base, tmp_path):
    path, = gallery.draw_to(tmp_path, pipe, PROMPTS[:1], 0, "style", **FEW)
    with pytest.raises(ValueError, match="drawn with an adapter 'style' that is not loaded; add it"):
        gallery.redraw(alone_base, path)
    alone_base.sources["vae"] = "another"
    with pytest.raises(ValueError, match="drawn with another vae .*; load a pipeline with that"):
        gallery.redraw(alone_base, path)
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("plain.png", "text.png"):
        with pytest.raises(ValueError, match=f"{name}' does not say what it was drawn from; take a PNG"):
            gallery.settings(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no picture"):
        gallery.settings(tmp_path / "none.png")


@pytest.fixture
def alone_base(base):
    return pipeline.load(base)
