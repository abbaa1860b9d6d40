"""Ours beside diffusers' own script at full size, random weights, in one run on one GPU: time, kernels, memory, losses.

    export PYTHONPATH=.
    python tests/benchmarks/speed.py all --stock train_text_to_image_lora_sdxl.py --out DIR --minutes 8
    python tests/benchmarks/speed.py thirty --out DIR
    cp DIR/speed.csv tests/benchmarks/ && python tests/benchmarks/ladder.py

`all` does what has no result in DIR yet, most wanted first, and begins nothing after --minutes: run it again to go
on (it takes about a quarter of an hour in all, half of it compiling; 'thirty' some minutes). Its parts, each by itself:
prepare (base, pictures), stock, fixed (the script with a VAE that is safe in fp16, which it must be told of), ours,
exact (fp32 references) and table; --rows picks rows by parts of their names, --recipes one recipe. The script needs
datasets, torchvision and bitsandbytes.
Attention is measured twice: T4-like (no flash, no cuDNN attention, no TF32) and as the card has it. A micro-step is
the recipe's (1 picture at 1024 px, 12 at 256); wall time a micro-step is an update's, optimizer included, divided by 8.
GPU work is the sum of kernel times; 'modelled' is t4.py's. On a CPU, where there are no kernels, this tries the script:

    python tests/benchmarks/speed.py all --stock FILE --out DIR --base naruto_lora/tiny/base --recipes naruto-256 \
        --set '{"resolution": 64, "batch": 2, "accumulation": 2, "precision": "fp32"}'
"""

import argparse
import csv
import dataclasses
import itertools
import json
import os
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import ladder
import measure
import script
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from measure import OWN, T4_LIKE

from naruto_lora import cache, data, files, lora, models, recipe, step, train
from naruto_lora.memory import gpu
from naruto_lora.memory.fallback import Rung
from naruto_lora.tiny import BASE, world

PICTURES = 96  # one update of naruto-256: the script cuts an accumulation short where an epoch ends
PARTS = ("prepare", "stock", "ours", "exact", "fixed", "table")
STOCK, FIXED = "stock script", "stock script, fp16-safe VAE"
SHOWN = ("update_s", "gpu_ms", "unknown_gpu_ms", "launches", "t4_ms", "reserved_gib", "loss", "ready_s")
FIRST = "first.safetensors"  # what the script's first micro-step saw


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of the ladder: ours with these fields of `memory.fallback.Rung`, attention as `mode` says."""

    name: str
    mode: str
    rung: dict
    batch: int | None = None  # pictures a micro-batch, if not the recipe's; 0 is the whole update
    only: str = ""  # the one recipe that has this row


PLAIN, FAST = {"lean": False}, {"compiled": True, "graphed": True}
OURS = (
    Variant("encoded once", T4_LIKE, PLAIN | {"recompute": 1}),
    Variant("nothing recomputed", T4_LIKE, PLAIN),
    Variant("lean step", T4_LIKE, {}),
    Variant("element-wise work compiled", T4_LIKE, {"compiled": True}),
    Variant("CUDA graph", T4_LIKE, FAST),
    Variant("16 x 6 in place of 12 x 8", T4_LIKE, {"compiled": True}, batch=16, only="naruto-256"),
    Variant("nothing recomputed", OWN, PLAIN),
    Variant("lean step", OWN, {}),
    Variant("CUDA graph", OWN, FAST),
    Variant("an update in one micro-batch", OWN, FAST, batch=0),
)
CHECKED = {  # rows whose gradients are held against fp32
    "nothing recomputed": PLAIN, "lean step": {}, "element-wise work compiled": {"compiled": True}, "CUDA graph": FAST,
}  # fmt: skip
CHECKED_AT = {  # pictures a micro-batch, micro-batches, px: what fits in fp32
    "naruto-1024": {"batch": 1, "accumulation": 4, "resolution": 512},
    "naruto-256": {"batch": 2, "accumulation": 2, "resolution": 256},
}


def recipe_of(options, name: str, **changes) -> recipe.Recipe:
    vae = options.base / "vae" if torch.cuda.is_available() else ""
    plan = recipe.load(
        name, base=str(options.base), vae=str(vae), dataset=str(options.out / "data"), holdout=0.0, previews=0,
        legs=(recipe.Leg(1000, 1e-4),),
    )
    return plan.replace(**(changes | options.set))


def begin(options, plan: recipe.Recipe, rung: dict, batch: int) -> train.Run:
    """A run in an empty folder, on the rung with these fields."""
    folder = options.out / "runs" / f"{os.getpid()}-{time.time():.3f}"
    return train.begin(plan, folder, options.out / "cache", rungs=[Rung(batch, **rung)])


def prepare(options) -> None:
    """The base, unless there is one, and the pictures."""
    if not (options.base / "model_index.json").exists():
        import sdxl

        sdxl.write(options.base, BASE)
        gpu.free()
    world.write_dataset(options.out / "data", count=PICTURES, size=512)


def result_file(options, name: str, variant: str, mode: str) -> Path:
    return options.out / "results" / name / f"{re.sub(r'[^a-z0-9]+', '-', f'{variant} {mode}'.lower())}.json"


def keep(options, name: str, variant: str, mode: str, figures: dict) -> None:
    """Writes a row's figures, whole or not at all; without a model where it says nothing of a T4."""
    if mode == OWN or not figures.get("tflop"):  # a replayed graph's kernels name no ops
        figures = {key: value for key, value in figures.items() if not key.startswith(("t4", "tflop", "giga"))}
    file = result_file(options, name, variant, mode)
    row = {"recipe": name, "variant": variant, "attention": mode, "commit": options.commit}
    row |= measure.machine() | figures
    files.write_json(file.with_suffix(".part"), row).rename(file)
    print(f"{name}: {variant}, attention {mode}: " + json.dumps(
        {key: row[key] for key in SHOWN if key in row}), flush=True)


