"""Teachers behind HTTP, and the door to all four. The only file that knows the anthropic client.

The same client talks to Anthropic, to LM Studio and to Ollama (`base_url`); retries, back-off and streaming are its
own. Nothing is sent anywhere unless a person configured it; keys come from the environment and go only to the host they
are for.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import anthropic
import httpx2
from pydantic import BaseModel

from hominem_mlx.config import Config, Inference, TeacherConfig
from hominem_mlx.data import questions
from hominem_mlx.data.answers import AnswerStore
from hominem_mlx.data.home import ANSWERS
from hominem_mlx.data.questions import Question
from hominem_mlx.data.recorded import RecordedTeacher
from hominem_mlx.errors import ConfigError, ModelError, NoAnswer, TeacherError
from hominem_mlx.schema import Dimension, Rating, Teacher

T = TypeVar("T")
CLOUD = "https://api.anthropic.com"
BYTES_PER_TOKEN = 3  # English has about 4.5: estimates err on the dear side
NO_KEY = "none"  # local servers want a key and read none


def open_teacher(config: Config, home: Path) -> Teacher:
    """The configured teacher, its answers stored in the home.

    Raises: TeacherError when it is not fully configured.
    """
    kind, model = config.teacher.kind, config.teacher.model
    if kind == "recorded":
        return RecordedTeacher(model)
    store = AnswerStore(Path(home) / ANSWERS)
    if kind == "anthropic":
        return AnthropicTeacher(config.teacher, store)
    from hominem_mlx.data.local import LocalTeacher  # loads mlx
    from hominem_mlx.models import backbone

    lm = backbone.load(model or config.student.base, home=home)
    return LocalTeacher(lm, store, max_tokens=config.teacher.max_tokens)


# --- cost -----------------------------------------------------------------------------------------------------------


class Cost(BaseModel):
    """What a run will take, estimated on this machine from text lengths before anything is sent.

    `requests` are those not answered yet, `stored` those that are. Token counts err on the high side: three bytes a
    token, and every answer as long as `teacher.max_tokens` allows. `usd` is None when no prices are set.
    """

    requests: int = 0
    stored: int = 0
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

    def __init__(self, config: TeacherConfig, store: AnswerStore | None = None):
        if not config.model:
            raise TeacherError("teacher.model is empty; name the model, for example teacher.model=claude-opus-5-5")
        self.config = config
        self.name = config.model
        self.concurrency = config.concurrency
        self._store = store or AnswerStore()
        self._base_url = config.base_url or CLOUD
        self._key = _key(config.api_key_env, config.base_url, setting="teacher.api_key_env")
        self._client = _client(self._base_url, self._key, config.timeout_seconds, config.max_retries)

    def sample(self, prompt: str, *, persona: str, instruction: str, index: int) -> str:
        """One candidate reply; see `Teacher`."""
        question = questions.sampling_question(prompt, persona=persona, instruction=instruction, index=index)
        return self._ask(question, _user(question)).strip()

    def rate(self, prompt: str, response: str, *, dimensions: Sequence[Dimension], overall: bool = True) -> Rating:
        """Numbers and a rationale; see `Teacher`."""
        question = questions.rating_question(prompt, response, dimensions, overall=overall)
        return self._ask_twice(question, lambda text: questions.read_rating(question, text))

    def prefers(self, prompt: str, first: str, second: str) -> float:
        """Probability that `first` is better; see `Teacher`."""
        question = questions.comparing_question(prompt, first, second)
        return self._ask_twice(question, lambda text: questions.read_comparison(question, text))

    def estimate(self, asked: Iterable[Question]) -> Cost:
        """What the questions that have no stored answer will cost."""
        config, cost = self.config, Cost()
        for question in asked:
            request = self._request(question, _user(question))
            if request in self._store:
                cost.stored += 1
                continue
            cost.requests += 1
            cost.input_tokens += -(-len(json.dumps(request, ensure_ascii=False).encode()) // BYTES_PER_TOKEN)
            cost.output_tokens += config.max_tokens
        if config.usd_per_million_input or config.usd_per_million_output:
            cost.usd = (
                cost.input_tokens * config.usd_per_million_input + cost.output_tokens * config.usd_per_million_output
            ) / 1e6
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
        return {"base_url": self._base_url, "body": body}

    def _send(self, request: dict) -> dict:
        body = request["body"]
        try:
            with _explained(self._base_url, self._key, self.config.timeout_seconds):
                return _content(self._client.messages.create(**body))
        except _UnknownField:  # a server older than structured output: the words of the question ask for JSON too
            without = {name: value for name, value in body.items() if name != "output_config"}
            with _explained(self._base_url, self._key, self.config.timeout_seconds):
                return _content(self._client.messages.create(**without))


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
        self._model, self._endpoint, self._timeout = config.model, config.endpoint, timeout_seconds
        self._key = _key(config.api_key_env, config.endpoint, setting="inference.api_key_env")
        self._client = _client(config.endpoint, self._key, timeout_seconds, max_retries=2)

    def complete(
        self, prompts: Sequence[str], *, max_tokens: int, temperature: float, seed: int, system: str | None = None
    ) -> list[str]:
        """One answer a prompt, in order. Raises ModelError when the server gives none."""
        texts = []
        for prompt in prompts:
            body = self._body([{"role": "user", "content": prompt}], max_tokens, temperature, system)
            try:
                with _explained(self._endpoint, self._key, self._timeout):
                    texts.append(_content(self._client.messages.create(**body))["text"].strip())
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
            with _explained(self._endpoint, self._key, self._timeout), self._client.messages.stream(**body) as answer:
                yield from answer.text_stream
                if answer.current_message_snapshot.stop_reason is None:
                    raise NoAnswer("the connection was dropped")
        except TeacherError as error:
            raise ModelError(f"{self.name}: {error}") from None

    def _body(self, messages: Sequence[dict], max_tokens: int, temperature: float, system: str | None) -> dict:
        body = {"model": self._model, "max_tokens": max_tokens, "messages": list(messages)}
        if system:
            body["system"] = system
        return {**body, "extra_body": {"temperature": temperature}}  # the client has no such argument; servers do


# --- the wire -------------------------------------------------------------------------------------------------------


class _UnknownField(Exception):
    """The server does not know `output_config`."""


@contextlib.contextmanager
def _explained(url: str, key: str, timeout_seconds: float) -> Iterator[None]:
    """Turns the client's exceptions into ours: NoAnswer for one item's bad luck, TeacherError where all would fail."""
    parts = urlsplit(url)
    where = f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
    try:
        yield
    except anthropic.APITimeoutError:
        raise NoAnswer(f"no answer within {timeout_seconds:g} seconds") from None
    except anthropic.APIConnectionError as error:
        if isinstance(error.__cause__, httpx2.ConnectError):
            raise TeacherError(
                f"{where} cannot be reached ({error.__cause__}); is the server running, is the address right?"
            ) from None
        raise NoAnswer("the connection was dropped") from None
    except anthropic.APIStatusError as error:
        raise _status_error(error, where, key) from None
    except httpx2.HTTPError:  # within a stream the client passes these on as they are
        raise NoAnswer("the connection was dropped") from None
    except (anthropic.APIError, json.JSONDecodeError):
        raise NoAnswer("the server's answer is malformed") from None


def _status_error(error: anthropic.APIStatusError, where: str, key: str) -> Exception:
    body = error.body if isinstance(error.body, dict) else {}
    detail = body.get("error", body)
    said = str(detail.get("message", "") if isinstance(detail, dict) else detail)[:200]
    reason = f"{error.status_code} from {where}: {said}"
    reason = reason if key == NO_KEY else reason.replace(key, "***")
    if error.status_code == 400 and "output_config" in said:
        return _UnknownField()
    if error.status_code in (401, 402, 403):
        return TeacherError(f"{reason}; check the key and the account it belongs to")
    if error.status_code == 404:
        return TeacherError(f"{reason}; check the model's name and the address")
    return NoAnswer(reason)


def _content(message: object) -> dict:
    """Text, stop reason and usage of an answer, as plain values."""
    if not isinstance(message, anthropic.types.Message) or not isinstance(message.content, list):
        raise NoAnswer("the server's answer is malformed")
    text = "".join(block.text for block in message.content if block.type == "text")
    return {
        "text": text.encode(errors="replace").decode(),  # half a character could not be stored
        "stop_reason": message.stop_reason,
        "input_tokens": getattr(message.usage, "input_tokens", None),
        "output_tokens": getattr(message.usage, "output_tokens", None),
    }


def _user(question: Question) -> list[dict]:
    return [{"role": "user", "content": question.user}]


def _client(base_url: str, key: str, timeout_seconds: float, max_retries: int) -> anthropic.Anthropic:
    # The address is always given, so that no variable of the environment can send the texts somewhere else.
    if not re.fullmatch(r"https?://(\S+@)?([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?(/\S*)?", base_url):
        raise ConfigError(f"{base_url!r} is not an address; write one such as http://localhost:1234")
    local = urlsplit(base_url).hostname in ("localhost", "127.0.0.1", "::1")
    return anthropic.Anthropic(
        api_key=key,
        base_url=base_url,
        timeout=timeout_seconds,
        max_retries=max_retries,
        http_client=anthropic.DefaultHttpxClient(trust_env=False) if local else None,  # nor past this machine by proxy
    )


def _key(variable: str, base_url: str | None, *, setting: str) -> str:
    """The key in `variable`. Anthropic's own is never sent to another host."""
    host = urlsplit(base_url or CLOUD).hostname or ""
    anthropics = host == "anthropic.com" or host.endswith(".anthropic.com")
    key = os.environ.get(variable, "").strip()
    if not anthropics:
        return NO_KEY if variable == "ANTHROPIC_API_KEY" else key or NO_KEY
    if not key or not key.isascii():
        raise TeacherError(f"there is no key in the environment variable {variable} ({setting}); export it first")
    return key
