"""`customttt inspect FILE...`: what each file is, where it belongs, and what is in it."""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from model.errors import UserError
from weights.command import run_command
from weights.detect import FileKind, detect
from weights.embeddings import KIND, token_in, vectors_in
from weights.files import Header, TensorInfo, printable, read_header
from weights.record import SUFFIX, find_record

# What files carry beside weights: positional tables, the noise schedule, copies for averaging, scales of LoRAs, the
# numbers of tokens.
CONSTANTS = re.compile(
    r"(^|\.)(pe|position_ids|alpha)$|^string_to_token|^model_ema\.|^(betas|alphas_|sqrt_|log_one_|posterior_|lvlb_|logvar|scale_factor)"
)
DOWN = re.compile(r"(lora_down|lora\.down|lora_linear_layer\.down|lora_A(\.\w+)?)\.weight$")
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.ckpt", "*.pt", "*.pth")
# Entries of a header worth a line, of all that kohya's, A1111's and diffusers' tools write.
TELLING = (
    *("name", "step", "global_step", "epoch", "sd_checkpoint_name", "model_type", "rank", "lora_adapter_metadata"),
    *("ss_base_model_version", "ss_sd_model_name", "ss_network_dim", "ss_network_alpha", "ss_output_name"),
    *("modelspec.title", "modelspec.architecture", "modelspec.trigger_phrase", "modelspec.usage_hint"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what each file or folder named in `argv` is; returns 2 if one of them could not be read, else 0."""
    parser = argparse.ArgumentParser(
        prog="customttt inspect",
        description="Say what checkpoint files, LoRAs, folders, images and videos are, and where each belongs.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a file or a folder")
    code = 0
    for index, name in enumerate(parser.parse_args(argv).files):
        try:
            text = describe(name)
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
        else:
            print(("\n" if index else "") + text)
    return code


def describe(path: str | Path) -> str:
    """What a file or folder is, as lines for people. Raises UserError where it cannot be told."""
    path = Path(path)
    of_clip = path.name.endswith(SUFFIX) and path.is_file()
    found = FileKind("record of a clip", note="It belongs in --from.") if of_clip else detect(path)
    lines = [("kind", ", ".join(filter(None, (found.kind, found.version, found.family))))]
    if found.kind == "run folder" and (path / "lora.safetensors").is_file():
        lines += _file_lines(path / "lora.safetensors", FileKind("customttt LoRA"))
    elif of_clip:
        lines += _record_lines(path)
    elif path.is_dir() and found.kind != "run folder":
        lines += [*_record_lines(path), *_folder_lines(path)]
    elif found.kind in ("image", "video") and path.is_file():
        lines += [("size", f"{path.stat().st_size:,} bytes"), *_record_lines(path)]
    elif path.is_file():
        lines += _file_lines(path, found)
    lines.append(("note", found.note))
    width = max(len(name) for name, _ in lines)
    return "\n".join([str(path), *(f"  {name:<{width}}  {printable(value, 400)}" for name, value in lines)])


def layer_of(name: str) -> int | None:
    """Which of the UNet's nine layers (down 0-3, middle 4, up 5-8) a tensor belongs to; None: to none of them.

    Knows diffusers', LDM's and kohya's names.
    """
    if found := re.search(r"(down|mid|up)_blocks?[._](\d)?", name):
        return {"down": 0, "mid": 4, "up": 5}[found[1]] + int(found[2] or 0)
    if found := re.search(r"(input|middle|output)_blocks?[._](\d+)", name):
        index = int(found[2])
        layer = {"input": (index + 2) // 3 - 1, "middle": 4, "output": 5 + index // 3}[found[1]]
        return layer if layer >= 0 else None  # input block 0 is conv_in
    return None


def _file_lines(path: Path, found: FileKind) -> list[tuple[str, str]]:
    header = read_header(path)
    tensors = header.tensors
    parameters = _count(tensors)
    constants = sum(info.size for info in tensors.values()) - parameters
    lines = [
        ("container", f"{header.container}, {path.stat().st_size:,} bytes"),
        ("tensors", f"{len(tensors):,}"),
        ("parameters", f"{parameters:,}" + (f" (and constants: {constants:,})" if constants else "")),
        ("dtype", _counted(info.dtype for info in tensors.values())),
    ]
    ranks = [str(info.shape[0]) for name, info in tensors.items() if DOWN.search(name) and info.shape]
    if ranks:
        lines.append(("rank", ranks[0] if len(set(ranks)) == 1 else _counted(ranks)))
    if found.family in ("sd15", "") and found.kind not in ("VAE", "text encoder"):
        lines += _layer_lines(tensors)
    if found.kind == KIND:
        lines += _embedding_lines(path, header)
    if "customttt" in header.metadata:
        lines += _own_lines(path, header.metadata["customttt"])
    return lines + [(key, header.metadata[key]) for key in TELLING if key in header.metadata]


def _layer_lines(tensors: Mapping[str, TensorInfo]) -> list[tuple[str, str]]:
    """Layers that hold something of the image part's transformers, and of the motion modules."""
    layers: dict[str, set[int]] = {"spatial": set(), "temporal": set()}
    for name in tensors:
        layer = None if re.search(r"(^|\.)(encoder|decoder)\.", name) else layer_of(name)
        if layer is not None and "motion_modules" in name:
            layers["temporal"].add(layer)
        elif layer is not None and re.search(r"attentions|transformer_blocks", name):
            layers["spatial"].add(layer)
    return [(kind, "layers " + " ".join(map(str, sorted(held)))) for kind, held in layers.items() if held]


def _embedding_lines(path: Path, header: Header) -> list[tuple[str, str]]:
    shapes = [info.shape for info in vectors_in(header.tensors).values()]
    vectors = [f"{shape[0] if len(shape) > 1 else 1} of width {shape[-1]}" for shape in shapes if shape]
    token = token_in(header, path) or "none in the file: write one behind a colon, FILE:TOKEN"
    return [("token", token), ("vectors", ", ".join(vectors))]


def _own_lines(path: Path, text: str) -> list[tuple[str, str]]:
    """The adapters that the header of a LoRA of ours lists."""
    try:
        header = json.loads(text)
        return [
            (
                "adapter",
                f"{name}: {entry['kind']}, layers {' '.join(map(str, entry['layers']))}, rank {entry['rank']}, "
                f"alpha {entry['alpha']}, prompt {entry['prompt']!r}",
            )
            for name, entry in header["adapters"].items()
        ] + [("base", str(header["base"]["name"]))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is a LoRA of customttt with a damaged header: {error!r}.") from error


def _record_lines(path: Path) -> list[tuple[str, str]]:
    """What a clip of ours was made with; nothing for other pictures and videos."""
    try:
        record = find_record(path)
    except UserError as error:  # a bad record does not hide what the file is
        return [("record", f"unreadable: {error}")]
    if record is None:
        return []
    made_by = {"customttt": record.customttt, **record.versions}
    return [
        ("prompt", record.prompt),
        ("seed", str(record.seed)),
        *((flag, f"{name} (SHA-256 {its})") for flag, files in record.files.items() for name, its in files.items()),
        ("base", record.base),
        ("made by", ", ".join(f"{name} {number}" for name, number in made_by.items())),
        ("again", "`customttt generate --from` makes it again"),
    ]


def _folder_lines(path: Path) -> list[tuple[str, str]]:
    """One line for each file of weights, here and one folder down, and the sum of each folder."""
    lines = []
    for folder in sorted({path, *(entry for entry in path.iterdir() if entry.is_dir())}):
        files = sorted(file for pattern in WEIGHT_FILES for file in folder.glob(pattern))
        for file in files:
            try:
                tensors = read_header(file).tensors
                held = f"{len(tensors):,} tensors, {_count(tensors):,} parameters, "
                held += f"{_counted(info.dtype for info in tensors.values())} ({file.name})"
            except UserError as error:  # one bad file does not hide the others
                held = f"unreadable: {error}"
            lines.append((folder.name if folder != path else "weights", held))
    return lines


def _count(tensors: Mapping[str, TensorInfo]) -> int:
    """Parameters, constants left out."""
    return sum(info.size for name, info in tensors.items() if not CONSTANTS.search(name))


def _counted(values: Iterable[str]) -> str:
    counts = Counter(values).most_common()
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{value} ({count:,})" for value, count in counts)


if __name__ == "__main__":
    run_command(main)
