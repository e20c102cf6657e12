"""What a prompt names of the rendered world, and what a clip shows that it should not."""

import re
from collections.abc import Mapping, Sequence

from train.vocabulary import SPARE_WORDS
from train.world import BACKGROUNDS, COLOURS, WORLD_MOTIONS, WORLD_SHAPES, WORLD_TEXTURES

CLASSES: dict[str, Sequence[str]] = {
    "shape": WORLD_SHAPES,
    "colour": tuple(COLOURS),
    "texture": WORLD_TEXTURES,
    "background": tuple(BACKGROUNDS),
    "motion": WORLD_MOTIONS,
}
SUBJECTS = ("shape", "colour", "texture")  # what makes a subject's looks
LEAKING = (*SUBJECTS, "background")


def named(prompt: str) -> dict[str, int]:
    """What of the rendered world a prompt names: by attribute, the number of its class as the judge counts.

    Attributes are shape, colour, texture, background and motion; what is not named is left out. Of two words for one
    attribute the first counts. Only whole words do, in any case: "starry" is no star.
    """
    words = split(prompt)
    found = {}
    for attribute, names in CLASSES.items():
        places = {number: _place(split(name), words) for number, name in enumerate(names)}
        seen = {number: place for number, place in places.items() if place is not None}
        if seen:
            found[attribute] = min(seen, key=seen.__getitem__)
    return found


def spare_subject(prompt: str) -> bool:
    """Whether a spare word names the subject: one before "is" ("a zor is dax over the road", not "a star is dax")."""
    words = split(prompt)
    return any(word in SPARE_WORDS for word in words[: words.index("is") if "is" in words else len(words)])


def leaks(
    prompt: str, clip: Mapping[str, int], reference: Mapping[str, int], photos: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Whether what only the reference clip should show has come into a clip made to share its motion alone.

    Our own measure, of the rendered world. An attribute can leak where the clip should show something else than the
    reference does:

    * the prompt names a class of it ("... over the road"), and the reference shows another;
    * a spare word names the subject ("a zor"): it is none of the reference's, so shape, colour and texture of that can
      leak, unless the photos' subject has the same class: then both look alike, and nothing can be told.

    Chance is not 0: a clip that shows any class but the one asked for has it from the reference one time in 3 to 8.

    Args:
        prompt: of the clip.
        clip: the classes that the clip shows, of shape, colour, texture and background; what it does not show is left
            out.
        reference: those of the reference clip, all four.
        photos: those of the photos' subject.

    Returns:
        By attribute, 1 where the clip shows the reference's class and 0 where not; attributes that cannot leak are
        left out.
    """
    asked, spare = named(prompt), spare_subject(prompt)
    found = {}
    for attribute in LEAKING:
        theirs = reference[attribute]
        if attribute in asked:
            wanted = asked[attribute]
        elif spare and attribute in SUBJECTS:
            wanted = -1 if photos is None else photos.get(attribute, -1)
        else:
            continue
        if wanted != theirs:
            found[attribute] = float(clip.get(attribute) == theirs)
    return found


def split(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[a-z]+", text.lower())


def _place(phrase: list[str], words: list[str]) -> int | None:
    """Where the phrase begins among the words."""
    return next((i for i in range(len(words)) if words[i : i + len(phrase)] == phrase), None)
