"""One reading of a data set, whatever its layout: each row builds one and must give the same captioned pictures."""

import csv
import io
import json
import tarfile
import unicodedata
import zipfile
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
def right(tmp_path, monkeypatch):
    """What every layout of these pictures must give."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
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


class Named(zipfile.ZipInfo):
    """A zip's entry whose name is in `encoding`, without the flag for UTF-8."""

    encoding = ""

    def _encodeFilenameFlags(self):
        return (self.filename.encode(self.encoding), 0) if self.encoding else super()._encodeFilenameFlags()


def zipped(folder: Path, names: dict[str, str], more=(), encoding="") -> Path:
    """A zip of `folder` whose entries are {name in the zip: file}; `encoding` writes names without the UTF-8 flag."""
    content = {name: (folder / file).read_bytes() for name, file in names.items()} | dict.fromkeys(more, b"junk")
    file = folder.parent / "set.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for name, written in content.items():
            entry = Named(name)
            entry.encoding = encoding
            archive.writestr(entry, written)
    return file


def captioned(folder: Path) -> dict[str, str]:
    """Pictures and metadata.jsonl in `folder`, as {name: name}."""
    pictures(folder)
    rows(folder / "metadata.jsonl")
    return {name: name for name in (*CAPTIONS, "metadata.jsonl")}


ODD = {"猫がいる.png": "a.png", "表ソ.jpg": "b.jpg", "c.png": "c.png", "十能.webp": "d.webp"}  # some bytes are '\\'


def oddly_named(folder: Path, encoding: str, odd=None, table=True) -> Path:
    odd = odd or ODD
    pictures(folder)
    texts(folder)
    rows(folder / "metadata.jsonl", odd)
    inside = {f"my set/{name}": plain for name, plain in odd.items()}
    if table:
        return zipped(folder, inside | {"my set/metadata.jsonl": "metadata.jsonl"}, encoding=encoding)
    ends = {f"my set/{name.rpartition('.')[0]}.txt": f"{plain[:1]}.txt" for name, plain in odd.items()}
    return zipped(folder, inside | ends, encoding=encoding)


@layout
def a_zip_two_folders_deep(folder):
    return zipped(folder, {f"content/x/{name}": name for name in captioned(folder)})


@layout
def a_zip_with_what_systems_leave(folder):
    inside = {f"x/{name}": name for name in captioned(folder)}
    return zipped(folder, inside, ["Thumbs.db", "x/.DS_Store", "__MACOSX/x/._a.png", ".DS_Store", "x/desktop.ini"])


@layout
def a_zip_with_backslashes(folder):
    return zipped(folder, {f"pics\\{name}": name for name in captioned(folder)})


@layout
def a_zip_of_a_hidden_folder(folder):
    return zipped(folder, {f".mine/{name}": name for name in captioned(folder)}, ["__MACOSX/._x"])


@layout
def a_zip_that_begins_with_a_point(folder):
    return zipped(folder, {f"./{name}": name for name in captioned(folder)})


@layout
def a_zip_with_colons(folder):
    odd = {"ratio 16:9, a boat.png": "a.png", "b: it.jpg": "b.jpg", "c.png": "c.png", "x:/d.webp": "d.webp"}
    odd = odd | {"deep:er/d.webp": odd.pop("x:/d.webp")}
    pictures(folder)
    rows(folder / "metadata.jsonl", odd)
    return zipped(folder, odd | {"metadata.jsonl": "metadata.jsonl"})


@layout
def a_japanese_zip(folder):
    return oddly_named(folder, "cp932")


@layout
def a_japanese_zip_of_texts(folder):
    return oddly_named(folder, "cp932", table=False)


@layout
def a_chinese_zip(folder):
    return oddly_named(folder, "gbk")


@layout
def a_zip_in_utf_8_without_the_flag(folder):
    return oddly_named(folder, "utf-8")


