"""One reading of a data set, whatever its layout: each row builds one and must give the same captioned pictures."""

import csv
import json
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from naruto_lora import data
from naruto_lora.reading import names, report

CAPTIONS = {"a.png": "a boat", "b.jpg": "a cat, asleep", "c.png": 'a "dog"', "d.webp": "ein Löwe\nund 猫"}
COLOURS = dict(zip(CAPTIONS, ("red", "green", "blue", "white"), strict=True))


class Notes(list):
    """Where notes go."""

    def __call__(self, *_, **__):
        raise AssertionError("no phase is shown")

    def note(self, text):
        self.append(text)


def picture(file: Path, name: str = "") -> Path:
    """A picture as its name in CAPTIONS has it, in `file`."""
    name = name or file.name
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), COLOURS[name]).save(file, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[name[2:]])
    return file


def pictures(folder: Path, names=CAPTIONS) -> None:
    for name in names:
        picture(folder / name)


def texts(folder: Path, ending=".txt", names=CAPTIONS) -> None:
    for name in names:
        (folder / name).with_suffix(ending).write_text(CAPTIONS[name], "utf-8")


def rows(file: Path, names=None, column="text", captions=None) -> None:
    """metadata.jsonl or metadata.csv; `names` are {name in the file: name in CAPTIONS}."""
    names = dict.fromkeys(CAPTIONS) if names is None else names
    table = [{"file_name": name, column: (captions or CAPTIONS)[names[name] or name]} for name in names]
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in table))
        return
    with file.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, ["file_name", column])
        writer.writeheader()
        writer.writerows(table)


def load(folder: Path) -> tuple[list, list[str], report.Found]:
    """(caption and bytes of each picture, sorted), the notes, what was found."""
    notes, found = Notes(), report.Found()
    examples = data.load(folder, show=notes, found=found)
    return sorted((example.caption, example.digest) for example in examples), notes, found


@pytest.fixture
def right(tmp_path):
    """What every layout of these pictures must give."""
    pictures(tmp_path / "plain")
    texts(tmp_path / "plain")
    found, notes, _ = load(tmp_path / "plain")
    assert [caption for caption, _ in found] == sorted(CAPTIONS.values()) and not notes
    return found


LAYOUTS = {}


def layout(function):
    LAYOUTS[function.__name__.replace("_", " ")] = function
    return function


@layout
def one_metadata_jsonl(folder):
    pictures(folder)
    rows(folder / "metadata.jsonl")


@layout
def one_metadata_csv(folder):
    pictures(folder)
    rows(folder / "metadata.csv")


