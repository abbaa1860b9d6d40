"""naruto_lora: give Stable Diffusion XL a style on a GPU that costs nothing.

    import naruto_lora as nl

    recipe = nl.recipe("naruto-1024", dataset="my_pictures")    # all settings of a run
    nl.train(recipe, "runs/mine")                                # a LoRA in runs/mine; run it again to resume
    pipe = nl.load(recipe.base, recipe.vae, {"mine": "runs/mine"})
    nl.draw(pipe, ["a fisherman on a pier"], adapter="mine")[0].save("fisherman.png")

recipe -> captioned pictures -> cache -> U-Net + LoRA -> training -> checkpoints -> pictures -> comparison.
Each module here is one of these stages. README.md has the map; `python -m naruto_lora` lists the commands. Importing
the package loads nothing heavy: each name that it offers is imported when it is first used.
"""

import importlib
import sys
import types

__version__ = "0.1.0"

OFFERED = {  # name: its module
    "load": "pipeline", "draw": "pipeline", "cross": "pipeline", "read_prompts": "pipeline",
    "draw_to": "gallery", "redraw": "gallery",
}  # fmt: skip
MODULES = (
    "cache", "checkpoint", "data", "files", "gallery", "hub", "lora", "models", "pipeline", "progress", "recipe",
    "session", "step", "train", "adapters", "captioning", "colab", "disk", "measure", "memory", "reading", "show",
    "tiny", "widgets",
)  # fmt: skip


def __getattr__(name: str):
    """Imports a name in OFFERED or MODULES at its first use (PEP 562)."""
    if name in OFFERED:
        return getattr(importlib.import_module(f"{__name__}.{OFFERED[name]}"), name)
    if name in MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *OFFERED, *MODULES})


def call_as(module: str, function) -> None:
    """Makes `module` callable as its main `function`: `nl.train(...)` is `nl.train.train(...)`.

    Once a submodule is imported, its name in the package means the module and not a function of that name
    (docs.python.org, data model, 'Customizing module attribute access').
    """

    class Callable(types.ModuleType):
        def __call__(self, *arguments, **options):
            return function(*arguments, **options)

    sys.modules[module].__class__ = Callable
