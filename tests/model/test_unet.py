"""The network against diffusers on the same random weights, and what the papers' layers must do."""

from dataclasses import replace

import pytest
import torch
from oracles import diffusers_unet, error, like_diffusers, randomise

from model import SD15, SD15_V1, SD15_V2, SD15_V3, UNet3D, UNetConfig, UserError

WIDTHS = {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 48}
NARROW = {name: replace(config, **WIDTHS) for name, config in (("v1", SD15_V1), ("v2", SD15_V2), ("v3", SD15_V3))}


def narrow(config: UNetConfig, seed: int = 0) -> UNet3D:
    return randomise(UNet3D(config), seed).eval().requires_grad_(False)


def inputs(frames: int = 2, height: int = 8, width: int = 24, batch: int = 2) -> tuple:
    generator = torch.Generator().manual_seed(frames * height)
    latents = torch.randn(batch, 4, frames, height, width, generator=generator)
    return latents, torch.tensor([7, 900])[:batch], torch.randn(batch, 5, 48, generator=generator)


@pytest.mark.parametrize(
    ("config", "parameters", "motion"),
    [(SD15, 859_520_964, 0), (SD15_V1, None, 417_137_600), (SD15_V2, None, 453_209_280), (SD15_V3, None, 417_137_600)],
)
def test_the_full_networks_have_the_papers_parameters(config, parameters, motion):
    with torch.device("meta"):
        unet = UNet3D(config)
    counted = sum(p.numel() for name, p in unet.named_parameters() if ".temporal." in name)
    total = sum(p.numel() for p in unet.parameters())
    assert counted == motion
    assert total == 859_520_964 + motion
    if config is SD15_V3:
        assert total == 1_276_658_564


@pytest.mark.parametrize(("height", "width"), [(8, 24), (9, 15)])
@pytest.mark.parametrize("frames", [1, 2, 16])
@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_whole_networks_equal_diffusers(version, frames, height, width):
    unet = narrow(like_diffusers(NARROW[version]))
    latents, timesteps, text = inputs(frames, height, width)
    with torch.no_grad():
        words = text.repeat_interleave(frames, dim=0)
        reference = diffusers_unet(unet)(latents, timesteps, encoder_hidden_states=words).sample
        assert error(unet(latents, timesteps, text), reference) < 1e-4


def test_the_image_network_equals_diffusers_and_is_what_motion_off_gives():
    unet = narrow(NARROW["v2"])
    image_only = UNet3D(replace(unet.config, motion=None)).eval()
    image_only.load_state_dict({k: v for k, v in unet.state_dict().items() if ".temporal." not in k})
    latents, timesteps, text = inputs(frames=1)
    with torch.no_grad():
        reference = diffusers_unet(image_only)(latents[:, :, 0], timesteps, encoder_hidden_states=text).sample
        assert error(image_only(latents, timesteps, text)[:, :, 0], reference) < 1e-4
        bypassed = unet(latents, timesteps, text, motion=False)
        assert error(bypassed, image_only(latents, timesteps, text)) < 1e-5


def test_layers_hold_what_the_papers_table_says():
    unet = narrow(NARROW["v3"])
    assert [len(layer.spatial) for layer in unet.layers] == [2, 2, 2, 0, 1, 0, 3, 3, 3]
    assert [len(layer.temporal) for layer in unet.layers] == [2, 2, 2, 2, 0, 3, 3, 3, 3]
    assert len(narrow(NARROW["v2"]).layers[4].temporal) == 1


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_motion_off_makes_frames_independent(version):
    unet = narrow(NARROW[version])
    latents, timesteps, text = inputs(frames=4)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        out = unet(latents, timesteps, text, motion=False)
        permuted = unet(latents[:, :, order], timesteps, text, motion=False)
        alone = unet(latents[:, :, 1:2], timesteps, text, motion=False)
    assert error(permuted, out[:, :, order]) < 1e-5
    assert error(alone, out[:, :, 1:2]) < 1e-5


def test_motion_on_mixes_frames():
    unet = narrow(NARROW["v3"])
    latents, timesteps, text = inputs(frames=4)
    changed = latents.clone()
    changed[:, :, 3] += 1
    with torch.no_grad():
        moved = (unet(latents, timesteps, text) - unet(changed, timesteps, text))[:, :, 0].abs().max()
    assert moved > 1e-3


def test_text_in_nine_pieces_equals_text_in_one():
    unet = narrow(NARROW["v3"])
    latents, timesteps, text = inputs()
    with torch.no_grad():
        assert torch.equal(unet(latents, timesteps, text), unet(latents, timesteps, [text] * 9))


