"""Single blocks against diffusers' and torch's own, on the same random weights."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from einops import rearrange
from oracles import error, randomise

from model.attention import SpatialTransformer
from model.config import MotionConfig
from model.motion import MotionModule, frame_encoding, group_norm
from model.resnet import Downsample, ResnetBlock, TimeEmbedding, Upsample


def same_weights(ours, reference):
    """Fill `reference` with our weights under the very same names."""
    state = reference.state_dict()
    missing, unexpected = reference.load_state_dict(
        {name: value.reshape(state[name].shape) for name, value in ours.state_dict().items()}, strict=False
    )
    assert not unexpected
    assert all(name.endswith(".pe") for name in missing)
    return reference.eval()


@pytest.mark.parametrize("frames", [1, 3])
def test_spatial_transformer_equals_diffusers(frames):
    ours = randomise(SpatialTransformer(64, heads=8, context_dim=48, groups=32)).eval()
    reference = same_weights(ours, Transformer2DModel(8, 8, in_channels=64, cross_attention_dim=48, norm_num_groups=32))
    hidden, text = torch.randn(2 * frames, 64, 5, 7), torch.randn(2, 9, 48)
    with torch.no_grad():
        expected = reference(hidden, text.repeat_interleave(frames, dim=0)).sample
        assert error(ours(hidden, text, frames), expected) < 1e-5


def motion_reference(ours, dim):
    return same_weights(
        ours,
        AnimateDiffTransformer3D(
            8,
            dim // 8,
            in_channels=dim,
            norm_num_groups=32,
            activation_fn="geglu",
            attention_bias=False,
            double_self_attention=True,
            positional_embeddings="sinusoidal",
            num_positional_embeddings=32,
        ),
    )


@pytest.mark.parametrize("frames", [1, 2, 16, 32])
def test_motion_module_equals_diffusers_where_the_norm_is_pooled(frames):
    ours = randomise(MotionModule(64, MotionConfig(pool_module_norm=True))).eval()
    hidden = torch.randn(2 * frames, 64, 3, 5)
    with torch.no_grad():
        expected = motion_reference(ours, 64)(hidden, num_frames=frames)
        assert error(ours(hidden, frames), expected) < 1e-5


def test_motion_module_norms_each_frame_alone_as_animatediff_does():
    """diffusers' module with its norm replaced by one that sees frames one by one, as the original code has it."""
    ours = randomise(MotionModule(64, MotionConfig())).eval()
    reference = motion_reference(ours, 64)
    norm = reference.norm

    class PerFrame(torch.nn.Module):
        def forward(self, video):
            return torch.stack([norm(frame) for frame in video.unbind(2)], dim=2)

    reference.norm = PerFrame()
    hidden = torch.randn(2 * 4, 64, 3, 5)
    with torch.no_grad():
        assert error(ours(hidden, 4), reference(hidden, num_frames=4)) < 1e-5


def test_frame_encoding_is_the_sinusoid_of_the_papers():
    """Vaswani et al. 2017, section 3.5, in double precision."""
    frames, dim = 24, 64
    position = torch.arange(frames, dtype=torch.float64)[:, None]
    pair = torch.arange(dim, dtype=torch.float64) // 2 * 2
    angles = position / 10000 ** (pair / dim)
    expected = torch.where(torch.arange(dim) % 2 == 0, angles.sin(), angles.cos())
    assert (frame_encoding(frames, torch.zeros(1, dim)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("channels", "width"), [(64, 64), (96, 32)])
def test_resnet_equals_diffusers(channels, width):
    ours = randomise(ResnetBlock(channels, width, 128, 32)).eval()
    reference = same_weights(
        ours, ResnetBlock2D(in_channels=channels, out_channels=width, temb_channels=128, groups=32, eps=1e-5)
    )
    hidden, time = torch.randn(2 * 3, channels, 6, 5), torch.randn(2, 128)
    with torch.no_grad():
        expected = reference(hidden, time.repeat_interleave(3, dim=0))
        assert error(ours(hidden, time, frames=3), expected) < 1e-5


def test_pooled_norms_are_those_of_a_5d_group_norm():
    """AnimateDiff v1: each resnet norm sees (b, c, f, h, w) at once."""
    resnet = randomise(ResnetBlock(64, 64, 128, 32)).eval()
    video, time = torch.randn(2, 64, 3, 6, 5), torch.randn(2, 128)

    def conv(module, x):
        return torch.stack([module(frame) for frame in x.unbind(2)], dim=2)

    with torch.no_grad():
        hidden = conv(resnet.conv1, F.silu(resnet.norm1(video)))
        hidden = hidden + resnet.time_emb_proj(F.silu(time))[:, :, None, None, None]
        expected = video + conv(resnet.conv2, F.silu(resnet.norm2(hidden)))
        ours = resnet(rearrange(video, "b c f h w -> (b f) c h w"), time, frames=3, pooled=3)
    assert error(rearrange(ours, "(b f) c h w -> b c f h w", f=3), expected) < 1e-5


def test_group_norm_pools_only_when_asked():
    norm = randomise(torch.nn.GroupNorm(4, 8))
    hidden = torch.randn(6, 8, 3, 3) * torch.arange(1, 7)[:, None, None, None]
    video = rearrange(hidden, "(b f) c h w -> b (c) f h w", f=3)
    grouped = rearrange(video, "b (g c) f h w -> b g (c f h w)", g=4)
    scaled = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    scaled = rearrange(scaled, "b g (c f h w) -> (b f) (g c) h w", c=2, f=3, h=3)
    expected = scaled * norm.weight[:, None, None] + norm.bias[:, None, None]
    assert error(group_norm(norm, hidden, 3), expected) < 1e-5
    assert torch.equal(group_norm(norm, hidden, 1), norm(hidden))


def test_changes_of_size_equal_diffusers():
    hidden = torch.randn(2, 32, 5, 7)
    down = randomise(Downsample(32))
    up = randomise(Upsample(32))
    with torch.no_grad():
        expected = same_weights(down, Downsample2D(32, use_conv=True, padding=1, name="op"))(hidden)
        assert error(down(hidden), expected) < 1e-5
        expected = same_weights(up, Upsample2D(32, use_conv=True))(hidden, output_size=(9, 14))
        assert error(up(hidden, size=(9, 14)), expected) < 1e-5


def test_time_embedding_equals_diffusers():
    ours = randomise(TimeEmbedding(64))
    timesteps = torch.tensor([0, 1, 500, 999])
    with torch.no_grad():
        waves = Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)(timesteps)
        assert error(ours(timesteps), same_weights(ours, TimestepEmbedding(64, 256))(waves)) < 1e-5
