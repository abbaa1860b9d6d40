"""A notebook's form: the parameters that it declares, and those that papermill sets."""

from __future__ import annotations

import ast
import difflib


def check_parameters(cells: list[str] | None = None) -> None:
    """Raises ValueError, with the nearest name, for a parameter that papermill sets and the notebook doesn't have.

    `cells` are the sources of the cells run so far, by default this notebook's: the form, whose lines say `@param`,
    and the cell that papermill inserts after it. Papermill itself only warns.
    """
    if cells is None:
        from IPython import get_ipython

        cells = get_ipython().user_ns["In"]
    declared = {name for cell in cells if "# @param" in cell for name in _assigned(cell)}
    given = {name for cell in cells if cell.startswith("# Parameters\n") for name in _assigned(cell)}
    for name in sorted(given - declared) if declared else ():
        near = difflib.get_close_matches(name, declared, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(sorted(declared))}"
        raise ValueError(f"this notebook has no parameter '{name}': {hint}")


def _assigned(cell: str) -> list[str]:
    """The names that a cell assigns at its top level; none if it isn't plain Python."""
    try:
        body = ast.parse(cell).body
    except SyntaxError:
        return []
    return [target.id for node in body if isinstance(node, ast.Assign) for target in node.targets
            if isinstance(target, ast.Name)]
