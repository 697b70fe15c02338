"""A reward behind HTTP, asked through a real server on this machine."""

import base64
import gzip
import io
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rlalign.scoring import RewardConfig, RewardError, Scoring, load_reward
from rlalign.types import Prompt, Unit
from tests.scoring.helpers import numbered_images

Reply = Callable[[BaseHTTPRequestHandler, dict[str, Any]], object]


@dataclass
class Server:
    """Answers POSTs with `reply` and keeps what it was asked."""

    url: str = ""
    reply: Reply = lambda handler, asked: None
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append(asked)
            state.headers.append(dict(self.headers))
            state.reply(self, asked)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads = True
        state.url = f"http://127.0.0.1:{httpd.server_port}/score"
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        httpd.shutdown()
        thread.join()


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in (headers | {"Content-Length": str(len(body))}).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def says(answer: object, status: int = 200) -> Reply:
    return lambda handler, asked: send(handler, json.dumps(answer).encode(), status)


def pixels(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


def remote(server: Server, **settings: Any) -> Scoring:
    quick = {"use": server.url, "retries": 0, "backoff_s": 0.0, "timeout_s": 5.0}
    return Scoring([load_reward(RewardConfig(**quick | settings))])


def test_pictures_go_as_png_and_numbers_come_back(server: Server, images: Tensor, unit: Unit) -> None:
    def first_pixel(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        scores = [int(pixels(png)[0, 0, 0]) for png in asked["images"]]
        send(handler, json.dumps({"score": scores, "twice": [2 * score for score in scores]}).encode())

    server.reply = first_pixel
    scores = remote(server).score(images, unit)
    assert torch.equal(scores.total, torch.arange(12.0).reshape(3, 4))
    assert torch.equal(scores.rewards["score"].details["twice"], 2 * scores.total)
    assert server.asked[0]["schema"] == 1
    assert server.asked[0]["prompts"][4] == {"text": "cat 1", "negative": None, "metadata": {}}


def test_colours_and_video_frames_arrive_in_order(server: Server) -> None:
    video = torch.randint(0, 256, (2, 4, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    server.reply = says({"score": [1, 2]})
    remote(server).score(video, Unit(0, (0,), (Prompt("a", metadata={"tag": "colors"}),), samples=2))
    arrived = np.stack([[pixels(frame) for frame in frames] for frames in server.asked[0]["images"]])
    assert np.array_equal(arrived, video.permute(0, 1, 3, 4, 2).numpy())
    assert server.asked[0]["prompts"][0]["metadata"] == {"tag": "colors"}


def test_null_is_nan(server: Server, images: Tensor, unit: Unit) -> None:
    server.reply = says({"score": [None, *range(11)], "detail": [None] * 12})
    scores = remote(server, on_failure="drop_sample").score(images, unit)
    assert scores.valid.sum() == 11 and not scores.valid[0, 0]
    assert all(math.isnan(value) for value in scores.rewards["score"].details["detail"].flatten())


def test_the_token_comes_from_the_environment(
    server: Server, images: Tensor, unit: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEAUTY_TOKEN", "s3cret")
    server.reply = says({"score": [0] * 12})
    engine = remote(server, options={"token_env": "BEAUTY_TOKEN"})
    engine.score(images, unit)
    engine.score(images, unit)
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert server.headers[0]["Idempotency-Key"] == server.headers[1]["Idempotency-Key"]
    server.reply = says({"error": "bad token"}, status=401)
    with pytest.raises(RewardError, match="answered 401 Unauthorized") as caught:
        engine.score(images, unit)
    assert "s3cret" not in str(caught.value)


def test_no_token_no_header(server: Server, images: Tensor, unit: Unit) -> None:
    server.reply = says({"score": [0] * 12})
    remote(server).score(images, unit)
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (says({"error": "out of\nmemory"}, 500), 'answered 500 Internal Server Error: {"error": "out of'),
        (says({"score": [1.0] * 11}), "'score' as 11 numbers for 12 pictures"),
        (says({"points": [1.0] * 12}), "a dict without 'score'"),
        (says({"score": ["1.0"] * 12}), "a list with '1.0' in it"),
        (says({"score": "high"}), "'score' as 'high'"),
        (says([1.0] * 12), "answered with a JSON list, not with an object"),
        (lambda handler, asked: send(handler, b"\x80\x04pickle"), "answered something that is not JSON"),
        (lambda handler, asked: send(handler, b"[" * 100_000), "answered something that is not JSON"),
        (lambda handler, asked: send(handler, b""), "answered something that is not JSON: b''"),
        (lambda handler, asked: handler.connection.close(), "cannot be asked"),
    ],
)
def test_a_wrong_answer_is_told_in_words(server: Server, images: Tensor, unit: Unit, reply: Reply, said: str) -> None:
    server.reply = reply
    with pytest.raises(RewardError) as caught:
        remote(server).score(images, unit)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_error_is_tried_again(server: Server, images: Tensor, unit: Unit) -> None:
    def flaky(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        says({"score": [1.0] * 12}, 200 if len(server.asked) == 3 else 503)(handler, asked)

    server.reply = flaky
    engine = remote(server, retries=2)
    assert engine.score(images, unit).valid.all()
    assert engine.stats()["runtime/reward/score/errors"] == 2


def test_a_busy_server_is_asked_again_within_the_same_call(server: Server, images: Tensor, unit: Unit) -> None:
    def busy(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        if len(server.asked) < 3:
            return send(handler, b"come again", 503, **{"Retry-After": "0"})
        says({"score": [1.0] * 12})(handler, asked)

    server.reply = busy
    engine = remote(server)
    assert engine.score(images, unit).valid.all()
    assert engine.stats()["runtime/reward/score/errors"] == 0
    assert len({headers["Idempotency-Key"] for headers in server.headers}) == 1


def test_a_server_that_is_busy_for_too_long_has_failed(server: Server, images: Tensor, unit: Unit) -> None:
    server.reply = lambda handler, asked: send(handler, b"come again", 503, **{"Retry-After": "3600"})
    with pytest.raises(RewardError, match="answered 503 Service Unavailable: come again"):
        remote(server).score(images, unit)
    assert len(server.asked) == 1


def test_a_reward_that_compares_gets_one_group_in_a_call(server: Server, images: Tensor, unit: Unit) -> None:
    server.reply = says({"score": [1.0] * 4})
    remote(server, options={"groupwise": True}).score(images, unit)
    assert [{prompt["text"] for prompt in asked["prompts"]} for asked in server.asked] == [
        {"cat 0"},
        {"cat 1"},
        {"cat 2"},
    ]


def test_redirects_are_not_followed(server: Server, images: Tensor, unit: Unit) -> None:
    server.reply = lambda handler, asked: send(handler, b"", 307, Location=f"{server.url}/elsewhere")
    with pytest.raises(RewardError, match=r"redirects to .*/elsewhere, which is not followed; write the final URL"):
        remote(server).score(images, unit)
    assert len(server.asked) == 1


def test_an_oversized_answer_is_cut_off(server: Server, images: Tensor, unit: Unit) -> None:
    server.reply = lambda handler, asked: send(handler, b" " * 200_000)
    with pytest.raises(RewardError, match=r"more than 0\.1 MB \(option max_response_mb\)"):
        remote(server, options={"max_response_mb": 0.1}).score(images, unit)


def test_an_answer_is_never_unpacked(server: Server, images: Tensor, unit: Unit) -> None:
    packed = {"Content-Encoding": "gzip"}
    server.reply = lambda handler, asked: send(handler, gzip.compress(b'{"score": []}'), 200, **packed)
    with pytest.raises(RewardError, match="not JSON"):
        remote(server).score(images, unit)
    assert server.headers[0]["Accept-Encoding"] == "identity"


def test_a_silent_server_times_out(server: Server, images: Tensor, unit: Unit, release: threading.Event) -> None:
    server.reply = lambda handler, asked: release.wait()
    engine = remote(server, timeout_s=0.1)
    with pytest.raises(RewardError, match=r"no answer within 0\.1 s"):
        engine.score(images, unit)
    assert engine.stats()["runtime/reward/score/timeouts"] == 1


def test_a_dripping_server_times_out(server: Server, images: Tensor, unit: Unit, release: threading.Event) -> None:
    """Each piece is in time, all of them are not."""

    def drip(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not release.wait(0.02):
            handler.wfile.write(b" ")

    server.reply = drip
    with pytest.raises(RewardError, match=r"within 0\.15 s"):
        remote(server, timeout_s=0.15, name="drip").score(images, unit)
    deadline = time.monotonic() + 5
    while any(thread.name == "reward drip" for thread in threading.enumerate()):  # it ends by itself
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_nobody_listens(server: Server, images: Tensor, unit: Unit) -> None:
    engine = Scoring([load_reward(RewardConfig(use="http://127.0.0.1:9/score", retries=0))])
    with pytest.raises(RewardError, match="cannot be asked: ConnectError"):
        engine.score(images, unit)


def test_metadata_must_be_json(server: Server) -> None:
    unit = Unit(0, (0,), (Prompt("a", metadata={"mask": torch.zeros(2)}),), samples=2)
    with pytest.raises(RewardError, match="metadata cannot be sent as JSON: Object of type Tensor"):
        remote(server).score(numbered_images(2), unit)


def test_proxies_of_the_environment_are_not_asked(
    server: Server, images: Tensor, unit: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server.reply = says({"score": [0] * 12})
    assert remote(server).score(images, unit).valid.all()


@pytest.mark.parametrize(
    ("use", "options", "said"),
    [
        ("http://", {}, "names no host"),
        ("http://me:secret@host/score", {}, "a URL with a password would stand in every log"),
        ("http://host/score", {"token_env": "NO_SUCH_TOKEN"}, "the environment variable NO_SUCH_TOKEN"),
        ("http://host/score", {"token_evn": "X"}, "a URL has no option 'token_evn'; did you mean 'token_env'?"),
        ("http://host/score", {"max_response_mb": "much"}, "option 'max_response_mb': Input should be a valid number"),
    ],
)
def test_a_url_is_checked_when_it_is_loaded(use: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_reward(RewardConfig(use=use, options=options, name="beauty"))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
