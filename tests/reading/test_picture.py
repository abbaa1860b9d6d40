"""Pictures by named formats alone, never PostScript; whatever Pillow raises names the picture."""

import io
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps, PngImagePlugin

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
    with pytest.raises(ValueError, match="'cat.png' can't be read .no readable PNG, JPEG, .*TIFF.*; replace"):
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
def test_formats_that_pillow_decodes_itself_are_read(kind):
    smooth = Image.linear_gradient("L").resize((40, 24)).convert("RGB")
    content = packed(kind, smooth, **({"sizes": [(40, 24)]} if kind == "ICO" else {}))
    picture.check(content)
    assert picture.size(content) == (24, 40)
    assert np.abs(np.asarray(picture.upright(content), int) - np.asarray(smooth, int)).max() < 24  # some are lossy


def test_heic_is_read_with_pillow_heif_and_named_without(monkeypatch):
    header = b"\0\0\0\x1cftypheic" + bytes(20)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match="'a.heic' can't be read .a HEIC picture: install the package pillow-heif, or"):
        data.Example("a.heic", "a", header).check()
    monkeypatch.undo()
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    smooth = Image.linear_gradient("L").resize((40, 24)).convert("RGB")
    content = packed("HEIF", smooth, quality=95)
    picture.check(content)
    assert picture.size(content) == (24, 40)
    assert np.abs(np.asarray(picture.upright(content), int) - np.asarray(smooth, int)).max() < 24


def test_an_older_pillow_that_lacks_a_format_reads_the_others(monkeypatch):
    monkeypatch.delitem(Image.OPEN, "AVIF")
    assert picture.size(packed()) == (24, 40)
    with pytest.raises(OSError, match="no readable PNG"):
        picture.size(packed("AVIF"))


GREY = np.tile(np.arange(64, dtype=np.uint16) * 4, (64, 1))  # a ramp in 8 bits


@pytest.mark.parametrize("kind, values", [
    ("PNG", GREY * 257), ("TIFF", GREY * 257), ("PPM", GREY * 257), ("JPEG2000", GREY * 257),
    ("TIFF", GREY.astype(np.int32) * 257), ("TIFF", GREY.astype(np.int32)),
    ("TIFF", (GREY / 255).astype(np.float32)), ("TIFF", GREY.astype(np.float32)),
])  # fmt: skip
def test_a_ramp_of_more_bits_equals_its_8_bit_twin(kind, values):
    content = packed(kind, Image.fromarray(values))
    assert Image.open(io.BytesIO(content)).mode in ("I", "F", "I;16")
    picture.check(content)
    assert (np.asarray(picture.upright(content)) == GREY[..., None]).all()


def test_values_beyond_every_range_are_stretched_and_holes_count_as_0():
    heights = np.linspace(-300, 9000, 4096, dtype=np.float32).reshape(64, 64)
    heights[0, 1] = np.nan
    found = np.asarray(picture.upright(packed("TIFF", Image.fromarray(heights))))[..., 0]
    assert found[0, 0] == 0 and found[-1, -1] == 255 and found[0, 1] == round(300 / 9300 * 255)
    assert np.ptp(np.asarray(picture.upright(packed("TIFF", Image.fromarray(np.full((9, 9), 7e4, np.float32)))))) == 0


def test_a_clear_grey_of_16_bits_is_white():
    content = packed("PNG", Image.fromarray(GREY * 257), transparency=16 * 257)
    row = np.asarray(picture.upright(content))[0, :, 0]
    assert row[4] == 255 and row[3] == 12 and row[5] == 20


