"""What a crop keeps, shown on the whole picture."""

import io

import numpy as np
from PIL import Image

from naruto_lora import data
from naruto_lora.show import compare, crops


def test_what_is_cut_away_is_pale_and_what_is_kept_is_not():
    shown = np.asarray(crops.kept(Image.new("RGB", (80, 40), "red"), (64, 64), 80))
    assert shown.shape == (80, 80, 3)
    assert (shown[:20] == 255).all() and (shown[60:] == 255).all()  # the sheet, above and below
    assert (shown[21:59, 21:59] == (255, 0, 0)).all()
    pale = (255, round(255 * crops.PALE), round(255 * crops.PALE))
    assert (shown[20:60, :20] == pale).all() and (shown[20:60, 60:] == pale).all()
    whole = np.asarray(crops.kept(Image.new("RGB", (80, 80), "red"), (64, 64), 80))
    assert (whole == (255, 0, 0)).all()
    strip = crops.kept(Image.new("RGB", (3000, 1), "red"), (64, 64), 80)
    assert strip.size == (80, 80)


def test_the_sheet_says_how_much_and_goes_by_the_recipe(plan, monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (80, 60), "red").save(buffer, "PNG")
    example = data.Example("a", "a", buffer.getvalue())
    labels = []
    monkeypatch.setattr(compare, "grid", lambda rows, found, size: labels.append((len(rows["data"]), found)))
    crops.cropped([example], plan)
    crops.cropped([example], plan.replace(buckets=True, resolution=256))
    buffer = io.BytesIO()
    Image.new("RGB", (60, 60), "red").save(buffer, "PNG")
    crops.cropped([data.Example("b", "b", buffer.getvalue())], plan)
    assert labels == [(1, ["25% cut away: a"]), (1, ["4% cut away: a"]), (1, ["b"])]


def test_a_sheet_holds_each_picture(examples, plan):
    assert crops.cropped(examples[0][:4], plan, size=64).width > 4 * 64
