"""Show: what a person looks at, without a widget.

In reading order:

- `compare`: pictures side by side, over time, or under a slider
- `crops`: what a crop keeps of each picture
- `report`: a run's curves and tables
- `suspects`: the pictures of a data set that may spoil a LoRA
- `page`: a comparison as one HTML file
- `model_card`: the README.md of a LoRA on the hub

It imports what is below it: the ground floor, `reading`, `memory` and `measure`. `widgets` and `colab` may import it.
"""
