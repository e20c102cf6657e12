"""Pickles from strangers: what loads, what is refused, and that nothing in them ever runs."""

import os
import pickle
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from model.errors import UserError
from weights.files import read_checkpoint, read_header

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4, dtype=torch.float16)}


def write_as(kind, path, content):
    torch.save(content, path, _use_new_zipfile_serialization=kind == "torch zip")
    return path


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.fixture
def lightning(monkeypatch):
    """Classes that pickle as pytorch_lightning's; their modules are gone again when the file is read."""
    made = {}
    for module, name, base in (
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint", object),
        ("pytorch_lightning.utilities.parsing", "AttributeDict", dict),
    ):
        made[name] = type(name, (base,), {"__module__": module, "__qualname__": name})
        for depth in range(1, 4):
            parent = ".".join(module.split(".")[:depth])
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        setattr(sys.modules[module], name, made[name])
    return made


def forget_lightning():
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        del sys.modules[name]


@pytest.mark.parametrize("kind", ["torch zip", "torch pickle"])
def test_a_lightning_callback_is_dropped_without_importing_its_module(tmp_path, kind, lightning):
    callback = lightning["ModelCheckpoint"]()
    callback.best = {"score": np.float64(0.5), "run": print.__name__}
    extras = {
        "callbacks": {lightning["ModelCheckpoint"]: {"state": callback}},
        "hyper_parameters": lightning["AttributeDict"](rate=0.1),
    }
    path = write_as(kind, tmp_path / "sd.ckpt", {"state_dict": TENSORS, "global_step": 7, **extras})
    forget_lightning()
    assert same(read_checkpoint(path), TENSORS)
    assert read_header(path).metadata == {"global_step": "7"}
    assert not [name for name in sys.modules if name.startswith("pytorch_lightning")]


class Hostile:
    """Pickles as a call of `function`, with a state to give to the result."""

    def __init__(self, function, arguments, state=None):
        self.recipe = function, arguments, state

    def __reduce__(self):
        return self.recipe


@pytest.mark.parametrize("kind", ["torch zip", "torch pickle"])
def test_a_name_let_through_runs_nothing_even_if_its_module_is_there(tmp_path, kind, monkeypatch):
    """A function of an installed lightning, called, and an object of it, given a state: neither is reached."""
    ran = []
    module = types.ModuleType("lightning.evil")
    for name in ("call", "restore"):
        setattr(module, name, lambda *arguments: ran.append(arguments))
        getattr(module, name).__module__, getattr(module, name).__qualname__ = "lightning.evil", name
    monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.evil", module)
    content = {**TENSORS, "x": Hostile(module.call, ("touch",)), "y": Hostile(module.restore, (), {"state": 1})}
    path = write_as(kind, tmp_path / "x.ckpt", content)
    assert same(read_checkpoint(path), TENSORS)
    assert not ran


@pytest.mark.parametrize("kind", ["torch zip", "torch pickle", "plain pickle"])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (eval, "builtins.eval"),
        (os.system, "posix.system"),
        (subprocess.Popen, r"\w+.Popen"),
        (getattr, "builtins.getattr"),
    ],
)
def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path, kind, function, name):
    canary = tmp_path / "canary"
    text = f"open({str(canary)!r}, 'w')" if function is eval else f"touch {canary}"
    content = {**TENSORS, "x": Hostile(function, (canary, text) if function is getattr else (text,))}
    path = tmp_path / "x.ckpt"
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(content["x"], protocol=2))
    else:
        write_as(kind, path, content)
    for read in (read_checkpoint, read_header):
        with pytest.raises(UserError, match=f"wants to run code: it names {name}"):
            read(path)
    assert not canary.exists()


def test_the_allow_list_is_given_back_after_each_file(tmp_path, lightning):
    path = write_as("torch zip", tmp_path / "x.ckpt", {"state_dict": TENSORS, "c": lightning["ModelCheckpoint"]()})
    forget_lightning()
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint(path)
    assert set(torch.serialization.get_safe_globals()) == before


def test_an_a1111_embedding_keeps_its_vectors(tmp_path):
    vectors = torch.randn(2, 768)
    for table in ({"*": vectors}, torch.nn.ParameterDict({"*": vectors})):
        path = write_as(
            "torch zip", tmp_path / "x.pt", {"string_to_token": {"*": 265}, "string_to_param": table, "name": "w"}
        )
        assert same(read_checkpoint(path), {"string_to_param.*": vectors})
        assert read_header(path).metadata == {"name": "w"}


def test_a_list_of_nameless_tensors_is_refused_with_its_length(tmp_path):
    path = write_as("torch zip", tmp_path / "lora.pt", [torch.ones(4, 3), torch.ones(3, 4)])
    with pytest.raises(UserError, match="list of 2 tensors without names"):
        read_checkpoint(path)
    assert list(read_header(path).tensors) == ["[0]", "[1]"]


def test_a_pickle_without_tensors_or_holding_itself_is_refused(tmp_path):
    circle: dict = {}
    circle["state_dict"] = circle
    for content in ({"a": 1}, 5, "text", None, circle):
        path = write_as("torch zip", tmp_path / "x.pt", content)
        for read in (read_checkpoint, read_header):
            with pytest.raises(UserError, match="no named tensors"):
                read(path)


def test_a_zip_that_torch_did_not_write_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("photo.jpg", b"...")
    with pytest.raises(UserError, match="not one that torch wrote"):
        read_checkpoint(tmp_path / "x.ckpt")
