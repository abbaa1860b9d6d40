"""Encode once: right values, nothing twice, and a killed run continues."""

import dataclasses
import errno
import io
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from naruto_lora import cache, data, files, models
from naruto_lora.data import Example
from naruto_lora.disk import shards as disk_shards
from naruto_lora.reading import picture


@pytest.fixture
def encoders(monkeypatch):
    """Counts what the encoders encode: {"captions": ..., "pictures": ...}."""
    counts = {"captions": 0, "pictures": 0}

    def counting(kind, function):
        def call(model, batch, *rest):
            counts[kind] += len(batch)
            return function(model, batch, *rest)

        return call

    monkeypatch.setattr(cache, "encode_prompts", counting("captions", cache.encode_prompts))
    monkeypatch.setattr(cache, "encode_pictures", counting("pictures", cache.encode_pictures))
    return counts


def encoded_count(rows, plan, folder, counts, show=None):
    """Encodes `rows` into `folder`; how many (captions, pictures) the encoders got."""
    counts.update(captions=0, pictures=0)
    made = cache.encode(rows, plan, folder, show)
    assert len(made) == len(rows)
    return counts["captions"], counts["pictures"]


def test_cached_is_what_the_pipeline_would_encode(plan, examples, encoded, pipe):
    """Also under shuffle, where a cousin of the stock script pairs latents with other pictures' captions."""
    indices, count = [4, 0, 2], 3
    noise = torch.randn(count, *encoded.shapes[0], generator=torch.Generator().manual_seed(0))
    dropped, flipped = torch.tensor([False, False, True]), torch.zeros(3, dtype=torch.bool)
    batch = encoded.batch(indices, noise, dropped, flipped, torch.device("cpu"))
    rows = [examples[0][i] for i in indices]
    embeds, _, pooled, _ = pipe.encode_prompt([e.caption for e in rows], do_classifier_free_guidance=False)
    crops = [data.crop(e.image(), plan.resolution) for e in rows]
    with torch.no_grad():
        posterior = pipe.vae.encode(data.pixels([image for image, _ in crops])).latent_dist
    latents = (posterior.mean + posterior.std * noise) * pipe.vae.config.scaling_factor
    close = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch["latents"], latents, **close)
    torch.testing.assert_close(batch["prompt_embeds"][:2], embeds[:2], **close)
    torch.testing.assert_close(batch["pooled"][:2], pooled[:2], **close)
    assert batch["time_ids"].tolist() == [list(map(float, ids)) for _, ids in crops]
    assert not batch["prompt_embeds"][2].any() and not batch["pooled"][2].any()  # the dropped caption
    assert embeds[2].any() and batch["latents"][2].any()


def test_only_what_is_new_is_encoded(plan, examples, tmp_path, encoders):
    rows = examples[0][:6]
    captions = len({e.caption for e in rows})
    assert encoded_count(rows, plan, tmp_path, encoders) == (captions, 6)
    assert encoded_count(rows, plan, tmp_path, encoders) == (0, 0)
    assert encoded_count(rows[::-1], plan, tmp_path, encoders) == (0, 0)
    other = [Example(rows[0].name, "a new caption", rows[0].source), *rows[1:]]
    assert encoded_count(other, plan, tmp_path, encoders) == (1, 0)
    changed = [Example(rows[0].name, rows[0].caption, examples[0][9].read()), *rows[1:]]
    assert encoded_count(changed, plan, tmp_path, encoders) == (0, 1)
    assert encoded_count(rows, plan.replace(resolution=64), tmp_path, encoders) == (0, 6)
    assert encoded_count(rows, plan, tmp_path, encoders) == (0, 0)


def test_another_models_encodings_are_not_used(plan, examples, tmp_path, encoders, base):
    rows, folder, other = examples[0][:2], tmp_path / "cache", plan.replace(base=str(tmp_path / "base"))
    shutil.copytree(base, other.base)
    encoded_count(rows, plan, folder, encoders)
    assert encoded_count(rows, other, folder, encoders) == (0, 0)  # moved, but the same
    file = tmp_path / "base" / "text_encoder" / "model.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(file).items()}, file)
    assert encoded_count(rows, other, folder, encoders) == (2, 2)
    assert encoded_count(rows, plan.replace(vae=str(tmp_path / "base" / "vae")), folder, encoders) == (0, 2)


