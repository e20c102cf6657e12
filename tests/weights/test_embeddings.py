"""Textual-inversion files against diffusers, which reads and uses the same ones; words, refusals, no trace left."""

import copy
import re

import pytest
import torch
from diffusers import AnimateDiffPipeline
from oracles import error
from safetensors.torch import load_file, save_file
from torch import nn

import weights.load
from model import UserError
from weights import Embedding, learned_tokens, load_base, read_embedding, read_embeddings, save_embedding, split_token
from weights.inspect import describe

WIDTH = 128  # of the narrow base's text encoder


def a1111(vectors, name="cat", table=dict, key="*"):
    return {
        "string_to_token": {key: torch.tensor(265)},
        "string_to_param": table({key: nn.Parameter(vectors)}),
        "name": name,
        "step": 5000,
        "sd_checkpoint": "fe4efff1e1",
        "sd_checkpoint_name": "sd-v1-4",
    }


def written(path, content):
    (save_file if path.suffix == ".safetensors" else torch.save)(content, path)
    return path


@pytest.fixture(scope="module")
def tiny():
    return load_base("tiny", device="cpu")


@pytest.fixture(scope="module")
def base(files):
    return load_base(files.folder, device="cpu")


@pytest.fixture(scope="module")
def theirs():
    """diffusers on the tiny base, whose tokenizer counts as many tokens as its table has rows: diffusers wants that."""
    return AnimateDiffPipeline.from_pretrained(weights.load.TINY, torch_dtype=torch.float32)


@pytest.fixture
def pipeline(theirs, monkeypatch):
    for part in ("text_encoder", "tokenizer"):
        monkeypatch.setattr(theirs, part, copy.deepcopy(getattr(theirs, part)))
    return theirs


@pytest.mark.filterwarnings("ignore:nothing was learned")
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("form", ["learned_embeds.bin", "learned_embeds.safetensors", "cat.pt"])
def test_prompts_are_embedded_as_in_diffusers(tiny, pipeline, tmp_path, form, n):
    vectors = torch.randn(n, tiny.text.config.hidden_size)
    content = a1111(vectors, "<zor>") if form == "cat.pt" else {"<zor>": vectors if n > 1 else vectors[0]}
    path = written(tmp_path / form, content)
    pipeline.load_textual_inversion(str(tmp_path), weight_name=form)
    prompts = ["a <zor> is circling over the sand", "<zor>, a star on <zor>", "a red star"]
    expected, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    plain = tiny.embed(prompts)
    with learned_tokens(tiny, [read_embedding(path)]):
        ours = tiny.embed(prompts)
    assert error(ours, expected) < 1e-5
    assert error(ours[:2], plain[:2]) > 1e-2
    assert torch.equal(ours[2], plain[2])


def test_two_tokens_at_once_are_as_in_diffusers(tiny, pipeline, tmp_path):
    cats, dogs = torch.randn(2, tiny.text.config.hidden_size), torch.randn(1, tiny.text.config.hidden_size)
    pipeline.load_textual_inversion([{"<a>": cats}, {"<b>": dogs}], token=["<a>", "<b>"])
    expected, _ = pipeline.encode_prompt(["<b> over <a> over <b>"], "cpu", 1, False)
    with learned_tokens(tiny, [Embedding("<a>", cats)]), learned_tokens(tiny, [Embedding("<b>", dogs)]):
        assert error(tiny.embed(["<b> over <a> over <b>"]), expected) < 1e-5


def test_what_we_save_diffusers_reads(pipeline, tmp_path):
    vectors = torch.randn(2, pipeline.text_encoder.config.hidden_size)
    save_embedding(tmp_path / "learned_embeds.safetensors", Embedding("<my zor.1>", vectors), {"steps": "5"})
    assert load_file(tmp_path / "learned_embeds.safetensors").keys() == {"<my zor.1>"}
    pipeline.load_textual_inversion(str(tmp_path))
    number = pipeline.tokenizer.convert_tokens_to_ids("<my zor.1>")
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[number : number + 2], vectors)
    again = read_embedding(tmp_path / "learned_embeds.safetensors")
    assert again.token == "<my zor.1>"
    assert torch.equal(again.vectors, vectors)


@pytest.mark.parametrize("token", ["*", "emb_params", "tensor", "a.weight", "module.x", "[0]", "__metadata__"])
def test_a_token_that_files_cannot_say_is_not_saved(tmp_path, token):
    with pytest.raises(UserError, match=r"(not|could not be) written"):
        save_embedding(tmp_path / "e.safetensors", Embedding(token, torch.ones(1, 768)))
    assert list(tmp_path.iterdir()) == []


