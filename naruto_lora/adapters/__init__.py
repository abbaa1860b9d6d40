"""Adapters: LoRA files of every program, read and written.

A file names its layers as its program does; here each is found in the base that is loaded. In the order to read it:

- `names`: layers' names in kohya-ss's, diffusers', peft's, ComfyUI's and OneTrainer's files, and in LDM's numbering
- `layers`: what a layer adds to a weight: LoRA, LoHa, LoKr, DoRA, a whole difference
- `origin`: which model a file was made for, by its header, names and shapes
- `reading`: a .safetensors file checked, and each of its layers matched to a module of the base; no pickle is opened
- `active`: adapters put into a pipeline, switched on and off; without one the base is as it was, bit for bit
- `header`: the header that A1111, Forge, SwarmUI, SD.Next and model sites read
- `writing`: the file that every program reads: kohya-ss's own names, fp16, alpha, header; same LoRA, same bytes

It imports `hub` and `progress`. `lora`, `checkpoint`, `pipeline`, `show/` and `colab/` import it.
"""
