"""What clips are made from, as their records tell it: settings, files, and what is left to the base."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from model import UserError
from sampling.media import image_files
from weights import Base, embedding_path, lora_path, parse_lora, sha256, split_token
from weights.peft_config import ADAPTER_FILES, PEFT_CONFIG

if TYPE_CHECKING:
    from sampling.generate import GenerateSettings

Clip = tuple[str, int, Path | None]  # prompt, seed, and the file it goes to, if it is to be kept
# Settings that need not be given, and the base's own number that then counts.
LEFT_OPEN = {
    **{name: name for name in ("num_frames", "height", "width", "fps", "guidance_scale")},
    "steps": "sampling_steps",
    "device": "",
    "dtype": "",
}
PER_CLIP = ("prompt", "seed", "out", "batch_size")  # settings that the record of a clip tells in its own way


def left_open(
    settings: "GenerateSettings", base: Base, known: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """What takes the place of settings that were not given, by name, and the device and precision as they are.

    Args:
        settings: as they were given.
        base: whose own numbers are used,
        known: but for these.
    """
    recipe = base.recipe
    own = {name: getattr(recipe, LEFT_OPEN[name]) for name in LEFT_OPEN if LEFT_OPEN[name]}
    own = {name: known.get(name, value) for name, value in own.items() if getattr(settings, name) is None}
    return own | {"device": str(base.device), "dtype": str(base.dtype).removeprefix("torch.")}


def batches(clips: Sequence[Clip], size: int) -> list[Sequence[Clip]]:
    """The clips in lots of `size`, that are sampled at once."""
    return [clips[first : first + size] for first in range(0, len(clips), size)]


def origins(settings: "GenerateSettings", batched: Sequence[Sequence[Clip]]) -> dict[Path, dict[str, Any]]:
    """By file, the part of each clip's record that is known before the base is loaded.

    Raises:
        UserError: a LoRA or an embedding that is not there.
    """
    given = {name: value for name, value in asdict(settings).items() if name not in PER_CLIP}
    files = {
        flag: {name: sha256(file) for name, file in found.items()} for flag, found in input_files(settings).items()
    }
    return {
        file: {
            "prompt": prompt,
            "seed": seed,
            "prompts": [prompt for prompt, _, _ in batch],
            "seeds": [seed for _, seed, _ in batch],
            "settings": given,
            "files": files,
        }
        for batch in batched
        for prompt, seed, file in batch
        if file is not None
    }


def input_files(settings: "GenerateSettings") -> dict[str, dict[str, Path]]:
    """What goes into a clip beside the base: by flag, the files by the name they were given by.

    Raises:
        UserError: one that is not there.
    """
    loras = {name: lora_path(name) for name in (parse_lora(argument).path for argument in settings.lora)}
    for file in loras.values():
        if not file.is_file():  # a device would be read for ever
            raise UserError(f"{file} is no file")
    configs = {file.with_name(PEFT_CONFIG) for file in loras.values() if file.name in ADAPTER_FILES}
    tokens = {name: embedding_path(name) for name in (split_token(argument)[0] for argument in settings.embedding)}
    for file in tokens.values():
        if not file.is_file():
            raise UserError(f"{file} is no file: a textual-inversion file was expected")
    found = {
        "lora": loras | {str(config): config for config in sorted(configs) if config.is_file()},
        "embedding": tokens,
    }
    source = getattr(settings, "video", None)  # of `customttt edit`
    if source is not None:
        pictures = image_files(source) if Path(source).is_dir() else [Path(source)]
        found["video"] = {str(file): file for file in pictures}
    return found
