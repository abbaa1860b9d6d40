"""The LoRA file for other programs: its names as these programs form them, its numbers, its header, its bytes."""

import hashlib
import json
import struct

import pytest
import torch
from benchmarks import sdxl
from safetensors import safe_open
from safetensors.torch import load_file

from naruto_lora import lora, models, pipeline
from naruto_lora.adapters import header, names, origin, writing


def original_unet(depths=(0, 2, 10), widths=(320, 640, 1280), blocks=2):
    """The names of all Linear layers and convolutions in SDXL's original U-Net, written down as its code builds it.

    ComfyUI, A1111, Forge and sd-scripts have this U-Net: their keys for a LoRA are 'lora_unet_' and these names with
    underscores.
    """
    found = ["input_blocks.0.0", "time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "out.2"]

    def residual(place, changes_width):
        inside = ["in_layers.2", "emb_layers.1", "out_layers.3", *["skip_connection"] * changes_width]
        found.extend(f"{place}.{name}" for name in inside)

    def transformer(place, depth):
        found.extend(f"{place}.{name}" for name in ("proj_in", "proj_out"))
        for k in range(depth):
            for name in ("attn1", "attn2"):
                found.extend(f"{place}.transformer_blocks.{k}.{name}.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0"))
            found.extend(f"{place}.transformer_blocks.{k}.ff.net.{name}" for name in ("0.proj", "2"))

    number, width = 1, widths[0]
    for level, depth in enumerate(depths):
        for _ in range(blocks):
            residual(f"input_blocks.{number}.0", width != widths[level])
            width = widths[level]
            if depth:
                transformer(f"input_blocks.{number}.1", depth)
            number += 1
        if level < len(depths) - 1:
            found.append(f"input_blocks.{number}.0.op")
            number += 1
    residual("middle_block.0", False)
    transformer("middle_block.1", depths[-1])
    residual("middle_block.2", False)
    number = 0
    for level, depth in reversed(list(enumerate(depths))):
        for k in range(blocks + 1):
            residual(f"output_blocks.{number}.0", True)  # its input has the skip's channels too
            if depth:
                transformer(f"output_blocks.{number}.1", depth)
            if level and k == blocks:
                found.append(f"output_blocks.{number}.{2 if depth else 1}.conv")
            number += 1
    return found


@pytest.fixture(scope="module")
def full_size():
    """SDXL's U-Net with a LoRA of rank 4, without numbers."""
    with torch.device("meta"):
        unet = sdxl.unet()
        kinds = torch.nn.Linear, torch.nn.Conv2d
        plain = [name for name, module in unet.named_modules() if isinstance(module, kinds)]
        lora.inject(unet.requires_grad_(False), 4, 8)
    return unet, plain


def test_every_layer_of_sdxl_has_the_original_unets_name(full_size):
    unet, plain = full_size
    ldm = names.ldm_names(name for name, _ in unet.named_modules())
    assert sorted(ldm[name] for name in plain) == sorted(original_unet()) and len(set(plain)) == 794
    for ours, theirs in (  # as sd-scripts' SDXL LoRAs have them
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
         "input_blocks.4.1.transformer_blocks.0.attn1.to_q"),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks.8.1.proj_in"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.1.attentions.2.transformer_blocks.1.ff.net.0.proj",
         "output_blocks.5.1.transformer_blocks.1.ff.net.0.proj"),
        ("up_blocks.2.resnets.2.conv_shortcut", "output_blocks.8.0.skip_connection"),
    ):  # fmt: skip
        assert ldm[ours] == theirs


