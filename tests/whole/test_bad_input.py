"""Whatever is wrong: one clear sentence with its name and the fix, before any training."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from naruto_lora import data, files, models, pipeline, recipe, train


def sentence(caught) -> str:
    """The message, which must be one short line."""
    text = str(caught.value)
    assert "\n" not in text and 20 < len(text) < 280, text
    return text


class Folder:
    """Two good pictures of noise with captions; each method below spoils something."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir()
        for name in ("a", "b"):
            pixels = np.random.default_rng(ord(name)).integers(0, 255, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(path / f"{name}.jpg")
        self.write({"file_name": "a.jpg", "text": "one"}, {"file_name": "b.jpg", "text": "two"})

    def write(self, *rows, raw=""):
        (self.path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + raw)

    def empty(self):
        for file in self.path.iterdir():
            file.unlink()

    def truncate(self):
        picture = self.path / "b.jpg"
        picture.write_bytes(picture.read_bytes()[:-300])

    def no_picture(self):
        (self.path / "b.jpg").write_text("hello")

    def no_line(self):
        self.write({"file_name": "a.jpg", "text": "one"})

    def no_text_file(self):
        (self.path / "metadata.jsonl").unlink()
        (self.path / "a.txt").write_text("one")

    def blank(self):
        self.write({"file_name": "a.jpg", "text": "one"}, {"file_name": "b.jpg", "text": "  "})

    def null(self):
        self.write({"file_name": "a.jpg", "text": "one"}, {"file_name": "b.jpg", "text": None})

    def number(self):
        self.write({"file_name": "a.jpg", "text": "one"}, {"file_name": "b.jpg", "text": 5})

    def other_encoding(self):
        self.no_text_file()
        (self.path / "b.txt").write_bytes("Gem\xe4lde".encode("cp1252"))

    def absent(self):
        (self.path / "b.jpg").unlink()

    def broken(self):
        self.write({"file_name": "a.jpg", "text": "one"}, raw='{"file_name": "b.jpg", "te')

    def other_names(self):
        self.write({"file_name": "a.jpg", "text": "one"}, {"image": "b.jpg", "caption": "two"})

    def twice(self):
        self.write(*[{"file_name": f"{name}.jpg", "text": "one"} for name in "aba"])

    def number_as_name(self):
        self.write({"file_name": "a.jpg", "text": "one"}, {"file_name": 5, "text": "two"})

    def half_a_letter(self):
        self.write({"file_name": "a.jpg", "text": "one"}, {"file_name": "b.jpg", "text": "two \ud83d"})

    def half_a_letter_in_the_name(self):
        self.write({"file_name": "a\udce4.jpg", "text": "one"})

    def nul(self):
        self.write({"file_name": "a.jpg", "text": "one"}, {"file_name": "b.jpg", "text": "\0\0"})

    def nested(self):
        self.write({"file_name": "a.jpg", "text": "one"}, raw="[" * 100_000)

    def nested_caption(self):
        self.write({"file_name": "a.jpg", "text": "one"},
                   raw='{"file_name": "b.jpg", "text": ' + "[" * 900 + "]" * 900 + "}")

    def nul_text_file(self):
        self.no_text_file()
        (self.path / "b.txt").write_bytes(bytes(40))

    def utf_16(self):
        self.no_text_file()
        (self.path / "b.txt").write_bytes("a boat".encode("utf-16-le"))

    def list_line(self):
        self.write({"file_name": "a.jpg", "text": "one"}, raw='["b.jpg", "two"]')


@pytest.mark.parametrize(
    "spoil, kind, named",
    [
        ("empty", ValueError, ("has no pictures", ".png, .jpg")),
        ("truncate", ValueError, ("'b.jpg' can't be read", "truncated", "replace or remove")),
        ("no_picture", ValueError, ("'b.jpg' can't be read", "replace or remove")),
        ("no_line", ValueError, ("'b.jpg'", "has no caption", "add one in metadata.jsonl")),
        ("no_text_file", ValueError, ("'b.jpg'", "has no caption", "'b.txt' beside it")),
        ("blank", ValueError, ("caption of 'b.jpg' is empty", "remove it")),
        ("null", ValueError, ("caption of 'b.jpg' is empty",)),
        ("number", ValueError, ("caption of 'b.jpg' is not text but 5",)),
        ("other_encoding", ValueError, ("b.txt' is not in UTF-8",)),
        ("absent", ValueError, ("names 'b.jpg', which is not there", "remove the line")),
        ("broken", ValueError, ("line 2 of", "metadata.jsonl", "'file_name' and 'text'")),
        ("other_names", ValueError, ("line 2 of", "'file_name' and 'text'")),
        ("twice", ValueError, ("line 3 of", "metadata.jsonl' names 'a.jpg' a second time; keep one")),
        ("number_as_name", ValueError, ("line 2 of", "'file_name' that is not text but 5")),
        ("half_a_letter", ValueError, ("line 2 of", "metadata.jsonl' holds '\\ud83d', which is no letter")),
        ("half_a_letter_in_the_name", ValueError, ("line 1 of", "metadata.jsonl' holds '\\udce4'")),
        ("nul", ValueError, ("line 2 of", "metadata.jsonl' holds '\\x00', which is no letter")),
        ("nested", ValueError, ("line 2 of", "metadata.jsonl' must be one JSON object")),
        ("nested_caption", ValueError, ("caption of 'b.jpg' is not text but [[[", "make it text")),
        ("nul_text_file", ValueError, ("b.txt' is not in UTF-8; save it again",)),
        ("utf_16", ValueError, ("b.txt' is not in UTF-8",)),
        ("list_line", ValueError, ("line 2 of", "'file_name' and 'text'")),
    ],
)
def test_data(tmp_path, spoil, kind, named):
    folder = Folder(tmp_path / "set")
    assert len(data.load(folder.path)) == 2
    getattr(folder, spoil)()
    with pytest.raises(kind) as caught:
        data.load(folder.path)
    assert all(part in sentence(caught) for part in named), caught.value


@pytest.mark.parametrize("dataset", ["no-such-folder", "/no/such/folder", "no/such/folder"])
def test_a_missing_folder(dataset):
    with pytest.raises(FileNotFoundError, match="does not exist; check the path") as caught:
        data.load(dataset)
    assert f"'{dataset}'" in sentence(caught)


def test_no_data_set_at_all():
    with pytest.raises(FileNotFoundError, match="`dataset` is empty; set it to a folder") as caught:
        data.load("")
    assert sentence(caught)


def test_a_data_set_that_is_not_on_the_hub():
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is no folder here, and can't be downl") as caught:
        data.load("nobody/nothing")
    assert "downloaded from the hub" in str(caught.value) and "check the name and the network" in sentence(caught)


def test_prompts_nested_too_deep(tmp_path):
    (tmp_path / "prompts.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="prompts.json' holds no prompts") as caught:
        pipeline.read_prompts(tmp_path / "prompts.json")
    sentence(caught)


def test_parquet_without_captions(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"image": ["x"], "label": [1]}).to_parquet(tmp_path / "set" / "a.parquet")
    with pytest.raises(ValueError, match="needs columns 'image' and 'text'; it has .*label") as caught:
        data.load(tmp_path / "set")
    sentence(caught)


def test_a_picture_that_disappears_later(tmp_path):
    folder = Folder(tmp_path / "set")
    examples = data.load(folder.path)
    folder.absent()
    with pytest.raises(FileNotFoundError, match="b.jpg' is gone; restore it") as caught:
        examples[1].image()
    sentence(caught)


def test_too_few_left_to_train_on(tmp_path):
    with pytest.raises(ValueError, match="0 of 2 pictures are left to train on, fewer than 3: add pictures") as caught:
        data.split(data.load(Folder(tmp_path / "set").path), 0.05)
    sentence(caught)


LEGS = ({"until": 300, "lr": 1e-4},)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"acumulation": 4}, "unknown recipe field 'acumulation': did you mean 'accumulation'?"),
        ({"learning_rate": 1e-4}, "unknown recipe field 'learning_rate'"),
        ({"legs": [{"until": 3, "rate": 1}]}, "unknown leg field 'rate'"),
        ({"legs": [{"until": 3, "shedule": "cosine", "lr": 1}]}, "did you mean 'schedule'?"),
        ({"legs": [{"until": 3}]}, "leg is incomplete: missing 1 required positional argument: 'lr'"),
        ({"legs": []}, "has no legs"),
        ({"legs": [*LEGS, {"until": 300, "lr": 1e-5}]}, "must end after step 300"),
        ({"legs": [{"until": 3, "lr": 0}]}, "a leg's lr must be a number from 1e-12 to 1,000,000, not 0"),
        ({"legs": [{"until": 3, "lr": 1, "schedule": "linear"}]}, "'linear' is unknown: use constant or cosine"),
        ({"resolution": 100}, "resolution 100 is not divisible by 8: use 96 or 104"),
        ({"resolution": 0}, "resolution must be a whole number from 8 to 4,096, not 0"),
        ({"batch": 1.5}, "batch must be a whole number from 1 to 4,096, not 1.5"),
        ({"rank": -4}, "rank must be a whole number from 1 to 2,048, not -4"),
        ({"alpha": 0}, "alpha must be a number from 1e-06 to 1,000,000, not 0"),
        ({"caption_dropout": 1}, "caption_dropout must be a number from 0 to 0.99, not 1"),
        ({"holdout": -0.1}, "holdout must be a number from 0 to 0.99, not -0.1"),
        ({"precision": "bf16"}, "precision must be fp16 or fp32"),
        ({"legs": [{"until": "many", "lr": 1e-4}]}, "until must be a whole number"),
        ({"legs": [{"until": 3, "lr": "fast"}]}, "lr must be a number"),
        ({"legs": 300}, "legs must be a list"),
        ({"legs": [300]}, "legs must be a list"),
        ({"alpha": "much"}, "alpha must be a number"),
        ({"holdout": "some"}, "holdout must be a number"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"name": "my/style"}, "recipe 'my/style': its name can't name a file"),
        ({"name": "pytorch_lora_weights"}, "can't name a file"),
        ({"flip": 1}, "flip must be true or false, not 1"),
        ({"measure_every": 0}, "measure_every must be a whole number from 1 to 10,000,000, not 0"),
        ({"previews": -1}, "previews must be a whole number from 0 to 1,000, not -1"),
        ({"max_minutes": -5}, "max_minutes must be a number from 0 to 1,000,000, not -5"),
        ({"seed": 2**64}, "seed must be a whole number from 0 to 18,446,744,073,709,551,615, not 18446744073709551616"),
        ({"alpha": 10**400}, "recipe 'mine': alpha must be a number from 1e-06 to 1,000,000, not 1000"),
        ({"alpha": float("nan")}, "alpha must be a number from 1e-06 to 1,000,000, not nan"),
        ({"save_minutes": float("inf")}, "save_minutes must be a number from 0 to 1,000,000, not inf"),
        ({"legs": [{"until": 3, "lr": 10**400}]}, "recipe 'mine': a leg's lr must be a number"),
        ({"legs": [{"until": 3, "lr": float("inf")}]}, "a leg's lr must be a number from 1e-12 to 1,000,000, not inf"),
        ({"legs": [{"until": 10**9, "lr": 1}]}, "a leg's until must be a whole number from 1 to 10,000,000"),
        ({"legs": [{"until": 3, "lr": 1, "schedule": ["cosine"]}]}, "schedule ['cosine'] is unknown"),
        ({"rank": 10**9}, "rank must be a whole number from 1 to 2,048, not 1000000000"),
        ({"resolution": 10**6}, "resolution must be a whole number from 8 to 4,096, not 1000000"),
        ({"resolution": 9}, "resolution 9 is not divisible by 8: use 8 or 16"),
        ({"base": "x" * 5000}, "base must be a hub id or a path that is not empty or very long, not 'xxx"),
        ({"vae": "y/" * 5000}, "vae must be a hub id or a path"),
        ({"dataset": "é" * 128}, "dataset must be a hub id or a path"),
        ({"dataset": " "}, "dataset must be a hub id or a path that is not empty"),
        ({"dataset": ["a.png"]}, "dataset must be a hub id or a path that is not empty or very long, not ['a.png']"),
        ({"base": {"id": 5}}, "base must be a hub id or a path that is not empty or very long, not {'id': 5}"),
        ({"vae": None}, "vae must be a hub id or a path that is not empty or very long, not None"),
        ({"dataset": "a\0"}, "dataset must be a hub id or a path that is not empty or very long, not 'a\\x00'"),
        ({"dataset": "~\ud83d"}, "dataset must be a hub id or a path that is not empty or very long, not '~\\ud83d'"),
        ({"expect": 5}, "expect must be a short text, not 5"),
        ({"expect": "5 \ud83d"}, "expect must be a short text, not '5 \\ud83d'"),
        ({"name": "n" * 300}, "its name can't name a file"),
        ({"name": "忍" * 67}, "at most 200 bytes"),
        ({"name": "two\nlines"}, "recipe 'two\\nlines': its name can't name a file"),
        ({"name": "a\ud83d"}, "recipe 'a\\ud83d': its name can't name a file"),
        ({"name": ["mine"]}, "recipe ['mine']: its name can't name a file"),
        ({"name": {"legs": 5}, "legs": 5}, "recipe {'legs': 5}: legs must be a list"),
        ({"precision": None}, "precision must be fp16 or fp32, not None"),
        ({"accu" * 2000: 4}, "unknown recipe field 'accuaccu"),
    ],
)
def test_recipe_fields(tmp_path, changes, named):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"name": "mine", "legs": LEGS} | changes))
    with pytest.raises(ValueError) as caught:
        recipe.load(file)
    assert named in sentence(caught)


