"""The memory plan's predictions beside what a CUDA GPU's allocator really took: each rung in a process of its own.

    PYTHONPATH=. python tests/benchmarks/plan.py --out DIR [--base FOLDER] [--predict]

For both named recipes at full size with random weights: every rung of the ladder on a T4's 14.56 GiB, those that are
chosen under a hard cap of 14.56, 8 and 6 GiB, the plain step's, and larger micro-batches. Each process loads the U-Net,
trains two updates (the second replays its CUDA graph), measures a forward pass, and is held to its cap by
`torch.cuda.set_per_process_memory_fraction`; attention as a T4 has it. Several run at once where the card has room:
nothing is timed. Leaves DIR/plan.csv and DIR/plan.md. With --predict nothing is run and no GPU is needed.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import sdxl
import torch

from naruto_lora import lora, models, recipe, step, train
from naruto_lora.memory import gpu, plan, speed
from naruto_lora.memory.fallback import Rung, make_engine
from naruto_lora.memory.gpu import CONTEXT, GIB, Card

CAPS = (14.56, 8.0, 6.0)
LARGER = {"naruto-1024": (4, 8), "naruto-256": (48, 96)}
RECIPES = ("naruto-256", "naruto-1024")
MOST = 3  # micro-batches an update: after two the CUDA graph is recorded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="a random base written before")
    parser.add_argument("--room", type=float, default=1000, help="GiB of the card that may be used")
    parser.add_argument("--predict", action="store_true", help="the predictions alone")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    base = args.base or args.out / "base"
    if args.one:
        print(json.dumps(measure(base, **json.loads(args.one))))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if not (base / "unet").exists():
        write(base, weights=not args.predict)
    rows = [case for name in RECIPES for case in cases(recipe.load(name, base=str(base), vae=""))]
    if not args.predict:
        run_all(rows, args.out, base, args.room)
    report(rows, args.out)


def write(base: Path, weights: bool) -> None:
    """The U-Net at full size, random, in fp16, and the VAE's configuration; the configurations alone if so asked."""
    for part, config in (("unet", sdxl.UNET), ("vae", sdxl.VAE)):
        (base / part).mkdir(parents=True)
        (base / part / "config.json").write_text(json.dumps(config))
    if weights:
        torch.set_default_dtype(torch.float16)
        with torch.device("cuda"):
            sdxl.unet().save_pretrained(base / "unet", variant="fp16")
        torch.set_default_dtype(torch.float32)


def cases(of: recipe.Recipe) -> list[dict]:
    """Rows to measure: the rung, the cap it must keep to (GiB; None is none), what is predicted (GiB)."""
    rows, seen = [], set()

    def add(row: plan.Row, cap: float | None, chosen: bool = False) -> None:
        if (row.rung, cap) not in seen:
            seen.add((row.rung, cap))
            rows.append({
                "recipe": of.name, "rung": row.what if row.rung.lean else f"plain step, {row.what}",
                "cap": cap, "chosen": "chosen" if chosen else "", "predicted": row.parts.reserved / GIB,
                "settings": asdict(row.rung),
            })  # fmt: skip

    for cap in CAPS:
        card = Card.of("capped", cap + CONTEXT / GIB)  # the cap holds the allocator alone
        made = plan.plan(of, card, 0)
        add(made.chosen, cap, chosen=True)
        if cap == CAPS[0]:
            for each in (made, plan.plan(of, card, 0, lean=False)):
                for row in each.rows:
                    add(row, None if row is not made.chosen else cap)
    for size in LARGER[of.name]:
        rung = Rung(size, graphed=True)
        add(plan._row(f"nothing recomputed, {size} pictures at once", "nothing", rung, of, card), None)
    return rows


def run_all(rows: list[dict], out: Path, base: Path, room: float) -> None:
    """Measures all rows, as many at once as the card has room for; the results go into them."""
    room = min(room, 0.9 * torch.cuda.mem_get_info()[0] / GIB)
    waiting, running = sorted(rows, key=lambda row: -row["predicted"]), []
    while waiting or running:
        for row, process in list(running):
            if process.poll() is not None:
                running.remove((row, process))
                finish(row, process)
        used = sum(need(row) for row, _ in running)
        for row in list(waiting):
            if len(running) < 6 and (used + need(row) <= room or not running):
                waiting.remove(row)
                running.append((row, start(row, out, base)))
                used += need(row)
        time.sleep(0.5)


def need(row: dict) -> float:
    return 1.1 * max(row["predicted"], row["cap"] or 0) + 0.6


def start(row: dict, out: Path, base: Path) -> subprocess.Popen:
    spec = json.dumps({"name": row["recipe"], "cap": row["cap"], "settings": row["settings"]})
    command = [sys.executable, __file__, "--out", str(out), "--base", str(base), "--one", spec]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(row: dict, process: subprocess.Popen) -> None:
    lines = process.communicate()[0].strip().splitlines() or ["nothing"]
    result = [line for line in lines if line.startswith("{")]
    found = json.loads(result[-1]) if process.returncode == 0 and result else {"failed": lines[-1][:200]}
    row.update(found)
    print(row["recipe"], row["rung"], row["cap"], f"{row['predicted']:.2f}", found, flush=True)


def measure(base: Path, name: str, cap: float | None, settings: dict) -> dict:
    """The rung's peaks in GiB, in this process."""
    of, rung, device = recipe.load(name, base=str(base), vae=""), Rung(**settings), torch.device("cuda")
    gpu.use_expandable_segments()
    if cap:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cap * GIB / total)
    for backend in ("flash", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{backend}_sdp")(False)
    unet = models.load_unet(of.base, torch.float16, device)
    parameters = lora.inject(unet, of.rank, of.alpha)
    optimizer, engine = train.make_optimizer(parameters, device), make_engine(unet, parameters, rung)
    gpu.free()
    loaded = torch.cuda.max_memory_reserved() / GIB
    inputs = speed.random_inputs(unet, rung.batch, of.resolution // 8, device)
    inputs["alphas_cumprod"] = torch.linspace(0.999, 0.005, 1000, device=device)
    seed = torch.ones(rung.batch, device=device)
    for _ in range(2):
        engine.zero_grad()
        for _ in range(max(2, min(MOST, of.pictures_per_step // rung.batch))):
            engine.accumulate(inputs, seed)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        engine.refresh()
    trained = torch.cuda.max_memory_reserved() / GIB
    with torch.no_grad(), engine.context():
        step.diffusion_loss(unet, **inputs)
    torch.cuda.synchronize()
    return {
        "loaded": loaded,
        "trained": trained,
        "reserved": torch.cuda.max_memory_reserved() / GIB,
        "allocated": torch.cuda.max_memory_allocated() / GIB,
        "device": torch.cuda.get_device_name(),
    }


def report(rows: list[dict], out: Path) -> None:
    """The rows as CSV and as a table in Markdown, which is printed too."""
    names = ["recipe", "rung", "cap", "chosen", "predicted", "reserved", "allocated", "trained", "loaded", "failed",
             "device"]  # fmt: skip
    with open(out / "plan.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| recipe | rung | cap GiB | predicted | measured | difference |", "|---|---|---|---|---|---|"]
    for row in rows:
        found, change = row.get("failed", "-"), "-"
        if "reserved" in row:
            found, change = f"{row['reserved']:.2f}", f"{100 * (row['predicted'] / row['reserved'] - 1):+.1f}%"
        what = f"**{row['rung']}**" if row["chosen"] else row["rung"]
        lines.append(f"| {row['recipe']} | {what} | {row['cap'] or ''} | {row['predicted']:.2f} | {found} | {change} |")
    (out / "plan.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