V = torch.arange(2.0 * WIDTH).reshape(2, WIDTH)
FORMS = {
    "A1111": ("file.pt", a1111(V), "cat"),
    "A1111, ParameterDict": ("file.pt", a1111(V, table=nn.ParameterDict), "cat"),
    "A1111, no name": ("file.pt", a1111(V, "*"), "file"),
    "early, its own placeholder": ("file.pt", {"string_to_param": nn.ParameterDict({"<x>": nn.Parameter(V)})}, "<x>"),
    "diffusers .bin": ("file.bin", {"<x>": V}, "<x>"),
    "diffusers, one parameter": ("file.bin", {"<x>": nn.Parameter(V[0])}, "<x>"),
    "diffusers .safetensors": ("file.safetensors", {"<x.y>": V.half()}, "<x.y>"),
    "diffusers, placeholder": ("my-file.safetensors", {"*": V}, "my-file"),
    "emb_params": ("file.v2.safetensors", {"emb_params": V}, "file.v2"),
    "double precision": ("file.bin", {"<x>": V.double()}, "<x>"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(tmp_path, form):
    name, content, token = FORMS[form]
    found = read_embedding(written(tmp_path / name, content))
    assert found.token == token
    assert found.vectors.dtype == torch.float32
    assert torch.equal(found.vectors, V[: len(found.vectors)])
    assert len(found.vectors) == (1 if "one" in form else 2)
    assert not found.vectors.requires_grad
    assert read_embedding(tmp_path / name, "<mine>").token == "<mine>"


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_a_bare_tensor_needs_a_token(tmp_path, suffix):
    path = written(tmp_path / f"bare{suffix}", V)
    assert torch.equal(read_embedding(path, "<x>").vectors, V)
    with pytest.raises(UserError, match=rf"no token for them.*bare{suffix}:TOKEN"):
        read_embedding(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"<x>": torch.full((2, 768), float("nan"))}, "'<x>' hold numbers that are not finite"),
        ({"<x>": torch.full((768,), 1e300, dtype=torch.float64)}, "not finite"),
        ({"<x>": torch.zeros(1, 2, 768)}, r"\(n, width\), and are \(1, 2, 768\)"),
        ({"emb_params": torch.zeros(())}, r"and are \(\)"),
        ({"<x>": torch.zeros(0, 768)}, r"and are \(0, 768\)"),
        ({"<x>": torch.zeros(2, 768, dtype=torch.int64)}, "int64"),
        ({"<x>": torch.zeros(768), "<y>": torch.zeros(768)}, "2 entries .'<x>', '<y>'"),
        ({"string_to_param": {"*": torch.zeros(1, 768), "+": torch.zeros(1, 768)}}, "2 entries"),
        (a1111(torch.zeros(1, 768), " "), "token is empty"),
        ({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, "SDXL"),
        ({"<x>": torch.zeros(1, 1024)}, "Stable Diffusion 2, whose text is 1024 wide"),
        ({"<x>": torch.zeros(1, 1280)}, "SDXL"),
        (a1111(torch.zeros(1, 1024)), "Stable Diffusion 2"),
        ({"lora_unet_mid_block_x.lora_down.weight": torch.zeros(4, 8)}, "belongs in --lora.*embedding is wanted"),
        ({"a.weight": torch.zeros(4), "a.bias": torch.zeros(4)}, "fit nothing known here.*embedding is wanted"),
    ],
)
def test_a_wrong_file_is_refused_by_its_name(tmp_path, content, says):
    with pytest.raises(UserError, match=f"x.pt.*{says}"):
        read_embedding(written(tmp_path / "x.pt", content))


def test_a_file_that_is_not_there_and_an_empty_token_are_refused(tmp_path):
    path = written(tmp_path / "x.pt", {"<x>": V})
    for arguments, says in (((tmp_path / "y.pt",), "y.pt is no file"), ((path, " "), "token is empty")):
        with pytest.raises(UserError, match=says):
            read_embedding(*arguments)


def test_the_token_stands_behind_the_colon_after_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cat.pt", "C:cat.pt", "cat:<x>"):
        (tmp_path / name).touch()
    assert split_token("cat.pt") == ("cat.pt", None)
    assert split_token("cat.pt:<a:b>") == ("cat.pt", "<a:b>")
    assert split_token("cat.pt:") == ("cat.pt", "")
    assert split_token("C:cat.pt") == ("C:cat.pt", None)
    assert split_token("C:cat.pt:zor") == ("C:cat.pt", "zor")
    assert split_token("cat:<x>") == ("cat:<x>", None)
    assert split_token(r"D:\none.pt") == (r"D:\none.pt", None)


def test_the_same_token_twice_is_refused(base, tmp_path):
    one, two = written(tmp_path / "1.pt", {"<x>": V}), written(tmp_path / "2.pt", {"<X>": V})
    assert [its.token for its in read_embeddings([str(one), f"{two}:<y>"])] == ["<x>", "<y>"]
    with pytest.raises(UserError, match=r"1.pt and .*2.pt have the same token"):
        read_embeddings([str(one), str(two)])
    with pytest.raises(UserError, match="the same token"):
        read_embeddings([str(one), str(one)])
    with (
        pytest.raises(UserError, match="'<X>' is given twice"),
        learned_tokens(base, [Embedding("<x>", V)]),
        learned_tokens(base, [Embedding("<X>", V)]),
    ):
        pass


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (
            a1111(torch.zeros(3, 768)),
            ("textual inversion, sd15", r"token +cat", "3 of width 768", "2,304 .and constants: 1.", "--embedding"),
        ),
        ({"<x>": torch.zeros(768)}, ("textual inversion, sd15", r"token +<x>", "1 of width 768", "--embedding")),
        ({"emb_params": torch.zeros(2, 768)}, (r"token +file", "2 of width 768", "--embedding")),
        (torch.zeros(2, 768), (r"token +none in the file", "2 of width 768", "--embedding")),
        ({"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)}, ("2 of width 768, 2 of width 1280", "SDXL")),
    ],
)
def test_inspect_says_what_it_holds_and_where_it_belongs(tmp_path, content, lines):
    text = describe(written(tmp_path / "file.pt", content))
    assert [line for line in lines if not re.search(line, text)] == []
    assert ("belongs in --embedding" in text) == ("SDXL" not in text)
