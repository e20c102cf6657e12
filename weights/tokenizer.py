"""CLIP's tokenizer from a folder, checked against the network whose tokens it counts; prompts with learned tokens."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import CLIPTokenizer

from model.errors import UserError
from weights.download import CLIP_L14

VOCABULARY = ("vocab.json", "merges.txt")
FILES = (*VOCABULARY, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
WHERE_VOCABULARY_GOES = (
    f"Get it with `customttt download tokenizer`; or put {' and '.join(VOCABULARY)} of "
    f"https://huggingface.co/{CLIP_L14} into one folder, and name it with --tokenizer FOLDER (the folder tokenizer/ of "
    "a diffusers base is found without)."
)


def read_tokenizer(folder: Path, known: int, whose: str, remedy: str) -> CLIPTokenizer:
    """The tokenizer in a folder (vocab.json and merges.txt, or tokenizer.json).

    Args:
        folder: where it is.
        known: tokens that the network knows.
        whose: the network, for messages ("the text encoder of tiny").
        remedy: what to do where there is no tokenizer, as a sentence.

    Raises:
        UserError: none is there, it is damaged, or it counts beyond what the network knows.
    """
    if not (folder / "tokenizer.json").is_file() and not all((folder / name).is_file() for name in VOCABULARY):
        raise UserError(f"{folder} holds no tokenizer. {remedy}")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        highest = max(tokenizer.get_vocab().values())
    except Exception as error:  # whatever damage does to json and to tokenizers, which raises bare Exception
        raise UserError(f"the tokenizer in {folder} is damaged ({error}): get its files again") from error
    if highest >= known:
        raise UserError(
            f"the tokenizer of {folder} counts up to {highest}, and {whose} knows {known} tokens: they do not belong "
            "together"
        )
    return tokenizer


def tokenizer_on_hub() -> Path:
    """The folder of CLIP's vocabulary in the hub's cache, fetched if it is not there yet.

    transformers would not do: with no network, it answers with an empty tokenizer and no error.

    Raises:
        UserError: it is not in the cache, and the hub does not answer.
    """
    for offline in (True, False):
        try:
            found = [hf_hub_download(CLIP_L14, name, local_files_only=offline) for name in VOCABULARY]
            return Path(found[0]).parent
        except (OSError, HfHubHTTPError) as error:
            reason = error
    raise UserError(
        "this base comes without a tokenizer, and CLIP's is neither in the hub's cache nor to be had from the hub. "
        + WHERE_VOCABULARY_GOES
    ) from reason


def tokenize(tokenizer: CLIPTokenizer, prompt: str, learned: Mapping[str, Sequence[int]]) -> list[tuple[int, int]]:
    """The tokens of a prompt, start and end left out: the number of each, and where in the prompt it begins.

    Learned tokens are cut out first, the longest where two would fit, and the tokenizer gets what lies between: it
    would find those of its own in the middle of other words.

    Args:
        tokenizer: CLIP's.
        prompt: in Unicode's composed form (NFC), as the tokenizer makes it.
        learned: the numbers that each learned token stands for.
    """
    longest = sorted(learned, key=len, reverse=True)
    either = "|".join(f"({_pattern(token)})" for token in longest) or "(?!)"
    found, begin = [], 0
    for match in re.finditer(either, prompt, re.IGNORECASE):
        found += _plain(tokenizer, prompt, begin, match.start())
        found += [(number, match.start()) for number in learned[longest[(match.lastindex or 0) - 1]]]
        begin = match.end()
    return found + _plain(tokenizer, prompt, begin, len(prompt))


def contains(prompt: str, token: str) -> bool:
    """Whether a learned token stands in a prompt: as a word of its own, in capitals or not."""
    return re.search(_pattern(token), composed(prompt), re.IGNORECASE) is not None


def without(prompt: str, token: str) -> str:
    """The prompt without a learned token, wherever it stands in it, and with single spaces."""
    return " ".join(re.sub(_pattern(token), "", composed(prompt), flags=re.IGNORECASE).split())


def unlearned(tokenizer: CLIPTokenizer, prompt: str, learned: Iterable[str]) -> list[str]:
    """The words in angle brackets, as people write learned tokens, that neither CLIP nor `learned` knows."""
    for token in learned:
        prompt = without(prompt, token)
    found = dict.fromkeys(re.findall(r"<[^<>]+>", prompt))
    return [word for word in found if len(tokenizer(word, add_special_tokens=False)["input_ids"]) > 1]


def composed(text: str) -> str:
    """The text as CLIP's tokenizer makes it before it looks: one way to write a letter with an accent (NFC)."""
    return unicodedata.normalize("NFC", text)


def _pattern(token: str) -> str:
    """An end that is a letter or a digit must end the word too: "cat" is not in "category", but is in "cat's"."""
    token = composed(token)
    before = r"(?<!\w)" if re.match(r"\w", token) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", token) else ""
    return before + r"\s+".join(map(re.escape, token.split())) + after


def _plain(tokenizer: CLIPTokenizer, prompt: str, begin: int, end: int) -> list[tuple[int, int]]:
    cut = tokenizer(prompt[begin:end], add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    return [(n, begin + start) for n, (start, _) in zip(cut["input_ids"], cut["offset_mapping"], strict=True)]
