"""The file of captions beside a data set: where it lies, what counts, what damage it stands."""

import json
import os

import pytest
from PIL import Image

from naruto_lora import data
from naruto_lora.captioning import captioners, write
from naruto_lora.reading import captions


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    return place


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    for name in "ab":
        Image.new("RGB", (40, 30), "red" if name == "a" else "blue").save(tmp_path / "set" / f"{name}.png")
        (tmp_path / "set" / f"{name}.txt").write_text(f"file {name}")
    return tmp_path / "set"


def texts(dataset):
    return [e.caption for e in data.load(dataset)]


def test_only_lines_that_count_here_replace_captions_of_the_files(folder):
    first, second = data.load(folder)
    kept = captions.Captions(folder)
    kept.put([captions.row(first, "kept", "you", here=True), captions.row(second, "noted", "blip", here=False)])
    assert texts(folder) == ["kept", "file b"]
    kept.put([captions.row(first, "newer", "you", here=True)])
    assert texts(folder) == ["newer", "file b"] and len(captions.Captions(folder)) == 2
    kept.put([captions.row(first, "", "you", here=True)])
    (without, _) = data.load(folder)
    assert without.caption == "" and without.wordless and without.digest == first.digest


def test_pictures_are_not_read_for_captions_in_their_own_files(folder, monkeypatch):
    first, second = data.load(folder)
    captions.Captions(folder).put([captions.row(e, "x", "blip", here=False) for e in (first, second)])
    monkeypatch.setattr(data.Example, "digest", property(lambda self: pytest.fail("its bytes were hashed")))
    assert texts(folder) == ["file a", "file b"]


@pytest.mark.parametrize("line", ["", "no json", "[1]", "{}", '{"file_name": "a.png"}', "[" * 100_000, '{"text": 5}',
                                  '{"file_name": "a.png", "sha256": "0", "text": null, "by": "x", "here": true}'],
                         ids=range(8))  # fmt: skip
def test_an_odd_line_is_skipped(folder, line):
    (first, _) = data.load(folder)
    captions.Captions(folder).put([captions.row(first, "kept", "you", here=True)])
    with open(folder / captions.FILE, "a") as file:
        file.write(line + "\n")
    assert texts(folder) == ["kept", "file b"]


def test_places(folder, tmp_path, cache, monkeypatch):
    (tmp_path / "my.zip").write_bytes(b"zip")
    assert captions.place(folder) == folder / "captions.jsonl"
    assert captions.place(str(tmp_path / "my.zip")) == tmp_path / "my.zip.captions.jsonl"
    hub = captions.place("someone/pictures")
    assert hub.parent == cache / "naruto_lora" / "captions" and hub != captions.place("someone/other")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert captions.place(folder).parent == hub.parent
    (folder / "captions.jsonl").write_text("")
    assert captions.place(folder) == folder / "captions.jsonl"  # one that is there is read


def test_a_table_of_parquet_gets_captions_where_it_has_none(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(captioners, "load", lambda *_: captioners.Captioner("x", lambda b: ["new"] * len(b)))
    contents = []
    for colour in ("red", "blue"):
        Image.new("RGB", (32, 32), colour).save(tmp_path / "one.png")
        contents.append({"bytes": (tmp_path / "one.png").read_bytes(), "path": None})
    table = datasets.Dataset.from_dict(
        {"image": contents, "text": ["a man", None]},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "a.parquet")
    with pytest.raises(ValueError, match="caption of '00001' is empty"):
        data.load(tmp_path / "set")
    write.caption(tmp_path / "set", "x")
    assert texts(tmp_path / "set") == ["a man", "new"]
    (line,) = map(json.loads, (tmp_path / "set" / ".captions.jsonl").read_text().splitlines())
    assert (line["text"], line["by"], line["here"]) == ("new", "x", True)
