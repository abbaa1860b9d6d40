"""Folders of pictures with any metadata and captions: loaded whole, or refused in one sentence."""

import io
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from fuzzing import JSON, TEXTS, fuzzed, refused, spoilt
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from naruto_lora import data, recipe

NAMES = ["a.png", "b.png", "deep/c.png"]


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((12, 9), 40).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = _picture()
ROW = st.one_of(
    st.builds(lambda name, text: {"file_name": name, "text": text}, st.sampled_from(NAMES), TEXTS),
    st.dictionaries(st.sampled_from(["file_name", "text", "x"]), st.one_of(JSON, st.sampled_from(NAMES)), max_size=3),
    JSON,
)  # fmt: skip
WHOLE = [{"file_name": name, "text": f"caption {name}"} for name in NAMES]
LINES = st.one_of(
    st.lists(ROW, max_size=5), st.lists(ROW, max_size=2).map(lambda rows: [*WHOLE, *rows]), st.permutations(WHOLE)
).map(lambda rows: "\n".join(json.dumps(row) for row in rows).encode())
BYTES = st.one_of(LINES, LINES.flatmap(spoilt), st.binary(max_size=80), st.integers(1, 9000).map(lambda n: b"[" * n))
CELL = st.one_of(st.sampled_from([*NAMES, "file_name", "text", '"', '"a,b"', "\n", "\r", "\ufeff"]), TEXTS)
TABLE = st.lists(st.lists(CELL, max_size=4).map(",".join), max_size=5).map(
    lambda rows: "\n".join(["file_name,text", *rows]).encode("utf-8", "surrogatepass"))  # fmt: skip
CAPTION = st.one_of(st.binary(max_size=30), TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")),
                    st.sampled_from(["utf-16", "utf-8-sig", "cp1252"]).map("café".encode))  # fmt: skip


@pytest.fixture(scope="module")
def place():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def write(place: Path, names=NAMES) -> Path:
    """A new folder with the pictures `names`."""
    folder = place / "set"
    shutil.rmtree(folder, ignore_errors=True)
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PICTURE + bytes([number]))
    return folder


def check(examples: list[data.Example], names=NAMES) -> None:
    """Fails unless each picture is there once, with a caption that can be encoded."""
    assert sorted(example.name for example in examples) == sorted(names)
    assert all(example.caption.strip() and example.caption.encode() is not None for example in examples)
    assert len(data.fingerprint(examples)) == 16 and all(example.size() == (9, 12) for example in examples)


@given(BYTES)
@fuzzed(0.07)
def test_any_metadata(place, content):
    folder = write(place)
    (folder / "metadata.jsonl").write_bytes(content)
    with refused():
        check(data.load(folder))


@given(TABLE, st.booleans())
@fuzzed(0.02)
def test_any_table_of_captions(place, content, beside):
    folder = write(place)
    (folder / "metadata.csv").write_bytes(content)
    for name in NAMES if beside else ():
        (folder / name).with_suffix(".txt").write_text("a caption")
    with refused():
        check(data.load(folder))


@given(CAPTION, CAPTION)
@fuzzed(0.03)
def test_any_captions_beside_pictures(place, first, second):
    folder = write(place)
    for name, caption in zip(NAMES, (first, second, b"third"), strict=True):
        (folder / name).with_suffix(".txt").write_bytes(caption)
    with refused():
        check(data.load(folder))


FILE_NAMES = st.one_of(
    st.binary(min_size=1, max_size=12), TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")[:240])
).map(lambda name: name.replace(b"/", b"_").replace(b"\0", b"_") + b".png")


@given(FILE_NAMES, st.booleans())
@fuzzed(0.02)
def test_any_name_of_a_picture(place, name, beside):
    folder = write(place)
    (folder / os.fsdecode(name)).write_bytes(PICTURE)
    for file in folder.rglob("*.png") if beside else ():
        file.with_suffix(".txt").write_text("a caption")
    if not beside:
        rows = [{"file_name": path.relative_to(folder).as_posix(), "text": "x"} for path in folder.rglob("*.png")]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with refused():
        examples = data.load(folder)
        assert len(examples) in (3, 4) and len({example.name for example in examples}) == len(examples)


@given(spoilt(PICTURE))
@fuzzed(0.03)
def test_any_picture(place, content):
    folder = write(place)
    (folder / "a.png").write_bytes(content)
    for name in NAMES:
        (folder / name).with_suffix(".txt").write_text("a caption")
    with refused("a.png"):
        for example in data.load(folder):
            assert example.image().size == example.size()[::-1] and example.image().mode == "RGB"


@given(TEXTS)
@fuzzed(0.01)
def test_any_place_of_a_data_set(text):
    with refused():
        data.load(recipe.load("naruto-256", dataset=text.replace("/", "_")).dataset)
