"""The front of the service: who is let in, what is too much, what was asked before. The crew is a stand-in."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer

from rlalign.commands.serve_reward import Wish, _config, _reward, serve_reward
from rlalign.scoring import Reward, RewardConfig, environment, load_reward, wire
from rlalign.scoring.call import call
from rlalign.scoring.child import scored
from rlalign.serving import token as tokens
from rlalign.serving.batches import Job, Queue, Refusal
from rlalign.serving.config import ServeConfig
from rlalign.serving.meters import Meters
from rlalign.serving.server import Service, is_our_fault
from rlalign.types import Prompt
from tests.serving.rewards import numbered, numbers_of

TOKEN = "correct-horse-battery-staple"
GOOD = {"Content-Type": wire.JSON, "Authorization": f"Bearer {TOKEN}"}


class Crew:
    """Scores with a picture's number, once it may."""

    def __init__(self) -> None:
        self.meters, self.pids, self.groupwise = Meters(), [1], False
        self.lost: asyncio.Future[str] = asyncio.Future()
        self.go = asyncio.Event()
        self.go.set()
        self.scored: list[int] = []
        self.outcome: Any = None

    async def score(self, images: Any, prompts: Any) -> Any:
        await self.go.wait()
        self.scored += numbers_of(images)
        return self.outcome or {"score": [float(number) for number in numbers_of(images)]}


Visit = Callable[[TestClient, Crew, Service], Awaitable[None]]


def visited(visit: Visit, token: str | None = TOKEN, **settings: Any) -> None:
    async def main() -> None:
        crew = Crew()
        service = Service(ServeConfig(**settings), crew, "beauty", token)  # pyright: ignore[reportArgumentType]
        async with TestClient(TestServer(service.app)) as client:
            await visit(client, crew, service)

    asyncio.run(main())


def body(*numbers: int) -> bytes:
    return wire.as_json(numbered(numbers), [Prompt("a cat")] * len(numbers))


async def post(client: TestClient, *numbers: int, path: str = "/beauty", **headers: str) -> tuple[int, str]:
    async with client.post(path, data=body(*numbers), headers=GOOD | headers) as response:
        return response.status, await response.text()


async def sentence(response: ClientResponse) -> str:
    text = await response.text()
    assert text.endswith("\n") and text.count("\n") == 1
    return text.strip()


@pytest.mark.parametrize("path", ["/", "/score", "/beauty"])
def test_numbers_come_back(path: str):
    async def visit(client: TestClient, crew: Crew, service: Service) -> None:
        assert await post(client, 3, 1, path=path) == (200, '{"score": [3.0, 1.0]}')

    visited(visit)


def test_nan_and_infinity_are_null():
    async def visit(client: TestClient, crew: Crew, service: Service) -> None:
        crew.outcome = {"score": [float("nan"), float("inf"), 1.0]}
        assert await post(client, 1, 2, 3) == (200, '{"score": [null, null, 1.0]}')

    visited(visit)


@pytest.mark.parametrize(
    ("status", "said", "headers"),
    [
        (401, "the token is wrong", {"Authorization": "Bearer wrong"}),
        (401, "the token is wrong", {"Authorization": f"Basic {TOKEN}"}),
        (401, "the token is wrong", {"Authorization": "Bearer \xfc"}),
        (415, "the Content-Type is text/plain; send application/json, ", {"Content-Type": "text/plain"}),
        (400, "the Content-Type has letters that no header", {"Content-Type": "application/json; charset=\xfc"}),
        (415, "a compressed request is not unpacked here", {"Content-Encoding": "gzip"}),
        (400, "the Idempotency-Key is longer than 200 letters", {"Idempotency-Key": "k" * 201}),
    ],
)
def test_who_is_not_let_in(status: int, said: str, headers: dict[str, str]):
    async def visit(client: TestClient, crew: Crew, service: Service) -> None:
        # Not the client's own machinery: it would compress what it says is compressed.
        async with client.post(
            "/", data=b"" if "Content-Encoding" in headers else body(1), headers=GOOD | headers, skip_auto_headers=["x"]
        ) as response:
            assert response.status == status and said in await sentence(response)
        assert not crew.scored

    visited(visit)


