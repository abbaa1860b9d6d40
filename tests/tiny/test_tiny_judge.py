"""The judge: accurate on drawings that it has not seen, also after a round trip through the VAE."""

import numpy as np
import pytest
import torch

from naruto_lora.tiny import judge, world

BASE = judge.WEIGHTS.parent / "base"
COUNT, SEED = 400, 20_261_123


def drawings(kind, count=COUNT):
    """Unseen prompts and their pictures, in the style or in each ordinary style in turn."""
    prompts = world.prompts(count, seed=SEED)
    styles = [world.STYLE] if kind == "style" else world.ORDINARY
    rng = np.random.default_rng(SEED)
    return prompts, [world.draw(p["attributes"], styles[n % len(styles)], rng) for n, p in enumerate(prompts)]


def round_trip(pictures):
    """The pictures encoded and decoded by the base's VAE."""
    from diffusers import AutoencoderKL
    from diffusers.image_processor import VaeImageProcessor

    vae = AutoencoderKL.from_pretrained(BASE / "vae", torch_dtype=torch.float32).eval()
    processor, back = VaeImageProcessor(vae_scale_factor=4), []
    with torch.no_grad():
        for start in range(0, len(pictures), 50):
            latents = vae.encode(processor.preprocess(pictures[start : start + 50])).latent_dist.mean
            back += processor.postprocess(vae.decode(latents).sample)
    return back


@pytest.mark.parametrize("kind", ["ordinary", "style"])
def test_reads_unseen_drawings(kind):
    prompts, pictures = drawings(kind)
    result = judge.score(pictures, prompts)
    assert min(result["by_attribute"].values()) >= 0.99, result["by_attribute"]
    in_style = result["style"].mean()
    assert in_style >= 0.99 if kind == "style" else in_style <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ordinary", "style"])
def test_every_attribute_survives_the_vae(kind):
    prompts, pictures = drawings(kind, 200)
    result = judge.score(round_trip(pictures), prompts)
    assert min(result["by_attribute"].values()) >= 0.97, result["by_attribute"]


def test_a_wrong_attribute_lowers_the_score_by_its_share():
    prompts, pictures = drawings("ordinary", 8)
    classes = world.ATTRIBUTES["background"]
    for prompt in prompts:
        shown = prompt["attributes"]["background"]
        prompt["attributes"] = prompt["attributes"] | {"background": classes[classes.index(shown) - 1]}
    result = judge.score([picture.resize((128, 128)) for picture in pictures], prompts)
    assert result["attributes"].shape == result["style"].shape == (8,)
    assert result["by_attribute"]["background"] == 0
    assert result["attributes"].max() <= 7 / 8


def test_shapes_and_errors_without_weights():
    reader = judge.Judge().eval()
    attributes, style = judge.split(reader(torch.zeros(2, 3, 64, 64)))
    assert [a.shape[1] for a in attributes] == [len(classes) for classes in world.ATTRIBUTES.values()]
    assert style.shape == (2,)
    assert judge.score([], [], reader)["attributes"].shape == (0,)
    with pytest.raises(ValueError, match="1 pictures cannot be scored against 0 prompts"):
        judge.score(drawings("style", 1)[1], [], reader)
    with pytest.raises(FileNotFoundError, match="weights are missing"):
        judge.load("nowhere.safetensors")
