"""Ours beside diffusers' train_text_to_image_lora_sdxl.py on the embedded world: what is learnt, what it costs.

    PYTHONPATH=. python tests/benchmarks/stock.py --stock train_text_to_image_lora_sdxl.py --out DIR

Both get the same base, pictures, batch, updates, learning rate, rank and optimizer, in fp32; then ours goes one
switch at a time towards the stock script. Each adapter is measured on pictures that neither has seen, and by the
embedded judge on drawn prompts. A second call goes on with what has no result in DIR yet. The stock script needs
datasets and torchvision; it isn't in this repository.
"""

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path

import numpy as np
import script
import torch

from naruto_lora import cache, data, files, pipeline, recipe, step, train
from naruto_lora.measure import metrics
from naruto_lora.tiny import BASE, world

ROOT = Path(train.__file__).parents[1]
RATE, RANK, BATCH, SIZE = 2e-3, 16, 8, 64  # SIZE in px
HELD = 96  # hold-out pictures, of people that the training pictures don't show
GUIDANCE = (2, 4)
MIN_SNR = 5.0  # gamma of arXiv 2303.09556
JUDGE = "naruto_lora.tiny.judge"


def uniform_timesteps(draw, plan, number, *rest, **named):
    """`step.draw` with each timestep drawn by itself, uniformly, as the stock script does."""
    drawn = draw(plan, number, *rest, **named)
    rng = np.random.default_rng((plan.seed, number, 2))
    return dataclasses.replace(drawn, timesteps=torch.from_numpy(rng.integers(0, 1000, len(drawn.indices))))


def min_snr(loss, *args, **named):
    """`step.diffusion_loss` (B,) weighted by min(SNR, gamma) / SNR, SNR = alpha / (1 - alpha)."""
    losses = loss(*args, **named)
    bound = inspect.signature(loss).bind(*args, **named).arguments
    alpha = bound["alphas_cumprod"][bound["timesteps"]]  # (B,)
    return losses * (MIN_SNR * (1 - alpha) / alpha).clamp(max=1)


@contextlib.contextmanager
def switched(name: str | None = None, change=None):
    """Puts `change(original, ...)` in the place of the function `name` of step; RuntimeError if nobody called it."""
    if name is None:
        yield
        return
    original, called = getattr(step, name), []

    def changed(*args, **named):
        called[:] = [True]
        return change(original, *args, **named)

    setattr(step, name, changed)
    try:
        yield
    finally:
        setattr(step, name, original)
    if not called:
        raise RuntimeError(f"training does not call step.{name} any more, so this switch changed nothing; mend it here")


@dataclasses.dataclass(frozen=True)
class Switch:
    """What tells a variant from ours: other recipe fields, or another function in step."""

    fields: dict = dataclasses.field(default_factory=dict)
    patch: tuple = ()


OURS, STOCK, NO_LORA = "ours", "stock script", "base"
SWITCHES = {
    OURS: Switch(),
    "caption dropout 0": Switch({"caption_dropout": 0.0}),
    "caption dropout 0.25": Switch({"caption_dropout": 0.25}),
    "timesteps uniform": Switch(patch=("draw", uniform_timesteps)),
    "min-SNR weights": Switch(patch=("diffusion_loss", min_snr)),
    "constant rate": Switch({"schedule": "constant"}),
}


def our_recipe(options, seed: int, steps: int, switch: Switch = SWITCHES[OURS]) -> recipe.Recipe:
    fields = {"schedule": "cosine"} | switch.fields
    plan = recipe.Recipe(
        "ours", (recipe.Leg(steps, RATE, fields.pop("schedule")),), resolution=SIZE, batch=BATCH, accumulation=1,
        rank=RANK, alpha=RANK, holdout=0.0, precision="fp32", seed=seed, save_every=steps, previews=0,
        base=str(BASE), vae="", dataset=str(options.out / "training"),
    )
    return plan.replace(**fields)


