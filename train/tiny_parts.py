"""What the stages of the tiny base's recipe share: its networks' sizes, what is trained so far, frames and captions."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from model import AutoencoderKL, LatentDistribution, Recipe, TextConfig, TextEncoder, UserError, VAEConfig
from train.pretrain import DONE
from train.states import read_state
from train.vocabulary import SPARE_WORDS, words
from train.world import (
    COLOURS,
    NAMELESS,
    NUM_FRAMES,
    SHAPES,
    SIZE,
    WORLD_MOTIONS,
    WORLD_TEXTURES,
    Scenes,
    caption,
    random_scenes,
    render,
)
from weights import atomic_write, load_base, read_json, write_json
from weights.files import torch_bytes
from weights.folders import UNFINISHED, check_folder
from weights.load import TINY

Network = TypeVar("Network", bound=nn.Module)

SETTINGS = "settings.json"
SCALE = "scale.json"  # the latents' scaling factor, in the folder of the vae stage
LENGTH = 24  # tokens of a prompt: the world's longest caption has 13
VAE = VAEConfig(block_out_channels=(16, 32, 64, 96), norm_num_groups=8)
# The best found so far, in trials of a pair or two. Prompt influence (`python -m eval.influence`): shape in layer 7,
# texture in 8, colour in 1, motion in 6. With 2 and 6 as well an appearance LoRA held its subject still.
RECIPE = Recipe(
    appearance_layers=(1, 7, 8),
    motion_layers=(0, 1, 2, 3, 5, 6, 7, 8),
    rank=16,
    dropout=0.0,
    timestep_skew=0.6,
    appearance_steps=350,
    appearance_learning_rate=4e-4,
    appearance_batch_size=8,
    motion_steps=200,
    motion_learning_rate=1e-3,
    motion_batch_size=4,
    ttt_learning_rate=1e-5,
    guidance_scale=3.0,
    num_frames=NUM_FRAMES,
    height=SIZE,
    width=SIZE,
)
# By stage, the shares of the UNet's captions that call the subject, and the motion, by a spare word. Motion modules
# learn to hold looks from frame to frame only where words do not tell them: of 0.2 "a zor" was another in each frame.
SPARE = {"image": (0.2, 0.15), "video": (0.5, 0.25)}
# Share of the UNet's frames and clips that show what no word means. A base that has seen seven shapes alone has to be
# bent far by a LoRA of an eighth: it then moved less, or not at all.
WORDLESS = 0.3
# Motions that were learnt last: 12,000 steps of even shares told all straight ways apart, and half of these.
SLOW = ("circling clockwise", "circling counterclockwise", "bouncing", "growing", "shrinking", "spinning")


def text_config(vocab_size: int) -> TextConfig:
    """The base's text encoder."""
    return TextConfig(vocab_size, 64, 256, 3, 4, LENGTH)


def clip_config(vocab_size: int) -> CLIPConfig:
    """The tiny CLIP: its text tower is the base's text encoder."""
    text = text_config(vocab_size)
    special = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "pad_token_id": vocab_size - 1}
    vision = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
    }
    return CLIPConfig(
        text_config=dataclasses.asdict(text) | special,
        vision_config=vision | {"hidden_act": text.hidden_act},
        projection_dim=64,
    )


def keep_settings(out: Path, record: dict[str, Any]) -> None:
    """Write down what the run in `out` was begun with; UserError if it was begun with something else."""
    file = out / SETTINGS
    check_folder(out)
    if (
        out.exists()
        and not file.is_file()
        and any(path for path in out.iterdir() if not path.name.startswith(UNFINISHED))
    ):
        raise UserError(f"{out} is no folder of this recipe and is not empty: give --out a new name")
    before = read_json(file) if file.is_file() else record
    if not isinstance(before, dict):
        raise UserError(f"{file} is damaged: delete it, and give the settings that {out} was begun with")
    changed = [f"{k} ({before.get(k)} there, {v} now)" for k, v in record.items() if v != before.get(k)]
    if changed:
        raise UserError(f"{out} was begun with other settings: {', '.join(changed)}. Give --out a new name")
    write_json(file, record)


