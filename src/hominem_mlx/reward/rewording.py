"""The same reply in slightly other dress: edits that leave its meaning alone, made by code from a seed.

Spacing, case, formatting and slips of the finger fit any alphabet that has them; fillers and contractions are English.
"""

import re
from collections.abc import Callable
from random import Random

FILLERS = ("Well, ", "So, ", "Okay, ", "Hm, ", "Right, ")
SHORT = {
    "I am": "I'm", "you are": "you're", "we are": "we're", "they are": "they're", "I have": "I've",
    "you have": "you've",
    "do not": "don't", "does not": "doesn't", "did not": "didn't", "is not": "isn't", "are not": "aren't",
    "cannot": "can't", "could not": "couldn't", "would not": "wouldn't", "should not": "shouldn't",
    "have not": "haven't", "has not": "hasn't", "was not": "wasn't", "will not": "won't",
}  # fmt: skip
LONG = {short: long for long, short in SHORT.items()}  # none of them has a second reading, as "it's" has
WORD = re.compile(r"[^\W\d_]{5,}")
SPACE = re.compile(r"(?<=\S) (?=\S)")
SENTENCE = re.compile(r"(?<=[.!?]) +")


def _typo(text: str, draw: Random) -> str:
    """Two neighbouring letters inside one longer word change places."""
    places = [
        place
        for word in WORD.finditer(text)
        for place in range(word.start() + 1, word.end() - 2)
        if text[place] != text[place + 1]
    ]
    if not places:
        return text
    at = draw.choice(places)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def _case(text: str, draw: Random) -> str:
    """All in small letters, or in one reply of four the first word in capitals."""
    if draw.random() < 0.75:
        return text.lower()
    first, space, rest = text.partition(" ")
    return first.upper() + space + rest


def _filler(text: str, draw: Random) -> str:
    """A word that says nothing, in front."""
    return draw.choice(FILLERS) + text


def _spacing(text: str, draw: Random) -> str:
    """Some spaces doubled, and the last full stop left out."""
    there = [match.start() for match in SPACE.finditer(text)]
    doubled = set(draw.sample(there, min(len(there), 1 + len(there) // 10)))
    text = "".join(sign + " " * (place in doubled) for place, sign in enumerate(text))
    return text[:-1] if text.endswith(".") and not text.endswith("..") else text


def _formatting(text: str, draw: Random) -> str:
    """A longer word in bold, or sentences as the points of a list."""
    sentences, words = SENTENCE.split(text), list(WORD.finditer(text))
    if len(sentences) > 1 and (not words or draw.random() < 0.5):
        return "\n".join(f"- {sentence}" for sentence in sentences)
    if not words:
        return text
    word = draw.choice(words)
    return f"{text[: word.start()]}**{word[0]}**{text[word.end() :]}"


def _contraction(text: str, draw: Random) -> str:
    """ "do not" for "don't" wherever it stands, or the other way round."""
    for table in draw.sample([SHORT, LONG], 2):
        edited = text
        for found, instead in table.items():
            edited = re.sub(rf"\b{found}\b", instead, edited)
        if edited != text:
            return edited
    return text


EDITS: dict[str, Callable[[str, Random], str]] = {
    "typo": _typo,
    "case": _case,
    "filler": _filler,
    "spacing": _spacing,
    "formatting": _formatting,
    "contraction": _contraction,
}


def reword(text: str, number: int, *, seed: int = 0) -> tuple[str, str] | None:
    """A reply in other dress.

    Args:
        text: the reply.
        number: which edit: kinds take turns, and one that would change nothing leaves its turn to the next.
        seed: of what the edit draws; equal arguments give equal edits.

    Returns: the kind and the reply as it is then, never equal to `text`; None where no kind changes it.
    """
    kinds = list(EDITS)
    for offset in range(len(kinds)):
        kind = kinds[(number + offset) % len(kinds)]
        edited = EDITS[kind](text, Random(f"{seed}/{number}/{kind}/{text}"))
        if edited != text and edited.strip():
            return kind, edited
    return None
