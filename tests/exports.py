"""A LoRA of ours to export, and what its exports should hold."""

import torch
from safetensors import safe_open

from lora import adapter_modules, add_adapter, remove_adapter
from weights import save_lora
from weights.export import ExportSettings, export

WORDS = {"appearance": ("a zor teddy", "zor"), "motion": ("a man is running", "")}
SPECS = {
    "appearance": {"kind": "spatial", "layers": (2, 4, 6), "rank": 4, "alpha": 6.0, "targets": "all"},
    "motion": {"kind": "temporal", "layers": (2, 4, 5), "rank": 3, "alpha": 1.7, "targets": "all"},
}


def written(unet, path, **specs):
    """A file of adapters with random A and B; the network is left without. Returns {adapter: {layer: (A, B)}}."""
    generator, halves = torch.Generator().manual_seed(0), {}
    for name, spec in specs.items():
        add_adapter(unet, name, **spec)
        for module in adapter_modules(unet, name).values():
            module.A.data = torch.randn(module.A.shape, generator=generator) / module.A.shape[1] ** 0.5
            module.B.data = 0.5 * torch.randn(module.B.shape, generator=generator)
        modules = adapter_modules(unet, name)
        halves[name] = {layer: (m.A.detach().clone(), m.B.detach().clone()) for layer, m in modules.items()}
    save_lora(path, unet, {name: WORDS.get(name, ("", "")) for name in specs}, base="sd15", settings={"steps": 5})
    for name in specs:
        remove_adapter(unet, name)
    return halves


def exported(run, form, out, **options):
    return export(ExportSettings(run=str(run), format=form, out=str(out), **options))


def delta(halves, spec):
    """(alpha / r) B A."""
    a, b = halves
    return spec["alpha"] / spec["rank"] * b @ a


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()
