"""The notebooks at full size through papermill on a CUDA GPU: random weights, drawn pictures, the kernel killed once.

    python tests/benchmarks/notebooks.py --out DIR [--base FOLDER] [--steps 30 10] [--cap 14.56] [--keep]

03_train_1024 is run until half of its steps are done, its kernel is ended by SIGKILL, and it is run again: it must go
on by itself. Then 02_train_256 and 05_compare. Executed notebooks and notebooks.json are in DIR; with `--keep` small
copies, labelled as plumbing, go to notebooks/executed. On a CPU `--base` (the embedded one), `--size 64` and
`--recipes` (two .json) try the script itself.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
HIGH, LOW, COMPARE = "03_train_1024", "02_train_256", "05_compare"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="a base that is there, in place of a random one at full size")
    parser.add_argument("--recipes", nargs=2, default=["naruto-1024", "naruto-256"], help="high and low")
    parser.add_argument("--steps", type=int, nargs=2, default=[30, 10])
    parser.add_argument("--size", type=int, default=1024, help="px of the pictures that are drawn")
    parser.add_argument("--cap", type=float, help="GiB of the card for each kernel")
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    plan, figures = parameters(args), {"device": device(), "cap_gib": args.cap, "notebooks": {}}
    figures["killed"] = run(args, HIGH, plan[HIGH], kill_at=args.steps[0] // 2)
    for name in (HIGH, LOW, COMPARE):
        figures["notebooks"][name] = run(args, name, plan[name])
    figures |= {"went_on": "resumes from" in (args.out / f"{HIGH}.ipynb").read_text()}
    records = {name: args.out / "runs" / name / "run.json" for name in ("high", "low")}
    figures["steps"] = {name: json.loads(file.read_text())["step"] for name, file in records.items()}
    (args.out / "notebooks.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))
    if args.keep:
        keep(args, figures)
    right = figures["steps"] == dict(zip(("high", "low"), args.steps, strict=True)) and figures["went_on"]
    return 0 if right and all(done["status"] == 0 for done in figures["notebooks"].values()) else 1


def parameters(args) -> dict[str, dict]:
    """Each notebook's, after writing what they need: base, pictures, recipes that save often enough to be killed."""
    from naruto_lora import recipe
    from naruto_lora.tiny import BASE, world

    if args.base is None:
        import sdxl

        args.base = sdxl.write(args.out / "base", BASE)
    world.write_dataset(args.out / "data", count=40, size=min(512, args.size))
    common = {"base": str(args.base), "vae": str(args.base / "vae"), "dataset": str(args.out / "data"),
              "runs": str(args.out / "runs"), "interactive": False, "resolution": args.size, "inference_steps": 6}
    files = {}
    for name, source, steps in zip(("high", "low"), args.recipes, args.steps, strict=True):
        every = max(1, steps // 6)
        plan = recipe.load(source, name=name, save_every=every, measure_every=steps, previews=1, holdout=0.25)
        files[name] = args.out / f"{name}.json"
        files[name].write_text(plan.to_json())
    return {
        HIGH: common | {"recipe": str(files["high"]), "steps": args.steps[0]},
        LOW: common | {"recipe": str(files["low"]), "steps": args.steps[1]},
        COMPARE: common | {"recipe": str(files["high"]), "adapter_256": "low", "adapter_1024": "high",
                           "judge": "naruto_lora.tiny.judge", "prompt_count": 8, "seed_count": 2},
    }  # fmt: skip


def run(args, name: str, parameters: dict, kill_at: int = 0) -> dict:
    """Runs a notebook in a process of its own; its kernel is killed once its run has a checkpoint of `kill_at`."""
    given, began = args.out / f"{name}.parameters.json", time.time()
    given.write_text(json.dumps(parameters))
    with open(args.out / f"{name}.log", "a") as log:
        target = args.out / (f"{name}.killed.ipynb" if kill_at else f"{name}.ipynb")
        code = (
            "import json, sys, papermill\nsource, target, given, root = sys.argv[1:]\n"
            "papermill.execute_notebook(source, target, json.load(open(given)), kernel_name='python3', cwd=root,"
            " progress_bar=False)"
        )
        command = [sys.executable, "-c", code, ROOT / "notebooks" / f"{name}.ipynb", target, given, ROOT]
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": paths} | capped(args)
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log)
        if kill_at:
            killed_at = kill(process, args.out / "runs" / "high", kill_at)
        process.wait()
    figures = {"status": process.returncode, "seconds": round(time.time() - began, 1)}
    return figures | ({"killed_at_checkpoint": killed_at} if kill_at else {})


def capped(args) -> dict[str, str]:
    """The environment that gives each kernel a card of `--cap` GiB: a start-up script of IPython's."""
    if not args.cap:
        return {}
    folder = args.out / "ipython" / "profile_default" / "startup"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cap.py").write_text(
        "import torch\n"
        f"torch.cuda.set_per_process_memory_fraction({args.cap} * 2**30 / torch.cuda.mem_get_info()[1])\n"
    )
    return {"IPYTHONDIR": str(args.out / "ipython")}


def kill(process, folder: Path, step: int) -> int | None:
    """SIGKILL to the kernel, a child of `process`, when `folder` has a checkpoint of `step` or more."""
    import psutil

    while process.poll() is None:
        reached = [int(path.name[11:]) for path in folder.glob("checkpoint-*")]
        if max(reached, default=0) >= step:
            for child in psutil.Process(process.pid).children(recursive=True):
                if any("ipykernel" in word for word in child.cmdline()):
                    child.send_signal(signal.SIGKILL)
                    return max(reached)
        time.sleep(0.2)
    return None


def device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def keep(args, figures: dict) -> None:
    from naruto_lora.tiny import executed

    note = (
        f"An executed copy at SDXL's full size on {figures['device']}, with random weights: the pictures show that the "
        "plumbing holds, and nothing else."
    )
    killed = " Its kernel was killed half-way through training, and the notebook run again."
    places = {str(args.out): "out", str(args.base.resolve()): "out/base", str(ROOT): "."}
    for name in (HIGH, LOW, COMPARE):
        target = ROOT / "notebooks" / "executed" / f"{name}.full-size.ipynb"
        executed.keep(args.out / f"{name}.ipynb", target, note + killed * (name == HIGH), places)


if __name__ == "__main__":
    sys.exit(main())
