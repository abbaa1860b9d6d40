"""Shards on disk: whole or made again, here and in the mirror, whatever happens to them."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from naruto_lora import files
from naruto_lora.disk import shards
from naruto_lora.disk.shards import Mirror, Shards

ROOT = Path(__file__).parents[2]
KEYS = [shards.key_of("test", bytes([n])) for n in range(6)]
SHAPES = {"mean": (2, 3), "time_ids": (4,)}


def fits(entry):
    return {name: tuple(value.shape) for name, value in entry.items()} == SHAPES


def entry(number):
    generator = torch.Generator().manual_seed(number)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


class Show:
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def show():
    return Show()


@pytest.fixture
def store(tmp_path, show):
    return Shards(tmp_path / "cache" / "latents", fits, None, show)


def mirrored(tmp_path, show):
    """A store with a mirror in `drive`."""
    return Shards(tmp_path / "cache" / "latents", fits, Mirror(tmp_path / "drive", show), show)


def fill(store, sizes=(4, 2)):
    """Writes KEYS in shards of `sizes` entries; returns their paths in this order."""
    store.find(KEYS)
    paths, start = [], 0
    for size in sizes:
        before = set(store.folder.iterdir())
        store.write({key: entry(KEYS.index(key)) for key in KEYS[start : start + size]}, 0)
        paths += set(store.folder.iterdir()) - before
        start += size
    return paths


def right(found):
    """The keys in what `find` returned, each with the values that were written."""
    for key, shard in found.items():
        for name, value in entry(KEYS.index(key)).items():
            assert torch.equal(shard.get_tensor(f"{key}.{name}"), value)
    return set(found)


def without_checksum(path, change=lambda tensors: None, metadata=None):
    """Writes a shard anew as an earlier version did, after `change`."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def spoil(path, how):
    """Spoils a shard of KEYS[:4] in one of the ways of WAYS."""
    name, content = f"{KEYS[1]}.mean", path.read_bytes()
    changed = {
        "a tensor lacks": lambda tensors: tensors.pop(f"{KEYS[1]}.time_ids"),
        "another shape": lambda tensors: tensors.update({name: tensors[name][:, :2].clone()}),
        "an entry more": lambda tensors: tensors.update({"other.mean": tensors[name].clone()}),
        "not finite": lambda tensors: tensors[name].fill_(float("nan")),
        "infinite": lambda tensors: tensors[name][1, 2].fill_(float("-inf")),
    }
    if how in changed:
        without_checksum(path, changed[how])
    elif how == "changed with its checksum":
        with safe_open(path, "pt") as shard:
            metadata = shard.metadata()
        without_checksum(path, lambda tensors: tensors[name].mul_(1.01), metadata)
    elif how == "another's metadata":
        without_checksum(path, metadata={"format": "pt"})
    elif how == "a bit":
        flip(path, len(content) - 7)
    elif how == "cut":
        path.write_bytes(content[:-1])
    elif how == "cut in the header":
        path.write_bytes(content[:40])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes({
            "no header": b"\xff" * 100, "a list": b"\x02" + bytes(7) + b"[]", "a number": b"\x01" + bytes(7) + b"5",
            "nested": (10**5).to_bytes(8, "little") + b"[" * 10**5, "no letters": b"\x02" + bytes(7) + b"\xff\xfe",
            "a dtype of others": content.replace(b'"dtype":"F32","shape":[2,3]', b'"dtype":"F4","shape":[2,24]'),
            "a header of a TB": (10**12).to_bytes(8, "little") + content[8:],
        }[how])  # fmt: skip


WAYS = (
    "a bit", "cut", "cut in the header", "empty", "a tensor lacks", "another shape", "an entry more", "not finite",
    "infinite", "changed with its checksum", "another's metadata", "no header", "a list", "a number", "nested",
    "no letters", "a header of a TB", "a dtype of others",
)  # fmt: skip
REASONS = {
    "a bit": "its checksum is wrong", "changed with its checksum": "its checksum is wrong",
    "another's metadata": "its checksum is wrong", "a tensor lacks": "an entry lacks a tensor, or has another shape",
    "another shape": "an entry lacks a tensor, or has another shape", "not finite": "an entry is not finite",
    "infinite": "an entry is not finite", "no header": "its header can't be read",
    "empty": "its header can't be read",
}  # fmt: skip


