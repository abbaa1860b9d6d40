"""LoRA files as each program writes them, with random values, and what each must add to the base's weights.

Each function of LAYOUTS gets a `Maker`, puts tensors into it as its program names them, and says by the file's own
formula what they add: W + alpha / rank * up @ down, and so on. The formulas are those of the programs' loading code.
"""

import json
import math

import torch
from torch import nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LAYOUTS = {}


def layout(make):
    LAYOUTS[make.__name__] = make
    return make


class Maker:
    """A file in the making: `tensors` and `header`; `added` {part: {module: what is added to its weight}}.

    `parts` are {part: {name: module}} of the base.
    """

    def __init__(self, parts: dict[str, dict[str, nn.Module]]):
        self.parts, self.tensors, self.header, self.added = parts, {}, {}, {}
        self.generator = torch.Generator().manual_seed(7)
        self.size, self.beside = 0.1, {}  # of the random numbers; {file name: text} in the same folder

    def random(self, *shape, size=None):
        return torch.randn(shape, generator=self.generator) * (size or self.size)

    def modules(self, part="unet", ends=ATTENTION, kind=nn.Linear):
        for name, module in self.parts[part].items():
            if isinstance(module, kind) and name.endswith(ends):
                yield name, module

    def add(self, part, module, difference):
        weight = self.parts[part][module].weight
        self.added.setdefault(part, {})[module] = difference.reshape(weight.shape)

    def pair(self, weight, rank):
        """(up, down) of a LoRA on a weight, with the kernel in down."""
        out, rest = weight.shape[0], weight.shape[1:]
        ones = (1,) * (weight.dim() - 2)
        return self.random(out, rank, *ones), self.random(rank, *rest)

    def lora(self, part, module, key, rank=4, alpha=None, names=("lora_up.weight", "lora_down.weight"), dtype=None):
        weight = self.parts[part][module].weight
        up, down = self.pair(weight, rank)
        if dtype:
            up, down = up.to(dtype), down.to(dtype)
        self.tensors |= {f"{key}.{names[0]}": up, f"{key}.{names[1]}": down}
        if alpha is not None:
            self.tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
        scale = 1.0 if alpha is None else alpha / rank
        self.add(part, module, up.float().flatten(1) @ down.float().flatten(1) * scale)


def ldm(name):
    """The original U-Net's name of a module of the embedded base, whose blocks are numbered like SDXL's."""
    name = name.replace("mid_block.attentions.0", "middle_block.1").replace("mid_block.resnets.0", "middle_block.0")
    name = name.replace("mid_block.resnets.1", "middle_block.2")
    for block in range(3):
        for k in range(3):
            for kind, n in (("resnets", 0), ("attentions", 1)):
                name = name.replace(f"down_blocks.{block}.{kind}.{k}.", f"input_blocks.{1 + 3 * block + k}.{n}.")
                name = name.replace(f"up_blocks.{block}.{kind}.{k}.", f"output_blocks.{3 * block + k}.{n}.")
        name = name.replace(f"down_blocks.{block}.downsamplers.0.conv", f"input_blocks.{3 + 3 * block}.0.op")
        name = name.replace(f"up_blocks.{block}.upsamplers.0.conv", f"output_blocks.{2 + 3 * block}.2.conv")
    for ours, theirs in (("conv1", "in_layers.2"), ("conv2", "out_layers.3"), ("time_emb_proj", "emb_layers.1"),
                         ("conv_shortcut", "skip_connection"), ("time_embedding.linear_1", "time_embed.0"),
                         ("time_embedding.linear_2", "time_embed.2"), ("add_embedding.linear_1", "label_emb.0.0"),
                         ("add_embedding.linear_2", "label_emb.0.2")):
        name = name.removesuffix(ours) + theirs if name.endswith(ours) else name
    return {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}.get(name, name)


def flat(name):
    return name.replace(".", "_")


def kohya(name):
    return f"lora_unet_{flat(ldm(name))}"


def text(name, prefix=""):
    """A text encoder's module as files name it; transformers 5.6 and later leave `text_model.` out."""
    inside = name.removeprefix("text_model.")
    return prefix + (inside if inside == "text_projection" else f"text_model.{inside}")


