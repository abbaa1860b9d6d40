"""Files are whole or not there."""

import shutil
import zipfile

import pytest

from naruto_lora import data, files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    files.replace(path, lambda temporary: temporary.write_text("old"))

    def fails(temporary):
        temporary.write_text("half of the n")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        files.replace(path, fails)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    files.replace(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_copy_is_whole(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(range(256)) * 999)
    files.copy_whole(source, target)
    assert target.read_bytes() == source.read_bytes() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("spoiled", [b"x" * 10, b"0123456780"], ids=["another content", "one byte"])
def test_a_copy_that_reads_back_otherwise_is_refused(tmp_path, monkeypatch, spoiled):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"0123456789")
    target.write_bytes(b"older")
    monkeypatch.setattr(files.shutil, "copyfile", lambda _, to: to.write_bytes(spoiled))
    with pytest.raises(OSError, match="does not read back as it was written"):
        files.copy_whole(source, target)
    assert target.read_bytes() == b"older" and sorted(tmp_path.iterdir()) == [source, target]


def test_news_goes_to_who_shows_it_else_is_printed(capsys):
    told = []
    files.tell(type("Show", (), {"note": staticmethod(told.append)})(), "one")
    files.tell(None, "two")
    files.tell(print, "three")
    assert told == ["one"] and capsys.readouterr().out == "two\nthree\n"


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    path.write_text("old")
    monkeypatch.setattr(files, "flush", lambda temporary: seen.append((temporary.read_text(), path.read_text())))
    files.replace(path, lambda temporary: temporary.write_text("new"))
    assert seen == [("new", "old")] and path.read_text() == "new"


def test_a_flush_that_fails_is_told_of_a_file_and_not_of_a_folder(tmp_path, monkeypatch):
    def fails(_):
        raise OSError(5, "Input/output error")

    (tmp_path / "file").write_text("content")
    monkeypatch.setattr(files.os, "fsync", fails)
    files.flush(tmp_path)  # as Drive's
    with pytest.raises(OSError, match="Input/output error"):
        files.flush(tmp_path / "file")


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
    archive = zipped(tmp_path / "mine.zip", {"mine/a.png": b"1", "mine/a.txt": b"2", "__MACOSX/mine/._a.png": b"3"})
    folder = files.unzip(archive)
    assert sorted(p.name for p in folder.iterdir()) == ["a.png", "a.txt"] and folder.is_relative_to(cached)
    stamp = (folder / "a.png").stat().st_mtime_ns
    assert files.unzip(archive) == folder and (folder / "a.png").stat().st_mtime_ns == stamp
    assert [p.name for p in cached.iterdir()] == [folder.parent.name]  # nothing half unpacked is left


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "a/../../evil.png", "C:\\evil.png", "..\\evil.png"])
def test_a_zip_writes_nothing_outside(tmp_path, cached, name):
    folder = files.unzip(zipped(tmp_path / "mine.zip", {name: b"evil", "good.png": b"1", "good.txt": b"2"}))
    assert sorted(p.name for p in folder.rglob("*")) == ["good.png", "good.txt"]
    assert not list(tmp_path.rglob("*evil*"))


def test_a_zips_links_are_left_out(tmp_path, cached):
    link = zipfile.ZipInfo("link.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    folder = files.unzip(zipped(tmp_path / "mine.zip", {link: "/etc/passwd", "good.png": b"1"}))
    assert [p.name for p in folder.iterdir()] == ["good.png"]


def test_zips_that_are_damaged_or_too_large_are_told(tmp_path, cached, monkeypatch):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        files.unzip(tmp_path / "none.zip")
    (tmp_path / "broken.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="broken.zip' can't be unpacked"):
        files.unzip(tmp_path / "broken.zip")
    monkeypatch.setattr(files, "UNZIPPED", 100)
    with pytest.raises(ValueError, match="take a smaller one"):
        files.unzip(zipped(tmp_path / "large.zip", {"a.png": bytes(101)}))
    assert list(cached.iterdir()) == []


def test_a_zip_is_a_data_set(tmp_path, cached, pictures):
    archive = shutil.make_archive(str(tmp_path / "mine"), "zip", pictures)
    assert [e.digest for e in data.load(archive)] == [e.digest for e in data.load(pictures)]