@layout
def a_zip_of_a_mac(folder):
    odd = {unicodedata.normalize("NFD", name): plain for name, plain in ODD.items()}
    place = oddly_named(folder, "utf-8", odd)
    rows(folder / "metadata.jsonl", ODD)
    with zipfile.ZipFile(place, "a") as archive:
        archive.writestr("my set/metadata.csv", "file_name,text\n")
    return place


@layout
def a_western_zip(folder):
    return oddly_named(folder, "cp437", {"é.png": "a.png", "ä ß.jpg": "b.jpg", "c.png": "c.png", "ñ.webp": "d.webp"})


def tarred(folder: Path, ending: str, mode: str) -> Path:
    file = folder.parent / f"set{ending}"
    with tarfile.open(file, mode) as archive:
        for name in captioned(folder):
            archive.add(folder / name, f"./data/{name}")
    return file


@layout
def a_tar(folder):
    return tarred(folder, ".tar", "w")


@layout
def a_tar_gz(folder):
    return tarred(folder, ".tar.gz", "w:gz")


@layout
def a_tgz_in_capitals(folder):
    return tarred(folder, ".TGZ", "w:gz")


@layout
def a_tar_xz(folder):
    return tarred(folder, ".tar.xz", "w:xz")


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


@pytest.mark.parametrize("encoding, table", [("", True), ("", False), ("utf-8", True), ("cp932", True)])
def test_long_names_in_a_zip_are_shortened_with_their_captions_and_it_is_said(tmp_path, right, encoding, table):
    odd = {f"{'猫' * 100}{name}": name for name in CAPTIONS}
    file = oddly_named(tmp_path / "set", encoding, odd, table)
    for _ in range(2):  # unpacked, and found unpacked
        found, notes, _ = load(file)
        assert found == right
        assert notes == ["4 names of more than 255 bytes are shortened on this disk"]


def test_what_an_archive_must_not_write_is_said(tmp_path, right):
    inside = captioned(tmp_path / "set")
    file = zipped(tmp_path / "set", inside, ["../x.png", "inner.zip", "C:\\y.png"])
    link = zipfile.ZipInfo("link.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    for _ in range(2):
        found, notes, _ = load(file)
        assert found == right and notes == [
            "1 not taken, links in the archive: link.png",
            "2 not taken, names that lead out of the folder: ../x.png, C:\\y.png",
            "1 not taken, an archive inside, which must be unpacked there: inner.zip",
        ]


def test_a_tar_writes_nothing_outside_and_follows_no_link(tmp_path, right):
    captioned(tmp_path / "set")
    file = tmp_path / "set.tar"
    with tarfile.open(file, "w") as archive:
        archive.add(tmp_path / "set", ".")
        for name in ("../evil.png", "/evil.png", "a/../../evil.png"):
            entry = tarfile.TarInfo(name)
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"evil"))
        for kind, name in ((tarfile.SYMTYPE, "a1.png"), (tarfile.LNKTYPE, "a2.png"), (tarfile.FIFOTYPE, "a3.png")):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
    found, notes, _ = load(file)
    assert found == right and not list(tmp_path.rglob("*evil*"))
    assert [note.split(":")[0] for note in notes] == [
        "3 not taken, links in the archive", "3 not taken, names that lead out of the folder",
    ]  # fmt: skip


def test_a_tar_that_holds_too_much_or_is_none_is_refused(tmp_path, right, monkeypatch):
    file = tarred(tmp_path / "set", ".tar.gz", "w:gz")
    monkeypatch.setattr("naruto_lora.reading.archive.MAX_UNZIPPED", 100)
    with pytest.raises(ValueError, match="the archive '.*set.tar.gz' holds .* use a smaller one"):
        data.load(file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="the archive '.*set.tar.gz' can't be unpacked"):
        data.load(file)
    assert list((tmp_path / "cache" / "naruto_lora").iterdir()) == []


def test_a_folder_that_an_older_version_unpacked_is_replaced(tmp_path, right):
    file = zipped(tmp_path / "set", captioned(tmp_path / "set"))
    load(file)
    (unpacked,) = (tmp_path / "cache" / "naruto_lora").iterdir()
    unpacked.rename(unpacked.with_suffix(""))
    assert load(file)[0] == right and [p.name for p in unpacked.parent.iterdir()] == [unpacked.name]


