"""A machine that is taken away at any moment: whatever was cut short, the LoRA at the end is the unbroken run's."""

import random
import signal
import subprocess
import sys

import pytest

from naruto_lora import checkpoint, lora, train
from naruto_lora.recipe import Leg

# Dies by its own hand at the n-th of these events, or by a clock that starts with the first: half of the times each.
DRIVER = """
import os, random, signal, sys, threading, time
from naruto_lora import cache, checkpoint, files, train

plan, out, cache_folder, mirror, seed = sys.argv[1:]
rng, count = random.Random(int(seed)), [0]
last, seconds = rng.randint(1, 40), rng.random() * 3
by_clock = rng.random() < 0.5

def die():
    print(where[0], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

def watched(module, name):
    function = getattr(module, name)
    def call(*arguments, **options):
        where[0] = f"{module.__name__}.{name}"
        count[0] += 1
        if count[0] == 1 and by_clock:
            threading.Timer(seconds, die).start()
        if count[0] == last and not by_clock:
            die()
        result = function(*arguments, **options)
        where[0] = "between"
        return result
    setattr(module, name, call)

where = ["between"]
for module, names in (
    (os, ("fsync", "rename", "replace")),
    (checkpoint, ("save", "save_file", "fetch", "rotate")),
    (files, ("sha256", "flush", "copy_whole", "replace")),
    (cache, ("save", "encode_prompts", "encode_pictures")),
    (train.step, ("diffusion_loss", "holdout_losses")),
):
    for name in names:
        watched(module, name)
train.train(plan, out, cache_folder, mirror=mirror)
os._exit(0)
"""


def killed_until_done(plan, folder, kills, seed):
    """Runs `plan` in `folder` again and again, `kills` times cut short, then to its end; where it died."""
    (folder / "drive").mkdir()
    file = folder / "plan.json"
    file.write_text(plan.to_json())
    rng, died = random.Random(seed), []
    command = [sys.executable, "-c", DRIVER, file, folder / "run", folder / "cache", folder / "drive" / "run"]
    while len(died) < kills:
        result = subprocess.run([*command, str(rng.randint(0, 10**6))], capture_output=True, text=True, timeout=300)
        if result.returncode == -signal.SIGKILL:
            died.append(result.stdout.splitlines()[-1])
        elif result.returncode:
            pytest.fail(result.stderr)
        else:  # done too early: what is left of the kills is for its end
            break
    train.train(plan, folder / "run", folder / "cache", mirror=folder / "drive" / "run")
    return died


def long_plan(plan, steps):
    return plan.replace(legs=(Leg(steps // 2, 2e-2), Leg(steps, 1e-2, "cosine")), measure_every=5, previews=1)


def same_files(one, two):
    names = (lora.FILE, "few.safetensors")
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


@pytest.mark.parametrize("kills, steps", [(3, 10), pytest.param(20, 40, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_as_if_unbroken(plan, tmp_path, kills, steps):
    plan = long_plan(plan, steps)
    unbroken = train.train(plan, tmp_path / "unbroken" / "run", tmp_path / "unbroken" / "cache")
    folder = tmp_path / "killed"
    folder.mkdir()
    died = killed_until_done(plan, folder, kills, seed=kills)
    print(f"killed {len(died)} times: {', '.join(died)}")
    assert len(died) == kills
    if kills > 10:
        assert any("encode" in place for place in died) and any("save" in place for place in died)
    assert same_files(folder / "run", tmp_path / "unbroken" / "run")
    assert same_files(folder / "drive" / "run", tmp_path / "unbroken" / "run")
    state = checkpoint.read_state(checkpoint.newest([folder / "run"]))
    assert state["record"]["losses"] == unbroken["losses"] and state["record"]["holdout"] == unbroken["holdout"]
