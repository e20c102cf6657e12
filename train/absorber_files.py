"""What `--absorbers` names: a run folder of `train.absorber`, or a file of other people's that holds looks."""

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model import UserError
from weights import lora_path, read_json, sha256, split_strength, split_token
from weights.detect import TOKEN_FILE, FileKind, detect, refuse
from weights.embeddings import KIND, embedding_path
from weights.lora import FILE_NAME

CHECKPOINTS = ("one-file checkpoint", "UNet", "diffusers folder")


@dataclass(frozen=True)
class Absorber:
    """One absorber, as `--absorbers` names it: a run folder or any file that loads.

    Args:
        name: as it was given.
        lora: a LoRA file, at `strength`.
        embedding: the file of a learned token.
        token: what prompts call that; None: as the file says.
        checkpoint: a file or folder whose UNet takes the place of the base's (DreamBooth).
        strength: of the LoRA.
        run: the folder of `train.absorber` that it comes from.
    """

    name: str
    lora: Path | None = None
    embedding: Path | None = None
    token: str | None = None
    checkpoint: Path | None = None
    strength: float = 1.0
    run: Path | None = None

    def files(self) -> list[Path]:
        """All files that it consists of."""
        found = [path for path in (self.lora, self.embedding) if path is not None]
        if self.checkpoint is not None:
            unet = unet_in(self.checkpoint)
            inside = sorted(unet.iterdir()) if unet.is_dir() else [unet]
            found += [file for file in inside if file.is_file()]
        return found


def find_absorber(argument: str) -> Absorber:
    """What an argument of `--absorbers` names: a path, with a LoRA's strength or an embedding's token behind a colon.

    Raises:
        UserError: nothing there, an unfinished run, or a file that cannot absorb looks.
    """
    (name, token), strength = split_token(argument), 1.0
    if token is None or detect(embedding_path(name)).kind != KIND or re.fullmatch(r"[-+.\d]+", token):
        (name, strength), token = split_strength(argument), None
    path = Path(name)
    if not path.exists():
        raise UserError(
            f"{path} does not exist: an absorber's run folder, a LoRA, an embedding or a checkpoint was expected"
        )
    found = replace(_find_run(path) or _find_file(path, detect(path)), name=argument, strength=strength, token=token)
    if found.lora is None and strength != 1:
        raise UserError(f"{argument}: only a LoRA has a strength, and {path} holds none: leave the number out")
    return found


def _find_run(path: Path) -> Absorber | None:
    """The absorber in a run folder, if that is what the path is."""
    if not (path / "settings.json").is_file():
        return None
    kind = _table(path / "settings.json").get("kind")
    if kind not in (None, "lora", "token", "dual"):
        raise UserError(f"{path / 'settings.json'} is damaged: no absorber is of the kind {kind!r}")
    lora = path / FILE_NAME if kind != "token" else None
    embedding = path / TOKEN_FILE if kind in ("token", "dual") else None
    for file in (lora, embedding):
        if file is not None and not file.is_file():
            raise UserError(f"{path} has no {file.name}: the run in it is not finished: start it again")
    return Absorber(str(path), lora, embedding, run=path if kind is not None else None)


def _find_file(path: Path, found: FileKind) -> Absorber:
    """The absorber that another tool wrote."""
    if found.kind in CHECKPOINTS:
        if found.family not in ("", "sd15") or found.version:
            refuse(path, found, "an absorber")
        return Absorber(str(path), checkpoint=path)
    if found.kind == KIND:
        return Absorber(str(path), embedding=path)
    return Absorber(str(path), lora=lora_path(path))


def find_absorbers(arguments: Sequence[str], videos: int) -> list[list[Absorber]]:
    """The absorbers of each video: all of them for the only one, or one for each of several.

    Raises:
        UserError: what `find_absorber` raises, numbers that do not go together, or two UNets for one video.
    """
    found = [find_absorber(argument) for argument in arguments]
    if videos == 1:
        sides = [found]
    elif len(found) in (0, videos):
        sides = [[its] for its in found] or [[] for _ in range(videos)]
    else:
        raise UserError(f"{len(found)} absorbers for {videos} videos: give one for each, in the videos' order")
    for side in sides:
        if twice := sorted(name for name, count in Counter(its.name for its in side).items() if count > 1):
            raise UserError(f"{twice[0]} is given twice for one video: give a LoRA that shall do more a strength")
        checkpoints = [its.name for its in side if its.checkpoint is not None]
        if len(checkpoints) > 1:
            raise UserError(f"{' and '.join(checkpoints)} are both checkpoints, and there is one UNet: give one")
    return sides


def warn_of_strangers(sides: Sequence[Sequence[Absorber]], videos: Sequence[Mapping[str, Path]]) -> None:
    """Warn of absorbers that were trained on another clip than the one they serve, as their run folders tell.

    Args:
        sides: the absorbers of each video.
        videos: the files of each.
    """
    for side, files in zip(sides, videos, strict=True):
        runs = {its.name: its.run for its in side if its.run is not None}
        contents = {sha256(file) for file in files.values()} if runs else set()
        for name, run in runs.items():
            learned_from = _table(run / "inputs.json").get("contents")
            if not isinstance(learned_from, dict) or not all(isinstance(its, str) for its in learned_from.values()):
                raise UserError(f"{run / 'inputs.json'} is damaged: it should say what the absorber was trained on")
            if contents.isdisjoint(learned_from.values()):
                warnings.warn(
                    f"{name} was trained on another clip: it may leave this one's looks to the motion LoRA",
                    stacklevel=3,
                )


def unet_in(source: Path) -> Path:
    """Where a checkpoint has its UNet: the folder in a diffusers folder, else itself."""
    return source / "unet" if (source / "unet").is_dir() else source


def _table(path: Path) -> dict[str, Any]:
    table = read_json(path)
    if not isinstance(table, dict):
        raise UserError(f"{path} is damaged: it should hold a JSON object")
    return table
