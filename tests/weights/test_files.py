"""Files from strangers: what is read, what is refused, and that nothing half-written is ever left."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from model.errors import UserError
from weights.files import atomic_write, read_checkpoint, read_header, read_json, sha256, write_json

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4, dtype=torch.float16)}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"old")

    def interrupted():
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"half of the ne")
            raise failure

    with pytest.raises(failure):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["lora.safetensors"]
    assert path.read_bytes() == b"old"


def test_a_write_appears_only_when_it_is_whole_and_keeps_the_name(tmp_path):
    path = tmp_path / "new" / "folder" / "clip.mp4"
    with atomic_write(path) as temporary:
        assert temporary.name == path.name
        assert temporary.is_relative_to(path.parent)  # a rename must not cross file systems
        temporary.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert len(list(path.parent.iterdir())) == 1


def test_a_write_survives_only_after_it_was_flushed(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    write_json(tmp_path / "a.json", {})
    assert order[:2] == ["fsync", "replace"]


def test_a_write_the_system_refuses_is_the_users_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below.json", tmp_path / "folder"):
        with pytest.raises(UserError, match=r"below\.json could not be written|is a folder"):
            write_json(path, {})


def test_json_comes_back_and_bad_json_is_named(tmp_path):
    value = {"prompt": "ein Bär", "layers": [2, 6], "rate": 1e-5}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    for name in ("bad.json", "deep.json", "missing.json"):
        with pytest.raises(UserError, match=name):
            read_json(tmp_path / name)


def test_sha256_is_that_of_the_system_tool(tmp_path):
    (tmp_path / "x").write_bytes(os.urandom(3_000_000))
    expected = subprocess.run(["sha256sum", tmp_path / "x"], capture_output=True, text=True, check=True).stdout.split()[
        0
    ]
    assert sha256(tmp_path / "x") == expected


def write_as(kind, path, content):
    if kind == "safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch zip")
    return path


@pytest.mark.parametrize("kind", ["safetensors", "torch zip", "torch pickle"])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".bin", ""])
def test_the_container_is_told_by_content_not_by_name(tmp_path, kind, suffix):
    path = write_as(kind, tmp_path / f"model{suffix}", TENSORS)
    assert same(read_checkpoint(path), TENSORS)
    header = read_header(path)
    assert header.container == kind
    assert {name: (info.shape, info.dtype, info.size) for name, info in header.tensors.items()} == {
        "a.weight": ((2, 3), "float32", 6),
        "b.bias": ((4,), "float16", 4),
    }


@pytest.mark.parametrize("kind", ["torch zip", "torch pickle"])
@pytest.mark.parametrize("wrap", [lambda t: {"state_dict": t}, lambda t: {"controlnet": {"state_dict": t}, "epoch": 3}])
def test_wrappers_and_module_prefixes_come_off(tmp_path, kind, wrap):
    wrapped = wrap({f"module.{name}": tensor for name, tensor in TENSORS.items()})
    assert same(read_checkpoint(write_as(kind, tmp_path / "x.ckpt", wrapped)), TENSORS)


def test_what_is_no_tensor_is_dropped_and_small_entries_are_metadata(tmp_path):
    path = write_as(
        "torch zip", tmp_path / "x.ckpt", {**TENSORS, "global_step": 840, "animatediff_config": {"x": None}}
    )
    assert same(read_checkpoint(path), TENSORS)
    assert read_header(path).metadata == {"global_step": "840"}


def test_the_metadata_of_safetensors_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", {"prompt": "a bear"})
    assert read_header(tmp_path / "x.safetensors").metadata == {"prompt": "a bear"}


def test_a_tensor_present_with_and_without_module_is_refused(tmp_path):
    save_file({"a": torch.ones(1), "module.a": torch.zeros(1)}, tmp_path / "x")
    with pytest.raises(UserError, match="twice"):
        read_checkpoint(tmp_path / "x")


def test_trained_parameters_come_without_gradients(tmp_path):
    path = write_as("torch zip", tmp_path / "x.pt", {"a": torch.nn.Parameter(torch.ones(2))})
    tensor = read_checkpoint(path)["a"]
    assert not tensor.requires_grad
    assert tensor.is_leaf


def test_a_header_costs_no_memory_for_the_tensors(tmp_path):
    """100 MB of tensors; the reading process's peak may grow by a tenth of that."""
    big = {"x": torch.zeros(25_000_000)}
    paths = [write_as(kind, tmp_path / kind, big) for kind in ("safetensors", "torch zip")]
    code = (
        "import resource, sys; from weights.files import read_header\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "for path in sys.argv[1:]: assert read_header(path).tensors['x'].shape == (25_000_000,)\n"
        "print(peak() - before)"
    )
    grown = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 10_000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:6ce0161689b3853acaa0\nsize 4265146304\n",
            r"git-LFS pointer.*4265146304 bytes.*sha256:6ce0161689b3853acaa0.*git lfs pull",
        ),
        (b"\xef\xbb\xbf\n <!DOCTYPE html><html><body>Sign in</body>", "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(100), "not a model file"),
        (b"\x80", "damaged"),
        (b"\x80\x02" + bytes(50), "damaged"),
        (b"\x80\x04\x95" + bytes(50), "damaged"),
        (b"PK\x03\x04" + bytes(50), "cut short"),
        (b"PK\x03\x04" + bytes(50) + b"PK\x05\x06" + bytes(18), "torch"),
        ((10).to_bytes(8, "little") + b'{"a": {}}  ', "header makes no sense"),
        ((9).to_bytes(8, "little") + b'{"a": []}', "header makes no sense"),
        ((1000).to_bytes(8, "little") + b'{"a": ', "14 bytes are there, and its header claims 1,008"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content, words):
    (tmp_path / "model.ckpt").write_bytes(content)
    for read in (read_checkpoint, read_header):
        with pytest.raises(UserError, match=f"(?s)model.ckpt.*{words}"):
            read(tmp_path / "model.ckpt")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.ckpt does not exist"):
        read_checkpoint(tmp_path / "nothing.ckpt")
    with pytest.raises(UserError, match="is a folder"):
        read_checkpoint(tmp_path)


def test_a_truncated_safetensors_says_how_much_is_missing(tmp_path):
    path = write_as("safetensors", tmp_path / "x", TENSORS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    for read in (read_checkpoint, read_header):
        with pytest.raises(UserError, match=f"{len(whole) - 5} bytes are there, and its header claims {len(whole)}"):
            read(path)


@pytest.mark.parametrize("kind", ["safetensors", "torch zip", "torch pickle"])
def test_a_file_cut_anywhere_gives_the_programs_own_error(tmp_path, kind):
    whole = write_as(kind, tmp_path / "x", TENSORS).read_bytes()
    for length in range(0, len(whole) - 1, max(1, len(whole) // 60)):
        (tmp_path / "cut").write_bytes(whole[:length])
        for read in (read_checkpoint, read_header):
            with pytest.raises(UserError):
                read(tmp_path / "cut")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]},
        7,
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, entry):
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    for read in (read_checkpoint, read_header):
        with pytest.raises(UserError, match="damaged"):
            read(tmp_path / "x")
