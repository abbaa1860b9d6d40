"""Full-size SDXL with random weights on a CUDA GPU: naruto-1024 killed by SIGKILL and resumed, beside an unbroken run.

    python tests/benchmarks/resume.py --out DIR [--cap 14.56] [--base FOLDER] [--steps 30]

Four runs share the GPU: unbroken and killed, each also with deterministic algorithms. Compared are every step's
pictures, timesteps, learning rate and loss, and the LoRA at the end. Host memory is each process's own peak. Without
--cap each run plans for what the others have left of the card, and other rungs round otherwise.
On a machine without a GPU, `--base` (the embedded one) and `--recipe` (a .json) try the script itself.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from naruto_lora import lora, models, recipe, step, train
from naruto_lora.memory import gpu
from naruto_lora.progress import Progress
from naruto_lora.tiny import BASE, world

RUNS = ("unbroken", "killed", "unbroken-deterministic", "killed-deterministic")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="a base that is there, in place of a random one at full size")
    parser.add_argument("--recipe", default="naruto-1024")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--cap", type=float, help="GiB of the card for each run")
    parser.add_argument("--worker", help="(one run of the four)")
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if args.base is None:
        import sdxl

        args.base = sdxl.write(args.out / "base", BASE)
        gpu.free()
    world.write_dataset(args.out / "data", count=40, size=512)
    begin(args, "encode").wait()
    runs = {name: threading.Thread(target=until_done, args=(args, name)) for name in RUNS}
    for thread in runs.values():
        thread.start()
    for thread in runs.values():
        thread.join()
    figures = report(args)
    (args.out / "resume.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))


def plan(args) -> recipe.Recipe:
    """The recipe's own kinds of legs in `steps` steps; alpha other than rank."""
    legs = (recipe.Leg(2 * args.steps // 5, 1e-4), recipe.Leg(4 * args.steps // 5, 3e-5, "cosine"),
            recipe.Leg(args.steps, 3e-5, "cosine"))
    return recipe.load(
        args.recipe, base=str(args.base), vae=str(args.base / "vae"), dataset=str(args.out / "data"), legs=legs,
        alpha=8.0, holdout=0.05, previews=0, save_every=args.steps // 3, measure_every=args.steps,
    )


def begin(args, name: str) -> subprocess.Popen:
    command = [sys.executable, __file__, "--worker", name, "--out", args.out, "--base", args.base]
    command += ["--recipe", args.recipe, "--steps", str(args.steps)] + (["--cap", str(args.cap)] if args.cap else [])
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    log = open(args.out / f"{name}.log", "a")
    return subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=subprocess.STDOUT)


def until_done(args, name: str) -> None:
    """Runs a worker to its end; one that is to be killed is killed once, half-way."""
    process = begin(args, name)
    if name.startswith("killed"):
        log = args.out / f"{name}.jsonl"
        while process.poll() is None and (not log.exists() or log.read_text().count("\n") < args.steps // 2 + 2):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = begin(args, name)
    if process.wait():
        print(f"{name} failed:\n{(args.out / f'{name}.log').read_text()[-3000:]}", flush=True)


def work(args) -> None:
    """One process of a run: trains, writing a line a step, and at the end its figures."""
    if args.cap:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.cap * gpu.GIB / total)
    if args.worker.endswith("deterministic"):
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    peaks = watch_memory()
    begun, folder = time.time(), args.out / args.worker
    run = train.begin(plan(args), folder, args.out / "cache", Progress(10))
    figures = {"seconds_until_first_step": round(time.time() - begun, 1), "loading": host(peaks)}
    if args.worker != "encode":
        log_steps(run, args.out / f"{args.worker}.jsonl")
        run.to_the_end()
        record = run.finish()
        figures |= {
            "seconds_a_step": run.forecast.update(),
            "peak_gib": record["peak_gib"],
            "losses": record["losses"],
            "training": host(peaks),
        }
    (args.out / f"{args.worker}.json").write_text(json.dumps(figures))


