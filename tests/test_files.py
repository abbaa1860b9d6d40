"""Atomic files."""

import os
import stat

import pytest
from safetensors.numpy import save_file

from naruto_lora import files


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
def test_a_copy_that_reads_back_differently_is_refused(tmp_path, monkeypatch, spoiled):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"0123456789")
    target.write_bytes(b"older")
    monkeypatch.setattr(files.shutil, "copyfile", lambda _, to: to.write_bytes(spoiled))
    with pytest.raises(OSError, match="does not read back as it was written"):
        files.copy_whole(source, target)
    assert target.read_bytes() == b"older" and sorted(tmp_path.iterdir()) == [source, target]


def test_a_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    path.write_text("old")
    monkeypatch.setattr(files, "flush", lambda temporary: seen.append((temporary.read_text(), path.read_text())))
    files.replace(path, lambda temporary: temporary.write_text("new"))
    assert seen == [("new", "old")] and path.read_text() == "new"


def test_a_failed_flush_raises_for_a_file_and_not_for_a_folder(tmp_path, monkeypatch):
    def fails(_):
        raise OSError(5, "Input/output error")

    (tmp_path / "file").write_text("content")
    monkeypatch.setattr(files.os, "fsync", fails)
    files.flush(tmp_path)  # as on Google Drive
    with pytest.raises(OSError, match="Input/output error"):
        files.flush(tmp_path / "file")


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_umasks_mode_whatever_wrote_it(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        files.replace(tmp_path / "a", lambda temporary: save_file({}, temporary))  # safetensors gives its own 0600
        save_file({}, tmp_path / "b")
        files.flush(tmp_path / "b")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"] == [mode, mode]


def test_a_disk_with_modes_of_its_own_is_written_all_the_same(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(files.Path, "chmod", fails)
    files.replace(tmp_path / "a", lambda temporary: temporary.write_text("x"))
    assert (tmp_path / "a").read_text() == "x"


def test_a_folder_that_two_processes_try_at_once_can_be_written(tmp_path, monkeypatch):
    whole = files.Path.write_bytes

    def removed_at_once(path, content):
        whole(path, content)
        path.unlink()

    monkeypatch.setattr(files.Path, "write_bytes", removed_at_once)
    files.make_folder(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
