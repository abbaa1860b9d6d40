"""The script that says whether two run folders hold the same results."""

import json
import shutil

import pytest
import same_runs
from PIL import Image


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained.folder, tmp_path / "copy")


def test_a_copy_is_the_same_whatever_its_times_and_places(trained, copy):
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(record | {"seconds": 99.0, "adapter": "elsewhere"}))
    assert same_runs.differences(trained.folder, copy) == []


def test_a_changed_number_a_changed_pixel_and_a_lost_file_are_named(trained, copy):
    record = json.loads((copy / "run.json").read_text())
    record["losses"][2] += 1e-9
    (copy / "run.json").write_text(json.dumps(record))
    picture = copy / "previews" / "step-000006-0.jpg"
    Image.open(picture).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(picture)
    (copy / "few.safetensors").unlink()
    lora = copy / "checkpoint-4" / "pytorch_lora_weights.safetensors"
    lora.write_bytes(lora.read_bytes()[:-1] + b"\xff")
    assert same_runs.differences(trained.folder, copy) == [
        f"only in {trained.folder}: few.safetensors",
        "differs: checkpoint-4/pytorch_lora_weights.safetensors",
        "differs: previews/step-000006-0.jpg",
        "differs: run.json",
    ]


def test_an_empty_folder_is_no_proof(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no LoRA"):
        same_runs.differences(trained.folder, tmp_path)