NUMBERS = ("resolution", "batch", "accumulation", "rank", "alpha", "caption_dropout", "holdout", "seed", "save_every",
           "save_minutes", "measure_every", "previews", "max_minutes", "until", "lr")  # fmt: skip


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", [True, False, None, "5", [5], {"5": 5}, float("nan"), -1, 10**400])
def test_no_number_is_anything_else(tmp_path, field, value):
    """The same sentence from a .json file, a .toml file, an override and an instance."""
    leg = {**LEGS[0], field: value} if field in LEGS[0] else LEGS[0]
    changes = {"legs": [leg]} if field in LEGS[0] else {field: value}
    content = {"name": "naruto-256", "legs": LEGS} | changes
    (tmp_path / "plan.json").write_text(json.dumps(content))
    loads = [lambda: recipe.load(tmp_path / "plan.json"), lambda: recipe.load("naruto-256", **changes),
             lambda: recipe.Recipe(**content), lambda: recipe.load("naruto-256").replace(**changes)]
    if isinstance(value, (bool, int)) and value != 10**400:
        rows = [f"{key} = {json.dumps(one)}" for key, one in leg.items()]
        rest = [f"{key} = {json.dumps(one)}" for key, one in content.items() if key != "legs"]
        (tmp_path / "plan.toml").write_text("\n".join([*rest, "[[legs]]", *rows]))
        loads.append(lambda: recipe.load(tmp_path / "plan.toml"))
    said = set()
    for load in loads:
        with pytest.raises(ValueError) as caught:
            load()
        said.add(sentence(caught))
    (text,) = said
    assert text.startswith(f"recipe 'naruto-256': {'a leg' if field in LEGS[0] else field}")
    assert f"{field} must be" in text


