"""The parts of SDXL: loaded with the right dtype and weights (test_bad_input tests wrong bases)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from naruto_lora import cache, models

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_parts_are_frozen_and_in_the_requested_dtype(base, dtype):
    encoders = [encoder for _, encoder in models.load_text_encoders(base, dtype, CPU)]
    for model in (*encoders, models.load_unet(base, dtype, CPU)):
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_the_text_encoders_are_sdxls_two(base):
    (first, one), (second, two) = models.load_text_encoders(base, torch.float32, CPU)
    ids = [tokenizer(["a woman"], padding="max_length").input_ids[0] for tokenizer in (first, second)]
    assert ids[0][:4] == ids[1][:4] and ids[0][-1] != ids[1][-1]  # their padding tokens differ
    width = one.config.hidden_size + two.config.hidden_size
    assert models.load_unet(base, torch.float32, CPU).config.cross_attention_dim == width
    assert not hasattr(one, "text_projection") and two.text_projection.weight.any()


def test_the_shapes_of_a_prompt_are_known_before_it_is_encoded(base, tmp_path):
    encoded = cache.encode_prompts(models.load_text_encoders(base, torch.float32, CPU), ["a woman"])[0]
    assert {name: tuple(value.shape) for name, value in encoded.items()} == models.prompt_shapes(base)
    for file, content in (
        ("tokenizer/tokenizer_config.json", {}),
        ("unet/config.json", {"cross_attention_dim": 2048, "addition_time_embed_dim": 256,
                              "projection_class_embeddings_input_dim": 2816}),
    ):  # fmt: skip
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(json.dumps(content))
    assert models.prompt_shapes(str(tmp_path)) == {"prompt_embeds": (77, 2048), "pooled": (1280,)}  # SDXL's


def test_a_vae_that_overflows_in_fp16_is_kept_in_fp32(base, tmp_path):
    folder = shutil.copytree(Path(base, "vae"), tmp_path / "vae")
    config = folder / "config.json"
    text = config.read_text()
    assert '"force_upcast": true' in text or '"force_upcast": false' in text
    for safe, dtype in (("true", torch.float32), ("false", torch.float16)):
        config.write_text(text.replace('"force_upcast": true', '"force_upcast": false').replace(
            '"force_upcast": false', f'"force_upcast": {safe}'))
        assert models.load_vae(base, str(folder), torch.float16, CPU).dtype == dtype


def test_the_noise_schedule_is_sdxls_in_fp32(base):
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas_cumprod = models.load_alphas_cumprod(base)
    assert alphas_cumprod.dtype == torch.float32
    np.testing.assert_allclose(alphas_cumprod.numpy(), np.cumprod(1 - betas), rtol=1e-5)


def test_fp16_files_are_used_where_they_exist(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    for file in (folder / "unet").glob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    unet = models.load_unet(str(folder), torch.float16, CPU)
    whole = models.load_unet(base, torch.float16, CPU)
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), whole.parameters(), strict=True))


def test_a_unet_in_several_files_is_the_same_as_in_one(base, tmp_path):
    from diffusers import UNet2DConditionModel

    folder = shutil.copytree(base, tmp_path / "base")
    shutil.rmtree(folder / "unet")
    whole = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float32)
    whole.save_pretrained(folder / "unet", max_shard_size="5MB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 2
    for source in (base, str(folder)):
        found = models.load_unet(source, torch.float32, CPU).state_dict()
        assert found.keys() == whole.state_dict().keys()
        assert all(torch.equal(found[name], value) for name, value in whole.state_dict().items())


def test_identity_changes_with_the_weights_not_with_the_path(base, tmp_path):
    folder = shutil.copytree(Path(base, "vae"), tmp_path / "vae")
    before = models.identity(str(folder))
    (folder / "note.txt").write_text("hello")
    assert models.identity(str(folder)) == before
    assert models.identity(str(shutil.copytree(folder, tmp_path / "elsewhere"))) == before
    weights = bytearray(next(folder.glob("*.safetensors")).read_bytes())
    weights[100_000] ^= 1
    next(folder.glob("*.safetensors")).write_bytes(weights)
    assert models.identity(str(folder)) != before
    assert models.identity("some/hub-id") == "some/hub-id"
