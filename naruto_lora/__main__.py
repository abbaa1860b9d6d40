"""The command `python -m naruto_lora VERB`: `--help` lists the verbs, `VERB --help` a verb's options."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from . import recipe as recipes
from .progress import Progress, plain

PROGRAM = "python -m naruto_lora"
NAMED = 20  # pictures with a fault that `look` lists
STATUS = "Exit status: 0; 1 if something is missing or wrong, with one line that says what; 2 for a wrong option."


def main(arguments: list[str] | None = None) -> int:
    """Runs a verb; returns the exit status. Nothing heavy is imported before the options are parsed."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Give Stable Diffusion XL a style, on one small GPU.",
        epilog=f"{PROGRAM} VERB --help lists a verb's options. {STATUS}")  # fmt: skip
    verbs = parser.add_subparsers(metavar="VERB", dest="verb")
    for add in (_add_train, _add_draw, _add_caption, _add_look):
        add(verbs)
    options = parser.parse_args(arguments)
    if options.verb is None:
        parser.print_help()
        return 2
    try:
        options.run(options)
    except (OSError, RuntimeError, ValueError) as error:
        print(plain(f"stopped: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return 130
    return 0


def _add_train(verbs) -> None:
    about = "train a LoRA by a recipe; if the folder already holds a run, resume it"
    parser = verbs.add_parser("train", help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=STATUS)
    add, names = parser.add_argument, " or ".join(recipes.RECIPES)
    add("recipe", help=f"{names}, or a .json or .toml file")
    add("--out", type=Path, required=True, metavar="FOLDER", help="the run's folder: checkpoints, LoRA, previews")
    add("--mirror", type=Path, metavar="FOLDER", help="a second folder for a copy of all this, on another disk")
    add("--dataset", metavar="DATA", help="a folder or .zip of captioned pictures, or a hub id")
    add("--base", metavar="MODEL", help="another SDXL: a hub id or a folder")
    add("--vae", metavar="MODEL", help="its VAE: a hub id or a folder; '' means the base's own")
    add("--steps", type=int, default=0, metavar="N", help="stop after N steps, to continue later (default: all)")
    add("--rank", type=int, default=0, metavar="N", help="the LoRA's rank (default: the recipe's)")
    add("--legs", default="", metavar="LEGS", help="the learning rate, such as '300 1e-4, 600 3e-5 cosine'")
    add("--max-minutes", type=float, default=0.0, metavar="N", help="stop after N minutes, to continue later")
    parser.set_defaults(run=_train)


def _train(options) -> None:
    named = {name: getattr(options, name) for name in ("dataset", "base", "vae")}
    recipe = recipes.load(options.recipe, **{name: value for name, value in named.items() if value is not None})
    recipe = recipes.adjust(recipe, options.rank, options.legs, options.steps, options.max_minutes)
    from . import train

    print(train.train(recipe, options.out, show=Progress(), mirror=options.mirror)["adapter"])


def _add_draw(verbs) -> None:
    about = "draw pictures from prompts, with or without LoRAs"
    parser = verbs.add_parser("draw", help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=STATUS)
    add, base = parser.add_argument, recipes.Recipe.base
    add("--prompt", action="append", default=[], metavar="TEXT", help="what to draw; can be repeated")
    add("--prompts", metavar="FILE", help="a .txt file with a prompt a line, or a .json list")
    add("--lora", action="append", nargs="+", default=[], metavar=("PATH", "STRENGTH"),
        help="a run's folder or a .safetensors file, and its strength (default: 1); can be repeated")
    add("--out", type=Path, default=Path("pictures"), metavar="PATH",
        help="a .png file, or a folder for several pictures (default: pictures)")
    add("--base", default=base, metavar="MODEL", help=f"an SDXL: a hub id or a folder (default: {base})")
    add("--vae", metavar="MODEL", help="its VAE: a hub id or a folder (default: one that fits fp16, or the base's own)")
    add("--seed", type=int, default=0, metavar="N", help="the noise's seed (default: 0)")
    add("--steps", type=int, default=30, metavar="N", help="denoising steps (default: 30)")
    add("--guidance", type=float, default=5.0, metavar="X", help="how strictly the prompt is followed (default: 5)")
    add("--sampler", default="euler", metavar="NAME", help="euler, euler_a, ddim, dpm++_2m or unipc (default: euler)")
    add("--resolution", type=int, metavar="PX", help="a picture's side (default: the base's own resolution)")
    parser.set_defaults(run=_draw)


def _draw(options) -> None:
    from . import gallery, models, pipeline

    prompts = options.prompt + (pipeline.read_prompts(options.prompts) if options.prompts else [])
    single = options.out.suffix.lower() == ".png"
    if not prompts:
        raise ValueError("there is no prompt to draw: add --prompt TEXT or --prompts FILE")
    if single and len(prompts) > 1:
        raise ValueError(f"--out '{options.out}' is one file for {len(prompts)} prompts: use a folder")
    vae = options.vae if options.vae is not None else _default_vae(options.base)
    adapters, strengths = _loras(options.lora)
    pipe = pipeline.load(options.base, vae, adapters)
    settings = {
        "scheduler": options.sampler, "steps": options.steps, "guidance_scale": options.guidance,
        "resolution": options.resolution or models.default_resolution(options.base, vae), "show": Progress(),
    }  # fmt: skip
    if single:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        gallery.save(pipeline.draw(pipe, prompts, options.seed, strengths, **settings)[0], options.out)
        print(options.out)
    else:
        print(*gallery.draw_to(options.out, pipe, prompts, options.seed, strengths, **settings), sep="\n")


def _default_vae(base: str) -> str:
    return recipes.Recipe.vae if base == recipes.Recipe.base else ""


def _loras(given: list[list[str]]) -> tuple[dict[str, str | Path], dict[str, float]]:
    """({name: path}, {name: strength}) of the --lora options. Raises ValueError for a strength that is not a number."""
    paths: dict[str, str | Path] = {}
    strengths: dict[str, float] = {}
    for path, *strength in given:
        name = re.sub(r"\W", "_", f"{Path(path).stem}")
        name = name if name.isidentifier() and name not in (*paths, "base") else f"lora_{len(paths) + 1}"
        try:
            (strengths[name],) = map(float, strength or ["1"])
        except ValueError:
            raise ValueError(f"--lora needs a path and one strength, such as '{path} 0.8', not {strength}") from None
        paths[name] = path
    return paths, strengths


def _add_caption(verbs) -> None:
    about = "write captions for the pictures that have none"
    parser = verbs.add_parser("caption", help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=STATUS)
    add = parser.add_argument
    add("dataset", metavar="DATA", help="a folder or .zip of pictures, or a hub id")
    add("--captioner", default="blip", metavar="NAME",
        help="blip, florence-2 or wd (tags; needs timm), a hub id or a folder (default: blip)")
    add("--mode", default="missing", metavar="MODE",
        help="missing; all: also in place of captions that are there; none: use no captions (default: missing)")
    add("--prefix", default="", metavar="TEXT", help="the start of each new caption, such as a trigger word")
    add("--drop", action="append", default=[], metavar="WORDS",
        help="words to take out of new captions, besides those that name a style; can be repeated")
    parser.set_defaults(run=_caption)


def _caption(options) -> None:
    from .captioning import write

    print(write.caption(options.dataset, options.captioner, options.mode, options.prefix, Progress(),
                        drop=tuple(options.drop)))  # fmt: skip


def _add_look(verbs) -> None:
    about = "list what in a set of pictures may spoil a LoRA"
    parser = verbs.add_parser("look", help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=STATUS)
    add = parser.add_argument
    add("dataset", metavar="DATA", help="a folder or .zip of pictures, or a hub id")
    add("--resolution", type=int, default=1024, metavar="PX", help="the training resolution (default: 1024)")
    add("--base", default="", metavar="MODEL", help="count captions in the tokens of this SDXL: a hub id or a folder")
    add("--sheet", type=Path, metavar="FILE", help="also save the pictures in question as one .jpg")
    parser.set_defaults(run=_look)


def _look(options) -> None:
    from . import data
    from .reading import faults
    from .show import report, suspects

    examples = data.load(options.dataset, captioned=False)
    found = faults.find(examples, options.resolution, base=options.base)
    print(report.table(faults.rows(found, len(examples))))
    for fault in found:
        names = fault.names()
        if names:
            more = [f"and {len(names) - NAMED:,} more"] if len(names) > NAMED else []
            print(f"\n{fault.what}: {fault.mend}", *names[:NAMED], *more, sep="\n  ")
    if options.sheet:
        suspects.sheet(found).save(options.sheet, quality=90)
        print(f"\n{options.sheet}")


if __name__ == "__main__":
    sys.exit(main())
