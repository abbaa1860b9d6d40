"""naruto_lora: give Stable Diffusion XL a style on a GPU that costs nothing.

recipe -> captioned images -> cache -> U-Net + LoRA -> training -> checkpoints -> pictures -> comparison.
Each module holds one of these arrows; README.md draws the whole. Importing the package loads nothing heavy.
"""

__version__ = "0.1.0"
