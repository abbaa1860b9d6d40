"""Checkpoints: damaged ones are skipped, the newest three and the best stay, and a restore is bit for bit."""

import hashlib
import shutil

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from naruto_lora import checkpoint, files, lora, models, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stepped(base):
    """A U-Net with LoRA and its optimizer after two steps on random gradients."""
    return _stepped(base, 2)


def _stepped(base, steps):
    unet = models.load_unet(base, torch.float32, CPU)
    parameters = lora.inject(unet, 4, 10)
    optimizer = train.make_optimizer(parameters, CPU)
    for k in range(steps):
        _step(parameters, optimizer, k)
    return unet, parameters, optimizer


def _step(parameters, optimizer, k):
    generator = torch.Generator().manual_seed(k)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_a_restored_optimizer_continues_bit_for_bit(base, stepped, tmp_path):
    unet, _, optimizer = stepped
    folder = checkpoint.save(tmp_path, 2, unet, optimizer, {"note": "hello"})
    assert checkpoint.read_state(folder) == {"note": "hello", "step": 2}
    _, expected, _ = _stepped(base, 3)
    unet, parameters, optimizer = _stepped(base, 0)
    checkpoint.restore(folder, unet, optimizer)
    _step(parameters, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))


def test_the_newest_three_and_the_best_stay(stepped, tmp_path):
    unet, _, optimizer = stepped
    for step in (2, 8, 10, 90, 100):
        checkpoint.save(tmp_path, step, unet, optimizer, {})
        checkpoint.rotate(tmp_path, step, best=2)
    names = [f"checkpoint-{n}" for n in (2, 10, 90, 100)]
    assert [path.name for path in checkpoint.find(tmp_path)] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    checkpoint.rotate(tmp_path, 100, best=None, empty_first=True)
    assert [path.name for path in checkpoint.find(tmp_path)] == names[1:]
    assert checkpoint.newest([tmp_path]) == tmp_path / "checkpoint-100"


def test_damaged_checkpoints_never_displace_the_newest_usable_one(stepped, tmp_path):
    unet, _, optimizer = stepped
    for step in (60, 90, 100, 110):
        checkpoint.save(tmp_path, step, unet, optimizer, {})
    for step in (90, 100, 110):
        (tmp_path / f"checkpoint-{step}" / "state.json").write_text("{")
    checkpoint.save(tmp_path, 70, unet, optimizer, {})  # resumed at 60
    checkpoint.rotate(tmp_path, 70, keep=1)
    assert [checkpoint.step_of(path) for path in checkpoint.find(tmp_path)] == [70, 90, 100, 110]
    assert checkpoint.newest([tmp_path]).name == "checkpoint-70"
    checkpoint.save(tmp_path, 90, unet, optimizer, {})  # reached again: overwritten
    assert checkpoint.newest([tmp_path]).name == "checkpoint-90"


