"""The tiny base's vocabulary: the world's words, some spare ones, and letters for all others, in CLIP's format."""

from itertools import pairwise
from pathlib import Path

from train.world import BACKGROUNDS, COLOURS, WORLD_MOTIONS, WORLD_SHAPES, WORLD_TEXTURES
from weights import atomic_write, write_json

# For subjects and motions that have no word: a LoRA gives them their meaning.
SPARE_WORDS = ("zor", "vek", "lum", "dax", "fep", "wug", "blick", "toma")
OTHER_WORDS = ("a", "an", "is", "over", "the", "and", "of", "in", "on", "with", "photo", "video")

START, END = "<|startoftext|>", "<|endoftext|>"


def words() -> list[str]:
    """Every word that is one token, in the order of their tokens."""
    named = [*WORLD_TEXTURES, *COLOURS, *WORLD_SHAPES, *BACKGROUNDS, *" ".join(WORLD_MOTIONS).split()]
    return list(dict.fromkeys([*OTHER_WORDS, *named, *SPARE_WORDS]))


def byte_letters() -> list[str]:
    """The 256 printable letters that stand for bytes in the vocabularies of GPT-2 and CLIP.

    Printable bytes stand for themselves, the others are counted from the code point 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def merges() -> list[tuple[str, str]]:
    """Pairs to join, most urgent first, such that each of `words()` ends as one token.

    A word is first cut by the pairs so far; what is left of it is joined from the left by new ones, which come behind
    all others and so change nothing for the words before.
    """
    pairs: list[tuple[str, str]] = []
    for word in words():
        pieces = cut(word, pairs)
        while len(pieces) > 1:
            pairs.append((pieces[0], pieces[1]))
            pieces = cut(word, pairs)
    return pairs


def cut(word: str, pairs: list[tuple[str, str]]) -> list[str]:
    """A word's tokens by byte-pair encoding: the most urgent pair is joined until there is none."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    rank = {pair: i for i, pair in enumerate(pairs)}
    while True:
        found = [pair for pair in pairwise(pieces) if pair in rank]
        if not found:
            return pieces
        best = min(found, key=rank.__getitem__)
        joined: list[str] = []
        for piece in pieces:
            if joined and (joined[-1], piece) == best:
                joined[-1] += piece
            else:
                joined.append(piece)
        pieces = joined


def write_tokenizer(folder: Path, length: int) -> int:
    """Write `vocab.json`, `merges.txt` and the configs of a CLIPTokenizer; return the size of the vocabulary.

    Args:
        folder: made if missing.
        length: tokens of the longest prompt, start and end included.
    """
    letters, pairs = byte_letters(), merges()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in pairs), START, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    write_json(folder / "vocab.json", vocabulary)
    with atomic_write(folder / "merges.txt") as temporary:
        temporary.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs), encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", config | special)
    return len(vocabulary)