def test_a_forms_values_are_refused_by_name():
    whole = recipe.load("naruto-1024")
    for changes, said in (
        ({"rank": 10**9}, "rank must be a whole number from 1 to 2,048, not 1000000000"),
        ({"rank": 10**400}, "rank must be a whole number"),
        ({"rank": True}, "rank must be a whole number from 1 to 2,048, not True"),
        ({"rank": "16"}, "rank must be a whole number from 1 to 2,048, not '16'"),
        ({"steps": -5}, "steps must be a whole number from 1 to 10,000,000, not -5"),
        ({"steps": "x"}, "steps must be a whole number"),
        ({"max_minutes": float("nan")}, "max_minutes must be a number from 0 to 1,000,000, not nan"),
        ({"max_minutes": True}, "max_minutes must be a number"),
        ({"legs": 5}, "the leg '5' must read as '300 1e-4'"),
        ({"legs": "x" * 5000}, "the leg 'xxx"),
        ({"legs": "300 nan"}, "a leg's lr must be a number from 1e-12 to 1,000,000, not nan"),
        ({"legs": "300 1e-4 \ud83d"}, "schedule '\\ud83d' is unknown"),
        ({"legs": "9" * 5000 + " 1e-4"}, "must read as"),
    ):
        with pytest.raises(ValueError) as caught:
            recipe.adjust(whole, **changes)
        assert said in sentence(caught) and sentence(caught).isprintable()
    assert recipe.adjust(whole, None, None, None, None) == whole  # an empty field of a form


