"""Makes the embedded default base: a small SDXL that draws portraits, and the judge that reads them.

    python -m naruto_lora.tiny.pretrain [--minutes 9.3] [--work DIR] [--out DIR] [--seed 0]

draws its own pictures, then trains in turn the judge, a critic, the VAE, and the U-Net with both text
encoders: about 19 minutes on one H100 or H200. With --minutes it stops in time, keeps its state in --work,
and the same command run again goes on where it was. --toy runs the whole chain in a minute or two on a CPU,
to see that it works; what that makes cannot draw.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, bar the machine."""

    seed: int = 0
    total_minutes: float = 18.5  # for all stages; the U-Net takes what the others leave
    size: int = 64  # px, the side of a picture
    ordinary: int = 120_000  # pictures in the eight ordinary styles
    shapes: int = 30_000  # pictures without a portrait, for the VAE
    style: int = 12_000  # pictures in the style to learn, for the judge only
    held_out: int = 2_000  # pictures of each kind
    judge_batch: int = 512  # pictures
    judge_rate: float = 2e-3  # learning rate at the peak
    judge_seconds: float = 16.0  # each for judge and critic
    judge_steps: int | None = None  # None: what fits into the seconds
    vae_channels: tuple[int, int, int] = (48, 96, 128)  # at 64, 32 and 16 px
    vae_batch: int = 256  # pictures
    vae_rate: float = 8e-4
    vae_seconds: float = 270.0
    vae_steps: int | None = None
    unet_channels: tuple[int, int, int] = (48, 80, 96)  # at 16, 8 and 4 latent px
    text_widths: tuple[int, int] = (96, 128)  # channels of the two text encoders
    unet_batch: int = 512  # pictures
    unet_rate: float = 1e-3
    unet_steps: int | None = None  # None: what fits into the total
    half_size_first: float = 0.12  # share of the steps, at the start, at half the size
    half_size_later: float = 0.05  # share of the later steps
    dropped: float = 0.1  # share of captions
    prompts: int = 400  # drawn at each guidance for the figures
    guidances: tuple[float, ...] = (2.0, 4.0)
    euler_steps: int = 25


TOY = {
    "ordinary": 300, "shapes": 100, "style": 60, "held_out": 30, "judge_batch": 16, "judge_steps": 8,
    "vae_batch": 4, "vae_steps": 6, "unet_batch": 8, "unet_steps": 16, "prompts": 2, "euler_steps": 3,
}  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m naruto_lora.tiny.pretrain", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--minutes", type=float, help="stop after so many, to be run again (default: no limit)"
    )
    parser.add_argument(
        "--finish", action="store_true", help="plan the U-Net's steps so that this process ends it"
    )
    parser.add_argument(
        "--total-minutes", type=float, default=18.5, help="plan the U-Net's steps for this (18.5)"
    )
    parser.add_argument("--vae-seconds", type=float, default=270.0, help="time for the VAE's training (270)")
    parser.add_argument("--unet-steps", type=int, help="a fixed number instead")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/pretrain"), help="where the state is kept (runs/pretrain)"
    )
    parser.add_argument(
        "--out", type=Path, help="the base's folder; judge.safetensors goes beside it (in the package)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy", action="store_true", help="a tiny run of everything, on a CPU if need be")
    return parser.parse_args(arguments)


def settings_of(args: argparse.Namespace) -> Settings:
    given = {"seed": args.seed, "total_minutes": args.total_minutes, "vae_seconds": args.vae_seconds}
    given |= TOY if args.toy else {}
    given |= {"unet_steps": args.unet_steps} if args.unet_steps else {}
    return Settings(**given)


def about(settings: Settings) -> dict:
    """What the log says of settings and versions. Does not touch CUDA, since drawing forks afterwards."""
    import diffusers
    import numpy
    import PIL
    import tokenizers
    import torch
    import transformers

    modules = (torch, diffusers, transformers, tokenizers, numpy, PIL)
    return {
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
        "versions": {m.__name__: str(m.__version__) for m in modules} | {"python": platform.python_version()},
        "cores": os.cpu_count(),
    }


def draw(work: Path, record, settings: Settings) -> None:
    from naruto_lora.tiny.pretrain_pictures import draw_kind, load_captions
    from naruto_lora.tiny.pretrain_unet import write_ids, write_tokenizers

    if record.get("draw", "done"):
        return
    with record.stage("draw"):
        counts = {kind: getattr(settings, kind) for kind in ("ordinary", "shapes", "style")}
        counts |= {f"{kind}_held_out": settings.held_out for kind in counts}
        for kind, count in counts.items():
            draw_kind(work, kind, count, settings.seed, settings.size)
        record.note("draw", pictures=counts)
        write_tokenizers(work, (text for texts in load_captions(work, "ordinary")[:10_000] for text in texts))
        for kind in ("ordinary", "ordinary_held_out"):
            write_ids(work, kind)


