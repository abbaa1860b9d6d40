"""Captions made where they are missing, kept where the pictures are, and never written over a person's own."""

import io
import json
import os
import subprocess
import sys
import time
import weakref
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import Watcher
from PIL import Image

from naruto_lora import data
from naruto_lora.captioning import captioners, places, write
from naruto_lora.reading import captions, report


def pictures(folder, names=("a.png", "b.png", "deep/c.png"), captioned=()):
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40 + k, 30), 60 + k).convert("RGB").save(folder / name)
    for name in captioned:
        (folder / name).with_suffix(".txt").write_text("my own")
    return folder


@pytest.fixture
def model(monkeypatch):
    """A captioner that says a picture's width; `calls` has the sizes of its batches."""
    calls = []

    def describe(batch):
        calls.append(len(batch))
        return [f"an anime drawing of {picture.width}  men" for picture in batch]

    monkeypatch.setattr(captioners, "load", lambda name, show=None: captioners.Captioner(name, describe, 2))
    describe.calls = calls
    return describe


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def texts(dataset):
    return {example.name: example.caption for example in data.load(dataset)}


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_without_captions_a_set_is_refused_with_the_mend(tmp_path):
    with pytest.raises(ValueError, match=r"'a.png' .*add one in 'a.txt' beside it, or .* naruto_lora caption '.*'$"):
        data.load(pictures(tmp_path))


def test_missing_captions_are_written_beside_the_pictures_without_words_of_style(tmp_path, model):
    folder = pictures(tmp_path / "set", captioned=["b.png"])
    report = write.caption(folder)
    assert texts(folder) == {"a.png": "40 men", "b.png": "my own", "deep/c.png": "42 men"}
    assert (folder / "deep" / "c.txt").read_text() == "42 men" and (folder / "b.txt").read_text() == "my own"
    assert (report.made, report.yours, report.cleaned) == (2, 1, 2)
    assert str(report) == ("2 of 3 captions written by blip; 1 of your own left as they are; 2 lost words that name "
                           "a style ('an anime drawing of' 2 times)")  # fmt: skip
    assert [(row["file_name"], row["by"], row["here"]) for row in lines(folder / captions.FILE)] == [
        ("a.png", "blip", False), ("deep/c.png", "blip", False)]  # fmt: skip
    model.calls.clear()
    assert write.caption(folder).made == 0 and model.calls == []


def test_a_prefix_starts_each_new_caption(tmp_path, model):
    folder = pictures(tmp_path, captioned=["b.png"])
    write.caption(folder, prefix=" ohwx style ")
    assert texts(folder) == {"a.png": "ohwx style, 40 men", "b.png": "my own", "deep/c.png": "ohwx style, 42 men"}
    assert write.prefixed("ohwx.", "a man") == "ohwx. a man" and write.prefixed(" ", "a man") == "a man"


def test_all_replaces_what_was_there_but_not_what_was_edited_since(tmp_path, model):
    folder = pictures(tmp_path, captioned=["b.png"])
    write.caption(folder)
    (folder / "a.txt").write_text("mended by hand")
    report = write.caption(folder, mode="all")
    assert texts(folder) == {"a.png": "mended by hand", "b.png": "41 men", "deep/c.png": "42 men"}
    assert (report.made, report.replaced, report.yours, report.earlier) == (1, 1, 1, 1)
    assert captions.Captions(folder).get(data.load(folder)[1])["before"] == "my own"
    model.calls.clear()
    assert write.caption(folder, mode="all").made == 0 and not model.calls
    assert write.caption(folder, "florence-2", mode="all").made == 2  # another captioner writes its own
    assert captions.Captions(folder).get(data.load(folder)[1])["before"] == "my own"


def test_none_uses_pictures_without_words_and_can_be_taken_back(tmp_path, model):
    folder = pictures(tmp_path, captioned=["a.png", "b.png"])
    report = write.caption(folder, mode="none")
    assert set(texts(folder).values()) == {""} and (folder / "a.txt").read_text() == "my own" and not model.calls
    assert str(report).startswith("all 3 pictures are used without captions")
    assert set(write.caption(folder, mode="none", prefix="ohwx") and texts(folder).values()) == {"ohwx"}
    write.caption(folder)
    assert texts(folder) == {"a.png": "my own", "b.png": "my own", "deep/c.png": "42 men"}


