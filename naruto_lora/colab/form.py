"""A notebook's form: the parameters that it declares, those that papermill sets, and whether their values fit."""

from __future__ import annotations

import ast
import difflib
import re

KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {  # of Colab's forms: types that fit, and words for them
    "boolean": (bool, "True or False"),
    "integer": (int, "a whole number"),
    "number": ((int, float), "a number"),
    "string": (str, "text in quotes"),
}


def check_parameters(cells: list[str] | None = None, values: dict | None = None) -> None:
    """Raises ValueError for a parameter that the notebook doesn't have, or whose value is of another type.

    `cells` are the sources of the cells run so far, by default this notebook's: the form, whose lines say `@param`,
    and the cell that papermill inserts after it; `values` are its variables. Papermill only warns of an unknown
    name, and sets text where it can't read a value: with `-p disconnect false` it sets 'false', which is true.
    """
    if cells is None:
        from IPython import get_ipython

        values = get_ipython().user_ns
        cells = values["In"]
    declared = {name: kind for cell in cells for name, kind in _declared(cell)}
    given = {name for cell in cells if cell.startswith("# Parameters\n") for name in _assigned(cell)}
    for name in sorted(given - set(declared)) if declared else ():
        near = difflib.get_close_matches(name, declared, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(sorted(declared))}"
        raise ValueError(f"this notebook has no parameter '{name}': {hint}")
    for name, kind in declared.items():
        if values and name in values:
            _check(name, values[name], kind)


def _check(name: str, value, kind: str) -> None:
    types, words = KINDS[kind]
    if not isinstance(value, types) or (isinstance(value, bool) and kind != "boolean"):
        raise ValueError(f"`{name}` must be {words}, not {value!r}")


def _declared(cell: str) -> list[tuple[str, str]]:
    """(name, its kind) of each `@param` in a form's cell; a list of choices without a type is text."""
    found = re.findall(r"^(\w+) *=.*# @param(.*)$", cell, re.MULTILINE)
    kinds = [(name, re.search(r'type: *"(\w+)"', rest)) for name, rest in found]
    return [(name, kind[1] if kind and kind[1] in KINDS else "string") for name, kind in kinds]


def _assigned(cell: str) -> list[str]:
    """The names that a cell assigns at its top level; none if it isn't plain Python."""
    try:
        body = ast.parse(cell).body
    except SyntaxError:
        return []
    return [target.id for node in body if isinstance(node, ast.Assign) for target in node.targets
            if isinstance(target, ast.Name)]
