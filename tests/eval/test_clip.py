"""CLIP scores against transformers' own CLIP on Pillow's images, against loops, and on the rendered world."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from eval.clip import clip_i, clip_t, load_clip, preprocess, temporal_consistency
from eval.clip_images import ImageNumbers, read_numbers
from model import UserError
from train.tiny_parts import single_frames
from train.world import caption, random_scenes, render
from weights.load import TINY

SIZES = [(64, 64), (256, 256), (180, 320), (320, 180), (37, 53), (225, 301), (224, 224), (240, 224), (5, 9)]
PROMPTS = ["a plain red star is moving left over the sand", "a blue circle", "a striped green heart over the sea"]


def frames_of(size, count=3, smooth=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    frames = torch.rand((count, 3, 6, 6) if smooth else (count, 3, *size), generator=generator) * 2.2 - 1.1
    return (F.interpolate(frames, size, mode="bilinear") if smooth else frames).clamp(-1, 1)


def pillows(frames):
    """What a lossless video file would hold of frames (n, 3, h, w) in [-1, 1]."""
    return [Image.fromarray(np.rint((f.permute(1, 2, 0).numpy() + 1) * 127.5).astype(np.uint8)) for f in frames]


@pytest.fixture
def clip_folder(tmp_path):
    """Makes a CLIP of random weights as the hub has them: (side of its images, processor's file) -> folder."""

    def make(side=32, processor="preprocessor_config.json"):
        folder = tmp_path / f"clip-{side}"
        shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        text = {**shared, "vocab_size": 709, "max_position_embeddings": 24, "bos_token_id": 707, "eos_token_id": 708}
        vision = {**shared, "image_size": side, "patch_size": 8 if side < 100 else 32}
        torch.manual_seed(side)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
        with torch.no_grad():  # random weights as they start see hardly any difference between pictures
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
        model.save_pretrained(folder)
        tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer", local_files_only=True)
        crop = {"height": side, "width": side}
        images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop)
        if processor == "processor_config.json":
            CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
        else:
            for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
                shutil.copy(TINY / "tokenizer" / name, folder)
        if processor == "preprocessor_config.json":
            images.save_pretrained(folder)
        reference = CLIPProcessor(image_processor=images, tokenizer=tokenizer)
        return folder, model, reference

    return make


def edited(path, **changes):
    table = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(table))


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_transformers_with_pillow(size, smooth):
    frames = frames_of(size, smooth=smooth)
    expected = CLIPImageProcessorPil()(images=pillows(frames), return_tensors="pt")["pixel_values"]
    found = preprocess(frames, ImageNumbers())
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)  # a grey level is 0.014


