"""Ablations and methods (CustomTTT, tables 1, 3 and 4): every arm of a grid, trained, generated, scored, compared.

python -m eval.ablate --config docs/results/tiny-grid.yaml
"""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval.ablate_page import write_report, write_tables
from eval.grid import Cell, cells
from eval.grid_settings import GridSettings
from eval.measures import mean
from eval.page import spread
from eval.plots import check_plots, strips
from eval.report import Picture
from eval.scorers import fingerprints
from eval.scoring import (
    Scorers,
    ScorerSettings,
    described,
    open_scorers,
    reference_tracks,
    score_clips,
    score_diversity,
)
from model import UserError
from sampling import contact_sheet, read_video, write_media
from sampling.generate import clip_files, generate_files
from train.absorber import train_absorber
from train.appearance import train_appearance
from train.data import clip_files as clip_files_of
from train.data import read_clip, read_subject, subject_files
from train.joint import train_joint
from train.motion import train_motion
from train.run import up_to_date
from train.ttt import train_ttt
from weights import (
    Base,
    lora_path,
    open_base,
    parse_lora,
    parse_settings,
    read_header,
    read_json,
    run_command,
    settings_from,
    sha256,
    with_source,
    write_json,
)
from weights.folders import check_folder, locked

TRAIN: dict[str, Callable[..., Path]] = {
    "absorber": train_absorber,
    "appearance": train_appearance,
    "motion": train_motion,
    "ttt": train_ttt,
    "joint": train_joint,
}
COLUMNS = 8  # frames of a clip in contact sheets


@dataclass(frozen=True)
class Result:
    """What came of a cell.

    Args:
        cell: which.
        scores: means over its clips, by score.
        seconds: of training, all its stages together, whether or not other cells share them.
        parameters: of the LoRAs that are on when its clips are generated.
        moved: how far test-time training went, see `train.report.movement`; empty without.
    """

    cell: Cell
    scores: dict[str, float]
    seconds: float
    parameters: int
    moved: dict[str, Any]


def ablate(settings: GridSettings, base: Base | None = None) -> Path:
    """Run all cells of a grid and compare its arms; what is done is skipped, runs that cells share are trained once.

    Args:
        settings: of the grid.
        base: one that is loaded already; None loads what the settings name.

    Returns:
        The report, `report.html`; beside it `results.json` and `tables.md`.

    Raises:
        UserError: bad settings or files, or a stage that failed; what was done before is kept.
    """
    check_folder(settings.out)
    check_plots()  # that nothing is missing is said before hours of work, not after
    base = base or open_base(settings)
    settings = with_source(settings, base)
    wanted = settings_from(ScorerSettings, {"device": settings.device, **settings.scores}, "scores")
    scorers, known = open_scorers(wanted), fingerprints(wanted)
    work = cells(settings, base)
    if scorers.tracker is not None:
        for cell in {(cell.reference, *cell.frames.values()): cell for cell in work}.values():
            reference_tracks(scorers, inputs(cell, base)[1])
    with locked(settings.out):
        results = []
        for cell in tqdm(work, desc="cells", position=0):
            for stage, its in cell.stages.items():
                TRAIN[stage](its, base)
            if not up_to_date(cell.clips):
                generate_files(cell.clips, base)
            results.append(scored(cell, base, scorers, known))
        write_tables(settings, results, described(scorers))
        return write_report(settings, results, described(scorers), sheets(settings, work, base))


def files_of(cell: Cell) -> list[Path]:
    """The cell's clips."""
    return [file for _, _, file in clip_files(cell.clips)]


