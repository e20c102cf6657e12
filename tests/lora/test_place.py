"""Adapters of given weights: ranks and alphas per layer, convolutions, any network; against peft and by hand."""

import peft
import pytest
import torch
from lora_files import merged_by_hand, random_weights
from oracles import error, randomise
from torch import nn

from lora import (
    LoRALayer,
    LowRank,
    adapter_modules,
    adapter_names,
    adapter_parameters,
    adapters,
    add_adapter,
    copy_adapter,
    merge_adapters,
    place_adapter,
    remove_adapter,
    unmerge_adapters,
)
from model import TextConfig, TextEncoder, UNet3D, UserError
from weights import save_lora

SOME = (
    r"layers\.2\.spatial\.0\..*|layers\.5\.temporal\.1\..*|layers\.[15]\.(resnets\.0|downsampler|upsampler)\..*"
    r"|conv_(in|out)|time_embedding\.linear_1"
)


def peft_reference(network, weights):
    """peft's model with the same updates, each layer's rank and alpha told by a pattern."""
    config = peft.LoraConfig(
        target_modules=list(weights),
        rank_pattern={f"^{name}": low.rank for name, low in weights.items()},
        alpha_pattern={f"^{name}": low.alpha for name, low in weights.items()},
    )
    reference = peft.get_peft_model(network, config)
    state = {}
    for name, low in weights.items():
        state[f"base_model.model.{name}.lora_A.weight"] = low.A
        state[f"base_model.model.{name}.lora_B.weight"] = low.B
    assert not peft.set_peft_model_state_dict(reference, state).unexpected_keys
    return reference.eval()


def test_linear_and_convolutional_layers_of_all_ranks_equal_peft(unet, inputs):
    """In float64: this network makes 3e-5 of the rounding of some machines' convolutions in float32."""
    weights = random_weights(unet, SOME, alpha=3.0)
    assert {low.rank for low in weights.values()} == {2, 3, 4}
    assert sum(low.A.ndim == 4 for low in weights.values()) >= 8
    reference = peft_reference(randomise(UNet3D(unet.config)), weights).double()
    place_adapter(unet, "a", weights)
    unet.double()
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        plain = unet(*inputs)
        with adapters(unet, {"a": 1.0}):
            switched = unet(*inputs)
        assert error(switched, reference(*inputs)) < 1e-5
    assert error(switched, plain) > 1e-2


