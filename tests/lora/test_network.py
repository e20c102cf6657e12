"""Adapters on the UNet against peft, closed forms, and the papers' counts."""

from dataclasses import replace

import peft
import pytest
import torch
from oracles import error, randomise

from lora import (
    LoRALinear,
    adapter_linears,
    adapter_modules,
    adapter_names,
    adapter_parameters,
    adapter_spec,
    adapters,
    add_adapter,
    copy_adapter,
    merge_adapters,
    remove_adapter,
    switch_adapters,
    unmerge_adapters,
)
from model import SD15, SD15_V2, SD15_V3, UNet3D, UserError


def filled(unet, name, seed=1):
    """Give an adapter weights that change the output: B is zero at the start."""
    generator = torch.Generator().manual_seed(seed)
    for p in adapter_parameters(unet, name):
        p.data = 0.3 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize(
    ("placements", "expected"),
    [
        ([("spatial", (2, 6), "blocks")], 5_980_160),
        ([("temporal", (2, 5), "blocks")], 6_144_000),
        ([("spatial", (2, 6), "blocks"), ("temporal", (2, 5), "blocks")], 12_124_160),
        ([("temporal", None, "attention")], 9_011_200),
        ([("spatial", None, "blocks"), ("temporal", None, "blocks")], 28_864_512),
        ([("spatial", None, "all"), ("temporal", None, "blocks")], 30_461_952),
        ([("spatial", None, "all"), ("temporal", None, "all")], 32_714_752),
    ],
)
def test_rank_32_has_the_papers_parameters(placements, expected):
    with torch.device("meta"):
        unet = UNet3D(SD15_V3)
        for i, (kind, layers, targets) in enumerate(placements):
            add_adapter(unet, f"a{i}", kind, layers, rank=32, targets=targets)
    assert sum(p.numel() for name in adapter_names(unet) for p in adapter_parameters(unet, name)) == expected


def test_rank_4_motion_attention_has_customize_a_videos_parameters():
    with torch.device("meta"):
        unet = UNet3D(SD15_V3)
        add_adapter(unet, "a", "temporal", rank=4, targets="attention")
    assert sum(p.numel() for p in adapter_parameters(unet, "a")) == 1_126_400


@pytest.mark.parametrize("kind", ["spatial", "temporal"])
@pytest.mark.parametrize("targets", ["blocks", "attention", "all"])
def test_fresh_adapters_change_nothing_bit_for_bit(unet, inputs, kind, targets):
    before = unet(*inputs)
    add_adapter(unet, "a", kind, targets=targets, rank=4)
    with adapters(unet, {"a": 1.0}):
        assert torch.equal(unet(*inputs), before)


@pytest.mark.parametrize(("kind", "layers"), [("spatial", (2, 6)), ("temporal", (2, 5))])
def test_the_network_with_an_adapter_equals_peft(unet, inputs, kind, layers):
    spec = add_adapter(unet, "a", kind, layers, rank=4, alpha=2)
    filled(unet, "a")
    plain = randomise(UNet3D(unet.config)).eval()
    names = list(adapter_linears(unet, spec))
    reference = peft.get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=2, target_modules=names))
    state = {}
    for path, module in adapter_modules(unet, "a").items():
        state[f"base_model.model.{path}.lora_A.weight"] = module.A.data
        state[f"base_model.model.{path}.lora_B.weight"] = module.B.data
    result = peft.set_peft_model_state_dict(reference, state)
    assert not result.unexpected_keys
    with torch.no_grad(), adapters(unet, {"a": 1.0}):
        assert error(unet(*inputs), reference(*inputs)) < 1e-5


