"""A data set in a zip: unpacked once, without hidden files, and nothing outside of its folder."""

import errno
import os
import shutil
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from naruto_lora import data
from naruto_lora.reading import archive


@pytest.fixture
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "naruto_lora"


def zipped(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in content.items():
            archive.writestr(name, text)
    return path


def test_a_zip_is_unpacked_once_and_its_single_folder_entered(tmp_path, cached):
    file = zipped(tmp_path / "mine.zip", {"mine/a.png": b"1", "mine/a.txt": b"2", "__MACOSX/mine/._a.png": b"3"})
    folder = archive.unzip(file)
    assert sorted(p.name for p in folder.iterdir()) == ["a.png", "a.txt"] and folder.is_relative_to(cached)
    stamp = (folder / "a.png").stat().st_mtime_ns
    assert archive.unzip(file) == folder and (folder / "a.png").stat().st_mtime_ns == stamp
    assert [p.name for p in cached.iterdir()] == [folder.parent.name]  # nothing half unpacked is left


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "a/../../evil.png", "C:\\evil.png", "..\\evil.png"])
def test_a_zip_writes_nothing_outside(tmp_path, cached, name):
    folder = archive.unzip(zipped(tmp_path / "mine.zip", {name: b"evil", "good.png": b"1", "good.txt": b"2"}))
    assert sorted(p.name for p in folder.rglob("*")) == ["good.png", "good.txt"]
    assert not list(tmp_path.rglob("*evil*"))