def test_a_listing_gets_lines_and_keeps_its_others(tmp_path, model):
    folder = pictures(tmp_path)
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "mine", "more": 7}\n{"file_name": "b.png"'
                                           ', "text": null}\n')  # fmt: skip
    write.caption(folder)
    first, second, third = (json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines())
    assert first == {"file_name": "a.png", "text": "mine", "more": 7}
    assert (second["text"], third) == ("41 men", {"file_name": "deep/c.png", "text": "42 men"})
    assert not list(folder.rglob("*.txt"))


def test_a_listings_names_are_compared_as_paths(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('no json\n{"file_name": ".\\\\deep/a.png", "caption": "old", "k": 1}')
    assert places._into_metadata(tmp_path / "metadata.jsonl", tmp_path / "deep" / "a.png", "new")
    first, second = (tmp_path / "metadata.jsonl").read_text().split("\n")
    assert first == "no json" and json.loads(second) == {"file_name": ".\\deep/a.png", "caption": "new", "k": 1}


def test_pictures_of_one_stem_do_not_share_a_text_file(tmp_path, model):
    folder = pictures(tmp_path, names=["a.png", "a.jpg"])
    write.caption(folder)
    assert texts(folder) == {"a.jpg": "41 men", "a.png": "40 men"} and not list(folder.glob("*.txt"))


@pytest.mark.parametrize("writable", [True, False])
def test_a_zips_captions_lie_beside_it_or_in_the_cache(tmp_path, model, monkeypatch, writable):
    pictures(tmp_path / "set", captioned=["b.png"])
    archive = tmp_path / "my set.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for file in sorted((tmp_path / "set").rglob("*.*")):
            zipped.write(file, file.relative_to(tmp_path))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: writable and access(path, mode))
    before = archive.read_bytes()
    said = str(write.caption(str(archive)))
    beside = tmp_path / "my set.zip.captions.jsonl"
    assert beside.is_file() == writable and archive.read_bytes() == before
    assert f"written by blip into '{captions.place(archive)}'; 1 of your own" in said
    assert texts(str(archive)) == {"a.png": "40 men", "b.png": "my own", "deep/c.png": "42 men"}
    write.caption(str(archive), mode="all")
    assert texts(archive)["b.png"] == "41 men"