@pytest.mark.parametrize(
    "options",
    [
        {"size": {"height": 96, "width": 80}, "crop_size": {"height": 65, "width": 70}, "resample": 2},
        {"size": {"shortest_edge": 60}, "crop_size": 51, "image_mean": [0.5] * 3, "image_std": [0.2, 0.3, 0.4]},
        {"size": 48, "do_center_crop": False, "do_normalize": False},
        {"do_resize": False, "crop_size": {"height": 20, "width": 130}, "do_rescale": False, "image_mean": [9, 8, 7]},
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 64, "width": 50}, "rescale_factor": 0.1},
    ],
)
@pytest.mark.parametrize("size", [(70, 130), (88, 64)])
def test_every_number_of_a_processors_file_counts(tmp_path, options, size):
    frames = frames_of(size, smooth=True)
    theirs = CLIPImageProcessorPil(**options)
    theirs.save_pretrained(tmp_path)
    numbers = read_numbers(tmp_path, 224)
    expected = theirs(images=pillows(frames), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(preprocess(frames, numbers), expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(options))  # as old files have it, unfilled
    assert read_numbers(tmp_path, 224) == numbers


def test_a_folder_without_numbers_has_openais_at_the_models_size(tmp_path):
    assert read_numbers(tmp_path, 336) == ImageNumbers(resize=336, crop=(336, 336))


@pytest.mark.parametrize("change", [{"size": {"longest_edge": 224}}, {"resample": 1}, {"image_mean": 3}, {"size": "x"}])
def test_processors_that_are_not_understood_are_refused(tmp_path, change):
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    edited(tmp_path / "preprocessor_config.json", **change)
    with pytest.raises(UserError, match="image processor"):
        read_numbers(tmp_path, 224)


@pytest.mark.parametrize(
    ("side", "size", "processor"),
    [
        (32, (64, 90), "preprocessor_config.json"),
        (32, (50, 31), "processor_config.json"),
        (224, (64, 64), "preprocessor_config.json"),
        (32, (32, 33), "none"),
    ],
)
def test_features_are_those_of_transformers(clip_folder, side, size, processor):
    folder, model, reference = clip_folder(side, processor)
    frames, scorer = frames_of(size, 5, smooth=True), load_clip(folder)
    with torch.no_grad():
        theirs = model(**reference(text=PROMPTS, images=pillows(frames), padding=True, return_tensors="pt"))
    found = scorer.images(frames, batch_size=2)
    torch.testing.assert_close(found, theirs.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(scorer.texts(PROMPTS), theirs.text_embeds, atol=1e-5, rtol=0)
    logits = theirs.logits_per_image / model.logit_scale.exp()
    for i in range(3):
        assert clip_t(found, scorer.texts(PROMPTS)[i]) == pytest.approx(logits[:, i].mean().item(), abs=1e-5)
    assert theirs.image_embeds.std(dim=0).max() > 1e-3  # pictures differ, else nothing was compared
    assert scorer.name == f"clip-{side}"


def test_pickled_weights_are_read_without_running_them(clip_folder):
    folder, _, _ = clip_folder()
    expected = load_clip(folder).texts(PROMPTS)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    positions = {"text_model.embeddings.position_ids": torch.arange(24)[None]}  # as OpenAI's old files have it
    torch.save(
        {**{name: tensor.clone() for name, tensor in tensors.items()}, **positions}, folder / "pytorch_model.bin"
    )
    torch.testing.assert_close(load_clip(folder).texts(PROMPTS), expected)


def test_a_long_prompt_is_cut_with_a_warning():
    scorer, prompt = load_clip(), "a red circle " * 9
    with pytest.warns(UserWarning, match=r"tiny CLIP reads 22 tokens.*a red circle.*blind to 'red circle a red circle"):
        long = scorer.texts([prompt])
    whole = scorer.tokenizer(prompt, verbose=False)["input_ids"]
    tokens = torch.tensor([[*whole[:23], whole[-1]]])
    with torch.no_grad():
        expected = scorer.model.get_text_features(input_ids=tokens).pooler_output
    torch.testing.assert_close(long, F.normalize(expected), atol=1e-6, rtol=0)
    assert len(whole) == 9 * 3 + 2


def test_short_prompts_do_not_change_in_company(recwarn):
    scorer = load_clip()
    torch.testing.assert_close(scorer.texts(PROMPTS)[1:2], scorer.texts(PROMPTS[1:2]), atol=1e-6, rtol=0)
    assert not [w for w in recwarn if w.category is UserWarning]


def test_the_tiny_clip_sees_frames_as_they_are():
    frames, _ = render(single_frames(4, torch.Generator().manual_seed(0)))
    model = CLIPModel.from_pretrained(TINY / "clip", local_files_only=True).eval()
    scorer = load_clip()
    pixels = preprocess(frames[:, :, 0], scorer.numbers)
    assert (pixels - frames[:, :, 0]).abs().max() <= 1 / 255 + 1e-6  # of 8 bits
    with torch.no_grad():
        expected = F.normalize(model.get_image_features(pixel_values=frames[:, :, 0]).pooler_output)
    assert (scorer.images(frames[:, :, 0]) * expected).sum(dim=1).min() > 0.999
    assert load_clip(TINY / "clip").name == scorer.name == "tiny CLIP"


def test_clips_score_higher_with_their_own_caption():
    scenes = random_scenes(12, torch.Generator().manual_seed(3))
    scorer = load_clip()
    features = [scorer.images(video.transpose(0, 1)[::4]) for video in render(scenes)[0]]
    texts = scorer.texts([caption(scenes, i) for i in range(12)])
    scores = torch.tensor([[clip_t(clip, text) for text in texts] for clip in features])
    assert scores.diagonal().mean() > (scores.sum() - scores.trace()) / 132 + 0.1


def test_scores_are_loops():
    generator = torch.Generator().manual_seed(0)
    frames, photos = (F.normalize(torch.randn(n, 7, generator=generator), dim=1).double().numpy() for n in (5, 3))

    def cos(a, b):
        return float(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)))

    f, m = torch.from_numpy(frames), torch.from_numpy(photos)
    assert clip_t(f, m[0]) == pytest.approx(sum(cos(a, photos[0]) for a in frames) / 5)
    assert clip_t(f, m[0]) == pytest.approx(float(frames.mean(0) @ photos[0]))  # DreamVideo's way
    assert clip_i(f, m) == pytest.approx(sum(cos(a, b) for a in frames for b in photos) / 15)
    assert temporal_consistency(f) == pytest.approx(sum(cos(frames[i], frames[i + 1]) for i in range(4)) / 4)
    pairs = [cos(frames[i], frames[j]) for i in range(5) for j in range(5) if i != j]
    assert temporal_consistency(f, pairs="all") == pytest.approx(sum(pairs) / 20)
    assert temporal_consistency(f) != pytest.approx(temporal_consistency(f, "all"), abs=1e-3)


