"""Encoding on a CUDA GPU: decoding alone, the VAE alone, both as a run does it; and how soon a run begins to train.

    PYTHONPATH=. python tests/benchmarks/encode.py --out DIR [--count 1221] [--start]

Pictures are drawn (JPEG, about 1024 px), the VAE has SDXL's size and random weights, fp16. Decoding has the run's own
number of threads, whatever the machine has cores. With --start a full-size U-Net is written too, unless it is there,
and `train.begin` to the first update is timed from an empty folder, with few pictures.
"""

import argparse
import io
import json
import shutil
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import sdxl
import torch
from PIL import Image, ImageFilter

from naruto_lora import cache, data, models, recipe, train
from naruto_lora.disk import shards
from naruto_lora.memory import gpu
from naruto_lora.tiny import BASE, world

SIDE = 1024
ALONE = 160  # pictures whose decoding, and encoding, is measured alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1221)
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--start", action="store_true", help="writes all of a random SDXL, 7 GB, and begins to train")
    parser.add_argument("--tiny", action="store_true", help="the embedded base on the CPU: a try of this script alone")
    args = parser.parse_args()
    folder = pictures(args.out / "pictures", args.count, args.side)
    plan = written(args).replace(dataset=str(folder), resolution=args.side)
    begun = time.time()
    examples = data.load(folder)
    figures = {"device": "CPU" if args.tiny else torch.cuda.get_device_name(), "torch": torch.__version__}
    figures |= {"pictures": len(examples), "checked a second": len(examples) / (time.time() - begun)}
    figures["decoded a second"] = decoding(examples[:ALONE], args.side)
    figures |= encoding(examples[:ALONE], plan)
    figures |= together(examples, plan, args.out / "cache")
    slower = min(figures["decoded a second"], figures["encoded a second"])
    figures["slower alone / together"] = slower / figures["both a second"]
    if args.start:
        few = pictures(args.out / "few", ALONE, args.side)
        figures |= start(plan.replace(dataset=str(few)), args.out / "start" / "run")
    print(json.dumps({name: round(v, 3) if isinstance(v, float) else v for name, v in figures.items()}, indent=1))
    (args.out / "encode.json").write_text(json.dumps(figures, indent=1))


def written(args) -> recipe.Recipe:
    """naruto-1024 on a base with random weights: the VAE alone, or all of it."""
    if args.tiny:
        return recipe.load("naruto-1024", base=str(BASE), vae="", precision="fp32")
    base = args.out / "base"
    if args.start:
        sdxl.write(base, BASE)
    else:
        sdxl.write_vae(base)
    gpu.free()
    return recipe.load("naruto-1024", base=str(base), vae=str(base / "vae"))


def pictures(folder: Path, count: int, side: int) -> Path:
    """`count` captioned JPEGs near `side` px, as heavy to decode as photographs; drawn by every core."""
    folder.mkdir(parents=True, exist_ok=True)
    people = world.prompts(count, seed=5)
    rows = [{"file_name": f"{k:04d}.jpg", "text": person["text"]} for k, person in enumerate(people)]
    jobs = [(folder / row["file_name"], k, person["attributes"], side) for k, (row, person) in
            enumerate(zip(rows, people, strict=True))]
    with get_context("fork").Pool() as pool:
        pool.map(_picture, jobs, chunksize=8)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _picture(job) -> None:
    path, k, attributes, side = job
    rng = np.random.default_rng([5, k])
    size = tuple(int(side * rng.uniform(0.9, 1.3)) for _ in range(2))
    grain = Image.effect_noise(size, 24).filter(ImageFilter.GaussianBlur(0.7)).convert("RGB")
    image = world.draw(attributes, world.STYLE, rng, 64).resize(size, Image.BICUBIC)
    buffer = io.BytesIO()
    Image.blend(image, grain, 0.3).save(buffer, "JPEG", quality=90)
    path.write_bytes(buffer.getvalue())


def decoding(examples, side: int) -> float:
    """Pictures a second."""
    begun = time.perf_counter()
    for _ in data.decode_ahead((example, side) for example in examples):
        pass
    return len(examples) / (time.perf_counter() - begun)


def encoding(examples, plan) -> dict:
    """Pictures a second through the VAE, of pictures decoded before: as a run does it, and how else it could be."""
    device = models.device_for(plan.precision)
    vae = models.load_vae(plan.base, plan.vae, models.DTYPES[plan.precision], device)
    own = cache._batch_size(vae, plan.resolution)
    crops = list(data.decode_ahead((example, plan.resolution) for example in examples[:32]))
    figures = {"batch": own, "encoded a second": timed(vae, crops, own, len(examples))}
    for layout in (torch.contiguous_format, torch.channels_last) if device.type == "cuda" else ():
        vae = vae.to(memory_format=layout)
        for benchmark in (False, True):
            torch.backends.cudnn.benchmark = benchmark
            for batch in (1, 4):
                name = f"{str(layout)[6:]}, cudnn.benchmark {benchmark}, batch {batch}"
                gpu.reset_peak()
                figures[name] = [round(timed(vae, crops, batch, 32), 1), round(gpu.peak_gib(), 2)]
    torch.backends.cudnn.benchmark = False
    del vae
    gpu.free()
    return figures


def timed(vae, crops, batch: int, count: int) -> float:
    """Pictures a second: `count` of them in batches, the GPU never idle."""
    cache.encode_pictures(vae, crops[:batch])
    _wait()
    begun = time.perf_counter()
    for k in range(0, count, batch):
        cache.encode_pictures(vae, [crops[(k + n) % len(crops)] for n in range(batch)])
    _wait()
    return -(-count // batch) * batch / (time.perf_counter() - begun)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def together(examples, plan, folder: Path) -> dict:
    """As a run does it: VAE loaded, pictures decoded, encoded and written; captions, which come first, are left out."""
    shutil.rmtree(folder, ignore_errors=True)
    missing = {str(k).zfill(32): example for k, example in enumerate(examples)}
    folder.mkdir(parents=True)
    store = shards.Shards(folder, fits=lambda entry: True)
    gpu.reset_peak()
    begun = time.perf_counter()
    encoded = cache._pictures(missing, plan)
    cache._fill(store, missing, encoded, "pictures", None)
    seconds = time.perf_counter() - begun
    return {"seconds for both": seconds, "both a second": len(examples) / seconds, "peak GiB": gpu.peak_gib()}


def start(plan, folder: Path) -> dict:
    """Seconds from nothing but `ALONE` pictures and the weights on the disk to the first update done."""
    shutil.rmtree(folder.parent / "cache", ignore_errors=True)
    begun = time.perf_counter()
    run = train.begin(plan, folder)
    ready = time.perf_counter() - begun
    run.update()
    return {"seconds to begin": ready, "seconds to the first update": time.perf_counter() - begun}


if __name__ == "__main__":
    main()