def test_huge_values_are_cut_short_and_objects_have_no_address():
    for value in (10**5000, object(), "x" * 10**6, [object()] * 1000, [[10**5000]]):
        with pytest.raises(ValueError) as caught:
            recipe.load("naruto-256", rank=value)
        assert "0x" not in sentence(caught) and "rank must be" in sentence(caught)
    for source in (5, None, ["naruto-256"], object(), "~\0", "x" * 5000, "a\nb"):
        with pytest.raises(ValueError, match="no recipe is called ") as caught:
            recipe.load(source)
        assert "0x" not in sentence(caught)


def test_a_command_refuses_them_in_one_line(capsys, tmp_path):
    from naruto_lora.__main__ import main

    (tmp_path / "deep.json").write_text("[" * 100_000)
    for options, said in (
        (["naruto-256", "--rank", "9" * 12], "stopped: rank must be a whole number from 1 to 2,048"),
        (["naruto-256", "--dataset", "x" * 5000], "stopped: recipe 'naruto-256': dataset must be a hub id or a path"),
        (["naruto-256", "--max-minutes", "nan"], "stopped: max_minutes must be a number"),
        ([str(tmp_path / "deep.json")], "can't be read (nested too deeply); correct it there"),
    ):
        assert main(["train", *options, "--out", str(tmp_path / "run")]) == 1
        text = capsys.readouterr().err
        assert said in text and text.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_recipe_files_as_editors_leave_them(tmp_path, monkeypatch):
    """With Notepad's byte order mark, in capitals, in the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "plan.JSON").write_text(json.dumps({"name": "mine", "legs": LEGS}), encoding="utf-8-sig")
    (tmp_path / "plan.Toml").write_text('name = "mine"\r\nlegs = [{until = 300, lr = 1e-4}]', encoding="utf-8-sig")
    mine = recipe.Recipe("mine", LEGS)
    assert recipe.load(tmp_path / "plan.JSON") == recipe.load("~/plan.JSON") == recipe.load("~/plan.Toml") == mine


def test_the_longest_name_fits_a_file_system(tmp_path):
    name = recipe.load("naruto-256", name="é" * 100).name
    files.replace(tmp_path / f"{name}.safetensors", lambda temporary: temporary.write_bytes(b"1"))
    assert len(f"{name}.safetensors.4194304.writing".encode()) < 255  # Linux' largest process number


def test_recipe_names_and_files(tmp_path):
    (tmp_path / "broken.json").write_text('{"name": ')
    (tmp_path / "broken.toml").write_text("name = ")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "short.json").write_text('{"name": "x"}')
    (tmp_path / "deep.json").write_text('{"name": ' * 100_000)
    (tmp_path / "deep.toml").write_text("name = " + "[" * 100_000)
    (tmp_path / "utf16.toml").write_bytes("name = 'x'".encode("utf-16"))
    (tmp_path / "digits.json").write_text('{"seed": ' + "9" * 5000 + "}")
    for source, kind, named in (
        ("naruto-512", ValueError, "no recipe is called 'naruto-512'; choose one of naruto-1024, naruto-256"),
        ("missing.json", FileNotFoundError, "'missing.json' does not exist"),
        (tmp_path / "broken.json", ValueError, "can't be read"),
        (tmp_path / "broken.toml", ValueError, "can't be read"),
        (tmp_path / "deep.json", ValueError, "deep.json' can't be read (nested too deeply)"),
        (tmp_path / "deep.toml", ValueError, "deep.toml' can't be read (nested too deeply)"),
        (tmp_path / "utf16.toml", ValueError, "utf16.toml' can't be read ('utf-8' codec can't decode"),
        (tmp_path / "digits.json", ValueError, "digits.json' can't be read (Exceeds the limit"),
        (tmp_path, ValueError, "no recipe is called '"),
        ("~\0.json", FileNotFoundError, "the recipe file '~\\x00.json' does not exist"),
        ("x" * 5000 + ".JSON", FileNotFoundError, "does not exist"),
        (tmp_path / "list.json", ValueError, "must hold one object"),
        (tmp_path / "short.json", ValueError, "the recipe is incomplete: missing 1 required"),
    ):
        with pytest.raises(kind) as caught:
            recipe.load(source)
        assert named in sentence(caught)
    with pytest.raises(ValueError, match="did you mean 'resolution'"):
        recipe.load("naruto-1024", resolutoin=512)


class Base:
    """A copy of the base's configs (no weights: a wrong base is refused before they are read)."""

    def __init__(self, base: str, path: Path):
        self.path = path
        for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(base) / name, path / name)

    def change(self, name: str, **values):
        file = self.path / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    "name, values, named",
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "is a StableDiffusionPipeline, not"),
        ("model_index.json", {"_class_name": "StableDiffusionXLInpaintPipeline"}, "choose an SDXL base model"),
        ("unet/config.json", {"addition_embed_type": None}, "no size conditioning, so it is not SDXL Base"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "predicts 'v_prediction'"),
    ],
)
def test_the_wrong_kind_of_base(base, tmp_path, name, values, named):
    wrong = Base(base, tmp_path / "base")
    models.check_base(str(wrong.path))
    wrong.change(name, **values)
    for refuse in (models.check_base, pipeline.load):
        with pytest.raises(ValueError) as caught:
            refuse(str(wrong.path))
        assert named in sentence(caught)


