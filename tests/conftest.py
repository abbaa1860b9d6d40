"""Shared fixtures: the embedded base, a small data set, a recipe of a few steps, and the run that it trains."""

import io
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported, so that no test waits for a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU everywhere, so that equal bits mean the same on every machine

from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from PIL import Image  # noqa: E402

from naruto_lora import cache, data, pipeline, recipe, tiny, train  # noqa: E402
from naruto_lora.tiny import world  # noqa: E402


@pytest.fixture(scope="session")
def base() -> str:
    return str(tiny.BASE)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder of 24 captioned pictures of 64 px."""
    return world.write_dataset(tmp_path_factory.mktemp("pictures"), count=24, size=64)


@pytest.fixture(scope="session")
def plan(base, pictures) -> recipe.Recipe:
    """A recipe: six steps of 2 x 3 pictures at 32 px, alpha unlike rank, a learning rate with a visible effect."""
    return recipe.Recipe(
        "few", (recipe.Leg(4, 2e-2), recipe.Leg(6, 1e-2, "cosine")), resolution=32, batch=3, accumulation=2, rank=4,
        alpha=10, caption_dropout=0.25, holdout=0.15, precision="fp32", save_every=2, previews=0, base=base, vae="",
        dataset=str(pictures),
    )


@pytest.fixture(scope="session")
def previewed(plan) -> recipe.Recipe:
    """`plan` with previews, which take longer than its training."""
    return plan.replace(previews=2)


@pytest.fixture(scope="session")
def examples(plan):
    """(training, hold-out) of `pictures`."""
    return data.split(data.load(plan.dataset), plan.holdout)


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def encoded(plan, examples, cache_folder) -> cache.Cache:
    """The training pictures at 32 px, encoded."""
    return cache.encode(examples[0], plan, cache_folder)


@dataclass
class Trained:
    folder: Path
    record: dict

    @property
    def adapter(self) -> Path:
        return self.folder / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="session")
def trained(previewed, cache_folder, tmp_path_factory) -> Trained:
    """`plan`, trained without interruption, and its previews."""
    folder = tmp_path_factory.mktemp("runs") / previewed.name
    return Trained(folder, train.train(previewed, folder, cache_folder))


@pytest.fixture(scope="session")
def pipe(base, trained):
    """The base with the adapter 'style'. Each test must leave it on the Euler sampler."""
    return pipeline.load(base, adapters={"style": trained.folder})


@pytest.fixture(scope="session")
def mixed(plan, tmp_path_factory):
    """(recipe, cache) with square, wide and tall pictures in buckets, also mirrored."""
    examples = []
    for number, (wide, high) in enumerate([(64, 64), (96, 40), (40, 96), (64, 60), (90, 40), (33, 80)]):
        picture = Image.effect_noise((wide, high), 60 + number).convert("RGB")
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        examples.append(data.Example(f"{number}.png", f"picture {number}", buffer.getvalue()))
    bucketed = plan.replace(buckets=True, flip=True, batch=2, accumulation=3)
    return bucketed, cache.encode(examples, bucketed, tmp_path_factory.mktemp("mixed"))


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that no worker begins minutes of them when the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter):
    """Prints the package's figures beside the bounds that `whole/test_structure.py` checks."""
    import structure

    terminalreporter.section("the package in figures")
    for line in structure.lines():
        terminalreporter.write_line(line)
