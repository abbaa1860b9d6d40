"""The benchmark of what captions are worth: its arms differ in captions alone, its figures are paired."""

import numpy as np
import pytest
from benchmarks import captions

from naruto_lora import data
from naruto_lora.tiny import world


def test_arms_share_their_pictures_and_differ_in_their_captions(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = type("Options", (), {"out": tmp_path, "pictures": 12, "steps": 1, "prompts": 4})
    folders = captions.prepare(options)
    loaded = {arm: data.load(folder) for arm, folder in folders.items()}
    assert len({tuple(e.digest for e in examples) for examples in loaded.values()}) == 1
    true, own, none = ([e.caption for e in loaded[arm]] for arm in ("true", "captioner", "none"))
    assert true != own and set(none) == {""}
    assert [world.read_caption(text) for text in true] == [world.read_caption(text) for text in own]


@pytest.mark.slow
def test_one_training_is_measured(tmp_path):
    world.write_dataset(tmp_path / "set", 8, size=64)
    world.write_dataset(tmp_path / "holdout", 4, seed=1, size=64)
    options = type("Options", (), {"out": tmp_path, "steps": 1, "prompts": 2})
    found = captions.measured(options, tmp_path / "set", 0, "true")
    assert {what: len(values) for what, values in found.items()} == {"losses": 4, "attributes": 2, "style": 2}
    assert found["losses"].min() > 0


def test_changes_are_paired_with_the_true_captions():
    rng = np.random.default_rng(0)
    pictures = rng.uniform(0.1, 0.9, 40)  # they differ far more than captions do

    def run(shift):
        return {"losses": pictures + shift + rng.normal(0, 1e-4, 40), "attributes": np.ones(20), "style": np.zeros(20)}

    rows = captions.summary({"true": [run(0), run(0)], "captioner": [run(0)] * 2, "none": [run(0.01)] * 2})
    assert rows["none"]["losses, change"].startswith("+0.01") or "0.01" in rows["none"]["losses, change"]
    assert "attributes, change" in rows["captioner"] and "losses, change" not in rows["true"]
    assert rows["true"]["attributes right"] == "100.0%" and set(rows) == {"true", "captioner", "none",
                                                                          "true, another seed"}  # fmt: skip
