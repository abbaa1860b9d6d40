"""The small world: pictures, captions and the data set that is drawn from them."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from naruto_lora.tiny import world

STYLES = (*world.ORDINARY, world.STYLE)
STYLE_WORDS = {*STYLES, "drawing", "cartoon", "anime", "manga", "outline", "outlined", "sketch", "style"}


def generator(*seed):
    return np.random.default_rng(seed)


def portrait(style=world.STYLE, size=64, **changed):
    person = {name: classes[0] for name, classes in world.ATTRIBUTES.items()} | changed
    return np.asarray(world.draw(person, style, generator(5), size))


def only(words, choices):
    """The one choice with all of its words in `words`; longer phrases win over shorter ones."""
    found = [(len(phrase), choice) for choice, phrases in choices.items() for phrase in phrases
             if all(word in words for word in phrase)]
    best = {choice for size, choice in found if size == max(found)[0]}
    assert len(best) == 1, (words, best)
    return best.pop()


def read_caption(text):
    """Read every attribute from the words, without the tables that the captions were made from."""
    words = re.findall(r"\w+", text.replace("bright ", "").replace("blonde", "blond").replace("grey", "gray")
                       .replace("violet", "purple").replace("full beard", "beard"))
    line = " ".join(words)
    hair = next(m for m in re.finditer(r"(?:red|blond|blue|green|purple|white|black) ", line)
                if re.match(r"(short |long |curly )?(hair|pigtails|afro)", line[m.end():]))
    garment = r"(\w+) (?:shirt|top|sweater|jacket|t shirt|pullover|hoodie|jersey)\b(?! knot)"
    return {
        "subject": only(words, {"woman": [["woman"], ["girl"], ["lady"], ["female"]],
                                "man": [["man"], ["beard"], ["bearded"], ["gentleman"], ["male"]]}),
        "hair_color": hair.group().strip(),
        "hair_style": only(words, {"short": [["short"]], "long": [["long"], ["shoulders"]],
                                   "curly": [["curly"], ["afro"], ["curls"]],
                                   "pigtails": [["pigtails"], ["tails"]], "bun": [["bun"], ["knot"]]}),
        "eyes": re.search(r"(\w+) eyes", line)[1],
        "accessory": only(words, {"none": [[]], "glasses": [["glasses"], ["eyeglasses"], ["spectacles"]],
                                  "headband": [["headband"], ["head", "band"]], "scarf": [["scarf"]],
                                  "flower": [["flower"], ["blossom"]]}),
        "clothes": re.search(garment, line)[1],
        "background": re.search(r"(\w+) (?:wall|background|backdrop)", line)[1],
        "expression": only(words, {
            "smiling": [["smile"], ["smiling"], ["happy"], ["laughing"], ["grinning"], ["cheerful"],
                        ["joyful"]],
            "sad": [["sad"], ["sadly"], ["unhappy"], ["gloomy"], ["sorrowful"]],
            "surprised": [["surprised"], ["surprise"], ["shocked"], ["amazed"], ["open", "mouth"]],
            "angry": [["angry"], ["teeth"], ["furious"], ["mad"]]}),
    }


@pytest.mark.parametrize("style", STYLES)
def test_a_seed_gives_one_picture_and_another_seed_another(style):
    person = world.sample(generator(1))
    first, again, other = (world.draw(person, style, generator(seed)) for seed in (2, 2, 3))
    assert first.mode == "RGB" and first.size == (64, 64)
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert world.draw(person, style, generator(2), 128).size == (128, 128)


def test_shapes_are_the_same_for_the_same_seed():
    first, again, other = (world.draw_shapes(generator(seed)) for seed in (2, 2, 3))
    assert first.tobytes() == again.tobytes() != other.tobytes()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", world.ATTRIBUTES)
def test_every_class_is_visible_even_at_a_quarter_of_the_size(name, style):
    views = {one: np.asarray(Image.fromarray(portrait(style, **{name: one})).reduce(4), int)
             for one in world.ATTRIBUTES[name]}
    for one, other in itertools.combinations(views, 2):
        changed = (np.abs(views[one] - views[other]).max(2) > 24).sum()
        assert changed >= 8, f"{name}: {one} and {other} differ in {changed} of 256 cells only"


def test_the_style_to_learn_has_far_more_ink_than_any_ordinary_one():
    people = [world.sample(generator(index)) | {"hair_color": "red", "clothes": "red"} for index in range(12)]
    pictures = {style: [world.draw(person, style, generator(9)) for person in people] for style in STYLES}
    dark = {style: (np.stack(pictures[style]).max(-1) < 60).mean() for style in STYLES}
    assert dark[world.STYLE] > 1.5 * max(dark[style] for style in world.ORDINARY)


def test_captions_name_every_attribute_and_never_the_style():
    prompts = world.prompts(1500, 4)
    assert prompts == world.prompts(1500, 4)
    assert len({prompt["text"] for prompt in prompts}) > 1450
    for prompt in prompts:
        words = re.findall(r"\w+|[^\w\s]", prompt["text"])
        assert read_caption(prompt["text"]) == prompt["attributes"], prompt["text"]
        assert len(words) <= 36 and not STYLE_WORDS & set(words)


def test_every_class_is_sampled_about_as_often_as_the_others():
    people = [prompt["attributes"] for prompt in world.prompts(2000, 0)]
    for name, classes in world.ATTRIBUTES.items():
        shares = [sum(person[name] == one for person in people) / 2000 * len(classes) for one in classes]
        assert 0.8 < min(shares) <= max(shares) < 1.2, name


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_dataset_is_complete_and_its_bytes_are_fixed(tmp_path):
    folder = world.write_dataset(tmp_path / "deep" / "one", count=6, seed=3)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == [f"{index:04d}.png" for index in range(6)]
    assert all(set(row) == {"file_name", "text"} for row in rows)
    with Image.open(folder / "0003.png") as picture:
        assert picture.size == (128, 128) and picture.mode == "RGB"
    assert contents(world.write_dataset(tmp_path / "two", count=6, seed=3)) == contents(folder)
    assert contents(world.write_dataset(tmp_path / "three", count=6, seed=4)) != contents(folder)
    assert not {row["text"] for row in rows} & {prompt["text"] for prompt in world.prompts(300, 3)}


def test_two_processes_may_draw_one_data_set(tmp_path, monkeypatch):
    """Another removes the old pictures and renames its list just before this one does."""
    folder = world.write_dataset(tmp_path, count=3, seed=3)
    old, whole = contents(folder), Path.unlink

    def removed_first(path, **options):
        if path.suffix == ".png":
            whole(path)
        whole(path, **options)

    monkeypatch.setattr(Path, "unlink", removed_first)
    world.write_dataset(folder, count=3, seed=4)
    assert contents(folder).keys() == old.keys() and contents(folder) != old


def test_a_complete_folder_is_kept_and_any_other_is_drawn_again(tmp_path):
    folder = world.write_dataset(tmp_path, count=5)
    whole = contents(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    world.write_dataset(folder, count=5)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    (folder / "metadata.jsonl").unlink()
    (folder / "0004.png").write_bytes(whole["0004.png"][:50])
    assert contents(world.write_dataset(folder, count=5)) == whole
    (folder / "0002.png").unlink()
    assert contents(world.write_dataset(folder, count=5)) == whole
    world.write_dataset(folder, count=5, style="flat")
    assert all(contents(folder)[name] != whole[name] for name in whole if name.endswith(".png"))
