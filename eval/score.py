"""Scores of clips in files: `python -m eval.score --video clips/ --images photos/ --reference dance.mp4`."""

import dataclasses
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from eval.measures import mean
from eval.scoring import TITLES, ScorerSettings, described, open_scorers, score_clips, score_diversity, together
from model import UserError
from sampling import image_files
from sampling.media import natural_order
from sampling.whole import read_whole
from weights import find_record, parse_settings, run_command, write_json

VIDEOS = {".mp4", ".gif", ".webm", ".mov", ".mkv", ".avi"}
WIDTH = 120  # of the lines below a table
SAME_RATE = 0.03  # 24 and 23.976 frames a second are one rate; files round others


@dataclass(kw_only=True)
class ScoreSettings(ScorerSettings):
    """What to score, and by what.

    Args:
        video: clips, or folders of them (.mp4, .gif, .webm, .mov, .mkv, .avi); a folder of pictures is one clip.
        prompt: one for all clips, or one for each; not given: those that `customttt generate` kept beside them.
        images: photos of the subject, or a folder of them: for CLIP-I.
        reference: the clip whose motion the others should have: for motion fidelity.
        resample: take the reference's frames at the clips' rate; false compares frame by frame whatever the rates.
        published: show the value of the published code beside motion fidelity.
        out: JSON file for all of it.
    """

    video: list[str]
    prompt: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    reference: str | None = None
    resample: bool = True
    published: bool = False
    out: str | None = None


def score_files(settings: ScoreSettings) -> dict[str, Any]:
    """Score clips in files, print a table, and write everything to `out`.

    Args:
        settings: what, and by what.

    Returns:
        What is written: "settings"; "scores": how each was taken; "notes": what was cut, resampled or left out;
        "clips": video, prompt, frames, fps and the scores of each, None where one could not be taken; "diversity" by
        prompt; and "means" over the clips that have a score.

    Raises:
        UserError: bad settings, files that are missing or damaged, clips of one frame, or a reference in which nothing
            moves.
    """
    with noted() as notes:
        files = found_clips(settings.video)
        prompts = found_prompts(files, settings.prompt)
        scorers = open_scorers(settings)
        images = read_photos(settings.images)
        clips = [read_clip(file) for file in tqdm(files, desc="reading", leave=False, disable=len(files) < 4)]
        videos = [video for video, _ in clips]
        rows: list[dict[str, float]] = [{} for _ in files]
        for its, reference in references(settings, files, [fps for _, fps in clips]):
            chosen = [videos[i] for i in its], [prompts[i] for i in its]
            names = [files[i].name for i in its]
            for i, row in zip(its, score_clips(scorers, *chosen, images, reference, names, progress=True), strict=True):
                rows[i] = row
        diverse = score_diversity(scorers, videos, prompts)
    rows = [
        row | ({"diversity": diverse[its]} if its in diverse else {}) for row, its in zip(rows, prompts, strict=True)
    ]
    taken = [name for name in TITLES if any(name in row for row in rows)]
    told = zip(files, prompts, clips, rows, strict=True)
    means = {name: mean([row[name] for row in rows if name in row]) for name in taken}
    if diverse:
        means["diversity"] = mean(list(diverse.values()))  # each prompt counts once, however many its samples
    result = {
        "settings": dataclasses.asdict(settings),
        "scores": {name: about for name, about in described(scorers).items() if name in taken},
        "notes": list(dict.fromkeys(notes)),
        "clips": [
            {"video": str(file), "prompt": prompt or None, "frames": len(video), "fps": fps}
            | {name: row.get(name) for name in taken}
            for file, prompt, (video, fps), row in told
        ],
        "diversity": diverse,
        "means": means,
    }
    if settings.out is not None:
        write_json(settings.out, result)
    return result


def found_clips(paths: Sequence[str]) -> list[Path]:
    """The clips that are meant, in natural order within a folder: files as they are; of a folder the videos in it, or
    itself where it holds pictures alone, or those of its subfolders that hold pictures.

    Raises:
        UserError: nothing there.
    """
    clips: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path} does not exist")
        if not path.is_dir():
            clips.append(path)
            continue
        inside = sorted((its for its in path.iterdir() if not its.name.startswith(".")), key=natural_order)
        videos = [its for its in inside if its.suffix.lower() in VIDEOS and its.is_file()]
        folders = [its for its in inside if its.is_dir() and holds_pictures(its)]
        if not videos and not (holds_pictures(path) or folders):
            raise UserError(f"{path} holds no clips ({', '.join(sorted(VIDEOS))}, or pictures)")
        clips += videos or ([path] if holds_pictures(path) else folders)
    if len(set(clips)) < len(clips):
        raise UserError("a clip is given twice")
    return clips


def holds_pictures(folder: Path) -> bool:
    """Whether a folder has files that are taken for pictures."""
    try:
        return bool(image_files(folder))
    except UserError:
        return False


