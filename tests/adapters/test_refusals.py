"""What can't be used: one sentence that says what it is, before anything is drawn, and the base is as it was."""

import json
import pickle
import struct
import zipfile

import pytest
import torch
from adapters.layouts import kohya
from safetensors.torch import save, save_file

from naruto_lora import pipeline
from naruto_lora.adapters import active, origin, reading

UNET = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


class Command:
    """A pickle that would make a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.fixture(scope="module")
def bare(base):
    """A pipeline that no adapter has touched, and its U-Net's modules."""
    return pipeline.load(base)


def layer(key, out, into, rank=2, **more):
    return {f"{key}.lora_down.weight": torch.ones(rank, into), f"{key}.lora_up.weight": torch.ones(out, rank),
            **{f"{key}.{name}": value.clone() for name, value in more.items()}}  # fmt: skip


def fitting(bare, count=3, **more):
    """Layers that fit, under kohya-ss's names."""
    modules = [(name, m) for name, m in active.modules(bare)["unet"].items() if name.endswith("attn1.to_q")][:count]
    tensors = {}
    for name, module in modules:
        tensors |= layer(kohya(name), *module.weight.shape, **more)
    return tensors


def sd15():
    """As sd-scripts writes SD 1.5: attention in the first block, prompts 768 wide, one text encoder."""
    tensors = layer("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 320, 768)
    tensors |= layer("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", 1280, 1280)
    return tensors | layer("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768, 768)


OTHERS = {  # the file's tensors: what the sentence says
    "SD 1.5": sd15(),
    "SD 2": layer("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 640, 1024),
    "SD 1.5 or SD 2": layer("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", 320, 320),
    "Flux": layer("lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072),
    "Flux,": layer("transformer.single_transformer_blocks.0.attn.to_q", 3072, 3072),
    "SD 3": layer("transformer.transformer_blocks.0.attn.add_k_proj", 1536, 1536),
    "a model with a transformer, not a U-Net": layer("diffusion_model.blocks.0.self_attn.q", 5120, 5120),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_lora_for_another_model_is_named(kind, bare, tmp_path, capfd):
    save_file(OTHERS[kind], tmp_path / "other.safetensors")
    with pytest.raises(ValueError) as caught:
        pipeline.add_adapter(bare, "other", tmp_path / "other.safetensors")
    assert f"is for {kind.strip(',')}, not for an SDXL" in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # no log of mismatches
    assert active.loaded(bare) == [] and not hasattr(bare.unet, "peft_config")


def test_a_full_size_sdxl_lora_is_no_other_models():
    assert origin.model({"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (8, 2048)}, {}) == "SDXL"
    header = {"ss_base_model_version": "sdxl_base_v1-0"}
    assert origin.model({"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (8, 640)}, header) == "SDXL"
    assert origin.model({"anything": (1, 1)}, {"modelspec.architecture": "Flux.1-dev/lora"}) == "Flux"


def broken(bare):
    """{what: (the file's name, its bytes, a part of the sentence)}."""
    whole = save(fitting(bare))
    nan, alpha = fitting(bare), fitting(bare, alpha=torch.tensor(float("nan")))
    next(iter(nan.values()))[1, 2] = float("nan")
    half = {key: value for key, value in fitting(bare, 1).items() if "down" in key}
    metadata = {f"{UNET}.lora_A.weight": torch.ones(2, 80), f"{UNET}.lora_B.weight": torch.ones(80, 2)}

    def settings(text):
        return save(metadata, {"lora_adapter_metadata": text})

    peft = {"unet.r": 2}
    return {
        "empty": ("a.safetensors", b"", "is empty"),
        "truncated": ("a.safetensors", whole[:-10], "is broken or no .safetensors file"),
        "cut in its header": ("a.safetensors", whole[:40], "is broken or no .safetensors file"),
        "a text": ("a.safetensors", b"hello", "is broken or no .safetensors file"),
        "a huge header": ("a.safetensors", struct.pack("<Q", 2**60) + b"{}", "is broken or no .safetensors file"),
        "a web page": ("a.safetensors", b"<!DOCTYPE html>", "is a web page"),
        "a pointer": ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs' pointer"),
        "no LoRA": ("a.safetensors", save({"model.weight": torch.ones(2)}), "holds no LoRA layer (1 other tensors"),
        "NaN": ("a.safetensors", save(nan), "not finite (NaN or Inf) in 1 of its 3 layers, such as 'lora_unet_input"),
        "alpha NaN": ("a.safetensors", save(alpha), "not finite (NaN or Inf) in 3 of its 3 layers"),
        "alpha of two": ("a.safetensors", save(fitting(bare, alpha=torch.ones(2))), "is not one number"),
        "half a layer": ("a.safetensors", save(half), "it holds only down"),
        "settings' NaN": ("a.safetensors", settings('{"unet.lora_alpha": NaN}'), "has alpha nan in its settings"),
        "settings' text": ("a.safetensors", settings(json.dumps(peft | {"unet.lora_alpha": "4"})), "has alpha '4'"),
        "settings' true": ("a.safetensors", settings(json.dumps(peft | {"unet.lora_alpha": True})), "has alpha True"),
        "settings' pattern": ("a.safetensors", settings('{"unet.alpha_pattern": [1]}'), "a wrong alpha_pattern"),
        "settings a list": ("a.safetensors", settings("[]"), "its settings (peft's) can't be read"),
        "settings cut": ("a.safetensors", settings('{"unet'), "its settings (peft's) can't be read"),
        "settings nested": ("a.safetensors", settings("[" * 9999), "its settings (peft's) can't be read"),
        "OFT": ("a.safetensors", save({"lora_unet_x.oft_blocks": torch.ones(2)}), "not supported (OFT)"),
        "IA3": ("a.safetensors", save({"lora_unet_x.weight": torch.ones(2), "lora_unet_x.on_input": torch.ones(1)}),
                "not supported (IA3)"),
        "other shapes": ("a.safetensors", save(layer(kohya(UNET[5:]), 12, 34)), "for another base; use one for this"),
        "other names": ("a.safetensors", save(layer("lora_unet_x_to_q", 12, 34)), "this one has none of its layers"),
    }  # fmt: skip


def test_a_broken_file_is_refused_in_one_sentence_and_the_base_is_as_it_was(bare, tmp_path, capfd):
    for what, (name, data, said) in broken(bare).items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError) as caught:
            pipeline.add_adapter(bare, "style", tmp_path / name)
        assert said in str(caught.value) and "\n" not in str(caught.value), what
        assert str(tmp_path / name) in str(caught.value) and ("; " in str(caught.value) or ": " in str(caught.value))
    assert active.loaded(bare) == [] and not hasattr(bare.unet, "peft_config")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".pth", ".safetensors"])
def test_a_pickle_is_refused_whatever_is_in_it(suffix, bare, tmp_path):
    file, made = tmp_path / f"a{suffix}", tmp_path / "made"
    for new_format in (True, False):
        torch.save(fitting(bare), file, _use_new_zipfile_serialization=new_format)  # tensors alone
        with pytest.raises(ValueError, match="is a pickle, which can run any command on this machine"):
            pipeline.add_adapter(bare, "style", file)
    file.write_bytes(pickle.dumps(Command(made)))
    with pytest.raises(ValueError, match="is a pickle"):
        pipeline.add_adapter(bare, "style", file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Command(made)))
    with pytest.raises(ValueError, match="is a pickle"):
        pipeline.add_adapter(bare, "style", file)
    assert not made.exists() and active.loaded(bare) == []


def test_layers_that_this_base_lacks_are_counted(base, bare, tmp_path):
    notes, tensors = [], fitting(bare)
    for k in range(2):
        tensors |= layer(f"lora_unet_input_blocks_8_1_transformer_blocks_{8 + k}_attn1_to_q", 96, 96)
    tensors |= {"lora_unet_out_0.w_norm": torch.ones(48), "lora_unet_out_0.b_norm": torch.ones(48)}
    save_file(tensors, tmp_path / "larger.safetensors")
    pipe, show = pipeline.load(base), type("Show", (), {"note": lambda self, text: notes.append(text)})()
    pipeline.add_adapter(pipe, "larger", tmp_path / "larger.safetensors", show)
    (note,) = notes
    assert note.startswith("3 of the 6 layers of the LoRA 'larger.safetensors' fit this base; the others (norms), such")


def test_a_good_one_loads_under_the_name_of_a_refused_one(base, bare, tmp_path):
    pipe = pipeline.load(base)
    save_file(sd15(), tmp_path / "bad.safetensors")
    save_file(fitting(bare), tmp_path / "good.safetensors")
    with pytest.raises(ValueError):
        pipeline.add_adapter(pipe, "style", tmp_path / "bad.safetensors")
    pipeline.add_adapter(pipe, "style", tmp_path / "good.safetensors")
    assert pipeline.use_adapter(pipe, "style") == {"style": 1.0} and pipe.get_active_adapters() == ["style"]


def test_a_folder_means_its_lora(bare, tmp_path):
    """diffusers' file, else peft's, else the only one; several are named."""
    with pytest.raises(FileNotFoundError, match="no LoRA at"):
        reading.locate(tmp_path)
    for name in ("b.safetensors", "a.safetensors"):
        save_file(fitting(bare, 1), tmp_path / name)
        if name == "b.safetensors":
            assert reading.locate(tmp_path).name == name
    with pytest.raises(FileNotFoundError, match=r"holds several LoRAs \(a.safetensors, b.safetensors\): name one"):
        reading.locate(tmp_path)
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        save_file(fitting(bare, 1), tmp_path / name)
        assert reading.locate(tmp_path).name == name
