"""Side by side: the geometry of sheets, the HTML of the slider and cards."""

import base64
import io
import random
import re
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from naruto_lora.show import compare

COLOURS = ("red", "lime", "blue", "yellow", "cyan", "magenta")


def plain(*colours, size=16):
    return [Image.new("RGB", (size, size), colour) for colour in colours]


def boxes(sheet):
    """{colour: its bounding box (left, top, right, bottom)} on the sheet."""
    pixels, found = np.asarray(sheet), {}
    for colour in COLOURS:
        ys, xs = np.nonzero((pixels == Image.new("RGB", (1, 1), colour).getpixel((0, 0))).all(-1))
        if len(xs):
            found[colour] = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    return found


@pytest.mark.parametrize("size", [40, 64, 256])
def test_each_picture_has_its_own_cell(size):
    sheet = compare.grid({"base": plain(*COLOURS[:3]), "a longer name": plain(*COLOURS[3:])}, ["x"] * 3, size)
    cells = boxes(sheet)
    assert len(cells) == 6
    assert all((right - left, bottom - top) == (size, size) for left, top, right, bottom in cells.values())
    lefts = sorted({box[0] for box in cells.values()})
    tops = sorted({box[1] for box in cells.values()})
    assert np.diff(lefts).tolist() == [size + compare.MARGIN] * 2 and np.diff(tops).tolist() == [size + compare.MARGIN]
    assert [cells[c][:2] for c in COLOURS] == [(x, y) for y in tops for x in lefts]
    border = np.asarray(sheet)
    assert all((edge == 255).all() for edge in (border[0], border[-1], border[:, 0], border[:, -1]))
    names = border[: tops[1] + size, : lefts[0]]
    assert (names[: tops[0] + size] < 128).any() and (names[tops[1] :] < 128).any()  # each row is labelled


def test_a_row_may_be_shorter_and_captions_may_be_missing():
    sheet = compare.grid({"base": plain("red", "lime"), "LoRA": plain("blue")}, size=64)
    assert set(boxes(sheet)) == {"red", "lime", "blue"}
    with_captions = compare.grid({"base": plain("red", "lime"), "LoRA": plain("blue")}, ["one", "two"], 64)
    assert with_captions.width == sheet.width and with_captions.height > sheet.height


@pytest.mark.parametrize("word", ["word ", "unbreakable"])
def test_long_captions_are_cut_and_stay_under_their_picture(word):
    size = 128
    rows = {"base": plain("red", "red")}
    short, long, longest = (compare.grid(rows, ["x", text], size) for text in ("y", word * 60, word * 600))
    left, top, right, bottom = boxes(long)["red"]
    assert short.width == long.width == longest.width and short.height < long.height == longest.height
    under = np.asarray(long)[bottom:] < 128
    ink = np.nonzero(under.any((0, 2)))[0]
    assert ink.max() < right + compare.MARGIN  # the second column's caption ends with its picture
    assert not under[:, left + size : left + size + compare.MARGIN].any()
    assert (np.asarray(long)[-1] == 255).all()


def test_previews_over_time_have_a_column_a_step_and_a_row_a_prompt():
    sheet = compare.over_time({90: plain("lime", "yellow"), 0: plain("red", "blue")}, ["a prompt", "word " * 30], 64)
    cells = boxes(sheet)
    assert all((right - left, bottom - top) == (64, 64) for left, top, right, bottom in cells.values())
    assert cells["red"][1] == cells["lime"][1] < cells["blue"][1] == cells["yellow"][1]
    assert cells["red"][0] == cells["blue"][0] < cells["lime"][0] == cells["yellow"][0]
    ink = np.asarray(sheet).max(-1) < 128
    assert ink[: cells["red"][1]].any() and ink[cells["red"][3] : cells["blue"][1]].any()  # steps, first prompt; second
    assert not ink[-1].any() and not ink[:, -1].any()


