"""The autoencoder against diffusers' on the same random weights."""

import pytest
import torch
from diffusers import AutoencoderKL as Reference
from oracles import error, randomise

from model import AutoencoderKL, UserError, VAEConfig

CONFIG = VAEConfig(block_out_channels=(32, 32, 64, 64))


@pytest.fixture(scope="module")
def pair():
    ours = randomise(AutoencoderKL(CONFIG)).eval().requires_grad_(False)
    reference = Reference(
        block_out_channels=CONFIG.block_out_channels,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        norm_num_groups=32,
    )
    reference.load_state_dict(ours.state_dict())
    return ours, reference.eval().requires_grad_(False)


def test_the_full_autoencoder_has_its_parameters():
    with torch.device("meta"):
        vae = AutoencoderKL(VAEConfig())
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert len(vae.state_dict()) == 248


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 72)])
def test_encoding_equals_diffusers(pair, height, width):
    ours, reference = pair
    images = torch.rand(2, 3, height, width) * 2 - 1
    assert error(ours.encode(images), reference.encode(images).latent_dist.parameters) < 1e-4


def test_decoding_equals_diffusers(pair):
    ours, reference = pair
    latents = torch.randn(2, 4, 5, 9)
    assert error(ours.decode(latents), reference.decode(latents).sample) < 1e-4


def test_clip_latents_are_scaled_mean_and_spread_whatever_the_chunk(pair):
    ours, reference = pair
    video = torch.rand(2, 3, 5, 32, 40) * 2 - 1
    latents = ours.encode_latents(video, chunk=3)
    for frame in range(5):
        expected = reference.encode(video[:, :, frame]).latent_dist
        assert error(latents.mean[:, :, frame], expected.mean * 0.18215) < 1e-4
        assert error(latents.std[:, :, frame], expected.std * 0.18215) < 1e-4
    noise = torch.randn_like(latents.mean)
    assert torch.equal(latents.sample(noise), latents.mean + latents.std * noise)


def test_clip_decoding_undoes_the_scale_and_clamps(pair):
    ours, reference = pair
    latents = torch.randn(1, 4, 3, 4, 5)
    video = ours.decode_latents(latents, chunk=2)
    assert video.shape == (1, 3, 3, 32, 40)
    for frame in range(3):
        expected = reference.decode(latents[:, :, frame] / 0.18215).sample.clamp(-1, 1)
        assert (video[:, :, frame] - expected).abs().max() < 1e-4


def test_sizes_that_do_not_divide_are_refused(pair):
    with pytest.raises(UserError, match="divide by 8"):
        pair[0].encode_latents(torch.zeros(1, 3, 1, 32, 33))
