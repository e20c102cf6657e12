"""On a CUDA device: the stages in half precision, resumed, and no more memory than the method needs. `pytest -m gpu`"""

import pytest
import torch

from lora import adapters, add_adapter, remove_adapter
from sampling import encode, write_media
from sampling.generate import GenerateSettings, generate_files
from train.appearance import AppearanceSettings, train_appearance
from train.losses import motion_loss
from train.motion import MotionSettings, train_motion
from train.stage import predict
from train.ttt import TTTSettings, train_ttt
from weights import load_base

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_stage_runs_and_resumes(files, tmp_path, dtype):
    base = load_base(files.folder, files.adapter, device="cuda", dtype=dtype)
    sizes = {"num_frames": 4, "height": 64, "width": 64, "steps": 4, "save_every": 1}
    write_media(tmp_path / "photos" / "a.png", torch.rand(1, 3, 64, 64) * 2 - 1)
    write_media(tmp_path / "clip.mp4", torch.rand(4, 3, 64, 64) * 2 - 1, fps=8)
    looks = AppearanceSettings(images=str(tmp_path / "photos"), prompt="a", out=str(tmp_path / "looks"), **sizes)
    moves = MotionSettings(video=str(tmp_path / "clip.mp4"), prompt="b", out=str(tmp_path / "moves"), **sizes)
    train_appearance(looks, base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.stage.previewer", lambda *_: interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_motion(MotionSettings(**{**vars(moves), "preview_every": 2}), base)
    train_motion(moves, base)
    both = TTTSettings(appearance=looks.out, motion=moves.out, prompt="a b", out=str(tmp_path / "both"), **sizes)
    train_ttt(both, base)
    clip = GenerateSettings(prompt=["a b"], out=str(tmp_path / "out.mp4"), lora=[both.out], num_frames=4, steps=3)
    assert generate_files(clip, base) == [tmp_path / "out.mp4"]


def interrupt(done):
    raise KeyboardInterrupt


def test_a_step_of_test_time_training_peaks_at_115_percent_of_a_motion_step(files, tmp_path):
    base = load_base(files.folder, files.adapter, device="cuda", dtype=torch.bfloat16)
    latents, text = torch.randn(1, 4, 16, 32, 32, device="cuda"), encode(base, ["a"])

    def peak(*names):
        torch.cuda.reset_peak_memory_stats()
        with adapters(base.unet, dict.fromkeys(names, 1.0)):
            pair = predict(base.unet, base.schedule, latents, text, torch.Generator())
            motion_loss(*pair, torch.Generator()).backward()
        return torch.cuda.max_memory_allocated()

    add_adapter(base.unet, "motion", "temporal", (2, 5), dropout=0.1)
    alone = peak("motion")
    add_adapter(base.unet, "appearance", "spatial", (2, 6), dropout=0.1)
    assert peak("motion", "appearance") <= 1.15 * alone
    for name in ("motion", "appearance"):
        remove_adapter(base.unet, name)