def readers(work: Path, record, settings: Settings, device):
    """The judge and the critic, as their fp16 files are; trained first if they are not yet."""
    from safetensors.torch import save_file

    from naruto_lora.tiny.pretrain_judge import accuracy, load_reader, train_reader
    from naruto_lora.tiny.pretrain_pictures import load_labels, load_pictures
    from naruto_lora.tiny.pretrain_save import half_precision

    for name in ("judge", "critic"):
        if record.get(name, "done"):
            continue
        record.need(settings.judge_seconds + 20)
        with record.stage(name):
            reader = train_reader(name, work, record, settings, device)
            save_file(half_precision(reader), work / f"{name}.safetensors")
    judge, critic = (load_reader(work / f"{name}.safetensors", device) for name in ("judge", "critic"))
    if not record.get("judge", "style"):
        for kind in ("ordinary", "style"):
            pictures = load_pictures(work, f"{kind}_held_out", device) / 255
            figures = accuracy(judge, pictures, load_labels(work, f"{kind}_held_out", device))
            record.note("judge", **{kind: figures})
            record.say(f"judge on unseen drawings, {kind}: {figures}")
    return judge, critic


def make_vae(work: Path, reports: Path, record, settings: Settings, device, judge, critic):
    """The trained VAE and its scaling factor."""
    import torch

    from naruto_lora.tiny import pretrain_vae
    from naruto_lora.tiny.pretrain_pictures import load_pictures

    path = work / "vae_done.pt"
    if not record.get("vae", "done"):
        with record.stage("vae"):
            vae = pretrain_vae.train_vae(work, critic, record, settings, device)
            torch.save(vae.state_dict(), path)
            means = pretrain_vae.to_latents(vae, load_pictures(work, "ordinary", device)[:20_000])
            record.note("vae", scaling_factor=round(1 / means.std().item(), 5))
            spread = {"mean": means.mean((0, 2, 3)).tolist(), "std": means.std((0, 2, 3)).tolist()}
            record.note("vae", latents={k: [round(x, 3) for x in v] for k, v in spread.items()})
            pretrain_vae.check_vae(vae, judge, work, reports, record, device)
    vae = pretrain_vae.make_vae(settings).to(device).eval().requires_grad_(False)
    vae.load_state_dict(torch.load(path, map_location=device))
    return vae, record.get("vae", "scaling_factor")


def make_base(work: Path, out: Path, record, settings: Settings, device, vae, scale: float, judge) -> None:
    """Train the U-Net with the text encoders, then write the base's folder."""
    from naruto_lora.tiny.pretrain_save import save_base
    from naruto_lora.tiny.pretrain_unet import train_unet

    if record.get("unet", "done"):
        return
    with record.stage("unet"):
        parts = train_unet(work, vae, scale, record, settings, device, reserve=40.0)
        record.note("save", mebibytes=save_base(parts, vae, scale, work, out))
        shutil.copyfile(work / "judge.safetensors", out.parent / "judge.safetensors")


def run(args: argparse.Namespace) -> None:
    """Every stage in turn, those that are done left out. Raises Stop when --minutes are over."""
    import torch

    from naruto_lora.tiny.pretrain_engine import Record
    from naruto_lora.tiny.pretrain_save import draw_base

    settings = settings_of(args)
    work, reports = args.work, args.work / "report"
    out = args.out or (work / "made" / "base" if args.toy else HERE / "base")
    reports.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    record = Record(work, args.minutes, about(settings), args.finish)
    record.save()
    draw(work, record, settings)  # forks, so before CUDA is touched
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record.data["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    judge, critic = readers(work, record, settings, device)
    vae, scale = make_vae(work, reports, record, settings, device, judge, critic)
    make_base(work, out, record, settings, device, vae, scale, judge)
    if not record.get("figures", "done"):
        record.need(30.0)
        with record.stage("figures"):
            draw_base(out, judge.cpu(), reports, record, settings, device)
    shutil.copyfile(record.path, out / "log.json")
    shutil.copyfile(record.path, reports / "log.json")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    args.work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((args.work / "compiled").resolve()))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes share the cores out already
    from naruto_lora.tiny.pretrain_engine import Stop

    try:
        run(args)
    except Stop:
        print("stopped in time; run the same command again to go on", flush=True)
    else:
        print(f"done; log and pictures are in {args.work / 'report'}", flush=True)


if __name__ == "__main__":
    main()
