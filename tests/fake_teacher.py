"""A teacher on loopback that speaks the Messages protocol and fails on demand."""

import hashlib
import http.server
import json
import threading
import time

SLOW_SECONDS = 0.5


class FakeTeacher:
    """`fault(body, count)` names what goes wrong with a request (see `_answer`), None for a good answer.

    Good answers depend on the request alone. `requests` keeps `(headers, body)` of everything that came.
    """

    def __init__(self, fault=lambda body, count: None):
        self.fault, self.requests, self.together, self.most_together = fault, [], 0, 0
        guard, owner = threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with guard:
                    owner.requests.append((dict(self.headers), body))
                    count = len(owner.requests)
                    owner.together += 1
                    owner.most_together = max(owner.most_together, owner.together)
                try:
                    owner._answer(self, body, owner.fault(body, count))
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with guard:
                        owner.together -= 1

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, request, address):
                """A client that was killed is no news."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}"

    def _answer(self, handler, body, fault):
        if fault == "drop":
            handler.close_connection = True
            handler.connection.close()
            return
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        if fault and fault[:3].isdigit():
            code, _, said = fault.partition(" ")
            error = {"type": "error", "error": {"type": "some_error", "message": said or "no"}}
            return _send(handler, int(code), error, {"retry-after-ms": "1"})
        if fault == "bad_body":
            return _send(handler, 200, b"{not json")
        if fault == "html":
            return _send(handler, 200, b"<html>a proxy</html>", {"content-type": "text/html"})
        if fault == "empty_object":
            return _send(handler, 200, {})
        if body.get("stream"):
            return self._stream(handler, body, fault)
        stop = fault if fault in ("refusal", "max_tokens") else "end_turn"
        return _send(handler, 200, _message(body, answer_text(body, fault), stop))

    def _stream(self, handler, body, fault):
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        handler.close_connection = True

        def event(kind, **values):
            data = f"event: {kind}\ndata: {json.dumps({'type': kind, **values})}\n\n".encode()
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            handler.wfile.flush()

        event("message_start", message={**_message(body, "", None), "content": []})
        event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        for word in ("One ", "word ", "at a time."):
            event("content_block_delta", index=0, delta={"type": "text_delta", "text": word})
            if fault == "break":
                return
            if fault == "end":
                break
        if fault == "end":
            handler.wfile.write(b"0\r\n\r\n")
            return
        event("content_block_stop", index=0)
        event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 3})
        event("message_stop")
        handler.wfile.write(b"0\r\n\r\n")


def answer_text(body, fault=None):
    """The text a good (or, by `fault`, a useless) answer to this request has."""
    said = body["messages"][0]["content"]
    system = body.get("system") or ""
    system = system if isinstance(system, str) else system[0]["text"]
    if fault == "empty":
        return ""
    if fault == "not_json":
        return "I would say it is quite good."
    if system.startswith("You judge"):
        names = said.rpartition("in this order: ")[2].rstrip(".").split(", ")
        values = {name: number(said, name) for name in names}
        values["rationale"] = "It says what it should."
        if fault == "out_of_range":
            values[names[0]] = 1.7
        if fault == "text_number":
            values[names[0]] = "0.5"
        if fault == "nan":
            values[names[0]] = float("nan")
        if fault == "missing":
            del values[names[-1]]
    elif system.startswith("You compare"):
        values = {"rationale": "One is better.", "first_is_better": 1.4 if fault == "out_of_range" else 0.8}
    else:
        return f"A reply made of {hashlib.sha256(said.encode()).hexdigest()[:8]}."
    text = json.dumps(values)
    return text if "output_config" in body else f"Gladly, here it is:\n```json\n{text}\n```\nAnything else?"


def number(said, name):
    """A number in [0, 1] that hangs on the reply and the name, in steps of 0.05."""
    reply = said.partition("<reply>")[2].partition("</reply>")[0]
    return round(int(hashlib.sha256(f"{reply}{name}".encode()).hexdigest()[:4], 16) % 21 * 0.05, 2)


def _message(body, text, stop):
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "content": [{"type": "text", "text": text}] if text else [],
        "stop_reason": stop,
        "stop_sequence": None,
        "usage": {"input_tokens": 10, "output_tokens": 5},
    }


def _send(handler, code, value, headers=None):
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    handler.send_response(code)
    for name, text in ({"content-type": "application/json"} | (headers or {})).items():
        handler.send_header(name, text)
    handler.send_header("content-length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)