def test_without_a_token_nothing_but_health_answers():
    async def visit(client: TestClient, crew: Crew, service: Service) -> None:
        async with client.post("/", data=body(1), headers={"Content-Type": wire.JSON}) as response:
            assert response.status == 401 and response.headers["WWW-Authenticate"] == "Bearer"
            assert "send it as `Authorization: Bearer TOKEN`" in await sentence(response)
        async with client.get("/metrics") as response:
            assert response.status == 401
        async with client.get("/health") as response:
            assert await response.json() == {"status": "ok", "workers": 1, "schema": 1}
        async with client.get("/nowhere") as response:
            assert response.status == 404 and "POST to /score" in await sentence(response)
        assert "aiohttp" not in response.headers["Server"]

    visited(visit)


@pytest.mark.parametrize("chunked", [False, True])
def test_an_oversized_request_is_refused(chunked: bool):
    async def visit(client: TestClient, crew: Crew, service: Service) -> None:
        async def pieces():
            for _ in range(20):
                yield bytes(1000)

        async with client.post("/", data=pieces() if chunked else bytes(20_000), headers=GOOD) as response:
            assert response.status == 413
            assert (
                await sentence(response) == "the request is larger than 0.01 MB (--set max_mb=...); send fewer pictures"
            )

    visited(visit, max_mb=0.01)


def test_malformed_requests_are_refused_in_words():
    async def visit(client: TestClient, crew: Crew, service: Service) -> None:
        for data, status, said in ((b"{", 400, "not JSON"), (b"{}", 422, "prompts: Field required")):
            async with client.post("/", data=data, headers=GOOD) as response:
                assert response.status == status and said in await sentence(response)

    visited(visit)


def test_who_hangs_up_or_speaks_no_http_fills_no_log(caplog: pytest.LogCaptureFixture):
    async def visit(client: TestClient, crew: Crew, service: Service) -> None:
        for length in (b"1000", b"-5"):
            head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: " + length
            reader, writer = await asyncio.open_connection(client.host, client.port)
            writer.write(head + b"\r\n\r\n{")
            await writer.drain()
            while length == b"1000" and not service._reading:
                await asyncio.sleep(0.01)
            if length == b"-5":
                assert b" 400 " in await reader.readline()
            writer.close()
            await writer.wait_closed()
        while service._reading:
            await asyncio.sleep(0.01)
        assert await post(client, 1) == (200, '{"score": [1.0]}')

    logging.getLogger("aiohttp.server").addFilter(is_our_fault)
    visited(visit, token=None)
    assert not caplog.records


def test_an_equal_request_is_scored_once():
    """After the answer, in the midst of it, and when whoever asked first has hung up."""

    async def visit(client: TestClient, crew: Crew, service: Service) -> None:
        key = {"Idempotency-Key": "k"}
        crew.go.clear()
        first = asyncio.create_task(post(client, 5, **key))
        second = asyncio.create_task(post(client, 5, **key))
        while len(service._open) < 1:
            await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0.05)
        crew.go.set()
        assert await second == await post(client, 5, **key) == (200, '{"score": [5.0]}')
        assert crew.scored == [5]
        assert await post(client, 5) == (200, '{"score": [5.0]}')  # without a key nobody can tell
        assert crew.scored == [5, 5]
        status, said = await post(client, 6, **key)
        assert status == 422 and said.startswith("this Idempotency-Key belongs to another request")

    visited(visit)


def test_a_failure_is_not_kept():
    async def visit(client: TestClient, crew: Crew, service: Service) -> None:
        crew.outcome = Refusal(500, "the reward failed: out of luck")
        assert await post(client, 5, **{"Idempotency-Key": "k"}) == (500, "the reward failed: out of luck\n")
        crew.outcome = None
        assert (await post(client, 5, **{"Idempotency-Key": "k"}))[0] == 200

    visited(visit)


def test_answers_are_forgotten_in_time():
    async def visit(client: TestClient, crew: Crew, service: Service) -> None:
        await post(client, 5, **{"Idempotency-Key": "k"})
        await asyncio.sleep(0.1)
        await post(client, 5, **{"Idempotency-Key": "k"})
        assert crew.scored == [5, 5]

    visited(visit, remember_s=0.05)


