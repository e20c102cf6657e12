"""Low-rank adapters on chosen layers of the network."""

from lora.layer import Adapter, AdapterSpec, LoRALinear
from lora.network import (
    KINDS,
    TARGETS,
    adapter_linears,
    adapter_modules,
    adapter_names,
    adapter_parameters,
    adapter_spec,
    adapters,
    add_adapter,
    copy_adapter,
    layers_with,
    merge_adapters,
    remove_adapter,
    switch_adapters,
    unmerge_adapters,
)

__all__ = [
    "KINDS",
    "TARGETS",
    "Adapter",
    "AdapterSpec",
    "LoRALinear",
    "adapter_linears",
    "adapter_modules",
    "adapter_names",
    "adapter_parameters",
    "adapter_spec",
    "adapters",
    "add_adapter",
    "copy_adapter",
    "layers_with",
    "merge_adapters",
    "remove_adapter",
    "switch_adapters",
    "unmerge_adapters",
]
