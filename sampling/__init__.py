"""From noise to clips, and media in and out."""

from sampling.ddim import ddim_invert, ddim_sample, ddim_step
from sampling.guidance import guided
from sampling.media import check_size, image_files, read_image, read_video
from sampling.sample import (
    decode,
    derived_seed,
    draw_noise,
    encode,
    encode_videos,
    evaluating,
    mixed_noise,
    sample_latents,
    sample_videos,
)
from sampling.write import contact_sheet, write_media

__all__ = [
    "check_size",
    "contact_sheet",
    "ddim_invert",
    "ddim_sample",
    "ddim_step",
    "decode",
    "derived_seed",
    "draw_noise",
    "encode",
    "encode_videos",
    "evaluating",
    "guided",
    "image_files",
    "mixed_noise",
    "read_image",
    "read_video",
    "sample_latents",
    "sample_videos",
    "write_media",
]
