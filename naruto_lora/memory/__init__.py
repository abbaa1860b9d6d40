"""Memory: the tricks that fit SDXL's training on a small GPU, and the plan that chooses among them.

In the order to read it:

- `gpu`: the card, what of its memory is free, giving memory back
- `fused`: the arithmetic of the lean step: layers that keep little for the backward pass
- `lean`: the lean step: the U-Net's layers replaced by `fused`'s; frozen weights in host memory, 8 or 4 bits
- `fallback`: the ways to compute a micro-batch, and the next one when the GPU runs out of memory
- `predict`: the memory that each way needs, calculated before a weight is loaded
- `plan`: the first way that fits this card
- `adam`: bitsandbytes' 8-bit Adam over joined tensors
- `optimizer`: the optimizer that fits the machine, and its state for a checkpoint
- `speed`: the speed of this machine, measured

It imports `models`, `lora` and `step`; from `data` upward everything may import it.
"""