def stock(options, name: str, vae: str | None = None) -> None:
    """Runs the script until it is measured; leaves a result for each kind of attention, and its first micro-step."""
    plan, variant = recipe_of(options, name), FIXED if vae else STOCK
    cuda = torch.cuda.is_available()
    folder = options.out / "stock" / f"{name}{'-fixed' if vae else ''}"
    sys.argv = [str(options.stock)] + script.arguments(
        pretrained_model_name_or_path=plan.base, pretrained_vae_model_name_or_path=vae, train_data_dir=plan.dataset,
        output_dir=folder, cache_dir=folder / "cache", resolution=plan.resolution, center_crop=True,
        train_batch_size=plan.batch, gradient_accumulation_steps=plan.accumulation, max_train_steps=1000,
        checkpointing_steps=1000, learning_rate=1e-4, lr_warmup_steps=0, rank=plan.rank, seed=0,
        gradient_checkpointing=True, mixed_precision="fp16" if cuda else "no", use_8bit_adam=cuda,
    )  # fmt: skip

    def course():
        """Goes on from `yield` to `yield` at the start of each of the script's micro-steps."""
        figures = {mode: {} for mode in (T4_LIKE, OWN)}
        for mode, row in figures.items():
            measure.attention(mode)
            gpu.free()
            for _ in range(plan.accumulation):  # an update to warm up
                yield
            gpu.reset_peak()
            begun = measure.now()
            for _ in range(plan.accumulation):
                yield
            row.update(times(plan, measure.now() - begun) | measure.peaks())
        for mode, row in reversed(figures.items()):
            measure.attention(mode)
            yield
            with measure.kernels(folder / f"{mode}.trace.json", 1, row):
                yield
            row["loss"] = watched.first["loss"].item() if vae is None else None  # another VAE: other latents
            keep(options, name, variant, mode, row)
        if vae is None:
            save_first(options, name, watched.first)
        raise SystemExit  # the script's own end, another pipeline, is not what is measured

    steps = course()
    watched = script.Watched(lambda: next(steps))
    try:
        runpy.run_path(str(options.stock), run_name="__main__")
    except SystemExit as stopped:
        if stopped.code:
            raise


def save_first(options, name: str, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, options.out / f"{name}.{FIRST}")


def load_first(options, name: str) -> dict[str, torch.Tensor] | None:
    from safetensors.torch import load_file

    file = options.out / f"{name}.{FIRST}"
    return load_file(file) if file.exists() else None


def times(plan: recipe.Recipe, seconds: float) -> dict[str, float]:
    """An update's, and what follows from them."""
    return {
        "update_s": seconds,
        "micro_ms": 1000 * seconds / plan.accumulation,
        "images_per_s": plan.pictures_per_step / seconds,
    }


