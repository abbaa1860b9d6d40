"""diffusers' own training script, given to these benchmarks as a file: its command line, and its steps watched."""

import sys
from pathlib import Path

NAME = "examples/text_to_image/train_text_to_image_lora_sdxl.py"


def found(file: Path) -> Path:
    """The script's file. SystemExit if it isn't there."""
    if not file.is_file():
        sys.exit(f"there is no stock script at '{file}'; take {NAME} of the release tag of your diffusers "
                 f"from https://github.com/huggingface/diffusers")
    return file


def arguments(**values) -> list[str]:
    """The script's command line; True is a switch, None and False are left out."""
    line = []
    for name, value in values.items():
        if value is not None and value is not False:
            line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


class Watched:
    """The script's classes changed from outside, so that each micro-step is announced and the first one is kept.

    `announced` is called at the start of each micro-step. `first` holds, after it, what `step.diffusion_loss` takes
    (but for the noise schedule) and the script's own `loss` ().
    """

    def __init__(self, announced):
        import accelerate
        import diffusers

        self.first = {}
        accumulate, backward = accelerate.Accelerator.accumulate, accelerate.Accelerator.backward
        prepare, add_noise = accelerate.Accelerator.prepare, diffusers.DDPMScheduler.add_noise

        def accumulating(accelerator, *models):
            announced()
            return accumulate(accelerator, *models)

        def preparing(accelerator, unet, *rest, **named):
            self.hook = unet.register_forward_pre_hook(self._inputs, with_kwargs=True)
            return prepare(accelerator, unet, *rest, **named)

        def noising(scheduler, latents, noise, timesteps):
            self._keep(latents=latents, noise=noise, timesteps=timesteps)
            return add_noise(scheduler, latents, noise, timesteps)

        def going_back(accelerator, loss, **named):
            self._keep(loss=loss)
            return backward(accelerator, loss, **named)

        accelerate.Accelerator.accumulate, accelerate.Accelerator.backward = accumulating, going_back
        accelerate.Accelerator.prepare, diffusers.DDPMScheduler.add_noise = preparing, noising

    def _keep(self, **tensors) -> None:
        for name, value in tensors.items():
            self.first.setdefault(name, value.detach().clone())

    def _inputs(self, unet, positional, named) -> None:
        added = named["added_cond_kwargs"]
        self._keep(prompt_embeds=positional[2], pooled=added["text_embeds"], time_ids=added["time_ids"])
        self.hook.remove()