def run_ours(options, variant: str, seed: int, folder: Path) -> Path:
    """Trains `variant` of ours in this process; returns the adapter's file."""
    switch = SWITCHES[variant]
    with switched(*switch.patch):
        plan = our_recipe(options, seed, options.steps, switch)
        return Path(train.train(plan, folder, options.out / "cache")["adapter"])


def run_stock(options, seed: int, steps: int, folder: Path) -> tuple[Path, dict[int, float]]:
    """Runs the stock script; returns the adapter's file and {finished steps: time.time()}.

    Raises RuntimeError with the end of its log if it fails.
    """
    folder.mkdir(parents=True)
    command = [sys.executable, str(options.out / "stock_script.py")] + script.arguments(
        pretrained_model_name_or_path=BASE, train_data_dir=options.out / "training", output_dir=folder,
        cache_dir=folder / "cache", resolution=SIZE, center_crop=True, train_batch_size=BATCH,
        gradient_accumulation_steps=1, max_train_steps=steps, checkpointing_steps=steps, learning_rate=RATE,
        lr_scheduler="cosine", lr_warmup_steps=0, rank=RANK, seed=seed, mixed_precision="no",
        use_8bit_adam=torch.cuda.is_available(),  # as ours does
    )
    marks, shown = {}, b""
    with open(folder / "log.txt", "wb") as log, subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        for chunk in iter(lambda: process.stdout.read1(65536), b""):
            log.write(chunk)
            shown = shown[-200:] + chunk  # a line may come in two pieces
            for done, total in re.findall(rb"Steps:[^\r\n]*? (\d+)/(\d+) \[", shown):
                if int(total) == steps:
                    marks.setdefault(int(done), time.time())
    if process.returncode:
        end = (folder / "log.txt").read_text(errors="replace")[-1500:]
        raise RuntimeError(f"the stock script stopped with status {process.returncode}; its last words: {end}")
    return folder / "pytorch_lora_weights.safetensors", marks


def environment() -> dict[str, str]:
    """For subprocesses: naruto_lora is found, the hub is not asked."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def steady(marks: dict[int, float], steps: int) -> float:
    """Seconds a step over the last four fifths of the run, from {finished steps: time}."""
    first = min(done for done in marks if done >= steps // 5)
    return (marks[steps] - marks[first]) / (steps - first)


def measured(options, adapter: Path | None) -> dict:
    """Hold-out losses (N,) and at each guidance the judge's figures of the base with `adapter`, or without one."""
    name = "trained" if adapter else pipeline.BASE
    pipe = pipeline.load(str(BASE), "", {name: adapter} if adapter else None, precision="fp32")
    held = cache.encode(data.load(options.out / "holdout"), our_recipe(options, 0, 1), options.out / "cache")
    result = {"holdout_losses": metrics.holdout_losses(pipe, held, name).tolist()}
    prompts = world.prompts(options.prompts, seed=1)
    texts, seeds = [prompt["text"] for prompt in prompts], list(range(len(prompts)))
    for guidance in GUIDANCE:
        pictures = pipeline.draw(
            pipe, texts, seeds, name, steps=25, guidance_scale=float(guidance), resolution=SIZE, batch=50
        )
        result[str(guidance)] = metrics.judged(JUDGE, pictures, prompts)
    return result


def job(options, variant: str, seed: int) -> None:
    """One training and its measuring; leaves its result."""
    folder = fresh(options.out / "runs" / f"{variant.replace(' ', '-')}-{seed}")
    if variant == NO_LORA:
        adapter = None
    elif variant == STOCK:
        adapter, _ = run_stock(options, seed, options.steps, folder)
    else:
        adapter = run_ours(options, variant, seed, folder)
    keep(result_file(options, variant, seed), measured(options, adapter))