def test_layers_3_and_5_ignore_text_and_the_others_do_not():
    unet = narrow(NARROW["v3"])
    latents, timesteps, text = inputs()
    other = torch.randn_like(text)
    with torch.no_grad():
        plain = unet(latents, timesteps, text)
        for layer in range(9):
            texts = [other if i == layer else text for i in range(9)]
            assert torch.equal(unet(latents, timesteps, texts), plain) == (layer in (3, 5))


@pytest.mark.parametrize("config", [replace(SD15, **WIDTHS), NARROW["v1"], NARROW["v2"]], ids=["image", "v1", "v2"])
def test_gradient_checkpointing_changes_no_gradient(config):
    latents, timesteps, text = inputs(frames=2, height=4, width=4)
    gradients = []
    for on in (False, True):
        unet = narrow(config).requires_grad_(True)
        unet.gradient_checkpointing(on)
        unet(latents, timesteps, text).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in unet.parameters()]))
    assert torch.equal(*gradients)


def test_gradient_checkpointing_keeps_fewer_activations():
    latents, timesteps, text = inputs(frames=2)
    kept = []
    for on in (False, True):
        unet = narrow(NARROW["v3"]).requires_grad_(True)
        unet.gradient_checkpointing(on)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            unet(latents, timesteps, text)
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


def test_one_timestep_serves_the_whole_batch():
    unet = narrow(NARROW["v3"])
    latents, _, text = inputs()
    with torch.no_grad():
        assert torch.equal(unet(latents, 500, text), unet(latents, torch.tensor([500, 500]), text))


def test_a_clip_beyond_the_positional_encoding_is_refused_unless_motion_is_off():
    unet = narrow(NARROW["v1"])
    latents, timesteps, text = inputs(frames=25, height=2, width=2, batch=1)
    with pytest.raises(UserError, match="24"):
        unet(latents, timesteps, text)
    assert unet(latents, timesteps, text, motion=False).shape == latents.shape


def test_shapes_that_do_not_fit_are_named():
    unet = narrow(NARROW["v3"])
    latents, timesteps, text = inputs()
    with pytest.raises(UserError, match="one tensor or 9"):
        unet(latents, timesteps, [text] * 8)
    with pytest.raises(UserError, match="layer 0"):
        unet(latents, timesteps, text[..., :-1])
    with pytest.raises(UserError, match="latents"):
        unet(latents[:, :3], timesteps, text)


class PooledNorm(torch.nn.Module):
    """A group norm of diffusers' network that sees all frames of a clip at once."""

    def __init__(self, norm, frames):
        super().__init__()
        self.norm, self.frames = norm, frames

    def forward(self, hidden):
        clips = hidden.unflatten(0, (-1, self.frames)).transpose(1, 2)
        return self.norm(clips).transpose(1, 2).flatten(0, 1)


def test_v1_pools_every_resnet_norm_and_the_last_norm_over_frames():
    """diffusers' network with those norms wrapped, the one way in which the original v1 differs from it."""
    unet = narrow(replace(NARROW["v1"], motion=replace(NARROW["v1"].motion, pool_module_norm=True)))
    reference = diffusers_unet(unet)
    for name, module in list(reference.named_modules()):
        if name.endswith(("resnets.0", "resnets.1", "resnets.2")):
            module.norm1, module.norm2 = PooledNorm(module.norm1, 3), PooledNorm(module.norm2, 3)
    reference.conv_norm_out = PooledNorm(reference.conv_norm_out, 3)
    latents, timesteps, text = inputs(frames=3)
    with torch.no_grad():
        words = text.repeat_interleave(3, dim=0)
        expected = reference(latents, timesteps, encoder_hidden_states=words).sample
        assert error(unet(latents, timesteps, text), expected) < 1e-4


def test_each_layer_reads_its_own_text():
    unet, read = narrow(NARROW["v2"]), {}
    for i, layer in enumerate(unet.layers):
        for transformer in layer.spatial:
            attention = transformer.transformer_blocks[0].attn2
            attention.register_forward_pre_hook(lambda _, args, i=i: read.setdefault(i, []).append(args[1]))
    latents, timesteps, text = inputs()
    texts = [text + i for i in range(9)]
    with torch.no_grad():
        unet(latents, timesteps, texts)
    assert sorted(read) == [0, 1, 2, 4, 6, 7, 8]
    assert all(seen is texts[i] for i, contexts in read.items() for seen in contexts)
