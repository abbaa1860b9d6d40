"""A run's folder and mirror: what may change when it resumes, failing mirrors, full disks."""

import json
import shutil

import pytest
import torch
from helpers import Stop, Watcher, same_adapter, stop_after
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from naruto_lora import checkpoint, files, lora, train
from naruto_lora.measure import validation
from naruto_lora.recipe import Leg


@pytest.mark.parametrize("field, value", [("rank", 8), ("alpha", 4.0), ("seed", 1), ("flip", True)])
def test_a_changed_field_is_refused_by_its_name_and_both_values(plan, trained, cache_folder, field, value):
    with pytest.raises(ValueError) as caught:
        train.begin(plan.replace(**{field: value}), trained.folder, cache_folder)
    old = getattr(plan, field)
    assert f"was begun with {field} {old!r}, not {value!r}" in str(caught.value)


def test_fields_without_effect_on_training_may_change(plan, trained, cache_folder):
    free = dict(name="other", save_every=5, save_minutes=1, measure_every=3, previews=0, max_minutes=9, expect="much")
    more = (*plan.legs, Leg(8, 5e-3))
    assert train.begin(plan.replace(**free, legs=more), trained.folder, cache_folder).step == 6
    same = plan.replace(batch=2, accumulation=3)  # the same pictures per step, in other micro-batches
    assert train.begin(same, trained.folder, cache_folder).step == 6
    with pytest.raises(ValueError, match=r"was begun with batch \* accumulation 6, not 12"):
        train.begin(plan.replace(batch=6), trained.folder, cache_folder)


def test_trained_legs_are_fixed_and_later_ones_are_not(plan, trained, cache_folder, tmp_path):
    with pytest.raises(ValueError, match=r"legs whose learning rate in step 1 is 0.02, not 0.01: use the old value"):
        train.begin(plan.replace(legs=(Leg(4, 1e-2), plan.legs[1])), trained.folder, cache_folder)
    with pytest.raises(ValueError, match=r"legs whose learning rate in step 6 is 0.005, not 0.00853553391"):
        train.begin(plan.replace(legs=(plan.legs[0], Leg(8, 1e-2, "cosine"))), trained.folder, cache_folder)
    with pytest.raises(ValueError, match="is at step 6, past the 4"):
        train.begin(plan.replace(legs=plan.legs[:1]), trained.folder, cache_folder)
    with pytest.raises(Stop):
        train.train(plan, tmp_path, cache_folder, stop_after(5))  # at step 4: the second leg has not begun
    assert train.begin(plan.replace(legs=(plan.legs[0], Leg(9, 1e-3))), tmp_path, cache_folder).step == 4


def test_changed_data_is_refused(plan, trained, cache_folder, tmp_path):
    shutil.copytree(plan.dataset, tmp_path / "data")
    same = plan.replace(dataset=str(tmp_path / "data"))
    assert train.begin(same, trained.folder, cache_folder).step == 6  # moved, but the same pictures
    lines = (tmp_path / "data" / "metadata.jsonl").read_text().splitlines()
    row = json.loads(lines[-1])
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join([*lines[:-1], json.dumps(row | {"text": "other"})]))
    with pytest.raises(ValueError, match="was begun with dataset") as caught:
        train.begin(same, trained.folder, cache_folder)
    for named in (plan.dataset, same.dataset, "training pictures"):
        assert named in str(caught.value)


def test_a_changed_holdout_and_an_earlier_version_are_refused(plan, trained, examples, cache_folder, tmp_path):
    moved = plan.replace(dataset=str(shutil.copytree(plan.dataset, tmp_path / "data")))
    listing = tmp_path / "data" / "metadata.jsonl"
    listing.write_text(listing.read_text().replace(examples[1][0].caption, "other words"))
    with pytest.raises(ValueError, match="was begun with holdout '0.15 "):
        train.begin(moved, trained.folder, cache_folder)
    state = checkpoint.read_state(checkpoint.newest([trained.folder]))
    held = checkpoint.sources_of(plan, *examples)
    checkpoint.refuse_changes(plan, held, state, tmp_path)
    del state["recipe"]["flip"]  # a field that is newer than the checkpoint has its default
    checkpoint.refuse_changes(plan, held, state, tmp_path)
    with pytest.raises(ValueError, match="was begun with flip False, not True"):
        checkpoint.refuse_changes(plan.replace(flip=True), held, state, tmp_path)
    del state["sources"]
    with pytest.raises(ValueError, match="begun by an earlier version"):
        checkpoint.refuse_changes(plan, held, state, tmp_path)