@layout
def a_csv_of_semicolons_with_a_mark(folder):
    pictures(folder)
    rows(folder / "metadata.csv")
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as handle:
        table = list(csv.reader(handle))
    with (folder / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as handle:
        csv.writer(handle, delimiter=";").writerows(table)


@layout
def metadata_below_the_named_folder(folder):
    pictures(folder / "train")
    rows(folder / "train" / "metadata.jsonl")


@layout
def two_metadata_files(folder):
    pictures(folder / "one", ["a.png", "b.jpg"])
    pictures(folder / "two" / "deep", ["c.png", "d.webp"])
    rows(folder / "one" / "metadata.csv", {"a.png": None, "b.jpg": None}, "caption")
    rows(folder / "two" / "metadata.jsonl", {"deep/c.png": "c.png", "deep/d.webp": "d.webp"}, "prompt")


@layout
def names_as_globs_and_windows_write_them(folder):
    pictures(folder / "images")
    rows(folder / "metadata.jsonl", {"./images/a.png": "a.png", "images\\b.jpg": "b.jpg", " images/c.png ": "c.png",
                                     "images//d.webp": "d.webp"})  # fmt: skip


@layout
def names_composed_in_the_table_and_decomposed_on_disk(folder):
    odd = {"ãé.png": "a.png", "ガ.jpg": "b.jpg", "c.png": "c.png", "d.webp": "d.webp"}
    for name, plain in odd.items():
        picture(folder / unicodedata.normalize("NFD", name), plain)
    rows(folder / "metadata.jsonl", odd)


@layout
def names_decomposed_in_the_table_and_composed_on_disk(folder):
    picture(folder / "ãé.png", "a.png")
    pictures(folder, ["b.jpg", "c.png"])
    picture(folder / "ガ.webp", "d.webp")
    rows(folder / "metadata.csv", {unicodedata.normalize("NFD", "ãé.png"): "a.png", "b.jpg": None, "c.png": None,
                                   unicodedata.normalize("NFD", "ガ.webp"): "d.webp"})  # fmt: skip


@layout
def a_picture_without_a_row_has_its_own_file(folder):
    pictures(folder)
    rows(folder / "metadata.jsonl", {"a.png": None, "b.jpg": None})
    texts(folder, names=["c.png", "d.webp"])


@layout
def an_empty_table_beside_text_files(folder):
    pictures(folder)
    texts(folder)
    (folder / "metadata.jsonl").write_text("\n")


@layout
def an_empty_caption_in_the_table_and_text_files(folder):
    pictures(folder)
    texts(folder)
    rows(folder / "metadata.jsonl", captions=dict.fromkeys(CAPTIONS, " "))


@layout
def kohyas_caption_files(folder):
    pictures(folder)
    texts(folder, ".caption")


@layout
def endings_in_capitals(folder):
    pictures(folder)
    texts(folder, ".TXT")


@layout
def the_pictures_ending_before_the_texts(folder):
    pictures(folder)
    for name, caption in CAPTIONS.items():
        (folder / f"{name}.txt").write_text(caption, "utf-8")


@layout
def pictures_in_folders_and_all_kinds_of_texts(folder):
    for n, name in enumerate(CAPTIONS):
        pictures(folder / f"{n}", [name])
        texts(folder / f"{n}", (".txt", ".caption", ".TXT", ".Caption")[n], [name])


@layout
def hidden_files_and_what_systems_leave(folder):
    pictures(folder)
    texts(folder)
    for junk in (".DS_Store", "Thumbs.db", "desktop.ini", "._a.png", ".cache/x.png", "__MACOSX/._a.png"):
        (folder / junk).parent.mkdir(exist_ok=True)
        (folder / junk).write_bytes(b"junk")


@layout
def a_link_to_a_folder(folder):
    pictures(folder, ["a.png", "b.jpg"])
    texts(folder, names=["a.png", "b.jpg"])
    other = folder.parent / "elsewhere"
    pictures(other / "deep", ["c.png", "d.webp"])
    texts(other / "deep", names=["c.png", "d.webp"])
    (folder / "more").symlink_to(other)
    (folder / "again").symlink_to(other / "deep")
    (other / "round").symlink_to(folder)


@layout
def a_link_to_a_folder_inside(folder):
    pictures(folder / "real")
    texts(folder / "real")
    (folder / "alias").symlink_to(folder / "real")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_captioned_pictures(tmp_path, right, name):
    (tmp_path / "set").mkdir()
    place = LAYOUTS[name](tmp_path / "set") or tmp_path / "set"
    found, notes, _ = load(place)
    assert found == right and notes == []


def test_where_both_speak_the_table_is_taken_and_it_is_said(tmp_path):
    pictures(tmp_path)
    rows(tmp_path / "metadata.jsonl")
    texts(tmp_path)
    (tmp_path / "a.txt").write_text("something else")
    (tmp_path / "c.txt").write_text("another thing")
    found, notes, about = load(tmp_path)
    assert [caption for caption, _ in found] == sorted(CAPTIONS.values())
    said = "captions differ in metadata.jsonl and .txt files; those in metadata.jsonl are taken: a.png, c.png"
    assert notes == [said]
    assert report.rows(about) == [
        {"what": "pictures with captions in metadata.jsonl", "how many": "4", "which": ""},
        {"what": said, "how many": "", "which": ""},
    ]


def test_of_two_tables_the_nearer_counts(tmp_path):
    pictures(tmp_path / "deep")
    rows(tmp_path / "deep" / "metadata.csv")
    rows(tmp_path / "metadata.jsonl", {"deep/a.png": "b.jpg"})
    found, notes, _ = load(tmp_path)
    assert [caption for caption, _ in found] == sorted(CAPTIONS.values())
    (said,) = notes
    assert "differ in deep/metadata.csv and metadata.jsonl; those in deep/metadata.csv are taken: deep/a.png" in said


def test_what_is_not_taken_is_named(tmp_path):
    pictures(tmp_path)
    texts(tmp_path)
    for name in ("notes.doc", "more.zip", "orphan.txt", "z.psd", "y.psd", "x.psd"):
        (tmp_path / name).write_text("x")
    rows(tmp_path / "metadata.jsonl", {"a.png": None, "x.psd": "b.jpg"})
    (tmp_path / "metadata.csv").write_text("tag,score\ncat,1\n")
    found, notes, about = load(tmp_path)
    assert len(found) == 4 and sorted(notes) == [
        "1 not taken, an archive inside, which must be unpacked there: more.zip",
        "1 not taken, named in metadata.jsonl but of a kind that isn't read: x.psd",
        "1 not taken, text beside no picture: orphan.txt",
        "1 not taken, without columns 'file_name' and 'text': metadata.csv",
        "3 not taken, neither a picture nor captions: notes.doc, y.psd, z.psd",
    ]
    table = report.rows(about)
    assert {"what": "not taken, text beside no picture", "how many": "1", "which": "orphan.txt"} in table
    assert {"what": "pictures with captions in .txt files", "how many": "3", "which": ""} in table
    assert {row["what"] for row in table if row["what"].startswith("not")} == {note[2:].split(":")[0] for note in notes}


def test_a_text_in_another_encoding_beside_a_picture_of_a_table_is_said(tmp_path):
    pictures(tmp_path)
    rows(tmp_path / "metadata.jsonl")
    (tmp_path / "a.txt").write_bytes("Löwe".encode("cp1252"))
    assert load(tmp_path)[1] == ["1 not taken, not in UTF-8: a.txt"]


@pytest.mark.parametrize("text, named", [
    ("file_name,text\na.png,a boat, asleep\n", "line 2 of '{}' has 3 columns, not 2; put text with commas into quotes"),
    ('file_name,text\na.png,"a boat\n', "line 2 of '{}' can't be read (unexpected end of data); mend it"),
    ("file_name,text\nnone.png,a boat\n", "names 'none.png', which is not there; add it or remove the line"),
    ("file_name,text\na.png,one\na.png,two\n", "line 3 of '{}' names 'a.png' a second time; keep one of its lines"),
])  # fmt: skip
def test_a_table_that_cannot_be_read_is_named_with_its_line(tmp_path, text, named):
    pictures(tmp_path)
    texts(tmp_path)
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(ValueError) as caught:
        data.load(tmp_path)
    assert named.format(tmp_path / "metadata.csv") in str(caught.value) and "\n" not in str(caught.value)


def test_a_link_around_the_data_set_is_not_followed(tmp_path):
    pictures(tmp_path / "set")
    texts(tmp_path / "set")
    picture(tmp_path / "other.png", "a.png")
    (tmp_path / "set" / "up").symlink_to("..")
    found, notes, _ = load(tmp_path / "set")
    assert len(found) == 4 and notes == ["1 not taken, links to a folder around the data set: up"]


@pytest.mark.parametrize("caption", ["\u200b\u200b", "\u200b \ufeff\n", "\u2060\xa0", "\0"])
def test_a_caption_that_shows_nothing_is_empty(tmp_path, caption):
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="the caption of 'a.png' is empty"):
        data.Example("a.png", caption, tmp_path / "a.png").check()


