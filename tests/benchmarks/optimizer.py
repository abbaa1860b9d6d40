"""8-bit AdamW of SDXL's LoRA: bitsandbytes' own, tensor by tensor, beside ours over joined ones, on one GPU.

    PYTHONPATH=. python tests/benchmarks/optimizer.py [--rank 16] [--updates 20]

Says milliseconds an update, and whether weights and states are the same bit for bit.
"""

import argparse
import json
import statistics

import measure
import sdxl
import torch
from bitsandbytes.optim import AdamW8bit

from naruto_lora.memory import adam, predict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--updates", type=int, default=20)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        sides = predict.measure(sdxl.unet(), 32).sides
    figures, found = {"tensors": len(sides), "numbers": sum(sides) * args.rank}, []
    for name, kind in (("bitsandbytes", AdamW8bit), ("together", adam.JoinedAdamW8bit)):
        generator = torch.Generator(device).manual_seed(0)
        draw = [torch.randn(side, args.rank, generator=generator, device=device) for side in sides]
        parameters = [torch.nn.Parameter(each) for each in draw]
        optimizer = kind(parameters, lr=1e-4, weight_decay=1e-2)
        seconds = []
        for _ in range(args.updates + 1):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator, device=device)
            begun = measure.now()
            optimizer.step()
            seconds.append(measure.now() - begun)
        figures[f"{name}, ms an update"] = 1000 * statistics.median(seconds[1:])  # the first makes the states
        states = [optimizer.state[p][key] for p in parameters for key in ("state1", "state2", "absmax1", "absmax2")]
        found.append(parameters + states)
    figures["the same bit for bit"] = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    print(json.dumps(figures | measure.machine(), indent=1))


if __name__ == "__main__":
    main()