def text_layers(make):
    """(part, its number, module) of what kohya-ss trains of the text encoders."""
    for number, part in ((1, "text_encoder"), (2, "text_encoder_2")):
        for name, _ in make.modules(part, ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")):
            yield part, number, name


@layout
def kohya_default(make):
    """sd-scripts' default: U-Net and both text encoders, rank 8, alpha 1, with its header."""
    for name, _ in make.modules(ends=(*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")):
        make.lora("unet", name, kohya(name), 8, 1)
    for part, number, name in text_layers(make):
        make.lora(part, name, f"lora_te{number}_{flat(text(name))}", 8, 1)
    make.header = {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_dim": "8", "ss_network_alpha": "1"}


@layout
def kohya_without_alpha(make):
    for name, _ in make.modules():
        make.lora("unet", name, kohya(name), 3)


@layout
def kohya_fp16(make):
    for name, _ in make.modules():
        make.lora("unet", name, kohya(name), 4, 2, dtype=torch.float16)


@layout
def kohya_bf16(make):
    for name, _ in make.modules():
        make.lora("unet", name, kohya(name), 4, 2, dtype=torch.bfloat16)


@layout
def ai_toolkit(make):
    """diffusers' names with underscores, as OneTrainer's LEGACY and this project's earlier files too."""
    for name, _ in make.modules():
        make.lora("unet", name, f"lora_unet_{flat(name)}", 4, 8)
    for part, number, name in text_layers(make):
        make.lora(part, name, f"lora_te{number}_{flat(text(name))}", 4, 8)


@layout
def locon(make):
    """LyCORIS' LoCon: every Linear and convolution, the convolutions with another rank and alpha."""
    make.size = 0.05
    for name, module in make.modules(ends="", kind=(nn.Linear, nn.Conv2d)):
        convolution = isinstance(module, nn.Conv2d)
        make.lora("unet", name, kohya(name), 2 if convolution else 4, 1.5 if convolution else 4)


@layout
def locon_with_diffusers_names(make):
    for name, _ in make.modules(ends="", kind=(nn.Linear, nn.Conv2d)):
        make.lora("unet", name, f"lora_unet_{flat(name)}", 2, 1)


@layout
def tucker(make):
    """LoCon with `lora_mid`: up, a small kernel, down."""
    for name, module in make.modules(ends=("conv1", "conv2"), kind=nn.Conv2d):
        out, into = module.weight.shape[:2]
        up, mid, down = make.random(out, 3, 1, 1), make.random(3, 3, 3, 3, size=0.3), make.random(3, into, 1, 1)
        key = kohya(name)
        make.tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_mid.weight": mid, f"{key}.lora_down.weight": down,
                         f"{key}.alpha": torch.tensor(2.0)}
        make.add("unet", name, torch.einsum("op,pqkl,qi->oikl", up[..., 0, 0], mid, down[..., 0, 0]) * 2 / 3)


@layout
def ranks_that_differ(make):
    for number, (name, _) in enumerate(make.modules()):
        make.lora("unet", name, kohya(name), 1 + number % 5)


@layout
def resized(make):
    """sd-scripts' resize_lora: rank and alpha of each layer its own; text encoders too."""
    for number, (name, _) in enumerate(make.modules()):
        make.lora("unet", name, kohya(name), 2 + number % 6, 0.5 + number % 7)
    for number, (part, k, name) in enumerate(text_layers(make)):
        make.lora(part, name, f"lora_te{k}_{flat(text(name))}", 2 + number % 3, 1 + number % 4)


def dora(make, rows, names):
    for name, module in names:
        make.lora("unet", name, kohya(name), 4, 3)
        weight, added = module.weight, make.added["unet"][name]
        merged = (weight + added).detach()
        if rows:
            lengths = merged.flatten(1).norm(dim=1)
            shape = (-1, *[1] * (weight.dim() - 1))
        else:
            lengths = merged.transpose(0, 1).flatten(1).norm(dim=1)
            shape = (1, -1, *[1] * (weight.dim() - 2))
        learned = (lengths * (1 + make.random(len(lengths), size=0.2))).reshape(shape)
        make.tensors[f"{kohya(name)}.dora_scale"] = learned
        make.add("unet", name, merged * learned / lengths.reshape(shape) - weight.detach())


@layout
def dora_of_rows(make):
    dora(make, True, [*make.modules(), *make.modules(ends=("conv1", "downsamplers.0.conv"), kind=nn.Conv2d)])


@layout
def dora_of_columns(make):
    dora(make, False, [*make.modules(), *make.modules(ends=("conv1", "downsamplers.0.conv"), kind=nn.Conv2d)])


@layout
def dora_of_diffusers(make):
    """peft's: the lengths of rows as `lora_magnitude_vector`, alpha in the header."""
    for name, module in make.modules():
        up, down = make.pair(module.weight, 4)
        merged = (module.weight + up @ down * 10 / 4).detach()
        learned = merged.norm(dim=1) * (1 + make.random(len(merged), size=0.2))
        key = f"unet.{name}"
        make.tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        make.tensors[f"{key}.lora_magnitude_vector"] = learned
        make.add("unet", name, merged * (learned / merged.norm(dim=1))[:, None] - module.weight.detach())
    make.header = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 10, "unet.use_dora": True})}


