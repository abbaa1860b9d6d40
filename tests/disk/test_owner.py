"""One owner a run: threads, processes and machines that meet in one folder."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import Watcher, same_adapter

from naruto_lora import checkpoint, train
from naruto_lora.disk import owner

HOLDER = """
import sys, time
from pathlib import Path
from naruto_lora.disk import owner
if sys.argv[2:]:
    owner.machine = lambda: sys.argv[2]
    owner.fcntl = None
    owner.BEAT = 0.05
claim = owner.Claim(Path(sys.argv[1]))
claim.hold()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder():
    """Starts a process that holds a folder, on this machine or on another one; returns it once it does."""
    started = []

    def start(folder, *machine):
        child = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), *machine], stdout=subprocess.PIPE)
        started.append(child)
        assert child.stdout.readline() == b"held\n"
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


@pytest.fixture
def hasty(monkeypatch):
    """Signs of life, and the wait for one, in fractions of a second."""
    monkeypatch.setattr(owner, "BEAT", 0.05)
    monkeypatch.setattr(owner, "SILENT", 1.0)


def claim_of(machine, id="abc", at=None, pid=1, beats=3):
    at = time.time() if at is None else at
    return {
        "machine": machine, "host": "colab-7", "pid": pid, "id": id, "since": at, "at": at, "beats": beats,
    }  # fmt: skip


def write(folder, claim):
    (folder / owner.NAME).write_text(json.dumps(claim))


def test_another_process_is_refused_by_its_number_and_replaced_once_it_is_dead(tmp_path, holder):
    child = holder(tmp_path)
    claim = owner.Claim(tmp_path)
    with pytest.raises(owner.Taken) as caught:
        claim.hold()
    clock = time.strftime("%H:%M", time.localtime(owner.read(tmp_path)["since"]))
    assert str(caught.value) == (
        f"'{tmp_path}' is in use by a run of process {child.pid} on this machine (since {clock}): wait for it, stop it "
        f"there, or choose another folder"
    )
    assert not claim.held
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    claim.hold()  # at once: nothing waits for a heartbeat
    assert claim.held and owner.read(tmp_path)["pid"] == os.getpid()
    claim.release()
    assert not claim.held and not list(tmp_path.iterdir())
    claim.release()


def test_a_process_that_ends_gives_its_folder_back(tmp_path):
    code = HOLDER.replace("time.sleep(60)", "")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, stdout=subprocess.DEVNULL)
    assert not list(tmp_path.iterdir())


def test_without_locks_the_number_of_the_process_tells_the_dead_one(tmp_path, monkeypatch, holder):
    monkeypatch.setattr(owner, "fcntl", None)
    child = holder(tmp_path)
    with pytest.raises(owner.Taken, match=f"process {child.pid} on this machine"):
        owner.Claim(tmp_path).hold()
    child.kill()
    child.wait()
    owner.Claim(tmp_path).hold()


def test_a_living_machine_is_told_by_its_heartbeat(tmp_path, holder, hasty):
    holder(tmp_path, "elsewhere")
    watcher = Watcher()
    with pytest.raises(owner.Taken, match=r"in use by a run of another machine, '.+' \(since \d\d:\d\d\): wait"):
        owner.Claim(tmp_path, watcher).hold(wait=True)
    assert len(watcher.notes) == 1
    assert watcher.notes[0].endswith("; waiting up to 1 seconds for a sign of life")
    with pytest.raises(owner.Taken):
        owner.Claim(tmp_path).hold()


def test_a_machine_that_is_silent_is_replaced(tmp_path, hasty):
    write(tmp_path, claim_of("elsewhere"))
    with pytest.raises(owner.Taken, match="'colab-7'"):  # in the loop nothing waits
        owner.Claim(tmp_path).hold()
    started, claim = time.monotonic(), owner.Claim(tmp_path)
    claim.hold(wait=True)
    assert time.monotonic() - started >= owner.SILENT
    assert owner.read(tmp_path)["id"] == claim.id


def test_a_machine_whose_last_sign_is_long_ago_is_replaced_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "SILENT", 1e9)
    write(tmp_path, claim_of("elsewhere", at=time.time() - owner.LONG_AGO - 1))
    owner.Claim(tmp_path).hold(wait=True)
    write(tmp_path, claim_of(owner.machine(), at=time.time()))  # and this machine's, whose lock is gone
    owner.Claim(tmp_path).hold(wait=True)


def test_a_machine_that_finishes_meanwhile_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "SILENT", 30.0)
    write(tmp_path, claim_of("elsewhere"))
    ends = threading.Timer(0.2, (tmp_path / owner.NAME).unlink)
    ends.start()
    claim, started = owner.Claim(tmp_path), time.monotonic()
    claim.hold(wait=True)
    assert claim.held and time.monotonic() - started < 20


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"id": 5}', b"\xff", b"[" * 100_000])
def test_a_claim_that_cant_be_read_counts_once_it_is_silent(tmp_path, hasty, monkeypatch, content):
    monkeypatch.setattr(owner, "SILENT", 0.1)
    (tmp_path / owner.NAME).write_bytes(content)
    monkeypatch.setattr(owner, "fcntl", None)
    with pytest.raises(owner.Taken, match="in use by a run of another process: wait"):
        owner.Claim(tmp_path).hold()
    owner.Claim(tmp_path).hold(wait=True)