def log_steps(run: train.Run, file: Path) -> None:
    """Appends what each step really used: its pictures, timesteps and learning rate."""
    drawn, real = {}, step.draw

    def draw(plan, number, shapes):
        drawn.update(step=number, draw=real(plan, number, shapes))
        return drawn["draw"]

    def stepped(optimizer, *_):
        line = {
            "step": drawn["step"],
            "pictures": [run.training_set.names[k] for k in drawn["draw"].indices],
            "timesteps": drawn["draw"].timesteps.tolist(),
            "lr": optimizer.param_groups[0]["lr"],
        }
        with open(file, "a") as handle:
            handle.write(json.dumps(line) + "\n")

    step.draw = draw
    run.optimizer.register_step_post_hook(stepped)


def watch_memory() -> dict[str, float]:
    """The peaks of this process's host memory from now on, sampled: GiB resident, and of these its own pages.

    (ru_maxrss would not do: a process begins with its parent's.)
    """
    peaks = {"VmRSS": 0.0, "RssAnon": 0.0}

    def sample():
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                name = line.split(":")[0]
                if name in peaks:
                    peaks[name] = max(peaks[name], int(line.split()[1]) / 2**20)
            time.sleep(0.02)

    threading.Thread(target=sample, daemon=True).start()
    return peaks


def host(peaks: dict[str, float]) -> dict:
    return {"peak_resident_gib": round(peaks["VmRSS"], 2), "of_which_own_gib": round(peaks["RssAnon"], 2)}


def report(args) -> dict:
    def lines(name):
        rows = [json.loads(line) for line in (args.out / f"{name}.jsonl").read_text().splitlines()]
        return {row["step"]: row for row in rows}, len(rows)

    results = {name: json.loads((args.out / f"{name}.json").read_text()) for name in ("encode", *RUNS)}
    figures = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
               "torch": torch.__version__, "cap_gib": args.cap, "runs": {}}
    for name, result in results.items():
        figures["runs"][name] = {key: value for key, value in result.items() if key != "losses"}
    for suffix in ("", "-deterministic"):
        one, two = f"unbroken{suffix}", f"killed{suffix}"
        (first, _), (second, rows) = lines(one), lines(two)
        a, b = results[one]["losses"], results[two]["losses"]
        files = [(args.out / name / lora.FILE).read_bytes() for name in (one, two)]
        figures["resumed against unbroken" + suffix.replace("-", ", ")] = {
            "same_pictures_timesteps_and_rates": first == second and len(first) == args.steps,
            "steps_taken_twice": rows - args.steps,
            "greatest_difference_of_losses": max(abs(x - y) for x, y in zip(a, b, strict=True)),
            "same_lora_file": files[0] == files[1],
        }
    a, b = results["unbroken"]["losses"], results["unbroken-deterministic"]["losses"]
    figures["greatest_difference_of_losses_by_kernels"] = max(abs(x - y) for x, y in zip(a, b, strict=True))
    return figures | adapter(args)


def adapter(args) -> dict:
    """The saved LoRA in a plain diffusers pipeline: its size, and whether alpha / rank arrived."""
    from diffusers import StableDiffusionXLPipeline
    from safetensors.torch import load_file

    folder = args.out / "unbroken"
    dtype = torch.float16 if torch.cuda.is_available() else torch.float32
    pipe = StableDiffusionXLPipeline.from_pretrained(args.base, torch_dtype=dtype)
    pipe.load_lora_weights(folder)
    layer = next(m for m in pipe.unet.modules() if hasattr(m, "lora_A"))
    models.quiet()
    return {
        "lora_parameters": sum(value.numel() for value in load_file(folder / lora.FILE).values()),
        "scaling_in_a_plain_pipeline": next(iter(layer.scaling.values())),
    }


if __name__ == "__main__":
    main()