def test_what_is_written_is_found_memory_mapped(store, show, tmp_path):
    made = store.find(KEYS)
    assert made == {} and store.folder.is_dir()
    written = store.write({KEYS[0]: entry(0), KEYS[1]: entry(1)}, 0)
    assert right(written) == set(KEYS[:2]) == right(store.find(KEYS)) and right(store.find(KEYS[1:])) == {KEYS[1]}
    (path,) = store.folder.iterdir()
    assert path.stem == shards.key_of("shard", "|".join(sorted(KEYS[:2])).encode())  # as in earlier versions
    with safe_open(path, "pt") as shard:
        assert shard.metadata() == {"sha256": shards.checksum(load_file(path))} and len(list(shard.keys())) == 4
    one, two = (written[KEYS[0]].get_tensor(f"{KEYS[0]}.mean") for _ in range(2))
    assert one.data_ptr() == two.data_ptr() and not show.notes


def test_a_checksum_sees_names_dtypes_shapes_and_values():
    tensors = {"a": torch.arange(6.0), "b": torch.tensor(1.0, dtype=torch.bfloat16)}
    others = [
        tensors | {"a": torch.arange(6.0) + 1e-7}, tensors | {"a": torch.arange(6.0).view(2, 3)}, {"b": tensors["b"]},
        tensors | {"a": torch.arange(6.0).view(torch.int32)}, {"c": tensors["a"], "b": tensors["b"]},
        {"a": tensors["a"], "b": torch.tensor(-1.0, dtype=torch.bfloat16)},
    ]  # fmt: skip
    assert shards.checksum(tensors) == shards.checksum(dict(reversed(tensors.items())))
    assert len({shards.checksum(t) for t in [tensors, *others]}) == 7
    assert len(shards.checksum(tensors)) == 64


def test_a_shard_is_full_by_bytes_or_entries(monkeypatch):
    assert (shards.FULL_BYTES, shards.FULL_ENTRIES) == (2**24, 64)  # 16 MiB, and 64 pictures at 1024 px in fp16
    monkeypatch.setattr(shards, "FULL_BYTES", 80)
    assert not shards.is_full({"a": entry(0)}) and shards.is_full({"a": entry(0), "b": entry(1)})  # 40 bytes each
    monkeypatch.setattr(shards, "FULL_BYTES", 81)
    assert not shards.is_full({"a": entry(0), "b": entry(1)})
    monkeypatch.setattr(shards, "FULL_ENTRIES", 2)
    assert not shards.is_full({"a": entry(0)}) and shards.is_full({"a": entry(0), "b": entry(1)})


@pytest.mark.parametrize("how", WAYS)
def test_a_spoilt_shard_is_named_and_removed(store, show, how):
    spoilt, whole = fill(store)
    spoil(spoilt, how)
    assert right(store.find(KEYS)) == set(KEYS[4:])
    assert [path for path in (spoilt, whole) if path.exists()] == [whole]
    (said,) = show.notes
    reason = REASONS.get(how, "")
    assert said.startswith(f"'{spoilt}' in the cache is broken ({reason}") and "\n" not in said
    assert said.endswith("): it is removed and made again")


@pytest.mark.parametrize("how", WAYS)
def test_a_spoilt_shard_is_replaced_by_its_whole_copy(tmp_path, show, how):
    store = mirrored(tmp_path, show)
    paths = fill(store)
    copies = [tmp_path / "drive" / "latents" / path.name for path in paths]
    content = [path.read_bytes() for path in paths]
    for broken, whole in ((paths[0], copies[0]), (copies[0], paths[0])):
        spoil(broken, how)
        assert right(store.find(KEYS)) == set(KEYS)
        assert broken.read_bytes() == whole.read_bytes() == content[0]
        assert len(show.notes) == 1 and f"'{broken}' in the cache is broken" in show.notes.pop()
    assert [path.read_bytes() for path in (*paths, *copies)] == content * 2
    for path in (paths[0], copies[0]):
        spoil(path, how)
    assert right(store.find(KEYS)) == set(KEYS[4:])
    assert [path.exists() for path in (*paths, *copies)] == [False, True] * 2 and len(show.notes) == 2


def test_no_byte_of_a_shard_can_change_unseen(store):
    (path,) = fill(store, (2,))
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in (0, random.Random(place).randint(1, 7)):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            assert right(store.find(KEYS)) in ({KEYS[0], KEYS[1]}, {KEYS[0]}, {KEYS[1]}, set())


def test_shards_of_an_earlier_version_stay(tmp_path, show):
    store = mirrored(tmp_path, show)
    paths = fill(store)
    for path in paths:
        without_checksum(path)
    content = [path.read_bytes() for path in paths]
    assert right(store.find(KEYS)) == set(KEYS) and not show.notes
    assert [path.read_bytes() for path in paths] == content


