"""Odd lines and files of albums, favourites, votes and PNGs are skipped, and the rest is there."""

import json
import random
import zlib

import pytest
from PIL import Image, PngImagePlugin

from naruto_lora import gallery
from naruto_lora.widgets import album, viewer, votes

FILE = "known.png"
MORE = {"steps": 3, "guidance_scale": 5.0, "scheduler": "euler", "resolution": 8}
SET = {"id": "x", "prompt": "p", "seed": 1, "pictures": {"base": FILE}} | MORE
DEEP = b"[" * 100_000
ODD = {
    "not UTF-8": b'{"id": "\xff\xfe"}', "a list": b"[1, 2]", "null": b"null", "a number": b"5", "text": b'"x"',
    "deep": DEEP, "a deep object": b'{"a":' * 100_000, "NULs": b"\0" * 40, "a huge number": b"1" * 5000, "cut": b'{"id',
    **{f"{key}: {value}": json.dumps(SET | {key: value}).encode() for key, value in (
        ("pictures", []), ("pictures", ["a"]), ("pictures", None), ("pictures", 5), ("pictures", {}),
        ("pictures", {"base": 5}), ("pictures", {"base": None}), ("pictures", {"base": ["a"]}),
        ("pictures", {"base": "../outside.png"}), ("pictures", {"base": "\0"}), ("pictures", {"base": "n" * 999}),
        ("prompt", None), ("prompt", 5), ("seed", None), ("seed", "1"), ("id", ["x"]), ("id", None), ("id", {}),
        ("steps", "many"), ("guidance_scale", None), ("scheduler", 5), ("resolution", []))},
    **{f"no {key}": json.dumps({k: v for k, v in SET.items() if k != key}).encode()
       for key in ("id", "prompt", "seed", "pictures")},
}


def said():
    lines = []
    return lines, lambda text, wrong=False: lines.append(text)


@pytest.mark.parametrize("line", ODD.values(), ids=ODD)
def test_an_odd_line_of_an_album_is_skipped(tmp_path, line):
    kept = album.Album(tmp_path)
    names = [kept.add({"prompt": "é", "seed": seed} | MORE, {"base": Image.new("RGB", (8, 8))}) for seed in (1, 2)]
    Image.new("RGB", (8, 8)).save(tmp_path / FILE)
    Image.new("RGB", (8, 8)).save(tmp_path.parent / "outside.png")
    file = tmp_path / "sets.jsonl"
    first, second = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + line + b"\n" + second)
    again = album.Album(tmp_path)
    assert list(again.sets) == names
    shown = viewer.Viewer(again, said()[1])
    assert len(shown.history.options) == 2 and list(shown.shown) == ["base"]


def test_a_prompt_with_a_line_break_of_its_own_is_read_back(tmp_path):
    prompt = "one\u2028two\x85three\nfour"
    name = album.Album(tmp_path).add({"prompt": prompt, "seed": 1}, {"base": Image.new("RGB", (8, 8))})
    assert album.Album(tmp_path).sets[name]["prompt"] == prompt


def test_a_sets_settings_are_shown_as_far_as_it_has_them(tmp_path):
    kept = album.Album(tmp_path)
    kept.add({"prompt": "x", "seed": 7, "steps": 10**400, "guidance_scale": 5.5}, {"base": Image.new("RGB", (8, 8))})
    shown = viewer.Viewer(kept, said()[1])
    assert "seed 7, 1000" in shown.result.value and "0 steps, guidance 5.5<" in shown.result.value


@pytest.mark.parametrize("content, expected", [
    (b"null", set()), (b"5", set()), (b'"ab"', set()), (b'{"a": 1}', set()), (b"\xff", set()), (DEEP, set()),
    (b"", set()), (b'["a", ["b"], null, 5, "c"]', {"a", "c"}),
], ids=range(8))  # fmt: skip
def test_odd_favourites_are_skipped(tmp_path, content, expected):
    (tmp_path / "favourites.json").write_bytes(content)
    kept = album.Album(tmp_path)
    assert kept.favourites == expected
    kept.set_favourite("d")
    assert album.Album(tmp_path).favourites == expected | {"d"}