@pytest.mark.parametrize("where, field", [("sources", "text_encoder_3"), ("recipe", "curriculum")])
def test_a_newer_versions_run_is_refused_by_what_is_new(plan, trained, examples, tmp_path, where, field):
    state, sources = checkpoint.read_state(checkpoint.newest([trained.folder])), checkpoint.sources_of(plan, *examples)
    state[where][field] = "new"
    said = f"'{tmp_path}' was begun by a newer version of naruto_lora, with {field}: update naruto_lora, or use another"
    with pytest.raises(ValueError, match=said):
        checkpoint.refuse_changes(plan, sources, state, tmp_path)


def test_another_base_is_refused(plan, trained, cache_folder, tmp_path):
    other = plan.replace(base=str(tmp_path / "base"))
    shutil.copytree(plan.base, other.base)
    assert train.begin(other, trained.folder, cache_folder).step == 6  # moved, but the same
    file = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="was begun with base"):
        train.begin(other, trained.folder, cache_folder)


def previews(step):
    return [f"previews/step-{step:06d}-{n}.jpg" for n in (0, 1)]


def test_the_mirror_is_enough_to_resume(previewed, trained, cache_folder, tmp_path):
    out, mirror = tmp_path / "local" / "run", tmp_path / "drive" / "run"
    mirror.parent.mkdir()
    with pytest.raises(Stop):
        train.train(previewed, out, cache_folder, stop_after(5), mirror)
    shutil.rmtree(out.parent)  # the machine is gone
    watcher = Watcher()
    record = train.train(previewed, out, cache_folder, watcher, mirror)
    assert watcher.steps == [5, 6] and watcher.notes[0].startswith(f"resumes from {mirror / 'checkpoint-4'}, at step 4")
    assert same_adapter(out, trained.folder) and record["losses"] == trained.record["losses"]
    for name in (lora.FILE, f"{out.name}.safetensors", "run.json", *previews(0), *previews(6)):
        assert (mirror / name).read_bytes() == (out / name).read_bytes(), name
    assert checkpoint.newest([mirror]).name == "checkpoint-6"


def test_a_mirror_that_is_added_later_gets_the_best_checkpoint_too(plan, cache_folder, tmp_path, monkeypatch):
    means = iter((1.0, 0.5, 0.7, 0.8, 0.9, 0.6))
    monkeypatch.setattr(validation, "holdout_losses", lambda *_, **__: torch.full((3, 4), next(means)))
    long = plan.replace(legs=(Leg(5, 1e-3),), measure_every=1, save_every=1, previews=0)
    train.train(long, tmp_path / "run", cache_folder)
    train.train(long, tmp_path / "run", cache_folder, mirror=tmp_path / "mirror")
    assert [path.name for path in checkpoint.find(tmp_path / "mirror")] == ["checkpoint-1", "checkpoint-5"]
    assert all(checkpoint.problem(path) is None for path in checkpoint.find(tmp_path / "mirror"))


def test_if_the_mirror_cant_be_read_the_run_resumes_from_its_folder(plan, cache_folder, tmp_path, monkeypatch):
    out, mirror = tmp_path / "run", tmp_path / "mirror"
    with pytest.raises(Stop):
        train.train(plan, out, cache_folder, stop_after(5), mirror)
    shutil.rmtree(out / "checkpoint-4")
    monkeypatch.setattr(checkpoint, "fetch", lambda *_: (_ for _ in ()).throw(OSError(107, "not connected")))
    watcher = Watcher()
    assert train.begin(plan, out, cache_folder, watcher, mirror).step == 2
    assert f"{mirror / 'checkpoint-4'} can't be copied (not connected)" in watcher.notes


