"""`customttt download NAME...`: fetch the few files needed of Stable Diffusion 1.5, AnimateDiff and CLIP."""

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError
from weights.command import run_command
from weights.hub import GO_ON, HubFile, cached, check_space, fetch, lookup

VARIANTS = {"fp16": ".fp16", "fp32": ""}
DIFFUSERS = (
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model{variant}.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model{variant}.safetensors",
    "text_encoder/config.json",
    "text_encoder/model{variant}.safetensors",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "scheduler/scheduler_config.json",
)
MOTIONS = ("ZoomIn", "ZoomOut", "PanLeft", "PanRight", "TiltUp", "TiltDown", "RollingClockwise", "RollingAnticlockwise")
SD15, ANIMATEDIFF = "stable-diffusion-v1-5/stable-diffusion-v1-5", "guoyww/animatediff"
CLIP_B32, CLIP_L14 = "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class Item:
    """Something to download.

    Args:
        repo: on the hub.
        files: in it; `{variant}` stands for what is in a file's name for its precision.
        gigabytes: roughly; what the hub states is what counts. Of the smallest variant.
        flag: what takes it.
        about: what it is.
        folder: the flag takes the folder of the files, not each of them.
    """

    repo: str
    files: tuple[str, ...]
    gigabytes: float
    flag: str
    about: str
    folder: bool = False


def _clip(repo: str, weights: str, gigabytes: float, about: str) -> Item:
    files = ("config.json", weights, "vocab.json", "merges.txt", "preprocessor_config.json")
    return Item(repo, files, gigabytes, "--clip", about, folder=True)


ITEMS = {
    "sd15": Item(SD15, DIFFUSERS, 2.13, "--base", "Stable Diffusion 1.5 (--variant fp32: 4.27 GB)", folder=True),
    "v3": Item(ANIMATEDIFF, ("v3_sd15_mm.ckpt",), 1.67, "--motion_module", "AnimateDiff v3, the papers' motion module"),
    "v2": Item(ANIMATEDIFF, ("mm_sd_v15_v2.ckpt",), 1.82, "--motion_module", "AnimateDiff v2"),
    "v1": Item(ANIMATEDIFF, ("mm_sd_v15.ckpt",), 1.67, "--motion_module", "AnimateDiff v1"),
    "adapter": Item(ANIMATEDIFF, ("v3_sd15_adapter.ckpt",), 0.1, "--lora", "the domain adapter of AnimateDiff v3"),
    "motions": Item(
        ANIMATEDIFF, tuple(f"v2_lora_{m}.ckpt" for m in MOTIONS), 0.62, "--lora", "eight camera motions, for v2"
    ),
    "tokenizer": Item(
        CLIP_L14, ("vocab.json", "merges.txt"), 0.002, "--tokenizer", "for a one-file base, which finds it", folder=True
    ),
    "clip-b32": _clip(CLIP_B32, "pytorch_model.bin", 0.61, "CLIP of the papers' scores, for `customttt score`"),
    "clip-l14": _clip(CLIP_L14, "model.safetensors", 1.71, "CLIP of LOVEU-TGVE's scores, for `customttt score`"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch what `argv` names into huggingface's cache, print the flags that use it; without names, list what there is.

    Raises:
        UserError: an unknown name, no connection, no room on the disk, a file that is not what the hub states, ...
        KeyboardInterrupt: with a word on how to go on.
    """
    parser = argparse.ArgumentParser(
        prog="customttt download",
        description="Fetch models from the Hugging Face hub into its cache (HF_HOME, HF_ENDPOINT count). "
        "What is there is checked, not fetched again; what was interrupted goes on.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(ITEMS)}; none: list them")
    parser.add_argument("--variant", choices=VARIANTS, default="fp16", help="precision of sd15's files (default: fp16)")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the repository (default: main)")
    words = parser.parse_args(argv)
    if not words.names:
        print(_listing())
        return
    for name in words.names:
        if name not in ITEMS:
            near = difflib.get_close_matches(name, ITEMS, 1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(ITEMS)}."
            raise UserError(f"there is nothing called {name!r} to download: {meant}")
    if words.revision != "main" and len({ITEMS[name].repo for name in words.names}) > 1:
        raise UserError("--revision is one repository's: name things of one repository with it")
    try:
        flags = download(words.names, words.variant, words.revision)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(GO_ON[0].lower() + GO_ON[1:-1]) from None
    print("\n".join(["every file is there, and has the hash that the hub states:", *(f"  {flag}" for flag in flags)]))


def download(names: Sequence[str], variant: str = "fp16", revision: str = "main") -> list[str]:
    """Bring all files of some of `ITEMS` into the cache; what is there already is checked and not fetched again.

    Returns:
        The flags that use them, in order ("--base stable-diffusion-v1-5/stable-diffusion-v1-5").

    Raises:
        UserError: no connection, no room, no access, or a file that is not what the hub states.
    """
    paths: dict[str, list[Path]] = {}
    missing: dict[str, list[HubFile]] = {}
    for name in dict.fromkeys(names):
        repo, files = ITEMS[name].repo, [file.format(variant=VARIANTS[variant]) for file in ITEMS[name].files]
        held = cached(repo, files, revision)
        paths[name] = [path for path in held if path is not None]
        if None in held:
            missing[name] = lookup(repo, files, revision)
    check_space([file for files in missing.values() for file in files])
    for name, files_of_it in missing.items():
        paths[name] = [fetch(file) for file in files_of_it]
    return [flag for name, held_now in paths.items() for flag in _flags(ITEMS[name], held_now, revision == "main")]


def how_to_get(repo: str, file: str | None = None) -> str:
    """The command that fetches a repository, or a file in it, from the hub."""
    for name, item in ITEMS.items():
        if item.repo == repo and (file in item.files if file else item.flag == "--base"):
            return f"customttt download {name}"
    return f"hf download {repo}" + (f" {file}" if file else "")


def _flags(item: Item, paths: Sequence[Path], by_name: bool) -> list[str]:
    """One flag for a folder, one for each file: names on the hub where the flag takes them, else paths in the cache."""
    if by_name and item.flag in ("--base", "--motion_module"):
        return [f"{item.flag} {item.repo}" + ("" if item.folder else f"/{file}") for file in item.files[:1]]
    return [f"{item.flag} {paths[0].parent}"] if item.folder else [f"{item.flag} {path}" for path in paths]


def _listing() -> str:
    lines = ["customttt download NAME..., where NAME is"]
    for name, item in ITEMS.items():
        size = f"{item.gigabytes:.2f} GB" if item.gigabytes >= 0.01 else f"{item.gigabytes * 1e3:.0f} MB"
        lines.append(f"\n  {name:<11}{size:>7}  {item.flag}: {item.about}")
        lines.append(f"{'':<13}{item.repo}: {', '.join(file.format(variant='.fp16') for file in item.files)}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