def many(examples, count=20):
    """`count` examples, each with its own caption; the pictures repeat."""
    return [Example(str(n), f"caption {n}", examples[0][n % len(examples[0])].source) for n in range(count)]


def shards(folder, kind="latents"):
    return sorted((folder / kind).glob("*.safetensors"))


def test_entries_are_in_few_files(plan, examples, tmp_path, encoders, monkeypatch):
    encoded_count(many(examples, 150), plan, tmp_path, encoders)
    assert [len(shards(tmp_path, kind)) for kind in ("prompts", "latents")] == [3, 1]  # 64 + 64 + 22 captions
    monkeypatch.setattr(disk_shards, "FULL_BYTES", 10_000)
    encoded_count(examples[0][:9], plan.replace(resolution=40), tmp_path, encoders)  # 2 x 4 x 10 x 10 fp32, 24 bytes
    assert len(shards(tmp_path)) == 1 + 3  # 4 + 4 + 1 pictures


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_a_killed_run_continues_from_its_last_finished_shard(plan, examples, tmp_path, encoders, monkeypatch, batches):
    rows = many(examples)
    captions, pictures = len(rows), len({e.read() for e in rows})
    monkeypatch.setattr(disk_shards, "FULL_ENTRIES", 6)
    monkeypatch.setattr(cache, "_batches", lambda keys, size: [keys[n : n + 4] for n in range(0, len(keys), 4)])

    def kill_at(phase_killed):
        seen = []

        def show(phase, done, total):
            seen.extend([phase] * (phase == phase_killed))
            if len(seen) == batches:
                raise KeyboardInterrupt

        return show

    finished = 4 * batches // 6 * 6
    with pytest.raises(KeyboardInterrupt):
        cache.encode(rows, plan, tmp_path, kill_at("captions"))
    (tmp_path / "prompts" / "half.safetensors.77.writing").write_bytes(b"half a file")
    encoders.update(captions=0, pictures=0)
    with pytest.raises(KeyboardInterrupt):
        cache.encode(rows, plan, tmp_path, kill_at("pictures"))
    assert encoders["captions"] == captions - finished
    shown = []
    assert encoded_count(rows, plan, tmp_path, encoders, lambda *call: shown.append(call)) == (0, pictures - finished)
    assert shown[0] == ("pictures", 4, pictures - finished) and shown[-1] == ("pictures", *[pictures - finished] * 2)


def test_unfinished_files_of_a_killed_run_are_removed(plan, examples, tmp_path, encoders):
    encoded_count(examples[0][:1], plan, tmp_path, encoders)
    old, new = (tmp_path / "latents" / f"{name}.safetensors.77.writing" for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"half a file")
    os.utime(old, (time.time() - 7200,) * 2)
    encoded_count(examples[0][:1], plan, tmp_path, encoders)
    assert not old.exists() and new.exists()  # the new one may be another run's


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.02, 0.5, 0.9999])
def test_a_truncated_shard_is_encoded_again(plan, examples, tmp_path, encoders, capsys, monkeypatch, share):
    monkeypatch.setattr(disk_shards, "FULL_ENTRIES", 3)
    rows = examples[0][:7]
    before = values(cache.encode(rows, plan, tmp_path))
    whole = {path.name for path in shards(tmp_path)}
    broken = shards(tmp_path)[0]
    with safe_open(broken, "pt") as shard:
        lost = len({name[:32] for name in shard.keys()})
    content = broken.read_bytes()
    broken.write_bytes(content[: int(share * len(content))])
    assert encoded_count(rows, plan, tmp_path, encoders) == (0, lost)
    printed = capsys.readouterr().out
    assert f"'{broken}' in the cache is broken" in printed and printed.count("\n") == 1
    assert {path.name for path in shards(tmp_path)} == whole
    torch.testing.assert_close(values(cache.encode(rows, plan, tmp_path)), before)


