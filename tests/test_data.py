"""Captioned pictures: folders, parquet, orientation and colour, the split, the crop."""

import hashlib
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from naruto_lora import data
from naruto_lora.data import Example
from naruto_lora.reading import picture


def packed(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def halves(mode="RGB", left="red", right="blue", size=(40, 20)):
    """A picture whose left and right halves differ, to see how it was rotated."""
    image = Image.new(mode, size, left)
    image.paste(Image.new(mode, (size[0] // 2, size[1]), right), (size[0] // 2, 0))
    return image


def corner(image, x=0.1, y=0.1):
    return image.getpixel((int(x * image.width), int(y * image.height)))


def test_a_folder_with_metadata_and_one_with_text_files_load_the_same(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "deep").mkdir(parents=True)
        halves().save(folder / "deep" / "b.png")
        halves(left="green").save(folder / "a.JPG")
    rows = [{"file_name": "deep/b.png", "text": "two"}, {"file_name": "a.JPG", "text": "one"}]
    (one / "metadata.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    (two / "deep" / "b.txt").write_text("two\n")
    (two / "a.txt").write_text("one")
    found = [[(e.name, e.caption) for e in data.load(folder)] for folder in (one, two)]
    assert found[0] == found[1] == [("a.JPG", "one"), ("deep/b.png", "two")]


def test_a_folder_of_parquet_loads_as_the_hub_would_give_it(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    images = [halves(), halves(left="green")]
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": packed(image), "path": None} for image in images], "text": ["one", "two"]},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    (tmp_path / "set" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    examples = data.load(tmp_path / "set")
    assert [e.caption for e in examples] == ["one", "two"]
    assert [e.source for e in examples] == [packed(image) for image in images]  # compressed, as stored
    assert examples[1].image().tobytes() == images[1].tobytes()


def test_a_picture_is_read_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated 90 degrees to the right
    image = Example("a", "a", packed(halves(), "JPEG", exif=exif, quality=100)).image()
    assert image.size == (20, 40)
    assert Example("a", "a", packed(halves(), "JPEG", exif=exif)).size() == (40, 20)  # height first, as in conditions
    assert Example("a", "a", packed(halves())).size() == (20, 40)
    assert corner(image, 0.5, 0.1)[0] > 200 and corner(image, 0.5, 0.9)[2] > 200  # left has become top


def see_through(mode) -> bytes:
    """A picture of 16 px, transparent in its left half and black in its right."""
    if mode == "P":
        image = Image.new("P", (16, 16), 0)
        image.putpalette([255, 0, 0, 0, 0, 0])
        image.paste(1, (8, 0, 16, 16))
        return packed(image, transparency=0)
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (8, 0, 16, 16))
    return packed(image.convert(mode))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(mode):
    read = Example("a", "a", see_through(mode)).image()
    assert (read.mode, read.getpixel((2, 8)), read.getpixel((12, 8))) == ("RGB", (255, 255, 255), (0, 0, 0))


def test_other_colour_modes_are_read_as_rgb():
    grey = Example("a", "a", packed(Image.new("L", (8, 8), 77))).image()
    assert (grey.mode, grey.getpixel((4, 4))) == ("RGB", (77, 77, 77))
    cmyk = Example("a", "a", packed(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)).image()
    red, green, blue = cmyk.getpixel((4, 4))
    assert cmyk.mode == "RGB" and red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize(
    "size, wide_high, ids",
    [
        ((120, 80), (96, 64), (80, 120, 0, 16, 64, 64)),  # landscape: cropped at the sides
        ((80, 120), (64, 96), (120, 80, 16, 0, 64, 64)),  # portrait: cropped at top and bottom
        ((64, 64), (64, 64), (64, 64, 0, 0, 64, 64)),
        ((16, 20), (64, 80), (20, 16, 8, 0, 64, 64)),  # small: enlarged, with its own size in the conditions
    ],
)
def test_crop_and_its_size_conditions(size, wide_high, ids):
    ramp = np.zeros((size[1], size[0], 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, size[0])[None].round()
    ramp[..., 1] = np.linspace(0, 255, size[1])[:, None].round()
    image, conditions = data.crop(Image.fromarray(ramp), 64)
    assert (image.size, conditions) == ((64, 64), ids)
    top, left = ids[2:4]
    expected = [255 * (left + 32) / wide_high[0], 255 * (top + 32) / wide_high[1], 0]
    assert np.abs(np.asarray(image)[32, 32] - expected).max() < 5
    assert abs(int(np.asarray(image)[32, 0, 0]) - 255 * left / wide_high[0]) < 8


def test_a_mirrored_picture_has_left_and_right_swapped():
    image = Example("a", "a", packed(halves()), mirrored=True).image()
    assert corner(image, 0.1)[2] == 255 and corner(image, 0.9)[0] == 255


def test_at_1024_px_buckets_are_sdxls():
    sizes = picture.buckets(1024)
    sdxl = {(512, 2048), (576, 1792), (704, 1472), (768, 1344), (896, 1152), (960, 1088), (1024, 1024)}  # its table
    assert sdxl <= set(sizes) and {size[::-1] for size in sizes} == set(sizes)


@pytest.mark.parametrize("resolution, unit, off", [(1024, 64, 0.02), (256, 16, 0.02), (1000, 56, 0.02), (64, 8, 0.04)])
def test_buckets_have_one_area_and_sides_that_divide(resolution, unit, off):
    sizes = picture.buckets(resolution)
    assert all(high % unit == wide % unit == 0 for high, wide in sizes)
    assert all(abs(high * wide / resolution**2 - 1) < off for high, wide in sizes)
    ratios = [high / wide for high, wide in sizes]
    assert 3.7 < max(ratios) <= 4 and min(ratios) == pytest.approx(1 / max(ratios))
    assert ratios == sorted(ratios) and len(set(ratios)) == len(ratios)


@pytest.mark.parametrize(
    "size, bucket",
    [
        ((500, 500), (1024, 1024)), ((1080, 1920), (768, 1344)), ((1920, 1080), (1344, 768)),
        ((100, 900), (512, 2048)), ((900, 100), (2048, 512)), ((97, 100), (1024, 1024)), ((3, 4), (896, 1152)),
    ],
)
def test_pictures_go_to_the_bucket_of_the_nearest_ratio(size, bucket):
    assert picture.bucket(size, 1024) == bucket


def test_crop_to_a_bucket_and_its_size_conditions():
    ramp = np.zeros((100, 200, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, 200)[None].round()
    image, conditions = data.crop(Image.fromarray(ramp), (48, 88))
    assert (image.size, conditions) == ((88, 48), (100, 200, 0, 4, 48, 88))  # 96 x 48 resized: cropped at the sides
    assert abs(int(np.asarray(image)[20, 0, 0]) - 255 * 4 / 96) < 5
    assert data.crop(Image.fromarray(ramp), (48, 104))[1] == (100, 200, 2, 0, 48, 104)  # 104 x 52 resized
    assert data.crop(Image.fromarray(ramp), (64, 64))[1] == data.crop(Image.fromarray(ramp), 64)[1]


def test_pixels_span_minus_one_to_one():
    stack = data.pixels([Image.new("RGB", (4, 6), "white"), Image.new("RGB", (4, 6), (0, 255, 0))])
    assert stack.shape == (2, 3, 6, 4) and stack.dtype.is_floating_point
    assert stack[0].min() == 1 and stack[1, 0].max() == -1 and stack[1, 1].min() == 1


@pytest.mark.parametrize("caption", ["", " \n", "\0", "\0 \0\n"])
def test_a_caption_without_a_letter_is_empty(caption):
    with pytest.raises(ValueError, match="the caption of 'a.png' is empty; write what"):
        Example("a.png", caption, packed(halves())).check()


def test_the_split_stays_when_pictures_are_added(pictures):
    examples = data.load(pictures)
    few = data.split(examples[:12], 0.3)
    all_ = data.split(examples[::-1], 0.3)
    assert set(few[0]) <= set(all_[0]) and set(few[1]) <= set(all_[1])
    assert len(all_[0]) + len(all_[1]) == 24 and all_[1]
    assert data.split(examples, 0) == (examples, [])


def test_the_split_takes_about_its_share_and_at_least_three():
    examples = [Example(str(n), "a", str(n).encode()) for n in range(2000)]
    for share in (0.03, 0.15):
        held = data.split(examples, share)[1]
        assert abs(len(held) - 2000 * share) < 4 * (2000 * share) ** 0.5
    assert [len(part) for part in data.split(examples[:7], 1e-9)] == [4, 3]


def test_the_held_out_pictures_are_always_the_same_ones():
    """By the SHA-256 of their bytes: a run that resumes under a newer version must keep its hold-out."""
    examples = [Example(str(n), "a", str(n).encode()) for n in range(40)]
    places = {e.name: int(hashlib.sha256(e.source).hexdigest()[:8], 16) / 2**32 for e in examples}
    train, held = data.split(examples, 0.2)
    assert [e.name for e in held] == [name for name, place in places.items() if place < 0.2]
    assert [e.name for e in train] == [name for name, place in places.items() if place >= 0.2]
    nearest = sorted(places, key=places.get)[:3]
    assert {e.name for e in data.split(examples, 1e-9)[1]} == set(nearest)


def test_a_split_must_leave_three_pictures_to_train_on():
    examples = [Example(str(n), "a", str(n).encode()) for n in range(6)]
    assert [len(part) for part in data.split(examples, 1e-9)] == [3, 3]
    with pytest.raises(ValueError, match="with holdout 1e-09, 2 of 5 pictures are left to train on, fewer than 3: add"):
        data.split(examples[:5], 1e-9)


def test_pictures_are_decoded_in_order_and_only_some_ahead():
    taken = []

    def rows():
        for n in range(100):
            taken.append(n)
            yield Example(str(n), "a", packed(halves(left=(n, 0, 0)))), 16

    decoded = data.decode_ahead(rows())
    first = next(decoded)
    assert len(taken) == data.AHEAD + 1 == 33
    assert (first.name, first.pixels.shape, first.pixels.dtype) == ("0", (16, 16, 3), np.uint8)
    assert first.time_ids == (20, 40, 0, 8, 16, 16)
    rest = list(decoded)
    assert [crop.name for crop in rest] == [str(n) for n in range(1, 100)]
    assert all(abs(int(crop.pixels[8, 0, 0]) - int(crop.name)) <= 1 for crop in rest)


def test_closing_the_decoder_leaves_the_rest_undecoded():
    def rows():
        yield from ((Example(str(n), "a", packed(halves())), 16) for n in range(34))
        raise AssertionError("nobody asked for this row")

    decoded = data.decode_ahead(rows())
    assert next(decoded).name == "0" and next(decoded).name == "1"
    decoded.close()
    assert list(decoded) == []


def test_a_picture_that_is_gone_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the picture '.*/gone\.png' is gone; restore it or load"):
        Example("gone.png", "a", tmp_path / "gone.png").read()


def test_pixels_keep_rows_columns_and_colours_in_their_places():
    image = Image.new("RGB", (3, 2))
    image.putpixel((2, 1), (255, 0, 51))
    stack = data.pixels([image])[0]
    assert stack[:, 1, 2].tolist() == pytest.approx([1, -1, -0.6]) and stack.sum() == pytest.approx(-18 + 2 + 0.4)


def test_captions_with_a_byte_order_mark_and_odd_line_ends_are_read(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    line = '{"file_name": "a.png", "text": "one\u2028two"}\r\n'
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode())
    assert [e.caption for e in data.load(tmp_path)] == ["one\u2028two"]


def test_hidden_files_and_folders_are_not_pictures(tmp_path):
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "folder.png").mkdir()
    for name in ("a.png", ".b.png", ".ipynb_checkpoints/a-checkpoint.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("one")
    assert [e.name for e in data.load(tmp_path)] == ["a.png"]


def test_a_fingerprint_changes_with_pictures_captions_and_their_order(examples):
    first, second = examples[0][:2]
    other = data.Example(first.name, "another caption", first.source)
    moved = data.Example("elsewhere.png", first.caption, first.read())
    assert re.fullmatch("[0-9a-f]{16}", data.fingerprint([first]))
    prints = [data.fingerprint(rows) for rows in ([first, second], [second, first], [other, second], [first])]
    assert len(set(prints)) == 4 and data.fingerprint([moved, second]) == prints[0]