def single_frames(count: int, generator: torch.Generator) -> Scenes:
    """Scenes of one frame each, at any moment of a clip."""
    return random_scenes(count, generator, torch.rand((count, 1), generator=generator))


def recoloured(scenes: Scenes, count: int, generator: torch.Generator) -> Scenes:
    """The scenes, of which the first `count` get any second colour, most of COLOURS, and a texture that shows it."""
    named = torch.tensor(list(COLOURS.values()))[torch.randint(len(COLOURS), (count,), generator=generator)]
    free = torch.rand((count, 3), generator=generator)
    second, texture = scenes.second.clone(), scenes.texture.clone()
    second[:count] = torch.where(torch.rand((count, 1), generator=generator) < 0.7, named, free)
    texture[:count] = torch.randint(1, len(WORLD_TEXTURES), (count,), generator=generator)
    return dataclasses.replace(scenes, second=second, texture=texture)


def nameless(scenes: Scenes, count: int, generator: torch.Generator) -> Scenes:
    """The scenes, the first `count` of something that has no word: an outline of NAMELESS, any way up, recoloured."""
    scenes = recoloured(scenes, count, generator)
    shape, poses = scenes.shape.clone(), scenes.poses.clone()
    shape[:count] = len(SHAPES) + torch.randint(len(NAMELESS), (count,), generator=generator)
    poses[:count, :, 0, 3] += 2 * math.pi * torch.rand((count, 1), generator=generator)
    return dataclasses.replace(scenes, shape=shape, poses=poses)


def random_captions(scenes: Scenes, generator: torch.Generator) -> list[str]:
    """The scenes' captions, of which some leave out the texture, the motion or the background.

    An outline of NAMELESS is called by the first shape's word, which `with_spare_words` must replace. Raises IndexError
    for what is held out.
    """
    scenes = dataclasses.replace(scenes, shape=scenes.shape.where(scenes.shape < len(SHAPES), 0))
    says = torch.rand((len(scenes), 3), generator=generator) > torch.tensor([0.1, 0.15, 0.15])
    return [
        caption(scenes, i, texture=texture, motion=motion, background=background)
        for i, (texture, motion, background) in enumerate(says.tolist())
    ]


def with_spare_words(
    captions: list[str], shares: tuple[float, float], wordless: Tensor, generator: torch.Generator
) -> list[str]:
    """Captions of which `shares` call the subject, or what it does, by a spare word: "a zor is wug over the sand".

    Where `wordless` (n,) is true, the subject is called so in any case. These words come to mean "some subject" and
    "some motion". A word that no caption ever had gives a shapeless spot that lies still, and a LoRA for something that
    has no name would have to begin there.
    """
    chosen = torch.rand((len(captions), 2), generator=generator) < torch.tensor(shares)
    chosen[:, 0] |= wordless
    words = torch.randint(len(SPARE_WORDS), (len(captions), 2), generator=generator)
    changed = []
    for text, (subject, motion), numbers in zip(captions, chosen.tolist(), words.tolist(), strict=True):
        first, second = (SPARE_WORDS[number] for number in numbers)
        if subject:
            text = re.sub(r"^a .*?(?= is | over |$)", f"a {first}", text)
        if motion:
            text = re.sub(r"(?<= is ).*?(?= over |$)", second, text)
        changed.append(text)
    return changed