def test_if_the_lora_cant_be_written_the_error_says_where_the_weights_are(plan, cache_folder, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    run = train.begin(plan.replace(legs=(Leg(1, 1e-3),), previews=0), tmp_path, cache_folder)
    run.to_the_end()
    monkeypatch.setattr(lora, "save_kohya", full)
    with pytest.raises(OSError, match="No space left on device.*: make room; its weights are saved in") as caught:
        run.finish()
    assert str(tmp_path / "checkpoint-1") in str(caught.value) and not (tmp_path / lora.FILE).exists()


def test_the_newer_checkpoint_of_folder_and_mirror_is_used(plan, trained, cache_folder, tmp_path):
    out, mirror = tmp_path / "run", tmp_path / "mirror"
    with pytest.raises(Stop):
        train.train(plan, out, cache_folder, stop_after(5), mirror)
    shutil.rmtree(mirror / "checkpoint-4")
    assert train.begin(plan, out, cache_folder, mirror=mirror).step == 4
    shutil.rmtree(mirror / "checkpoint-4")  # it was copied there again
    (out / "checkpoint-4" / "state.json").write_text("{}")
    watcher = Watcher()
    run = train.begin(plan, out, cache_folder, watcher, mirror)
    assert run.step == 2 and watcher.notes == [
        f"{out / 'checkpoint-4'} is skipped: state.json damaged",
        f"resumes from {out / 'checkpoint-2'}, at step 2 of 6",
    ]
    run.to_the_end()
    run.finish()
    assert same_adapter(out, trained.folder) and checkpoint.newest([mirror]).name == "checkpoint-6"


def test_a_missing_or_full_mirror_is_reported_once_and_the_run_continues(
    plan, trained, cache_folder, tmp_path, monkeypatch
):
    watcher, nowhere = Watcher(), tmp_path / "not" / "mounted"
    train.train(plan, tmp_path / "one", cache_folder, watcher, nowhere)
    assert same_adapter(tmp_path / "one", trained.folder) and not nowhere.parent.exists()
    notes = [text for text in watcher.notes if str(nowhere) in text]
    assert "can't be used (No such file or directory)" in notes[0] and len(notes) == 2
    assert "the run continues" in notes[1]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "copy_whole", full)
    watcher, mirror = Watcher(), tmp_path / "mirror"
    train.train(plan, tmp_path / "two", cache_folder, watcher, mirror)
    assert same_adapter(tmp_path / "two", trained.folder) and not checkpoint.find(mirror)
    assert [t for t in watcher.notes if "no copy" in t] == [
        f"no copy of the cache is kept in '{mirror.parent / 'cache'}' (No space left on device); the run continues",
        f"no copy in the mirror '{mirror}' (No space left on device); the run continues",
    ]


def test_a_mirror_that_cant_be_written_is_named_with_the_disks_own_reason(tmp_path):
    (tmp_path / "mirror").write_text("in the way")
    watcher = Watcher()
    checkpoint.RunFolder(tmp_path / "run", tmp_path / "mirror", watcher)
    (tmp_path / "drive" / ".writable").mkdir(parents=True)  # so that nothing can be written there, also by root
    checkpoint.RunFolder(tmp_path / "other", tmp_path / "drive", watcher)
    assert watcher.notes == [
        f"the mirror '{tmp_path / 'mirror'}' can't be used (File exists); each checkpoint tries it again",
        f"the mirror '{tmp_path / 'drive'}' can't be used (Is a directory); each checkpoint tries it again",
    ]


def test_a_full_disk_stops_the_run_and_keeps_the_newest_checkpoint(
    plan, trained, cache_folder, tmp_path, monkeypatch
):
    real = checkpoint.save

    def full(folder, k, *rest):
        if k > 4:
            raise OSError("No space left on device")
        return real(folder, k, *rest)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match=r"checkpoint-6 can't be written to '.*' \(No space left on device\)") as caught:
        train.train(plan, tmp_path, cache_folder)
    assert ": make room and run it again to continue from step 4" in str(caught.value)
    assert [checkpoint.step_of(path) for path in checkpoint.find(tmp_path)] == [4]  # the older was removed
    monkeypatch.undo()
    train.train(plan, tmp_path, cache_folder)
    assert same_adapter(tmp_path, trained.folder)


def test_a_full_disk_spares_the_newest_usable_checkpoint(plan, cache_folder, tmp_path, monkeypatch):
    with pytest.raises(Stop):
        train.train(plan, tmp_path, cache_folder, stop_after(3))
    (tmp_path / "checkpoint-3").mkdir()  # damaged, skipped, and the run is past it again

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match="run it again to continue from step 2"):
        train.train(plan, tmp_path, cache_folder)
    assert checkpoint.newest([tmp_path]) == tmp_path / "checkpoint-2"


def test_a_mirror_of_another_run_is_refused_even_if_it_is_older(plan, cache_folder, tmp_path):
    out, mirror = tmp_path / "run", tmp_path / "mirror"
    train.train(plan.replace(legs=(Leg(2, 2e-2),), seed=7), mirror, cache_folder)
    with pytest.raises(Stop):
        train.train(plan, out, cache_folder, stop_after(5))
    with pytest.raises(ValueError, match="was begun with seed 7, not 0") as caught:
        train.begin(plan, out, cache_folder, mirror=mirror)
    assert str(mirror) in str(caught.value)


def test_files_of_a_killed_finish_are_not_used(plan, cache_folder, tmp_path):
    run = train.begin(plan, tmp_path, cache_folder)
    (tmp_path / "first.safetensors").write_bytes(b"whole")
    (tmp_path / ".writing-adapter").mkdir()
    (tmp_path / ".writing-adapter" / "first.safetensors").write_bytes(b"cut sh")  # of an earlier recipe name
    run.finish()
    assert (tmp_path / "first.safetensors").read_bytes() == b"whole" and not (tmp_path / ".writing-adapter").exists()


