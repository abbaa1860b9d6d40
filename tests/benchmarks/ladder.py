"""The tables of speed.csv in the README files, between their marker comments: `python tests/benchmarks/ladder.py`."""

import csv
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "speed.csv"
FIELDS = (
    "recipe", "variant", "attention", "micro_ms", "update_s", "images_per_s", "gpu_ms", "launches", "t4_ms",
    "allocated_gib", "reserved_gib", "ready_s", "loss", "grad_error", "device", "torch", "commit",
)  # fmt: skip
STOCK = "stock script"
COLUMNS = {  # heading: field, format; what is 'of stock' or less it is by the stock script with the same attention
    "wall, a micro-step": ("micro_ms", "{:.0f} ms"),
    "an update": ("update_s", "{:.2f} s"),
    "images/s": ("images_per_s", "{:.1f}"),
    "× faster": ("update_s", "faster"),
    "GPU work": ("gpu_ms", "{:.0f} ms"),
    "of stock": ("gpu_ms", "share"),
    "kernels": ("launches", "{:,.0f}"),
    "T4, modelled": ("t4_ms", "{:,.0f} ms"),
    "of stock ": ("t4_ms", "share"),
    "allocated": ("allocated_gib", "{:.1f}"),
    "GiB reserved": ("reserved_gib", "{:.1f}"),
    "ready after": ("ready_s", "{:.0f} s"),
    "loss − stock's": ("loss", "less"),
    "gradient error": ("grad_error", "{:.1e}"),
    "commit": ("commit", "{}"),
}
RECIPES = ("naruto-1024", "naruto-256")
OURS = "element-wise work compiled"
ANCHORS = {STOCK: "the script as it comes", "encoded once": "inputs encoded once"}  # what ours is compared with


def read(file: Path = RESULTS) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def full(rows: list[dict[str, str]]) -> str:
    """Every row and figure, a table a recipe."""
    return _tables(rows, tuple(COLUMNS)) + f"\n\n*{_made(rows)}*"


def short(rows: list[dict[str, str]]) -> str:
    """A sentence and a table for the front page: the script as it comes, with inputs encoded once, and ours."""
    shares = {name: [_t4(rows, name, OURS) / _t4(rows, name, other) for other in ANCHORS] for name in RECIPES}
    (first, careful), (first_256, careful_256) = shares.values()
    sentence = (
        f"**By our model of a T4, a step of `{RECIPES[0]}` takes {first:.2f} of the time of diffusers' "
        f"`train_text_to_image_lora_sdxl.py` as it comes, and {careful:.2f} of the time of the same step with its "
        f"inputs encoded once**, as careful users and other trainers run it (timed with our own plain step); for "
        f"`{RECIPES[1]}` it is {first_256:.2f} and {careful_256:.2f}. All use 8-bit Adam; the first two gradient "
        f"checkpointing, while naruto_lora recomputes nothing where the card has room, and so takes more memory."
    )
    head = ["", *(f"`{name}`, {what}" for name in RECIPES for what in ("T4, modelled", "GiB"))]
    lines = [head, ["---"] * len(head)]
    for variant, words in (*ANCHORS.items(), (OURS, "naruto_lora")):
        found = [_row(rows, name, variant) for name in RECIPES]
        figures = [[f"{float(row['t4_ms']):,.0f} ms", f"{float(row['reserved_gib']):.1f}"] for row in found]
        lines.append([words, *figures[0], *figures[1]])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{sentence}\n\n{table}\n\n*A micro-step: 1 picture of `{RECIPES[0]}`, 12 of `{RECIPES[1]}`. {_made(rows)}*"


def _row(rows: list[dict[str, str]], recipe: str, variant: str) -> dict[str, str]:
    """The row of `variant` under T4-like attention."""
    (found,) = (r for r in rows if (r["recipe"], r["variant"], r["attention"]) == (recipe, variant, "T4-like"))
    return found


def _t4(rows: list[dict[str, str]], recipe: str, variant: str) -> float:
    return float(_row(rows, recipe, variant)["t4_ms"])


def _tables(rows: list[dict[str, str]], headings: tuple[str, ...]) -> str:
    parts = []
    for name in dict.fromkeys(row["recipe"] for row in rows):
        own = [row for row in rows if row["recipe"] == name]
        lines = [[f"`{name}`", "attention", *(heading.strip() for heading in headings)]]
        lines += [["---"] * len(lines[0])]
        for row in own:
            lines.append([row["variant"], row["attention"], *(_cell(row, own, heading) for heading in headings)])
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts)


def _made(rows: list[dict[str, str]]) -> str:
    made = sorted({f"{row['device']}, torch {row['torch']}" for row in rows})
    return f"{'; '.join(made)}. T4 times are modelled, not measured." if rows else "Not measured yet."


def _cell(row: dict[str, str], rows: list[dict[str, str]], heading: str) -> str:
    field, form = COLUMNS[heading]
    if not row[field]:
        return ""
    if "{" in form:
        return form.format(row[field] if form == "{}" else float(row[field]))
    stock = next((r[field] for r in rows if r["variant"] == STOCK and r["attention"] == row["attention"]), "")
    if not stock:
        return ""
    if form == "less":
        return f"{float(row[field]) - float(stock):+.1e}" if row["variant"] != STOCK else ""
    share = float(row[field]) / float(stock)
    return f"{share:.2f}" if form == "share" else f"{1 / share:.1f}"


def placed(text: str, table: str) -> str:
    """`text` with `table` between its two marker comments. Raises ValueError if they are missing."""
    before, begin, rest = text.partition("<!-- speed: made by tests/benchmarks/ladder.py -->")
    _, end, after = rest.partition("<!-- /speed -->")
    if not (begin and end):
        raise ValueError("the marker comments of the speed table are missing")
    return f"{before}{begin}\n{table}\n{end}{after}"


def files() -> dict[Path, str]:
    """Each README as it should be."""
    rows = read()
    kinds = {HERE.parents[1] / "README.md": short, HERE / "README.md": full}
    return {file: placed(file.read_text(encoding="utf-8"), kind(rows)) for file, kind in kinds.items()}


def main() -> None:
    for file, text in files().items():
        file.write_text(text, encoding="utf-8")
        print(file)


if __name__ == "__main__":
    main()
