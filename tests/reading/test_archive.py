"""A data set in a zip: unpacked once, without hidden files, and nothing outside of its folder."""

import shutil
import zipfile

import pytest

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


def test_a_zip_is_a_data_set(tmp_path, cached, pictures):
    archive = shutil.make_archive(str(tmp_path / "mine"), "zip", pictures)
    assert [e.digest for e in data.load(archive)] == [e.digest for e in data.load(pictures)]
