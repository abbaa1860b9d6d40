"""The captions of a data set while a person reviews them: each change on disk at once, and each can be undone."""

from __future__ import annotations

from pathlib import Path

from .. import data
from ..captioning.places import Places
from ..reading import captions


class Edits:
    """`texts` has the caption of each of `examples`; None where there is none, '' where a picture is to have none.

    Changes are written where the reader finds them (`captioning.places`). Raises what `data.load` raises.
    """

    def __init__(self, dataset: str | Path):
        self.examples = data.load(dataset, captioned=False)
        self.places = Places(dataset, self.examples)
        kept = self.places.kept
        self.texts = [None if e.wordless and kept.get(e) is None else e.caption for e in self.examples]
        self.before: list[dict[int, str | None]] = []  # {index: text} before each change, the newest last
        self.typing: int | None = None  # the index whose newest change further letters belong to

    def __len__(self) -> int:
        return len(self.examples)

    def type(self, index: int, text: str) -> None:
        """Sets one caption; letters typed one after the other are one change. Raises OSError if it can't be saved."""
        if text == (self.texts[index] or ""):
            return
        old = self.texts[index]
        self._save({index: text})
        if self.typing != index:
            self.before.append({index: old})
        self.typing = index

    def leave(self) -> None:
        """What is typed next is a change of its own."""
        self.typing = None

    def no_words(self, index: int) -> None:
        """The picture is used without a caption. Raises OSError."""
        self._change({index: ""})

    def replace(self, find: str, text: str) -> list[int]:
        """Replaces `find` by `text` in all captions, as one change; the indices that changed. Raises OSError."""
        hits = {k: old.replace(find, text) for k, old in enumerate(self.texts) if find and old and find in old}
        return self._change({k: new for k, new in hits.items() if new != self.texts[k]})

    def undo(self) -> list[int]:
        """Takes the newest change back; the indices that changed. Raises OSError."""
        self.leave()
        if not self.before:
            return []
        self._save(self.before[-1])
        return list(self.before.pop())

    def missing(self) -> list[int]:
        """The indices of pictures without a caption."""
        return [k for k, text in enumerate(self.texts) if text is None]

    def _change(self, new: dict[int, str | None]) -> list[int]:
        self.leave()
        old = {index: self.texts[index] for index in new}
        try:
            self._save(new)
        finally:  # what was saved before an error can be undone
            if done := {index: text for index, text in old.items() if self.texts[index] != text}:
                self.before.append(done)
        return list(done)

    def _save(self, new: dict[int, str | None]) -> None:
        """Writes captions where the reader finds them; one line a caption, appended at once."""
        kept, rows, old = self.places.kept, [], list(self.texts)
        try:
            for index, text in new.items():
                example = self.examples[index]
                if text is None:
                    self.places.remove(example)
                else:
                    row, known = self.places.write(example, text, captions.YOU), kept.get(example)
                    if row["here"] or known is None or known["here"] or known["by"] != captions.YOU:
                        before = (known or {}).get("before")  # what a captioner replaced stays known
                        rows.append(row | ({"before": before} if before else {}))
                self.texts[index] = text
        finally:
            try:
                if len(rows) == 1:  # typing: the file does not grow with each letter
                    kept.rewrite([*kept.rows.values(), *rows])
                elif rows:
                    kept.put(rows)
            except OSError:
                self.texts = old
                raise