def written(folder, step, best=None):
    """A checkpoint of 3,000 bytes and more, made by hand."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    weight = torch.full((10, 35), float(step))
    save_file({"weight": weight}, path / checkpoint.FILES[0])
    moments = {f"0.{name}.tensor": weight.clone() for name in ("exp_avg", "exp_avg_sq")}
    save_file(moments | {"0.step.tensor": torch.tensor(float(step))}, path / checkpoint.FILES[1])
    (path / "state.json").write_text(json.dumps({"step": step, "record": {"best_step": best, "holdout": {}}}))
    (path / checkpoint.SUMS).write_text(checkpoint._sums(path))
    return path


def names(folder):
    return [path.name for path in checkpoint.find(folder)]


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def folder(tmp_path):
    """A run's folder and mirror, with a display that records."""
    return checkpoint.RunFolder(tmp_path / "run", tmp_path / "mirror", Watcher())


@pytest.mark.parametrize("room, best, kept", [
    (2.6, None, ["checkpoint-14", "checkpoint-16"]),
    (3.6, 2, ["checkpoint-2", "checkpoint-14", "checkpoint-16"]),
    (9, 2, ["checkpoint-2", "checkpoint-12", "checkpoint-14", "checkpoint-16"]),
])
def test_a_full_mirror_makes_room_for_the_newest(folder, monkeypatch, room, best, kept):
    real, each = files.copy_whole, size(written(folder.out, 1))
    shutil.rmtree(folder.out / "checkpoint-1")

    def limited(source, target):
        if size(folder.mirror) + source.stat().st_size > room * each:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(files, "copy_whole", limited)
    for step in range(2, 17, 2):
        folder.mirror_checkpoint(written(folder.out, step, best), best)
    assert names(folder.mirror) == kept and folder.show.show.notes == []
    assert all(checkpoint.problem(path) is None for path in checkpoint.find(folder.mirror))


def test_a_mirror_without_room_keeps_its_newest_whole_checkpoint_and_says_it_once(folder, monkeypatch):
    for step in (2, 4):
        folder.mirror_checkpoint(written(folder.out, step), None)
    (written(folder.mirror, 5) / "state.json").write_text("{")  # half written by a kill

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "copy_whole", full)
    for step in (6, 8):
        folder.mirror_checkpoint(written(folder.out, step), None)
    assert checkpoint.newest([folder.mirror], Watcher()) == folder.mirror / "checkpoint-4"
    assert folder.show.show.notes == [
        f"no copy in the mirror '{folder.mirror}' (No space left on device); the run continues; step 4 is safe there"
    ]


def test_a_checkpoint_that_was_written_again_is_copied_again(folder):
    path = written(folder.out, 4)
    folder.mirror_checkpoint(path, None)
    shutil.rmtree(path)
    folder.mirror_checkpoint(written(folder.out, 4, best=4), 4)
    assert checkpoint.read_state(folder.mirror / "checkpoint-4")["record"]["best_step"] == 4


def test_best_checkpoint_and_previews_are_fetched_whenever_they_are_missing(folder):
    """A kill came after the newest checkpoint was fetched."""
    for step in (2, 6, 8):
        written(folder.mirror, step, best=2)
    previews = folder.mirror / "previews"
    previews.mkdir()
    for step in (0, 2):
        (previews / f"step-{step:06d}-0.jpg").write_bytes(b"mirror")
    (folder.out / "previews").mkdir()
    (folder.out / "previews" / "step-000002-0.jpg").write_bytes(b"here")
    checkpoint.fetch(folder.mirror / "checkpoint-8", folder.out)
    assert folder.local(folder.out / "checkpoint-8") == folder.out / "checkpoint-8"
    assert names(folder.out) == ["checkpoint-2", "checkpoint-8"]
    assert checkpoint.problem(folder.out / "checkpoint-2") is None
    assert [path.read_bytes() for path in sorted((folder.out / "previews").iterdir())] == [b"mirror", b"here"]


def test_links_in_a_folder_or_mirror_are_neither_copied_nor_emptied(folder, tmp_path):
    precious = written(tmp_path / "somebody's", 1)
    before = size(precious)
    for place in (folder.out, folder.mirror):
        (place / "checkpoint-1").symlink_to(precious)
    for step in range(2, 12, 2):
        folder.mirror_checkpoint(written(folder.out, step, best=1), 1)
    assert names(folder.mirror) == ["checkpoint-6", "checkpoint-8", "checkpoint-10"]
    assert size(precious) == before and (folder.mirror / "checkpoint-1").is_symlink()
    assert folder.show.show.notes == []
