"""`python -m naruto_lora`: its verbs, help and exit statuses; and the package's names in Python."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import naruto_lora as nl
from naruto_lora import __main__ as command
from naruto_lora import gallery, lora
from naruto_lora.recipe import Leg


def test_the_command_trains(plan, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(plan.replace(legs=(Leg(1, 1e-3),)).to_json())
    result = subprocess.run(
        [sys.executable, "-m", "naruto_lora", "train", file, "--out", tmp_path / "run"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(tmp_path / "run" / lora.FILE)
    assert (tmp_path / "run" / lora.FILE).is_file()


def test_the_commands_options_are_those_of_the_form(plan, tmp_path, monkeypatch):
    seen, train = [], sys.modules["naruto_lora.train"]
    monkeypatch.setattr(train, "train", lambda *given, **named: seen.append((given, named)) or {"adapter": "there"})
    options = ["--dataset", "my.zip", "--vae", "", "--rank", "8", "--legs", "9 1e-3", "--steps", "4",
               "--max-minutes", "7", "--mirror", str(tmp_path / "drive")]  # fmt: skip
    assert command.main(["train", "naruto-256", "--out", str(tmp_path), *options]) == 0
    ((recipe, out), named), = seen
    assert (recipe.dataset, recipe.vae, recipe.rank, recipe.alpha) == ("my.zip", "", 8, 8.0)
    assert recipe.legs == (Leg(4, 1e-3),) and recipe.max_minutes == 7 and recipe.base == nl.recipe.Recipe.base
    assert out == tmp_path and named["mirror"] == tmp_path / "drive"


def test_an_error_is_one_line(tmp_path, capsys):
    assert command.main(["train", "naruto-1024", "--out", str(tmp_path)]) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("stopped: this recipe trains in fp16") and error.count("\n") == 1


def test_an_interrupt_and_a_name_that_steers_a_terminal_are_one_plain_line(tmp_path, capsys, monkeypatch):
    assert command.main(["draw", "--prompts", "no\x1b[31m\nsuch.txt"]) == 1
    error = capsys.readouterr().err
    assert "no [31m such.txt" in error and "\x1b" not in error and error.count("\n") == 1
    monkeypatch.setattr(nl.recipe, "load", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command.main(["train", "naruto-256", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted: the same command continues\n"


@pytest.mark.parametrize("arguments, said", [
    ([], "there is no prompt to draw: add --prompt TEXT or --prompts FILE"),
    (["--prompt", "a", "--prompt", "b", "--out", "x.png"], "--out 'x.png' is one file for 2 prompts: use a folder"),
    (["--prompt", "a", "--lora", "runs/mine", "much"], "a path and one strength, such as 'runs/mine 0.8', not ['much'"),
    (["--prompt", "a", "--lora", "runs/none"], "no LoRA at 'runs/none'"),
    (["--prompts", "none.txt"], "there is no file 'none.txt' to read prompts from"),
])  # fmt: skip
def test_a_wrong_draw_is_refused_before_anything_is_loaded(base, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(nl.models, "load_unet", lambda *_: pytest.fail("a model was loaded"))
    assert command.main(["draw", "--base", base, *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error and error.startswith("stopped: ") and error.count("\n") == 1


def test_draw_draws_one_file_or_a_folder(base, trained, tmp_path, capsys):
    few = ["--base", base, "--steps", "2", "--guidance", "2"]
    picture = tmp_path / "new" / "x.png"
    assert command.main(["draw", *few, "--prompt", "a smiling woman", "--seed", "3", "--out", str(picture)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(picture)
    assert Image.open(picture).size == (64, 64)  # the embedded base's own resolution
    assert gallery.settings(picture)["seed"] == 3
    folder, prompts = tmp_path / "many", tmp_path / "prompts.txt"
    prompts.write_text("a smiling woman\nan old man\n")
    styled = ["--lora", str(trained.folder), "0.5", "--prompts", str(prompts), "--seed", "3", "--out", str(folder)]
    assert command.main(["draw", *few, *styled]) == 0
    paths = capsys.readouterr().out.splitlines()[-2:]
    assert sorted(paths) == sorted(map(str, folder.iterdir())) and len(paths) == 2
    settings = gallery.settings(paths[0])
    assert settings["adapters"]["few"]["weight"] == 0.5 and settings["prompt"] == "a smiling woman"
    assert np.abs(np.asarray(Image.open(paths[0]), float) - np.asarray(Image.open(picture), float)).mean() > 1


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["draw", "--help"], ["caption", "--help"],
                                       ["look", "--help"], []])  # fmt: skip
def test_help_names_every_verb_and_option_without_loading_anything(arguments):
    code = (
        "import sys; from naruto_lora.__main__ import main\n"
        f"try: status = main({arguments})\nexcept SystemExit as end: status = end.code\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\nsys.exit(status)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0 if arguments else 2, "")
    assert result.stdout.startswith(" ".join(["usage: python -m naruto_lora", *arguments[:-1]]))
    assert all(len(line) <= 100 for line in result.stdout.splitlines())
    assert "metavar" not in result.stdout and "==SUPPRESS==" not in result.stdout
    if len(arguments) < 2:
        assert all(f"{verb} " in result.stdout for verb in ("train", "draw", "caption", "look"))


def test_captions_are_written_and_looked_at(pictures, base, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = shutil.copytree(pictures, tmp_path / "set")
    (folder / "metadata.jsonl").unlink()
    written = ["caption", str(folder), "--captioner", "naruto_lora.tiny.captioner"]
    assert command.main([*written, "--prefix", "ohwx", "--drop", "eyes"]) == 0
    assert "24 of 24 captions written by naruto_lora.tiny.captioner" in capsys.readouterr().out
    text = (folder / "0003.txt").read_text()
    assert text.startswith("ohwx, ") and "hair" in text and "eyes" not in text
    shutil.copy(folder / "0003.png", folder / "again.png")
    sheet = tmp_path / "sheet.jpg"
    looked = ["look", str(folder), "--resolution", "64", "--base", base, "--sheet", str(sheet)]
    assert command.main(looked) == 0
    said = capsys.readouterr().out
    assert re.search(r"the same picture again +1 of 25 +again.png \(as 0003.png\)", said)
    assert "the same picture again: keep one of them" in said
    assert "\n  0019.png ('ohwx', as in 23 others)\n  and 4 more\n" in said and "a picture without a caption" in said
    assert Image.open(sheet).width > 1000 and said.splitlines()[-1] == str(sheet)
    assert command.main(["caption", str(folder), "--mode", "some"]) == 1
    assert capsys.readouterr().err == "stopped: the mode 'some' is unknown: choose missing, all, none\n"


def test_an_unknown_verb_or_option_ends_with_2(capsys):
    for arguments in (["paint"], ["train", "naruto-256"], ["draw", "--colour", "red"]):
        with pytest.raises(SystemExit) as caught:
            command.main(arguments)
        assert caught.value.code == 2 and "usage: " in capsys.readouterr().err


def test_the_package_offers_what_a_script_needs(plan, pipe, tmp_path):
    assert nl.recipe("naruto-1024", rank=8) == nl.recipe.load("naruto-1024", rank=8)
    assert nl.load is nl.pipeline.load and nl.draw is nl.pipeline.draw and nl.draw_to is gallery.draw_to
    for name in {*nl.OFFERED, *nl.MODULES}:
        assert getattr(nl, name) is not None and name in dir(nl)
    with pytest.raises(AttributeError, match="has no attribute 'paint'"):
        nl.paint  # noqa: B018
    record = nl.train(plan.replace(legs=(Leg(1, 1e-3),), previews=0), tmp_path / "run")
    assert record["step"] == 1 and (tmp_path / "run" / lora.FILE).is_file()


def test_the_packages_names_work_in_every_order_of_imports(tmp_path):
    for first in ("import naruto_lora.train, naruto_lora.recipe", "from naruto_lora import train, recipe", "pass"):
        code = f"{first}\nimport naruto_lora as nl\nassert nl.recipe('naruto-256').batch == 12 and callable(nl.train)"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