def ours(options, name: str) -> None:
    """Every variant that has no result yet, until the time is over; one that fails is told of and left out."""
    plan, first, compiled_for = recipe_of(options, name), load_first(options, name), None
    for variant in sorted(OURS, key=lambda v: (not v.rung.get("lean", True), bool(v.only))):  # what is wanted most
        done = result_file(options, name, variant.name, variant.mode).exists()
        if done or variant.only not in ("", name) or not wanted(options, variant.name) or time.time() > options.until:
            continue
        if (variant.mode, variant.batch) != compiled_for:  # else other shapes would be compiled as dynamic ones
            torch.compiler.reset()
            compiled_for = variant.mode, variant.batch
        try:
            keep(options, name, variant.name, variant.mode, measured(options, plan, variant, first))
        except Exception as error:  # the other rows are worth having
            print(f"{name}: {variant.name}, attention {variant.mode}: {type(error).__name__}: {error}", flush=True)
        gpu.free()


def wanted(options, row: str) -> bool:
    return not options.rows or any(part in row for part in options.rows)


def measured(options, plan: recipe.Recipe, variant: Variant, first) -> dict:
    """A row's figures."""
    measure.attention(variant.mode)
    batch = plan.pictures_per_step if variant.batch == 0 else variant.batch or plan.batch
    begun = measure.now()
    run = begin(options, plan, variant.rung, batch)
    figures = {"loss": loss_on(run, first) if first and variant.batch is None else None}
    whole = step.draw(run.recipe, 0, run.training_set.shapes)
    piece = part_of(whole, batch)  # a micro-batch
    for _ in range(3):  # kernels are compiled and chosen, then recorded
        run._accumulate(piece)
    run.update()
    figures["ready_s"] = measure.now() - begun
    gpu.reset_peak()
    begun = measure.now()
    run.update()
    figures |= times(plan, measure.now() - begun) | measure.peaks()
    file = result_file(options, plan.name, variant.name, variant.mode).with_suffix(".trace.json")
    with measure.kernels(file, batch / plan.batch, figures):
        run._accumulate(piece)
    return figures


def part_of(draw: step.Draw, count: int) -> step.Draw:
    """The first `count` pictures of a draw."""
    return step.Draw(**{field.name: getattr(draw, field.name)[:count] for field in dataclasses.fields(draw)})


def loss_on(run: train.Run, inputs: dict[str, torch.Tensor]) -> float:
    """The run's mean loss, by its own step, on what the script's first micro-step saw."""
    real = run._inputs

    def given(draw, part):
        own = real(draw, part)
        return own | {name: value[part].to(own[name]) for name, value in inputs.items() if name in own}

    run._inputs = given
    draw = part_of(step.draw(run.recipe, 0, run.training_set.shapes), len(inputs["latents"]))
    losses = run._accumulate(draw)
    run._inputs = real
    return losses.mean().item()


def exact(options, name: str) -> None:
    """The gradients of each kind of step of ours against fp32's."""
    measure.attention(T4_LIKE)
    plan = recipe_of(options, name, **CHECKED_AT[name])
    found, weights, inputs = {}, None, None
    for row, rung in CHECKED.items():
        if not wanted(options, row):
            continue
        run = begin(options, plan, rung, plan.batch)
        weights = weights or random_lora(run.unet)
        draw = step.draw(plan, 0, run.training_set.shapes)
        parts = step.micro_batches(draw, run.training_set.shapes, plan.batch)
        inputs = inputs or [run._inputs(draw, part) for part in parts]
        try:
            found[row] = gradients(run, draw, weights)
        except Exception as error:
            print(f"{name}: gradients of {row}: {type(error).__name__}: {error}", flush=True)
        del run
        gpu.free()
    device = models.device_for(plan.precision)
    unet = models.load_unet(plan.base, torch.float32, device)
    trained = lora.inject(unet, plan.rank, plan.alpha, plan.seed)
    put(unet, weights)
    for each in inputs:
        (step.diffusion_loss(unet, **each).sum() / plan.pictures_per_step).backward()
    reference = torch.cat([p.grad.flatten() for p in trained])
    figures = {"grad_errors": {row: ((g - reference).norm() / reference.norm()).item() for row, g in found.items()}}
    files.write_json(options.out / "results" / f"{name}.exact.json", figures)
    print(name, json.dumps(figures), flush=True)