def test_rotation_passes_over_what_another_run_has_just_removed(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    whole = checkpoint.Path.rename

    def removed_first(path, target):
        if path.name == "checkpoint-1":
            path.rmdir()
        whole(path, target)

    monkeypatch.setattr(checkpoint.Path, "rename", removed_first)
    checkpoint.rotate(tmp_path, 3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.fixture
def two(stepped, tmp_path):
    """A folder with checkpoint-30 and checkpoint-60, both undamaged."""
    for step in (30, 60):
        checkpoint.save(tmp_path, step, stepped[0], stepped[2], {"record": {"losses": [0.5] * step}})
    return tmp_path


def spots(folder, count):
    """`count` pairs (file, offset) in a checkpoint, with every file among them."""
    rng = np.random.default_rng(0)
    files = [folder / name for name in (*checkpoint.FILES, checkpoint.SUMS)]
    for k in range(count):
        file = files[k % len(files)]
        yield file, int(rng.integers(file.stat().st_size))


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(two, how, capsys):
    notes = Notes()
    for file, at in list(spots(two / "checkpoint-60", 50)):
        whole = file.read_bytes()
        bit = bytes([whole[at] ^ (1 << at % 8)])
        file.write_bytes(whole[:at] if how == "cut" else whole[:at] + bit + whole[at + 1 :])
        assert checkpoint.newest([two], notes) == two / "checkpoint-30", (file.name, at)
        assert notes.lines.pop().startswith(f"{two / 'checkpoint-60'} is skipped: ")
        file.write_bytes(whole)
    assert checkpoint.newest([two], notes) == two / "checkpoint-60" and not notes.lines


class Notes:
    """A display that records its notes."""

    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


def test_a_missing_file_is_named(two):
    notes = Notes()
    for name in (*checkpoint.FILES, checkpoint.SUMS):
        moved = (two / "checkpoint-60" / name).rename(two / name)
        assert checkpoint.newest([two], notes) == two / "checkpoint-30"
        assert f"{name} is missing" in notes.lines[-1]
        moved.rename(two / "checkpoint-60" / name)


def test_other_files_and_folders_are_ignored(two):
    (two / "checkpoint-90").mkdir()
    (two / ".writing-120").mkdir()
    (two / ".writing-120" / "state.json").write_text("{}")
    (two / "checkpoint-old").mkdir()
    (two / "checkpoint-99").write_text("a file")
    assert checkpoint.newest([two]) == two / "checkpoint-60"
    assert checkpoint.newest([two / "nowhere"]) is None
    renamed = (two / "checkpoint-60").rename(two / "checkpoint-66")
    assert "its state is that of step 60" in checkpoint.problem(renamed)
    assert checkpoint.newest([two]) == two / "checkpoint-30"


def test_the_checksums_are_those_of_sha256sum(two):
    lines = (two / "checkpoint-60" / checkpoint.SUMS).read_text().splitlines()
    assert [line.split("  ")[1] for line in lines] == list(checkpoint.FILES)
    content = (two / "checkpoint-60" / "state.json").read_bytes()
    assert lines[-1].split()[0] == hashlib.sha256(content).hexdigest()


def test_a_kill_while_writing_leaves_the_older_checkpoint_undamaged(stepped, tmp_path, monkeypatch):
    unet, _, optimizer = stepped
    whole = checkpoint.save(tmp_path, 4, unet, optimizer, {})

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", kill)  # after the adapter, before the optimizer
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 6, unet, optimizer, {})
    monkeypatch.undo()
    assert (tmp_path / ".writing-6" / lora.FILE).is_file()
    assert checkpoint.newest([tmp_path]) == whole
    again = checkpoint.save(tmp_path, 6, unet, optimizer, {})
    assert checkpoint.find(tmp_path) == [whole, again] and not (tmp_path / ".writing-6").exists()


def test_a_full_disk_leaves_nothing_half_written(stepped, tmp_path, monkeypatch):
    unet, _, optimizer = stepped
    whole = checkpoint.save(tmp_path, 4, unet, optimizer, {})

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.save(tmp_path, 6, unet, optimizer, {})
    assert [path.name for path in tmp_path.iterdir()] == [whole.name]


def test_a_copy_counts_only_after_it_reads_back_equal(two, tmp_path_factory, monkeypatch):
    mirror = tmp_path_factory.mktemp("mirror")
    copied = checkpoint.fetch(two / "checkpoint-60", mirror)
    assert checkpoint.problem(copied) is None and checkpoint.newest([two / "lost", mirror]) == copied
    assert checkpoint.newest([two, mirror]) == two / "checkpoint-60"  # of equal steps, the first folder's
    real = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: real(path) + ("?" if "writing" in path.name else ""))
    with pytest.raises(OSError, match="does not read back as it was written"):
        checkpoint.fetch(two / "checkpoint-30", mirror)
    assert checkpoint.find(mirror) == [copied] and [path.name for path in mirror.iterdir()] == [copied.name]


def test_too_small_a_disk_is_reported_before_training(stepped, tmp_path, monkeypatch):
    small = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: small)
    sentence = r"has 0.00 GB free, and the run's checkpoints need 0.\d+ GB: make room"
    with pytest.raises(OSError, match=sentence) as caught:
        checkpoint.check_disk(tmp_path, stepped[1])
    assert str(tmp_path) in str(caught.value)
    monkeypatch.undo()
    checkpoint.check_disk(tmp_path, stepped[1])


def test_an_optimizers_plain_numbers_survive_too(tmp_path, stepped):
    def scales():
        return {"absmax1": torch.zeros(1), "absmax2": torch.zeros(1)}

    def moments(shape):
        return {f"state{k}": torch.ones(shape, dtype=torch.uint8) for k in (1, 2)}

    values = {"qmap1": torch.arange(256.0), "qmap2": torch.zeros(256)}

    class Odd:
        def __init__(self, state):
            self.state, self.param_groups = state, [{"params": [torch.zeros(2), torch.zeros(3)]}]

        def state_dict(self):
            return {"state": self.state, "param_groups": []}

        def load_state_dict(self, state):
            self.state = state["state"]

    unet = stepped[0]
    state = {0: {"step": 7, "q": moments(2) | scales() | values}, 1: {"step": 8, "rate": 0.5, **moments(3), **scales(),
                                                                      **values}}  # nested, as in bitsandbytes, or not
    folder = checkpoint.save(tmp_path, 1, unet, Odd(state), {})
    odd = Odd({5: {"rate": 0.1}})
    checkpoint.restore(folder, unet, odd)
    assert odd.state.keys() == {0, 1}  # its old state is gone
    assert odd.state[0]["step"] == 7 and odd.state[0]["state1"].tolist() == [1, 1] and odd.state[1]["rate"] == 0.5
    assert odd.state[0]["state2"].dtype == torch.uint8  # as bitsandbytes reads it: not nested
    assert odd.state[0]["qmap1"].tolist() == list(range(256))


