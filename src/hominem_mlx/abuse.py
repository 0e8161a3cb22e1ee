"""Texts that speak to whoever reads them instead of to a person: injections aimed at a judge, and jailbreaks.

Wordings (`wordings.py`) and no model: cheap enough for every row and every score, the same on every machine, and each
finding says why. They know wordings, not intent: what is worded unlike anything there passes, so a judge is told as
well that what it reads is never an instruction (`data/questions.py`). All is looked for in a folded copy of the text
(full-width letters, capitals and invisible signs), so that spelling alone hides nothing.
"""

import base64
import binascii
import bisect
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from hominem_mlx import wordings as w

OVERRIDE = "tells the reader to set its instructions aside"
RATING = "tells a judge what to find"
ADDRESS = "speaks to a judge"
CLAIM = "claims a verdict"
TURN = "has marks of a chat template or a made-up turn"
ANSWER = "imitates a judge's answer"
ENCODED = "holds encoded or disguised text"
JAILBREAK = "asks for a model without its limits"
SOON = 400  # characters after "System:" within which it must say what a system says
ROUNDS = 4  # what is left may come together as another attack; what does so again and again is no reply
NOTHING_LEFT = "(nothing else)"  # shown to a judge in place of a reply that was an injection and no more


class Span(NamedTuple):
    """Characters `start` to `end` of a text, and why they are no part of an honest one."""

    start: int
    end: int
    reason: str


def is_adversarial(text: str) -> tuple[str, ...]:
    """Why a prompt or a reply counts as an attack: each reason once, in the order of the text. Empty: it does not."""
    return tuple(dict.fromkeys(span.reason for span in injections(text)))


def without_injections(text: str) -> str:
    """The text without what `injections` finds, which is all that a judge should see of it.

    Where nothing remains, `NOTHING_LEFT`; a text without findings comes back as it is.
    """
    for _ in range(ROUNDS):
        spans = _joined(injections(text))
        if not spans:
            return text
        text = _without(text, spans)
    return NOTHING_LEFT


def _without(text: str, spans: Sequence[Span]) -> str:
    kept, gap = "", ""
    ends = [0, *(span.end for span in spans)]
    starts = [*(span.start for span in spans), len(text)]
    for end, start in zip(ends, starts):
        piece = text[end:start]
        if not piece.strip():
            continue
        kept += (gap or " ") + piece.lstrip() if kept else piece.lstrip() if end else piece
        gap = kept[len(kept.rstrip()) :]  # what parted the sentences parts them again
        kept = kept.rstrip() if start < len(text) else kept
    return kept or NOTHING_LEFT


def injections(text: str) -> list[Span]:
    """All findings, in order of their start; they may overlap.

    Of a made-up turn all between its first and its last mark, of wordings and numbers the sentences that hold them.
    """
    plain, place = _plain(text)
    folded = plain.lower() if plain.isascii() else "".join(map(_small, plain))
    found = _joined(sorted(_turns(folded)))
    for span in found:  # what a made-up turn says is no sentence of the text
        folded = folded[: span.start] + "\n" * (span.end - span.start) + folded[span.end :]
    found += [*_encoded(plain), *_answers(folded)]
    sentences = [part.span() for part in w.SENTENCE.finditer(folded)]
    faults = {bounds: reason for bounds in sentences if (reason := _fault(folded[slice(*bounds)]))}
    found += [Span(*bounds, reason) for bounds, reason in faults.items()]
    if found:  # where one sentence is an attack, less is needed to make others part of it
        covered = bytearray(len(folded))
        for span in found:
            covered[span.start : span.end] = b"\1" * (span.end - span.start)
        others = [bounds for bounds in sentences if covered.find(0, *bounds) >= 0]
        found += [Span(*bounds, RATING) for bounds in others if _goes_on(folded[slice(*bounds)])]
    whole = [_in_sentences(span, sentences) for span in found]
    return sorted(Span(place[span.start], place[span.end - 1] + 1, span.reason) for span in whole)


# --- letters and spans ----------------------------------------------------------------------------------------------


def _plain(text: str) -> tuple[str, range | list[int]]:
    """The text in ordinary letters without invisible signs, and where each of its characters comes from."""
    if text.isascii():
        return text, range(len(text))
    letters, place = [], []
    for index, sign in enumerate(text):
        if unicodedata.category(sign) == "Cf" and not "\U000e0000" <= sign <= "\U000e007f":
            continue
        for letter in unicodedata.normalize("NFKC", sign):
            letters.append(letter)
            place.append(index)
    return "".join(letters), place


def _small(letter: str) -> str:
    """In lower case where that is one letter too: places must stay."""
    return small if len(small := letter.lower()) == 1 else letter


def _in_sentences(span: Span, sentences: Sequence[tuple[int, int]]) -> Span:
    """The span with the whole of the sentences that it touches."""
    if span.reason == TURN:  # begins in the middle of a sentence that may be honest
        return span
    first = bisect.bisect_right(sentences, span.start, key=lambda bounds: bounds[1])
    past = bisect.bisect_left(sentences, span.end, key=lambda bounds: bounds[0])
    touched = sentences[first:past]
    if not touched:
        return span
    return Span(min(span.start, touched[0][0]), max(span.end, touched[-1][1]), span.reason)


