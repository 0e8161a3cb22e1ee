"""The Messages protocol over HTTP. The only file that knows the anthropic client.

The same client talks to Anthropic, to LM Studio and to Ollama; retries, back-off and streaming are its own. Keys come
from the environment and go only to the host they are for.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import anthropic
import httpx2

from hominem_mlx.errors import ConfigError, NoAnswer, TeacherError

CLOUD = "https://api.anthropic.com"
NO_KEY = "none"  # local servers want a key and read none
UPLOAD_SECONDS = 600.0  # a batch may be of many megabytes
PASSING = ("rate_limit_error", "timeout_error", "api_error", "overloaded_error")  # errors that another try may not meet


class Batch(NamedTuple):
    """Where a batch stands: seconds since the epoch at which it came, how many requests it has, whether it is done."""

    id: str
    created: float
    total: int
    ended: bool


class Failed(NamedTuple):
    """A request of a batch without a usable answer; `again` says whether another try makes sense, and costs nothing."""

    reason: str
    again: bool


class Unreachable(TeacherError):
    """Nothing answers at the address."""


class Server:
    """One server that speaks the Messages protocol, its faults turned into ours.

    Every method raises NoAnswer for one item's bad luck and TeacherError where all items would fail.

    Args:
        url: its address; None is Anthropic's own.
        api_key_env: the environment variable that holds the key.
        setting: name of the setting behind `api_key_env`, for messages.
        timeout_seconds: per request.
        max_retries: of the client, on 408, 409, 429, 5xx and dropped connections.
    """

    def __init__(
        self, url: str | None, *, api_key_env: str, setting: str, timeout_seconds: float, max_retries: int
    ) -> None:
        self.url = url or CLOUD
        self._key = _key(api_key_env, url, setting=setting)
        self._client = _client(self.url, self._key, timeout_seconds, max_retries)
        self._timeout = timeout_seconds

    def answer(self, body: dict) -> dict:
        """The answer to one request: text, stop reason and usage."""
        try:
            with self._explained():
                return _content(self._client.messages.create(**body))
        except _UnknownField:  # a server older than structured output: the words of the question ask for JSON too
            without = {name: value for name, value in body.items() if name != "output_config"}
            with self._explained():
                return _content(self._client.messages.create(**without))

    def stream(self, body: dict) -> Iterator[str]:
        """The answer to one request, piece by piece."""
        with self._explained(), self._client.messages.stream(**body) as answer:
            yield from answer.text_stream
            if answer.current_message_snapshot.stop_reason is None:
                raise NoAnswer("the connection was dropped")

    # --- batches ----------------------------------------------------------------------------------------------------

    def send_batch(self, requests: Sequence[tuple[str, dict]]) -> str:
        """Send `(custom id, request)` as one batch; returns its id.

        Sent once, whatever the client's retries: after NoAnswer the server may or may not have the batch. TeacherError
        means that it has not.
        """
        once = self._client.with_options(max_retries=0, timeout=max(self._timeout, UPLOAD_SECONDS))
        rows: Any = [{"custom_id": name, "params": body} for name, body in requests]
        with self._explained():
            try:
                return _batch(once.messages.batches.create(requests=rows)).id
            except anthropic.NotFoundError:
                raise TeacherError(f"{self.url} offers no message batches; leave out --batch") from None
            except anthropic.APIStatusError as error:
                if error.status_code in (400, 413, 422):
                    raise TeacherError(f"the batch was refused: {_reason(error, self.url, self._key)}") from None
                raise

    def batch(self, name: str) -> Batch | None:
        """Where a batch stands, or None when the server has none of this id, or its results no longer."""
        with self._explained():
            try:
                batch = self._client.messages.batches.retrieve(name)
            except anthropic.NotFoundError:
                return None
            found = _batch(batch)
            if batch.archived_at is not None:
                return None
            if batch.results_url and urlsplit(batch.results_url).hostname != urlsplit(self.url).hostname:
                # The client would take the key there.
                raise TeacherError(f"{self.url} keeps the results of batches on another host; leave out --batch")
            return found

    def batches(self) -> Iterator[Batch]:
        """All batches of the account, the newest first."""
        with self._explained():
            for batch in self._client.messages.batches.list(limit=100):
                yield _batch(batch)

    def results(self, name: str) -> Iterator[tuple[str, dict | Failed]]:
        """Custom id and answer of each request of an ended batch, in no order. Rows that name no request are passed."""
        with self._explained():
            for row in self._client.messages.batches.results(name):
                if isinstance(custom_id := getattr(row, "custom_id", None), str):
                    yield custom_id, _result(row)

    # --- faults -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns the client's exceptions into ours."""
        parts = urlsplit(self.url)
        where = f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
        try:
            yield
        except anthropic.APITimeoutError:
            raise NoAnswer(f"no answer within {self._timeout:g} seconds") from None
        except anthropic.APIConnectionError as error:
            if isinstance(error.__cause__, httpx2.ConnectError):
                raise Unreachable(
                    f"{where} cannot be reached ({error.__cause__}); is the server running, is the address right?"
                ) from None
            raise NoAnswer("the connection was dropped") from None
        except anthropic.APIStatusError as error:
            raise _status_error(error, where, self._key) from None
        except httpx2.HTTPError:  # within a stream the client passes these on as they are
            raise NoAnswer("the connection was dropped") from None
        except (anthropic.APIError, json.JSONDecodeError):
            raise NoAnswer("the server's answer is malformed") from None


class _UnknownField(Exception):
    """The server does not know `output_config`."""


def _reason(error: anthropic.APIStatusError, where: str, key: str) -> str:
    """What the server said, without the key."""
    body = error.body if isinstance(error.body, dict) else {}
    detail = body.get("error", body)
    said = str(detail.get("message", "") if isinstance(detail, dict) else detail)[:200]
    reason = f"{error.status_code} from {where}: {said}"
    return reason if key == NO_KEY else reason.replace(key, "***")


def _status_error(error: anthropic.APIStatusError, where: str, key: str) -> Exception:
    reason = _reason(error, where, key)
    if error.status_code == 400 and "output_config" in reason:
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


def _batch(batch: Any) -> Batch:
    """A batch as plain values."""
    try:
        counts = batch.request_counts
        total = counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired
        return Batch(str(batch.id), batch.created_at.timestamp(), int(total), batch.processing_status == "ended")
    except (AttributeError, TypeError):
        raise NoAnswer("the server's answer is malformed") from None


def _result(row: Any) -> dict | Failed:
    """One line of a batch's results as plain values. One that cannot be read may have been paid for: never again."""
    try:
        kind = row.result.type
        if kind == "succeeded":
            return _content(row.result.message)
        if kind == "errored":
            error = getattr(row.result.error, "error", None)
            name, said = getattr(error, "type", "error"), str(getattr(error, "message", ""))[:200]
            return Failed(f"{name}: {said}", again=name in PASSING)
    except NoAnswer as fault:
        return Failed(str(fault), again=False)
    except AttributeError:
        return Failed("the server's answer is malformed", again=False)
    if kind == "expired":
        return Failed("the batch expired before its turn came", again=True)
    if kind == "canceled":
        return Failed("the batch was cancelled", again=False)
    return Failed(f"the server says {str(kind)[:40]!r} of it, which is no known result", again=False)


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