def timed(options, variant: str, seed: int) -> None:
    """Seconds of a whole process, with nothing encoded yet, and of a step once it runs; leaves its result."""
    steps, folder = options.timed_steps, fresh(options.out / "timed" / variant.replace(" ", "-"))
    marks, begun = {}, time.time()
    if variant == STOCK:
        _, marks = run_stock(options, seed, steps, folder)
        whole = time.time() - begun
    else:
        plan = our_recipe(options, seed, steps)
        file = folder / "recipe.json"
        folder.mkdir(parents=True)
        file.write_text(plan.to_json())
        command = [sys.executable, "-m", "naruto_lora", "train", str(file), "--out", str(folder / "whole")]
        subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL)
        whole = time.time() - begun

        def show(phase, done, total, **figures):
            if phase == "training":
                marks[done] = time.time()

        train.train(plan, folder / "again", folder / "cache", show)
    keep(result_file(options, f"timed {variant}", steps), {"process": whole, "step": steady(marks, steps)})


def fresh(folder: Path) -> Path:
    """The path, with nothing of a killed run there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def result_file(options, what: str, number: int) -> Path:
    return options.out / "results" / f"{what.replace(' ', '-')}-{number}.json"


def keep(file: Path, content: dict) -> None:
    """Whole or not at all."""
    files.write_json(file.with_suffix(".part"), content).rename(file)


def work(options, tasks: list[tuple], jobs: int) -> None:
    """Runs the tasks (function, variant, seed) that have no result, in `jobs` processes."""
    if not tasks:
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with one_setting("OMP_NUM_THREADS", threads), ProcessPoolExecutor(
        min(jobs, len(tasks)), multiprocessing.get_context("spawn")
    ) as pool:
        begun = time.time()
        futures = {pool.submit(task, options, variant, seed): (task, variant, seed) for task, variant, seed in tasks}
        for number, future in enumerate(as_completed(futures), 1):
            if future.exception():
                pool.shutdown(cancel_futures=True)
            future.result()
            task, variant, seed = futures[future]
            took = time.time() - begun
            print(f"{number}/{len(tasks)}  {task.__name__} {variant} {seed} after {took:.0f} s", flush=True)


@contextlib.contextmanager
def one_setting(name: str, value):
    """An environment variable for the processes that start meanwhile, unless the user has set it."""
    given = name in os.environ
    os.environ.setdefault(name, str(value))
    yield
    if not given:
        del os.environ[name]


def wanted(options) -> list[tuple[str, int]]:
    """(variant, seed) of every training, the base among them."""
    both = [(variant, seed) for seed in range(options.seeds) for variant in (STOCK, OURS)]
    switches = [(variant, seed) for seed in range(options.switch_seeds) for variant in SWITCHES if variant != OURS]
    return [(NO_LORA, 0), *both, *switches]


def summary(options) -> list[dict]:
    """A row a variant: means over its seeds; hold-out losses against ours of the same seeds, picture by picture."""
    runs: dict[str, list] = {}
    for variant, seed in wanted(options):
        runs.setdefault(variant, []).append(files.read_json(result_file(options, variant, seed)))
    best, rows = {}, []
    for variant, found in runs.items():
        losses, ours = (np.mean([run["holdout_losses"] for run in part], axis=0)  # (N,)
                        for part in (found, runs[OURS][: len(found)]))
        shares = {
            f"{name} {g}": float(np.mean([run[str(g)][name]["value"] for run in found]))
            for name in ("attributes", "style") for g in GUIDANCE
        }
        best[variant] = max(shares[f"attributes {g}"] for g in GUIDANCE)
        gain = metrics.paired(ours, losses)
        seeds = [float(np.mean(run["holdout_losses"])) for run in found]
        row = {"variant": variant, "seeds": len(found), "holdout_loss": float(losses.mean())}
        row |= {"of_ours": row["holdout_loss"] / float(ours.mean())}
        row |= {"holdout_least": min(seeds), "holdout_most": max(seeds)}
        row |= {"beyond_ours": gain.value, "beyond_low": gain.low, "beyond_high": gain.high} | shares
        rows.append(row | {"lost": best[NO_LORA] - best[variant]} | times(options, variant))
    return rows


def times(options, variant: str) -> dict:
    file = result_file(options, f"timed {variant}", options.timed_steps)
    found = files.read_json(file) if file.exists() else {"step": None, "process": None}
    return {"seconds_a_step": found["step"], "seconds_whole": found["process"]}


COLUMNS = {  # heading: how a row is written there
    "variant": "{variant}",
    "seeds": "{seeds}",
    "hold-out loss (over seeds)": "{holdout_loss:.4f} ({holdout_least:.4f}-{holdout_most:.4f})",
    "of ours": "{of_ours:.3f}",
    "paired with ours [95%]": "{beyond_ours:+.4f} [{beyond_low:+.4f}, {beyond_high:+.4f}]",
    **{f"attributes, guidance {g}": f"{{attributes {g}:.1f}}" for g in GUIDANCE},
    "lost at the better": "{lost:.1f}",
    **{f"style, guidance {g}": f"{{style {g}:.1f}}" for g in GUIDANCE},
    "s a step": "{seconds_a_step:.3f}",
    "s whole": "{seconds_whole:.1f}",
}


def markdown(rows: list[dict]) -> str:
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    for row in rows:
        values = {name: value for name, value in row.items() if value is not None}
        lines.append([form.format(**values) if fits(form, values) else "" for form in COLUMNS.values()])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fits(form: str, values: dict) -> bool:
    return all(name in values for name in re.findall(r"{([\w ]+)", form))


def write(options, rows: list[dict]) -> None:
    """stock.json, stock.csv and the printed table."""
    versions = {name: metadata.version(name) for name in ("torch", "diffusers", "peft", "transformers", "accelerate")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    settings = files.read_json(options.out / "settings.json") | {"timed_steps": options.timed_steps}
    content = {"settings": settings, "device": device, "versions": versions, "rows": rows}
    files.write_json(options.out / "stock.json", content)
    with open(options.out / "stock.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"\n{markdown(rows)}\n\n{json.dumps(settings)}\n{device}, {versions}")


def prepare(options) -> None:
    """The script's copy, the pictures and their encodings. SystemExit if the script is missing, or DIR another's."""
    source = script.found(options.stock).read_text(encoding="utf-8")
    settings = {name: getattr(options, name) for name in ("steps", "pictures", "prompts")}
    settings |= {"stock_sha256": hashlib.sha256(source.encode()).hexdigest()}
    file = options.out / "settings.json"
    if file.exists() and files.read_json(file) != settings:
        sys.exit(f"'{options.out}' holds results of other settings ({file}); take those, or another folder")
    files.write_json(file, settings)
    runnable = re.sub(r"^check_min_version\(.*\n", "", source, flags=re.MULTILINE)  # it may ask for a later one
    (options.out / "stock_script.py").write_text(runnable, encoding="utf-8")
    world.write_dataset(options.out / "training", options.pictures, seed=0)
    world.write_dataset(options.out / "holdout", HELD, seed=1)
    examples = data.load(options.out / "training") + data.load(options.out / "holdout")
    cache.encode(examples, our_recipe(options, 0, 1), options.out / "cache")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stock", type=Path, required=True, help=f"diffusers' {script.NAME}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=700, help="updates")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--switch-seeds", type=int, default=1, help="seeds of each single switch")
    parser.add_argument("--pictures", type=int, default=512, help="to train on")
    parser.add_argument("--prompts", type=int, default=200, help="to judge by")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time")
    parser.add_argument("--timed-steps", type=int, default=200, help="updates of the timed runs, each alone")
    options = parser.parse_args()
    options.out = options.out.resolve()
    return options


def main() -> None:
    options = parse()
    prepare(options)
    missing = [(job, *which) for which in wanted(options) if not result_file(options, *which).exists()]
    work(options, missing, options.jobs)
    alone = [(STOCK, 0), (OURS, 0)]  # afterwards: then every library has been read from the disk
    steps = options.timed_steps
    work(options, [(timed, v, s) for v, s in alone if not result_file(options, f"timed {v}", steps).exists()], jobs=1)
    write(options, summary(options))


if __name__ == "__main__":
    main()
