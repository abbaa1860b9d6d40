"""The package in figures: its longest function, class and module, its deepest nesting, the size of its ground floor.

`python tests/structure.py` prints them; the tests hold them to BOUNDS.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "naruto_lora"
BOUNDS = {  # lines, levels, modules
    "function": 60, "class": 200, "nesting": 4, "module": 420, "ground modules": 14, "ground lines": 3000,
}  # fmt: skip
NESTING = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.Match, ast.FunctionDef, ast.AsyncFunctionDef)


def measure(package: Path = PACKAGE) -> dict[str, tuple[int, str]]:
    """{what: (figure, where)}, the largest of each; the ground floor's modules and lines."""
    largest = dict.fromkeys(BOUNDS, (0, ""))
    ground = [file for file in package.glob("*.py") if not file.stem.startswith("__")]
    for file in sorted(package.rglob("*.py")):
        name, text = file.relative_to(package).as_posix(), file.read_text()
        found = [("module", text.count("\n"), name)]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found.append(("function", _lines(node), f"{name}:{node.lineno} {node.name}"))
                found.append(("nesting", depth(node), f"{name}:{node.lineno} {node.name}"))
            elif isinstance(node, ast.ClassDef):
                found.append(("class", _lines(node), f"{name}:{node.lineno} {node.name}"))
        for what, figure, where in found:
            if figure > largest[what][0]:
                largest[what] = figure, where
    largest["ground modules"] = len(ground), "naruto_lora/*.py"
    largest["ground lines"] = sum(file.read_text().count("\n") for file in ground), "naruto_lora/*.py"
    return largest


def _lines(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def depth(function: ast.AST) -> int:
    """How many blocks stand inside each other in a function; an `elif` is on the level of its `if`."""

    def below(node: ast.AST, level: int) -> int:
        deepest = level
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    both = isinstance(node, ast.If) and isinstance(child, ast.If)
                    chained = both and name == "orelse" and len(value) == 1
                    deepest = max(deepest, below(child, level + (isinstance(child, NESTING) and not chained)))
        return deepest

    return below(function, 0)


def lines() -> list[str]:
    """The figures beside their bounds, for people."""
    rows = measure().items()
    return [f"{what}: {figure:,} of {BOUNDS[what]:,} at most   {where}" for what, (figure, where) in rows]


if __name__ == "__main__":
    print("\n".join(lines()))
