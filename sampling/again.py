"""A clip made again, from its own record: `customttt generate --from clip.mp4`."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model import UserError
from sampling.generate import GenerateSettings, clip_files, make_clips
from sampling.origins import LEFT_OPEN, Clip, batches, input_files, left_open
from weights import Base, Record, find_record, open_base, settings_from, sha256, versions
from weights.record import SUFFIX

# Parts of the base that a flag may change.
PARTS = {
    "base": {"unet", "vae", "text_encoder", "motion_module"},
    "motion_module": {"motion_module"},
    "vae": {"vae"},
}


def generate_again(video: str | Path, base: Base | None = None, /, **changes: Any) -> list[Path]:
    """Make a clip again from its record: the same file, bit for bit, on the same machine with the same versions.

    The clips that it was sampled with are sampled along (without `prompt`, `seed` or `batch_size` among the changes),
    on as many threads, since both change the last bits.

    Args:
        video: the clip, or the .record.json beside it.
        base: one that is loaded already; None loads what the record names, or `base` among the changes.
        changes: settings of `GenerateSettings` that win over the record's; what they name is not checked against it.
            Without `out`, the file is the clip's with -again behind its name.

    Returns:
        The files written.

    Raises:
        UserError: no record or a bad one, LoRAs or a base that are not those of the record, or as `generate_files`.
    """
    video = Path(video)
    if not video.exists():
        raise UserError(f"{video} does not exist: a clip, or the {SUFFIX} beside it, was expected")
    record = find_record(video)
    if record is None:
        raise UserError(
            f"{video} has no record: customttt did not make it, or another program wrote it anew. "
            f"If the {SUFFIX} that was beside it is still there, give that to --from"
        )
    clip = video.with_name(video.name.removesuffix(SUFFIX))
    settings, filled = settings_of(record, video, {"out": again_name(clip), **changes})
    try:
        check_files(record, video, settings, changes)
        jobs = clip_files(settings)
        base = base or open_base(replace(settings, **filled))
    except UserError:
        raise
    except (OSError, ValueError) as error:  # names that no file can have
        raise UserError(f"{video}: what its record names cannot be opened: {error}") from error
    if any(clip.exists() and file.exists() and file.samefile(clip) for _, _, file in jobs):
        raise UserError(f"{clip} is the clip itself: give another name with --out")
    check_base(record, video, base, changes)
    warn_of_versions(record, video, base)
    batched: list[Sequence[Clip]] = batches(jobs, settings.batch_size)
    if not {"prompt", "seed", "batch_size"} & changes.keys():
        mates = zip(record.prompts, record.seeds, strict=True)
        batched = [[(*its, jobs[0][2] if its == (record.prompt, record.seed) else None) for its in mates]]
    with threads(record.threads):
        make_clips(settings, base, batched, left_open(settings, base, filled))
    return [file for _, _, file in jobs]


def again_name(clip: Path) -> str:
    """The name of a clip with -again behind it; that of a folder ends in /."""
    if clip.is_dir():
        return f"{clip.with_name(f'{clip.name}-again')}/"
    return str(clip.with_name(f"{clip.stem}-again{clip.suffix}"))


def settings_of(record: Record, where: Path, changes: Mapping[str, Any]) -> tuple[GenerateSettings, dict[str, Any]]:
    """The settings that made a record's clip, with changes; and what filled them, where no change does.

    Raises:
        UserError: a key that is no setting, a value of a wrong type, or a clip that `customttt edit` made.
    """
    if "source_prompt" in record.settings:
        raise UserError(
            f"{where} was made by `customttt edit`, of a video: give that command the settings that are in the record"
        )
    if wrong := record.filled.keys() - LEFT_OPEN.keys():
        raise UserError(f"{where}: record: filled: {', '.join(sorted(wrong))} cannot be left open")
    filled = {name: value for name, value in record.filled.items() if name not in changes and value is not None}
    own = {"prompt": [record.prompt], "seed": [record.seed], "batch_size": 1}
    given = {**record.settings, **own, **changes}
    whole = settings_from(GenerateSettings, given | filled, f"{where}: record")
    return settings_from(GenerateSettings, given, f"{where}: record"), {name: getattr(whole, name) for name in filled}


def check_files(record: Record, where: Path, settings: GenerateSettings, changes: Mapping[str, Any]) -> None:
    """Raise UserError unless the files that the settings name, but for changed ones, are those of the record."""
    kept = {flag: names for flag, names in record.files.items() if flag not in changes}
    for flag, names in kept.items():
        if gone := [f"{name} (SHA-256 {digest})" for name, digest in names.items() if not Path(name).exists()]:
            raise UserError(
                f"{where} was made with {', '.join(gone)}, which is not there: say where it is with --{flag}"
            )
    for flag, files in input_files(settings).items():
        for name, file in files.items() if flag not in changes else ():
            known = kept.get(flag, {}).get(name)
            if known != sha256(file):
                raise UserError(
                    f"{name} is not what {where} was made with (that had the SHA-256 {known}): get the old one, or "
                    f"name this one with --{flag}, for a clip that differs"
                )


def check_base(record: Record, where: Path, base: Base, changes: Mapping[str, Any]) -> None:
    """Raise UserError unless the base's networks, but for changed ones, are those of the record."""
    changed = set().union(*(PARTS[flag] for flag in PARTS.keys() & changes.keys()))
    parts = sorted((record.fingerprints.keys() | base.fingerprints.keys()) - changed)
    if other := [part for part in parts if record.fingerprints.get(part) != base.fingerprints.get(part)]:
        raise UserError(
            f"{where} was made with the base {record.base}, and that of {base.name} differs in: {', '.join(other)}. "
            "Give the old one, or this one, with --base (--motion_module, --vae)"
        )


def warn_of_versions(record: Record, where: Path, base: Base) -> None:
    """Say which versions are not those that the clip was made with."""
    then, now = {"customttt": record.customttt, **record.versions}, versions(base.device)
    other = [f"{name} {then.get(name)} (now {its})" for name, its in now.items() if then.get(name) != its]
    if other:
        warnings.warn(f"{where} was made with {', '.join(other)}: the new clip may differ in its bits", stacklevel=3)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Within the block torch works on so many threads of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