def parquet(file: Path, column="text", images=None, **more) -> Path:
    """The pictures of CAPTIONS as a .parquet file."""
    import datasets

    folder = next(place.parent for place in file.parents if place.name == "set") / "pictures"
    pictures(folder)
    images = [{"bytes": (folder / name).read_bytes(), "path": name} for name in CAPTIONS] if images is None else images
    file.parent.mkdir(parents=True, exist_ok=True)
    table = {"image": images, column: list(CAPTIONS.values())[: len(images)]} | more
    datasets.Dataset.from_dict(table).to_parquet(file)
    return file


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


@pytest.mark.parametrize("name, whole, said", [
    ("set/any.parquet", True, []),
    ("set/train-00000-of-00001.parquet", False, []),
    ("set/test-00000-of-00001.parquet", False, ["the split 'test' is taken: there is no 'train'"]),
    ("set/data/validation.parquet", False, ["the split 'validation' is taken: there is no 'train'"]),
])  # fmt: skip
@pytest.mark.parametrize("column", ["text", "caption"])
def test_parquet_of_any_split_and_as_one_file(tmp_path, right, hub_cache, name, whole, said, column):
    file = parquet(tmp_path / name, column)
    found, notes, about = load(file if whole else tmp_path / "set")
    assert found == right and notes == said and about.captions == {f"the column '{column}'": 4}


def test_other_splits_than_train_are_said_and_without_it_refused(tmp_path, right, hub_cache):
    for name in ("train", "test", "validation"):
        parquet(tmp_path / "set" / f"{name}-00000-of-00001.parquet")
    found, notes, _ = load(tmp_path / "set")
    assert found == right and notes == ["2 not taken, another split than 'train': test, validation"] or notes == [
        "2 not taken, another split than 'train': validation, test"]  # fmt: skip
    (tmp_path / "set" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match="has no split 'train', only .*; rename one, or set `dataset` to its file"):
        data.load(tmp_path / "set")


@pytest.mark.parametrize("place, said", [
    (".cache/index.parquet", []),
    ("index.parquet", ["1 not taken, a table without pictures and captions: index.parquet"]),
    ("broken.parquet", ["1 not taken, a table without pictures and captions: broken.parquet"]),
])  # fmt: skip
def test_a_stray_parquet_hides_no_pictures(tmp_path, right, hub_cache, place, said):
    import datasets

    captioned(tmp_path / "set")
    file = tmp_path / "set" / place
    file.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict({"text": ["one"]}).to_parquet(file)
    if "broken" in place:
        file.write_bytes(b"no parquet")
    found, notes, _ = load(tmp_path / "set")
    assert found == right and notes == said


@pytest.mark.parametrize("image, named", [
    ("https://example.com/a.png", "has no picture but the address 'https://example.com/a.png'; store the picture's"),
    ({"bytes": None, "path": None}, "has no picture; store its bytes, or remove the row"),
    ("none.png", "has no picture but names 'none.png', which is no file in its folder; store the picture's bytes"),
])  # fmt: skip
def test_rows_without_a_picture(tmp_path, hub_cache, image, named):
    file = parquet(tmp_path / "set" / "a.parquet", images=[image])
    for place in (file, file.parent):
        with pytest.raises(ValueError) as caught:
            data.load(place)
        assert str(caught.value).startswith(f"row 0 of '{place}' {named}")


@pytest.mark.parametrize("written", ["{} ", " {}\n", '"{}"', "'{}'", ' "{}" \r\n', "{}/", "~/set one"])
def test_a_path_as_it_is_pasted(tmp_path, right, monkeypatch, written):
    monkeypatch.setenv("HOME", str(tmp_path))
    captioned(tmp_path / "set one")
    assert load(written.format(tmp_path / "set one"))[0] == right


def test_a_path_that_has_quotes_is_itself(tmp_path, right):
    captioned(tmp_path / "'set' ")
    assert load(f"{tmp_path}/'set' ")[0] == right


