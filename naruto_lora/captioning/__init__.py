"""Captioning: captions for pictures that have none, and captions reviewed by hand.

In the order to read it:

- `write`: the captions of a data set, made where they are missing, kept where the pictures are
- `places`: where a caption is written
- `captioners`: BLIP, Florence-2, a WD tagger, or a module of your own

It imports `data`, `reading/`, `models`, `hub`, `memory/` and `files`. Notebooks, `widgets/` and the command import it.
"""
