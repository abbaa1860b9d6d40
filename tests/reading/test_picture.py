"""Pictures by named formats alone, never PostScript; whatever Pillow raises names the picture."""

import io
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

import naruto_lora
from naruto_lora import data, gallery
from naruto_lora.reading import picture
from naruto_lora.show import report
from naruto_lora.widgets.album import Album

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8))


def packed(kind="PNG", image=NOISE, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_chunk(name: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    whole = packed()
    return whole[:33] + struct.pack(">I", len(content)) + name + content + struct.pack(
        ">I", zlib.crc32(name + content)) + whole[33:]


@pytest.fixture
def ghostscript(tmp_path, monkeypatch) -> Path:
    """A file that a false Ghostscript on the PATH makes when it is run."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch '{tmp_path / 'was-run'}'\necho 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # so that Pillow looks for it again
    return tmp_path / "was-run"


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_postscript_program_called_png_is_refused_and_not_run(tmp_path, monkeypatch, ghostscript, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "cat.png").write_bytes(packed("EPS"))
    (folder / "cat.txt").write_text("a cat")
    place = folder if kind == "folder" else shutil.make_archive(str(tmp_path / "mine"), "zip", folder)
    with pytest.raises(ValueError, match="'cat.png' can't be read .no readable PNG, JPEG, .*TIFF.; replace"):
        data.load(place)
    for read in (picture.size, picture.upright):
        with pytest.raises(picture.UNREADABLE):
            read(packed("EPS"))
    assert not ghostscript.exists()


def test_own_pictures_are_png_or_jpeg_alone(tmp_path, ghostscript):
    """In the gallery, the album and the previews."""
    (tmp_path / "previews").mkdir()
    for kind in ("EPS", "BMP"):
        place, preview = tmp_path / "cat.png", tmp_path / "previews" / "step-000001-0.jpg"
        place.write_bytes(packed(kind))
        preview.write_bytes(packed(kind))
        with pytest.raises(ValueError, match="cat.png' has no readable settings"):
            gallery.settings(place)
        album = Album(tmp_path)
        album.sets["a"] = {"pictures": {"base": "cat.png"}}
        for read, argument in ((gallery.load, [place]), (album.pictures, "a")):
            with pytest.raises(OSError, match="no readable PNG or JPEG"):
                read(argument)
        assert report.previews(tmp_path) == {1: [None]}
    assert not ghostscript.exists()


@pytest.mark.parametrize("kind", picture.FORMATS)
def test_common_formats_are_read(kind):
    content = packed(kind)
    picture.check(content)
    assert picture.size(content) == (24, 40) and picture.upright(content).size == (40, 24)


def test_a_phones_jpeg_with_a_second_picture_is_read():
    content = packed("MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    picture.check(content)
    assert picture.upright(content).size == (40, 24)


@pytest.mark.parametrize("kind", ["EPS", "PPM", "PCX", "TGA", "ICO", "SGI", "DDS", "PDF"])
def test_rare_formats_are_refused(kind):
    for read in (picture.check, picture.size, picture.upright):
        with pytest.raises(OSError, match="no readable PNG, JPEG, WEBP, BMP, GIF or TIFF"):
            read(packed(kind))


def test_pillow_opens_pictures_in_one_place():
    """Where the formats are named."""
    root = Path(naruto_lora.__file__).parent
    found = {file.relative_to(root).as_posix() for file in root.rglob("*.py") if "Image.open(" in file.read_text()}
    assert found == {"reading/picture.py"}


def test_large_texts_and_profiles_of_image_editors_are_read():
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", "<x>" * 700_000, zip=True)
    for content in (packed(pnginfo=texts), packed(icc_profile=bytes(2_000_000))):
        picture.check(content)
        assert (np.asarray(picture.upright(content)) == np.asarray(NOISE)).all()


@pytest.mark.parametrize(
    "content, why",
    [
        (with_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(17 * 2**20))), "too large"),
        (packed()[:8] + struct.pack(">I", 3) + b"IHDR" + bytes(7), "Truncated IHDR"),
        (packed(exif=b"Exif\0\0no Exif"), "not a TIFF file"),
        (b"", "no readable PNG"),
    ],
)
def test_the_picture_is_named_whatever_pillow_raises(content, why):
    with pytest.raises(ValueError, match=f"the picture 'odd.png' can't be read .*{why}.*; replace or remove it"):
        data.Example("odd.png", "odd", content).check()


def test_an_orientation_that_is_no_number_is_none():
    entry = struct.pack("<HHI4s", 0x0112, 2, 2, b"6")  # the tag, text, its length, its letters
    content = packed("JPEG", exif=b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4))
    assert picture.size(content) == (24, 40) and picture.upright(content).size == (40, 24)