def test_shards_of_others_are_not_read(store, show):
    mine, other = fill(store)
    flip(other, -3)
    assert right(store.find(KEYS[:4])) == set(KEYS[:4])
    assert other.exists() and not show.notes
    assert right(store.find(KEYS)) == set(KEYS[:4]) and not other.exists()


def test_a_shard_is_checked_once_a_process_and_again_after_a_change(store, monkeypatch):
    path, _ = fill(store)
    counted, whole = [], shards.checksum
    monkeypatch.setattr(shards, "checksum", lambda tensors: counted.append(len(tensors)) or whole(tensors))
    store.find(KEYS[:4])
    store.find(KEYS[:4])
    assert counted == [8, 8]  # as new as this, it could change without getting another time
    os.utime(path, (time.time() - 5,) * 2)
    for _ in range(3):
        store.find(KEYS[:4])
    assert counted == [8, 8, 8]
    flip(path, -1)
    os.utime(path, (time.time() - 4,) * 2)
    assert right(store.find(KEYS)) == set(KEYS[4:])


@pytest.mark.parametrize("kind", ["folder", "full folder twice", "device", "link to nothing"])
def test_what_is_no_file_is_put_aside(store, show, kind):
    path, _ = fill(store)
    path.unlink()
    if kind == "device":
        os.mkfifo(path)
    elif kind == "link to nothing":
        path.symlink_to("nowhere")
    else:
        path.mkdir()
        (path / "mine").write_text("keep")
    if kind == "full folder twice":
        path.with_name(f"{path.name}.aside").mkdir()
        (path.with_name(f"{path.name}.aside") / "older").write_text("keep")
    assert right(store.find(KEYS)) == set(KEYS[4:])
    told = [f"'{path}' in the cache is not a file: it is renamed to '{path.name}.aside'"]
    assert show.notes == (told if kind != "link to nothing" else [])
    assert (path.with_name(f"{path.name}.aside") / "mine").exists() == (kind == "folder")
    if kind != "full folder twice":
        assert right(store.write({key: entry(k) for k, key in enumerate(KEYS[:4])}, 0)) == set(KEYS[:4])
        assert right(store.find(KEYS)) == set(KEYS)


def test_unfinished_files_of_killed_runs_are_removed(tmp_path):
    old, new, other = (tmp_path / name for name in ("a.safetensors.1.writing", "b.safetensors.1.writing", "c.txt"))
    for path in (old, new, other):
        path.write_bytes(b"half")
    now = time.time()
    for path, age in ((old, 3610), (new, 3590), (other, 9999)):
        os.utime(path, (now - age,) * 2)
    shards.remove_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == [new, other]


@pytest.mark.parametrize("when", ["stat", "unlink"])
def test_a_file_that_another_run_finishes_meanwhile_is_passed_over(tmp_path, monkeypatch, when):
    gone, old = tmp_path / "a.safetensors.1.writing", tmp_path / "b.safetensors.1.writing"
    for path in (gone, old):
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    whole = getattr(Path, when)

    moved: list = []

    def renamed_first(self, **options):
        if self == gone and not moved:
            moved.append(shutil.move(gone, tmp_path / "a.safetensors"))
        return whole(self, **options)

    monkeypatch.setattr(Path, when, renamed_first)
    shards.remove_abandoned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("gone", ["before it is read", "before it is mapped", "replaced by half a file"])
def test_a_shard_that_another_run_removes_meanwhile_is_written_again(store, show, monkeypatch, gone):
    path, _ = fill(store)
    with monkeypatch.context() as patch:
        if gone == "before it is read":
            patch.setattr(shards.Path, "is_file", lambda self: self.unlink() or True if self == path else True)
        else:
            whole = shards.safe_open

            def opened(file, kind):
                if file == path:
                    path.unlink() if gone == "before it is mapped" else path.write_bytes(b"half")
                return whole(file, kind)

            patch.setattr(shards, "safe_open", opened)
        assert right(store.find(KEYS)) == set(KEYS[4:]) and not show.notes
    store.write({key: entry(k) for k, key in enumerate(KEYS[:4])}, 0)
    assert right(store.find(KEYS)) == set(KEYS)


def test_a_copy_whose_source_another_run_removes_is_passed_over(tmp_path, show, monkeypatch):
    store = mirrored(tmp_path, show)
    paths, drive, whole = fill(store), tmp_path / "drive" / "latents", files.copy_whole
    for path in drive.iterdir():
        path.unlink()

    def removed_first(source, target):
        source.unlink() if source == sorted(paths)[0] else None
        whole(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "copy_whole", removed_first)
        store.find(KEYS)
    assert [path.name for path in drive.iterdir()] == [sorted(paths)[1].name] and not show.notes
    (drive / sorted(paths)[1].name).unlink()
    drive.rmdir()
    store.write({"new": entry(0)}, 0)
    assert "No such file or directory" in show.notes[0]  # the mirror's own folder is gone


