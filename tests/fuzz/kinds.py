"""The kinds of files that come from outside: sound ones to spoil, and every way in which the program reads them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lora_files
import torch
from fuzz import mutations, seeds

from eval.demo_plan import DemoSettings, make_plan
from eval.demo_record import Record as DemoRecord
from eval.grid_settings import GridSettings, check_grid
from eval.pairs import read_pairs
from eval.reading import load_judge
from lora import adapter_names, remove_adapter
from model import UNet3D, UserError
from sampling.again import settings_of
from sampling.media import read_image, read_video
from sampling.whole import read_whole
from train.appearance import AppearanceSettings
from train.data import read_subject
from train.folder import RunFolder
from train.motion import MotionSettings
from train.run import RunSettings, section, up_to_date
from train.ttt import TTTSettings
from weights import Record, find_record, load_base, load_lora, parse_settings, read_embedding
from weights.detect import detect
from weights.files import read_checkpoint, read_header
from weights.inspect import describe
from weights.recipe import read_recipe
from weights.tokenizer import read_tokenizer

Ways = dict[str, Callable[[Path], Any]]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        path: where its files are put, one at a time; other files of a folder lie there already.
        seeds: sound ones.
        ways: of reading it, by name.
        spoil: what knows how such a file is built, if anything does.
        share: of all cases, in parts.
    """

    path: Path
    seeds: Sequence[bytes]
    ways: Ways
    spoil: Callable[[mutations.Draw, bytes], bytes] | None = None
    share: int = 1