def test_a_checkpoint_is_flushed_before_it_is_renamed(stepped, tmp_path, monkeypatch):
    flushed, final = [], tmp_path / "checkpoint-4"
    monkeypatch.setattr(files, "flush", lambda path: flushed.append((path.name, final.exists())))
    checkpoint.save(tmp_path, 4, stepped[0], stepped[2], {})
    assert flushed == [(name, False) for name in (*checkpoint.FILES, checkpoint.SUMS)] + [(tmp_path.name, True)]


def test_overwriting_removes_the_old_checkpoint_last(two, stepped, monkeypatch):
    again, old = two / "checkpoint-60", two / ".old-checkpoint-60"

    def killed(path):
        if path == two:
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "flush", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(two, 60, stepped[0], stepped[2], {"again": True})
    assert checkpoint.read_state(again)["again"] and "again" not in checkpoint.read_state(old)
    monkeypatch.undo()
    checkpoint.save(two, 60, stepped[0], stepped[2], {})
    assert sorted(path.name for path in two.iterdir()) == ["checkpoint-30", "checkpoint-60"]


def test_removed_files_are_emptied_first_where_there_is_a_trash(two, monkeypatch):
    sizes, real = [], shutil.rmtree

    def rmtree(path, **options):
        sizes.extend(file.stat().st_size for file in path.glob("*"))
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    checkpoint.rotate(two, 60, keep=1, empty_first=True)
    assert sizes == [0] * 4 and [path.name for path in two.iterdir()] == ["checkpoint-60"]


def test_existing_checkpoints_need_no_more_room(stepped, tmp_path, monkeypatch):
    each = 3 * 4 * sum(p.numel() for p in stepped[1])  # bytes: fp32 LoRA and Adam's two moments
    room = shutil.disk_usage(tmp_path)._replace(free=3 * each)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    with pytest.raises(OSError, match="make room"):
        checkpoint.check_disk(tmp_path, stepped[1])
    for step in range(checkpoint.KEEP + 1):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoint.check_disk(tmp_path, stepped[1])


@pytest.fixture
def treasure(tmp_path_factory):
    """A folder of somebody else."""
    folder = tmp_path_factory.mktemp("somebody's")
    (folder / "work.txt").write_text("years of work")
    return folder


def test_links_are_passed_over_and_never_emptied(two, treasure):
    (two / "checkpoint-1").symlink_to(treasure)
    (two / "checkpoint-99").symlink_to(two / "checkpoint-60")
    (two / "checkpoint-30" / "shortcut").symlink_to(treasure / "work.txt")
    (two / "checkpoint-30" / "folder").mkdir()
    assert [path.name for path in checkpoint.find(two)] == ["checkpoint-30", "checkpoint-60"]
    assert checkpoint.newest([two]) == two / "checkpoint-60"
    checkpoint.rotate(two, 60, keep=1, empty_first=True)
    assert sorted(path.name for path in two.iterdir()) == ["checkpoint-1", "checkpoint-60", "checkpoint-99"]
    assert [path.read_text() for path in treasure.iterdir()] == ["years of work"]


@pytest.mark.parametrize("name", ["checkpoint-7", ".writing-7", ".old-checkpoint-7"])
@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_a_file_or_link_in_a_checkpoints_place_stops_nothing(two, treasure, name, kind):
    for step in (1, 2):  # the second time with what the first may have left
        if kind == "file":
            (two / name).write_text("a file")
        else:
            (two / name).symlink_to(treasure if kind == "link" else two / "nowhere")
        source = two / ("checkpoint-30" if step == 1 else "checkpoint-60")
        with checkpoint._written(two / "checkpoint-7") as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
        assert (two / "checkpoint-7" / checkpoint.SUMS).read_bytes() == (source / checkpoint.SUMS).read_bytes()
        assert not (two / "checkpoint-7").is_symlink()
        assert not list(two.glob(".*"))
        shutil.rmtree(two / "checkpoint-7")
    (two / ".old-checkpoint-5").symlink_to(treasure)
    checkpoint.remove_leftovers(two)
    assert sorted(path.name for path in two.iterdir()) == ["checkpoint-30", "checkpoint-60"]
    assert (treasure / "work.txt").read_text() == "years of work"


@pytest.mark.parametrize("state", ["null", "[]", "{}", '"text"', "[" * 20_000])
def test_a_state_that_is_no_state_is_skipped(two, state):
    (two / "checkpoint-60" / "state.json").write_text(state)
    (two / "checkpoint-60" / checkpoint.SUMS).write_text(checkpoint._sums(two / "checkpoint-60"))
    (two / "checkpoint-²").mkdir()
    notes = Notes()
    assert checkpoint.newest([two], notes) == two / "checkpoint-30"
    assert notes.lines[0].startswith(f"{two / 'checkpoint-60'} is skipped: it can't be read (")