@pytest.mark.parametrize("name, named", [
    ("a.rar", "is a .rar archive, which isn't read; unpack it and set `dataset` to its folder, or zip that"),
    ("a.7z", "is a .7z archive"),
    ("a.png", "is a single picture; set `dataset` to the folder that holds pictures and their captions"),
    ("a.txt", "is a single text; set `dataset` to the folder"),
    ("a.doc", "is no data set; set `dataset` to a folder, a .zip, .tar or .parquet file, or a hub id"),
])  # fmt: skip
def test_a_file_that_is_no_data_set(tmp_path, name, named):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError) as caught:
        data.load(str(tmp_path / name))
    assert str(caught.value).startswith(f"'{tmp_path / name}' {named}")


@pytest.mark.parametrize("path", ["/content/drive/MyDrive/set", "/content/drive/MyDrive/set.zip", "MyDrive/set",
                                  "drive/MyDrive/my set", '"/content/drive/My Drive/set"'])  # fmt: skip
def test_a_path_on_drive_while_it_is_not_mounted(path):
    with pytest.raises(FileNotFoundError, match="is on Google Drive, which is not mounted; switch `drive`") as caught:
        data.load(path)
    assert path.strip('"') in str(caught.value)


def test_a_mounted_drive_is_a_folder_like_others(tmp_path, right, monkeypatch):
    monkeypatch.setattr("naruto_lora.reading.layout.DRIVE", tmp_path / "drive")
    captioned(tmp_path / "drive" / "MyDrive" / "set")
    assert load(tmp_path / "drive" / "MyDrive" / "set")[0] == right
    with pytest.raises(FileNotFoundError, match="does not exist; check the path"):
        data.load(tmp_path / "drive" / "MyDrive" / "none")


def test_an_archive_that_holds_only_another_is_named(tmp_path, right):
    (tmp_path / "set").mkdir()
    file = zipped(tmp_path / "set", {}, ["inner.zip", "read me.md"])
    with pytest.raises(ValueError) as caught:
        data.load(file)
    assert str(caught.value).startswith(f"the data set '{file}' has no pictures; ")
    assert str(caught.value).endswith("; unpack 'inner.zip', which is inside")


def test_a_path_with_line_breaks_gives_one_line():
    with pytest.raises(FileNotFoundError) as caught:
        data.load("/no/such\nfolder\n")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content, named", [
    ("a boat".encode("utf-16-le"), "b.caption' is not in UTF-8; save it again as UTF-8"),
    ("a boat".encode("utf-16"), "b.caption' is not in UTF-8; save it again as UTF-8"),
    ("Löwe".encode("cp1252"), "b.caption' is not in UTF-8; save it again as UTF-8"),
    (bytes(8), "b.caption' is not in UTF-8"),
    ("\u200b\u200b".encode(), "the caption of 'b.jpg' is empty; write what the picture shows, or remove it"),
    (b"\xed\xa0\xbd", "b.caption' is not in UTF-8"),  # half a letter
])  # fmt: skip
@pytest.mark.parametrize("in_a_zip", [False, True])
def test_captions_that_are_no_text_are_refused_by_name(tmp_path, right, content, named, in_a_zip):
    pictures(tmp_path / "set")
    texts(tmp_path / "set", ".caption")
    (tmp_path / "set" / "b.caption").write_bytes(content)
    place = tmp_path / "set"
    if in_a_zip:
        place = zipped(place, {f"x/{file.name}": file.name for file in place.iterdir()})
    with pytest.raises(ValueError) as caught:
        data.load(place)
    said = str(caught.value)
    assert named in said and "\n" not in said and str(tmp_path / "cache") not in said


def test_a_letter_that_is_none_in_a_csv_is_refused(tmp_path):
    pictures(tmp_path)
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.png,a boat\n".encode("utf-16-le"))
    with pytest.raises(ValueError, match="metadata.csv' is not in UTF-8; save it again as UTF-8"):
        data.load(tmp_path)
