"""`customttt download` against a stand-in of the hub, with narrow random bases as its files."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import bases
import hub as stand_in
import pytest
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import disable_progress_bars

import weights.hub
from customttt import COMMANDS
from model import UserError
from sampling.generate import GenerateSettings, generate_files
from weights import load_base
from weights.download import ANIMATEDIFF, CLIP_L14, ITEMS, SD15, main

V3 = "v3_sd15_mm.ckpt"
UNET = "unet/diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Random files under the names of the real repositories: the fp16 variant of a base, beside things of no use."""
    root = tmp_path_factory.mktemp("repositories")
    base = bases.write_base(root / "sd15", dtype=torch.float16, variant="fp16")
    (base / "v1-5-pruned.ckpt").write_bytes(b"7.7 GB that nobody needs")
    (base / "safety_checker").mkdir()
    (base / "safety_checker" / "model.safetensors").write_bytes(b"1.2 GB")
    (root / "animatediff").mkdir()
    bases.write_motion_module(root / "animatediff" / V3)
    return {SD15: base, ANIMATEDIFF: root / "animatediff", CLIP_L14: base / "tokenizer"}


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    """A running stand-in that has them, and an empty cache."""
    disable_progress_bars()
    with stand_in.serve() as served:
        for repo, folder in folders.items():
            served.add(repo, folder)
        point_to(monkeypatch, served.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield served


def point_to(monkeypatch, url):
    """What HF_ENDPOINT sets before huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def offline(monkeypatch):
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def blob(content: bytes) -> Path:
    [path] = Path(constants.HF_HUB_CACHE).glob(f"models--*/blobs/{hashlib.sha256(content).hexdigest()}")
    return path


def test_what_was_downloaded_loads_by_its_name_and_generates(hub, folders, capsys, tmp_path, offline):
    main(["sd15", "v3"])
    assert f"--base {SD15}\n" in capsys.readouterr().out
    assert sorted(name for name, _ in hub.asked) == sorted(
        [file.format(variant=".fp16") for file in ITEMS["sd15"].files] + [V3]
    )
    offline()
    base = load_base(SD15, f"{ANIMATEDIFF}/{V3}", device="cpu")
    assert base.name == SD15
    assert base.fingerprints == load_base(folders[SD15], folders[ANIMATEDIFF] / V3, device="cpu").fingerprints
    small = {"num_frames": 2, "height": 32, "width": 32, "steps": 1}
    [clip] = generate_files(GenerateSettings(prompt=["a cat"], seed=[0], out=str(tmp_path / "cat.mp4"), **small), base)
    assert Path(clip).stat().st_size > 0


def test_what_is_there_is_not_fetched_again_and_the_hub_is_not_even_asked(hub, capsys, offline):
    main(["v3"])
    first = capsys.readouterr().out
    assert hub.asked == [(V3, 0)]
    hub.status = 500
    main(["v3"])
    offline()
    main(["v3"])
    assert capsys.readouterr().out == first * 2
    assert hub.asked == [(V3, 0)]


def test_a_damaged_file_in_the_cache_is_found_and_fetched_again(hub, folders, capsys, offline, monkeypatch):
    content = (folders[ANIMATEDIFF] / V3).read_bytes()
    main(["v3"])
    blob(content).write_bytes(content[:-1])
    with monkeypatch.context() as without:
        without.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match=rf"HF_HUB_OFFLINE is set.*{V3}"):
            main(["v3"])
    main(["v3"])
    assert f"{V3} of {ANIMATEDIFF} is damaged in the cache" in capsys.readouterr().err
    assert blob(content).read_bytes() == content
    assert hub.asked == [(V3, 0)] * 2


def test_small_files_are_checked_too(hub, folders):
    main(["tokenizer"])
    content = (folders[CLIP_L14] / "merges.txt").read_bytes()
    [path] = Path(constants.HF_HUB_CACHE).glob(f"models--*/blobs/{stand_in.git_hash(content)}")
    path.write_bytes(content + b"x")
    main(["tokenizer"])
    assert path.read_bytes() == content


def test_the_hash_of_small_files_is_gits(tmp_path):
    (tmp_path / "file").write_bytes(b"hello\n")
    assert weights.hub.matches(tmp_path / "file", "ce013625030ba8dba906f756967f9e9ca394464a")  # git hash-object file


def test_a_download_that_broke_goes_on_where_it_stopped(hub, folders, monkeypatch):
    content = (folders[ANIMATEDIFF] / V3).read_bytes()
    hub.breaks[V3] = half = len(content) // 2
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # of 10 MB, which is more than a narrow file has
    with pytest.raises(UserError, match="The same command goes on where this one stopped"):
        main(["v3"])
    [partial] = Path(constants.HF_HUB_CACHE).glob("models--*/blobs/*.incomplete")
    kept = partial.stat().st_size
    assert 0 < kept <= half
    main(["v3"])
    assert hub.asked == [(V3, 0), (V3, kept)]
    assert blob(content).read_bytes() == content
    assert not partial.exists()


def test_ctrl_c_says_that_the_same_command_goes_on(hub, folders, tmp_path):
    content = (folders[ANIMATEDIFF] / V3).read_bytes()
    hub.breaks[V3], hub.hangs = len(content) // 2, True
    command = [sys.executable, "-m", "weights.download", "v3"]
    changes = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HUB_OFFLINE": "0"}
    running = subprocess.Popen(
        command,
        env={**os.environ, **changes},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells let background jobs ignore it
    )
    while not hub.asked and running.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 130
    assert said.rstrip().endswith("interrupted: the same command goes on where this one stopped")
    assert "Traceback" not in said
    hub.hangs = False
    main(["v3"])
    assert blob(content).read_bytes() == content


def test_part_of_another_content_is_not_kept(hub, folders):
    content = (folders[ANIMATEDIFF] / V3).read_bytes()
    partial = Path(constants.HF_HUB_CACHE, "models--guoyww--animatediff/blobs", stand_in.stated(V3, content))
    partial = partial.with_name(partial.name + ".incomplete")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(content + b"more")
    main(["v3"])
    assert hub.asked == [(V3, 0)]
    assert blob(content).read_bytes() == content


def test_wrong_bytes_are_refused_and_deleted(hub, folders):
    hub.spoiled.add(V3)
    with pytest.raises(UserError, match=rf"what came for {V3} of {ANIMATEDIFF} is not what the hub states.*deleted"):
        main(["v3"])
    left = [path for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_file() and path.stat().st_size > 1000]
    assert left == []
    hub.spoiled.clear()
    main(["v3"])
    assert hub.asked == [(V3, 0)] * 2


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (401, "RepoNotFound", "shows no repository guoyww/animatediff: it was renamed or removed, or is private"),
        (401, "GatedRepo", "is not open to everyone: accept its terms there, then log in with `hf auth login`"),
        (403, "", "is not open to everyone"),
        (404, "EntryNotFound", rf"has no {V3} at revision 'main': it was renamed or removed"),
        (404, "RevisionNotFound", "has no revision 'main'"),
        (503, "", "answers 503 .*: try later"),
        (429, "", "answers 429 .*: try later"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub, status, code, says):
    hub.status, hub.code = status, code
    with pytest.raises(UserError, match=says):
        main(["v3"])
    assert hub.asked == []


def test_a_page_that_is_no_hubs_is_told(hub):
    hub.headers = False
    with pytest.raises(UserError, match=r"not as the hub does.*proxy.*HF_ENDPOINT"):
        main(["v3"])


def test_without_a_connection_the_address_is_told(hub, monkeypatch):
    point_to(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"connection to http://127\.0\.0\.1:9 failed.*HTTPS_PROXY.*HF_ENDPOINT"):
        main(["v3"])


def test_room_on_the_disk_is_looked_at_first(hub, folders, monkeypatch):
    needed = sum((folders[SD15] / file.format(variant=".fp16")).stat().st_size for file in ITEMS["sd15"].files)
    needed += (folders[ANIMATEDIFF] / V3).stat().st_size + weights.hub.RESERVE
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(needed - 1))
    with pytest.raises(UserError, match=r"GB free, and 0\.\d\d GB are to be fetched: make room, or set HF_HOME"):
        main(["sd15", "v3"])
    assert hub.asked == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(needed))
    main(["sd15", "v3"])


def test_another_variant_takes_the_other_files(hub):
    with pytest.raises(UserError, match=r"has no unet/diffusion_pytorch_model\.safetensors at revision 'main'"):
        main(["sd15", "--variant", "fp32"])


def test_a_revision_gives_paths_which_load(hub, capsys, offline):
    main(["v3", "--revision", stand_in.COMMIT])
    flag, path = capsys.readouterr().out.split()[-2:]
    assert flag == "--motion_module"
    assert stand_in.COMMIT in path
    assert Path(path).is_file()
    with pytest.raises(UserError, match="no revision 'v9'"):
        main(["v3", "--revision", "v9"])
    with pytest.raises(UserError, match="one repository"):
        main(["v3", "sd15", "--revision", stand_in.COMMIT])


def test_the_folder_for_the_tokenizer_is_named_and_found_without(hub, folders, capsys, tmp_path, offline):
    main(["tokenizer"])
    flag, path = capsys.readouterr().out.split()[-2:]
    assert flag == "--tokenizer"
    offline()
    one_file = bases.write_base(tmp_path, layout="ldm")
    found, named = load_base(one_file), load_base(one_file, tokenizer=path)
    assert torch.equal(found.embed(["a teddy bear"]), named.embed(["a teddy bear"]))


def test_a_repository_that_somebody_fetched_in_part_loads(hub, offline):
    needed = [file.format(variant=".fp16") for file in ITEMS["sd15"].files]
    snapshot_download(SD15, allow_patterns=needed)
    offline()
    assert load_base(SD15).name == SD15


def test_what_is_not_in_the_cache_is_told_with_its_command(hub, offline):
    offline()
    with pytest.raises(UserError, match="customttt download sd15"):
        load_base(SD15)
    with pytest.raises(UserError, match="customttt download v3"):
        load_base("tiny", f"{ANIMATEDIFF}/{V3}")
    with pytest.raises(UserError, match=r"hf download somebody/else model\.ckpt"):
        load_base("somebody/else/model.ckpt")


def test_without_names_it_lists_everything_and_unknown_names_are_told(capsys):
    main([])
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed and item.repo in listed and item.flag in listed for name, item in ITEMS.items())
    with pytest.raises(UserError, match="nothing called 'sd51' to download: did you mean sd15"):
        main(["v3", "sd51"])
    assert COMMANDS["download"][0] == main.__module__
