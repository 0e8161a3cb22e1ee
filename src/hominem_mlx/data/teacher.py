"""Teachers behind HTTP, what they cost, and the door to all four. What goes over the wire is in `wire.py`.

Nothing is sent anywhere unless a person configured it.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from hominem_mlx.config import Config, Inference, TeacherConfig
from hominem_mlx.data import questions
from hominem_mlx.data.answers import AnswerStore
from hominem_mlx.data.home import ANSWERS, BATCHES, holding
from hominem_mlx.data.questions import Question
from hominem_mlx.data.recorded import RecordedTeacher
from hominem_mlx.data.wire import Server
from hominem_mlx.errors import ModelError, NoAnswer, TeacherError
from hominem_mlx.schema import Dimension, Rating, Teacher

T = TypeVar("T")
BYTES_PER_TOKEN = 3  # English has about 4.5: estimates err on the dear side


def open_teacher(config: Config, home: Path) -> Teacher:
    """The configured teacher, its answers stored in the home.

    Raises: TeacherError when it is not fully configured.
    """
    kind, model = config.teacher.kind, config.teacher.model
    if config.teacher.batch and kind != "anthropic":
        raise TeacherError(
            f"teacher.kind = {kind} answers at once; batches (--batch, teacher.batch) need teacher.kind = anthropic"
        )
    if kind == "recorded":
        return RecordedTeacher(model)
    store = AnswerStore(Path(home) / ANSWERS)
    if kind == "anthropic":
        if not config.teacher.batch:
            return AnthropicTeacher(config.teacher, store)
        from hominem_mlx.data.batches import BatchTeacher  # builds on what is below

        return BatchTeacher(config.teacher, store, Path(home) / BATCHES)
    from hominem_mlx.data.local import LocalTeacher  # loads mlx
    from hominem_mlx.models import backbone

    lm = backbone.load(model or config.student.base, home=home)
    return LocalTeacher(lm, store, max_tokens=config.teacher.max_tokens)


@contextlib.contextmanager
def alone_with(home: Path, teacher: Teacher, purpose: str) -> Iterator[None]:
    """Keep other writers of the home's data out (see `home.holding`) while the teacher is asked.

    What it was asked since it was opened, by another process that has ended, is read anew: between the two lies the
    question whether to send, and nothing may be paid for twice.
    """
    with holding(home, purpose):
        if isinstance(teacher, AnthropicTeacher):
            teacher.reread()
        yield


# --- cost -----------------------------------------------------------------------------------------------------------


class Cost(BaseModel):
    """What a run will take, estimated on this machine from text lengths before anything is sent.

    `requests` are those not sent yet, `stored` those that are answered, `under_way` those in a batch sent before. Token
    counts err on the high side: three bytes a token, and every answer as long as `teacher.max_tokens` allows. `usd` is
    None when no prices are set.
    """

    requests: int = 0
    stored: int = 0
    under_way: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float | None = None


def estimate(teacher: Teacher, asked: Iterable[Question]) -> Cost:
    """The cost of asking `asked`; teachers on this machine cost nothing."""
    if isinstance(teacher, AnthropicTeacher):
        return teacher.estimate(asked)
    return Cost(requests=sum(1 for _ in asked), usd=0.0)


def refuse_if_dear(teacher: Teacher, cost: Cost) -> None:
    """Raise TeacherError when the estimate is above `teacher.max_cost_usd`, or cannot be told."""
    if not isinstance(teacher, AnthropicTeacher) or teacher.config.max_cost_usd is None or not cost.requests:
        return
    limit = teacher.config.max_cost_usd
    if cost.usd is None:
        raise TeacherError(
            "a cost limit is set but no prices are: set teacher.usd_per_million_input and "
            "teacher.usd_per_million_output; nothing was sent"
        )
    if cost.usd > limit:
        raise TeacherError(
            f"{cost.requests} requests would cost up to {cost.usd:.2f} USD ({cost.input_tokens:,} tokens in, at most "
            f"{cost.output_tokens:,} out), more than teacher.max_cost_usd = {limit:g}; nothing was sent: raise the "
            "limit (--max-cost), ask for less, or choose a cheaper teacher.model"
        )


# --- the anthropic client -------------------------------------------------------------------------------------------


class AnthropicTeacher:
    """A model behind the Anthropic Messages protocol, in the cloud or on this machine.

    Args:
        config: model, address, key variable, limits.
        store: where answers are kept and looked up.
    """

    price = 1.0  # as a share of what `teacher.usd_per_million_*` say

    def __init__(self, config: TeacherConfig, store: AnswerStore | None = None):
        if not config.model:
            raise TeacherError("teacher.model is empty; name the model, for example teacher.model=claude-opus-5-5")
        self.config = config
        self.name = config.model
        self.concurrency = config.concurrency
        self._store = store or AnswerStore()
        self._server = Server(
            config.base_url,
            api_key_env=config.api_key_env,
            setting="teacher.api_key_env",
            timeout_seconds=config.timeout_seconds,
            max_retries=config.max_retries,
        )

    def sample(self, prompt: str, *, persona: str, instruction: str, index: int) -> str:
        """One candidate reply; see `Teacher`."""
        question = questions.sampling_question(prompt, persona=persona, instruction=instruction, index=index)
        return self._ask(question, _user(question)).strip()

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
        """Numbers and a rationale; see `Teacher`."""
        question = questions.rating_question(
            prompt, response, dimensions, overall=overall, repeat=repeat, beside=beside
        )
        return self._ask_twice(question, lambda text: questions.read_rating(question, text))

    def edit(self, prompt: str, response: str, *, dimension: Dimension, repeat: int = 0) -> str:
        """The reply made worse in one dimension; see `Teacher`."""
        question = questions.editing_question(prompt, response, dimension, repeat=repeat)
        return self._ask(question, _user(question)).strip()

    def prefers(self, prompt: str, first: str, second: str) -> float:
        """Probability that `first` is better; see `Teacher`."""
        question = questions.comparing_question(prompt, first, second)
        return self._ask_twice(question, lambda text: questions.read_comparison(question, text))

    def estimate(self, asked: Iterable[Question]) -> Cost:
        """What the questions that have no stored answer will cost."""
        stored, under_way, fresh = 0, 0, []
        for question in asked:
            request = self._request(question, _user(question))
            if request in self._store:
                stored += 1
            elif self._is_under_way(request):
                under_way += 1
            else:
                fresh.append(request)
        return self._cost(fresh).model_copy(update={"stored": stored, "under_way": under_way})

    def reread(self) -> None:
        """Take in what other processes have been answered since."""
        self._store.reread()

    def _is_under_way(self, request: dict) -> bool:
        """Whether a request was sent, and its answer has not been fetched yet."""
        return False

    def _cost(self, requests: Sequence[dict]) -> Cost:
        """What sending `requests` costs at most."""
        config = self.config
        cost = Cost(requests=len(requests), output_tokens=config.max_tokens * len(requests))
        for request in requests:
            cost.input_tokens += -(-len(json.dumps(request, ensure_ascii=False).encode()) // BYTES_PER_TOKEN)
        if config.usd_per_million_input or config.usd_per_million_output:
            at_full_price = (
                cost.input_tokens * config.usd_per_million_input + cost.output_tokens * config.usd_per_million_output
            ) / 1e6
            cost.usd = self.price * at_full_price
        return cost

    def _ask_twice(self, question: Question, read: Callable[[str], T]) -> T:
        """Ask, and once more with the fault named when the answer cannot be read."""
        text = self._ask(question, _user(question))
        try:
            return read(text)
        except NoAnswer as fault:
            if not text.strip():
                raise
            again = f"That cannot be used: {fault}. Answer again with one JSON object of the numbers asked for."
            turns = [{"role": "assistant", "content": text.strip()}, {"role": "user", "content": again}]
            return read(self._ask(question, [*_user(question), *turns]))

    def _ask(self, question: Question, messages: list[dict]) -> str:
        request = self._request(question, messages)
        answer = self._store.remember(request, lambda: self._send(request), teacher=self.name)
        stop = answer["stop_reason"]
        if stop == "refusal":
            raise NoAnswer("the teacher refused")
        if stop in ("max_tokens", "model_context_window_exceeded"):
            raise NoAnswer(f"the answer was cut off ({stop}); raise teacher.max_tokens = {self.config.max_tokens}")
        if not answer["text"].strip():
            raise NoAnswer(f"the answer is empty ({stop})")
        return answer["text"]

    def _request(self, question: Question, messages: list[dict]) -> dict:
        body: dict[str, Any] = {
            "model": self.config.model,
            "max_tokens": self.config.max_tokens,
            "system": [{"type": "text", "text": question.system, "cache_control": {"type": "ephemeral"}}],
            "messages": messages,
        }
        if question.schema:
            body["output_config"] = {"format": {"type": "json_schema", "schema": question.schema}}
        request = {"base_url": self._server.url, "body": body}
        return request | {"repeat": question.repeat} if question.repeat else request

    def _send(self, request: dict) -> dict:
        return self._server.answer(request["body"])


class HttpGenerator:
    """The student where it runs elsewhere: answers only, no learning. Speaks the `Generator` protocol.

    The protocol has no seed: answers cannot be repeated, and `seed` is not used.

    Args:
        config: `[inference]` with `endpoint` and `model`.
        timeout_seconds: per request.
    """

    def __init__(self, config: Inference, *, timeout_seconds: float = 120.0):
        if not config.endpoint or not config.model:
            raise ModelError("inference.endpoint and inference.model must both be set to use a student behind HTTP")
        self.name = config.model
        self._model = config.model
        self._server = Server(
            config.endpoint,
            api_key_env=config.api_key_env,
            setting="inference.api_key_env",
            timeout_seconds=timeout_seconds,
            max_retries=2,
        )

    def complete(
        self, prompts: Sequence[str], *, max_tokens: int, temperature: float, seed: int, system: str | None = None
    ) -> list[str]:
        """One answer a prompt, in order. Raises ModelError when the server gives none."""
        texts = []
        for prompt in prompts:
            body = self._body([{"role": "user", "content": prompt}], max_tokens, temperature, system)
            try:
                texts.append(self._server.answer(body)["text"].strip())
            except TeacherError as error:
                raise ModelError(f"{self.name}: {error}") from None
        return texts

    def stream(
        self,
        messages: Sequence[dict[str, str]],
        *,
        max_tokens: int = 512,
        temperature: float = 0.7,
        system: str | None = None,
    ) -> Iterator[str]:
        """The answer to a conversation, piece by piece. Raises ModelError when the server breaks off."""
        turns = [message for message in messages if message["role"] != "system"]
        system = system or next((message["content"] for message in messages if message["role"] == "system"), None)
        body = self._body(turns, max_tokens, temperature, system)
        try:
            yield from self._server.stream(body)
        except TeacherError as error:
            raise ModelError(f"{self.name}: {error}") from None

    def _body(self, messages: Sequence[dict], max_tokens: int, temperature: float, system: str | None) -> dict:
        body = {"model": self._model, "max_tokens": max_tokens, "messages": list(messages)}
        if system:
            body["system"] = system
        return {**body, "extra_body": {"temperature": temperature}}  # the client has no such argument; servers do


def _user(question: Question) -> list[dict]:
    return [{"role": "user", "content": question.user}]