def tokens_of(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Token numbers (b, 24), padded as `Base.embed` pads them."""
    return tokenizer(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")[
        "input_ids"
    ]


def spoken_tokens(tokenizer: CLIPTokenizer) -> Tensor:
    """The token numbers of the words that captions are made of."""
    return torch.tensor([tokenizer(word)["input_ids"][1] for word in words() if word not in SPARE_WORDS])


def picking_weights(clips: Scenes) -> Tensor:
    """How often each clip is picked, beside the others (n,): one whose motion is of SLOW twice as often."""
    return 1.0 + torch.isin(clips.motion, torch.tensor([WORLD_MOTIONS.index(name) for name in SLOW]))


def word_loss(states: Tensor, tokens: Tensor, table: Tensor, spoken: Tensor) -> Tensor:
    """How badly each token's text state tells the words up to it.

    Args:
        states: (b, n, d), the text encoder's last.
        tokens: (b, n) token numbers; the first is the start token, the second a word.
        table: (vocabulary, d), the embeddings of the tokens, by which the states are read.
        spoken: numbers of the tokens that are told apart.

    Returns:
        The mean Kullback-Leibler divergence of softmax(states @ table) from equal shares of the words so far.
    """
    told = (tokens[:, :, None] == spoken).cumsum(dim=1)[:, 1:].clamp(max=1).float()
    shares = told / told.sum(dim=2, keepdim=True)
    read = F.log_softmax(states[:, 1:] @ table[spoken].T, dim=2)
    return F.kl_div(read, shares, reduction="none").sum(dim=2).mean()


def folder_of(start: str) -> Path:
    """Where the base of --start lies; "tiny" is the one that comes along."""
    return TINY if start == "tiny" else Path(start)


def started(network: Network, start: str | None, part: Literal["clip", "vae", "unet"]) -> Network:
    """The network with the weights of the base `start`, or as it was made; what it has no place for is left out.

    Raises:
        UserError: a base that cannot be read, or whose networks are others.
    """
    if start is not None:
        if part == "clip":
            source: nn.Module = CLIPModel.from_pretrained(folder_of(start) / "clip", local_files_only=True)
        else:
            source = getattr(load_base(start, device="cpu"), part)
        theirs = source.state_dict()
        try:
            network.load_state_dict({name: theirs[name] for name in network.state_dict()})
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{start} is not built like the tiny base: its {part} does not fit") from error
    return network


def load_trained(folder: Path, network: Network) -> Network:
    """The network with the weights of a stage that is done; UserError for one that is not, or is damaged."""
    state = folder / "state.pt"
    if not ((folder / DONE).is_file() and state.is_file()):
        raise UserError(f"stage {folder.name} is not done yet: run it before those that build on it")
    try:
        network.load_state_dict(read_state(state)["network"])
    except (KeyError, TypeError, RuntimeError, UserError) as error:
        raise UserError(f"{state} is damaged ({error}): delete it, and the stage starts anew") from error
    return network.eval().requires_grad_(False)


def trained_clip(out: Path) -> CLIPModel:
    size = len(read_json(out / "tokenizer" / "vocab.json"))
    return load_trained(out / "clip", CLIPModel(clip_config(size)))


def trained_text(out: Path) -> TextEncoder:
    """The CLIP's text tower, as the base has it."""
    clip = trained_clip(out)
    text = TextEncoder(text_config(clip.config.text_config.vocab_size))
    text.clip.load_state_dict(clip.text_model.state_dict())
    return text.eval().requires_grad_(False)


def trained_vae(out: Path) -> AutoencoderKL:
    """The autoencoder, its latents scaled to a standard deviation of 1 as measured on fresh frames."""
    return load_trained(out / "vae", AutoencoderKL(dataclasses.replace(VAE, **read_json(out / "vae" / SCALE))))


@torch.no_grad()
def measured_scale(vae: AutoencoderKL, device: torch.device) -> float:
    """One over the standard deviation of the latents of 512 frames."""
    frames, _ = render(single_frames(512, torch.Generator().manual_seed(0)))
    latents = vae.encode_latents(frames.to(device), chunk=64)
    return (latents.mean.square() + latents.std.square()).mean().rsqrt().item() * vae.config.scaling_factor


@torch.no_grad()
def encoded(out: Path, stage: str, scenes: Scenes, device: torch.device) -> LatentDistribution:
    """The latents of `scenes`, (n, 4, f, 8, 8) in float16 on the CPU, from the stage's file or into it."""
    file = out / stage / "latents.pt"
    if not file.is_file():
        vae = trained_vae(out).to(device)
        parts = []
        for part in tqdm(torch.arange(len(scenes)).split(64), desc=f"{stage}: encoding", mininterval=5):
            latents = vae.encode_latents(render(scenes[part])[0].to(device), chunk=64)
            parts.append(torch.stack([latents.mean, latents.std]).half().cpu())
        contents = torch_bytes(torch.cat(parts, dim=1))
        with atomic_write(file) as temporary:
            temporary.write_bytes(contents)
    mean, std = torch.load(file, weights_only=True)
    return LatentDistribution(mean, std)
