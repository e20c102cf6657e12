"""Files in and out: bases, LoRAs, settings."""

from weights.command import run_command
from weights.device import placed
from weights.embeddings import (
    Embedding,
    embedding_path,
    learned_tokens,
    read_embedding,
    read_embeddings,
    save_embedding,
    split_token,
    unused_tokens,
)
from weights.files import (
    atomic_write,
    json_text,
    printable,
    read_checkpoint,
    read_header,
    read_json,
    sha256,
    write_json,
)
from weights.load import Base, load_base
from weights.lora import LoRAEntry, LoRAFile, load_lora, lora_path, read_lora_header, save_lora
from weights.open import BaseSettings, open_base, with_source
from weights.record import Record, find_record, record_file, versions
from weights.save import save_base
from weights.settings import complete, parse_given, parse_settings, save_settings, settings_from
from weights.strengths import LoRAArgument, parse_lora, split_strength

__all__ = [
    "Base",
    "BaseSettings",
    "Embedding",
    "LoRAArgument",
    "LoRAEntry",
    "LoRAFile",
    "Record",
    "atomic_write",
    "complete",
    "embedding_path",
    "find_record",
    "json_text",
    "learned_tokens",
    "load_base",
    "load_lora",
    "lora_path",
    "open_base",
    "parse_given",
    "parse_lora",
    "parse_settings",
    "placed",
    "printable",
    "read_checkpoint",
    "read_embedding",
    "read_embeddings",
    "read_header",
    "read_json",
    "read_lora_header",
    "record_file",
    "run_command",
    "save_base",
    "save_embedding",
    "save_lora",
    "save_settings",
    "settings_from",
    "sha256",
    "split_strength",
    "split_token",
    "unused_tokens",
    "versions",
    "with_source",
    "write_json",
]