def loha(make, rank, alpha):
    for name, module in make.modules(ends=(*ATTENTION, "conv2"), kind=(nn.Linear, nn.Conv2d)):
        out, into = len(module.weight), module.weight[0].numel()
        a, b, c, d = (make.random(*s, size=0.4) for s in ((out, rank), (rank, into)) * 2)
        key = kohya(name)
        make.tensors |= {f"{key}.hada_w1_a": a, f"{key}.hada_w1_b": b, f"{key}.hada_w2_a": c, f"{key}.hada_w2_b": d,
                         f"{key}.alpha": torch.tensor(float(alpha))}
        make.add("unet", name, (a @ b) * (c @ d) * alpha / rank)


@layout
def loha_small(make):
    loha(make, 2, 1)


@layout
def loha_large(make):
    loha(make, 12, 2)


@layout
def loha_tucker(make):
    for name, module in make.modules(ends="conv1", kind=nn.Conv2d):
        out, into = module.weight.shape[:2]
        key, whole = kohya(name), []
        for k in (1, 2):
            t, a, b = make.random(2, 2, 3, 3), make.random(2, out, size=1), make.random(2, into, size=1)
            make.tensors |= {f"{key}.hada_t{k}": t, f"{key}.hada_w{k}_a": a, f"{key}.hada_w{k}_b": b}
            whole.append(torch.einsum("pqkl,po,qi->oikl", t, a, b))
        make.add("unet", name, whole[0] * whole[1])


def lokr(make, key_of, small=None, large=None, alpha=None):
    """`small` and `large`: ranks of the two factors, None for a whole one; the first factor is 2 x 2."""
    for name, module in make.modules(ends=(*ATTENTION, "ff.net.2", "conv1"), kind=(nn.Linear, nn.Conv2d)):
        out, into = module.weight.shape[0] // 2, module.weight[0].numel() // 2
        key, factors = key_of(name), []
        kernel = module.weight.shape[2:]
        for k, shape, rank in ((1, (2, 2), small), (2, (out, into), large)):
            if rank is None:
                factors.append(make.random(*shape, size=0.2))
                stored = factors[-1].reshape(out, -1, *kernel) if k == 2 else factors[-1]
                make.tensors[f"{key}.lokr_w{k}"] = stored
            else:
                a, b = make.random(shape[0], rank, size=0.4), make.random(rank, shape[1], size=0.4)
                make.tensors |= {f"{key}.lokr_w{k}_a": a, f"{key}.lokr_w{k}_b": b}
                factors.append(a @ b)
        if alpha is not None:
            make.tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
        rank = large or small
        make.add("unet", name, torch.kron(*factors) * (alpha / rank if alpha and rank else 1.0))


@layout
def lokr_whole(make):
    """SimpleTuner's: both factors whole, so that alpha has no meaning."""
    lokr(make, lambda name: f"lycoris_{flat(name)}", alpha=1e10)


@layout
def lokr_low_rank(make):
    lokr(make, kohya, large=3, alpha=1)


@layout
def lokr_both_low_rank(make):
    lokr(make, kohya, small=1, large=3, alpha=2)


@layout
def lokr_tucker(make):
    for name, module in make.modules(ends="conv2", kind=nn.Conv2d):
        out, into = module.weight.shape[0] // 2, module.weight.shape[1] // 2
        w1, t = make.random(2, 2), make.random(3, 3, 3, 3)
        a, b = make.random(3, out, size=1), make.random(3, into, size=1)
        key = kohya(name)
        make.tensors |= {f"{key}.lokr_w1": w1, f"{key}.lokr_t2": t, f"{key}.lokr_w2_a": a, f"{key}.lokr_w2_b": b,
                         f"{key}.alpha": torch.tensor(1.5)}
        w2 = torch.einsum("pqkl,po,qi->oikl", t, a, b)
        make.add("unet", name, torch.kron(w1, w2.flatten(1)) * 1.5 / 3)


@layout
def lokr_with_dora(make):
    lokr(make, kohya, large=3, alpha=1)
    for name, added in list(make.added["unet"].items()):
        weight = make.parts["unet"][name].weight.detach()
        merged = weight + added
        lengths = merged.flatten(1).norm(dim=1)
        learned = (lengths * (1 + make.random(len(lengths), size=0.2))).reshape(-1, *[1] * (weight.dim() - 1))
        make.tensors[f"{kohya(name)}.dora_scale"] = learned
        make.add("unet", name, merged * learned / lengths.reshape(learned.shape) - weight)


@layout
def whole_differences(make):
    for name, module in make.modules(ends=("to_q", "conv1"), kind=(nn.Linear, nn.Conv2d)):
        difference = make.random(*module.weight.shape, size=0.05)
        make.tensors[f"{kohya(name)}.diff"] = difference
        make.add("unet", name, difference)


