"""A server on loopback that speaks the protocol of message batches and fails on demand."""

import contextlib
import datetime
import http.server
import json
import random
import threading
from collections import Counter

from fake_teacher import _message, _send, answer_text


class FakeBatches:
    """`outcome(body, turn)` names what becomes of a request at its `turn`-th coming: None is an answer.

    Others: `expired`, `canceled`, `errored TYPE`, or a fault of `fake_teacher.answer_text`. `fault(method, path, n)`
    names what goes wrong with a call: `drop` (it is done, then the connection breaks), `lost` (it breaks before), `cut`
    (results end in the middle of a line), `503`. A batch has ended after `looks` looks at it. `paid` counts answers by
    custom id: what a person would be billed for.
    """

    def __init__(self, outcome=lambda body, turn: None, fault=lambda method, path, count: None, looks=1):
        self.outcome, self.fault, self.looks = outcome, fault, looks
        self.results_host = None
        self.forget()
        owner, guard = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

            def log_message(self, *args):
                pass

            def do_POST(self):
                self._do("POST", json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def do_GET(self):
                self._do("GET", None)

            def _do(self, method, body):
                path = self.path.partition("?")[0]
                with guard:
                    kind = f"{method} {'results' if path.endswith('/results') else path.count('/')}"
                    owner.calls[kind] += 1
                    fault = owner.fault(method, path, owner.calls[kind])
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        owner._do(self, method, path, body, fault)

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, request, address):
                """A client that was killed is no news."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def forget(self):
        """As if nothing had come yet."""
        self.paid, self.turns, self.calls = Counter(), Counter(), Counter()
        self.batches, self.bodies = {}, []

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}"

    def add(self, requests):
        """A batch of `(custom id, body)`, done with at once; returns its id."""
        name = f"msgbatch_{len(self.batches) + 1}"
        rows = []
        for custom_id, body in requests:
            self.turns[custom_id] += 1
            kind = self.outcome(body, self.turns[custom_id])
            rows.append({"custom_id": custom_id, "result": self._result(custom_id, body, kind)})
        random.Random(name).shuffle(rows)
        now = datetime.datetime.now(datetime.UTC).isoformat()
        self.batches[name] = {"rows": rows, "looks": 0, "created": now}
        return name

    def _result(self, custom_id, body, kind):
        kind = kind or "succeeded"
        if kind in ("expired", "canceled"):
            return {"type": kind}
        if kind.startswith("errored"):
            error = {"type": kind.partition(" ")[2], "message": "it went wrong"}
            return {"type": "errored", "error": {"type": "error", "error": error}}
        self.paid[custom_id] += 1
        stop = kind if kind in ("refusal", "max_tokens") else "end_turn"
        return {"type": "succeeded", "message": _message(body, answer_text(body, kind), stop)}

    def _shown(self, name):
        batch = self.batches[name]
        ended = batch["looks"] >= self.looks
        counts = Counter((row["result"] or {}).get("type") for row in batch["rows"]) if ended else Counter()
        names = ("succeeded", "errored", "canceled", "expired")
        host = self.results_host or self.url
        return {
            "id": name,
            "type": "message_batch",
            "processing_status": "ended" if ended else "in_progress",
            "request_counts": {
                **{kind: counts[kind] for kind in names},
                "processing": 0 if ended else len(batch["rows"]),
            },
            "created_at": batch["created"],
            "expires_at": batch["created"],
            "results_url": f"{host}/v1/messages/batches/{name}/results" if ended else None,
        }

    def _do(self, handler, method, path, body, fault):
        if fault == "lost":
            handler.close_connection = True
            handler.connection.close()
            return
        if fault and fault.isdigit():
            error = {"type": "error", "error": {"type": "api_error", "message": "no"}}
            _send(handler, int(fault), error, {"retry-after-ms": "1"})
            return
        if method == "POST" and path == "/v1/messages/batches":
            self.bodies += [row["params"] for row in body["requests"]]
            answer = self._shown(self.add([(row["custom_id"], row["params"]) for row in body["requests"]]))
        elif path == "/v1/messages/batches":
            shown = [self._shown(name) for name in reversed(self.batches)]
            answer = {"data": shown, "has_more": False, "first_id": None, "last_id": None}
        else:
            name = path.split("/")[4]
            if name not in self.batches:
                _send(handler, 404, {"type": "error", "error": {"type": "not_found_error", "message": "no"}})
                return
            if path.endswith("/results"):
                answer = "".join(json.dumps(row) + "\n" for row in self.batches[name]["rows"]).encode()
                answer = answer[: len(answer) * 2 // 3 - 20] if fault == "cut" else answer
            else:
                answer = self._shown(name)
                self.batches[name]["looks"] += 1
        if fault == "drop":
            handler.close_connection = True
            handler.connection.close()
            return
        _send(handler, 200, answer, {"content-type": "application/x-jsonl"} if isinstance(answer, bytes) else None)