def test_a_base_that_is_not_there(base, tmp_path):
    for source, kind, named in (
        (str(tmp_path), ValueError, "is not a diffusers model: it has no model_index.json"),
        ("nobody/nothing", FileNotFoundError, "'nobody/nothing' is no folder here, and can't be downloaded from the"),
        ("/no/such/base", FileNotFoundError, "'/no/such/base' is no folder here, and can't be downloaded"),
    ):
        with pytest.raises(kind) as caught:
            models.check_base(source)
        assert named in sentence(caught)
    with pytest.raises(FileNotFoundError, match="'./x' is no folder here.*is no hub id such as 'owner/name'.: check"):
        models.check_base("./x")
    wrong = Base(base, tmp_path / "base")
    shutil.rmtree(wrong.path / "unet")
    with pytest.raises(ValueError, match="is not an SDXL model: it has no unet/config.json") as caught:
        models.check_base(str(wrong.path))
    sentence(caught)


def test_fp16_without_a_gpu(plan, tmp_path):
    for call in (lambda: train.begin(plan.replace(precision="fp16"), tmp_path), lambda: models.device_for("fp16")):
        with pytest.raises(RuntimeError, match="needs a CUDA GPU, and none is here; on Colab choose") as caught:
            call()
        sentence(caught)


def test_an_output_folder_that_can_not_be_written(plan, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(PermissionError, match=f"can't write to the output folder '{out}'") as caught:
            train.begin(plan, out)
        assert sentence(caught).endswith("choose another")


def test_the_wrong_kind_of_vae(plan, base, tmp_path):
    for vae, kind, named in (
        (str(tmp_path), ValueError, "is not a VAE: it has no config.json"),
        ("nobody/nothing", FileNotFoundError, "'nobody/nothing' is no folder here, and can't be downloaded"),
    ):
        with pytest.raises(kind, match=named) as caught:
            train.begin(plan.replace(vae=vae), tmp_path / "run")
        assert sentence(caught)


def test_a_run_that_is_past_the_recipe(plan, trained):
    shorter = plan.replace(legs=(recipe.Leg(4, 2e-2),))
    with pytest.raises(ValueError, match="is at step 6, past the 4 of recipe 'few': use another folder") as caught:
        train.begin(shorter, trained.folder)
    assert "\n" not in str(caught.value)


def test_data_is_checked_before_anything_is_written(plan, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        train.begin(plan.replace(dataset=str(tmp_path / "nowhere")), tmp_path / "run")
    assert not (tmp_path / "cache").exists()


def test_adapters_and_samplers(pipe, trained, tmp_path):
    (tmp_path / "broken.safetensors").write_text("hello")
    other = tmp_path / "other.safetensors"
    larger = {name: torch.ones(w.shape[0] + 2, w.shape[1] + 2) for name, w in load_file(trained.adapter).items()}
    save_file(larger, other)
    for call, kind, named in (
        (lambda: pipeline.add_adapter(pipe, "new", tmp_path), FileNotFoundError, "holds several LoRAs (broken."),
        (lambda: pipeline.add_adapter(pipe, "new", tmp_path / "no.safetensors"), FileNotFoundError, "no LoRA at"),
        (lambda: pipeline.add_adapter(pipe, "new", tmp_path / "broken.safetensors"), ValueError, "is broken or"),
        (lambda: pipeline.add_adapter(pipe, "new", other), ValueError, "for another base; use one for this base"),
        (lambda: pipeline.add_adapter(pipe, "base", trained.folder), ValueError, "'base' can't name an adapter"),
        (lambda: pipeline.add_adapter(pipe, "my.lora", trained.folder), ValueError, "'my.lora' can't name an adapter"),
        (lambda: pipeline.use_adapter(pipe, "stile"), ValueError, "called 'stile'; loaded are base, style"),
        (lambda: pipeline.add_adapter(pipe, "style", other), ValueError, "already called 'style'; choose another name"),
        (lambda: pipeline.use_adapter(pipe, "style", 2), ValueError, "can't have weight 2; choose one from 0 to 1.5"),
        (lambda: pipeline.set_scheduler(pipe, "heun"), ValueError,
         "no scheduler is called 'heun'; choose one of euler,"),
        (lambda: pipeline.draw(pipe, ["x"], resolution=100), ValueError, "100 is not divisible by 8; use 96"),
        (lambda: pipeline.draw(pipe, ["x"], [1, 2], resolution=32), ValueError,
         "1 prompts need as many seeds, or one for all, not 2"),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert named in sentence(caught)
    assert set(pipe.unet.peft_config) == {"style"}
