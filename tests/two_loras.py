"""Two small LoRAs to train together, and what their runs leave behind."""

from pathlib import Path

import torch

from lora import (
    adapter_parameters,
    add_adapter,
    remove_adapter,
)
from sampling import encode
from train.ttt import the_one, with_defaults
from weights import save_lora

TARGET = "a teddy bear is playing guitar on the snow"
PROMPTS = {"appearance": "a teddy bear", "motion": "a man is playing guitar"}


def write_loras(base, folder, strength):
    """An appearance and a motion LoRA with B of this standard deviation; the network is left as it was."""
    paths = {}
    for name, kind, layers in (("appearance", "spatial", (2, 6)), ("motion", "temporal", (2, 5))):
        add_adapter(base.unet, name, kind, layers, rank=4, generator=torch.Generator().manual_seed(len(name)))
        for p in adapter_parameters(base.unet, name)[1::2]:
            p.data = strength * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.shape[0]))
        paths[name] = str(folder / f"{name}.safetensors")
        save_lora(paths[name], base.unet, {name: (PROMPTS[name], "")}, fingerprints=base.fingerprints)
        remove_adapter(base.unet, name)
    return paths


def lora_files(settings):
    """File and adapter's name of both LoRAs."""
    files = {role: Path(getattr(settings, role)) for role in PROMPTS}
    return {role: (file, the_one(file, role)[0]) for role, file in files.items()}


def filled_in(settings, base):
    return with_defaults(settings, base, {role: the_one(Path(getattr(settings, role)), role)[1] for role in PROMPTS})


def texts(base):
    prompts = {**PROMPTS, "student": TARGET, "negative": ""}
    return {role: encode(base, [prompt]) for role, prompt in prompts.items()}


def logged_losses(folder, step):
    row = (folder / "log.csv").read_text().splitlines()[1 + step].split(",")
    assert row[0] == str(step)
    return [float(value) for value in row[1:3]]