@pytest.mark.parametrize("times", [2, 3])
def test_a_shard_that_another_run_removes_once_written_is_written_again(store, monkeypatch, times):
    store.find(KEYS)
    whole, seen = shards.safe_open, []

    def removed_first(path, kind):
        seen.append(path)
        path.unlink() if len(seen) <= times else None
        return whole(path, kind)

    monkeypatch.setattr(shards, "safe_open", removed_first)
    if times == 2:
        assert right(store.write({KEYS[0]: entry(0)}, 0)) == {KEYS[0]} and len(seen) == 3
    else:
        with pytest.raises(OSError, match=r"can't be written \(No such file or directory.*\): it needs 1 MiB"):
            store.write({KEYS[0]: entry(0)}, 0)


@pytest.mark.parametrize("times", [2, 3])
def test_a_copy_whose_source_is_written_again_meanwhile_is_made_again(tmp_path, show, monkeypatch, times):
    store, whole, seen = mirrored(tmp_path, show), files.copy_whole, []
    store.find(KEYS)

    def interrupted(source, target):
        seen.append(source)
        if len(seen) <= times:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))
        whole(source, target)

    monkeypatch.setattr(files, "copy_whole", interrupted)
    store.write({KEYS[0]: entry(0)}, 0)
    copies = len(list((tmp_path / "drive" / "latents").iterdir()))
    assert (copies, len(show.notes), len(seen)) == ((1, 0, 3) if times == 2 else (0, 1, 3))


@contextlib.contextmanager
def failing(monkeypatch, name, path, number=errno.EIO):
    """Within it, `name` of the module's builtins or of files raises an OSError for paths below `path`."""
    where, whole = (shards, open) if name == "open" else (files, getattr(files, name))

    def fails(file, *rest):
        if Path(path) in (Path(file), *Path(file).parents):
            raise OSError(number, os.strerror(number), str(file))
        return whole(file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, fails, raising=False)
        yield


def test_a_folder_that_cant_be_read_is_named_and_nothing_in_it_is_removed(store, show, monkeypatch):
    paths = fill(store)
    with failing(monkeypatch, "open", store.folder), pytest.raises(OSError) as caught:
        store.find(KEYS)
    assert str(caught.value) == f"the cache folder '{store.folder}' can't be used (Input/output error): choose another"
    assert all(path.exists() for path in paths) and right(store.find(KEYS)) == set(KEYS)


def test_a_mirror_that_cant_be_read_is_told_once_and_left_alone(tmp_path, show, monkeypatch):
    store = mirrored(tmp_path, show)
    paths = fill(store)
    with failing(monkeypatch, "open", tmp_path / "drive"):
        for _ in range(2):
            assert right(store.find(KEYS)) == set(KEYS)
        store.write({"new": entry(0)}, 0)
    drive = tmp_path / "drive"
    assert show.notes == [f"no copy of the cache is kept in '{drive}' (Input/output error); the run continues"]
    assert sorted(path.name for path in (drive / "latents").iterdir()) == sorted(path.name for path in paths)


