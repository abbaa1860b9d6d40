"""Kills at random moments: whatever they interrupt, the final LoRA equals that of an uninterrupted run."""

import json
import random
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
# Kills itself at the n-th call below whose call stack contains `part`, or after some seconds.
DRIVER = """
import os, random, signal, sys, threading
from naruto_lora import cache, checkpoint, files, step, train
from naruto_lora.disk import shards
from naruto_lora.measure import validation

plan, out, cache_folder, mirror, part, seed = sys.argv[1:]
rng, stack, count = random.Random(int(seed)), [], [0]
last, seconds = rng.randint(1, 4 if part == "encode" else 30), 3 * rng.random()
shards.FULL_ENTRIES = 8

def die():
    print("/".join(stack) or "between", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

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
    (files, ("sha256", "flush", "copy_whole", "replace")),
    (cache, ("encode", "encode_prompts", "encode_pictures")),
    (step, ("diffusion_loss",)),
    (validation, ("holdout_losses",)),
):
    for name in names:
        watched(module, name)
train.train(plan, out, cache_folder, mirror=mirror)
os._exit(0)
"""
PARTS = ("encode", "encode", "save", "clock", "", "fetch")  # "": any call


def killed_until_done(plan, folder, kills, seed):
    """Runs `plan` in `folder` until it was killed `kills` times, then to its end; returns where it was killed."""
    (folder / "drive").mkdir()
    file = folder / "plan.json"
    file.write_text(plan.to_json())
    rng, killed = random.Random(seed), []
    places, log = [file, folder / "run", folder / "cache", folder / "drive" / "run"], folder / "log"
    command = [sys.executable, "-c", SERVER, DRIVER, log]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        while len(killed) < kills:
            part = PARTS[len(killed)] if len(killed) < len(PARTS) else rng.choice(PARTS[2:5])
            print(json.dumps([*map(str, places), part, str(rng.randint(0, 10**6))]), file=server.stdin, flush=True)
            status = int(server.stdout.readline())
            if status == -signal.SIGKILL:
                killed.append(log.read_text().splitlines()[-1])
            elif status:
                pytest.fail(log.read_text())
            else:
                break  # finished before the kill
    train.train(plan, folder / "run", folder / "cache", mirror=folder / "drive" / "run")
    return killed


def long_plan(plan, steps):
    return plan.replace(legs=(Leg(steps // 2, 2e-2), Leg(steps, 1e-2, "cosine")), measure_every=5, previews=1)


def same_files(one, two):
    names = (lora.FILE, "few.safetensors")
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def previews(folder):
    return {path.name: path.read_bytes() for path in (folder / "previews").iterdir()}


@pytest.mark.parametrize("kills, steps", [(3, 10), pytest.param(20, 40, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_ends_like_an_uninterrupted_one(plan, tmp_path, kills, steps):
    plan = long_plan(plan, steps)
    unbroken = train.train(plan, tmp_path / "unbroken" / "run", tmp_path / "unbroken" / "cache")
    folder = tmp_path / "killed"
    folder.mkdir()
    killed = killed_until_done(plan, folder, kills, seed=kills)
    print(f"killed {len(killed)} times: {', '.join(killed)}")
    assert len(killed) == kills
    for part in ("encode", "save"):
        assert any(part in stack.split("/") for stack in killed)
    assert same_files(folder / "run", tmp_path / "unbroken" / "run")
    assert same_files(folder / "drive" / "run", tmp_path / "unbroken" / "run")
    for place in (folder / "run", folder / "drive" / "run"):
        kept = [[path.name for path in checkpoint.find(out)] for out in (place, tmp_path / "unbroken" / "run")]
        assert kept[0] == kept[1] and previews(place) == previews(tmp_path / "unbroken" / "run")
        record = checkpoint.read_state(checkpoint.newest([place]))["record"]
        assert [record[key] for key in ("losses", "holdout", "best_step")] == [
            unbroken[key] for key in ("losses", "holdout", "best_step")]