def rewritten(folder, kind, change=lambda tensors: None):
    """Writes every shard of `kind` anew, after `change`, without a checksum, as earlier versions did."""
    for path in shards(folder, kind):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)


def named(tensors, name):
    """The tensors called <key>.<name> of a shard: {their full name: tensor}."""
    return {full: value for full, value in tensors.items() if full.endswith(f".{name}")}


CHANGES = {  # of a shard of captions or pictures: each makes it another than the recipe's
    "shorter": ("prompts", lambda t: t.update({n: v[:-1].clone() for n, v in named(t, "prompt_embeds").items()})),
    "narrower": ("prompts", lambda t: t.update({n: v[:, 1:].clone() for n, v in named(t, "prompt_embeds").items()})),
    "pooled": ("prompts", lambda t: t.update({n: v[1:].clone() for n, v in named(t, "pooled").items()})),
    "half": ("prompts", lambda t: t.update({n: v.half() for n, v in named(t, "pooled").items()})),
    "no pooled": ("prompts", lambda t: [t.pop(n) for n in named(t, "pooled")]),
    "one NaN": ("prompts", lambda t: next(iter(named(t, "pooled").values()))[0].fill_(float("nan"))),
    "one row": ("latents", lambda t: t.update({n: v[:, 1:].clone() for n, v in named(t, "mean").items()})),
    "one column": ("latents", lambda t: t.update({n: v[..., 1:].clone() for n, v in named(t, "std").items()})),
    "channels": ("latents", lambda t: t.update({n: v[:3].clone() for n, v in named(t, "std").items()})),
    "half latents": ("latents", lambda t: t.update({n: v.half() for n, v in named(t, "mean").items()})),
    "no std": ("latents", lambda t: [t.pop(n) for n in named(t, "std")]),
    "no time_ids": ("latents", lambda t: [t.pop(n) for n in named(t, "time_ids")]),
    "one more": ("latents", lambda t: t.update({n[:-4] + "more": v.clone() for n, v in named(t, "mean").items()})),
    "five time_ids": ("latents", lambda t: t.update({n: v[:5].clone() for n, v in named(t, "time_ids").items()})),
    "whole numbers": ("latents", lambda t: t.update({n: v.int() for n, v in named(t, "time_ids").items()})),
    "NaN time_ids": ("latents", lambda t: [v[4:].fill_(float("nan")) for v in named(t, "time_ids").values()]),
    "other height": ("latents", lambda t: [v[4].fill_(64) for v in named(t, "time_ids").values()]),
    "other width": ("latents", lambda t: [v[5].fill_(64) for v in named(t, "time_ids").values()]),
}


@pytest.fixture(scope="module")
def two(plan, examples, tmp_path_factory):
    """A cache folder with two pictures, and the values in it."""
    folder = tmp_path_factory.mktemp("two")
    return folder, values(cache.encode(examples[0][:2], plan, folder))


@pytest.mark.parametrize("change", CHANGES)
def test_entries_that_the_recipe_cant_use_are_encoded_again(plan, examples, tmp_path, encoders, two, capsys, change):
    shutil.copytree(two[0], tmp_path, dirs_exist_ok=True)
    kind, function = CHANGES[change]
    rewritten(tmp_path, kind, function)
    expected = (2, 0) if kind == "prompts" else (0, 2)
    assert encoded_count(examples[0][:2], plan, tmp_path, encoders) == expected
    assert "an entry lacks a tensor, or has another shape" in (said := capsys.readouterr().out) or change == "one NaN"
    assert said.count("\n") == 1 and said.startswith(f"'{shards(tmp_path, kind)[0]}' in the cache is broken (")
    torch.testing.assert_close(values(cache.encode(examples[0][:2], plan, tmp_path)), two[1])
    assert encoders == {"captions": expected[0], "pictures": expected[1]}


def test_shards_of_an_earlier_version_are_used_as_they_are(plan, examples, tmp_path, encoders, two, capsys):
    shutil.copytree(two[0], tmp_path, dirs_exist_ok=True)
    for kind in ("prompts", "latents"):
        rewritten(tmp_path, kind)
    content = [path.read_bytes() for kind in ("prompts", "latents") for path in shards(tmp_path, kind)]
    assert encoded_count(examples[0][:2], plan, tmp_path, encoders) == (0, 0) and not capsys.readouterr().out
    assert [path.read_bytes() for kind in ("prompts", "latents") for path in shards(tmp_path, kind)] == content


