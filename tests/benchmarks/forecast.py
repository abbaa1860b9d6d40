"""How good the run's own forecast is: what it says is left after ten steps, beside what was left.

    PYTHONPATH=. python tests/benchmarks/forecast.py --out DIR [--recipe naruto_lora/tiny/tiny-64.json]
"""

import argparse
import json
import time
from pathlib import Path

from naruto_lora import recipe, train
from naruto_lora.tiny import BASE, HIGH, world

AFTER = 10  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    parser.add_argument("--recipe", default=str(HIGH))
    args = parser.parse_args()
    data = world.write_dataset(args.out / "data")
    plan = recipe.load(args.recipe, base=str(BASE), dataset=str(data))
    said = {}

    def show(phase, done, total, **figures):
        if phase == "training" and done == AFTER:
            said.update(left=figures["left"], at=time.time())

    show.note = print
    train.begin(plan, args.out / plan.name, show=show).to_the_end()
    took = time.time() - said["at"]
    figures = {"said": said["left"], "took": took, "said / took": said["left"] / took}
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
