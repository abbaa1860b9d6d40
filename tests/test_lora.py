"""LoRA: its layers, its start values, its files."""

import os
import subprocess
import sys

import pytest
import torch
from benchmarks import sdxl
from safetensors import safe_open
from safetensors.torch import load_file

from naruto_lora import lora, models, pipeline, train

CPU = torch.device("cpu")


def fresh(base, rank=4, alpha=10, seed=0, dtype=torch.float32):
    unet = models.load_unet(base, dtype, CPU)
    return unet, lora.inject(unet, rank, alpha, seed)


def predicted(unet, encoded):
    """The U-Net's prediction for two cached pictures."""
    no = torch.tensor([False, False])
    inputs = encoded.batch([0, 1], torch.zeros(2, *encoded.shapes[0]), torch.tensor([False, True]), no, CPU)
    added = {"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]}
    with torch.no_grad():
        timesteps = torch.tensor([100, 900])
        return unet(inputs["latents"], timesteps, inputs["prompt_embeds"], added_cond_kwargs=added).sample


@pytest.mark.parametrize("rank", [1, 16])
def test_full_size_sdxl_gets_1451520_parameters_a_rank(rank):
    with torch.device("meta"):
        unet = sdxl.unet()
        parameters = lora.inject(unet.requires_grad_(False), rank, rank)
    assert sum(p.numel() for p in parameters) == 1_451_520 * rank
    layers = [name for name, module in unet.named_modules() if hasattr(module, "lora_A")]
    assert len(layers) == 560 and len(parameters) == 2 * 560
    assert all(name.endswith(lora.TARGETS) and ".attn" in name for name in layers)


def test_only_the_lora_is_trained_in_fp32_whatever_the_base(base):
    unet, parameters = fresh(base, dtype=torch.float16)
    named = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in named.items())
    assert [id(p) for p in named.values()] == [id(p) for p in parameters]
    assert {p.dtype for name, p in unet.named_parameters() if "lora_" not in name} == {torch.float16}


def test_it_starts_as_the_base_and_from_its_seed(base, encoded):
    unet, parameters = fresh(base, rank=4)
    assert torch.equal(predicted(unet, encoded), predicted(models.load_unet(base, torch.float32, CPU), encoded))
    down = torch.cat([p.flatten() for p in parameters[::2]])
    assert not any(p.any() for p in parameters[1::2])
    assert down.std().item() == pytest.approx(1 / 4, rel=0.03)
    again, other = (torch.cat([p.flatten() for p in fresh(base, seed=seed)[1][::2]]) for seed in (0, 1))
    assert torch.equal(down, again) and not torch.equal(down, other)


def test_saved_and_restored_bit_for_bit(base, encoded, tmp_path):
    unet, parameters = fresh(base)
    for k, parameter in enumerate(parameters):
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k))
    lora.save(unet, tmp_path)
    again, restored = fresh(base, seed=9)
    lora.restore(again, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(parameters, restored, strict=True))
    assert torch.equal(predicted(unet, encoded), predicted(again, encoded))


def test_what_was_trained_is_what_the_pipeline_loads_alpha_included(plan, trained, cache_folder, encoded, pipe):
    run = train.begin(plan, trained.folder, cache_folder)  # the run is finished: the adapter as trained
    pipeline.use_adapter(pipe, "style")
    in_memory, loaded = predicted(run.unet, encoded), predicted(pipe.unet, encoded)
    pipeline.use_adapter(pipe, "base")
    assert torch.equal(in_memory, loaded)
    assert (predicted(pipe.unet, encoded) - loaded).abs().mean() > 0.01
    for module in run.unet.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] = 1.0  # as if alpha were lost
    assert not torch.allclose(predicted(run.unet, encoded), loaded, atol=1e-3)


def test_the_file_has_diffusers_names_and_the_alpha(trained):
    weights = load_file(trained.adapter)
    assert all(name.startswith("unet.") and name.endswith((".lora.down.weight", ".lora.up.weight")) for name in weights)
    assert {w.dtype for w in weights.values()} == {torch.float32}
    with safe_open(trained.adapter, "pt") as file:
        assert '"unet.lora_alpha": 10' in file.metadata()["lora_adapter_metadata"]


def test_the_other_file_has_kohyas_names_and_the_alpha(base, plan, trained, encoded, pipe):
    file = trained.folder / f"{plan.name}.safetensors"
    weights = load_file(file)
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    assert {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"} <= set(weights)
    assert {v.item() for k, v in weights.items() if k.endswith(".alpha")} == {plan.alpha}
    other = pipeline.load(base, adapters={"kohya": file})  # diffusers reads these names too
    pipeline.use_adapter(other, "kohya")
    pipeline.use_adapter(pipe, "style")
    expected = predicted(pipe.unet, encoded)
    pipeline.use_adapter(pipe, "base")
    torch.testing.assert_close(predicted(other.unet, encoded), expected, atol=2e-2, rtol=0)
    assert (predicted(pipe.unet, encoded) - expected).abs().max() > 0.1


def test_both_files_can_be_read_by_other_users(plan, trained):
    """As far as the umask allows it; safetensors gives its own files to their owner alone."""
    os.umask(mask := os.umask(0o077))
    names = [lora.FILE, f"{plan.name}.safetensors", "run.json", "checkpoint-6/optimizer.safetensors"]
    modes = {name: (trained.folder / name).stat().st_mode & 0o777 for name in names}
    assert modes == dict.fromkeys(names, 0o666 & ~mask)


def test_an_adapter_of_another_rank_is_refused(base, trained):
    unet, _ = fresh(base, rank=8)
    with pytest.raises(ValueError, match="does not fit this U-Net"):
        lora.restore(unet, trained.folder)


def test_an_old_torchao_is_named_with_its_fix(base, tmp_path):
    for package in ("torchao", "torchao/quantization"):  # older diffusers import names from it
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(
            '__version__ = "0.10.0"\n\ndef __getattr__(name):\n    return type(name, (), {})\n'
        )
    info = tmp_path / "torchao-0.10.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch
from naruto_lora import lora, models
lora.inject(models.load_unet({base!r}, torch.float32, "cpu"), 4, 4)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "RuntimeError: peft refuses the old torchao installed here: run 'pip uninstall -y torchao'" in result.stderr