def test_a_killed_call_goes_on_where_it_stopped(tmp_path, model, monkeypatch):
    folder = pictures(tmp_path, names=[f"{k}.png" for k in range(7)])

    def watch(phase, done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write.caption(folder, mode="all", show=watch)
    assert len(list(folder.glob("*.txt"))) == 4
    with open(folder / captions.FILE, "a") as file:
        file.write('{"file_name": "5.png", "sha')  # as a power cut leaves it
    model.calls.clear()
    report = write.caption(folder, mode="all")
    assert (report.made, report.earlier, sum(model.calls)) == (3, 4, 3) and len(texts(folder)) == 7
    assert len(captions.Captions(folder)) == 7


def test_a_kill_leaves_whole_captions_and_the_next_call_does_the_rest(tmp_path):
    slow = "import time\ndef describe(batch):\n    time.sleep(.5)\n    return ['a man'] * len(batch)\n"
    (tmp_path / "slow.py").write_text(slow)
    folder = pictures(tmp_path / "set", names=[f"{k:02d}.png" for k in range(70)])
    code = f"from naruto_lora.captioning import write; print(write.caption({str(folder)!r}, 'slow').made)"
    path = os.pathsep.join([str(tmp_path), str(Path(write.__file__).parents[2])])
    run = [sys.executable, "-c", code]
    process = subprocess.Popen(run, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(folder.glob("*.txt")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = [file.read_text() for file in folder.glob("*.txt")]
    assert 0 < len(done) < 70 and set(done) == {"a man"}
    said = subprocess.run(run, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert int(said.stdout.splitlines()[-1]) == 70 - len(done) and set(texts(folder).values()) == {"a man"}


def test_a_mirror_brings_captions_to_another_machine_without_a_captioner(tmp_path, model):
    drive = tmp_path / "drive"
    drive.mkdir()
    folder = pictures(tmp_path / "set")
    write.caption(folder, mirror=drive)
    for file in (*folder.rglob("*.txt"), folder / captions.FILE):
        file.unlink()
    model.calls.clear()
    assert write.caption(folder, mirror=drive).earlier == 3 and not model.calls
    assert texts(folder)["deep/c.png"] == "42 men"
    (tmp_path / "gone").write_text("no folder")
    assert write.caption(folder, mirror=tmp_path / "gone").earlier == 3  # said, and nothing else


def test_a_picture_under_an_old_name_gets_a_caption_of_its_own(tmp_path, model):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        zipped.writestr("a.png", packed(30))
    write.caption(tmp_path / "a.zip")
    assert texts(tmp_path / "a.zip") == {"a.png": "30 men"}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        zipped.writestr("a.png", packed(31))
    with pytest.raises(ValueError, match="'a.png' .* has no caption"):
        data.load(tmp_path / "a.zip")
    write.caption(tmp_path / "a.zip")
    assert texts(tmp_path / "a.zip") == {"a.png": "31 men"}


def packed(width):
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, width, 3), width, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_full_gpu_gets_smaller_batches(tmp_path, monkeypatch):
    sizes = []

    def describe(batch):
        sizes.append(len(batch))
        if len(batch) > 1:
            raise RuntimeError("CUDA out of memory")
        return ["a man"]

    monkeypatch.setattr(captioners, "load", lambda *_: captioners.Captioner("blip", describe, 4))
    folder = pictures(tmp_path, names=["1.png", "2.png", "3.png", "4.png"])
    write.caption(folder)
    assert sizes == [4, 2, 1, 1, 2, 1, 1] and set(texts(folder).values()) == {"a man"}


def test_pictures_without_a_word_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(captioners, "load", lambda *_: captioners.Captioner("wd", lambda batch: [" "] * len(batch)))
    report = write.caption(pictures(tmp_path), "wd")
    assert report.made == 0 and "no words found for a.png, b.png, deep/c.png" in str(report)


def test_large_pictures_reach_a_captioner_reduced(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(captioners, "load", lambda *_: captioners.Captioner("x", lambda b: seen.extend(b) or ["y"]))
    Image.new("RGB", (3000, 500)).save(tmp_path / "wide.png")
    write.caption(tmp_path, "x")
    assert seen[0].size == (1024, 171)


def test_a_captioner_is_freed_before_training(tmp_path, monkeypatch):
    class Model:
        def describe(self, batch):
            return ["a man"] * len(batch)

    models = []

    def load(name, show=None):
        model = Model()
        models.append(weakref.ref(model))
        return captioners.Captioner(name, model.describe)

    monkeypatch.setattr(captioners, "load", load)
    write.caption(pictures(tmp_path))
    assert len(models) == 1 and models[0]() is None


def test_an_unknown_mode_is_named(tmp_path):
    with pytest.raises(ValueError, match="the mode 'some' is unknown: choose missing, all, none"):
        write.caption(tmp_path, mode="some")


def test_examples_come_captioned_and_a_set_with_captions_is_read_once(tmp_path, model, monkeypatch):
    folder, seen, loads = pictures(tmp_path, captioned=["a.png"]), Watcher(), []
    (folder / "odd.xyz").write_text("x")
    load = data.load
    monkeypatch.setattr(data, "load", lambda *given, **options: loads.append(given) or load(*given, **options))
    found = report.Found()
    examples = write.captioned(folder, show=seen, found=found)
    assert [e.caption for e in examples] == ["my own", "41 men", "42 men"] and len(loads) == 2
    assert seen.notes == ["2 of 3 captions written by blip; 1 of your own left as they are; 2 lost words that name a "
                          "style ('an anime drawing of' 2 times)"]  # fmt: skip
    assert found.captions == {".txt files": 3} and "odd.xyz" in found.named
    again = write.captioned(folder, show=seen)
    assert again == examples and len(loads) == 4  # what was made is read again
    whole = pictures(tmp_path / "whole", captioned=["a.png", "b.png", "deep/c.png"])
    assert [e.caption for e in write.captioned(whole, show=seen)] == ["my own"] * 3 and len(loads) == 5
