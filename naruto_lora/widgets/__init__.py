"""Widgets: what a person clicks in a notebook; only core ipywidgets, 7.7 and 8.

In the order to read it:

- `comparer`: a prompt drawn by base and LoRAs side by side
- `viewer`: the pictures drawn before: side by side or under a slider, history, favourites
- `album`: the folder that holds them
- `ballot`: a blind vote between two models
- `votes`: the votes on disk, and what they say
- `review`: captions read, mended and replaced beside their pictures
- `edits`: the captions on disk meanwhile, and what undoes a change

Notebooks import it, and no other module of the package does.
"""
