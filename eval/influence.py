"""Prompt influence (CustomTTT, section 3.2): which layers' text decides what is seen, and how it moves.

python -m eval.influence --base tiny --pairs 4 --quick
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from eval.clip import CLIPScorer, clip_t, load_clip
from eval.influence_page import Result, influence_table, write_report
from eval.measures import mean
from eval.page import spread
from eval.pairs import read_pairs, shipped_pairs
from eval.plots import check_plots
from eval.reading import ClipReading, Judge, load_judge, read_clip
from eval.recommend import Recommendation, Scores, best_row, ranked_by, recommend
from eval.scorers import ScorerSettings, fingerprints
from eval.words import named
from model import UNet3D, UserError
from sampling import contact_sheet, decode, derived_seed, encode, sample_latents, write_media
from train.world import SIZE
from weights import Base, BaseSettings, open_base, parse_settings, read_json, run_command, sha256, write_json
from weights.folders import check_folder, locked

KINDS = ("subject", "motion")
# By which of the judge's answers p* is recognised in clips of the rendered world.
JUDGED = {"subject": ("shape", "colour", "texture"), "motion": ("motion",)}
QUICK = 10  # DDIM steps
STRIP = 8  # frames of each row in the figures
FREE = ("out", "device", "batch_size", "kinds")  # settings that change nothing about the scores


@dataclass(kw_only=True)
class InfluenceSettings(BaseSettings):
    """How prompt influence is measured.

    Args:
        out: folder for scores, figures and report; what it holds already, of the same settings, is not measured again.
        kinds: subject, motion, or both.
        subjects: CSV file of prompt,other: p and p*, which differ in the subject; not given: the list that comes along.
        motions: the same, of pairs that differ in the motion.
        pairs: the first so many of each list; not given: all (100).
        quick: 10 sampling steps instead of the base's.
        guidance_scale: not given: the base's.
        batch_size: clips sampled at once.
        clip: folder of the CLIP that scores; not given: the tiny base's, which knows the rendered world alone.
        judge: file of the judge of the rendered world; not given: the tiny base's.
        seed: of the noise, which all rows share.
    """

    out: str = "influence"
    kinds: list[Literal["subject", "motion"]] = field(default_factory=lambda: list(KINDS))  # type: ignore[arg-type]
    subjects: str | None = None
    motions: str | None = None
    pairs: int | None = None
    quick: bool = False
    guidance_scale: float | None = None
    batch_size: int = 8
    clip: str | None = None
    judge: str | None = None
    seed: int = 0


def text_layers(unet: UNet3D) -> list[int]:
    """The layers with cross-attention: all of the nine but 3 and 5."""
    return [index for index, layer in enumerate(unet.layers) if len(layer.spatial)]


def injected(text: Tensor, other: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """One embedding (b, n, d) for each of the nine layers: `other` in `layers`, `text` elsewhere."""
    return [other if index in layers else text for index in range(9)]


def injected_videos(
    base: Base,
    prompts: Sequence[str],
    others: Sequence[str],
    layers: Sequence[int],
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float | None = None,
) -> Tensor:
    """Clips of `prompts`, with what `others` say in `layers`; the rest as the base's recipe has it.

    Args:
        base: the network and its companions.
        prompts: b of them.
        others: b of them.
        layers: where the others go.
        seeds: b of them; the noise depends on nothing else.
        steps: of DDIM.
        guidance_scale: None: the base's.

    Returns:
        Frames (b, f, 3, h, w) in [-1, 1] on the CPU.
    """
    texts = injected(encode(base, prompts), encode(base, others), layers)
    negative = encode(base, [""] * len(prompts))
    return decode(base, sample_latents(base, texts, negative, seeds, steps=steps, guidance_scale=guidance_scale))


def judged(reading: ClipReading, prompts: Sequence[str], others: Sequence[str], kind: str) -> list[float]:
    """For each clip the share of what p* names and p does not (shape, colour, texture; or the motion) that is seen."""
    shares = []
    for i, (prompt, other) in enumerate(zip(prompts, others, strict=True)):
        new = asked_anew(prompt, other, kind)
        shares.append(mean([int(getattr(reading, name)[i].argmax()) == number for name, number in new.items()]))
    return shares


def asked_anew(prompt: str, other: str, kind: str) -> dict[str, int]:
    """Classes of the rendered world that p* names and p does not; raises UserError where there are none."""
    before, asked = named(prompt), named(other)
    new = {name: asked[name] for name in JUDGED[kind] if name in asked and asked[name] != before.get(name)}
    if not new:
        raise UserError(f"{other!r} names no {kind} of the rendered world that {prompt!r} does not")
    return new


class Measurement:
    """The pairs of one kind, what scores their clips, and the rows found so far, kept in `<kind>s.json`.

    Raises:
        UserError: settings out of range, missing files, or scores of something else in `out`.
    """

    def __init__(self, settings: InfluenceSettings, kind: str, base: Base, clip: CLIPScorer, judge: Judge | None):
        self.settings, self.kind, self.base, self.clip, self.judge = settings, kind, base, clip, judge
        table = getattr(settings, f"{kind}s") or shipped_pairs(kind, judge is not None)
        listed = read_pairs(table)
        count = len(listed) if settings.pairs is None else settings.pairs
        if not 1 <= count <= len(listed) or settings.batch_size < 1:
            raise UserError(f"pairs must be from 1 to the {len(listed)} of {table}, and batch_size at least 1")
        if kind == "motion" and base.unet.config.motion is None:
            raise UserError(f"{base.name} has no motion modules to train: give --motion_module, or --kinds subject")
        for pair in listed[:count] if judge is not None else ():
            asked_anew(*pair, kind)
        self.pairs, self.steps = listed[:count], QUICK if settings.quick else base.recipe.sampling_steps
        self.file = Path(settings.out) / f"{kind}s.json"
        about = {
            "settings": {name: value for name, value in asdict(settings).items() if name not in FREE},
            "steps": self.steps,
            "guidance_scale": base.recipe.guidance_scale
            if settings.guidance_scale is None
            else settings.guidance_scale,
            "pairs": sha256(Path(table)),
            "base": base.fingerprints,
            "clip": clip.name,
            "scored by": fingerprints(ScorerSettings(clip=settings.clip, judge=settings.judge))["files"],
        }
        self.record: dict[str, Any] = read_json(self.file) if self.file.is_file() else {**about, "scores": {}}
        same = isinstance(self.record, dict) and {k: v for k, v in self.record.items() if k != "scores"} == about
        if not same or not isinstance(self.record.get("scores"), dict):
            raise UserError(f"{self.file} holds scores of other settings, pairs or networks: give --out a new name")

    @property
    def scores(self) -> Scores:
        """The rows found so far."""
        return self.record["scores"]

    def measure(self, row: str, layers: Sequence[int]) -> None:
        """Generate all pairs with p* in `layers` and score them against p*, unless the row is there."""
        if row in self.scores:
            return
        found: dict[str, list[float]] = {"clip_t": []}
        strip: list[Tensor] = []
        for start in range(0, len(self.pairs), self.settings.batch_size):
            part = self.pairs[start : start + self.settings.batch_size]
            prompts, others = zip(*part, strict=True)
            seeds = [derived_seed(self.settings.seed, "noise", start + i) for i in range(len(part))]
            videos = injected_videos(
                self.base, prompts, others, layers, seeds, self.steps, self.settings.guidance_scale
            )
            features = self.clip.images(videos.flatten(0, 1)).unflatten(0, videos.shape[:2])
            found["clip_t"] += [clip_t(*both) for both in zip(features, self.clip.texts(others), strict=True)]
            if self.judge is not None:
                seen = read_clip(self.judge, videos.transpose(1, 2))
                found.setdefault("judge", []).extend(judged(seen, prompts, others, self.kind))
            strip += [frame for video in videos for frame in shown(video, self.kind)][: STRIP - len(strip)]
        strip += [torch.ones_like(strip[0])] * (STRIP - len(strip))
        write_media(
            self.file.parent / "frames" / f"{self.kind}-{row}.png", contact_sheet(torch.stack(strip), STRIP)[None]
        )
        self.scores[row] = found
        write_json(self.file, self.record)


def shown(video: Tensor, kind: str) -> Tensor:
    """Frames of a clip for the figures: one tells a subject, four a motion."""
    return video[len(video) // 2 :][:1] if kind == "subject" else spread(video, 4)


def influence(measurement: Measurement) -> Recommendation:
    """Every layer alone, then the best together with each other one, "none" and "all", as the paper's figures have it.

    Layers 3 and 5 have no text and are left out: injecting there changes nothing.
    """
    usable = text_layers(measurement.base.unet)
    rows: dict[str, list[int]] = {"none": [], **{str(layer): [layer] for layer in usable}, "all": usable}
    bar = tqdm(total=2 * len(usable) + 1, desc=f"{measurement.kind}s: p* in layers")
    for row, layers in rows.items():
        measurement.measure(row, layers)
        bar.update()
    score = ranked_by(measurement.kind, measurement.scores)
    first = int(best_row(measurement.scores, [str(layer) for layer in usable], score)[0])
    for other in usable:
        if other != first:
            measurement.measure(f"{first}+{other}", [first, other])
            bar.update()
    bar.close()
    return recommend(measurement.kind, measurement.scores, measurement.base.unet)


def measure_influence(settings: InfluenceSettings, base: Base | None = None) -> Path:
    """Measure prompt influence, or what is left to measure of it, and write scores, figures and report.

    Returns:
        The report, `report.html`.

    Raises:
        UserError: settings out of range, a folder that holds something else, or missing files.
    """
    if not settings.kinds or len(set(settings.kinds)) < len(settings.kinds):
        raise UserError("kinds: subject, motion, or both of them")
    check_folder(settings.out)
    base = base or open_base(settings)
    rendered = base.recipe.height == base.recipe.width == SIZE and settings.clip is None
    if not rendered and settings.clip is None:
        raise UserError(
            f"{base.name} does not paint the rendered world, and the tiny base's CLIP knows nothing else: name a "
            "folder of CLIP ViT-B/32 with --clip"
        )
    check_plots()  # said before an hour of sampling, not after
    clip = load_clip(settings.clip, str(base.unet.device))
    judge = load_judge(settings.judge) if rendered else None
    with locked(settings.out):
        measurements = [Measurement(settings, kind, base, clip, judge) for kind in settings.kinds]
        found: dict[str, Recommendation] = {its.kind: influence(its) for its in measurements}
        results = [Result(its.kind, its.record, its.pairs, found[its.kind]) for its in measurements]
        print(influence_table(results))
        return write_report(Path(settings.out), results)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m eval.influence`."""
    about = "Prompt influence: inject a second prompt into single layers, and see how much of it arrives."
    report = measure_influence(
        parse_settings(InfluenceSettings, argv, prog="python -m eval.influence", description=about)
    )
    print(f"now open {report}")


if __name__ == "__main__":
    run_command(main)
