"""The sheet of pictures that may spoil a set."""

import io

import numpy as np
from PIL import Image

from naruto_lora import data
from naruto_lora.reading import faults
from naruto_lora.show import suspects


def example(name, colour, size=(40, 20)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return data.Example(name, "a", buffer.getvalue())


def test_each_fault_has_a_row_with_its_pictures_whole():
    red, blue = example("red.png", "red"), example("a-very-long-name-of-a-file-0001.png", "blue", (20, 40))
    found = [faults.Fault("of no picture", ""), faults.Fault("small", "", [red, blue], ["40 x 20 px", ""]),
             faults.Fault("odd", "", [red] * 12, [""] * 12)]  # fmt: skip
    sheet = suspects.sheet(found, size=64, most=4)
    assert sheet.width == 12 + 4 * (64 + 12) and sheet.height == 12 + 2 * (26 + 64 + 36 + 12)
    pixels = np.asarray(sheet)
    red_pixels = (pixels == [255, 0, 0]).all(2)
    assert red_pixels.sum() == 5 * 64 * 32 and (pixels == [0, 0, 255]).all(2).sum() == 64 * 32  # one of each; 4 of 12


def test_a_long_name_keeps_its_end():
    from PIL import ImageFont

    font = ImageFont.load_default(11)
    cut = suspects._cut("a-very-long-name-of-a-file-0001.png", font, 80)
    assert cut.startswith("a-") and cut.endswith(".png") and "…" in cut and font.getlength(cut) <= 80


def test_a_sound_set_says_so():
    sheet = suspects.sheet([faults.Fault("small", "")])
    assert np.asarray(sheet).min() < 100 and sheet.height < 60
