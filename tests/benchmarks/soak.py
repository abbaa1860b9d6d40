"""A long run of tiny steps on a CPU: does it hold more memory, files or threads at its end than at its beginning?

    python tests/benchmarks/soak.py --out DIR [--steps 1500]

Trains the embedded base with checkpoints, previews and a mirror, while a second process encodes new pictures into the
same cache again and again. Prints, and writes to DIR/soak.json, the slopes of resident memory, open files and threads
per 1,000 steps, from step 300 (a fifth of the steps) on.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from naruto_lora import recipe, train
from naruto_lora.tiny import BASE, world

NEIGHBOUR = """
import dataclasses, itertools, sys
from naruto_lora import cache, data, recipe

plan, folder = recipe.load(sys.argv[1]), sys.argv[2]
examples = data.load(plan.dataset)[:8]
for k in itertools.count():
    new = [dataclasses.replace(e, caption=f"{e.caption} {k}", source=e.read() + str(k).encode()) for e in examples]
    print(len(cache.encode(examples + new, plan, folder)), flush=True)
"""  # bytes after a picture's end change its key, not the picture
FIGURES = {"memory": "MiB", "files": "open files", "threads": "threads"}


def plan(out: Path, steps: int) -> recipe.Recipe:
    """Steps of one picture, a checkpoint every 75, a measurement with previews every 150 of 1,500."""
    legs = (recipe.Leg(steps, 1e-4),)
    data = world.write_dataset(out / "data", count=24, size=32)
    return recipe.Recipe(
        "soak", legs, resolution=32, batch=1, accumulation=1, holdout=0.15, precision="fp32", previews=2, vae="",
        save_every=max(1, steps // 20), measure_every=max(1, steps // 10), base=str(BASE), dataset=str(data),
    )


class Sampler:
    """A `show` that notes this process's memory (MiB), open files and threads after each step."""

    def __init__(self):
        self.process, self.rows = psutil.Process(), []

    def __call__(self, phase: str, done: int, total: int, **_) -> None:
        if phase == "training":
            sizes = self.process.memory_info().rss / 2**20, self.process.num_fds(), self.process.num_threads()
            self.rows.append((done, *sizes))

    def note(self, text: str) -> None:
        print(text, flush=True)


@contextlib.contextmanager
def neighbour(file: Path, folder: Path):
    """A second process that works on the cache in `folder` while the block runs; yields the lines it has said."""
    said = file.with_suffix(".neighbour")
    with open(said, "w") as output:
        process = subprocess.Popen([sys.executable, "-c", NEIGHBOUR, file, folder], stdout=output, stderr=output,
                                   env=os.environ | {"PYTHONPATH": str(Path(train.__file__).parents[1])})
        try:
            while not said.read_text() and process.poll() is None:
                time.sleep(0.1)
            yield said
            if process.poll() is not None:
                raise RuntimeError(f"the second process ended: {said.read_text()[-500:]}")
        finally:
            process.kill()
            process.wait()


def soak(out: Path, steps: int) -> dict:
    """Trains; returns {figure: slope per 1,000 steps}, and how often the second process has filled the cache."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "drive").mkdir()
    whole, sampler = plan(out, steps), Sampler()
    file = out / "soak-recipe.json"
    file.write_text(whole.to_json())
    with neighbour(file, out / "cache") as said:
        train.train(whole, out / "run", out / "cache", sampler, out / "drive" / "run")
        rounds = len(said.read_text().splitlines())
    rows = np.array(sampler.rows)[steps // 5 - 1 :]
    slopes = [1000 * np.polyfit(rows[:, 0], column, 1)[0] for column in rows[:, 1:].T]
    return {**{name: round(float(slope), 3) for name, slope in zip(FIGURES, slopes, strict=True)}, "rounds": rounds,
            "most": rows[:, 1:].max(0).round(1).tolist(), "least": rows[:, 1:].min(0).round(1).tolist()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    begun = time.monotonic()
    found = soak(args.out, args.steps)
    (args.out / "soak.json").write_text(json.dumps(found, indent=1))
    for name, unit in FIGURES.items():
        print(f"{name}: {found[name]:+.3g} {unit} per 1,000 steps")
    print(f"{args.steps} steps in {time.monotonic() - begun:.0f} s; the second process encoded {found['rounds']} times")


if __name__ == "__main__":
    main()