def test_each_layer_merges_as_by_hand_and_comes_back_bit_for_bit(unet, inputs):
    weights = random_weights(unet, SOME, alpha=3.0)
    expected = merged_by_hand(unet, weights, -0.7)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    place_adapter(unet, "a", weights)
    with torch.no_grad(), adapters(unet, {"a": -0.7}):
        switched = unet(*inputs)
    merge_adapters(unet, {"a": -0.7})
    for name, value in expected.items():
        assert torch.allclose(unet.get_submodule(name).weight, value, atol=1e-6), name
    with torch.no_grad():
        assert error(unet(*inputs), switched) < 1e-5
    unmerge_adapters(unet)
    after = unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_half_precision_networks_keep_the_updates_in_float32(unet, inputs):
    weights = random_weights(unet, SOME)
    unet.to(torch.bfloat16)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    place_adapter(unet, "a", weights)
    for name, module in adapter_modules(unet, "a").items():
        assert torch.equal(module.A, weights[name].A), name
    path = next(name for name, low in weights.items() if low.A.ndim == 4 and low.A.shape[-1] == 3)
    layer, x = unet.get_submodule(path), torch.randn(1, weights[path].A.shape[1], 8, 8).bfloat16()
    module = layer.adapters["a"]
    low = weights[path]
    update = (low.B[:, :, 0, 0] @ low.A.flatten(1)).view(layer.weight.shape)
    exact = torch.nn.functional.conv2d(x.float(), update, stride=layer.stride, padding=layer.padding)
    assert torch.allclose(module(x).float(), exact, rtol=2**-8, atol=1e-5)  # but for the rounding of the result
    assert module(x).dtype == torch.bfloat16
    merge_adapters(unet, {"a": 1.0})
    unmerge_adapters(unet)
    after = unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_text_encoder_takes_adapters_as_peft_does():
    config = TextConfig(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text, tokens = randomise(TextEncoder(config)).eval(), torch.tensor([[58, 5, 7, 59]])
    weights = random_weights(text, r"clip\.encoder\..*", alpha=2.0)
    assert len(weights) == 12
    reference = peft_reference(randomise(TextEncoder(config)), weights)
    with torch.no_grad():
        plain = text(tokens)
        place_adapter(text, "a", weights)
        assert torch.equal(text(tokens), plain)
        with adapters(text, {"a": 1.0}):
            switched = text(tokens)
            assert error(switched, reference(tokens)) < 1e-5
        merge_adapters(text, {"a": 1.0})
        assert error(text(tokens), switched) < 1e-5
        unmerge_adapters(text)
        remove_adapter(text, "a")
        assert torch.equal(text(tokens), plain)
    assert error(switched, plain) > 1e-2
    assert not any(isinstance(module, LoRALayer) for module in text.modules())


def test_a_placed_adapter_and_one_of_ours_share_layers_and_leave_apart(unet, inputs):
    plain, classes = unet(*inputs), {name: type(m) for name, m in unet.named_modules()}
    add_adapter(unet, "ours", "spatial", (2,), rank=4)
    place_adapter(unet, "theirs", random_weights(unet, SOME))
    assert sorted(adapter_names(unet)) == ["ours", "theirs"]
    remove_adapter(unet, "ours")
    with adapters(unet, {"theirs": 1.0}):
        assert error(unet(*inputs), plain) > 1e-2
    remove_adapter(unet, "theirs")
    assert {name: type(m) for name, m in unet.named_modules()} == classes
    assert torch.equal(unet(*inputs), plain)


def test_given_weights_are_copied_and_frozen(unet):
    weights = random_weights(unet, r"layers\.2\.spatial\.0\.proj_in")
    place_adapter(unet, "a", weights)
    (parameter, _), low = adapter_parameters(unet, "a"), weights["layers.2.spatial.0.proj_in"]
    before = parameter.clone()
    low.A.fill_(7)
    assert torch.equal(parameter, before)
    assert not any(p.requires_grad for p in adapter_parameters(unet, "a"))


def test_the_wrapped_layer_shares_its_weights_and_keeps_its_settings():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    network = nn.Sequential(conv)
    place_adapter(network, "a", random_weights(network, "0"))
    wrapped, x = network[0], torch.randn(1, 4, 9, 9)
    assert wrapped is not conv
    assert wrapped.weight is conv.weight
    assert torch.equal(wrapped(x), conv(x))
    remove_adapter(network, "a")
    assert type(network[0]) is nn.Conv2d
    assert vars(network[0]).keys() == vars(nn.Conv2d(4, 6, 3)).keys()


@pytest.mark.parametrize(
    ("path", "a", "b", "message"),
    [
        ("layers.2.spatial.0.proj_up", (2, 64), (64, 2), "no linear or convolutional layer"),
        ("layers.2.spatial.0.norm", (2, 64), (64, 2), "no linear or convolutional layer"),
        ("layers.2.spatial.0.proj_in", (2, 32), (64, 2), r"wants A and B of \(2, 64\)"),
        ("layers.2.spatial.0.proj_in", (2, 64), (64, 3), r"\(64, 2\), not"),
        ("layers.2.resnets.0.conv1", (2, 64), (64, 2), r"\(2, 64, 3, 3\)"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_placed(unet, path, a, b, message):
    fitting = random_weights(unet, r"layers\.2\.spatial\.0\.proj_out")
    with pytest.raises(UserError, match=message):
        place_adapter(unet, "a", {**fitting, path: LowRank(torch.ones(a), torch.ones(b), 1.0)})
    assert not any(isinstance(module, LoRALayer) for module in unet.modules())


def test_an_adapter_without_one_rank_is_neither_copied_nor_saved(unet, tmp_path):
    place_adapter(unet, "a", random_weights(unet, SOME))
    for use in (
        lambda: copy_adapter(unet, "a", "b"),
        lambda: save_lora(tmp_path / "a.safetensors", unet, {"a": ("", "")}),
    ):
        with pytest.raises(UserError, match="another tool's file"):
            use()
    assert adapter_names(unet) == ["a"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["train", "training", "pop", "a.b", ""])
def test_names_that_pytorch_cannot_hold_are_refused(unet, name):
    with pytest.raises(UserError, match="name"):
        place_adapter(unet, name, random_weights(unet, r"layers\.2\.spatial\.0\.proj_in"))
    with pytest.raises(UserError, match="name"):
        add_adapter(unet, name, "spatial", (2,))