def test_two_adapters_at_two_scales_add_up_in_a_layer(unet):
    for name in ("a", "b"):
        add_adapter(unet, name, "spatial", [2], rank=3, alpha=6)
        filled(unet, name, seed=ord(name))
    path, layer = next((p, m) for p, m in unet.named_modules() if isinstance(m, LoRALinear))
    x = torch.randn(7, layer.in_features)
    weight = layer.weight + sum(
        scale * 6 / 3 * layer.adapters[name].B @ layer.adapters[name].A for name, scale in (("a", 0.5), ("b", -2.0))
    )
    with adapters(unet, {"a": 0.5, "b": -2.0}):
        expected = torch.nn.functional.linear(x, weight, layer.bias)
        assert error(layer(x), expected) < 1e-5, path


def test_merging_equals_switching_on_and_unmerging_restores_bit_for_bit(unet, inputs):
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    plain = unet(*inputs)
    add_adapter(unet, "look", "spatial", (2, 6), rank=4)
    add_adapter(unet, "move", "temporal", (2, 5), rank=4)
    filled(unet, "look"), filled(unet, "move")
    scales = {"look": 0.7, "move": -0.4}
    with torch.no_grad():
        with adapters(unet, scales):
            switched = unet(*inputs)
        merge_adapters(unet, scales)
        assert error(unet(*inputs), switched) < 1e-5
        assert error(switched, plain) > 1e-2
        with pytest.raises(UserError, match="unmerge"):
            merge_adapters(unet, scales)
        unmerge_adapters(unet)
        assert torch.equal(unet(*inputs), plain)
    after = unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_merging_in_half_precision_restores_bit_for_bit(unet):
    unet.to(torch.bfloat16)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    add_adapter(unet, "a", "spatial", rank=4)
    filled(unet, "a")
    merge_adapters(unet, {"a": 1.0})
    unmerge_adapters(unet)
    after = unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_adapter_weights_stay_float32_when_the_base_is_cast(unet, inputs):
    add_adapter(unet, "a", "temporal", (2, 5), rank=4)
    filled(unet, "a")
    exact = [p.clone() for p in adapter_parameters(unet, "a")]
    unet.to(torch.bfloat16)
    assert unet.dtype == torch.bfloat16
    for p, expected in zip(adapter_parameters(unet, "a"), exact, strict=True):
        assert p.dtype == torch.float32
        assert torch.equal(p, expected)
    latents, timesteps, text = inputs
    with adapters(unet, {"a": 1.0}):
        assert unet(latents.bfloat16(), timesteps, text.bfloat16()).dtype == torch.bfloat16


def leaves(node, seen):
    """Ids of the tensors that the backward pass from `node` accumulates gradients into."""
    if node is None or node in seen:
        return set()
    seen.add(node)
    own = {id(node.variable)} if hasattr(node, "variable") else set()
    return own.union(*(leaves(following, seen) for following, _ in node.next_functions))


def test_only_the_adapter_gets_gradient_and_no_frozen_weight_gradient_is_computed(unet, inputs):
    add_adapter(unet, "a", "temporal", (2, 5), rank=4)
    filled(unet, "a")
    own = {id(p) for p in adapter_parameters(unet, "a")}
    with adapters(unet, {"a": 1.0}):
        loss = unet(*inputs).square().mean()
    assert leaves(loss.grad_fn, set()) == own
    loss.backward()
    for name, p in unet.named_parameters():
        assert (p.grad is not None) == (id(p) in own), name


def test_dropout_acts_on_the_input_while_training_only(unet, inputs):
    add_adapter(unet, "a", "spatial", (2, 6), rank=4, dropout=0.5)
    filled(unet, "a")
    with torch.no_grad(), adapters(unet, {"a": 1.0}):
        still = unet(*inputs)
        assert torch.equal(unet(*inputs), still)
        unet.train()
        assert error(unet(*inputs), still) > 1e-3
    module = next(iter(adapter_modules(unet, "a").values()))
    x = torch.ones(4000, module.A.shape[1])
    dropped = module(x).mean(0)
    assert torch.allclose(dropped, module.B @ module.A.sum(1), rtol=0.2, atol=0.3)


