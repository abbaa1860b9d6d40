"""Drawing on a CUDA GPU beside a plain diffusers loop: full-size SDXL with random weights, base and LoRA, fp16.

    PYTHONPATH=. python tests/benchmarks/generate.py --out DIR [--plain 4 | --plain-all] [--others] [--cap 14.56]

The grid is 8 prompts x 2 seeds at 1024 px, 30 Euler steps, for the base and for a LoRA: 32 pictures. The plain loop
draws one picture after the other and calls load_lora_weights for each that needs it; --plain of each kind are timed and
the time is scaled to all. --others adds one picture at a time, and what is faster but not the same. With --cap a card
of so many GiB is imitated, and base and two adapters (4 prompts x 2 seeds) are drawn instead.

    PYTHONPATH=. python tests/benchmarks/generate.py --out DIR --tiny --adapter RUN

does neither: on the embedded world it says what guidance in a part of the steps costs, read by the judge. RUN is the
folder of a run of tiny-64.
"""

import argparse
import gc
import json
import time
from pathlib import Path

import numpy as np
import sdxl
import torch

from naruto_lora import lora, models, pipeline
from naruto_lora.measure import metrics
from naruto_lora.memory import gpu
from naruto_lora.tiny import BASE, world

SEEDS, STEPS, SIDE = [0, 1], 30, 1024
INTERVALS = ((0.0, 1.0), (0.0, 0.5), (0.25, 0.75), (0.5, 1.0), (0.0, 0.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plain", type=int, default=4, help="pictures of base, and of LoRA, that the loop is timed on")
    parser.add_argument("--plain-all", action="store_true")
    parser.add_argument("--others", action="store_true")
    parser.add_argument("--cap", type=float, help="GiB")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--try", dest="trial", action="store_true", help="embedded base: tries this script")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0, 4.0])
    args = parser.parse_args()
    if args.tiny:
        return keep(args.out / "guidance.json", quality(args.adapter, args.prompts, args.guidance))
    base, style = written(args)
    look = dict(steps=args.steps, resolution=args.side)
    if args.cap:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.cap * gpu.GIB / total)
        return keep(args.out / "capped.json", {"cap GiB": args.cap} | three_models(base, style, look))
    texts = [person["text"] for person in world.prompts(8, seed=2)]
    prompts, seeds = pipeline.cross(texts, SEEDS)
    figures = {"device": "CPU" if args.trial else torch.cuda.get_device_name(), "torch": torch.__version__}
    few = slice(0, len(prompts) if args.plain_all else args.plain)
    loop = plain_loop(base, style, prompts[few], seeds[few], look)
    figures["plain loop, seconds a picture"] = {name: seconds for name, (seconds, _) in loop.items()}
    figures["plain loop, seconds for all"] = sum(seconds * len(prompts) for seconds, _ in loop.values())
    figures["of them timed"] = [len(prompts[few])] * 2
    ours, drawn = grid(base, style, prompts, seeds, look)
    figures |= ours
    figures["times faster"] = figures["plain loop, seconds for all"] / figures["ours, seconds for all"]
    figures["ours beside the loop"] = {name: apart(drawn[name][few], loop[name][1]) for name in loop}
    figures["base beside LoRA"] = apart(drawn["base"], drawn["style"])
    if args.others:
        figures["others"] = others(base, style, prompts, seeds, look, drawn["style"], loop["style"][1])
    keep(args.out / "generate.json", figures)


def keep(path: Path, figures: dict) -> None:
    text = json.dumps(figures, indent=1, default=lambda value: round(float(value), 4))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(text)


def written(args) -> tuple[str, Path]:
    """A random base whose pictures have contrast, and a LoRA that changes them."""
    base, style = args.out / "base", args.out / "style"
    if args.trial:
        base = BASE
    else:
        sdxl.write(base, BASE)
        with_contrast(base)
    device, dtype = (torch.device("cpu"), torch.float32) if args.trial else (torch.device("cuda"), torch.float16)
    unet = models.load_unet(str(base), dtype, device)
    generator = torch.Generator().manual_seed(1)
    lora.inject(unet, 16, 16.0)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    style.mkdir(parents=True, exist_ok=True)
    lora.save(unet, style)
    del unet
    gpu.free()
    return str(base), style


def with_contrast(base: Path) -> None:
    """Scales the random VAE's last layer so that its pictures fill the range, where differences can be seen."""
    vae = models.load_vae(str(base), "", torch.float16, torch.device("cuda"))
    with torch.no_grad():
        spread = vae.decode(torch.randn(1, 4, 64, 64, device="cuda", dtype=torch.float16) * 7).sample.float().std()
        vae.decoder.conv_out.weight *= (0.4 / spread).half()
        vae.decoder.conv_out.bias *= 0
    vae.save_pretrained(base / "vae")


def plain_loop(base: str, style: Path, prompts, seeds, look: dict) -> dict:
    """{"base" and "style": (seconds a picture, pictures)} as diffusers' documentation has it."""
    from diffusers import StableDiffusionXLPipeline

    precision = torch.float16 if torch.cuda.is_available() else torch.float32
    pipe = StableDiffusionXLPipeline.from_pretrained(base, torch_dtype=precision, add_watermarker=False)
    pipe = pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": look["steps"], "height": look["resolution"], "width": look["resolution"]}
    pipe(prompts[0], **options | {"num_inference_steps": 2})  # warm
    result = {}
    for name in ("base", "style"):
        pictures, begun = [], time.perf_counter()
        for prompt, seed in zip(prompts, seeds, strict=True):
            if name == "style":
                pipe.load_lora_weights(style, weight_name=lora.FILE)
            pictures += pipe(prompt, generator=torch.Generator().manual_seed(seed), **options).images
            if name == "style":
                pipe.unload_lora_weights()
        result[name] = (time.perf_counter() - begun) / len(prompts), pictures
    del pipe
    gc.collect()
    gpu.free()
    return result


def grid(base: str, style: Path, prompts, seeds, look: dict) -> tuple[dict, dict]:
    """Ours: figures, and {"base" and "style": pictures}. The adapter's loading is counted, the base's isn't."""
    pipe = pipeline.load(base)
    pipeline.draw(pipe, prompts[:2], 0, **look | {"steps": 2}, batch=2)  # warm
    pipe.prompt_cache.clear()
    gpu.reset_peak()
    begun = time.perf_counter()
    pipeline.add_adapter(pipe, "style", style)
    drawn = {name: pipeline.draw(pipe, prompts, seeds, name, **look) for name in ("base", "style")}
    seconds = time.perf_counter() - begun
    figures = {"ours, seconds for all": seconds, "ours, batch": pipeline.batch_size(pipe, look["resolution"])}
    figures["ours, peak GiB"] = gpu.peak_gib() or 0.0
    del pipe
    gpu.free()
    return figures, drawn


def others(base: str, style: Path, prompts, seeds, look: dict, exact: list, loop: list) -> dict:
    """What else could be: seconds for eight pictures of the LoRA's, and how far they are from the exact ones."""
    pipe = pipeline.load(base, adapters={"style": style})
    prompts, seeds, exact, result = prompts[:8], seeds[:8], exact[:8], {}

    def measure(name: str, **options) -> None:
        pipeline.draw(pipe, prompts, seeds, "style", **look | {"steps": 2} | options)  # warm
        gpu.reset_peak()
        begun = time.perf_counter()
        drawn = pipeline.draw(pipe, prompts, seeds, "style", **look | options)
        seconds = time.perf_counter() - begun
        result[name] = {"seconds": seconds, "peak GiB": gpu.peak_gib() or 0.0} | apart(drawn, exact)

    measure("exact, again")
    begun = time.perf_counter()
    alone = pipeline.draw(pipe, prompts[:4], seeds[:4], "style", batch=1, **look)
    result["one at a time, seconds a picture"] = (time.perf_counter() - begun) / len(alone)
    result["one at a time, beside the loop"] = apart(alone[: len(loop)], loop[: len(alone)])
    for interval in ((0.0, 0.6), (0.2, 0.8)):
        measure(f"guidance in {interval}", guidance_interval=interval)
    pipe.set_adapters("style", 1.0)
    pipe.fuse_lora(adapter_names=["style"])
    measure("LoRA fused into the weights")
    pipe.unfuse_lora()
    pipe.unet.to(memory_format=torch.channels_last)
    measure("U-Net in channels_last")
    return result


def three_models(base: str, style: Path, look: dict) -> dict:
    """Base and two adapters, 4 prompts x 2 seeds: seconds, memory, and how many are drawn at once."""
    prompts, seeds = pipeline.cross([person["text"] for person in world.prompts(4, seed=2)], SEEDS)
    gpu.reset_peak()
    begun = time.perf_counter()
    pipe = pipeline.load(base, adapters={"low": style, "high": style})
    loaded = time.perf_counter() - begun
    batch = pipeline.batch_size(pipe, look["resolution"])
    for name in ("base", "low", "high"):
        pipeline.draw(pipe, prompts, seeds, name, **look)
    reserved = torch.cuda.max_memory_reserved() / gpu.GIB
    return {"seconds to load": loaded, "seconds to draw 24": time.perf_counter() - begun - loaded, "batch": batch,
            "batch in the end": pipeline.batch_size(pipe, look["resolution"]),
            "peak GiB": gpu.peak_gib(), "reserved GiB": reserved}


def apart(one: list, two: list) -> dict:
    """How far pictures are from each other, in levels of 255, and as a share of their own spread."""
    one, two = (np.stack([np.asarray(picture, np.float32) for picture in row]) for row in (one, two))
    away = np.abs(one - two)
    return {"mean": away.mean(), "max": away.max(), "mean / spread": away.mean() / two.std()}


def quality(adapter: Path, count: int, guidance: list[float]) -> dict:
    """What a LoRA's pictures of `count` prompts lose where guidance is left out of a part of 16 steps."""
    pipe = pipeline.load(str(BASE), adapters={"style": adapter}, precision="fp32")
    people = world.prompts(count, seed=1)
    texts, seeds, steps, result = [person["text"] for person in people], list(range(count)), 16, {}
    for scale in guidance:
        exact = None
        for interval in INTERVALS:
            drawn = pipeline.draw(pipe, texts, seeds, "style", steps=steps, guidance_scale=scale, resolution=64,
                                  batch=20, guidance_interval=interval)
            exact = exact or drawn
            guided = sum(interval[0] <= k / steps < interval[1] for k in range(steps))
            judged = metrics.judged("naruto_lora.tiny.judge", drawn, people)
            row = {name: [round(x, 1) for x in (f.value, f.low, f.high)] for name, f in judged.items()}
            row["work"] = (1 + guided / steps) / 2
            result[f"guidance {scale:g}, {interval}"] = row | apart(drawn, exact)
            print(scale, interval, row, flush=True)
    return result


if __name__ == "__main__":
    main()
