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
SHORT = ("× faster", "GPU work", "of stock", "T4, modelled", "of stock ", "GiB reserved")


def read(file: Path = RESULTS) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def full(rows: list[dict[str, str]]) -> str:
    """Every row and figure, a table a recipe."""
    return _tables(rows, tuple(COLUMNS))


def short(rows: list[dict[str, str]]) -> str:
    """The same rows, with what matters most."""
    return _tables(rows, SHORT)


def _tables(rows: list[dict[str, str]], headings: tuple[str, ...]) -> str:
    parts = []
    for name in dict.fromkeys(row["recipe"] for row in rows):
        own = [row for row in rows if row["recipe"] == name]
        lines = [[f"`{name}`", "attention", *(heading.strip() for heading in headings)]]
        lines += [["---"] * len(lines[0])]
        for row in own:
            lines.append([row["variant"], row["attention"], *(_cell(row, own, heading) for heading in headings)])
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    made = sorted({f"{row['device']}, torch {row['torch']}" for row in rows})
    parts.append(f"*{'; '.join(made)}. T4 times are modelled, not measured.*" if rows else "*Not measured yet.*")
    return "\n\n".join(parts)


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
