"""The review of captions, by its state: what is typed is on disk, each change can be undone."""

import html
import os
import shutil
import zipfile

import pytest
from PIL import Image

from naruto_lora import data
from naruto_lora.captioning import captioners, write
from naruto_lora.reading import captions
from naruto_lora.widgets.review import Review


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    """Four pictures: three with a caption, d.png without."""
    for k, name in enumerate("abcd"):
        Image.new("RGB", (40, 30 + k), (60 * k, 0, 0)).save(tmp_path / f"{name}.png")
        if name != "d":
            (tmp_path / f"{name}.txt").write_text(f"a red {name}")
    return tmp_path


def loaded(dataset):
    return {e.name: e.caption for e in data.load(dataset, captioned=False)}


def said(review):
    return html.unescape(review.status.value.split(">")[1].split("<")[0])


def test_what_is_typed_is_on_disk_at_once_and_there_again(folder):
    review = Review(folder)
    assert review.caption.value == "a red a" and "1 of 4: a.png, 40 x 30 px" in review.picture.value
    review.caption.value = "a blue a"
    assert (folder / "a.txt").read_text() == "a blue a" and said(review) == "Saved."
    review.next.click()
    review.next.click()
    assert review.caption.value == "a red c" and review.number.value == 3
    review.next.click()
    assert review.caption.value == "" and "d.png" in review.picture.value
    review.caption.value = "d at last"
    review.next.click()  # around the end
    assert review.number.value == 1 and Review(folder).caption.value == "a blue a"
    review.previous.click()
    review.number.value = 2
    assert review.caption.value == "a red b"
    expected = {"a.png": "a blue a", "b.png": "a red b", "c.png": "a red c", "d.png": "d at last"}
    assert loaded(folder) == expected == {e.name: e.caption for e in data.load(folder)}


def test_letters_of_one_caption_are_undone_together_and_changes_one_by_one(folder):
    review = Review(folder)
    assert review.undo.disabled
    for text in ("a red ax", "a red axe"):
        review.caption.value = text
    review.next.click()
    review.caption.value = "a bee"
    review.previous.click()
    review.caption.value = "an axe"
    review.undo.click()
    assert review.caption.value == "a red axe" and said(review) == "Undone in 1 caption."
    review.undo.click()
    assert review.number.value == 2 and review.caption.value == "a red b"  # it shows what it undid
    review.undo.click()
    assert loaded(folder)["a.png"] == "a red a" and review.undo.disabled
    review.undo.click()
    assert loaded(folder) == {"a.png": "a red a", "b.png": "a red b", "c.png": "a red c", "d.png": ""}


def test_search_and_replace_over_all_and_one_undo(folder):
    review = Review(folder)
    review.find.value, review.put.value = "red", "crimson"
    review.replace.click()
    assert said(review).startswith("Replaced in 3 of 4 captions.") and review.caption.value == "a crimson a"
    assert [(folder / f"{name}.txt").read_text() for name in "abc"] == [f"a crimson {name}" for name in "abc"]
    review.replace.click()
    assert said(review) == "Replaced in 0 of 4 captions."
    review.undo.click()
    assert review.caption.value == "a red a" and said(review) == "Undone in 3 captions."
    review.find.value = ""
    review.replace.click()
    assert "write in `find`" in said(review) and loaded(folder)["b.png"] == "a red b"


def test_a_picture_can_be_used_without_words_and_undo_brings_the_rest_back(folder):
    review = Review(folder)
    review.no_words.click()
    assert review.caption.value == "" and (folder / "a.txt").read_text() == "a red a"
    (folder / "d.txt").write_text("d")
    assert {e.name: e.caption for e in data.load(folder)}["a.png"] == ""  # training takes it
    again = Review(folder)
    assert again.edits.missing() == [] and again.find_missing.disabled
    review.undo.click()
    assert {e.name: e.caption for e in data.load(folder)}["a.png"] == "a red a"


def test_the_next_without_a_caption_and_a_caption_undone_to_none(folder):
    shutil.copy(folder / "d.png", folder / "e.png")
    review = Review(folder)
    review.find_missing.click()
    assert review.number.value == 4
    review.find_missing.click()
    assert review.number.value == 5
    review.find_missing.click()
    assert review.number.value == 4
    review.caption.value = "d"
    assert (folder / "d.txt").read_text() == "d"
    review.undo.click()
    assert not (folder / "d.txt").exists() and review.edits.missing() == [3, 4]
    with pytest.raises(ValueError, match="'d.png' .* has no caption"):
        data.load(folder)


def test_a_zip_is_reviewed_beside_it(folder, tmp_path_factory, monkeypatch):
    archive = tmp_path_factory.mktemp("zip") / "my.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for file in folder.iterdir():
            zipped.write(file, file.name)
    review = Review(archive)
    review.caption.value = "mine"
    assert loaded(archive)["a.png"] == "mine" and archive.with_name("my.zip.captions.jsonl").is_file()
    review.undo.click()
    assert loaded(archive)["a.png"] == "a red a"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        review.caption.value = "again"
        assert "can't be saved" in said(review) and loaded(archive)["a.png"] == "a red a"
    review.edits.type(0, "again")  # not taken for saved
    assert loaded(archive)["a.png"] == "again"


def full(*_):
    raise OSError(28, "No space left on device")


def test_what_a_person_wrote_here_no_captioner_replaces(folder, monkeypatch):
    monkeypatch.setattr(captioners, "load", lambda *_: captioners.Captioner("x", lambda batch: ["x"] * len(batch)))
    write.caption(folder, "x", mode="all")
    review = Review(folder)
    review.caption.value = "mine"
    review.next.click()
    review.no_words.click()
    assert write.caption(folder, "y", mode="all").yours == 2
    assert loaded(folder) == {"a.png": "mine", "b.png": "", "c.png": "x", "d.png": "x"}
    assert captions.Captions(folder).get(review.edits.examples[0])["before"] == "a red a"


def test_a_full_disk_is_said_and_nothing_is_lost(folder, monkeypatch):
    review = Review(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        review.caption.value = "a long text"
        assert said(review).startswith("The caption can't be saved (No space left on device)")
        review.find.value, review.put.value = "red", "x"
        review.replace.click()
        assert (folder / "a.txt").read_text() == "a red a"
    review.go(0)
    review.caption.value = "a long text"
    assert (folder / "a.txt").read_text() == "a long text"


def test_names_and_captions_are_shown_as_text(folder):
    (folder / "a.png").rename(folder / '"><script>x<.png')
    (folder / '"><script>x<.txt').write_text("<b>bold</b>")
    review = Review(folder)
    assert "<script" not in review.picture.value and review.caption.value == "<b>bold</b>"
