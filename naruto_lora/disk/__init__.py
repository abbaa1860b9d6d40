"""Disk: what keeps files whole and unmixed while other processes and machines use the same folders.

In the order to read it:

- `owner`: one owner a run: a claim on its folder and on its mirror

It imports `progress` and `files`. `cache` and `checkpoint` import it.
"""