def one_trainer(make, unet, clips):
    for name, _ in make.modules(ends=(*ATTENTION, "conv1"), kind=(nn.Linear, nn.Conv2d)):
        make.lora("unet", name, unet(name), 4, 3)
    for part, number, name in text_layers(make):
        make.lora(part, name, f"{clips[number - 1]}.{text(name)}", 4, 3)
    make.lora("text_encoder_2", "text_projection", f"{clips[1]}.text_projection", 4, 3)


@layout
def one_trainer_comfy(make):
    one_trainer(make, lambda name: f"diffusion_model.{ldm(name)}",
                ("text_encoders.clip_l.transformer", "text_encoders.clip_g.transformer"))


@layout
def one_trainer_original(make):
    """OMI's names, with embeddings of words in the same file, which are not used."""
    one_trainer(make, lambda name: f"unet.{ldm(name)}", ("clip_l", "clip_g"))
    make.tensors["bundle_emb.style.string_to_params.clip_l"] = make.random(2, 96)


@layout
def one_trainer_dotted(make):
    one_trainer(make, lambda name: f"lora_unet.{name}", ("lora_te1", "lora_te2"))


@layout
def one_trainer_diffusers(make):
    for name, _ in make.modules():
        make.lora("unet", name, f"unet.{name}", 4, names=("lora_B.weight", "lora_A.weight"))
    for part, _, name in text_layers(make):
        make.lora(part, name, f"{part}.{text(name)}", 4, names=("lora_B.weight", "lora_A.weight"))


@layout
def comfyui(make):
    """ComfyUI's own trainer: the original names, no alpha."""
    for name, _ in make.modules():
        make.lora("unet", name, f"diffusion_model.{ldm(name)}", 4)


@layout
def checkpoint_names(make):
    """As a single-file checkpoint names its text encoders, the second as OpenCLIP does."""
    for name, _ in make.modules("text_encoder", "fc1"):
        make.lora("text_encoder", name, f"conditioner.embedders.0.transformer.{text(name)}", 4, 2)
    for name, _ in make.modules("text_encoder_2", ("fc1", "fc2", "out_proj")):
        open_clip = name.removeprefix("text_model.").replace("encoder.layers", "transformer.resblocks")
        for ours, theirs in (("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("self_attn.", "attn.")):
            open_clip = open_clip.replace(ours, theirs)
        make.lora("text_encoder_2", name, f"conditioner.embedders.1.model.{open_clip}", 4, 2)


@layout
def peft_folder(make):
    """peft's own: alpha in adapter_config.json, with a field that this version doesn't know."""
    for name, _ in make.modules():
        make.lora("unet", name, f"base_model.model.{name}", 4, names=("lora_B.weight", "lora_A.weight"))
        make.added["unet"][name] *= 9 / 4
    make.beside = {"adapter_config.json": json.dumps({"r": 4, "lora_alpha": 9, "field_of_tomorrow": [{}]})}


@layout
def diffusers_with_patterns(make):
    """alpha by layer and rank-stabilised scaling, in the header that diffusers writes."""
    for number, (name, _) in enumerate(make.modules()):
        rank = 4 if number % 2 else 2
        make.lora("unet", name, f"unet.{name}", rank, names=("lora.up.weight", "lora.down.weight"))
        make.added["unet"][name] *= (6 if name.endswith("attn2.to_k") else 5) / math.sqrt(rank)
    for part, _, name in text_layers(make):
        make.lora(part, name, f"{part}.{text(name)}", 2, names=("lora_linear_layer.up.weight",
                                                               "lora_linear_layer.down.weight"))
        make.added[part][name] *= 3 / 2
    settings = {"unet.lora_alpha": 5, "unet.alpha_pattern": {"attn2.to_k": 6}, "unet.use_rslora": True,
                "text_encoder.lora_alpha": 3, "text_encoder_2.lora_alpha": 3, "text_encoder_2.use_rslora": False,
                "unet.field_of_tomorrow": {"a": [1]}}
    make.header = {"lora_adapter_metadata": json.dumps(settings)}


@layout
def diffusers_of_2023(make):
    """Attention processors' names."""
    for name, _ in make.modules():
        parent, _, projection = name.rpartition(".attn")
        place, projection = projection[:1], projection[2:].removesuffix(".0")
        make.lora("unet", name, f"unet.{parent}.attn{place}.processor.{projection}_lora", 4,
                  names=("up.weight", "down.weight"))


@layout
def text_encoders_alone(make):
    for part, number, name in text_layers(make):
        make.lora(part, name, f"lora_te{number}_{flat(text(name))}", 4, 2)