def test_a_zips_links_are_skipped(tmp_path, cached):
    link = zipfile.ZipInfo("link.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    folder = archive.unzip(zipped(tmp_path / "mine.zip", {link: "/etc/passwd", "good.png": b"1"}))
    assert [p.name for p in folder.iterdir()] == ["good.png"]


def test_zips_that_are_damaged_or_too_large_are_refused(tmp_path, cached, monkeypatch):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        archive.unzip(tmp_path / "none.zip")
    (tmp_path / "broken.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="broken.zip' can't be unpacked"):
        archive.unzip(tmp_path / "broken.zip")
    monkeypatch.setattr(archive, "MAX_UNZIPPED", 100)
    with pytest.raises(ValueError, match="use a smaller one"):
        archive.unzip(zipped(tmp_path / "large.zip", {"a.png": bytes(101)}))
    assert list(cached.iterdir()) == []


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_with_damaged_content_is_named(tmp_path, cached, method):
    file, content = tmp_path / "mine.zip", np.random.default_rng(0).bytes(5000)
    with zipfile.ZipFile(file, "w", method) as opened:
        opened.writestr("a.png", content)
    whole = file.read_bytes()
    start = 30 + len("a.png") + 9  # after the entry's header and the properties of LZMA
    for at in (start, start + 2000):
        file.write_bytes(whole[:at] + bytes(byte ^ 255 for byte in whole[at : at + 40]) + whole[at + 40 :])
        with pytest.raises(ValueError, match="mine.zip' can't be unpacked .*; zip it again") as caught:
            archive.unzip(file)
        assert "\n" not in str(caught.value) and "a.png" in str(caught.value)
    assert list(cached.iterdir()) == []


@pytest.mark.parametrize("names", [["x", "x/y"], ["x/y", "x"], ["a/" * 900 + "a.png"],
                                   ["a/" * 1500 + "a.png"]])
def test_a_zip_with_names_that_no_disk_takes_is_named(tmp_path, cached, names):
    with pytest.raises(ValueError, match="mine.zip' can't be unpacked .'.*': [A-Z].*; zip it again with") as caught:
        archive.unzip(zipped(tmp_path / "mine.zip", dict.fromkeys(names, b"1")))
    assert len(str(caught.value)) < 280 + len(str(tmp_path)) and list(cached.iterdir()) == []


def test_a_zip_whose_names_are_not_utf_8_is_named(tmp_path, cached):
    file = zipped(tmp_path / "mine.zip", {"é.png": b"1"})
    file.write_bytes(file.read_bytes().replace("é".encode(), b"\xff\xff"))
    with pytest.raises(ValueError, match="mine.zip' can't be unpacked"):
        archive.unzip(file)


def test_a_full_disk_and_a_folder_that_cannot_be_written_are_named(tmp_path, cached, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = zipped(tmp_path / "mine.zip", {"a.png": b"1"})
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extract", full)
        with pytest.raises(OSError, match="mine.zip' can't be unpacked into '.*' .No space left.*; make room there"):
            archive.unzip(file)
    assert list(cached.iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="into '.*file/naruto_lora' .Not a directory.; .* XDG_CACHE_HOME"):
        archive.unzip(file)


def test_what_killed_runs_left_half_unpacked_is_removed_after_an_hour(tmp_path, cached):
    for name, age in ((".unpacking-old", 3700), (".unpacking-new", 3500), ("0123456789abcdef", 10**6)):
        (cached / name).mkdir(parents=True)
        (cached / name / "a.png").write_bytes(b"1")
        os.utime(cached / name, (time.time() - age,) * 2)
    folder = archive.unzip(zipped(tmp_path / "mine.zip", {"a.png": b"1"}))
    assert {path.name for path in cached.iterdir()} == {".unpacking-new", "0123456789abcdef", folder.name}


def test_a_folder_that_is_being_unpacked_stays_young(tmp_path, cached, monkeypatch):
    ages, extract = [], zipfile.ZipFile.extract

    def slow(opened, entry, folder):
        ages.append(time.time() - folder.stat().st_mtime)
        extract(opened, entry, folder)
        os.utime(folder, (0, 0))  # as a file inside a folder leaves it

    monkeypatch.setattr(zipfile.ZipFile, "extract", slow)
    archive.unzip(zipped(tmp_path / "mine.zip", {"a.png": b"1", "b.png": b"1"}))
    assert max(ages) < 60


def test_a_refused_zip_leaves_nothing_and_is_named(tmp_path, cached):
    bomb = {"mine/bomb.png": bytes(10**6), "mine/bomb.txt": b"a bomb"}
    with pytest.raises(ValueError, match="'bomb.png' can't be read"):
        data.load(zipped(tmp_path / "bomb.zip", bomb))
    with pytest.raises(ValueError) as caught:
        data.load(zipped(tmp_path / "mine.zip", {"mine/a.png": b"1"}))
    assert f"the picture 'a.png' in '{tmp_path / 'mine.zip'}' has no caption" in str(caught.value)
    assert list(cached.iterdir()) == []


def test_an_interrupted_check_keeps_the_unpacked_zip(tmp_path, cached, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    file = zipped(tmp_path / "mine.zip", {"a.png": (tmp_path / "a.png").read_bytes(), "a.txt": b"one"})

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.Example, "check", interrupted)
        data.load(file)
    assert [e.read() for e in data.load(file)] == [(tmp_path / "a.png").read_bytes()]
    assert len(list(cached.iterdir())) == 1


def test_a_zip_is_a_data_set(tmp_path, cached, pictures):
    archive = shutil.make_archive(str(tmp_path / "mine"), "zip", pictures)
    assert [e.digest for e in data.load(archive)] == [e.digest for e in data.load(pictures)]


def test_a_home_that_cant_be_used_is_named_with_its_mend(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    file, closed = zipped(tmp_path / "mine.zip", {"a.png": b"1"}), tmp_path / "closed"
    (tmp_path / "file").write_text("no folder")
    (closed / ".cache").mkdir(parents=True)
    for home in (tmp_path / "file", "/proc"):
        monkeypatch.setenv("HOME", str(home))
        with pytest.raises(OSError, match=f"mine.zip' can't be unpacked into '{home}/.cache/naruto_lora' .*HOME to an"):
            archive.unzip(file)

    def refused(self):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setenv("HOME", str(closed))  # of another user, who hides it
    with monkeypatch.context() as patch, pytest.raises(OSError, match="closed/.cache/naruto_lora' .Permission denied"):
        patch.setattr(archive.Path, "is_file", lambda _: True)
        patch.setattr(archive.Path, "is_dir", refused)
        archive.unzip(file)
    monkeypatch.setattr(archive.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no name for this user")))
    with pytest.raises(OSError, match="no home folder to unpack '.*mine.zip' into; set XDG_CACHE_HOME to a folder"):
        archive.unzip(file)