def test_a_bit_of_a_shard_changes_nothing(plan, examples, tmp_path, encoders, two):
    """Neither here nor in the mirror: what is trained on is the same."""
    rows, mirror = examples[0][:2], tmp_path / "drive"
    shutil.copytree(two[0], tmp_path / "cache")
    cache.encode(rows, plan, tmp_path / "cache", mirror=mirror)
    for folder in (tmp_path / "cache", mirror):
        (path,) = shards(folder)
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        encoders.update(captions=0, pictures=0)
        assert torch.equal(values(cache.encode(rows, plan, tmp_path / "cache", mirror=mirror)), two[1])
        assert encoders == {"captions": 0, "pictures": 0} and path.read_bytes() == whole


def test_a_half_precision_cache_is_used_again(plan, examples, tmp_path, encoders, monkeypatch):
    """Also one whose VAE overflows in fp16, and is in fp32."""
    monkeypatch.setattr(models, "device_for", lambda precision: torch.device("cpu"))
    half = plan.replace(precision="fp16")
    assert encoded_count(examples[0][:2], half, tmp_path, encoders) == (2, 2)
    assert encoded_count(examples[0][:2], half, tmp_path, encoders) == (0, 0)
    whole = models.load_vae
    monkeypatch.setattr(models, "load_vae", lambda base, vae, dtype, device: whole(base, vae, torch.float32, device))
    assert encoded_count(examples[0][:2], half, tmp_path / "other", encoders) == (2, 2)
    assert encoded_count(examples[0][:2], half, tmp_path / "other", encoders) == (0, 0)


def test_a_captions_encoding_that_is_not_finite_names_it(plan, examples, tmp_path, monkeypatch):
    whole = cache.encode_prompts

    def broken(encoders, texts):
        rows = whole(encoders, texts)
        rows[1]["pooled"][3] = float("inf")
        return rows

    monkeypatch.setattr(cache, "encode_prompts", broken)
    with pytest.raises(ValueError, match=f"encoding of the caption '{examples[0][1].caption[:60]}' is not finite"):
        cache.encode(examples[0][:3], plan, tmp_path)
    assert not shards(tmp_path, "prompts")


FILL = """
import sys
from pathlib import Path
from naruto_lora import cache, data, recipe
from naruto_lora.disk import shards

dataset, base, folder, drive, number = sys.argv[1:]
shards.FULL_ENTRIES = 4
plan = recipe.Recipe("few", (recipe.Leg(1, 1e-3),), resolution=32, precision="fp32", base=base, vae="", dataset=dataset)
rows = data.load(dataset)[:12]
Path(drive, number).touch()
while not all(Path(drive, n).exists() for n in "01"):
    pass
made = cache.encode(rows if number == "0" else rows[::-1], plan, folder, lambda *call: None, Path(drive, "mirror"))
assert len(made) == 12
"""


@pytest.mark.slow
def test_two_processes_fill_one_cache_at_the_same_time(plan, examples, tmp_path, encoders):
    arguments = [plan.dataset, plan.base, tmp_path / "cache", tmp_path]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", FILL, *map(str, arguments), number], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": str(Path(cache.__file__).parents[1])},
        )
        for number in "01"
    ]  # fmt: skip
    for process in both:
        said = process.communicate(timeout=300)[0]
        assert (process.returncode, said) == (0, "")
    assert not list(tmp_path.rglob("*.writing"))
    for folder, mirror in ((tmp_path / "cache", None), (tmp_path / "other", tmp_path / "mirror")):
        encoders.update(captions=0, pictures=0)
        cache.encode(data.load(plan.dataset)[:12], plan, folder, mirror=mirror)
        assert encoders == {"captions": 0, "pictures": 0}


