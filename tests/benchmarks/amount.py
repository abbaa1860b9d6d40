"""How many steps until the hold-out loss is lowest, by the number of pictures, on the small world.

    python tests/benchmarks/amount.py --out DIR [--pictures 12 48 192] [--steps 240 360 480] [--held 40]

What `reading.amount` rests on beside others' guides. Each set is trained at a constant rate, past its best step, and
measured every 15 steps on the same number of held-out pictures. Some fifteen minutes on one core.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from naruto_lora import recipe, train
from naruto_lora.tiny import BASE, world

EVERY = 15  # steps between measurements


def curve(options, pictures: int, steps: int) -> dict:
    """{"pictures": trained on, "best": step, "loss": {step: mean hold-out loss}, "reached"}.

    A best step within the last two measurements is only a lower bound: it is not `reached`.
    """
    folder = world.write_dataset(options.out / f"set-{pictures}", pictures + options.held, seed=4, size=64)
    made = recipe.Recipe(
        f"of-{pictures}", (recipe.Leg(steps, options.lr),), resolution=64, batch=8, accumulation=1, precision="fp32",
        holdout=options.held / (pictures + options.held), previews=0, measure_every=EVERY, save_every=60,
        base=str(BASE), vae="", dataset=str(folder),
    )  # fmt: skip
    record = train.train(made, options.out / made.name, options.out / "cache")
    losses = {int(step): float(np.mean(values)) for step, values in record["holdout"].items()}
    best = min(losses, key=losses.get)
    reached = best + 2 * EVERY < max(losses)
    return {"pictures": record["pictures"]["training"], "best": best, "reached": reached, "loss": losses}


def power(rows: list[dict]) -> float | None:
    """a in best ~ pictures**a, by least squares in logarithms; None unless every best step was reached."""
    if len(rows) < 2 or not all(row["reached"] for row in rows):
        return None
    return float(np.polyfit(*(np.log([row[name] for row in rows]) for name in ("pictures", "best")), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, nargs="+", default=[12, 48, 192])
    parser.add_argument("--steps", type=int, nargs="+", default=[240, 360, 480])
    parser.add_argument("--held", type=int, default=40)
    parser.add_argument("--lr", type=float, default=2e-3)
    options = parser.parse_args()
    rows = [curve(options, *pair) for pair in zip(options.pictures, options.steps, strict=True)]
    result = {"rows": rows, "power": power(rows)}
    (options.out / "amount.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
