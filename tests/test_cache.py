"""Encode once: right values, nothing twice, a killed run goes on."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from naruto_lora import cache, data, models
from naruto_lora.data import Example


@pytest.fixture
def encoders(monkeypatch):
    """Counts what the encoders are given: {"captions": ..., "pictures": ...}."""
    counts = {"captions": 0, "pictures": 0}

    def counting(kind, function):
        def call(model, batch, *rest):
            counts[kind] += len(batch)
            return function(model, batch, *rest)

        return call

    monkeypatch.setattr(cache, "encode_prompts", counting("captions", cache.encode_prompts))
    monkeypatch.setattr(cache, "encode_pictures", counting("pictures", cache.encode_pictures))
    return counts


def drawn(rows, plan, folder, counts, show=None):
    """What encoding `rows` into `folder` cost: (captions, pictures)."""
    counts.update(captions=0, pictures=0)
    made = cache.encode(rows, plan, folder, show)
    assert len(made) == len(rows)
    return counts["captions"], counts["pictures"]


def test_cached_is_what_the_pipeline_would_encode(plan, examples, encoded, pipe):
    indices, count = [4, 0, 2], 3
    noise = torch.randn(count, *encoded.shape, generator=torch.Generator().manual_seed(0))
    batch = encoded.batch(indices, noise, torch.tensor([False, False, True]), torch.device("cpu"))
    rows = [examples[0][i] for i in indices]
    embeds, _, pooled, _ = pipe.encode_prompt([e.caption for e in rows], do_classifier_free_guidance=False)
    crops = [data.crop(e.image(), plan.resolution) for e in rows]
    with torch.no_grad():
        posterior = pipe.vae.encode(data.pixels([image for image, _ in crops])).latent_dist
    latents = (posterior.mean + posterior.std * noise) * pipe.vae.config.scaling_factor
    close = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch["latents"], latents, **close)
    torch.testing.assert_close(batch["prompt_embeds"][:2], embeds[:2], **close)
    torch.testing.assert_close(batch["pooled"][:2], pooled[:2], **close)
    assert batch["time_ids"].tolist() == [list(map(float, ids)) for _, ids in crops]
    assert not batch["prompt_embeds"][2].any() and not batch["pooled"][2].any()  # the dropped caption
    assert embeds[2].any() and batch["latents"][2].any()


def test_only_what_is_new_is_encoded(plan, examples, tmp_path, encoders):
    rows = examples[0][:6]
    captions = len({e.caption for e in rows})
    assert drawn(rows, plan, tmp_path, encoders) == (captions, 6)
    assert drawn(rows, plan, tmp_path, encoders) == (0, 0)
    assert drawn(rows[::-1], plan, tmp_path, encoders) == (0, 0)
    other = [Example(rows[0].name, "a caption of its own", rows[0].source), *rows[1:]]
    assert drawn(other, plan, tmp_path, encoders) == (1, 0)
    changed = [Example(rows[0].name, rows[0].caption, examples[0][9].read()), *rows[1:]]
    assert drawn(changed, plan, tmp_path, encoders) == (0, 1)
    assert drawn(rows, plan.replace(resolution=64), tmp_path, encoders) == (0, 6)
    assert drawn(rows, plan, tmp_path, encoders) == (0, 0)


def test_another_models_encodings_are_not_taken(plan, examples, tmp_path, encoders, base):
    rows, folder, other = examples[0][:2], tmp_path / "cache", plan.replace(base=str(tmp_path / "base"))
    shutil.copytree(base, other.base)
    drawn(rows, plan, folder, encoders)
    assert drawn(rows, other, folder, encoders) == (0, 0)  # moved, but the same
    file = tmp_path / "base" / "text_encoder" / "model.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(file).items()}, file)
    assert drawn(rows, other, folder, encoders) == (2, 2)
    assert drawn(rows, plan.replace(vae=str(tmp_path / "base" / "vae")), folder, encoders) == (0, 2)


def test_a_killed_run_goes_on(plan, examples, tmp_path, encoders):
    rows = [Example(str(n), f"caption {n}", examples[0][0].source) for n in range(20)]

    def kill(phase, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.encode(rows, plan, tmp_path, kill)
    finished = len(list((tmp_path / "prompts").glob("*.safetensors")))
    assert 0 < finished < 20
    (tmp_path / "prompts" / "half.writing").write_bytes(b"half a file")
    told = []
    assert drawn(rows, plan, tmp_path, encoders, lambda *news: told.append(news)) == (20 - finished, 1)
    assert told == [("captions", 20 - finished, 20 - finished), ("pictures", 1, 1)]


def test_fingerprint_tells_data_and_models_apart(plan, examples, tmp_path, encoded):
    rows = examples[0]
    prints = {cache.encode(part, p, tmp_path).fingerprint() for part, p in (
        (rows[:3], plan), (rows[:2], plan), (rows[1::-1], plan), (rows[:3], plan.replace(resolution=64)),
    )}
    assert len(prints) == 4
    assert cache.encode(rows[:3], plan, tmp_path).fingerprint() in prints


def test_latents_that_are_not_finite_name_their_picture(plan, examples, base):
    vae = models.load_vae(base, "", torch.float32, torch.device("cpu"))
    vae.encoder.conv_out.bias.data[0] = float("inf")
    with pytest.raises(ValueError, match=f"not finite for '{examples[0][0].name}'"):
        cache.encode_pictures(vae, examples[0][:2], plan.resolution)
