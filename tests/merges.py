"""LoRAs to merge, and merges of them."""

import torch
from exports import written
from lora_files import CLIP, SPATIAL, kohya, kohya_text, random_weights
from lora_files import written as write_file

from weights.merge import MergeSettings, merge

OWN, KOHYA = "lora.safetensors", "theirs.safetensors"
STRENGTHS = {OWN: 0.9, KOHYA: 0.6}
SPECS = {
    "appearance": {"kind": "spatial", "layers": (2, 6), "rank": 4, "alpha": 6.0, "targets": "all"},
    "motion": {"kind": "temporal", "layers": (2, 5), "rank": 3, "alpha": 1.7, "targets": "all"},
}
# what kohya's scripts train: a whole transformer, and with LoCon convolutions
TRAINED = SPATIAL + r"(proj_in|proj_out|transformer_blocks\.0\.attn[12]\.to_q)|layers\.1\.resnets\.0\.conv1"


def write_loras(base, folder):
    """One of ours with both parts and one of kohya's with a part for the text encoder; the base is left without."""
    written(base.unet, folder / OWN, **SPECS)
    tensors = kohya(random_weights(base.unet, TRAINED, alpha=3.0))
    write_file(folder, tensors | kohya_text(random_weights(base.text.clip, CLIP, seed=1)), KOHYA)
    return [f"{folder / name}:{strength}" for name, strength in STRENGTHS.items()]


def merged(out, lora, **options):
    return merge(MergeSettings(lora=list(lora), out=str(out), **options))


def random_inputs():
    """A noisy clip (1, 4, 3, 8, 8) and a prompt's tokens."""
    return torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor(
        [[1022, 5, 300, 41, 1023]]
    )
