"""Pictures on disk that say what they were drawn from: what is there isn't drawn again, and each can be drawn anew."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from PIL import Image, PngImagePlugin

from . import files, pipeline

CHUNK = "naruto_lora"  # the PNG's text chunk with the settings as JSON; 'parameters' is what A1111 writes and reads


def save(picture: Image.Image, path: str | Path) -> None:
    """Writes a picture that `pipeline.draw` made as a PNG, whole or not at all, with its settings inside."""
    told = picture.info["drawn"]
    text = PngImagePlugin.PngInfo()
    text.add_text(CHUNK, json.dumps(told))
    text.add_text("parameters", _parameters(told))
    files.replace(Path(path), lambda temporary: picture.save(temporary, "PNG", pnginfo=text))


def _parameters(told: dict) -> str:
    loras = "".join(f" <lora:{name}:{adapter['weight']:g}>" for name, adapter in told["adapters"].items())
    return (
        f"{told['prompt']}{loras}\nSteps: {told['steps']}, Sampler: {told['scheduler']}, "
        f"CFG scale: {told['guidance_scale']:g}, Seed: {told['seed']}, Size: {told['resolution']}x{told['resolution']}"
    )


def settings(path: str | Path) -> dict:
    """What the PNG at `path` was drawn from. Raises FileNotFoundError, and ValueError if it doesn't say."""
    try:
        with Image.open(path) as picture:
            picture.load()  # to its end: one that is cut short counts as none
            return json.loads(picture.text[CHUNK])
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no picture '{path}'") from None
    except (OSError, SyntaxError, AttributeError, KeyError, ValueError):
        raise ValueError(f"'{path}' does not say what it was drawn from; take a PNG that gallery.save wrote") from None


def redraw(pipe, path: str | Path) -> Image.Image:
    """The picture of a PNG once more, from the settings in it: on the same machine and libraries, bit for bit.

    Its adapters are found by their content, whatever they are called in `pipe`. A batch's rounding depends on its
    size, so as many are drawn as were then. Raises ValueError if `pipe` has another base, VAE or lacks an adapter.
    """
    told = settings(path)
    for part, identity in pipe.sources.items():
        if told[part] != identity:
            raise ValueError(f"'{path}' was drawn with another {part} ({told[part]:.16}); load a pipeline with that")
    identities = pipe.__dict__.get("adapter_identities", {})
    names = {identities[name]: name for name in getattr(pipe.unet, "peft_config", {}) if name in identities}
    weights = {}
    for name, adapter in told["adapters"].items():
        if adapter["identity"] not in names:
            raise ValueError(f"'{path}' was drawn with an adapter '{name}' that is not loaded; add it to the pipeline")
        weights[names[adapter["identity"]]] = adapter["weight"]
    size, place = told["batch"]
    look = {name: told[name] for name in ("scheduler", "steps", "guidance_scale", "guidance_interval", "resolution")}
    drawn = pipeline.draw(pipe, [told["prompt"]] * size, [told["seed"]] * size, weights, batch=size, **look)
    return drawn[place]


def draw_to(
    folder: str | Path, pipe, prompts: list[str], seeds: list[int] | int = 0, adapter=pipeline.BASE, scale: float = 1.0,
    batch: int | None = None, show=None, stop=None, **look,
) -> list[Path]:
    """`pipeline.draw` into PNGs in `folder`, each batch kept as soon as it is drawn; their paths in order.

    What is there with the same settings isn't drawn again, so a run that was killed or stopped goes on when it is
    called again, with the pictures that it would have had. Raises what `draw` raises.
    """
    folder = Path(folder)
    files.writable(folder)
    seeds = pipeline.one_each(prompts, seeds)
    wanted = pipeline.plan(pipe, prompts, seeds, adapter, scale, **look)
    paths = [folder / _name(told) for told in wanted]
    steps = wanted[0]["steps"] if wanted else 0
    for part in pipeline.even_parts(len(prompts), pipeline.together(pipe, look.get("resolution", 1024), batch)):
        if all(map(_there, paths[part], wanted[part])):
            continue

        def told_so_far(phase, done, total, before=part.start * steps):
            show(phase, before + done, len(prompts) * steps)

        drawn = pipeline.draw(
            pipe, prompts[part], seeds[part], adapter, scale, batch=part.stop - part.start,
            show=show and told_so_far, stop=stop, **look,
        )
        for path, picture in zip(paths[part], drawn, strict=True):
            save(picture, path)
    return paths


def load(paths: list[Path]) -> list[Image.Image]:
    """The pictures of PNGs, in memory."""
    pictures = [Image.open(path) for path in paths]
    for picture in pictures:
        picture.load()  # and closes its file
    return pictures


def _there(path: Path, wanted: dict) -> bool:
    try:
        told = settings(path)
    except (FileNotFoundError, ValueError):
        return False
    told.pop("batch")
    return told == wanted


def _name(told: dict) -> str:
    words = re.sub(r"\W+", "-", told["prompt"].lower())[:40].strip("-")
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    return f"{words or 'picture'}-{told['seed']}-{digest}.png"