def test_a_strip_of_one_pixel_is_cropped_in_megabytes():
    """Resized whole to 1024 px, it would take 9 GB."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30,) * 2)\n"
        "from PIL import Image; from naruto_lora.reading import picture\n"
        "strip = Image.new('RGB', (3000, 1)); strip.putpixel((1500, 0), (255, 0, 0))\n"
        "image, ids = picture.crop(strip, 1024)\n"
        "assert image.size == (1024, 1024) and ids == (1, 3000, 0, 1535488, 1024, 1024)\n"
        "assert image.getpixel((1000, 5))[0] > 200, image.getpixel((1000, 5))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_strip_keeps_what_the_crop_of_the_whole_would(monkeypatch):
    strip = Image.fromarray(np.random.default_rng(1).integers(0, 255, (8, 400, 3), np.uint8))
    whole, ids = picture.crop(strip, 64)
    monkeypatch.setattr(picture, "LARGE", 0)
    part, same = picture.crop(strip, 64)
    assert ids == same
    inner = np.s_[8:-8, 8:-8]  # Lanczos sees no neighbours beyond the edge of a part
    assert np.abs(np.asarray(whole, int)[inner] - np.asarray(part, int)[inner]).max() <= 2


def test_a_jpeg_of_hundreds_of_megapixels_is_reduced_and_another_kind_is_named(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    smooth = Image.linear_gradient("L").resize((320, 160))
    content = packed("JPEG", smooth)
    picture.check(content)
    assert picture.size(content) == (20, 40) and picture.upright(content).size == (40, 20)
    assert Image.MAX_IMAGE_PIXELS == 300
    with pytest.raises(ValueError, match="'big.png' can't be read .it has more than 179 million pixels: save it small"):
        data.Example("big.png", "big", packed("PNG", smooth)).check()


def test_a_phones_jpeg_with_a_second_picture_is_read():
    content = packed("MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    picture.check(content)
    assert picture.upright(content).size == (40, 24)


@pytest.mark.parametrize("kind", ["EPS", "SGI", "PDF", "MSP", "IM", "SPIDER"])
def test_other_formats_are_refused(kind):
    image = NOISE.convert({"MSP": "1", "SPIDER": "F"}.get(kind, "RGB"))
    for read in (picture.check, picture.size, picture.upright):
        with pytest.raises(OSError, match="no readable PNG, JPEG, WEBP, .* DDS or DIB"):
            read(packed(kind, image))


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
        (b"", "no readable PNG"),
    ],
)
def test_the_picture_is_named_whatever_pillow_raises(content, why):
    with pytest.raises(ValueError, match=f"the picture 'odd.png' can't be read .*{why}.*; replace or remove it"):
        data.Example("odd.png", "odd", content).check()


def exif(*entries: bytes) -> bytes:
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)


def tag(number: int, kind: int, count: int, value: bytes) -> bytes:
    return struct.pack("<HHI4s", number, kind, count, value)


TURN = tag(0x0112, 3, 1, struct.pack("<HH", 6, 0))  # orientation 6: turned by a quarter
HEX = b"raw profile type exif\0\0" + zlib.compress(b"\nexif\n       8\nnot hexadecimal\n")


@pytest.mark.parametrize("content, turned", [
    (packed("JPEG", exif=exif(TURN)), True),
    (packed("PNG", exif=exif(TURN)), True),
    (packed("TIFF", exif=exif(TURN)[6:]), True),
    (packed("JPEG", exif=exif(TURN, tag(0x8769, 4, 1, b"\xff\xff\xff\x7f"))), True),  # and a folder beyond the end
    (packed("JPEG", exif=exif(tag(0x010F, 2, 10**6, b"\xff\xff\0\0"), TURN)), True),  # and a text beyond the end
    (packed("JPEG", exif=exif(tag(0x0112, 3, 1, struct.pack("<HH", 9, 0)))), False),  # there is no orientation 9
    (packed("JPEG", exif=exif(tag(0x0112, 2, 2, b"6"))), False),  # a text
    (packed(exif=b"Exif\0\0no Exif"), False),
    (with_chunk(b"eXIf", b"junk"), False),
    (with_chunk(b"zTXt", HEX), False),
])  # fmt: skip
def test_a_picture_that_decodes_is_taken_upright_also_where_its_exif_is_damaged(content, turned):
    data.Example("a.png", "a", content).check()
    shape = (40, 24) if turned else (24, 40)
    assert picture.size(content) == shape and picture.upright(content).size == shape[::-1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation):
    about = Image.Exif()
    about[0x0112] = orientation
    content = packed("PNG", exif=about)
    with Image.open(io.BytesIO(content)) as image:
        expected = ImageOps.exif_transpose(image)
    found = picture.upright(content)
    assert found.size[::-1] == picture.size(content) and (np.asarray(found) == np.asarray(expected)).all()
