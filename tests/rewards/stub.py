"""A local OpenAI-compatible server that judges pictures by how red they are."""

import base64
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import numpy as np
from PIL import Image

Request = dict[str, Any]


@dataclass(slots=True)
class Stub:
    """What it was asked, and what it shall answer: by default a completion, or a status with raw bytes."""

    url: str = ""
    requests: list[Request] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    answer: Callable[[Request], Request | tuple[int, bytes]] = lambda request: completion(request)
    delay_s: float = 0.0


def redness(url: str) -> float:
    """In [0, 1]"""
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return float(np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))[..., 0].mean()) / 255


def shown(request: Request) -> list[float]:
    content = request["messages"][0]["content"]
    return [redness(part["image_url"]["url"]) for part in content if part["type"] == "image_url"]


def asked(request: Request) -> str:
    (text,) = [part["text"] for part in request["messages"][0]["content"] if part["type"] == "text"]
    return text


def completion(request: Request) -> Request:
    """A mark of ten times the redness, the redder of two, or "yes" with the redness as its probability."""
    red = shown(request)
    if len(red) == 2:
        return said("0" if red[0] == red[1] else "1" if red[0] > red[1] else "2")
    if not request.get("logprobs"):
        text = asked(request)
        return said(f"Sharp. Final Score: {1 + 4 * red[0]:.3f}" if "Final Score:" in text else f"{10 * red[0]:.3f}")
    sure = [("Yes", 0.6 * red[0]), (" yes", 0.3 * red[0]), ("No", 0.9 * (1 - red[0])), ("Maybe", 0.1)]
    top = [{"token": token, "logprob": math.log(max(share, 1e-30))} for token, share in sure]
    choice = said("Yes")
    choice["choices"][0]["logprobs"] = {"content": [{"token": "Yes", "logprob": 0.0, "top_logprobs": top}]}
    return choice


def said(text: str | None) -> Request:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


@contextmanager
def serving() -> Iterator[Stub]:
    stub = Stub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.requests.append(request)
            stub.tokens.append(self.headers.get("Authorization"))
            time.sleep(stub.delay_s)
            answer = stub.answer(request) if self.path == "/v1/chat/completions" else (404, b"no such page")
            status, body = answer if isinstance(answer, tuple) else (200, json.dumps(answer).encode())
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
