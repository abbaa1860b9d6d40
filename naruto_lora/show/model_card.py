"""The model card: a LoRA folder's README.md for the Hugging Face Hub, with pictures."""

from __future__ import annotations

import html
import json
import re
from operator import methodcaller
from pathlib import Path

from .. import files, hub, lora
from ..measure import verdict
from . import compare, report

UNPRINTABLE = re.compile("[^\x20-\x7e\xa0-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\ufefe\uff00-\ufffd"
                         "\U00010000-\U0010ffff]")  # letters that YAML or a terminal can't take as they are
CANNOT = "it can't say"
USE = """```python
import torch
from diffusers import {names}

{vae}pipe = DiffusionPipeline.from_pretrained({base}, {with_vae}torch_dtype=torch.float16, variant="fp16").to("cuda")
pipe.load_lora_weights("YOUR_NAME/{name}", weight_name="{file}")
pipe({prompt}, num_inference_steps={steps}, guidance_scale={guidance}).images[0]
```"""


def write(folder: str | Path, run: dict, record: dict, label: str, drawn: dict[str, list], prompts: list[str]) -> Path:
    """Writes `folder`/README.md and its pictures for the adapter `label` of `run`; returns the README's path.

    `record` is from `page.summary`, `drawn` {label: pictures} from `study.draw`, the base first. Captions and names
    are escaped for YAML, Markdown and HTML. Raises OSError.
    """
    folder, recipe, base = Path(folder), run["recipe"], list(drawn)[0]
    per_prompt = len(drawn[label]) // len(prompts)
    places = list(range(0, len(drawn[label]), per_prompt))[:4]
    shown = {name: [drawn[name][k] for k in places] for name in (base, label)}
    sheet = compare.beside(shown, [prompts[k // per_prompt] for k in places])
    pictures = {"images/compare.jpg": sheet} | {f"images/{n}.jpg": drawn[label][k] for n, k in enumerate(places)}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        files.replace(folder / name, methodcaller("write_bytes", compare.jpeg(picture)))
    widget = [{"text": prompts[k // per_prompt], "output": {"url": f"images/{n}.jpg"}} for n, k in enumerate(places)]
    text = "\n".join([_front(recipe, widget), _body(run, record, label, base, prompts[0])])
    text = report.HIDDEN.sub("", text)
    files.replace(folder / "README.md", lambda path: path.write_text(text, encoding="utf-8"))
    return folder / "README.md"


def _front(recipe: dict, widget: list[dict]) -> str:
    """The YAML front matter for the hub, written with JSON strings, which are valid YAML if they are printable.

    (With `ensure_ascii` an emoji would become two halves, which Python's YAML doesn't join.)
    """
    fields = {
        "license": "openrail++" if recipe["base"].startswith("stabilityai/stable-diffusion-xl") else None,
        "library_name": "diffusers",
        "tags": ["text-to-image", "diffusers", "lora", "template:sd-lora", "stable-diffusion-xl"],
        "base_model": recipe["base"] if hub.is_repository(recipe["base"]) else None,
        "datasets": [recipe["dataset"]] if hub.is_repository(recipe["dataset"]) else None,
        "widget": widget,
    }  # fmt: skip
    written = {key: json.dumps(value, ensure_ascii=False) for key, value in fields.items() if value}
    lines = [f"{key}: {UNPRINTABLE.sub(_escaped, text)}" for key, text in written.items()]
    return "\n".join(["---", *lines, "---", ""])


def _escaped(letter: re.Match) -> str:
    return f"\\u{ord(letter[0]):04x}"


def _body(run: dict, record: dict, label: str, base: str, prompt: str) -> str:
    recipe, figures = run["recipe"], {name: record["figures"][name] for name in (base, label)}
    said = [sentence for sentence in record["verdict"] if sentence.startswith((f"{label} against {base}", f"{label}:"))]
    row: dict = next((row for row in record["runs"] if row["model"] == label), {})
    vae, base_model = (name if not name or hub.is_repository(name) else other
                       for name, other in ((recipe["vae"], "THE_VAE"), (recipe["base"], "THE_BASE")))
    use = USE.format(
        vae=f"vae = AutoencoderKL.from_pretrained({json.dumps(vae)}, torch_dtype=torch.float16)\n" if vae else "",
        with_vae="vae=vae, " if vae else "", names="AutoencoderKL, DiffusionPipeline" if vae else "DiffusionPipeline",
        base=json.dumps(base_model), name=recipe["name"], file=lora.FILE,
        prompt=json.dumps(report.readable(prompt), ensure_ascii=False), steps=record["settings"].get("steps", 30),
        guidance=record["settings"].get("guidance_scale", 5.0),
    )  # fmt: skip
    data = recipe["dataset"] if hub.is_repository(recipe["dataset"]) else "a local data set"
    return "\n".join([
        f"# {_plain(recipe['name'])}",
        f"A LoRA of rank {recipe['rank']} for Stable Diffusion XL, trained on {_plain(data)}.",
        f"![{_plain(base)} beside {_plain(label)}: same prompts, same noise](images/compare.jpg)",
        "", "## Use", use,
        f"`{report.lora_name(run)}` is the same LoRA for ComfyUI, A1111 and all other programs.", "", "## Training",
        _table([{"what": key, "value": value} for key, value in row.items() if key != "model"]), "", "## Figures",
        *(_plain(sentence) for sentence in said), "", _table(verdict.rows(figures)), "",
        f"95% intervals over n prompts or pictures. Encoder: {_plain(record['encoder'])}. What they can't say:", "",
        *(f"- {row['figure']}: {row[CANNOT]}" for row in verdict.limits(figures)), "", "## Licence",
        "The base model's licence applies. Check the data set's too before you publish what you make with it.", "",
    ])  # fmt: skip


def _table(rows: list[dict]) -> str:
    if not rows:
        return "Not recorded."
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(v) for v in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)


def _plain(text) -> str:
    """Text with Markdown and HTML escaped, on one line."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))
