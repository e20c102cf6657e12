"""A first look at what the project does: `python -m eval.demo`, with nothing at hand but the bundled base.

Renders photos of a subject and a clip of a motion, neither of which the base has ever seen, runs the three stages and
shows side by side what the base alone, both LoRAs, and both LoRAs after test-time training make of the same prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.demo_inputs import photos, reference_clip
from eval.demo_plan import PHOTOS, REFERENCE, DemoSettings, Plan, check_base, is_scored, make_plan, sizes
from eval.demo_record import STEPS, Record
from eval.measures import identity, path_error
from eval.page import Clip, Page, Row, Score, Step, demo_page, demo_sheet, score_table
from eval.reading import load_judge, read_clip
from model import Recipe
from sampling import image_files, read_image, read_video, write_media
from sampling.generate import clip_files, generate_files
from train.appearance import train_appearance
from train.data import read_subject
from train.folder import RunFolder
from train.motion import read_frames, train_motion
from train.run import up_to_date
from train.settings import TrainSettings
from train.ttt import train_ttt
from weights import Base, atomic_write, open_base, parse_settings, read_json, run_command
from weights.folders import locked

PAGE, SHEET = "index.html", "contact-sheet.png"
KINDS = {
    "base": ("the base alone", "no LoRA: it has seen neither the subject nor the motion"),
    "both": ("both LoRAs", "each trained without the other"),
    "ttt": ("with test-time training", "both LoRAs, trained on together for this very prompt"),
}
STILL = "still"  # beside the names of KINDS: a subject that does not move
SCORES = {
    "path": Score(
        "path error",
        "how far the subject strays from the reference clip's path, in its extents: 0 is the same",
    ),
    "identity": Score(
        "identity",
        "how much the subject looks like the one in the photos, in colours and outline: 1 is just so, and a subject "
        "that has nothing to do with it has about 0.4",
    ),
}


def demo(settings: DemoSettings) -> Path:
    """Make the inputs, train, generate, score and show; what is done is skipped.

    Args:
        settings: of all steps.

    Returns:
        The page, `index.html`.

    Raises:
        UserError: bad settings or files, or an --out that is something else than this demo; said before any work.
    """
    plan = make_plan(settings)
    with locked(settings.out):
        return made(settings, plan, Record(settings))


def made(settings: DemoSettings, plan: Plan, record: Record) -> Path:
    """What is left to make of a demo: the page, and all before it."""

    @cache
    def base() -> Base:
        loaded = open_base(settings)
        check_base(settings, plan, loaded)
        return loaded

    if record.recipe is None:
        record.begin(base().recipe)
    inputs = [record.path.with_name(name) for name in (PHOTOS, REFERENCE)]
    with record.step("inputs", all(path.exists() for path in inputs)) as open_:
        if open_:
            write_inputs(settings, plan, base())
    stages: list[tuple[str, Callable[..., Path], TrainSettings]] = [
        ("appearance", train_appearance, plan.looks),
        ("motion", train_motion, plan.moves),
        ("ttt", train_ttt, plan.both),
    ]
    for name, train, its in stages:
        with record.step(name, RunFolder(its.out).lora.is_file()) as open_:
            train(its, base() if open_ else None)
    files = {kind: [file for _, _, file in clip_files(its)] for kind, its in plan.clips.items()}
    missing = [kind for kind, its in plan.clips.items() if not up_to_date(its)]
    with record.step("generate", not missing):
        for kind in missing:
            print(KINDS[kind][0])
            generate_files(plan.clips[kind], base())

    print(record.headline("page"))
    page = show(settings, plan, record, files)
    print(score_table(page))
    file = record.path.with_name(PAGE)
    print(f"now open {file} (all steps took {sum(record.seconds.values()):.0f} s)")
    return file


def write_inputs(settings: DemoSettings, plan: Plan, base: Base) -> None:
    """Render what was not brought along; what was is copied as the base sees it, for the page to show."""
    frames, height, width = sizes(settings, base.recipe)
    if settings.video is None:
        clip = reference_clip(settings.motion_number, frames, height, settings.seed)
    else:
        [clip] = read_frames(plan.moves, base)
    if settings.images is None:
        pictures, _ = photos(settings.subject_number, height, settings.seed)
    else:
        pictures, _ = read_subject(settings.images, plan.looks.prompt, height, width)
    write_media(Path(settings.out) / REFERENCE, clip, fps=base.recipe.fps)
    write_media(Path(settings.out) / PHOTOS, pictures)


def scores(
    settings: DemoSettings, pictures: Tensor, reference: Tensor, videos: Mapping[str, Tensor]
) -> dict[str, dict[str, list[float]]]:
    """How near the clips come to the inputs, as far as that can be told: the judge knows the tiny base's world alone.

    Args:
        settings: of the demo; what was brought along is not compared.
        pictures: the photos, (n, 3, h, w) in [-1, 1].
        reference: the clip, (f, 3, h, w).
        videos: of each kind, (clips, f, 3, h, w).

    Returns:
        By score (see SCORES) and kind, a number for each clip; for paths, under STILL, that of a subject which does not
        move. Empty where nothing can be told.

    Raises:
        UserError: the judge's file is missing or damaged.
    """
    if not is_scored(settings, len(reference), *reference.shape[-2:]):
        return {}
    judge = load_judge()
    seen = {kind: read_clip(judge, clips.transpose(1, 2)) for kind, clips in videos.items()}
    found = {}
    if settings.video is None:
        path = read_clip(judge, reference.transpose(0, 1)[None]).path
        found["path"] = {kind: path_error(its.path, path.expand_as(its.path)).tolist() for kind, its in seen.items()}
        found["path"][STILL] = path_error(torch.zeros_like(path[..., :2]), path).tolist()
    if settings.images is None:
        masks = read_clip(judge, pictures.transpose(0, 1)[None]).masks[0].transpose(0, 1)
        found["identity"] = {
            kind: identity(videos[kind].transpose(1, 2), its.masks, pictures, masks).tolist()
            for kind, its in seen.items()
        }
    return found


def show(settings: DemoSettings, plan: Plan, record: Record, files: Mapping[str, Sequence[Path]]) -> Page:
    """Score the clips and write contact sheet and page.

    Args:
        settings: of the demo.
        plan: of its steps.
        record: of its sizes and seconds.
        files: the clips of each of KINDS.

    Returns:
        What the page says.
    """
    folder, recipe = record.path.parent, record.recipe or Recipe()
    frames, height, width = sizes(settings, recipe)
    files_in = image_files(folder / PHOTOS)
    pictures = torch.stack([read_image(file, height, width) for file in files_in])
    reference = read_video(folder / REFERENCE, frames, height, width)
    videos = {kind: torch.stack([read_video(file, frames, height, width) for file in files[kind]]) for kind in KINDS}
    write_media(folder / SHEET, demo_sheet(pictures, reference, [clips[0] for clips in videos.values()])[None])
    measured = scores(settings, pictures, reference, videos)
    rows = []
    for kind, (title, about) in KINDS.items():
        clips = [
            Clip(file.relative_to(folder).as_posix(), seed, {name: found[kind][i] for name, found in measured.items()})
            for i, (file, seed) in enumerate(zip(files[kind], plan.clips[kind].seed, strict=True))
        ]
        rows.append(Row(title, about, clips))
    page = Page(
        base=settings.base,
        subject=plan.looks.prompt,
        motion=plan.moves.prompt,
        prompt=plan.both.prompt,
        photos=[file.relative_to(folder).as_posix() for file in files_in],
        reference=REFERENCE,
        sheet=SHEET,
        rows=rows,
        steps=[
            *(Step(STEPS[name], seconds, told(plan, recipe, name)) for name, seconds in record.seconds.items()),
            Step("all together", sum(record.seconds.values())),
        ],
        legend={name: replace(SCORES[name], still=found.get(STILL, [None])[0]) for name, found in measured.items()},
    )
    with atomic_write(folder / PAGE) as temporary:
        temporary.write_text(demo_page(page), encoding="utf-8")
    return page


def told(plan: Plan, recipe: Recipe, step: str) -> dict[str, Any]:
    """The settings of a step that its page shows, filled in as it ran."""
    if step == "generate":
        its = plan.clips["ttt"]
        return {
            "steps": recipe.sampling_steps if its.steps is None else its.steps,
            "guidance_scale": recipe.guidance_scale if its.guidance_scale is None else its.guidance_scale,
            "seed": its.seed,
        }
    runs = {"appearance": plan.looks.out, "motion": plan.moves.out, "ttt": plan.both.out}
    if step not in runs:
        return {}
    used = read_json(RunFolder(runs[step]).path / "settings.json")
    shown = (
        "layers",
        "rank",
        "steps",
        "learning_rate",
        "batch_size",
        "timestep_skew",
        "reference_steps",
        "guidance_scale",
    )
    return {name: used[name] for name in shown if used.get(name) is not None}


def main(argv: Sequence[str] | None = None) -> None:
    """`customttt demo`."""
    about = "Photos and a clip are rendered, the three stages run, and a page shows what came of it."
    demo(parse_settings(DemoSettings, argv, prog="customttt demo", description=about))


if __name__ == "__main__":
    run_command(main)