def test_scores_of_equal_and_of_unrelated_features():
    same, apart = torch.eye(4)[:1].expand(3, -1), torch.eye(4)
    assert temporal_consistency(same) == temporal_consistency(same, "all") == clip_i(same, same) == 1
    assert clip_t(same, same[0]) == 1
    assert clip_t(-same, same[0]) == -1
    assert temporal_consistency(apart) == temporal_consistency(apart, "all") == clip_i(apart[:2], apart[2:]) == 0
    back_and_forth = apart[[0, 1, 0, 1]]
    assert temporal_consistency(back_and_forth) == 0
    assert temporal_consistency(back_and_forth, "all") == pytest.approx(1 / 3)


def test_nothing_to_score_is_refused():
    one = torch.eye(4)[:1]
    for call in (lambda: clip_t(one[:0], one[0]), lambda: clip_i(one, one[:0]), lambda: clip_i(one[:0], one)):
        with pytest.raises(UserError, match="nothing to score"):
            call()
    for few in (one, one[:0]):
        with pytest.raises(UserError, match="none to compare"):
            temporal_consistency(few)
    with pytest.raises(UserError, match="'consecutive' or 'all'"):
        temporal_consistency(torch.eye(4), pairs="some")


def test_frames_that_cannot_be_scored():
    scorer = load_clip()
    for frames in (torch.zeros(0, 3, 64, 64), torch.zeros(2, 1, 64, 64), torch.zeros(2, 3, 64, 64, dtype=torch.uint8)):
        with pytest.raises(UserError, match="n at least 1"):
            scorer.images(frames)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(UserError, match="not finite"):
            scorer.images(torch.full((1, 3, 64, 64), bad))
    with pytest.raises(UserError, match="no prompts"):
        scorer.texts([])


def test_a_processor_of_another_clip_is_found_out(clip_folder):
    folder, _, _ = clip_folder()
    edited(folder / "preprocessor_config.json", crop_size={"height": 40, "width": 40})
    with pytest.raises(UserError, match="sees images of 32x32 pixels, and its image processor makes 40x40"):
        load_clip(folder).images(frames_of((64, 64)))


def test_folders_that_hold_no_clip(clip_folder, tmp_path):
    for folder in (tmp_path / "nothing", tmp_path, TINY / "text_encoder"):
        with pytest.raises(UserError, match=r"holds no CLIP.*customttt download clip-b32.*--clip"):
            load_clip(folder)


def test_a_clip_without_its_tokenizer(clip_folder):
    folder, _, _ = clip_folder()
    (folder / "vocab.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_clip(folder)
    (folder / "vocab.json").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer.*customttt download"):
        load_clip(folder)


@pytest.mark.parametrize("fault", ["missing", "not finite", "of another shape"])
def test_weights_that_are_not_whole_are_refused(clip_folder, fault):
    folder, _, _ = clip_folder()
    tensors = load_file(folder / "model.safetensors")
    if fault == "missing":
        del tensors["visual_projection.weight"]
    else:
        tensors["visual_projection.weight"] = torch.full((16, 32) if fault == "not finite" else (2, 2), torch.nan)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="damaged" if fault == "not finite" else "config.json and weights disagree"):
        load_clip(folder)


def test_a_clip_from_the_hubs_cache_is_called_by_its_repository(clip_folder, tmp_path):
    folder, _, _ = clip_folder()
    cached = tmp_path / "models--openai--clip-vit-base-patch32" / "snapshots" / "3d74acf9"
    shutil.copytree(folder, cached)
    assert load_clip(cached).name == "openai/clip-vit-base-patch32"