def test_a_full_disk_says_how_much_is_needed(store, monkeypatch):
    fill(store)
    size = 3 * 2**20  # bytes of an entry
    entries = {key: {"mean": torch.zeros(size // 4), "time_ids": torch.zeros(4)} for key in KEYS[:2]}
    for left, need in ((0, 7), (2, 13), (3, 16)):
        with failing(monkeypatch, "replace", store.folder, errno.ENOSPC), pytest.raises(OSError) as caught:
            store.write(entries, left)
        assert str(caught.value) == (
            f"the cache folder '{store.folder}' can't be written (No space left on device): it needs {need} MiB or "
            "more; make room or choose another folder. Finished entries are kept"
        )


def test_an_error_without_a_number_is_told_in_its_own_words(tmp_path, store, show, monkeypatch):
    def fails(*_):
        raise OSError("odd")

    store = mirrored(tmp_path, show)
    fill(store)
    monkeypatch.setattr(files, "copy_whole", fails)
    store.write({"new": entry(0)}, 0)
    assert "(odd)" in show.notes[0]
    monkeypatch.setattr(files, "replace", fails)
    with pytest.raises(OSError, match=r"can't be written \(odd\)"):
        store.write({"new": entry(0)}, 0)
    monkeypatch.setattr(shards, "remove_abandoned", fails)
    with pytest.raises(OSError, match=r"can't be used \(odd\): choose another"):
        store.find(KEYS)


def test_a_mirror_gets_and_gives_only_shards_with_wanted_entries(tmp_path, show):
    store = mirrored(tmp_path, show)
    first, second = fill(store)
    drive, other = tmp_path / "drive" / "latents", tmp_path / "other" / "latents"
    new = Shards(other, fits, Mirror(tmp_path / "drive", show), show)
    assert right(new.find(KEYS[5:])) == {KEYS[5]}
    assert [path.name for path in other.iterdir()] == [second.name]
    (drive / second.name).unlink()
    assert right(new.find(KEYS)) == set(KEYS)  # the mirror gets the one back that it has lost
    assert {path.name for path in drive.iterdir()} == {path.name for path in other.iterdir()} == {
        first.name, second.name
    }
    Shards(other, fits, Mirror(tmp_path / "third", show), show).find(KEYS[:1])
    assert [path.name for path in (tmp_path / "third" / "latents").iterdir()] == [first.name] and not show.notes


def test_entries_that_are_here_under_another_name_are_not_copied(tmp_path, show):
    store = mirrored(tmp_path, show)
    fill(store, (6,))
    alone = Shards(tmp_path / "alone" / "latents", fits, None, show)
    fill(alone, (3, 3))
    both = Shards(alone.folder, fits, Mirror(tmp_path / "drive", show), show)
    assert right(both.find(KEYS)) == set(KEYS)
    assert len(list(alone.folder.iterdir())) == 2 and len(list((tmp_path / "drive" / "latents").iterdir())) == 1


CHILD = """
import os, sys, time
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from test_shards import KEYS, Mirror, Shards, entry, fits, right
folder, mirror, number = sys.argv[1:]
"""


def child(code, *arguments):
    text = CHILD.format(tests=str(Path(__file__).parent)) + code
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", text, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_fill_one_cache_at_once(tmp_path):
    """Each looks, and writes what lacks, forty times; one of them removes a shard now and then."""
    code = """
(Path(mirror) / number).touch()
while not all((Path(mirror) / n).exists() for n in "01"):
    time.sleep(0.001)
for round in range(40):
    store = Shards(Path(folder), fits, Mirror(mirror))
    found = store.find(KEYS)
    missing = [key for key in KEYS if key not in found]
    for start in range(0, len(missing), 2):
        found |= store.write({key: entry(KEYS.index(key)) for key in missing[start : start + 2]}, 0)
    assert right(found) == set(KEYS)
    if number == "1" and round % 3 == 1:
        for place in (Path(folder), Path(mirror) / "latents"):
            for path in sorted(place.glob("*.safetensors"))[round % 2 :]:
                path.unlink(missing_ok=True)
"""
    (tmp_path / "drive").mkdir()
    folder = tmp_path / "cache" / "latents"
    folder.parent.mkdir()
    both = [child(code, folder, tmp_path / "drive", number) for number in "01"]
    for process in both:
        said, failed = process.communicate(timeout=120)
        assert (process.returncode, said, failed) == (0, "", "")
    assert not list(tmp_path.rglob("*.writing"))
    assert right(Shards(folder, fits).find(KEYS)) == set(KEYS)


@pytest.mark.skipif(os.name != "posix", reason="memory-mapped files are cut on POSIX only")
def test_a_shard_cut_while_it_is_mapped_kills_and_the_next_run_makes_it_again(tmp_path, store, show):
    """SIGBUS can't be caught in Python."""
    code = """
large = {"mean": torch.ones(2, 3).expand(2, 3).clone(), "time_ids": torch.zeros(4)}
store = Shards(Path(folder), lambda entry: True)
store.find(["large"])
shard = store.write({"large": {"mean": torch.ones(10**6)}}, 0)["large"]
(path,) = Path(folder).iterdir()
os.truncate(path, 8192)
shard.get_tensor("large.mean").sum()
print("alive")
"""
    process = child(code, store.folder, "none", "0")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGBUS and said == ""
    (path,) = store.folder.iterdir()
    assert store.find(["large"]) == {} and not path.exists() and str(path) in show.notes[0]


def test_a_header_may_hold_a_key_that_looks_like_a_path(store):
    """The key is all before the last point."""
    store.find(KEYS)
    store.write({"a.b/c": entry(0)}, 0)
    found = store.find(["a.b/c"])
    assert list(found) == ["a.b/c"] and json.dumps(found["a.b/c"].get_tensor("a.b/c.time_ids").tolist())