def test_all_560_layers_are_found_by_other_programs_and_by_us(full_size):
    """By a stand-in of A1111's and ComfyUI's key maps, and by `names` in four layouts."""
    unet, _ = full_size
    layers = [name for name, module in unet.named_modules() if hasattr(module, "lora_A")]
    assert len(layers) == 560
    ldm = names.ldm_names(name for name, _ in unet.named_modules())
    comfyui = {f"lora_unet_{name.replace('.', '_')}": name for name in original_unet()}
    a1111 = {f"diffusion_model_{name.replace('.', '_')}": name for name in original_unet()}
    finder = names.Names({"unet": layers}, ldm)
    for name in layers:
        key = f"lora_unet_{ldm[name].replace('.', '_')}"
        assert comfyui[key] == a1111[key.replace("lora_unet", "diffusion_model")] == ldm[name]
        for form in (key, f"lora_unet_{name.replace('.', '_')}", f"unet.{name}", f"diffusion_model.{ldm[name]}"):
            assert finder.find(form) == ("unet", name)


def filled(base, rank=4, alpha=10.0):
    unet = models.load_unet(base, torch.float32, "cpu")
    for k, parameter in enumerate(lora.inject(unet, rank, alpha)):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)) * 0.1
    return unet


def stand_in(unet, file):
    """Adds a file to a plain U-Net's weights as ComfyUI does: keys formed from the original names, W + alpha / rank *
    up @ down. Returns how many of the file's keys it used."""
    tensors, used = load_file(file), 0
    ldm = names.ldm_names(name for name, _ in unet.named_modules())
    for name, theirs in ldm.items():
        key = f"lora_unet_{theirs.replace('.', '_')}"
        if f"{key}.lora_up.weight" in tensors:
            up, down, alpha = (tensors[f"{key}.{part}"].float() for part in
                               ("lora_up.weight", "lora_down.weight", "alpha"))
            unet.get_submodule(name).weight.data += up @ down * alpha / len(down)
            used += 3
    assert used == len(tensors)
    return used


def test_another_program_draws_the_same_up_to_the_files_fp16(base, encoded, tmp_path):
    unet = filled(base)
    file = lora.save_kohya(unet, tmp_path / "style.safetensors", 10.0)
    other, plain = models.load_unet(base, torch.float32, "cpu"), models.load_unet(base, torch.float32, "cpu")
    assert stand_in(other, file) == 3 * sum(hasattr(module, "lora_A") for module in unet.modules())
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    embeds, pooled = (torch.randn(s, generator=torch.Generator().manual_seed(1)) for s in ((1, 48, 224), (1, 128)))
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])}
    with torch.no_grad():
        ours, theirs, without = (model(latents, 500, embeds, added_cond_kwargs=added).sample
                                 for model in (unet, other, plain))
    assert (ours - theirs).abs().max() / ours.abs().max() < 1e-3 < (ours - without).abs().max() / ours.abs().max() / 50


def test_round_trip_ours_kohyas_ours_is_exact(base, tmp_path):
    """alpha unlike rank, and numbers that fp16 holds: what comes back is bit for bit what was written."""
    unet = filled(base)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half().float()
    file = lora.save_kohya(unet, tmp_path / "style.safetensors", 10.0)
    pipe = pipeline.load(base, adapters={"style": file})
    assert pipeline.use_adapter(pipe, "style") == {"style": 1.0}
    back = {name: module for name, module in pipe.unet.named_modules() if hasattr(module, "lora_A")}
    for name, module in unet.named_modules():
        if hasattr(module, "lora_A"):
            assert torch.equal(module.lora_A["default"].weight, back[name].lora_A["style"].weight)
            assert torch.equal(module.lora_B["default"].weight, back[name].lora_B["style"].weight)
            assert module.scaling["default"] == back[name].scaling["style"] == 2.5