def values(encoded, flipped=False):
    """The means of all latents."""
    turned = torch.full((len(encoded),), flipped)
    noise = torch.zeros(len(encoded), *encoded.shapes[0])
    return encoded.batch(range(len(encoded)), noise, torch.zeros_like(turned), turned, "cpu")["latents"]


def test_tensors_are_memory_mapped(encoded):
    """Read twice, a tensor has one address, inside the mapped file: it is not copied."""
    key = encoded.latents[0]
    one, two = (encoded.shards[key].get_tensor(f"{key}.mean") for _ in range(2))
    assert one.data_ptr() == two.data_ptr()
    maps = Path("/proc/self/maps")
    if maps.exists():
        rows = [line.split() for line in maps.read_text().splitlines() if line.endswith(".safetensors")]
        spans = [[int(place, 16) for place in row[0].split("-")] for row in rows]
        assert any(start <= one.data_ptr() < stop for start, stop in spans)


def test_two_runs_at_the_same_time_share_a_cache(plan, examples, tmp_path, encoders):
    """The second begins and ends before the first encodes its pictures."""
    rows, inner = examples[0][:8], []

    def meanwhile(phase, done, total):
        if phase == "captions" and not inner:
            inner.append(cache.encode(rows[:5], plan, tmp_path))

    outer = cache.encode(rows, plan, tmp_path, meanwhile)
    torch.testing.assert_close(values(outer)[:5], values(inner[0]))
    assert encoded_count(rows, plan, tmp_path, encoders) == (0, 0)
    assert not list(tmp_path.rglob("*.writing"))


def test_a_full_disk_is_reported_and_finished_shards_stay(plan, examples, tmp_path, encoders, monkeypatch):
    monkeypatch.setattr(disk_shards, "FULL_ENTRIES", 4)
    whole, written = files.replace, []

    def full_later(path, write):
        written.append(path)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        whole(path, write)

    rows = many(examples)
    with monkeypatch.context() as patch:
        patch.setattr(files, "replace", full_later)
        with pytest.raises(OSError, match=r"written \(No space left on device\): it needs \d+ MiB or more") as caught:
            cache.encode(rows, plan, tmp_path)
    assert str(tmp_path / "prompts") in str(caught.value) and "\n" not in str(caught.value)
    assert encoded_count(rows, plan, tmp_path, encoders)[0] == 20 - 12


def test_a_cache_folder_that_is_a_file_is_named(plan, examples, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match="the cache folder '.*' can't be used .*: choose another"):
        cache.encode(examples[0][:1], plan, tmp_path / "cache")


def test_a_lost_cache_is_restored_from_its_mirror(plan, examples, tmp_path, encoders):
    rows, mirror = examples[0][:6], tmp_path / "drive"
    before = values(cache.encode(rows, plan, tmp_path / "cache", mirror=mirror))
    shutil.rmtree(tmp_path / "cache")
    encoders.update(captions=0, pictures=0)
    again = cache.encode(rows, plan, tmp_path / "cache", mirror=mirror)
    assert encoders == {"captions": 0, "pictures": 0} and torch.equal(values(again), before)
    shutil.rmtree(mirror)  # a lost mirror is filled again
    cache.encode(rows, plan, tmp_path / "cache", mirror=mirror)
    shutil.rmtree(tmp_path / "cache")
    cache.encode(rows, plan, tmp_path / "cache", mirror=mirror)
    assert encoders == {"captions": 0, "pictures": 0}


def test_only_needed_shards_are_copied_from_the_mirror(plan, examples, tmp_path):
    mirror = tmp_path / "drive"
    for part in (examples[0][:3], examples[0][3:6]):
        cache.encode(part, plan, tmp_path / "one", mirror=mirror)
    assert len(shards(mirror)) == 2
    cache.encode(examples[0][3:6], plan, tmp_path / "two", mirror=mirror)
    assert len(shards(tmp_path / "two")) == 1


