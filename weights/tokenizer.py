"""CLIP's tokenizer from a folder, checked against the network whose tokens it counts."""

from pathlib import Path

from transformers import CLIPTokenizer

from model.errors import UserError

VOCABULARY = ("vocab.json", "merges.txt")


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