def test_what_earlier_versions_wrote_loads_still(base, tmp_path, pipe, trained):
    """kohya-ss's names over diffusers' blocks, without a header."""
    from safetensors.torch import save_file

    new = trained.folder / f"{trained.folder.name}.safetensors"
    tensors = load_file(new)
    ldm = names.ldm_names(name for name, _ in pipe.unet.named_modules())
    back = {f"lora_unet_{names._plain(theirs)}": f"lora_unet_{names._plain(ours)}" for ours, theirs in ldm.items()}
    save_file({f"{back[key.split('.')[0]]}.{key.split('.', 1)[1]}": t for key, t in tensors.items()},
              tmp_path / "old.safetensors")
    for name, file in (("old", tmp_path / "old.safetensors"), ("new", new)):
        pipeline.add_adapter(pipe, name, file)
    try:
        modules = [module for module in pipe.unet.modules() if "old" in getattr(module, "lora_A", {})]
        assert len(modules) * 3 == len(tensors)
        assert all(torch.equal(m.lora_B["old"].weight, m.lora_B["new"].weight) for m in modules)
    finally:
        for name in ("old", "new"):
            pipeline.active.remove_adapter(pipe, name)
        pipeline.use_adapter(pipe, "base")


def test_the_header_is_what_other_programs_look_for(trained, plan):
    file = trained.folder / f"{trained.folder.name}.safetensors"
    with safe_open(file, "pt") as opened:
        fields = opened.metadata()
    assert fields["ss_base_model_version"].startswith("sdxl_")  # else A1111 hides the file beside SDXL
    assert "lora_adapter_metadata" not in fields  # diffusers refuses it beside alphas
    assert fields | {
        "format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "10.0",
        "ss_output_name": trained.folder.name, "modelspec.title": trained.folder.name,
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.prediction_type": "epsilon", "modelspec.resolution": "32x32", "ss_steps": "6",
        "ss_num_train_images": str(trained.record["pictures"]["training"]), "ss_total_batch_size": "6",
        "ss_learning_rate": "0.02", "ss_resolution": "(32, 32)",
    } == fields  # fmt: skip
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    assert fields["sshs_model_hash"] == hashlib.sha256(data[8 + length :]).hexdigest() and length % 8 == 0
    written = json.loads(data[8 : 8 + length])
    assert list(written["__metadata__"]) == sorted(fields) and list(written)[1:] == sorted(written)[1:]
    assert origin.model({}, fields) == "SDXL"


def test_the_header_names_nothing_of_this_machine(trained, plan, base):
    fields = header.of_run("style", 4, 10, trained.record)
    assert not any(part in value for value in fields.values() for part in (plan.dataset, base, str(trained.folder)))
    assert "ss_sd_model_name" not in fields and "modelspec.license" not in fields
    assert not any("date" in key or "time" in key for key in fields)
    sdxl = "stabilityai/stable-diffusion-xl-base-1.0"
    named = header.of_run("style", 4, 10, trained.record | {"recipe": trained.record["recipe"] | {"base": sdxl}})
    assert named["ss_sd_model_name"] == sdxl and named["modelspec.license"] == "CreativeML Open RAIL++-M"


def test_the_same_lora_gives_the_same_bytes(base, tmp_path, trained):
    unet, files = filled(base), []
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        files.append(lora.save_kohya(unet, tmp_path / folder / "style.safetensors", 10.0, trained.record).read_bytes())
    machine = trained.record | {"device": "another", "seconds": 1.0, "peak_gib": 9.0, "adapter": "/elsewhere"}
    machine["recipe"] = trained.record["recipe"] | {"batch": 6, "accumulation": 1, "dataset": "/moved", "expect": "?"}
    files.append(lora.save_kohya(unet, tmp_path / "style.safetensors", 10.0, machine).read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("folder, name", [
    ("runs/ghibli", "ghibli"), ("runs/v1.5 final", "v1.5 final"), ("runs/ghibli/", "ghibli"), ("/", "recipe"),
    ("runs/pytorch_lora_weights", "recipe"), ("runs/a:b", "recipe"), ("runs/.hidden", "recipe"),
])  # fmt: skip
def test_the_file_has_the_runs_name(folder, name):
    assert writing.file_name(folder, "recipe") == f"{name}.safetensors"


def test_the_run_here_is_named_after_its_folder(tmp_path, monkeypatch):
    (tmp_path / "ghibli").mkdir()
    monkeypatch.chdir(tmp_path / "ghibli")
    assert writing.file_name(".", "recipe") == "ghibli.safetensors"
