"""What the tensors of other people's files are called here: tables, and the two lines that read them either way.

A `Layout` renames the head of a dotted name and keeps its tail: `down_blocks.1.resnets.0` + `.conv1.weight` becomes
`layers.1.resnets.0` + `.conv1.weight`. Heads are whole dotted segments (`input_blocks.1` is no head of
`input_blocks.10.0`), and none is the head of another, so that every table reads backwards as well as forwards.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """One way of naming a network's tensors.

    Args:
        name: for messages.
        heads: {head of their name, without the prefix: head of our name}.
        prefix: what every name of theirs starts with.
        convs: our names (a regular expression; the default fits none) whose matrices (out, in) they keep as 1x1
            convolutions (out, in, 1, 1).
    """

    name: str
    heads: Mapping[str, str]
    prefix: str = ""
    convs: str = "(?!)"

    def to_ours(self, key: str) -> str | None:
        """Our name for their `key`; None where this layout has no such key."""
        return _rename(key.removeprefix(self.prefix), self.heads) if key.startswith(self.prefix) else None

    def from_ours(self, name: str) -> str | None:
        """Their key for our `name`; None where this layout has no such tensor."""
        theirs = _rename(name, self._heads_of_ours)
        return None if theirs is None else self.prefix + theirs

    @cached_property
    def _heads_of_ours(self) -> dict[str, str]:
        return {ours: theirs for theirs, ours in self.heads.items()}

    def write(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under our names -> the same under theirs, in their shapes; what they have no name for is left out."""
        shaped = {name: t[:, :, None, None] if re.fullmatch(self.convs, name) else t for name, t in tensors.items()}
        return {key: tensor for name, tensor in shaped.items() if (key := self.from_ours(name)) is not None}


def best_layout(keys: Iterable[str], layouts: Iterable[Layout]) -> Layout:
    """The layout that knows most of `keys`; the first of those that know equally many."""
    keys = list(keys)
    return max(layouts, key=lambda layout: sum(layout.to_ours(key) is not None for key in keys))


def why_ignored(key: str, ignored: Mapping[str, str]) -> str | None:
    """The reason why a file's `key` may be left unused, or None where there is none."""
    return next((reason for pattern, reason in ignored.items() if re.fullmatch(pattern, key)), None)


def _rename(name: str, heads: Mapping[str, str]) -> str | None:
    segments = name.split(".")
    for n in range(len(segments), 0, -1):
        head = heads.get(".".join(segments[:n]))
        if head is not None:
            return ".".join([head, *segments[n:]])
    return None


def _inside(blocks: Mapping[str, str], inner: Mapping[str, str]) -> dict[str, str]:
    """Each row of `inner`, inside each row of `blocks`."""
    return {f"{a}.{x}": f"{b}.{y}" for a, b in blocks.items() for x, y in inner.items()}


def _same(names: Iterable[str]) -> dict[str, str]:
    """Names that are the same in both."""
    return {name: name for name in names}


# layer i of ours    0                1                2                3                4            5 to 8
BLOCKS = ("down_blocks.0", "down_blocks.1", "down_blocks.2", "down_blocks.3", "mid_block",
          "up_blocks.0", "up_blocks.1", "up_blocks.2", "up_blocks.3")  # fmt: skip
MODULES = (2, 2, 2, 2, 1, 3, 3, 3, 3)  # motion modules in each; layer 4's in AnimateDiff v2 only

PARTS = {
    "resnets": "resnets",
    "attentions": "spatial",
    "motion_modules": "temporal",
    "downsamplers.0": "downsampler",
    "upsamplers.0": "upsampler",
}

STEM = ("conv_in", "time_embedding", "conv_norm_out", "conv_out")

PROJECTIONS = r"layers\.\d\.spatial\.\d\.proj_(in|out)\.weight"

UNET_DIFFUSERS = Layout(
    "diffusers UNet",
    _same(STEM)
    | {f"{block}.{part}": f"layers.{i}.{ours}" for i, block in enumerate(BLOCKS) for part, ours in PARTS.items()},
    convs=PROJECTIONS,
)

LDM_STEM = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}

