"""SDXL Base 1.0's architecture at full size, without its weights: on meta tensors, or random in a folder.

Configurations: the config.json files of stabilityai/stable-diffusion-xl-base-1.0.
"""

import json
import shutil
from pathlib import Path

import torch

UNET = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": False,  # as the fp16-fix VAE says
}
TEXT = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}
TEXT_1 = TEXT | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TEXT_2 = TEXT | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def unet():
    """The U-Net, 2.57 billion parameters, on the current default device and dtype."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET)


def write_vae(folder: Path) -> None:
    """A random VAE in `folder`/vae, fp16, and what else says that `folder` is an SDXL; needs a GPU."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    torch.set_default_dtype(torch.float32)


def write(folder: Path, tokenizers: Path) -> Path:
    """A random SDXL in diffusers' layout, fp16 (7 GB), tokenizers and index those of another base; needs a GPU.

    One that is there already stays.
    """
    if (folder / "model_index.json").exists():
        return folder
    from diffusers import AutoencoderKL, EulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        unet().save_pretrained(folder / "unet")
        AutoencoderKL(**VAE).save_pretrained(folder / "vae")
        text = CLIPTextConfig(**TEXT_1, hidden_act="quick_gelu", projection_dim=768)
        CLIPTextModel(text).save_pretrained(folder / "text_encoder")
        text = CLIPTextConfig(**TEXT_2, hidden_act="gelu", projection_dim=1280)
        CLIPTextModelWithProjection(text).save_pretrained(folder / "text_encoder_2")
    torch.set_default_dtype(torch.float32)
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    ).save_pretrained(folder / "scheduler")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tokenizers / name, folder / name, dirs_exist_ok=True)
        config = folder / name / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 77}))
    shutil.copy(tokenizers / "model_index.json", folder)
    return folder