def _joined(spans: Iterable[Span]) -> list[Span]:
    """Sorted spans, those that overlap as one."""
    joined: list[Span] = []
    for span in spans:
        if joined and span.start <= joined[-1].end:
            span = Span(joined[-1].start, max(joined[-1].end, span.end), joined.pop().reason)
        joined.append(span)
    return joined


# --- sentences ------------------------------------------------------------------------------------------------------


def _fault(sentence: str) -> str:
    """Why one sentence by itself is an attack; empty when it is not.

    "Give it the best mark" needs company to be one: a judge, this reply or all dimensions named beside it, or the order
    at its start.
    """
    if not any(stem in sentence for stem in w.STEMS):
        return ""
    for wording, reason in (
        (w.SETS_ASIDE, OVERRIDE),
        (w.LIMITLESS, JAILBREAK),
        (w.ADDRESSES, ADDRESS),
        (w.CLAIMS, CLAIM),
        (w.CHOICE, RATING),
    ):
        if wording.search(sentence):
            return reason
    about = w.SELF.search(sentence)
    if about and w.VERIFIED.search(sentence):
        return CLAIM
    judge, top = w.JUDGE.search(sentence), w.TOP.search(sentence)
    if judge and (top or (w.GRADER.search(sentence) and (w.ORDER.search(sentence) or w.FOLLOWS.search(sentence)))):
        return RATING
    if top or judge or about:
        wide = w.EVERYWHERE.search(sentence)
        if (wide or (about and (top or judge))) and w.ORDER.search(sentence):
            return RATING
    praised = w.EVERYWHERE.search(sentence) and w.PRAISE.search(sentence)
    return RATING if w.RATES.search(sentence) and (top or praised) else ""


def _goes_on(sentence: str) -> bool:
    """Whether a sentence beside an attack belongs to it."""
    if any(wording.search(sentence) for wording in (w.TOP, w.JUDGE, w.DIGIT, w.CHOICE)):
        return True
    named = w.SELF.search(sentence) or w.EVERYWHERE.search(sentence)
    return bool(named and (w.PRAISE.search(sentence) or w.ORDER.search(sentence)))


# --- shapes ---------------------------------------------------------------------------------------------------------


def _turns(text: str) -> Iterator[Span]:
    """Marks of templates with all between the first and the last, and lines that play the system or another speaker."""
    marks = list(w.MARK.finditer(text))
    if marks:
        start, end = marks[0].start(), marks[-1].end()
        if len(marks) == 1 or text[:start].strip():  # what follows the last mark is the made-up turn's, not the reply's
            end = _paragraph_end(text, end)
        yield Span(start, end, TURN)
    for line in w.ROLE.finditer(text):
        end = _paragraph_end(text, line.end())
        if w.COMMANDS.search(text, line.end(), min(end, line.end() + SOON)):
            yield Span(line.start(), end, TURN)
    for heading in w.HEADING.finditer(text):
        yield Span(heading.start(), _paragraph_end(text, heading.end()), TURN)
    if w.SPEAKER.match(text):
        return  # a conversation written out from its first turn on is what was said, not a turn made up
    for line in w.MADE_UP.finditer(text):
        yield Span(line.start(), _paragraph_end(text, line.end()), TURN)


def _paragraph_end(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    end = text.find("\n\n", start)
    return end if end >= 0 else len(text)


def _answers(text: str) -> Iterator[Span]:
    """Numbers under the names a judge answers with; of an object in braces all of it, with its fence."""
    if not any(sign in text for sign in (":", "=", "1.0")):
        return
    for found in w.SHAPE.finditer(text):
        start, end = found.span()
        opened, closed = text.rfind("{", 0, end), text.find("}", start)
        if opened >= 0 and "}" not in text[opened:start] and closed >= 0:
            start, end = min(start, opened), closed + 1
        fence, shut = w.FENCE.search(text, max(0, start - 20), start), w.FENCE_END.match(text, end)
        if fence and shut:
            start, end = fence.start(), shut.end()
        yield Span(start, end, ANSWER)


def _encoded(plain: str) -> Iterator[Span]:
    """Runs that read as words once decoded, invisible letters, and words of mixed alphabets."""
    if plain.isascii() and not w.LONG.search(plain):
        return
    for run in w.RUN.finditer(plain):
        if ord(run.group()[0]) > 0xFFFF or _reads(run.group()):
            yield Span(*run.span(), ENCODED)
    mixed = list(w.MIXED.finditer(plain))
    if len(mixed) > 1:  # one letter may be a slip
        yield from (Span(*pair.span(), ENCODED) for pair in mixed)


def _reads(run: str) -> bool:
    """Whether a run of signs is base64 or hexadecimal for words."""
    for decode in (bytes.fromhex, _from_base64):
        try:
            said = decode(run.replace(":", "")).decode()
        except (ValueError, binascii.Error):
            continue
        if " " in said and sum(map(str.isalpha, said)) > 0.6 * len(said):
            return True
    return False


def _from_base64(run: str) -> bytes:
    return base64.b64decode(run + "=" * (-len(run) % 4), validate=True)