# LDM block        slot 0                slot 1                (a slot of a resampler is in LDM_RESAMPLERS)
LDM_BLOCKS = {
    "input_blocks.1": ("layers.0.resnets.0", "layers.0.spatial.0"),
    "input_blocks.2": ("layers.0.resnets.1", "layers.0.spatial.1"),
    "input_blocks.4": ("layers.1.resnets.0", "layers.1.spatial.0"),
    "input_blocks.5": ("layers.1.resnets.1", "layers.1.spatial.1"),
    "input_blocks.7": ("layers.2.resnets.0", "layers.2.spatial.0"),
    "input_blocks.8": ("layers.2.resnets.1", "layers.2.spatial.1"),
    "input_blocks.10": ("layers.3.resnets.0",),
    "input_blocks.11": ("layers.3.resnets.1",),
    "middle_block": ("layers.4.resnets.0", "layers.4.spatial.0", "layers.4.resnets.1"),
    "output_blocks.0": ("layers.5.resnets.0",),
    "output_blocks.1": ("layers.5.resnets.1",),
    "output_blocks.2": ("layers.5.resnets.2",),
    "output_blocks.3": ("layers.6.resnets.0", "layers.6.spatial.0"),
    "output_blocks.4": ("layers.6.resnets.1", "layers.6.spatial.1"),
    "output_blocks.5": ("layers.6.resnets.2", "layers.6.spatial.2"),
    "output_blocks.6": ("layers.7.resnets.0", "layers.7.spatial.0"),
    "output_blocks.7": ("layers.7.resnets.1", "layers.7.spatial.1"),
    "output_blocks.8": ("layers.7.resnets.2", "layers.7.spatial.2"),
    "output_blocks.9": ("layers.8.resnets.0", "layers.8.spatial.0"),
    "output_blocks.10": ("layers.8.resnets.1", "layers.8.spatial.1"),
    "output_blocks.11": ("layers.8.resnets.2", "layers.8.spatial.2"),
}
_SLOTS = {f"{block}.{i}": ours for block, slots in LDM_BLOCKS.items() for i, ours in enumerate(slots)}

LDM_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}

LDM_RESAMPLERS = {
    "input_blocks.3.0.op": "layers.0.downsampler.conv",
    "input_blocks.6.0.op": "layers.1.downsampler.conv",
    "input_blocks.9.0.op": "layers.2.downsampler.conv",
    "output_blocks.2.1.conv": "layers.5.upsampler.conv",  # slot 1: layer 5 has no spatial transformers
    "output_blocks.5.2.conv": "layers.6.upsampler.conv",
    "output_blocks.8.2.conv": "layers.7.upsampler.conv",
}

UNET_LDM = Layout(
    "LDM UNet",
    LDM_STEM
    | _inside({theirs: ours for theirs, ours in _SLOTS.items() if ".resnets." in ours}, LDM_RESNET)
    | {theirs: ours for theirs, ours in _SLOTS.items() if ".spatial." in ours}
    | LDM_RESAMPLERS,
    prefix="model.diffusion_model.",
    convs=PROJECTIONS,
)

MOTION_MODULES = {
    f"{block}.motion_modules.{j}": f"layers.{i}.temporal.{j}"
    for i, (block, count) in enumerate(zip(BLOCKS, MODULES, strict=True))
    for j in range(count)
}

MOTION_INNER = {
    "norm": "norm",
    "proj_in": "proj_in",
    "transformer_blocks.0.norms.0": "transformer_blocks.0.norm1",
    "transformer_blocks.0.attention_blocks.0.to_q": "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.0.attention_blocks.0.to_k": "transformer_blocks.0.attn1.to_k",
    "transformer_blocks.0.attention_blocks.0.to_v": "transformer_blocks.0.attn1.to_v",
    "transformer_blocks.0.attention_blocks.0.to_out": "transformer_blocks.0.attn1.to_out",
    "transformer_blocks.0.norms.1": "transformer_blocks.0.norm2",
    "transformer_blocks.0.attention_blocks.1.to_q": "transformer_blocks.0.attn2.to_q",
    "transformer_blocks.0.attention_blocks.1.to_k": "transformer_blocks.0.attn2.to_k",
    "transformer_blocks.0.attention_blocks.1.to_v": "transformer_blocks.0.attn2.to_v",
    "transformer_blocks.0.attention_blocks.1.to_out": "transformer_blocks.0.attn2.to_out",
    "transformer_blocks.0.ff_norm": "transformer_blocks.0.norm3",
    "transformer_blocks.0.ff": "transformer_blocks.0.ff",
    "proj_out": "proj_out",
}

ANIMATEDIFF = Layout(
    "AnimateDiff motion module",
    _inside({f"{theirs}.temporal_transformer": ours for theirs, ours in MOTION_MODULES.items()}, MOTION_INNER),
)
MOTION_ADAPTER = Layout("diffusers MotionAdapter", _inside(MOTION_MODULES, _same(MOTION_INNER.values())))

# Our names of the autoencoder's parts are those of diffusers today.
CODERS = ("encoder", "decoder")
VAE_STEM = (
    *(f"{coder}.{conv}" for coder in CODERS for conv in ("conv_in", "conv_out")),
    "quant_conv",
    "post_quant_conv",
)