def test_a_reward_that_compares_gets_the_pictures_of_one_prompt():
    async def visit(client: TestClient, crew: Crew, service: Service) -> None:
        crew.groupwise = True
        assert (await post(client, 1, 2))[0] == 200
        data = wire.as_json(numbered([1, 2]), [Prompt("a cat"), Prompt("a dog")])
        async with client.post("/", data=data, headers=GOOD) as response:
            assert response.status == 422
            assert "pictures of one prompt; ask it with options: {groupwise: true}" in await sentence(response)

    visited(visit)


def test_a_full_house_says_when_to_come_again():
    async def visit(client: TestClient, crew: Crew, service: Service) -> None:
        crew.go.clear()
        first = asyncio.create_task(post(client, 1, **{"Idempotency-Key": "k"}))
        while len(service._open) < 1:
            await asyncio.sleep(0.01)
        async with client.post("/", data=body(2), headers=GOOD) as response:
            assert response.status == 503 and response.headers["Retry-After"] == "1"
            assert await sentence(response) == "1 requests are waiting already; come again"
        again = asyncio.create_task(post(client, 1, **{"Idempotency-Key": "k"}))  # is in already
        crew.go.set()
        assert (await first)[0] == (await again)[0] == 200

    visited(visit, max_waiting=1)


def test_without_workers_it_is_not_healthy():
    async def visit(client: TestClient, crew: Crew, service: Service) -> None:
        crew.pids = []
        async with client.get("/health") as response:
            assert response.status == 503 and (await response.json())["status"] == "no workers"
        crew.lost.set_result("no worker is left, each died 6 times in a row")
        assert await post(client, 1) == (503, "no worker is left, each died 6 times in a row\n")

    visited(visit)


def test_metrics_are_what_prometheus_reads():
    async def visit(client: TestClient, crew: Crew, service: Service) -> None:
        await post(client, 5, **{"Idempotency-Key": "k"})
        await post(client, 5, **{"Idempotency-Key": "k"})
        async with client.get("/metrics", headers=GOOD) as response:
            text = await response.text()
            assert response.content_type == "text/plain"
        assert 'rlalign_reward_requests_total{status="200"} 2.0' in text
        assert "rlalign_reward_repeats_total 1.0" in text
        assert "rlalign_reward_waiting 0.0" in text

    visited(visit)


def test_the_schema_can_be_asked_for():
    async def visit(client: TestClient, crew: Crew, service: Service) -> None:
        async with client.get("/schema") as response:
            assert {"schema", "images", "prompts"} == (await response.json())["properties"].keys()

    visited(visit)


# --- batches


def taken(*sizes: tuple[int, int], alone: int | None = None, **settings: Any) -> list[list[int]]:
    """Which requests, each of so many pictures of such a size, share a call."""

    async def main() -> list[list[int]]:
        queue = Queue(settings.get("batch_size", 4), 0.01)
        queue.groupwise = settings.get("groupwise", False)
        jobs = [
            Job(numbered([0] * count, size), [Prompt("a")] * count, asyncio.get_running_loop().time())
            for count, size in sizes
        ]
        for number, job in enumerate(jobs):
            job.alone = number == alone
            await queue.put(job)
        found: list[list[int]] = []
        while sum(map(len, found)) < len(jobs):
            found.append([jobs.index(job) for job in await queue.take()])
        return found

    return asyncio.run(main())


def test_requests_share_calls_up_to_the_batch_size():
    assert taken((1, 8), (1, 8), (2, 8), (1, 8)) == [[0, 1, 2], [3]]
    assert taken((3, 8), (2, 8), (1, 8)) == [[0], [1, 2]]
    assert taken((9, 8), (1, 8)) == [[0], [1]]


def test_pictures_of_other_sizes_are_other_calls():
    assert taken((1, 8), (1, 4), (1, 8)) == [[0, 2], [1]]


def test_groups_and_suspects_stay_alone():
    assert taken((1, 8), (1, 8), groupwise=True) == [[0], [1]]
    assert taken((1, 8), (1, 8), (1, 8), alone=0) == [[0], [1, 2]]


# --- a worker


def test_a_worker_gives_the_reward_its_own_numbers():
    """To the last bit, also of a differentiable reward, which is given floats."""
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prompts = [Prompt("a cat")] * 5
    for name in ("saturation", "jpeg_compressibility"):
        reward = load_reward(RewardConfig(use=name))
        answer = json.loads(json.dumps(scored(reward, wire.as_safetensors(images, prompts))))
        assert torch.equal(torch.tensor(answer["columns"]["score"]), call(reward, images, prompts).score)


