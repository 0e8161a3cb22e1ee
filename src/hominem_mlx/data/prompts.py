"""New prompts from hand-written pieces: who speaks, about what, how tangled it is, what pulls apart, and how it is put.

Every draw hangs on the seed and the prompt's number alone, so 48 prompts begin with the same 24 that 24 gave. The
factors stand in each prompt's metadata: what a reward says under perturbation can be read off later.
"""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hominem_mlx.config import Config
from hominem_mlx.data import home as homes
from hominem_mlx.data.split import Texts
from hominem_mlx.errors import InputError
from hominem_mlx.files import read_jsonl, sha256_bytes
from hominem_mlx.records import Id, Prompt, Record, Text

TOO_NEAR = 0.5  # overlap of word 3-grams from which a new prompt is an old one in other clothes
TRIES = 50
CONFLICTS = ("none", "mild", "open")
ASIDE_SHARE = 0.4  # of prompts in which the speaker says something about themselves


class Persona(Record):
    """Somebody who writes, or in whose manner a teacher answers."""

    id: Id
    who: Text
    asides: Annotated[list[Text], Field(min_length=1)]


class Scenario(Record):
    """A situation with slots, ways in which it gets more tangled, and ways in which it pulls apart."""

    id: Id
    category: str
    tags: list[str] = []
    text: Text
    slots: dict[str, Annotated[list[Text], Field(min_length=1)]] = {}
    complications: Annotated[list[Text], Field(min_length=2)]
    conflicts: dict[Literal["mild", "open"], Text]
    asks: Annotated[list[Text], Field(min_length=1)]


class Family(Record):
    """One way of putting the same message differently."""

    id: Id
    about: Text
    operation: Literal["none", "lower", "slips", "heated"] = "none"
    wraps: Annotated[list[Text], Field(min_length=1)]


class Material:
    """The three hand-written files, from the starter folder or a folder of one's own."""

    def __init__(self, folder: Path = homes.STARTER):
        self.personas = read_jsonl(folder / "personas.jsonl", Persona)
        self.scenarios = read_jsonl(folder / "scenarios.jsonl", Scenario)
        self.families = read_jsonl(folder / "families.jsonl", Family)


def generate(home: Path, config: Config, *, material: Material | None = None) -> list[Prompt]:
    """Add `data.prompts` new prompts to the home; the same seed adds them once. Returns those of this seed."""
    with homes.holding(home, "generating prompts"):
        old = homes.read(home, Prompt)
        own = [prompt for prompt in old if prompt.metadata.get("seed") == config.data.seed and prompt.source == SOURCE]
        others = [prompt.prompt for prompt in old if prompt not in own] + starter_texts()
        new = compose(config.data.prompts, seed=config.data.seed, avoid=others, material=material or Material())
        rows, _ = homes.merge(old, new, wins=homes.older_wins)
        homes.write(home, Prompt, rows)
        return new


SOURCE, STARTER_SOURCE = "generated", "starter"


def starter_texts() -> list[str]:
    """The prompts of the starter corpus, which no generated prompt may repeat."""
    return [prompt.prompt for prompt in read_jsonl(homes.STARTER / "prompts.jsonl", Prompt)]


def compose(count: int, *, seed: int, avoid: Sequence[str] = (), material: Material | None = None) -> list[Prompt]:
    """`count` prompts, spread evenly over scenarios and families.

    Args:
        count: how many.
        seed: of every draw.
        avoid: texts that must not be repeated or nearly repeated.
        material: the pieces; the starter's by default.

    Raises: InputError when the material cannot give that many different prompts.
    """
    material = material or Material()
    prompts: list[Prompt] = []
    seen = Texts(avoid)
    for index in range(count):
        for attempt in range(TRIES):
            prompt = _compose_one(material, seed, index, attempt)
            if not seen.near(prompt.prompt, threshold=TOO_NEAR):
                break
        else:
            raise InputError(
                f"after {len(prompts)} prompts nothing new comes out of {len(material.scenarios)} scenarios: "
                "write more of them, or ask for fewer prompts"
            )
        prompts.append(prompt)
        seen.add(prompt.prompt)
    return prompts


def _compose_one(material: Material, seed: int, index: int, attempt: int) -> Prompt:
    rng = random.Random(f"prompt {seed} {index} {attempt}")
    scenario = _in_turn(material.scenarios, f"scenarios {seed}", index)
    family = _in_turn(material.families, f"families {seed}", index)
    persona = rng.choice(material.personas)
    complexity = rng.choice([1, 1, 2, 2, 3])
    conflict = rng.choice(CONFLICTS)
    slots = {name: rng.choice(values) for name, values in scenario.slots.items()}
    parts = [scenario.text, *rng.sample(scenario.complications, complexity - 1)]
    if conflict != "none":
        parts.append(scenario.conflicts[conflict])
    if rng.random() < ASIDE_SHARE:
        parts.insert(rng.choice([0, len(parts)]), rng.choice(persona.asides))
    parts.append(rng.choice(scenario.asks))
    text = _fill(" ".join(parts), slots)
    text = rng.choice(family.wraps).replace("{prompt}", OPERATIONS[family.operation](text, rng))
    weight = (complexity - 1) + CONFLICTS.index(conflict)
    return Prompt(
        id=f"gen-{sha256_bytes(text.encode())[:12]}",
        prompt=text,
        category=scenario.category,
        difficulty=("easy", "medium", "medium", "hard", "hard")[weight],
        tags=scenario.tags,
        source=SOURCE,
        metadata={
            "seed": seed,
            "index": index,
            "scenario": scenario.id,
            "persona": persona.id,
            "family": family.id,
            "complexity": complexity,
            "conflict": conflict,
        },
    )


def _in_turn(items: Sequence, name: str, index: int):
    """Item number `index` of a sequence that goes through all items, in a fresh seeded order each round."""
    round_number, place = divmod(index, len(items))
    order = list(items)
    random.Random(f"{name} {round_number}").shuffle(order)
    return order[place]


def _fill(text: str, slots: dict[str, str]) -> str:
    for name, value in slots.items():
        text = text.replace("{" + name + "}", value)
    return text


# --- perturbations --------------------------------------------------------------------------------------------------


def _lower(text: str, rng: random.Random) -> str:
    return re.sub(r"\.(?=\s|$)", "", text.lower())


def _slips(text: str, rng: random.Random) -> str:
    """A slip in about every eighth word of four letters or more: two letters swapped, one dropped or doubled."""

    def slip(match: re.Match) -> str:
        word = match.group()
        if rng.random() > 1 / 8:
            return word
        at = rng.randrange(1, len(word) - 2)
        return rng.choice(
            [
                word[:at] + word[at + 1] + word[at] + word[at + 2 :],
                word[:at] + word[at + 1 :],
                word[: at + 1] + word[at:],
            ]
        )

    return re.sub(r"[A-Za-z]{4,}", slip, text)


def _heated(text: str, rng: random.Random) -> str:
    """One word of the first sentence in capitals, and one full stop made an exclamation mark."""
    first, stop, rest = text.partition(".")
    long = list(re.finditer(r"[A-Za-z]{5,}", first))
    if long:
        word = rng.choice(long)
        first = first[: word.start()] + word.group().upper() + first[word.end() :]
    return first + stop.replace(".", "!") + rest


OPERATIONS = {"none": lambda text, rng: text, "lower": _lower, "slips": _slips, "heated": _heated}
