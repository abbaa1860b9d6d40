"""Measure: figures with intervals, and what they mean.

In reading order:

- `validation`: hold-out loss and previews during training
- `metrics`: figures with a 95% interval; hold-out loss, paired changes
- `encoders`: CLIP or another encoder, which turns pictures and texts into vectors
- `similarity`: style distance, drift, diversity, copying
- `roundtrip`: what the VAE can't keep of a data set's pictures
- `study`: all models on the same prompts and seeds
- `verdict`: the figures in words, and what each of them can't show

`train` imports `validation`; `show`, `widgets` and `colab` may import all of it.
"""
