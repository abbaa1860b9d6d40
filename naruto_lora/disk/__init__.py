"""Disk: what keeps files whole and unmixed while other processes and machines use the same folders.

In the order to read it:

- `owner`: one owner a run: a claim on its folder and on its mirror
- `shards`: the encoded cache's files: opened, checked, written and mirrored

It imports `files` and `progress`. `cache` and `checkpoint` import it.
"""