def found_prompts(clips: Sequence[Path], given: Sequence[str]) -> list[str]:
    """Each clip's prompt: those given, or what `customttt generate` kept; "" where there is none, with a warning.

    Raises:
        UserError: neither one prompt nor as many as clips.
    """
    if given:
        if not all(prompt.strip() for prompt in given):
            raise UserError("--prompt is empty: say what the clips should show, or leave it out")
        if len(given) not in (1, len(clips)):
            raise UserError(f"--prompt has {len(given)} prompts for {len(clips)} clips: give one, or one for each")
        return list(given) * (len(clips) if len(given) == 1 else 1)
    prompts = [kept_prompt(clip) for clip in clips]
    if without := [clip.name for clip, prompt in zip(clips, prompts, strict=True) if not prompt]:
        warnings.warn(f"no --prompt, and none was kept beside {together(without)}: no CLIP-T", stacklevel=2)
    return prompts


def kept_prompt(clip: Path) -> str:
    """The prompt of a clip that `customttt generate` wrote, as its record tells; "" for other clips."""
    try:
        record = find_record(clip)
    except UserError as error:
        warnings.warn(f"the record of {clip} does not tell its prompt: {error}", stacklevel=2)
        return ""
    return "" if record is None else record.prompt


def read_photos(paths: Sequence[str]) -> list[Tensor] | None:
    """Photos, or those in folders, each (3, h, w) at its own size; None where none are given."""
    files = [file for path in map(Path, paths) for file in (image_files(path) if path.is_dir() else [path])]
    return [read_photo(file) for file in files] or None


def read_photo(file: Path) -> Tensor:
    """One photo (3, h, w) at its own size; UserError for a video, whose first frame is no photo of the subject."""
    frames, _ = read_whole(file)
    if len(frames) > 1:
        raise UserError(f"{file} was given as a photo, and is a video of {len(frames)} frames")
    return frames[0]


def read_clip(path: Path) -> tuple[Tensor, float | None]:
    """All frames of a clip and its rate; UserError for fewer than two."""
    video, fps = read_whole(path)
    if len(video) < 2:
        raise UserError(f"{path} has one frame: a clip of two or more was expected")
    return video, fps


def references(
    settings: ScoreSettings, files: Sequence[Path], rates: Sequence[float | None]
) -> Iterator[tuple[list[int], Tensor | None]]:
    """Numbers of clips, with the reference clip at their rate; what is done about other rates is said in warnings."""
    if settings.reference is None:
        yield list(range(len(files))), None
        return
    whole, own = read_clip(Path(settings.reference))
    groups: dict[float | None, list[int]] = {}
    for i, fps in enumerate(rates):
        same = fps is None or own is None or not settings.resample or abs(fps / own - 1) <= SAME_RATE
        groups.setdefault(None if same else fps, []).append(i)
    for fps, its in groups.items():
        if fps is None or own is None:
            yield its, whole
            continue
        there, _ = read_whole(settings.reference, fps)
        who = together([files[i].name for i in its])
        warnings.warn(
            f"the reference has {own:g} frames a second and {who} {fps:g}: of its {len(whole)} frames {len(there)} "
            "were taken, at the clip's rate (--resample false compares frame by frame)",
            stacklevel=2,
        )
        yield its, there


@contextmanager
def noted() -> Iterator[list[str]]:
    """Within the block warnings are shown as ever, and kept."""
    notes: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        show = warnings.showwarning

        def keep(message: Warning | str, *rest: Any, **more: Any) -> None:
            notes.append(" ".join(str(message).split()))
            show(message, *rest, **more)

        warnings.showwarning = keep
        yield notes


def table(result: Mapping[str, Any], published: bool = False) -> str:
    """A row for each clip and one of means, and how each column was taken."""
    columns = [name for name in result["means"] if published or name != "published_fidelity"]
    heads = [TITLES[name].replace("leak of", "leak:").split(" ", 1) for name in columns]
    files = [Path(clip["video"]).name for clip in result["clips"]]
    alike = len(set(files)) < len(files)
    names = [clip["video"] if alike else name for clip, name in zip(result["clips"], files, strict=True)]
    rows = [("", *(head[0] if len(head) > 1 else "" for head in heads)), ("", *(head[-1] for head in heads))]
    rows += [(name, *(number(clip[key]) for key in columns)) for name, clip in zip(names, result["clips"], strict=True)]
    rows.append((f"mean of {len(files)}", *(number(result["means"][key]) for key in columns)))
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, wide, strict=True))
        )
        for row in rows
    ]
    return "\n".join([*(line.rstrip() for line in lines), "", *legend([result["scores"][key] for key in columns])])


def legend(lines: Sequence[str]) -> list[str]:
    """Lines "title: about", with the titles of those that say the same in one."""
    titles: dict[str, list[str]] = {}
    for line in lines:
        title, about = line.split(": ", 1)
        titles.setdefault(about, []).append(title)
    whole = (f"{', '.join(its)}: {about}" for about, its in titles.items())
    return [part for line in whole for part in textwrap.wrap(line, WIDTH, subsequent_indent="  ")]


def number(value: float | None) -> str:
    """As a cell of the table."""
    return "-" if value is None else f"{value:.3f}"


def main(argv: Sequence[str] | None = None) -> None:
    """`customttt score`."""
    about = "Score clips: CLIP-T, CLIP-I, consistency, diversity, motion fidelity."
    settings = parse_settings(ScoreSettings, argv, prog="customttt score", description=about)
    print(table(score_files(settings), settings.published))
    if settings.out is not None:
        print(f"\nwrote {settings.out}")


if __name__ == "__main__":
    run_command(main)
