"""Encoders: a CLIP by its id or folder, your own module, and the errors of both."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from naruto_lora.measure import encoders
from naruto_lora.tiny import BASE, judge, world


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a CLIP of random weights and the embedded default's tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder, small = tmp_path_factory.mktemp("clip"), dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    text = small | dict(num_attention_heads=2, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
                        max_position_embeddings=48)
    vision = small | dict(num_attention_heads=2, image_size=32, patch_size=8)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def some_pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 64, 3), dtype=np.uint8)) for _ in range(3)]


def test_a_clip_embeds_and_fits_as_its_own_forward_does(clip):
    from transformers import CLIPModel, CLIPTokenizer

    encoder, pictures, texts = encoders.load(str(clip)), some_pictures(), ["a woman", "a sad man smiling", "hair"]
    assert encoder.name == str(clip) and "CLIP score" in encoder.fit_means
    embedded = encoder.embed(pictures)
    assert embedded.shape == (3, 8) and np.linalg.norm(embedded, axis=1) == pytest.approx(1)
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    with torch.no_grad():
        out = model(**tokenizer(texts, padding=True, return_tensors="pt"), pixel_values=encoders._pixels(pictures, 32))
    np.testing.assert_allclose(embedded, out.image_embeds, atol=1e-5)
    expected = 100 * (out.image_embeds * out.text_embeds).sum(1).clamp(min=0).numpy()
    np.testing.assert_allclose(encoder.fit(pictures, texts), expected, atol=1e-3)


def test_pixels_are_cropped_from_the_centre_and_normalised():
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("white", (30, 0, 60, 30))
    pixels = encoders._pixels([wide], 30)
    assert pixels.shape == (1, 3, 30, 30)
    white = (1 - np.array(encoders.MEAN)) / np.array(encoders.STD)
    np.testing.assert_allclose(pixels[0, :, 15, 15], white, rtol=1e-5)
    assert (pixels[0, :, :, 2:-2] == pixels[0, :, 15:16, 15:16]).all()  # no red from the sides


def test_a_missing_clip_or_one_without_safetensors_gives_a_clear_error(tmp_path, clip):
    (tmp_path / "config.json").write_text(json.dumps(json.loads((clip / "config.json").read_text())))
    for name in (str(tmp_path), "nobody/no-such-clip"):
        with pytest.raises(OSError, match=f"the CLIP '{name}' can't be loaded .* needs safetensors and a tokenizer"):
            encoders.load(name)


@pytest.mark.parametrize("name", ["json", "no.such.module", "not a name", "../x.y"[3:]])
def test_an_error_names_what_is_no_encoder(name):
    with pytest.raises(ValueError, match=f"the encoder '{name}' must be a CLIP's hub id or folder, or a module"):
        encoders.load(name)


def test_the_embedded_worlds_judge_is_an_encoder():
    encoder, people = encoders.load("naruto_lora.tiny.judge"), world.prompts(12, seed=9)
    rng = np.random.default_rng(9)
    pictures = [world.draw(p["attributes"], world.STYLE, rng, 128) for p in people]
    texts = [p["text"] for p in people]
    assert encoder.fit(pictures, texts).min() >= 87.5 and encoder.fit(pictures, texts[::-1]).mean() < 70
    embedded = encoder.embed(pictures)
    assert embedded.shape[0] == 12 and np.linalg.norm(embedded, axis=1) == pytest.approx(1, abs=1e-5)
    assert encoder.fit is judge.fit


def test_a_caption_is_read_back():
    people = world.prompts(500, seed=4)
    assert all(world.read_caption(p["text"]) == p["attributes"] for p in people)
    with pytest.raises(ValueError, match="is not a caption of this world: it doesn't name hair_color"):
        world.read_caption("a woman smiling with blue eyes in a red shirt before a blue wall")