def test_switching_restores_what_was_on_before_even_after_an_error(unet, inputs):
    add_adapter(unet, "a", "spatial", (2, 6), rank=4)
    filled(unet, "a")
    plain = unet(*inputs)
    switch_adapters(unet, {"a": 0.5})
    half = unet(*inputs)
    with pytest.raises(RuntimeError), adapters(unet, {"a": 0.0}):  # noqa: PT012
        assert torch.equal(unet(*inputs), plain)
        raise RuntimeError
    assert torch.equal(unet(*inputs), half)


def test_a_removed_adapter_leaves_no_trace(unet, inputs):
    plain, modules = unet(*inputs), {name: type(m) for name, m in unet.named_modules()}
    add_adapter(unet, "a", "spatial", rank=4)
    add_adapter(unet, "b", "spatial", (6,), rank=4)
    remove_adapter(unet, "a")
    assert adapter_names(unet) == ["b"]
    remove_adapter(unet, "b")
    assert {name: type(m) for name, m in unet.named_modules()} == modules
    assert torch.equal(unet(*inputs), plain)


def test_base_weights_load_after_an_adapter_is_in_place(unet):
    weights = randomise(UNet3D(unet.config), seed=5).state_dict()
    add_adapter(unet, "a", "spatial", rank=4)
    missing, unexpected = unet.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(".adapters.a." in name for name in missing)
    assert torch.equal(unet.state_dict()["conv_in.weight"], weights["conv_in.weight"])


def test_a_copy_starts_equal_and_then_moves_alone(unet):
    add_adapter(unet, "a", "temporal", (2, 5), rank=4, alpha=8)
    filled(unet, "a")
    copy_adapter(unet, "a", "b", dropout=0.1)
    assert adapter_spec(unet, "b") == adapter_spec(unet, "a")
    pairs = list(zip(adapter_parameters(unet, "a"), adapter_parameters(unet, "b"), strict=True))
    assert all(torch.equal(p, q) and p.data_ptr() != q.data_ptr() for p, q in pairs)


def test_a_starts_normal_with_one_over_rank_and_b_at_zero(unet):
    add_adapter(unet, "a", "spatial", rank=16, generator=torch.Generator().manual_seed(3))
    modules = adapter_modules(unet, "a").values()
    values = torch.cat([m.A.flatten() for m in modules])
    assert values.std().item() == pytest.approx(1 / 16, rel=0.05)
    assert values.mean().abs() < 0.01
    assert all(not m.B.any() for m in modules)


def test_layers_that_do_not_fit_are_named(unet):
    with pytest.raises(UserError, match=r"layer 3, 5 has no spatial transformer: choose among layers 0, 1, 2, 4"):
        add_adapter(unet, "a", "spatial", [2, 3, 5])
    with pytest.raises(UserError, match="layer 4 has no motion module"):
        add_adapter(unet, "a", "temporal", [4])
    with pytest.raises(UserError, match="layer 9"):
        add_adapter(unet, "a", "temporal", [9])
    with pytest.raises(UserError, match="motion_module"):
        add_adapter(UNet3D(replace(SD15, block_out_channels=(32, 32, 32, 32))), "a", "temporal")
    v2 = UNet3D(replace(SD15_V2, block_out_channels=(32, 32, 32, 32)))
    assert add_adapter(v2, "a", "temporal").layers == tuple(range(9))


def test_bad_names_and_numbers_are_refused(unet):
    add_adapter(unet, "a", "spatial", [2], rank=4)
    with pytest.raises(UserError, match="already"):
        add_adapter(unet, "a", "temporal", [2])
    with pytest.raises(UserError, match="dot"):
        add_adapter(unet, "a.b", "temporal", [2])
    with pytest.raises(UserError, match="rank"):
        add_adapter(unet, "b", "temporal", [2], rank=0)
    with pytest.raises(UserError, match="targets"):
        add_adapter(unet, "b", "temporal", [2], targets="qkv")
    with pytest.raises(UserError, match="kind"):
        add_adapter(unet, "b", "text", [2])
    with pytest.raises(UserError, match="no adapter 'z'"):
        switch_adapters(unet, {"z": 1.0})
