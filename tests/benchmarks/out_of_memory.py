"""Full-size SDXL with random weights on a CUDA GPU: memory is taken away in the middle of a run, which must step down.

    PYTHONPATH=. python tests/benchmarks/out_of_memory.py --out DIR [--base FOLDER] [--cap 14.56] [--steps 6]

Half-way another tensor takes all but `--left` GiB of what the run's static part leaves, and keeps it to the end.
Reported: the rungs before and after, what the run said, and its steps and losses beside an undisturbed run's.
"""

import argparse
import json
from pathlib import Path

import torch

from naruto_lora import recipe, train
from naruto_lora.memory import gpu
from naruto_lora.tiny import BASE, world


class Taker:
    """Takes memory once the run is half-way, and writes down what the run tells."""

    def __init__(self, at: int, left: float, cap: float):
        self.at, self.left, self.cap, self.held, self.told, self.run = at, left, cap, None, [], None

    def __call__(self, phase, done, total, **_):
        if phase == "training" and done == self.at and self.held is None:
            self.run.engine.release()
            gpu.free()
            free = self.cap - torch.cuda.memory_allocated()
            self.held = torch.empty(int(free - self.left * gpu.GIB), dtype=torch.uint8, device="cuda")

    def note(self, text):
        self.told.append(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="a base that is there, in place of a random one at full size")
    parser.add_argument("--recipe", default="naruto-1024")
    parser.add_argument("--cap", type=float, default=14.56, help="GiB of the card")
    parser.add_argument("--left", type=float, default=1.5, help="GiB that are left for activations")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    if args.base is None:
        import sdxl

        args.base = sdxl.write(args.out / "base", BASE)
        gpu.free()
    torch.cuda.set_per_process_memory_fraction(
        args.cap * gpu.GIB / torch.cuda.get_device_properties(0).total_memory
    )
    data = world.write_dataset(args.out / "data", count=40, size=256)
    plan = recipe.load(
        args.recipe, base=str(args.base), vae=str(args.base / "vae"), dataset=str(data), previews=0,
        legs=[{"until": args.steps, "lr": 1e-4}],
    )
    figures = {name: once(args, plan, name == "disturbed") for name in ("undisturbed", "disturbed")}
    figures |= {"device": torch.cuda.get_device_name(), "cap_gib": args.cap}
    (args.out / "out_of_memory.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))


def once(args, plan, disturbed: bool) -> dict:
    taker = Taker(args.steps // 2 if disturbed else -1, args.left, args.cap * gpu.GIB)
    run = taker.run = train.begin(plan, args.out / str(disturbed), args.out / "cache", show=taker)
    before = run.fallback.rungs[0]
    run.to_the_end()
    figures = {
        "rung before": str(before),
        "rung after": str(run.fallback.rungs[0]),
        "steps": run.step,
        "losses": [round(loss, 5) for loss in run.record["losses"]],
        "told": taker.told,
    }
    taker.run = taker.held = run.engine = None
    del run
    gpu.free()
    return figures


if __name__ == "__main__":
    main()
