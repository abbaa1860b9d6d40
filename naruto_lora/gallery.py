"""Pictures as PNGs with their settings as metadata: each can be redrawn from its file, and none is drawn twice."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from PIL import Image, PngImagePlugin

from . import files, pipeline
from .reading.picture import loaded

CHUNK = "naruto_lora"  # the PNG's text chunk with the settings as JSON; 'parameters' is A1111's own chunk


def save(picture: Image.Image, path: str | Path) -> None:
    """Writes a picture of `pipeline.draw` as a PNG with its settings as metadata; never a half-written file."""
    settings = picture.info["settings"]
    text = PngImagePlugin.PngInfo()
    text.add_text(CHUNK, json.dumps(settings))
    text.add_text("parameters", _parameters(settings))
    files.replace(Path(path), lambda temporary: picture.save(temporary, "PNG", pnginfo=text))


def _parameters(settings: dict) -> str:
    loras = "".join(f" <lora:{name}:{adapter['weight']:g}>" for name, adapter in settings["adapters"].items())
    side = settings["resolution"]
    return (
        f"{settings['prompt']}{loras}\nSteps: {settings['steps']}, Sampler: {settings['scheduler']}, "
        f"CFG scale: {settings['guidance_scale']:g}, Seed: {settings['seed']}, Size: {side}x{side}"
    )


def settings(path: str | Path) -> dict:
    """The settings in the PNG at `path`. Raises FileNotFoundError, and ValueError if it has none or is broken."""
    try:
        found = json.loads(loaded(path).text[CHUNK])  # loaded to its end: a truncated file is an error
        _parameters(found | {"batch": found["batch"]})  # raises if one is missing or odd
        return found
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no picture '{path}'") from None
    except Exception:  # Pillow has many for a damaged file, and the chunk may hold anything
        raise ValueError(f"'{path}' has no readable settings; use a PNG that gallery.save wrote") from None


def redraw(pipe, path: str | Path) -> Image.Image:
    """Draws the picture of a PNG again, from its settings: bit for bit the same on the same machine and libraries.

    Its adapters are found by their content; their names in `pipe` may differ. Rounding depends on the batch size, so
    the batch is as large as it was. Raises ValueError if `pipe` has another base or VAE, or lacks an adapter.
    """
    saved = settings(path)
    for part, identity in pipe.sources.items():
        if saved[part] != identity:
            raise ValueError(f"'{path}' was drawn with another {part} ({saved[part]:.16}); load a pipeline with it")
    identities = pipe.__dict__.get("adapter_identities", {})
    names = {identities[name]: name for name in pipeline.active.loaded(pipe) if name in identities}
    weights = {}
    for name, adapter in saved["adapters"].items():
        if adapter["identity"] not in names:
            raise ValueError(f"'{path}' was drawn with an adapter '{name}' that is not loaded; add it to the pipeline")
        weights[names[adapter["identity"]]] = adapter["weight"]
    size, place = saved["batch"]
    options = {key: saved[key] for key in ("scheduler", "steps", "guidance_scale", "guidance_interval", "resolution")}
    drawn = pipeline.draw(pipe, [saved["prompt"]] * size, [saved["seed"]] * size, weights, batch=size, **options)
    return drawn[place]


def draw_to(
    folder: str | Path, pipe, prompts: list[str], seeds: list[int] | int = 0, adapter=pipeline.BASE, scale: float = 1.0,
    batch: int | None = None, show=None, stop=None, **options,
) -> list[Path]:
    """Draws as `pipeline.draw` does and saves each batch at once as PNGs in `folder`; returns their paths in order.

    A picture that is there with the same settings isn't drawn again, so a stopped call resumes when it is repeated,
    and gives the same pictures as an unbroken one. `options` are those of `draw`. Raises what `draw` raises.
    """
    folder = Path(folder)
    files.make_folder(folder)
    seeds = pipeline.seeds_for(prompts, seeds)
    wanted = pipeline.settings_of(pipe, prompts, seeds, adapter, scale, **options)
    paths = [folder / _name(own) for own in wanted]
    steps = wanted[0]["steps"] if wanted else 0
    for part in pipeline.even_batches(len(prompts), pipeline.batch_size(pipe, options.get("resolution", 1024), batch)):
        if all(map(_is_drawn, paths[part], wanted[part])):
            continue

        def show_overall(phase, done, total, before=part.start * steps):
            show(phase, before + done, len(prompts) * steps)

        drawn = pipeline.draw(
            pipe, prompts[part], seeds[part], adapter, scale, batch=part.stop - part.start,
            show=show and show_overall, stop=stop, **options,
        )
        for path, picture in zip(paths[part], drawn, strict=True):
            save(picture, path)
    return paths


def load(paths: list[Path]) -> list[Image.Image]:
    """Reads the pictures into memory."""
    return [loaded(path) for path in paths]


def _is_drawn(path: Path, wanted: dict) -> bool:
    try:
        saved = settings(path)
    except (FileNotFoundError, ValueError):
        return False
    saved.pop("batch")
    return saved == wanted


def _name(settings: dict) -> str:
    words = re.sub(r"\W+", "-", settings["prompt"].lower())[:40].strip("-")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{words or 'picture'}-{settings['seed']}-{digest}.png"
