"""Whether two run folders hold the same results, bit for bit.

    python tests/same_runs.py ONE OTHER

Compared are LoRA files, checkpoints, previews and other pictures (their pixels) by content, run.json and other JSON
without times, places and the machine. Prints what differs and what only one of them has; the status is 1 then. What
one made with another version of the code, such as before and after a change that must change nothing, is tried so.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

PICTURES = (".png", ".jpg", ".jpeg")
CONTENT = (*PICTURES, ".safetensors", ".json", ".jsonl")
VARYING = {  # keys: times, places
    "seconds", "minutes", "adapter", "file", "machine", "peak_gib", "device", "dataset", "base",
}  # fmt: skip
TITLES = ("ss_output_name", "modelspec.title")  # a LoRA file is named after its run's folder
TIMES = re.compile(r"[\d.]+ (?:more |fewer )?minutes")


def content(file: Path) -> str:
    """What of a file must be the same in both folders, as hex digits."""
    if file.suffix in PICTURES:
        from PIL import Image

        with Image.open(file) as picture:
            data = f"{picture.mode} {picture.size}".encode() + picture.tobytes()
    elif file.suffix == ".json":
        data = json.dumps(_steady(json.loads(file.read_text())), sort_keys=True).encode()
    else:
        data = _untitled(file.read_bytes())
    return hashlib.sha256(data).hexdigest()


def _untitled(data: bytes) -> bytes:
    """A LoRA file without its run's name; every other file as it is."""
    if b'"ss_output_name"' not in data[:4096]:
        return data
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = {key: value for key, value in header["__metadata__"].items() if key not in TITLES}
    return json.dumps(header).encode() + data[8 + length :]


def _steady(value):
    """A JSON value without what two runs of the same code differ in."""
    if isinstance(value, dict):
        return {key: _steady(item) for key, item in value.items() if key not in VARYING}
    if isinstance(value, list):
        return [_steady(item) for item in value]
    return TIMES.sub("", value) if isinstance(value, str) else value


def files(folder: Path) -> dict[str, Path]:
    """{name below `folder`: file} of what is compared; the cache's shards are named after their content."""
    found = (file for file in folder.rglob("*") if file.suffix in CONTENT and file.is_file())
    return {file.relative_to(folder).as_posix(): file for file in found}


def differences(one: Path, other: Path) -> list[str]:
    """What differs, a line each. Raises FileNotFoundError for a folder that holds nothing to compare."""
    first, second = files(one), files(other)
    for folder, found in ((one, first), (other, second)):
        if not found:
            raise FileNotFoundError(f"'{folder}' holds no LoRA, picture or JSON file")
    names = [json.loads((folder / "run.json").read_text()).get("file") if (folder / "run.json").is_file() else None
             for folder in (one, other)]  # named after the folder
    if names[0] != names[1] and names[0] in first and names[1] in second:
        second[names[0]] = second.pop(names[1])
    lines = [f"only in {one}: {name}" for name in sorted(first.keys() - second.keys())]
    lines += [f"only in {other}: {name}" for name in sorted(second.keys() - first.keys())]
    both = sorted(first.keys() & second.keys())
    return lines + [f"differs: {name}" for name in both if content(first[name]) != content(second[name])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", type=Path)
    parser.add_argument("other", type=Path)
    options = parser.parse_args()
    try:
        found = differences(options.one, options.other)
    except FileNotFoundError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 2
    print("\n".join(found) or f"the same: {len(files(options.one))} files")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
