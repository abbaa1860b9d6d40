"""Tables of a stranger: their pictures come from inside the data set; what is wrong is named with its place."""

import io
from pathlib import Path

import datasets
import pytest
from PIL import Image

from naruto_lora import data


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def write(folder: Path, images: list, name="a.parquet", **columns):
    datasets.Dataset.from_dict({"image": images, "text": ["one"] * len(images)} | columns).to_parquet(folder / name)


def refused(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        data.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 280 + len(str(folder))
    return str(caught.value)


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("path", ["/dev/zero", "../secret.png", "{folder}/../secret.png", "link/secret.png",
                                  "none.png", "{folder}", "a" * 5000, "a\0.png"])
def test_a_path_out_of_the_data_set_is_refused(folder, path, as_text):
    Image.new("RGB", (8, 8)).save(folder.parent / "secret.png")
    (folder / "link").symlink_to(folder.parent)
    path = path.format(folder=folder)
    write(folder, [path if as_text else {"bytes": None, "path": path}])
    message = refused(folder)
    assert message.startswith(f"row 0 of '{folder}' has no picture but names ")
    assert f"names {path!r:.80}" in message and message.endswith("store the picture's bytes")


def test_a_path_inside_the_data_set_is_read(folder):
    Image.new("RGB", (8, 16), "red").save(folder / "a.png")
    write(folder, [{"bytes": None, "path": "a.png"}])
    (example,) = data.load(folder)
    assert (example.name, example.size(), example.image().getpixel((4, 4))) == ("a.png", (16, 8), (255, 0, 0))


def test_a_link_of_the_hubs_client_is_read(folder):
    Image.new("RGB", (8, 8)).save(folder.parent / "blob.png")
    (folder / "a.png").symlink_to("../blob.png")
    write(folder, [{"bytes": None, "path": str(folder / "a.png")}])
    assert data.load(folder)[0].read() == (folder.parent / "blob.png").read_bytes()


def test_a_stored_pictures_path_is_only_its_name(folder):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    write(folder, [{"bytes": buffer.getvalue(), "path": "/dev/zero"}])
    assert [(e.name, e.source) for e in data.load(folder)] == [("zero", buffer.getvalue())]


def test_an_image_column_of_another_type(folder):
    write(folder, [1, 2])
    assert f"'image' of the data set '{folder}' holds Value('int64'); store the pictures' bytes" in refused(folder)


def test_a_damaged_parquet_file_is_named(folder):
    write(folder, [b""])
    (folder / "b.parquet").write_bytes(b"no parquet")
    assert refused(folder) == f"the file '{folder / 'b.parquet'}' can't be read as parquet; replace or remove it"


def test_parquet_files_with_other_columns(folder):
    write(folder, [b""])
    write(folder, [b""], "b.parquet", more=[1])
    assert f"the files in '{folder}' don't form one table (" in refused(folder)
