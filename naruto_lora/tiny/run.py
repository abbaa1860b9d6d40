"""`python -m naruto_lora.tiny.run`: the five notebooks on the embedded default, on a CPU, in minutes."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

from .. import files, recipe
from ..progress import duration
from ..show import report
from . import BASE, HIGH, LOW, world

NOTEBOOKS = ("01_setup", "02_train_256", "03_train_1024", "04_infer", "05_compare")
TITLES = ("the parts of SDXL", "training at low resolution", "training at high resolution", "pictures", "comparison")


def parameters(out: Path, pictures: int, prompts: int, low: Path = LOW, high: Path = HIGH) -> dict[str, dict]:
    """Papermill's parameters of each notebook; writes the data set and the prompts that they need to `out`.

    `pictures` is the size of the data set, `prompts` the number of prompts for the judge.
    """
    data = world.write_dataset(out / "data", count=pictures)
    file = files.write_json(out / "prompts.json", {"prompts": world.prompts(prompts, seed=1)})
    common = {"base": str(BASE), "vae": "", "dataset": str(data), "runs": str(out), "interactive": False}
    drawing = {"resolution": recipe.load(high).resolution, "inference_steps": 16, "guidance_scale": 2.0, "batch": 16}
    names = {"adapter_256": recipe.load(low).name, "adapter_1024": recipe.load(high).name}
    return {
        "01_setup": common | {"recipe": str(high)},
        "02_train_256": common | drawing | {"recipe": str(low), "steps": 0},
        "03_train_1024": common | drawing | {"recipe": str(high), "steps": 0},
        "04_infer": common | drawing | {"recipe": str(high), "adapter": names["adapter_1024"]},
        "05_compare": common | drawing | names
        | {"recipe": str(high), "judge": "naruto_lora.tiny.judge", "prompts_file": str(file), "prompt_count": 12},
    }


def execute(root: Path, out: Path, plan: dict[str, dict]) -> None:
    """Runs the notebooks of `root` with `plan`'s parameters; the executed notebooks go to `out`/notebooks.

    Raises RuntimeError with the failing cell's own error and the notebook's path.
    """
    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)
    (out / "notebooks").mkdir(parents=True, exist_ok=True)
    for number, (name, title) in enumerate(zip(NOTEBOOKS, TITLES, strict=True), 1):
        begun, target = time.time(), out / "notebooks" / f"{name}.ipynb"
        print(f"{number}/{len(NOTEBOOKS)}  {name:<14} {title} ...", end=" ", flush=True)
        try:
            papermill.execute_notebook(
                root / "notebooks" / f"{name}.ipynb", target, plan[name],
                kernel_name="python3", cwd=root, progress_bar=False, extra_arguments=["--log-level=ERROR"],
            )
        except papermill.PapermillExecutionError as error:
            raise RuntimeError(f"{error.ename}: {error.evalue} (in {target})") from None
        print(duration(time.time() - begun), flush=True)


def keep_executed(root: Path, out: Path) -> None:
    """Updates the copies in notebooks/executed from the executed notebooks of `out`."""
    import torch

    from . import executed

    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    note = f"An executed copy for readers: the embedded default on {machine}, torch {torch.__version__}."
    for name in NOTEBOOKS:
        places = {str(out): "runs/embedded", str(root): "."}
        executed.keep(out / "notebooks" / f"{name}.ipynb", root / "notebooks" / "executed" / f"{name}.ipynb", note,
                      places)  # fmt: skip


def summary(out: Path, minutes: float) -> dict:
    """Writes and returns `out`/summary.json: minutes, and the figures of 05_compare for base, low and high."""
    models = files.read_json(out / "compare.json")["models"]
    names = dict(zip(models, ("base", "low", "high"), strict=True))
    content = {"minutes": round(minutes, 2)} | {names[name]: figures for name, figures in models.items()}
    files.write_json(out / "summary.json", content)
    return content


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m naruto_lora.tiny.run", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/embedded"), help="the folder for all results")
    parser.add_argument("--executed", action="store_true", help="also update the copies in notebooks/executed")
    args = parser.parse_args(arguments)
    out, begun = args.out.resolve(), time.time()
    root = Path(__file__).resolve().parents[2]
    print("The embedded default: a small SDXL learns an ink style, on this machine's CPU or GPU.", flush=True)
    try:
        files.make_folder(out)
    except PermissionError as error:
        print(f"\nstopped: {error} with --out FOLDER", file=sys.stderr)
        return 1
    try:
        execute(root, out, parameters(out, pictures=320, prompts=200))
    except (RuntimeError, OSError, ValueError) as error:
        print(f"\nstopped: {error}", file=sys.stderr)
        return 1
    content = summary(out, (time.time() - begun) / 60)
    if args.executed:
        keep_executed(root, out)
    print(f"\nPictures:            {out / 'compare.jpg'}")
    print(f"Report:              {out / 'compare.html'}")
    print(f"Executed notebooks:  {out / 'notebooks'}")
    print(f"All figures:         {out / 'summary.json'}\n")
    print(report.table([_row(name, content[name]) for name in ("base", "low", "high")]))
    print(f"\n{content['minutes']:.1f} minutes in total.")
    return 0


def _row(name: str, figures: dict) -> dict:
    label = {"base": "base", "low": "LoRA, low resolution", "high": "LoRA, high resolution"}[name]
    percent = {k: f"{figures[k]['value']:.1f}%" for k in ("attributes", "style")}
    return {
        "model": label,
        "attributes right": percent["attributes"],
        "in the new style": percent["style"],
        "hold-out loss": f"{figures['holdout_loss']['value']:.3f}",
    }


if __name__ == "__main__":
    sys.exit(main())