VAE_RESNETS = {
    **{f"encoder.down.{i}.block.{j}": f"encoder.down_blocks.{i}.resnets.{j}" for i in range(4) for j in range(2)},
    **{f"{coder}.mid.block_{j + 1}": f"{coder}.mid_block.resnets.{j}" for coder in CODERS for j in range(2)},
    **{f"decoder.up.{3 - i}.block.{j}": f"decoder.up_blocks.{i}.resnets.{j}" for i in range(4) for j in range(3)},
}
VAE_RESNET = {**_same(("norm1", "conv1", "norm2", "conv2")), "nin_shortcut": "conv_shortcut"}

VAE_RENAMED = {
    **{f"encoder.down.{i}.downsample": f"encoder.down_blocks.{i}.downsamplers.0" for i in range(3)},
    **{f"decoder.up.{3 - i}.upsample": f"decoder.up_blocks.{i}.upsamplers.0" for i in range(3)},
    **{f"{coder}.norm_out": f"{coder}.conv_norm_out" for coder in CODERS},
    **_inside(VAE_RESNETS, VAE_RESNET),
}

VAE_ATTENTIONS = {f"{coder}.mid.attn_1": f"{coder}.mid_block.attentions.0" for coder in CODERS}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
VAE_OLD_ATTENTION = {
    "group_norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}

_VAE_SAME = _same((*VAE_STEM, *VAE_RENAMED.values()))
_VAE_MIDDLE = _same(VAE_ATTENTIONS.values())

VAE_DIFFUSERS = Layout("diffusers VAE", _VAE_SAME | _inside(_VAE_MIDDLE, _same(VAE_ATTENTION.values())))
VAE_DIFFUSERS_OLD = Layout("diffusers VAE before 2023", _VAE_SAME | _inside(_VAE_MIDDLE, VAE_OLD_ATTENTION))
VAE_LDM = Layout(
    "LDM VAE",
    _same(VAE_STEM) | VAE_RENAMED | _inside(VAE_ATTENTIONS, VAE_ATTENTION),
    prefix="first_stage_model.",
    convs=r"(en|de)coder\.mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight",
)

TEXT_PARTS = ("embeddings.token_embedding", "embeddings.position_embedding", "encoder.layers", "final_layer_norm")
TEXT = Layout("CLIP text encoder", _same(TEXT_PARTS))

# What a network's tensors may be called in a file, whether alone or in a one-file checkpoint.
UNETS = (UNET_DIFFUSERS, UNET_LDM)
MOTIONS = (ANIMATEDIFF, MOTION_ADAPTER)
VAES = tuple(
    replace(layout, prefix=prefix)
    for layout in (VAE_DIFFUSERS, VAE_DIFFUSERS_OLD, VAE_LDM)
    for prefix in ("", "first_stage_model.", "vae.")
)
TEXTS = tuple(
    replace(TEXT, prefix=prefix)
    for prefix in ("", "text_model.", "cond_stage_model.transformer.", "cond_stage_model.transformer.text_model.")
)

# Keys (regular expressions) that a file may hold and nothing here uses, and why.
CONSTANT = "0, 1, 2, ...: a constant"
EMA = "moving average kept for the training; the weights themselves are used"
SCHEDULE = "noise schedule of the training; ours is computed"
IMAGES = "CLIP's comparison with pictures; the text tower alone is used"
SINUSOID = "fixed sinusoid, recomputed"
IMAGE_NETWORK = "the image network, saved along by AnimateDiff's training; the base brings its own"

IGNORED_IN_VAE = {
    r"(first_stage_model\.)?model_ema\..*": EMA,
    r"(first_stage_model\.)?loss\..*": "critics of the autoencoder's training",
}
IGNORED_IN_TEXT = {
    r"(cond_stage_model\.transformer\.)?(text_model\.)?embeddings\.position_ids": CONSTANT,
    r"(cond_stage_model\.(transformer\.)?)?(text_projection(\.weight)?|visual_projection\.weight|logit_scale)": IMAGES,
    r"(cond_stage_model\.transformer\.)?vision_model\..*": IMAGES,
}
IGNORED_IN_BASE = IGNORED_IN_VAE | IGNORED_IN_TEXT | {
    r"(betas|alphas_cumprod|alphas_cumprod_prev|(sqrt|log)_(one_minus|recip|recipm1)?_?alphas_cumprod)": SCHEDULE,
    r"(posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)|lvlb_weights|logvar|scale_factor)": SCHEDULE,
}  # fmt: skip
IGNORED_IN_MOTION = {
    r".*\.attention_blocks\.[01]\.pos_encoder\.pe": SINUSOID,
    r".*\.transformer_blocks\.0\.pos_embed\.pe": SINUSOID,
    r"(conv_in|time_embedding|conv_norm_out|conv_out)\..*": IMAGE_NETWORK,
    r"((down|up)_blocks\.\d|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\..*": IMAGE_NETWORK,
}
