"""What in a data set may spoil a LoRA: a look before hours of training."""

from __future__ import annotations

import collections


def look(examples: list, resolution: int) -> list[dict]:
    """Rows for a table: each kind of fault at `resolution` px, how many pictures have it, and an example."""
    sizes = [example.size() for example in examples]
    captions = collections.Counter(example.caption.strip() for example in examples)
    first: dict[bytes, int] = {}  # by picture: where it comes first
    faults = {
        f"smaller than {resolution} px: blurred": [e for e, size in zip(examples, sizes, strict=True)
                                                   if min(size) < resolution],
        "a third or more is cropped away": [e for e, size in zip(examples, sizes, strict=True)
                                            if min(size) < 2 / 3 * max(size)],
        "the same picture again": [e for n, e in enumerate(examples) if first.setdefault(e.digest, n) != n],
        "a caption that others have too": [e for e in examples if captions[e.caption.strip()] > 1],
        "a caption of 60 words or more: its end may not be read": [e for e in examples if len(e.caption.split()) >= 60],
    }  # fmt: skip
    return [
        {"what": what, "pictures": f"{len(f)} of {len(examples):,}", "for example": f[0].name if f else ""}
        for what, f in faults.items()
    ]