@pytest.mark.parametrize("line", [
    *(ODD[name] for name in ("not UTF-8", "a list", "null", "deep", "NULs")), b'{"vote": "a"}',
    b'{"pair": ["a"], "vote": "a"}', b'{"pair": {}, "vote": "a"}', b'{"pair": "a", "vote": ["a"]}',
    b'{"pair": "a", "vote": null}',
], ids=range(10))  # fmt: skip
def test_an_odd_line_of_votes_is_skipped(tmp_path, line):
    drawn = {name: [Image.new("RGB", (8, 8), (value, k, 0)) for k in range(3)] for name, value in (("a", 0), ("b", 9))}

    def begun():
        return votes.Votes(tmp_path / "votes.jsonl", drawn, ["x", "y", "z"], ("a", "b"), random.Random(0))

    first = begun()
    first.vote("left")
    with open(tmp_path / "votes.jsonl", "ab") as file:
        file.write(line + b"\n")
    second = begun()
    second.vote("equal")
    assert len(first.cast) == 1 and len(begun().cast) == 2 and set(first.cast.items()) < set(begun().cast.items())


def test_a_damaged_picture_is_said_and_the_other_sets_are_shown(tmp_path):
    kept = album.Album(tmp_path)
    names = [kept.add({"prompt": f"p{k}", "seed": k} | MORE, {"base": Image.new("RGB", (64, 64))}) for k in (1, 2)]
    file = tmp_path / kept.sets[names[1]]["pictures"]["base"]
    whole, (lines, say) = file.read_bytes(), said()
    for content in (whole[:60], b"", b"no picture", whole.replace(b"IDAT", b"IDAX")):
        lines.clear()
        file.write_bytes(content)
        shown = viewer.Viewer(kept, say)
        assert len(lines) == 1 and lines[0].startswith("This set's pictures can't be read ("), content[:20]
        assert not shown.shown
        shown.zoom.value = 400  # nothing half-shown is drawn again
        shown.older.click()
        assert list(shown.shown) == ["base"] and "p1" in shown.result.value


def test_titles_are_on_one_line_without_letters_that_steer(tmp_path):
    kept = album.Album(tmp_path)
    name = kept.add({"prompt": "a\x1b[31m \u202enam\nx", "seed": 1} | MORE, {"base": Image.new("RGB", (8, 8))})
    shown = viewer.Viewer(kept, said()[1])
    assert shown.history.options[0][0] == f"a[31m nam x, seed 1 ({name[:4]})"
    assert "a[31m nam x" in shown.result.value and kept.sets[name]["prompt"].startswith("a\x1b[31m \u202e")


CHUNKS = ["5", "[1]", "null", '"x"', "true", "{}", '{"prompt": "x"}', "[" * 100_000, "1" * 5000, "\\", ""]


@pytest.mark.parametrize("text", CHUNKS, ids=range(len(CHUNKS)))
def test_a_png_with_an_odd_chunk_has_no_settings(tmp_path, text):
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text(gallery.CHUNK, text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunk)
    with pytest.raises(ValueError, match="a.png' has no readable settings; use a PNG that gallery.save wrote"):
        gallery.settings(tmp_path / "a.png")
    assert not gallery._is_drawn(tmp_path / "a.png", {})


def test_a_png_with_any_damaged_byte_has_its_settings_or_none(tmp_path):
    picture = Image.new("RGB", (8, 8), "red")
    picture.info["settings"] = dict(prompt="x", seed=1, steps=3, scheduler="euler", guidance_scale=2.0, resolution=8,
                                    adapters={}, batch=[1, 0])
    gallery.save(picture, tmp_path / "a.png")
    assert gallery.settings(tmp_path / "a.png") == picture.info["settings"]
    whole, rng = (tmp_path / "a.png").read_bytes(), random.Random(0)
    for _ in range(300):
        spoilt = bytearray(whole)
        spoilt[rng.randrange(24, len(spoilt))] ^= rng.randrange(1, 256)
        (tmp_path / "b.png").write_bytes(_summed(bytes(spoilt)))
        try:
            assert gallery.settings(tmp_path / "b.png").keys() >= {"prompt", "batch"}
        except ValueError as error:
            assert "has no readable settings" in str(error)


def _summed(content: bytes) -> bytes:
    """The PNG with its chunks' checksums made anew."""
    done, at = content[:8], 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        done += content[at:end] + zlib.crc32(content[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return done
