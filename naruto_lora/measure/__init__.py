"""Measure: figures with intervals, and what they say.

In the order to read it:

- `validation`: a model in training: hold-out loss, previews
- `metrics`: a figure with its 95% interval; hold-out loss, paired changes
- `encoders`: CLIP or another encoder: pictures and texts as vectors
- `similarity`: style distance, drift, diversity, copying
- `study`: all models on the same prompts and seeds
- `verdict`: the figures in words, and what each of them can't say

`train` imports `validation`; `show`, `widgets` and `colab` may import all.
"""