@pytest.mark.parametrize(
    ("function", "answer"),
    [
        (lambda images, prompts: [1.0], {"error": "it returned 1 numbers for 2 pictures"}),
        (
            lambda images, prompts: {"points": [1, 2]},
            {"error": "it returned a dict without 'score'; its keys are ['points']"},
        ),
        (lambda images, prompts: {"score": [1, 2], "why": [3, 4]}, {"columns": {"score": [1, 2], "why": [3, 4]}}),
    ],
)
def test_a_worker_checks_what_the_reward_returned(function: Any, answer: dict[str, Any]):
    reward = Reward(RewardConfig(use="own:reward"), function)
    assert scored(reward, wire.as_safetensors(numbered([1, 2]), [Prompt("a")] * 2)) == answer


# --- the token and the command line


def test_a_wider_address_needs_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RLALIGN_HOME", str(tmp_path / "home"))
    assert tokens.required("127.0.0.1", None) is None
    path = tokens.required("0.0.0.0", None)
    assert path == tmp_path / "home" / "reward_token" and path.stat().st_mode & 0o777 == 0o600
    assert len(tokens.read(path)) == 64
    assert tokens.required("0.0.0.0", None) == path  # the same again


def test_a_token_that_others_can_read_is_closed_to_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("rlalign"), "propagate", True)
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o644)
    assert tokens.read(path) == TOKEN
    assert path.stat().st_mode & 0o777 == 0o600 and "could be read by others" in caplog.text


@pytest.mark.parametrize("words", ["", "short", "two words that are long enough", "ü" * 20])
def test_a_token_must_be_one_strong_word(words: str, tmp_path: Path):
    path = tmp_path / "token"
    path.write_text(words)
    with pytest.raises(ValueError, match="must be one word of at least 16 letters"):
        tokens.read(path)


def wish(**changes: Any) -> Wish:
    plain = {"name": "ocr", "options": [], "host": "127.0.0.1", "port": 0, "workers": 1, "token_file": None}
    return Wish(**plain | {"gpus": None, "more": []} | changes)


def test_settings_are_checked_when_it_starts():
    assert _config(wish(gpus="0, 1", more=["batch_size=8"])) == ServeConfig(port=0, gpus=("0", "1"), batch_size=8)
    with pytest.raises(Exception, match="--set has no key 'batchsize'; did you mean 'batch_size'"):
        _config(wish(more=["batchsize=8"]))
    with pytest.raises(Exception, match="batch_size: Input should be greater than or equal to 1, not 0"):
        _config(wish(more=["batch_size=0"]))
    assert _reward(wish(options=["a.b=1"]), ServeConfig()).options == {"a": {"b": 1}}
    with pytest.raises(Exception, match="is a URL already"):
        _reward(wish(name="http://host/beauty"), ServeConfig())


def test_an_environment_of_its_own_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[tuple[str, ...]] = []
    started: list[list[str]] = []
    python = tmp_path / "env" / "bin" / "python"

    def run(what: str, *command: str) -> None:
        ran.append(command)
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()

    monkeypatch.setattr(environment, "_run", run)
    monkeypatch.setattr("os.execv", lambda program, arguments: started.append(arguments))
    monkeypatch.setattr("asyncio.run", lambda main: main.close())
    for packages in (["hpsv2"], ["hpsv2"], ["hpsv2", "transformers<5"]):
        serve_reward(wish(name="a.py:b", options=["c=1"], venv=tmp_path / "env", pip=packages, more=["fill=true"]))
    made, packages, ourselves, more, _ = ran  # and nothing the second time
    assert made[1:] == ("-m", "venv", str(tmp_path / "env"))
    assert packages[-1] == "hpsv2" and more[-2:] == ("hpsv2", "transformers<5")
    assert "torch" in packages and "--no-deps" in ourselves
    assert started[0][1:4] == ["-m", "rlalign", "serve-reward"]
    assert started[0][-5:] == ["--set", "fill=true", "--", "a.py:b", "c=1"]
    with pytest.raises(Exception, match="--pip says what to install in --venv DIR; give both"):
        serve_reward(wish(pip=["hpsv2"]))