@pytest.mark.parametrize("kind", ["absent", "a file", "full"])
def test_a_failing_mirror_gives_one_note_and_the_run_continues(plan, examples, tmp_path, encoders, monkeypatch, kind):
    mirror = tmp_path / "drive" / "cache" if kind == "absent" else tmp_path / "drive"
    if kind == "a file":
        mirror.write_text("in the place of a folder")
    if kind == "full":
        monkeypatch.setattr(files, "copy_whole", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))

    class Show:
        notes = []

        def __call__(self, *call):
            pass

        def note(self, text):
            self.notes.append(text)

    made = cache.encode(examples[0][:3], plan, tmp_path / "cache", Show(), mirror=mirror)
    assert len(made) == 3 and encoders["pictures"] == 3
    assert len(Show.notes) == 1 and str(mirror) in Show.notes[0] and "the run continues" in Show.notes[0]
    assert not (tmp_path / "drive").exists() or kind != "absent"


def test_flip_adds_only_mirrored_pictures_and_none_of_the_holdout(plan, examples, tmp_path, encoders):
    rows = examples[0][:5]
    encoded_count(rows, plan, tmp_path, encoders)
    encoders.update(captions=0, pictures=0)
    flip = plan.replace(flip=True)
    both = cache.encode(rows, flip, tmp_path, held=2)
    assert encoders == {"captions": 0, "pictures": 3}
    assert both.mirrored[3:] == both.latents[3:] and not set(both.mirrored[:3]) & set(both.latents)
    assert both.latents == cache.encode(rows, plan, tmp_path).latents
    turned = []
    for row in rows[:3]:
        buffer = io.BytesIO()
        ImageOps.mirror(row.image()).save(buffer, "PNG")
        turned.append(Example(row.name, row.caption, buffer.getvalue()))
    expected = values(cache.encode(turned, plan, tmp_path))
    torch.testing.assert_close(values(both.part(0, 3), flipped=True), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(values(both.part(0, 3)), expected, atol=1e-2)


def test_buckets_keep_each_pictures_shape(plan, examples, tmp_path, encoders, base):
    """In every batch size, a picture's latents are the VAE's of its crop to its bucket."""
    rows = []
    for number, size in enumerate([(90, 40), (64, 64), (40, 90), (96, 44), (50, 52)]):
        buffer = io.BytesIO()
        Image.effect_noise(size, 80).convert("RGB").save(buffer, "PNG")
        rows.append(Example(str(number), f"caption {number}", buffer.getvalue()))
    square, bucketed = plan, plan.replace(buckets=True)
    encoded_count(rows, square, tmp_path, encoders)
    made = cache.encode(rows, bucketed, tmp_path)
    assert encoders == {"captions": 5, "pictures": 10}
    assert made.shapes == tuple((4, h // 4, w // 4) for h, w in (picture.bucket(e.size(), 32) for e in rows))
    assert made.shapes[0] == made.shapes[3] != made.shapes[1] == made.shapes[4] != made.shapes[2]
    assert made.names == ("0", "1", "2", "3", "4")
    vae, no = models.load_vae(base, "", torch.float32, torch.device("cpu")), torch.zeros(1, dtype=torch.bool)
    for place, row in enumerate(rows):
        alone = cache.encode_pictures(vae, [data.decode(row, picture.bucket(row.size(), 32))])[0, 0]
        batch = made.batch([place], [torch.zeros(made.shapes[place])], no, no, "cpu")
        torch.testing.assert_close(batch["latents"][0], alone, rtol=1e-4, atol=1e-5)
        height, width, *_, high, wide = batch["time_ids"][0].tolist()
        assert (height, width) == row.size() and (high, wide) == picture.bucket(row.size(), 32)


def test_latents_that_are_not_finite_name_their_picture(plan, examples, tmp_path, monkeypatch):
    whole = cache.encode_pictures

    def broken(vae, crops):
        moments = whole(vae, crops)
        moments[[crop.name for crop in crops].index(examples[0][1].name), 1, 0, 0, 0] = float("inf")
        return moments

    monkeypatch.setattr(cache, "encode_pictures", broken)
    with pytest.raises(ValueError, match=f"the VAE's latents of '{examples[0][1].name}' are not finite"):
        cache.encode(examples[0][:3], plan, tmp_path)
    assert not shards(tmp_path)


@pytest.mark.parametrize("side, free, batch", [(1024, 16, 4), (1024, 8, 2), (1024, 1, 1), (512, 99, 16), (64, 99, 32)])
def test_a_batch_on_a_gpu_takes_half_of_the_free_memory(monkeypatch, side, free, batch):
    """The VAE's encoder holds 2 GiB for a picture of 1024 px in fp16."""
    monkeypatch.setattr(cache.gpu, "available", lambda device: free * 2**30)
    vae = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16)
    assert cache._batch_size(vae, side) == batch


def test_a_batch_on_a_gpu_is_read_after_it_is_computed(monkeypatch):
    done = []
    event = SimpleNamespace(record=lambda: done.append("record"), synchronize=lambda: done.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    assert cache._record_event(torch.device("cpu")) is None
    recorded = cache._record_event(torch.device("cuda"))

    class Moments(torch.Tensor):
        def isfinite(self):
            done.append("read")
            return torch.Tensor.isfinite(torch.ones(1, 2, 4, 1, 1))

    crop = data.Crop("a.png", None, (32, 32, 0, 0, 32, 32))
    keys, rows = cache._finish(["key"], [crop], torch.ones(1, 2, 4, 1, 1).as_subclass(Moments), recorded)
    assert done == ["record", "synchronize", "read"] and keys == ["key"]
    assert rows[0]["time_ids"].tolist() == [32, 32, 0, 0, 32, 32]


def threads():
    return {thread for thread in threading.enumerate() if thread is not threading.main_thread()}


def test_decoding_runs_at_most_so_many_pictures_ahead(examples, monkeypatch):
    """Pictures must not fill the host's memory where the GPU is slower than the decoders."""
    monkeypatch.setattr(data, "AHEAD", 5)
    rows, asked, before = examples[0] * 3, [], threads()
    pictures = data.decode_ahead((asked.append(n) or row, 32) for n, row in enumerate(rows))
    for taken in range(1, 20):
        crop = next(pictures)
        assert crop.name == rows[taken - 1].name and len(asked) == taken + 5
        assert (crop.pixels == np.asarray(data.crop(rows[taken - 1].image(), 32)[0])).all()
    pictures.close()
    assert threads() == before


def test_the_next_batch_starts_before_one_is_yielded(plan, examples, tmp_path, encoders, monkeypatch):
    """So that the GPU works while a shard is written."""
    monkeypatch.setattr(cache, "_batches", lambda keys, size: [keys[n : n + 4] for n in range(0, len(keys), 4)])
    shown = []
    cache.encode(examples[0][:14], plan, tmp_path, lambda *call: shown.append((*call[:2], encoders["pictures"])))
    assert [call[1:] for call in shown if call[0] == "pictures"] == [(4, 8), (8, 12), (12, 14), (14, 14)]


@pytest.mark.parametrize("kind", ["interrupt", "unreadable"])
def test_an_interrupt_or_an_error_ends_the_threads(plan, examples, tmp_path, monkeypatch, kind):
    rows, before = list(examples[0]), threads()
    rows[2] = Example("spoilt.png", "a caption", rows[2].read()[:-200] if kind == "unreadable" else rows[2].source)

    def show(phase, done, total):
        if phase == "pictures":
            raise KeyboardInterrupt

    expected = (KeyboardInterrupt, None) if kind == "interrupt" else (ValueError, r"'spoilt.png' can't be read \(.*\)")
    with pytest.raises(expected[0], match=expected[1]):
        cache.encode(rows, plan, tmp_path, show)
    assert threads() == before


def test_a_repeated_picture_is_encoded_once_and_trained_as_often_as_it_repeats(plan, examples, tmp_path):
    first, second = examples[0][:2]
    train, _ = data.split([dataclasses.replace(first, repeats=3), second], 0)
    done = []
    repeated = cache.encode(train, plan.replace(flip=True), tmp_path, show=lambda *counted: done.append(counted))
    assert repeated.names == (first.name,) * 3 + (second.name,) and len(repeated) == 4
    assert len(set(repeated.latents)) == 2 and len(set(repeated.mirrored)) == 2
    assert ("pictures", 4, 4) in done and ("captions", 2, 2) in done  # two pictures, and both mirrored
