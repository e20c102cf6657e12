"""What a LoRA file's header, or the adapter_config.json beside it, says of its strength (PEFT's LoraConfig)."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.errors import UserError
from weights.files import read_json

HEADER = "lora_adapter_metadata"  # diffusers' entry of a safetensors header
PREFIXES = {"unet": "unet.", "text": "text_encoder."}
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT's own folder
PEFT_CONFIG = "adapter_config.json"  # beside them


@dataclass(frozen=True)
class PeftConfig:
    """What scales an adapter: alpha / r, or alpha / sqrt(r) with `rslora`; r is read from the tensors.

    Args:
        alpha: of all layers that no pattern names.
        patterns: {regular expression for the end of a layer's name: alpha}, the first that fits counts.
        rslora: rank-stabilised (Kalajdzievski 2023).
    """

    alpha: float
    patterns: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    def alpha_of(self, layer: str, rank: int) -> float:
        """The alpha that, divided by r, scales this layer (the file's name for it, without wrappers)."""
        fitting = (alpha for pattern, alpha in self.patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
        alpha = next(fitting, self.alpha)
        return alpha * math.sqrt(rank) if self.rslora else alpha


def read_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, PeftConfig]:
    """The configs that a LoRA file comes with, by network ("unet", "text"); none is {}: alpha is r.

    Args:
        path: the file; PEFT's own `adapter_model` has an adapter_config.json beside it.
        metadata: of its header.

    Raises:
        UserError: a config that is damaged, or of another method than LoRA.
    """
    beside = path.with_name(PEFT_CONFIG)
    if path.name in ADAPTER_FILES and beside.is_file():
        return dict.fromkeys(PREFIXES, _config(_table(read_json(beside), beside), beside))
    if HEADER not in metadata:
        return {}
    try:
        table = _table(json.loads(metadata[HEADER]), path)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the entry {HEADER} of its header is damaged ({error})") from error
    found = {}
    for part, prefix in PREFIXES.items():
        own = {key.removeprefix(prefix): value for key, value in table.items() if key.startswith(prefix)}
        if own:
            found[part] = _config(own, path)
    # a network's own `save_lora_adapter` writes the entries without its name
    return found if found or not table else dict.fromkeys(PREFIXES, _config(table, path))


def _config(table: Mapping[str, Any], path: Path) -> PeftConfig:
    method = table.get("peft_type") or "LORA"
    if str(method).rpartition(".")[2] != "LORA":
        raise UserError(f"{path} says that it is {method}, which is not a plain LoRA: customttt does not read it")
    patterns = table.get("alpha_pattern") or {}
    alphas = {str(pattern): _number(alpha, path) for pattern, alpha in _table(patterns, path).items()}
    for pattern in alphas:
        _check_pattern(pattern, path)
    # 8 is what PEFT takes where a config is silent
    return PeftConfig(_number(table.get("lora_alpha", 8), path), alphas, bool(table.get("use_rslora")))


def _table(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path}: its LoRA settings are damaged (a table was expected, not {type(value).__name__})")
    return value


def _number(value: Any, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{path}: its LoRA settings are damaged (alpha is {value!r})")
    return float(value)


def _check_pattern(pattern: str, path: Path) -> None:
    """Patterns come from strangers, and repeats inside repeats can take Python's matcher years."""
    if len(pattern) > 300 or len(re.findall(r"[*+{]", pattern)) > 2 or re.search(r"\)[*+?{]", pattern):
        raise UserError(f"{path}: the pattern {pattern[:80]!r} in its LoRA settings is too involved to be followed")
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{path}: the pattern {pattern!r} in its LoRA settings is damaged ({error})") from error