def test_of_many_steps_the_first_the_last_and_some_between_are_shown(monkeypatch):
    written = []
    monkeypatch.setattr(compare.ImageDraw.ImageDraw, "text", lambda pen, place, text, *_, **__: written.append(text))
    compare.over_time({step: plain("red") for step in range(0, 1000, 10)}, ["x"], 128)
    steps = [int(text.split()[1]) for text in written[:-1] if text.startswith("step")]
    assert len(steps) == 4 and steps[0] == 0 and steps[-1] == 990 and np.ptp(np.diff(steps)) <= 10
    written.clear()
    compare.over_time({0: plain("red"), 30: []}, ["x"], 64)  # the second was cut off before its picture
    assert written == ["step 0", "step 30", "x"]
    single = compare.over_time({0: plain("red")}, ["x"], 32)
    assert compare.over_time({0: plain("red")}, ["x", "never drawn"], 32).size == single.size
    with pytest.raises(ValueError, match="no previews to show"):
        compare.over_time({}, ["x"])


def test_models_are_columns_and_prompts_and_seeds_are_rows():
    drawn = {"base": plain("red", "lime"), "LoRA": plain("blue", "yellow")}
    sheet = compare.beside(drawn, ["a prompt"], per_prompt=2, size=64)
    cells = boxes(sheet)
    assert all((right - left, bottom - top) == (64, 64) for left, top, right, bottom in cells.values())
    assert cells["red"][1] == cells["blue"][1] < cells["lime"][1] == cells["yellow"][1]
    assert cells["red"][0] == cells["lime"][0] < cells["blue"][0] == cells["yellow"][0]
    ink = np.asarray(sheet).max(-1) < 128
    assert ink[: cells["red"][1]].any() and not ink[cells["red"][3] : cells["lime"][1]].any()  # labels and prompt
    with pytest.raises(ValueError):
        compare.beside({"base": plain("red"), "LoRA": []}, ["a prompt"])  # a picture is missing


def test_a_strip_breaks_into_rows_with_a_label_under_each():
    sheet = compare.strip(plain(*COLOURS[:5]), list("abcde"), "a prompt", size=64)
    cells, ink = boxes(sheet), np.asarray(sheet).max(-1) < 128
    assert sorted({box[1] for box in cells.values()}) == [cells["red"][1], cells["yellow"][1]]
    for left, _, right, bottom in cells.values():
        assert ink[bottom : bottom + 20, left:right].any()


@pytest.mark.parametrize("columns, size", [(2, 64), (3, 256), (4, 256)])
def test_a_sheets_letters_can_be_read_on_a_phone_and_nothing_is_cut(monkeypatch, columns, size):
    fonts, write = [], compare.ImageDraw.ImageDraw.text
    monkeypatch.setattr(compare.ImageDraw.ImageDraw, "text",
                        lambda pen, at, text, fill, font, **more: (fonts.append(font.size),
                                                                   write(pen, at, text, fill, font, **more))[1])
    words = "a caption of some length that says what is in the picture and how it is lit, twice " * 2
    sheet = compare.sheet([(words, plain(*COLOURS[:columns]))], ["a very long label of a model"] * columns, size)
    assert min(fonts) * 390 / sheet.width >= 11  # CSS px on a phone that is 390 px wide
    ink = np.asarray(sheet).max(-1) < 128
    edges = ink[:, :4], ink[:, -4:], ink[:3], ink[-3:]
    assert ink.any() and not any(edge.any() for edge in edges)


def test_small_pictures_are_enlarged_without_smoothing():
    checks = Image.fromarray(np.indices((8, 8)).sum(0).astype(np.uint8) % 2 * 255).convert("RGB")
    left, top = (compare.grid({"": plain("red")}, size=64).width - 64 - compare.MARGIN, compare.MARGIN)
    cell = np.asarray(compare.grid({"": [checks]}, size=64))[top : top + 64, left : left + 64]
    assert set(np.unique(cell)) == {0, 255}
    assert (cell[::8, ::8] == np.asarray(checks)).all()


def test_one_jpeg_is_shown(monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    compare.show(plain("red")[0])
    assert len(shown) == 1 and shown[0].data[:2] == b"\xff\xd8" and shown[0].format == "jpeg"


def embedded(html):
    """The pictures in the HTML, in order."""
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in re.findall(r"base64,([^\"]+)\"", html)]


