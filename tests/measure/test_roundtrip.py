"""What the VAE keeps: the figure against one made by hand, a picture that loses more, the words for both."""

import numpy as np
import pytest
import torch
from PIL import Image

from naruto_lora import data, models
from naruto_lora.measure import roundtrip


def test_pictures_go_through_the_recipes_vae_at_its_resolution(plan, examples):
    recipe = plan.replace(resolution=64)
    kept = roundtrip.through(examples[0], recipe, count=3)
    assert [one.name for one in kept] == [examples[0][k * len(examples[0]) // 3].name for k in range(3)]
    vae = models.load_vae(recipe.base, recipe.vae, torch.float32, "cpu")
    for one in kept:
        source = next(e for e in examples[0] if e.name == one.name)
        crop = data.crop(source.image(), 64)[0]
        with torch.no_grad():
            decoded = vae.decode(vae.encode(data.pixels([crop])).latent_dist.mean).sample.clamp(-1, 1)
        error = ((decoded - data.pixels([crop])) * 127.5).square().mean().item()
        assert one.db == pytest.approx(10 * np.log10(255**2 / error), abs=0.1)
        assert one.before.tobytes() == crop.tobytes() and one.after.size == (64, 64) and one.worst < one.db
    assert 20 < np.median([one.db for one in kept]) < 30  # as measured for drawings in ink
    assert roundtrip.verdict(kept, 64).startswith("At 64 px the VAE keeps these pictures at 2")
    assert set(roundtrip.rows(kept)[0]) == {"picture", "kept, dB", "worst place, dB", ""}


def test_fewer_pixels_keep_less(plan, examples):
    low, high = (roundtrip.through(examples[0], plan.replace(resolution=side), count=4) for side in (32, 64))
    assert np.mean([one.db for one in low]) < np.mean([one.db for one in high])


def test_the_worst_place_is_found():
    before = Image.new("RGB", (64, 64))
    after = before.copy()
    after.paste((90, 90, 90), (40, 8, 44, 12))
    kept = roundtrip._kept("a", before, after)
    assert kept.place == (40, 8, 44, 12) and kept.worst == pytest.approx(20 * np.log10(255 / 90))
    assert kept.db == pytest.approx(kept.worst + 10 * np.log10(256), abs=1e-6)
    assert roundtrip._kept("b", before, before).db == 99.0


@pytest.mark.parametrize("db, said", [(35, "is there to be learnt"), (26, "fine lines and small faces are lost"),
                                      (19, "much is lost")])  # fmt: skip
def test_the_figure_in_words(db, said):
    picture = Image.new("RGB", (8, 8))
    assert said in roundtrip.verdict([roundtrip.Kept("a", picture, picture, db, db - 4, (0, 0, 1, 1))], 256)
