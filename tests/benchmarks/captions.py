"""What captions are worth: LoRAs of the same pictures with true captions, a captioner's, and none, on the small world.

    python tests/benchmarks/captions.py --out DIR [--seeds 2] [--steps 150] [--pictures 160] [--prompts 40]

Each arm trains with the same seeds; only the captions differ. All are measured on the same unseen pictures with their
true captions (hold-out loss in pairs, averaged over seeds), and by the judge on pictures that they draw from unseen
prompts. `true` against itself with other seeds shows what is noise. About ten minutes on one core.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from naruto_lora import cache, data, pipeline, recipe, train
from naruto_lora.captioning import write
from naruto_lora.measure import metrics
from naruto_lora.tiny import BASE, judge, world

ARMS = {"true": None, "captioner": ("naruto_lora.tiny.captioner", "missing"), "none": ("", "none")}
SIZE, HELD = 64, 96  # px; unseen pictures to measure on


def prepare(options) -> dict[str, Path]:
    """{arm: its data set}: the same pictures, captioned in its way."""
    folders = {}
    for arm, captioned in ARMS.items():
        folder = folders[arm] = options.out / arm
        if folder.is_dir():
            shutil.rmtree(folder)
        world.write_dataset(folder, options.pictures, seed=0, size=SIZE)
        if captioned:
            (folder / "metadata.jsonl").unlink()
            print(f"{arm}: {write.caption(folder, *captioned)}", flush=True)
    world.write_dataset(options.out / "holdout", HELD, seed=1, size=SIZE)
    return folders


def plan(options, folder: Path, seed: int) -> recipe.Recipe:
    return recipe.Recipe(
        "few", (recipe.Leg(options.steps, 2e-3),), resolution=SIZE, batch=8, accumulation=1, caption_dropout=0.1,
        holdout=0, precision="fp32", previews=0, measure_every=10_000, save_every=10_000, base=str(BASE), vae="",
        dataset=str(folder), seed=seed,
    )  # fmt: skip


def measured(options, folder: Path, seed: int, name: str) -> dict:
    """Hold-out losses (N,) and the judge's figures (prompts,) of one training."""
    made, place = plan(options, folder, seed), options.out / "runs" / f"{name}-{seed}"
    train.train(made, place, options.out / "cache")
    pipe = pipeline.load(str(BASE), adapters={"style": place}, precision="fp32")
    held = cache.encode(data.load(options.out / "holdout"), made, options.out / "cache")
    losses = metrics.holdout_losses(pipe, held, "style")
    prompts = world.prompts(options.prompts, seed=8)
    drawn = pipeline.draw(pipe, [p["text"] for p in prompts], list(range(len(prompts))), "style", steps=16,
                          guidance_scale=2.0, resolution=SIZE, batch=20)  # fmt: skip
    scores = judge.score(drawn, prompts)
    return {"losses": losses, "attributes": scores["attributes"], "style": scores["style"]}


def summary(found: dict[str, list[dict]]) -> dict:
    """{arm: figures}: means over seeds, and the paired change from `true`, as words with 95% intervals."""
    kinds, rows = ("losses", "attributes", "style"), {}
    mean = {arm: {what: np.mean([run[what] for run in runs], axis=0) for what in kinds} for arm, runs in found.items()}
    for arm, values in mean.items():
        rows[arm] = {"hold-out loss": f"{values['losses'].mean():.4f}",
                     "attributes right": f"{100 * values['attributes'].mean():.1f}%",
                     "in the style": f"{100 * values['style'].mean():.1f}%"}  # fmt: skip
        if arm != "true":
            rows[arm] |= {f"{what}, change": str(metrics.paired(mean["true"][what], values[what])) for what in values}
    if len(found["true"]) > 1:
        first, second = found["true"][:2]
        rows["true, another seed"] = {"losses, change": str(metrics.paired(first["losses"], second["losses"]))}
    return rows


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--pictures", type=int, default=160)
    parser.add_argument("--prompts", type=int, default=40)
    options = parser.parse_args(arguments)
    folders = prepare(options)
    found = {arm: [measured(options, folder, seed, arm) for seed in range(options.seeds)]
             for arm, folder in folders.items()}  # fmt: skip
    rows = summary(found)
    (options.out / "captions.json").write_text(json.dumps(rows, indent=1))
    print(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
