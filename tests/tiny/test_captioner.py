"""The picture world's captioner against the truth, through the whole way that captions take."""

import pytest

from naruto_lora import data
from naruto_lora.captioning import write
from naruto_lora.tiny import world

CAPTIONER = "naruto_lora.tiny.captioner"


def without_captions(folder, count, style=world.STYLE):
    """A folder of `count` unseen drawings without captions, and what each shows."""
    world.write_dataset(folder, count=count, seed=77, style=style)
    truth = {e.name: world.read_caption(e.caption) for e in data.load(folder)}
    (folder / "metadata.jsonl").unlink()
    return truth


@pytest.mark.parametrize("style", [world.STYLE, world.ORDINARY[0]])
def test_attributes_of_unseen_drawings_are_named_rightly(tmp_path, style):
    truth = without_captions(tmp_path, 150, style)
    report = write.caption(tmp_path, CAPTIONER)
    assert (report.made, report.cleaned, report.silent) == (150, 0, [])
    named = {e.name: world.read_caption(e.caption) for e in data.load(tmp_path)}
    right = [named[name][attribute] == value for name, shown in truth.items() for attribute, value in shown.items()]
    assert len(right) == 150 * 8 and sum(right) >= 0.99 * len(right)


def test_captions_vary_in_words_and_are_the_same_again(tmp_path):
    without_captions(tmp_path, 12)
    write.caption(tmp_path, CAPTIONER)
    first = [e.caption for e in data.load(tmp_path)]
    for file in tmp_path.glob("*.txt"):
        file.unlink()
    (tmp_path / "captions.jsonl").unlink()
    write.caption(tmp_path, CAPTIONER)
    assert [e.caption for e in data.load(tmp_path)] == first and len(set(first)) == 12