def test_a_thread_keeps_another_out_and_replaces_its_own_claim(tmp_path):
    first, second = owner.Claim(tmp_path), owner.Claim(tmp_path)
    first.hold()
    refused = []

    def other_thread():
        with pytest.raises(owner.Taken, match=f"process {os.getpid()} on this machine"):
            owner.Claim(tmp_path).hold()
        refused.append(True)

    thread = threading.Thread(target=other_thread)
    thread.start()
    thread.join()
    assert refused
    second.hold()  # this cell ran before, in this kernel
    assert second.held and not first.held
    with pytest.raises(owner.Taken):
        first.hold()
    second.release()
    first.hold()


def test_a_claim_that_is_dropped_is_given_back_and_its_thread_ends(tmp_path, hasty):
    before = threading.active_count()
    claim = owner.Claim(tmp_path)
    claim.hold()
    assert threading.active_count() == before + 1
    beats = owner.read(tmp_path)["beats"]
    deadline = time.monotonic() + 20
    while owner.read(tmp_path)["beats"] < beats + 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert owner.read(tmp_path)["beats"] >= beats + 3
    del claim
    while (list(tmp_path.iterdir()) or threading.active_count() > before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not list(tmp_path.iterdir()) and threading.active_count() == before


def test_what_another_machine_took_over_is_not_taken_back(tmp_path, hasty):
    claim = owner.Claim(tmp_path)
    claim.hold()
    write(tmp_path, claim_of("elsewhere"))  # this machine slept for an hour
    time.sleep(4 * owner.BEAT)
    with pytest.raises(owner.Taken, match="another machine, 'colab-7'"):
        claim.hold()
    claim.release()
    assert owner.read(tmp_path)["id"] == "abc"


def test_two_runs_in_one_folder_are_told_before_anything_is_encoded(plan, tmp_path, holder, monkeypatch):
    monkeypatch.setattr(train.cache, "encode", lambda *arguments, **options: pytest.fail("encoded"))
    (tmp_path / "run").mkdir()
    child = holder(tmp_path / "run")
    with pytest.raises(owner.Taken, match=f"run' is in use by a run of process {child.pid}"):
        train.train(plan, tmp_path / "run", mirror=tmp_path / "mirror")
    with pytest.raises(owner.Taken, match=f"run' is in use by a run of process {child.pid}"):
        train.train(plan, tmp_path / "other", mirror=tmp_path / "run")
    assert not list((tmp_path / "other").iterdir())  # given back
    assert [path.name for path in (tmp_path / "run").iterdir()] == [owner.NAME]


def test_a_run_owns_its_folders_until_it_ends_also_by_an_error(plan, tmp_path, cache_folder):
    out, mirror = tmp_path / "run", tmp_path / "mirror"
    watcher = Watcher(lambda step: owned.append([owner.read(folder)["pid"] for folder in (out, mirror)]))
    owned = []
    train.train(plan, out, cache_folder, watcher, mirror)
    assert owned == [[os.getpid()] * 2] * plan.steps
    assert owner.read(out) is owner.read(mirror) is None
    with pytest.raises(ValueError, match="rank"):
        train.train(plan.replace(rank=8), out, cache_folder, watcher, mirror)
    assert owner.read(out) is owner.read(mirror) is None


def test_a_mirror_that_another_machine_takes_gets_no_more_copies_and_the_run_goes_on(
    plan, trained, tmp_path, cache_folder
):
    out, mirror = tmp_path / "run", tmp_path / "mirror"
    watcher = Watcher(lambda step: step == 3 and write(mirror, claim_of("elsewhere")))
    train.train(plan, out, cache_folder, watcher, mirror)
    assert same_adapter(out, trained.folder)
    assert [checkpoint.step_of(path) for path in checkpoint.find(mirror)] == [2]
    assert sum("no copy in the mirror" in note and "'colab-7'" in note for note in watcher.notes) == 1
    assert owner.read(mirror)["id"] == "abc"


def test_a_folder_that_another_machine_takes_is_left_to_it(plan, tmp_path, cache_folder):
    watcher = Watcher(lambda step: step == 3 and write(tmp_path, claim_of("elsewhere")))
    with pytest.raises(owner.Taken, match="another machine, 'colab-7'"):
        train.train(plan, tmp_path, cache_folder, watcher)
    assert [checkpoint.step_of(path) for path in checkpoint.find(tmp_path)] == [2]


def test_a_mirror_that_is_the_folder_itself_is_none(plan, trained, tmp_path, cache_folder):
    train.train(plan, tmp_path / "run", cache_folder, mirror=tmp_path / "." / "run")
    assert same_adapter(tmp_path / "run", trained.folder)


def test_of_processes_that_start_at_once_one_gets_the_folder(tmp_path):
    code = HOLDER.replace("claim.hold()", "try: claim.hold()\nexcept owner.Taken as error: sys.exit(f'{error}')")
    command = [sys.executable, "-c", code, str(tmp_path)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(5)]
    refused = [child for child in children if child.stdout.readline() != b"held\n"]
    (winner,) = set(children) - set(refused)
    for child in refused:
        assert f"process {winner.pid} on this machine" in child.communicate()[1].decode()
    winner.kill()
    winner.communicate()