def kinds(root: Path) -> dict[str, Kind]:
    """All kinds, with what they need written below `root`."""
    look: Ways = {"detect": detect, "describe": describe, "header": read_header, "checkpoint": read_checkpoint}
    unet, text = lora_files.small(), None
    lora: Ways = {"load_lora": lambda path: _load(unet, path), "detect": detect, "describe": describe}
    tokens_of: Ways = {"read_embedding": read_embedding, "detect": detect, "describe": describe}
    base = seeds.write_base(root / "base")
    run = seeds.write_run(root / "run")
    made = seeds.Seeds(root / "seeds", unet)
    safe, torch_, text = mutations.spoil_safetensors, mutations.spoil_torch, mutations.spoil_json

    def part(name: str, share: int = 1) -> Kind:
        """A file of a base's folder."""
        path = base / name
        ways = {"load_base": lambda _: load_base(base, device="cpu")}
        return Kind(path, [path.read_bytes()], ways, safe if path.suffix == ".safetensors" else text, share)

    def inside(name: str, ways: Ways, share: int = 1) -> Kind:
        """A file of a run's folder."""
        return Kind(run / name, [(run / name).read_bytes()], ways, torch_ if name.endswith(".pt") else text, share)

    def restore(_: Path) -> None:
        parameters = [torch.nn.Parameter(torch.zeros(4, 3)), torch.nn.Parameter(torch.zeros(3))]
        RunFolder(run).restore(parameters, seeds.optimizer(parameters), torch.amp.GradScaler("cpu", enabled=False))

    def again(_: Path) -> None:
        RunFolder(run).is_done(seeds.SETTINGS, {})

    def asked(path: Path) -> Record:
        record = find_record(path)
        if record is None:
            raise UserError(f"{path} has no record")
        return record

    tokens = seeds.write_tokenizer(root / "tokenizer")
    adapter = made.peft_folder()
    clip = seeds.clip_settings(run)
    return {
        "safetensors": Kind(root / "a.safetensors", made.safetensors(), look, safe, 6),
        "torch zip": Kind(root / "a.ckpt", made.torch_zip(), look, torch_, 6),
        "torch pickle": Kind(root / "a.pt", made.torch_pickle(), look, torch_, 6),
        "torch zip by another name": Kind(root / "b.safetensors", made.torch_zip(), look, torch_),
        "LoRA (safetensors)": Kind(root / "lora.safetensors", made.lora_safetensors(), lora, safe, 5),
        "LoRA (pickled)": Kind(root / "lora.ckpt", made.lora_pickled(), lora, torch_, 3),
        "adapter_config.json": Kind(
            adapter / "adapter_config.json",
            [(adapter / "adapter_config.json").read_bytes()],
            {"load_lora": lambda path: _load(unet, adapter), "detect": lambda path: detect(adapter)},
            text,
        ),
        "unet/config.json": part("unet/config.json"),
        "text encoder": part("text_encoder/model.safetensors"),
        "motion_adapter/config.json": part("motion_adapter/config.json"),
        "model_index.json": Kind(
            base / "model_index.json",
            [(base / "model_index.json").read_bytes()],
            {"detect": lambda _: detect(base), "describe": lambda _: describe(base)},
            text,
        ),
        "recipe.json": Kind(
            base / "recipe.json", [seeds.RECIPE], {"read_recipe": lambda p: read_recipe(base)}, text, 2
        ),
        **{
            name: Kind(
                tokens / name,
                [(tokens / name).read_bytes()],
                {"read_tokenizer": lambda _: read_tokenizer(tokens, 1024, "it", "Get one.")},
                text,
            )
            for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
        },
        "judge": Kind(root / "judge.safetensors", [seeds.judge()], {"load_judge": load_judge}, safe),
        "state.pt": inside("state.pt", {"restore": restore}, 2),
        "log.csv": inside("log.csv", {"restore": restore}),
        "settings.json": inside("settings.json", {"is_done": again}),
        "inputs.json": inside("inputs.json", {"is_done": again}),
        "record": Kind(
            run / "video.gif.record.json",
            [(run / "video.gif.record.json").read_bytes()],
            {
                "up_to_date": lambda _: up_to_date(clip),
                "again": lambda p: settings_of(asked(p), p, {"out": "x.gif"}),
                "describe": lambda _: describe(run / "video.gif"),
            },
            text,
            3,
        ),
        "demo.json": Kind(
            root / "demo" / "demo.json",
            [seeds.DEMO],
            {"record": lambda p: DemoRecord(DemoSettings(out=str(p.parent)))},
            text,
        ),
        "pairs.csv": Kind(root / "pairs.csv", [b'prompt,other\na cat,a dog\n"a, b",c\n'], {"pairs": read_pairs}),
        "caption.txt": Kind(
            root / "subject" / "a.txt",
            [b"a red ball on the beach\n"],
            {"read_subject": lambda p: read_subject(seeds.subject(p.parent), "a ball", 16, 16)},
        ),
        "picture": Kind(
            root / "picture",
            seeds.pictures(),
            {
                "read_image": lambda path: read_image(path, 64, 64),
                "detect": detect,
                "describe": describe,
                "read_whole": read_whole,
            },
            None,
            5,
        ),
        "video": Kind(
            root / "video",
            seeds.videos(root / "clips"),
            {
                "read_video": lambda path: read_video(path, 3, 64, 64),
                "by the clock": lambda path: read_video(path, 3, 64, 64, fps=5, start=0.2),
                "read_whole": read_whole,
                "at 8 fps": lambda path: read_whole(path, 8),
                "describe": describe,
                "record": find_record,
            },
            None,
            5,
        ),
        "embedding (safetensors)": Kind(root / "e.safetensors", made.embedding_safetensors(), tokens_of, safe, 2),
        "embedding (pickled)": Kind(root / "e.pt", made.embedding_pickled(), tokens_of, torch_, 2),
        **{
            cls.__name__: Kind(root / f"{cls.__name__}.yaml", its, {"parse": _parse(cls)}, text)
            for cls, its in seeds.settings().items()
        },
    }


def _load(unet: UNet3D, path: Path) -> None:
    try:
        load_lora(unet, path, allow_partial=True)
    finally:
        for name in adapter_names(unet):
            remove_adapter(unet, name)


def _parse(cls: type) -> Callable[[Path], Any]:
    def way(path: Path) -> None:
        settings: Any = parse_settings(cls, ["--config", str(path)])
        if cls is GridSettings:
            check_grid(settings)
        if cls is DemoSettings:
            make_plan(settings)
        if cls is RunSettings:
            for name, its in (("appearance", AppearanceSettings), ("motion", MotionSettings), ("ttt", TTTSettings)):
                section(its, settings, name, out="x", appearance="a", motion="m", prompt="p") if name == "ttt" else (
                    section(its, settings, name, out="x")
                )

    return way