def random_lora(unet) -> dict[str, torch.Tensor]:
    """Weights for its LoRA as after some training: B is no longer zero."""
    generator = torch.Generator().manual_seed(1)
    named = {name: p.detach().clone() for name, p in unet.named_parameters() if p.requires_grad}
    return {
        name: 0.01 * torch.randn(p.shape, generator=generator).to(p) if "lora_B" in name else p
        for name, p in named.items()
    }


@torch.no_grad()
def put(unet, weights: dict[str, torch.Tensor]) -> None:
    """Gives the LoRA of `unet` these weights."""
    for name, parameter in unet.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])


def gradients(run: train.Run, draw: step.Draw, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """All LoRA gradients of the run's step on `draw`, one after the other, fp32; the loss scale is halved till fit."""
    put(run.unet, weights)
    run.engine.refresh()
    run._accumulate(draw)  # kernels are compiled, and recorded
    for _ in range(train.RETRIES):
        run._accumulate(draw)
        flat = torch.cat([p.grad.flatten() for p in run.parameters]) / run.scaler.get_scale()
        if flat.isfinite().all():
            break
        run.scaler.unscale_(run.optimizer)
        run.scaler.update()
    return flat


COMPILED = "plain, compiled"  # by torch.compile: what is no product has other kernels
UPDATES = {  # name: attention, rung, micro-batches taken at once; the plain ones differ by their kernels alone
    "plain": (T4_LIKE, PLAIN, 1), "plain, own attention": (OWN, PLAIN, 1), "plain, larger pieces": (T4_LIKE, PLAIN, 2),
    COMPILED: (OWN, PLAIN, 1), "lean": (T4_LIKE, {}, 1), "fast": (OWN, FAST, 1), "fp32": (T4_LIKE, PLAIN, 1),
}  # fmt: skip


def thirty(options) -> None:
    """The losses of the first updates: by the plain step on different kernels, by the lean one, and in fp32."""
    prepare(options)
    for name in options.recipes:
        folder = options.out / "thirty" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        plan = recipe_of(options, name)
        cache.encode(data.load(plan.dataset), plan, options.out / "cache")  # once, not in each worker
        workers = {row: start(options, "updates", name, row) for row in UPDATES}
        for row, worker in workers.items():
            if worker.wait():
                log = (options.out / f"updates-{name}-{row}.log").read_text(errors="replace")
                print(f"{name}: '{row}' failed: {log[-1000:]}", flush=True)
        losses = {row: files.read_json(folder / f"{row}.json") for row in UPDATES if (folder / f"{row}.json").exists()}
        if "plain" not in losses:
            continue
        figures = {"updates": options.steps, "mean_loss": statistics.fmean(losses["plain"])}
        figures["greatest difference, root mean square"] = {
            f"{one} / {two}": apart(losses[one], losses[two]) for one, two in itertools.combinations(losses, 2)
        }
        figures |= {"commit": options.commit} | measure.machine()
        files.write_json(options.out / "results" / f"{name}.thirty.json", figures)
        print(name, json.dumps(figures), flush=True)


def apart(one: list[float], two: list[float]) -> tuple[float, float]:
    """How far two runs' losses are from each other: at most, and in the root mean square."""
    differences = [a - b for a, b in zip(one, two, strict=True)]
    return max(map(abs, differences)), statistics.fmean(d * d for d in differences) ** 0.5


def updates(options, name: str) -> None:
    """The losses of a run's first updates."""
    mode, rung, pieces = UPDATES[options.row]
    measure.attention(mode)
    torch.backends.cudnn.benchmark = mode == OWN
    changes = {"accumulation": options.accumulation} if options.accumulation else {}
    plan, losses = recipe_of(options, name, **changes), []
    run = begin(options, plan, rung, pieces * plan.batch)
    if options.row == COMPILED:
        torch._dynamo.config.recompile_limit = 64  # a ResNet's shapes are a dozen
        for module in run.unet.modules():
            if isinstance(module, (ResnetBlock2D, BasicTransformerBlock)) or module is run.unet.conv_norm_out:
                module.compile(dynamic=False)
    if options.row == "fp32":  # the same encoded pictures, the frozen weights exact, nothing rounded to fp16
        run.engine = step.Plain(run.unet.float(), run.parameters)
    for _ in range(options.steps):
        losses.append(run.update()[0])
        run.step += 1
    files.write_json(options.out / "thirty" / name / f"{options.row}.json", losses)


def table(options) -> None:
    """All results as speed.csv in DIR."""
    rows = []
    for name in options.recipes:
        order = []
        for mode in (T4_LIKE, OWN):
            order += [(STOCK, mode), (FIXED, mode)] + [(each.name, mode) for each in OURS if each.mode == mode]
        files = [result_file(options, name, *which) for which in order]
        exact_file = options.out / "results" / f"{name}.exact.json"
        known = files.read_json(exact_file) if exact_file.exists() else {}
        for row in (files.read_json(file) for file in files if file.exists()):
            row["grad_error"] = known.get("grad_errors", {}).get(row["variant"])
            rows.append(row)
    with open(options.out / "speed.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ladder.FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(rounded, rows))
    print(ladder.full(ladder.read(options.out / "speed.csv")))


def rounded(row: dict) -> dict:
    """Figures as they are written: a loss whole, since it is compared."""
    return {key: f"{v:.9g}" if key == "loss" and v else f"{v:.5g}" if isinstance(v, float) else v
            for key, v in row.items()}


def start(options, part: str, name: str, row: str = "", until: float | None = None) -> subprocess.Popen:
    """A part of the benchmark in its own process."""
    command = [sys.executable, __file__, part, "--out", options.out, "--base", options.base, "--recipes", name]
    command += ["--set", json.dumps(options.set), "--until", until or options.until]
    command += ["--steps", options.steps, "--row", row]
    command += ["--stock", options.stock] if options.stock else []
    command += ["--commit", options.commit] if options.commit else []
    command += ["--accumulation", options.accumulation] if options.accumulation else []
    command += ["--rows", *options.rows] if options.rows else []
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(
        [str(Path(train.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])}
    log = open(options.out / f"{part}-{name}{row and '-' + row}.log", "w")
    return subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=subprocess.STDOUT)


def everything(options) -> None:
    """Each part in a process of its own, for each recipe, while there is time; references side by side."""
    prepare(options)
    for part in PARTS[1:-1]:
        running = {}
        for place, name in enumerate(options.recipes):
            variant = {"stock": STOCK, "fixed": FIXED}.get(part)
            left = options.until - time.time()
            if left < 0 or variant and result_file(options, name, variant, T4_LIKE).exists():
                continue
            running[name] = start(options, part, name, until=time.time() + left / (len(options.recipes) - place))
            if part != "exact":
                finish(options, part, running)
        finish(options, part, running)
    table(options)


def finish(options, part: str, running: dict[str, subprocess.Popen]) -> None:
    """Waits for what is running, and shows its results, or what went wrong."""
    while running:
        name, process = running.popitem()
        failed = process.wait()
        log = (options.out / f"{part}-{name}.log").read_text(errors="replace")
        print(log[-2000:] if failed else "".join(x for x in log.splitlines(True) if x.startswith(name)), flush=True)
        print(f"{part} {name}: done after {time.time() - options.begun:.0f} s in all", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("all", *PARTS, "thirty", "updates"))
    parser.add_argument("--stock", type=Path, help=f"diffusers' {script.NAME}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="a base that is there, in place of a random one at full size")
    parser.add_argument("--recipes", nargs="+", default=["naruto-1024", "naruto-256"], choices=list(CHECKED_AT))
    parser.add_argument("--rows", nargs="+", default=[], help="parts of the names of the rows that are wanted")
    parser.add_argument("--set", type=json.loads, default={}, help="JSON: other recipe fields")
    parser.add_argument("--commit", help="what was measured, where git doesn't know it")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing later")
    parser.add_argument("--steps", type=int, default=30, help="updates of 'thirty'")
    parser.add_argument("--accumulation", type=int, help="micro-batches an update of 'thirty', if not the recipe's")
    parser.add_argument("--until", type=float, help="(time.time() of the end)")
    parser.add_argument("--row", default="", help="(a row of 'thirty')")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.base = (options.base or options.out / "base").resolve()
    options.begun = time.time()
    options.commit = options.commit or measure.commit()
    options.until = options.until or time.time() + 60 * options.minutes
    return options


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part in ("all", "stock", "fixed"):
        options.stock = script.found(options.stock or Path()).resolve()
    parts = {"stock": stock, "fixed": lambda o, name: stock(o, name, str(o.base / "vae")), "ours": ours, "exact": exact}
    whole = {"all": everything, "prepare": prepare, "thirty": thirty, "table": table}
    if options.part in whole:
        whole[options.part](options)
        return
    for name in options.recipes:
        (parts | {"updates": updates})[options.part](options, name)


if __name__ == "__main__":
    main()