def scored(cell: Cell, base: Base, scorers: Scorers, known: dict[str, Any]) -> Result:
    """Score the cell's clips, unless its `scores.json` was made by these scorers of these very files."""
    files, record = files_of(cell), Path(cell.clips.out).with_name("scores.json")
    about = {
        "scorers": known,
        "prompt": cell.clips.prompt[0],
        "clips": [sha256(file) for file in files],
        "images": [] if cell.images is None else [sha256(file) for file in subject_files(cell.images).values()],
        "reference": [*(sha256(file) for file in clip_files_of(cell.reference).values()), *cell.frames.values()],
    }
    kept = read_cache(record)
    if {name: kept.get(name) for name in about} != about or not {"scores", "diversity"} <= kept.keys():
        images, reference = inputs(cell, base)
        size = {"num_frames": len(reference), "height": base.recipe.height, "width": base.recipe.width}
        videos = [read_video(file, **size) for file in files]
        prompts, names = cell.clips.prompt * len(videos), [str(file) for file in files]
        found = score_clips(scorers, videos, prompts, images, reference, names)
        diversity = score_diversity(scorers, videos, prompts).get(prompts[0])
        kept = {**about, "scores": found, "diversity": diversity}
        write_json(record, kept)
    moved = Path(cell.stages["ttt"].out) / "report.json" if "ttt" in cell.stages else None
    return Result(
        cell,
        means(kept["scores"], kept["diversity"]),
        sum(seconds(Path(its.out)) for its in cell.stages.values()),
        sum(parameters(lora) for lora in cell.clips.lora),
        read_json(moved) if moved is not None else {},
    )


def read_cache(record: Path) -> dict[str, Any]:
    """What a cell's `scores.json` holds; nothing where it is not there, or damaged: it can be made again."""
    try:
        kept = read_json(record) if record.is_file() else {}
    except UserError:
        return {}
    return kept if isinstance(kept, dict) else {}


def inputs(cell: Cell, base: Base) -> tuple[Tensor | None, Tensor]:
    """The photos, if any, and the reference clip as the stages see them: (m, 3, h, w) and (f, 3, h, w)."""
    recipe = base.recipe
    images = None if cell.images is None else read_subject(cell.images, "a photo", recipe.height, recipe.width)[0]
    return images, read_clip(cell.reference, recipe.num_frames, recipe.height, recipe.width, **cell.frames)


def sheets(settings: GridSettings, work: Sequence[Cell], base: Base) -> list[Picture]:
    """A picture for each group: photos if any, reference, then each arm's first clip with the first prompt and seed."""
    made = []
    for group in settings.groups:
        its = [cell for cell in work if (cell.group, cell.prompt, cell.seed) == (group, 0, settings.seeds[0])]
        images, reference = inputs(its[0], base)
        frames, _, height, width = reference.shape
        rows = {"reference": reference}
        if images is not None:
            blank = images.new_ones(max(0, COLUMNS - len(images)), 3, height, width)
            rows = {"photos": torch.cat([images[:COLUMNS], blank]), **rows}
        rows |= {cell.arm: read_video(files_of(cell)[0], frames, height, width) for cell in its}
        files = {title: Path(settings.out) / "sheets" / f"{group}-{number}.png" for number, title in enumerate(rows)}
        for title, file in files.items():
            write_media(file, contact_sheet(spread(rows[title], COLUMNS), COLUMNS)[None])
        picture = Path(settings.out) / f"sheet-{group}.png"
        about = f'{group}: "{its[0].clips.prompt[0]}", seed {settings.seeds[0]}'
        strips(picture, about, files)
        made.append(Picture(picture, about))
    return made


def means(clips: Sequence[dict[str, float]], diversity: float | None) -> dict[str, float]:
    """Of each score over the clips that have it; "leak" is that of all attributes that can leak."""
    names = dict.fromkeys(name for clip in clips for name in clip)
    found = {name: mean([clip[name] for clip in clips if name in clip]) for name in names}
    leaks = [mean(its) for clip in clips if (its := [clip[name] for name in clip if name.startswith("leak_")])]
    return found | ({"leak": mean(leaks)} if leaks else {}) | ({} if diversity is None else {"diversity": diversity})


def seconds(run: Path) -> float:
    """That the steps of a run took, by its log."""
    with open(run / "log.csv", encoding="utf-8", newline="") as file:
        return sum(float(row["seconds"]) for row in csv.DictReader(file))


def parameters(lora: str) -> int:
    """Of a run's LoRA, or of one adapter of it, as `--lora` names them."""
    its = parse_lora(lora)
    tensors = read_header(lora_path(its.path)).tensors
    chosen = f"{its.adapter}." if its.adapter else ""
    return sum(info.size for name, info in tensors.items() if name.startswith(chosen))


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m eval.ablate`."""
    about = "A grid of arms over subjects, motions, prompts and seeds: train, generate, score, compare."
    print(f"now open {ablate(parse_settings(GridSettings, argv, prog='python -m eval.ablate', description=about))}")


if __name__ == "__main__":
    run_command(main)
