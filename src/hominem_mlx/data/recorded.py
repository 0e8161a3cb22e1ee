"""The teacher that has already spoken: candidates and ratings from a labels file, by default the starter corpus."""

from collections.abc import Sequence
from pathlib import Path

from hominem_mlx.data.home import STARTER
from hominem_mlx.errors import NoAnswer
from hominem_mlx.files import read_jsonl
from hominem_mlx.records import Label
from hominem_mlx.schema import Dimension, Rating


class RecordedTeacher:
    """Answers only what its file holds, and says so for everything else.

    Args:
        path: a file of rated samples; None is the starter corpus.
    """

    concurrency = 1

    def __init__(self, path: str | Path | None = None):
        self.path = Path(path).expanduser() if path else STARTER / "reward_samples.jsonl"
        self.name = "starter" if path is None else f"recorded:{self.path.name}"
        self._ratings: dict[tuple[str, str], Label] = {}
        self._replies: dict[str, list[str]] = {}
        self._edits: dict[tuple[str, str], str] = {}
        for label in read_jsonl(self.path, Label):
            self._ratings[label.prompt, label.response] = label
            if label.edit_of is None:  # an edit is a copy made to fall short in one thing, not a candidate
                self._replies.setdefault(label.prompt, []).append(label.response)
            elif label.lowered:
                self._edits[label.edit_of, label.lowered] = label.response

    def sample(self, prompt: str, *, persona: str, instruction: str, index: int) -> str:
        """The stored reply number `index` to this very prompt."""
        replies = self._replies.get(prompt, [])
        if index >= len(replies):
            raise NoAnswer(
                f"the recorded teacher holds {len(replies)} replies to this prompt (it knows {len(self._replies)} "
                "prompts); set teacher.kind to local or anthropic, or import labels of your own"
            )
        return replies[index]

    def rate(
        self,
        prompt: str,
        response: str,
        *,
        dimensions: Sequence[Dimension],
        overall: bool = True,
        repeat: int = 0,
        beside: tuple[str, Rating] | None = None,
    ) -> Rating:
        """The stored numbers of this very reply."""
        if repeat:
            raise NoAnswer("the recorded teacher says the same again; set teacher.kind to local or anthropic")
        label = self._ratings.get((prompt, response))
        if label is None:
            raise NoAnswer(
                "the recorded teacher holds no rating of this reply; set teacher.kind to local or anthropic, or rate "
                "it yourself"
            )
        values = {dimension.name: label.reward.number(dimension.name) for dimension in dimensions}
        rating = Rating(reward={name: value for name, value in values.items() if value is not None})
        if not overall:
            return rating
        return rating.model_copy(
            update={
                "reward_intensity": label.reward.reward_intensity,
                "safety_score": label.reward.safety_score,
                "scalar": label.reward.scalar,
                "rationale": label.rationale,
            }
        )

    def edit(self, prompt: str, response: str, *, dimension: Dimension, repeat: int = 0) -> str:
        """The stored edit of this very reply."""
        label = self._ratings.get((prompt, response))
        edit = self._edits.get((label.id, dimension.name)) if label else None
        if edit is None:
            raise NoAnswer(
                f"the recorded teacher holds no copy of this reply with less {dimension.name}; set teacher.kind to "
                "local or anthropic"
            )
        return edit

    def prefers(self, prompt: str, first: str, second: str) -> float:
        """1, 0 or 0.5, by the stored overall numbers."""
        labels = [self._ratings.get((prompt, text)) for text in (first, second)]
        values = [label.reward.overall() if label else None for label in labels]
        if None in values:
            raise NoAnswer("the recorded teacher holds no rating of these replies")
        one, other = values
        return 0.5 if one == other else float(one > other)  # type: ignore[operator]
