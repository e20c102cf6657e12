"""Devices and precisions."""

import pytest
import torch

from model import UserError
from weights.device import choose_device, default_dtype, placed


def test_the_cpu_is_there_and_float32():
    assert choose_device("cpu") == torch.device("cpu")
    assert default_dtype(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("name", ["banana", "meta", "mps", "cuda:77"])
def test_devices_that_are_not_there_are_named_in_one_line(name):
    with pytest.raises(UserError, match=f"no device '{name}' here") as caught:
        choose_device(name)
    assert "\n" not in str(caught.value)


def test_a_placed_module_comes_back_even_after_an_error():
    module = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError), placed(module, torch.device("meta")):  # noqa: PT012
        assert module.weight.device.type == "meta"
        module.to_empty(device="cpu")
        raise RuntimeError
    assert module.weight.device.type == "cpu"
