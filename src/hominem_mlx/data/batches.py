"""A teacher that is asked by the Message Batches interface: half the price, answers within a day.

Nothing is paid for twice and nothing is lost, whenever the process is killed. What a batch holds is written down before
it is sent, its id before it is waited for, and each answer before the batch counts as fetched. A request's custom id is
its key in the store of answers, so an answer finds its place whoever asked for it, and in whatever order answers come.
Only keys are in the ledger, no texts.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from hominem_mlx.config import TeacherConfig
from hominem_mlx.data.answers import AnswerStore, Progress
from hominem_mlx.data.teacher import AnthropicTeacher, Cost
from hominem_mlx.data.wire import Batch, Failed, Unreachable
from hominem_mlx.errors import NoAnswer, TeacherError
from hominem_mlx.files import append_jsonl, read_jsonl, sha256_json

REQUESTS, BYTES = 10_000, 100_000_000  # a batch at most: well below the server's limits, and a ledger line below ours
TRIES = 3  # of a request that expired or failed for a passing reason, of sending, and of reading results
STORED_TOGETHER = 100  # answers written at once: what a kill may make us fetch again
CLOCKS_APART_SECONDS = 300.0  # between the server's clock and ours, at most
APPEARS_SECONDS = 20.0  # until a batch whose sender was killed stands in the server's list
OUTAGE_SECONDS = 900.0  # for how long a server that was there may be away while we wait
WAITING = "its batch has not been sent yet"


class Event(BaseModel):
    """One line of the ledger.

    A batch is `planned`, then `sent` (or `dropped`: the server never had it), then `fetched` (or `dropped`: its results
    are gone). A sent batch whose results turn out to be somebody else's is `planned` again, `not_ours` naming it.
    """

    model_config = ConfigDict(extra="ignore")
    batch: str
    event: Literal["planned", "sent", "fetched", "dropped"]
    at: float
    server: str = ""
    keys: list[str] = []
    id: str = ""
    not_ours: str = ""


class Entry(NamedTuple):
    """A batch that is not done with. `id` is empty where nothing says whether the server has it."""

    name: str
    at: float
    keys: list[str]
    id: str
    not_ours: frozenset[str]


class Ledger:
    """What was sent in batches to one server, and what of it is not done with.

    Args:
        path: the log.
        server: its address, stored without user and password; batches of other servers stay untouched.
    """

    def __init__(self, path: Path, server: str):
        self.path, self.server = path, _without_login(server)
        self.reread()

    def reread(self) -> None:
        """Take in what other processes have sent and fetched since."""
        self.open: dict[str, Entry] = {}
        self.ids: set[str] = set()
        self.under_way: set[str] = set()
        if self.path.exists():
            for event in read_jsonl(self.path, Event, unique=None, may_be_empty=True, torn_tail=True):
                self._apply(event)

    def plan(self, keys: Sequence[str]) -> Entry:
        """Write down what is about to be sent."""
        now = time.time()
        name = sha256_json([now, list(keys)])[:16]
        self._add(Event(batch=name, event="planned", at=now, server=self.server, keys=list(keys)))
        return self.open[name]

    def sent(self, entry: Entry, batch_id: str) -> None:
        """The server has it, under this id."""
        self._add(Event(batch=entry.name, event="sent", at=time.time(), id=batch_id))

    def not_ours(self, entry: Entry) -> None:
        """The id that was taken for this batch's belongs to somebody else."""
        again = Event(batch=entry.name, event="planned", at=entry.at, server=self.server, keys=entry.keys)
        self._add(again.model_copy(update={"not_ours": entry.id}))

    def done(self, entry: Entry, how: Literal["fetched", "dropped"]) -> None:
        """Nothing is left to do about it."""
        self._add(Event(batch=entry.name, event=how, at=time.time()))

    def _add(self, event: Event) -> None:
        append_jsonl(self.path, [event])
        self._apply(event)

    def _apply(self, event: Event) -> None:
        if event.event == "planned":
            if _without_login(event.server) == self.server:
                before = self.open.get(event.batch)
                not_ours = (before.not_ours if before else frozenset()) | ({event.not_ours} - {""})
                self.open[event.batch] = Entry(event.batch, event.at, event.keys, "", not_ours)
        elif event.batch in self.open and event.event == "sent":
            self.open[event.batch] = self.open[event.batch]._replace(id=event.id)
            self.ids.add(event.id)
        else:
            self.open.pop(event.batch, None)
        self.under_way = {key for entry in self.open.values() for key in entry.keys}


