"""Kills at random moments: whatever they interrupt, all that a run leaves equals what an uninterrupted run leaves.

KILLS_SEED=n in the environment gives the slow test's kills other moments.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest

from naruto_lora import checkpoint, lora, train
from naruto_lora.recipe import Leg

# Forks for each line of arguments and answers with the exit status: torch and diffusers are imported once.
SERVER = """
import json, os, sys, traceback
import diffusers.loaders, peft, transformers
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from naruto_lora import train

driver, log = sys.argv[1:]
for line in sys.stdin:
    child = os.fork()
    if not child:
        with open(log, "w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        sys.argv = ["-c", *json.loads(line)]
        try:
            exec(driver, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# Kills itself at the n-th call below whose call stack contains `part`, or after some seconds; in a measurement by
# SIGTERM, after which the run saves.
DRIVER = """
import os, random, signal, sys, threading
from naruto_lora import cache, checkpoint, files, step, train
from naruto_lora.disk import shards
from naruto_lora.measure import validation

plan, out, cache_folder, mirror, part, seed = sys.argv[1:]
rng, stack, count = random.Random(int(seed)), [], [0]
most = {"encode": 4, "holdout": 4, "local": 12}.get(part, 30)
last, seconds = rng.randint(1, most), 3 * rng.random()
shards.FULL_ENTRIES = 8

def die():
    print("killed in", "/".join(stack) or "between", flush=True)
    os.kill(os.getpid(), signal.SIGTERM if part == "holdout" else signal.SIGKILL)

def watched(module, name):
    function = getattr(module, name)
    def call(*arguments, **options):
        stack.append(name)
        if part == "clock" and not count[0]:
            threading.Timer(seconds, die).start()
        count[0] += part == "clock" or part in "/".join(stack)
        if part != "clock" and count[0] == last:
            die()
        try:
            return function(*arguments, **options)
        finally:
            stack.pop()
    setattr(module, name, call)

for module, names in (
    (os, ("fsync", "rename", "replace")),
    (checkpoint, ("save", "save_file", "fetch", "rotate")),
    (checkpoint.RunFolder, ("local",)),
    (files, ("sha256", "flush", "copy_whole", "replace")),
    (cache, ("encode", "encode_prompts", "encode_pictures")),
    (step, ("diffusion_loss",)),
    (validation, ("holdout_losses",)),
):
    for name in names:
        watched(module, name)
try:
    train.train(plan, out, cache_folder, mirror=mirror)
except SystemExit as end:
    os._exit(end.code)
os._exit(0)
"""
PARTS = ("encode", "encode", "save", "holdout", "local", "clock", "", "fetch")  # "": any call
DEAD = (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)


def killed_until_done(plan, folder, kills, seed):
    """Runs `plan` in `folder` until it was killed `kills` times, then to its end; returns where it was killed.

    Before a kill in the fetch from the mirror, the run's own folder is gone, as on a new machine.
    """
    (folder / "drive").mkdir()
    file = folder / "plan.json"
    file.write_text(plan.to_json())
    rng, killed, part = random.Random(seed), [], ""
    places, log = [file, folder / "run", folder / "cache", folder / "drive" / "run"], folder / "log"
    command = [sys.executable, "-c", SERVER, DRIVER, log]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        while len(killed) < kills:
            part = PARTS[len(killed)] if len(killed) < len(PARTS) else part or rng.choice(PARTS[2:])
            if part == "local":
                shutil.rmtree(folder / "run", ignore_errors=True)
            print(json.dumps([*map(str, places), part, str(rng.randint(0, 10**6))]), file=server.stdin, flush=True)
            status = int(server.stdout.readline())
            if status and status not in DEAD:
                pytest.fail(log.read_text())
            said = [line.split()[-1] for line in log.read_text().splitlines() if line.startswith("killed in")]
            killed += said if status else []
            part = "" if status else "local"  # it has finished: there is still a machine to lose
    train.train(plan, folder / "run", folder / "cache", mirror=folder / "drive" / "run")
    return killed


def long_plan(plan, steps):
    return plan.replace(legs=(Leg(steps // 2, 2e-2), Leg(steps, 1e-2, "cosine")), measure_every=5, previews=1)


def lasting(folder):
    """{name: content} of a run's files, without how long it took and where it is."""
    found = {}
    for path in folder.rglob("*"):
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            (content.get("record") or content).pop("seconds")
            found[path.relative_to(folder).as_posix()] = content | {"adapter": ""}
        elif path.is_file() and path.name not in (checkpoint.SUMS, ".owner"):
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


@pytest.mark.parametrize("kills, steps", [(5, 10), pytest.param(20, 40, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_ends_like_an_uninterrupted_one(plan, tmp_path, kills, steps):
    plan = long_plan(plan, steps)
    train.train(plan, tmp_path / "unbroken" / "run", tmp_path / "unbroken" / "cache")
    folder = tmp_path / "killed"
    folder.mkdir()
    killed = killed_until_done(plan, folder, kills, int(os.environ.get("KILLS_SEED", kills)))
    print(f"killed {len(killed)} times: {', '.join(killed)}")
    assert len(killed) == kills
    for part in ("encode", "save", "holdout_losses", "local"):
        assert any(part in stack.split("/") for stack in killed)
    expected = lasting(tmp_path / "unbroken" / "run")
    assert {"run.json", lora.FILE, "run.safetensors"} < set(expected) and any("previews/" in name for name in expected)
    for place in (folder / "run", folder / "drive" / "run"):
        found = lasting(place)
        assert sorted(found) == sorted(expected)
        assert [name for name in found if found[name] != expected[name]] == []
