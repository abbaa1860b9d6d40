"""The figures of a comparison in words, and what each of them can't show."""

from __future__ import annotations

from dataclasses import dataclass

from .metrics import Figure


@dataclass(frozen=True)
class Metric:
    """A figure's title, which direction is better (1 up, -1 down, 0 neither), what it shows and what it can't."""

    title: str
    better: int
    says: str
    cannot: str


METRICS = {
    "holdout_loss": Metric(
        "hold-out loss", -1, "how well noise is predicted in pictures of the style that no model was trained on",
        "how pictures look; half of it is noise that no model can predict"),
    "style_distance": Metric(
        "style distance", -1, "how far the pictures, as a set, are from the hold-out pictures (CMMD)",
        "which trait of the style is missing; it depends on content too, and few pictures give wide intervals"),
    "prompt_fit": Metric(
        "prompt fit", 1, "how much of the prompt the encoder sees in the picture",
        "whether a person sees the same: an encoder of photographs can misread drawings"),
    "drift": Metric(
        "drift", 0, "how far pictures of unrelated prompts move from the base's (1: as far as another seed)",
        "whether the change is wanted: a style should change pictures"),
    "diversity": Metric(
        "diversity", 1, "how much the pictures of one prompt differ from seed to seed",
        "whether the differences are good: noise is diverse too"),
    "copying": Metric(
        "copying", -1, "whether pictures of training captions are memorised training pictures",
        "that nothing was copied: a copied part, or a mirrored or recoloured copy, can be missed"),
    "attributes": Metric(
        "attributes right", 1, "percent of the prompt's attributes that the judge finds in the picture",
        "whether a picture is pretty"),
    "style": Metric(
        "in the new style", 1, "percent of pictures that the judge recognises as the new style",
        "whether the face is still a face"),
}


def judge(name: str, change: Figure) -> str:
    """'better', 'worse', 'changed' (if neither direction is better) or 'within noise'."""
    if not change.sure:
        return "within noise"
    return {1: "better", -1: "worse", 0: "changed"}[METRICS[name].better * (1 if change.value > 0 else -1)]


def words(changes: dict[str, Figure], before: str, after: str, minutes: float | None = None) -> str:
    """One sentence on how `after` differs from `before`; its training took `minutes` more."""
    kinds: dict[str, list[str]] = {"better": [], "worse": [], "changed": [], "within noise": []}
    for name, change in changes.items():
        if name in METRICS:
            kind = judge(name, change)
            amount = f" by {abs(change.value):.3g}" if kind != "within noise" else ""
            kinds[kind].append(METRICS[name].title + amount)
    parts = [f"better in {_listed(kinds['better'])}"] if kinds["better"] else []
    parts += [f"worse in {_listed(kinds['worse'])}"] if kinds["worse"] else []
    parts += [f"different in {_listed(kinds['changed'])}"] if kinds["changed"] else []
    if kinds["within noise"]:
        parts.append(f"{'within noise' if parts else 'no clear difference'} in {_listed(kinds['within noise'])}")
    cost = ""
    if minutes is not None:
        cost = f", for {abs(minutes):.3g} {'more' if minutes >= 0 else 'fewer'} minutes of training"
    return f"{after} against {before}{cost}: {'; '.join(parts) or 'nothing was measured'}."


def copied(figures: dict[str, dict]) -> list[str]:
    """A sentence for each model whose pictures were compared with the training pictures."""
    sentences = []
    for label, found in figures.items():
        if copying := found.get("copying"):
            verdict = "it has memorised pictures" if copying.flagged else "no sign of copying"
            sentences.append(
                f"{label}: for {max(copying.near, copying.near_hash)} of {copying.n} training captions the picture is "
                f"nearer to its own than for any hold-out caption (p = {copying.chance:.2g}): {verdict}."
            )
    return sentences


def _listed(things: list[str]) -> str:
    return things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]


def rows(figures: dict[str, dict]) -> list[dict]:
    """The figures {label: {name: Figure}} as rows of a table: one row for each metric, one column for each model."""
    names = dict.fromkeys(name for found in figures.values() for name in found if name in METRICS)
    return [
        {"figure": METRICS[name].title} | {label: str(found.get(name, "")) for label, found in figures.items()}
        for name in names
    ]


def limits(figures: dict[str, dict]) -> list[dict]:
    """Rows of a table: what each figure says and what it can't say."""
    names = dict.fromkeys(name for found in figures.values() for name in found if name in METRICS)
    arrow = {1: "higher", -1: "lower", 0: "-"}
    return [{"figure": METRICS[name].title, "better": arrow[METRICS[name].better], "it says": METRICS[name].says,
             "it can't say": METRICS[name].cannot} for name in names]