def test_the_slider_holds_both_pictures_and_escapes_its_labels():
    html = compare.slider(*plain("red", "blue"), labels=("<b>&", 'x" onload="y'), size=64)
    after, before = embedded(html)
    assert before.size == after.size == (64, 64)
    assert before.getpixel((9, 9))[0] > 200 and after.getpixel((9, 9))[2] > 200
    assert "<b>" not in html and "&lt;b&gt;&amp;" in html and 'x" onload' not in html
    assert html.count("clip-path") == 1 and html.count("<input") == 1 and "http" not in html and "<script" not in html


def test_cards_name_and_escape_and_keep_large_pictures_large():
    html = compare.cards({"<i>": plain("red", size=600)[0], "small": plain("blue")[0]}, size=320)
    large, small = embedded(html)
    assert large.size == (600, 600) and small.size == (320, 320)  # zooming shows all pixels
    assert "<i>" not in html and html.count("&lt;i&gt;") == 2 and html.count("pixelated") == 1


def test_a_grids_captions_are_not_cut():
    for words in range(1, 40, 3):
        sheet = compare.grid({"a": [Image.new("RGB", (64, 64))]}, ["gypsy " * words], size=256)
        last = np.asarray(sheet.convert("L"))[-2:]
        assert (last == last.max()).all(), words


def slowly(text, font, width, lines=4):
    """`_filled` without its shortcut."""
    letters = len(text)
    while letters > 2:
        filled = textwrap.fill(text, letters, max_lines=lines, placeholder=" ...")
        if max(map(font.getlength, filled.split("\n"))) <= width:
            return filled
        letters = min(letters - 1, int(letters * 0.95))
    return text


@pytest.mark.parametrize("words", [1, 3, 30, 70, 300])
def test_a_caption_is_wrapped_and_cut_as_a_whole(words):
    font, rng = ImageFont.load_default(24), random.Random(words)
    for letters in ("il.", "abcdefgh", "WM", "少女é"):
        text = " ".join("".join(rng.choices(letters, k=rng.randint(1, 14))) for _ in range(words))
        filled = compare._filled(text, font, 800)
        if 2 < len(text) < 700:
            assert filled == slowly(text, font, 800), text
        if words == 300:  # it has its four lines, each as full as its next word allows
            lines = filled.split("\n")
            assert len(lines) == 4 and text.startswith(filled.replace("\n", " ").removesuffix(" ..."))
            assert all(500 < font.getlength(line) <= 800 for line in lines) and filled.endswith(" ...")


def test_a_caption_of_10000_words_costs_milliseconds():
    text = "word " * 10_000
    begun = time.process_time()
    sheet = compare.sheet([(text, plain("red", "lime"))] * 3, [text, "LoRA"], 256)
    assert time.process_time() - begun < 0.5
    assert sheet.size == compare.sheet([("word " * 90, plain("red", "lime"))] * 3, ["base", "LoRA"], 256).size


@pytest.mark.parametrize("text", ["", "a", "ab", "WWW", "少女", "W" * 2000])
def test_a_very_short_or_wide_caption_is_written(text):
    sheet = compare.beside({"base": plain("red"), "LoRA": plain("blue")}, [text], size=40)
    assert set(boxes(sheet)) == {"red", "blue"} and (np.asarray(sheet)[:, -1] == 255).all()


def test_labels_and_captions_are_on_one_line_without_letters_that_steer(monkeypatch):
    written, odd = [], "a\x1b[31m\nb \u202ec\ud800"
    monkeypatch.setattr(compare.ImageDraw.ImageDraw, "text", lambda pen, place, text, *_, **__: written.append(text))
    compare.grid({odd: plain("red")}, [odd], 256)
    compare.strip(plain("red"), [odd], odd, 256)
    assert set(written) - {""} == {"a[31m b c"}
    for html in (compare.cards({odd: plain("red")[0]}), compare.slider(*plain("red", "blue"), (odd, odd))):
        assert html.count("a[31m b c") >= 2 and not set(html) & set("\x1b\u202e\ud800")


def test_a_saved_sheet_is_whole_or_the_old_one(tmp_path, monkeypatch):
    place = tmp_path / "compare.jpg"
    compare.save(plain("red")[0], place)
    before = place.read_bytes()
    assert Image.open(io.BytesIO(before)).format == "JPEG"

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        compare.save(plain("blue")[0], place)
    assert place.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["compare.jpg"]