def test_names_are_shortened_so_that_pairs_stay_pairs():
    long = "猫" * 100
    one, text, both = (names.fitting(f"x/{long}{ending}") for ending in (".png", ".txt", ".png.txt"))
    assert one.removesuffix(".png") == text.removesuffix(".txt") == both.removesuffix(".png.txt")
    assert len(one.encode()) < 255 and one.startswith("x/猫") and names.fitting("x/猫.png") == "x/猫.png"
    assert names.fitting(f"{long}1.png") != names.fitting(f"{long}2.png")


def kohyas(folder: Path, first="10_style", second="4_more") -> None:
    for place, some in ((first, ["a.png", "b.jpg"]), (second, ["c.png", "d.webp"])):
        pictures(folder / place, some)
        texts(folder / place, names=some)


def test_kohyas_repeats_are_used_in_training_and_said(tmp_path):
    kohyas(tmp_path / "img")
    picture(tmp_path / "reg" / "1_person" / "a.png")
    (tmp_path / "reg" / "1_person" / "a.txt").write_text("a person")
    found, notes, about = load(tmp_path)
    assert [caption for caption, _ in found] == sorted(CAPTIONS.values())
    assert notes == [
        "1 not taken, kohya's pictures of the class (reg), which a style doesn't need: reg/1_person/a.png",
        "kohya's repeats are used, relative to each other: '10_style' 5, '4_more' 2; rename the folders to change that",
    ]
    examples = data.load(tmp_path, show=Notes())
    train = data.split(examples, 0)[0]
    assert [e.name for e in train] == [e.name for e in examples for _ in range(5 if "10_" in e.name else 2)]


def test_a_held_out_picture_comes_once_and_never_in_training(tmp_path):
    for n in range(12):
        file = tmp_path / ("7_a" if n % 2 else "2_b") / f"{n}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (n, 0, 0)).save(file)
        file.with_suffix(".txt").write_text(f"number {n}")
    examples = data.load(tmp_path, show=Notes())
    train, held = data.split(examples, 0.3)
    assert len(held) == len({e.digest for e in held}) >= 3 and not {e.digest for e in held} & {e.digest for e in train}
    for example in examples:
        times = 7 if example.name.startswith("7_") else 2
        assert train.count(example) == (0 if example in held else times)


def test_equal_repeats_change_nothing(tmp_path, right):
    kohyas(tmp_path / "set", "10_a", "10_b")
    found, notes, _ = load(tmp_path / "set")
    assert found == right
    assert notes == ["kohya's repeats are the same for all pictures ('10_a', '10_b'), so each counts once"]
    assert {e.repeats for e in data.load(tmp_path / "set", show=Notes())} == {1}


@pytest.mark.parametrize("names", [("2023_summer", "2024_winter"), ("10_style", "others"), ("0_a", "5_b")])
def test_other_numbers_are_no_repeats(tmp_path, right, names):
    kohyas(tmp_path / "set", *names)
    found, notes, _ = load(tmp_path / "set")
    assert found == right and notes == []
    assert {e.repeats for e in data.load(tmp_path / "set")} == {1}
