"""Full-size SDXL with random weights on a CUDA GPU: the named recipes train ten steps, save, load and draw.

    python tests/benchmarks/full_size.py --out DIR [--cap 14.56]

Random weights say nothing of pictures; they say that the code runs at full size, how fast, and in how much memory.
With --cap no more than so many GiB of the card can be taken, as on a smaller one.
"""

import argparse
import json
import time
from pathlib import Path

import sdxl
import torch

from naruto_lora import pipeline, recipe, train
from naruto_lora.memory import gpu
from naruto_lora.progress import Progress
from naruto_lora.tiny import BASE, world

STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizers", type=Path, default=BASE, help="a folder with tokenizer and tokenizer_2")
    parser.add_argument("--cap", type=float, help="GiB")
    parser.add_argument("--recipes", nargs="+", default=["naruto-256", "naruto-1024"])
    args = parser.parse_args()
    begun = time.time()
    base = sdxl.write(args.out / "base", args.tokenizers)
    gpu.free()
    data = world.write_dataset(args.out / "data", count=120, size=256)
    print(f"random base and data written in {time.time() - begun:.0f} s", flush=True)
    figures = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cap_gib": args.cap}
    if args.cap:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.cap * gpu.GIB / total)
    for name in args.recipes:
        plan = recipe.load(name, base=str(base), vae=str(base / "vae"), dataset=str(data))
        figures[name] = measure(plan.replace(legs=(recipe.Leg(STEPS, 1e-4),)), args.out)
        (args.out / "full_size.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))


def measure(plan: recipe.Recipe, out: Path) -> dict:
    """Trains `plan`, goes on from its checkpoint, repeats one batch, draws; seconds, GiB and losses."""
    folder = out / plan.name
    begun = time.time()
    run = train.begin(plan, folder, show=Progress())
    ready = time.time() - begun
    run.to_the_end()
    record = run.finish()
    del run
    gpu.free()
    longer = plan.replace(legs=(*plan.legs, recipe.Leg(STEPS + 2, 1e-4)))
    run = train.begin(longer, folder, show=Progress())
    resumed_at = run.step
    run.to_the_end()
    step_seconds, repeated = repeat(run)
    del run
    gpu.free()
    return {
        "seconds_until_first_step": round(ready, 1),
        "seconds_a_step": round(record["seconds"] / STEPS, 2),
        "seconds_a_warm_step": round(step_seconds, 2),
        "peak_gib_training": round(record["peak_gib"], 2),
        "losses": [round(x, 4) for x in record["losses"]],
        "resumed_at_step": resumed_at,
        "losses_on_a_repeated_batch": [round(x, 4) for x in repeated],
        "adapter_mb": round((folder / "pytorch_lora_weights.safetensors").stat().st_size / 1e6, 1),
    } | draw(plan, folder)


def repeat(run: train.Run) -> tuple[float, list[float]]:
    """Six updates on the pictures, noise and timesteps of the first step, at ten times the rate: seconds, losses."""
    run.recipe = run.recipe.replace(legs=(recipe.Leg(STEPS, 1e-3),))
    run.step, losses = 0, []
    begun = time.time()
    for _ in range(6):
        losses.append(run.update()[0])
    return (time.time() - begun) / 6, losses


def draw(plan: recipe.Recipe, folder: Path) -> dict:
    """One picture with the saved adapter, ten steps."""
    gpu.reset_peak()
    begun = time.time()
    pipe = pipeline.load(plan.base, plan.vae, {"style": folder})
    loaded = time.time() - begun
    begun = time.time()
    picture = pipeline.draw(pipe, ["a woman with red hair"], 0, "style", steps=10, resolution=plan.resolution)[0]
    picture.save(folder / "drawn.png")
    drawn, peak = time.time() - begun, gpu.peak_gib()
    del pipe
    gpu.free()
    return {
        "seconds_to_load_pipeline": round(loaded, 1),
        "seconds_to_draw_10_steps": round(drawn, 1),
        "peak_gib_drawing": peak and round(peak, 2),
    }


if __name__ == "__main__":
    main()