def _without_login(url: str) -> str:
    """The address without a user and a password, which are nobody's to read in a log."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


class BatchTeacher(AnthropicTeacher):
    """An `AnthropicTeacher` whose questions go out together. See `answers.Gathering`.

    Args:
        config: as there, and `batch_poll_seconds`.
        store: where answers are kept and looked up.
        ledger: file that says what was sent.
    """

    price = 0.5  # source: Anthropic's documentation of message batches

    def __init__(self, config: TeacherConfig, store: AnswerStore, ledger: Path):
        super().__init__(config, store)
        self.concurrency = 1  # answers come from the store
        self._ledger = Ledger(ledger, self._server.url)
        self._gathered: dict[str, dict] = {}
        self._tries: dict[str, int] = {}
        self._given_up: dict[str, str] = {}
        self._charged: dict[str, dict] = {}
        self._was_there = False

    def settle(self, progress: Progress | None) -> bool:
        """Send what was gathered and wait for the answers. Safe to interrupt: the next call goes on.

        Raises: TeacherError when the server cannot be used.
        """
        wanted, self._gathered = self._gathered, {}
        self._find_lost()
        self._fetch_ended()
        self._send_missing(wanted)
        total = sum(not self._store.holds(key) for key in wanted)
        while waiting := [entry for entry in self._ledger.open.values() if not wanted.keys().isdisjoint(entry.keys)]:
            self._fetch_ended()
            left = sum(len(wanted.keys() & set(e.keys)) for e in waiting if e.name in self._ledger.open)
            if progress:
                progress({"stage": "batch", "done": max(0, total - left), "total": total})
            if left:
                time.sleep(self.config.batch_poll_seconds)
            self._find_lost()
        return bool(wanted)

    # --- what the teacher above does at once --------------------------------------------------------------------------

    def _send(self, request: dict) -> dict:
        key = sha256_json(request)
        if key in self._given_up:
            raise NoAnswer(self._given_up[key])
        self._gathered[key] = request
        raise NoAnswer(WAITING)

    def reread(self) -> None:
        """Take in what other processes have asked, been answered and are waiting for since."""
        super().reread()
        self._ledger.reread()

    def _is_under_way(self, request: dict) -> bool:
        return sha256_json(request) in self._ledger.under_way

    # --- sending ------------------------------------------------------------------------------------------------------

    def _send_missing(self, wanted: dict[str, dict]) -> None:
        under_way = self._ledger.under_way
        settled = under_way | self._given_up.keys()  # an older batch, fetched just now, may have failed for good
        missing = {k: r for k, r in wanted.items() if k not in settled and not self._store.holds(k)}
        limit = self.config.max_cost_usd
        cost: Cost = self._cost([*self._charged.values(), *missing.values()])
        if limit is not None and missing and (cost.usd is None or cost.usd > limit):
            # The estimate before the run counts each question once; this is about asking again.
            reason = f"asking would bring the run above teacher.max_cost_usd = {limit:g}; raise it (--max-cost)"
            self._given_up |= dict.fromkeys(missing, reason)
            return
        for part in _parts(missing):
            entry = self._ledger.plan(list(part))
            self._send_planned(entry, part)
            self._charged |= part

    def _send_planned(self, entry: Entry, requests: dict[str, dict]) -> None:
        """Send a batch whose plan is written down; it goes out a second time only when the first did not arrive."""
        reason = ""
        for _ in range(TRIES):
            try:
                name = self._server.send_batch([(key, request["body"]) for key, request in requests.items()])
            except NoAnswer as fault:
                reason = str(fault)
                if found := self._look_for(entry, patience=APPEARS_SECONDS):
                    self._ledger.sent(entry, found)
                    return
            except TeacherError:
                self._ledger.done(entry, "dropped")
                raise
            else:
                self._was_there = True
                self._ledger.sent(entry, name)
                return
        self._ledger.done(entry, "dropped")
        raise TeacherError(f"the batch could not be sent: {reason}; what was answered is stored: try again later")

    def _find_lost(self) -> None:
        """Find out what became of plans that nobody knows to have been sent: their sender was killed just then."""
        for entry in [entry for entry in self._ledger.open.values() if not entry.id]:
            # Counted from now: sending may have taken long before the sender was killed.
            name = self._look_for(entry, patience=0 if entry.not_ours else APPEARS_SECONDS)
            if name is None:
                self._ledger.done(entry, "dropped")
            else:
                self._ledger.sent(entry, name)

    def _look_for(self, entry: Entry, *, patience: float) -> str | None:
        """Id of the batch on the server that can be this one: of its size, come since, and no other of ours.

        Whether it really is shows when its results come: they name their requests by hash.
        """
        known = self._ledger.ids | entry.not_ours
        deadline = time.monotonic() + patience
        while True:
            fault = None
            try:
                for batch in self._server.batches():
                    if batch.created < entry.at - CLOCKS_APART_SECONDS:
                        break
                    if batch.id not in known and batch.total == len(entry.keys):
                        return batch.id
            except NoAnswer as reason:
                fault = reason
            if time.monotonic() >= deadline:
                if fault is None:
                    return None
                again = "nothing is lost: run the same command again later"
                raise TeacherError(f"whether the batch arrived cannot be found out: {fault}; {again}")
            time.sleep(min(1.0, self.config.batch_poll_seconds))

    # --- fetching -----------------------------------------------------------------------------------------------------

    def _fetch_ended(self) -> None:
        for entry in [entry for entry in self._ledger.open.values() if entry.id]:
            batch = self._standing(entry.id)
            if batch is None:
                self._ledger.done(entry, "dropped")
                for key in entry.keys:
                    if not self._store.holds(key):
                        self._failed(key, Failed("the server does not have its batch any more", again=True))
            elif batch.ended:
                self._fetch(entry)

    def _standing(self, name: str) -> Batch | None:
        """Where a batch stands. The wait may last a day: a server or a net that goes away for a while is waited for."""
        deadline = time.monotonic() + (OUTAGE_SECONDS if self._was_there else 0)
        while True:
            try:
                batch = self._server.batch(name)
            except (NoAnswer, Unreachable) as fault:
                if time.monotonic() >= deadline:
                    again = "nothing is lost: run the same command again later"
                    raise TeacherError(f"batch {name} cannot be looked at: {fault}; {again}") from None
                time.sleep(self.config.batch_poll_seconds)
            else:
                self._was_there = True
                return batch

    def _fetch(self, entry: Entry) -> None:
        """Store the answers of an ended batch; failures that pass are asked again in the next round."""
        mine = set(entry.keys)
        left, reason = set(mine), ""
        strangers = False
        for attempt in range(TRIES):
            if attempt:
                time.sleep(self.config.batch_poll_seconds)
            reason = ""
            try:
                for rows in _chunks(self._server.results(entry.id)):
                    strangers = strangers or any(key not in mine for key, _ in rows)
                    answers = {key: said for key, said in rows if key in mine and isinstance(said, dict)}
                    self._store.put(answers, teacher=self.name)
                    for key, said in rows:
                        if key in left and isinstance(said, Failed):
                            self._failed(key, said)
                        left.discard(key)
            except (NoAnswer, Unreachable) as fault:
                reason = str(fault)
            if left == mine and strangers:
                self._ledger.not_ours(entry)
                return
            if not left:
                self._ledger.done(entry, "fetched")
                return
        if reason:
            raise TeacherError(
                f"the results of batch {entry.id} cannot be read ({reason}); those that came are stored, and the "
                "others are not asked for anew: run the same command again later"
            )
        for key in left:  # the results are whole, without these: no later look will find them
            self._failed(key, Failed("it is not in the results of its batch", again=False))
        self._ledger.done(entry, "fetched")

    def _failed(self, key: str, failed: Failed) -> None:
        self._charged.pop(key, None)
        self._tries[key] = self._tries.get(key, 0) + 1
        if not failed.again or self._tries[key] >= TRIES:
            self._given_up[key] = failed.reason


def _parts(requests: dict[str, dict]) -> Iterator[dict[str, dict]]:
    """The requests in parts of at most `REQUESTS` and `BYTES`."""
    part: dict[str, dict] = {}
    size = 0
    for key, request in requests.items():
        length = len(str(request).encode(errors="replace"))
        if part and (len(part) >= REQUESTS or size + length > BYTES):
            yield part
            part, size = {}, 0
        part[key] = request
        size += length
    if part:
        yield part


def _chunks(rows: Iterator[tuple[str, dict | Failed]]) -> Iterator[list[tuple[str, dict | Failed]]]:
    """Rows some at a time; what came before a fault is handed on before it is raised."""
    chunk: list[tuple[str, dict | Failed]] = []
    try:
        for row in rows:
            chunk.append(row)
            if len(chunk) == STORED_TOGETHER:
                yield chunk
                chunk = []
    except (NoAnswer, Unreachable):
        yield chunk
        raise
    yield chunk
