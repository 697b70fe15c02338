"""The front process of a reward service: who may ask, what is too much, what was asked before. Scoring is the crew's.

    POST /score   (also / and /NAME) pictures and prompts as in `rlalign.scoring.wire`; 200 {"score": [...], ...}
    GET /health   200 when workers are up, 503 while none is or when the service is ending; needs no token
    GET /metrics  for Prometheus
    GET /schema   JSON Schema of a request

Whatever is refused is one sentence of plain text: 400 and 422 malformed, 401 no token or a wrong one, 408 too slow, 413
too large, 415 another format, 500 the reward raised, 503 busy or ending (with Retry-After), 504 the reward hangs.

A request with an `Idempotency-Key` that is sent again, after a timeout or a lost connection, gets the answer of the
first one, also while that is still being scored. Failures are not kept: those are tried again.
"""

import asyncio
import hashlib
import logging
import math
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

from rlalign.scoring import RewardConfig, wire
from rlalign.serving import token as tokens
from rlalign.serving.batches import Outcome, Refusal
from rlalign.serving.config import ServeConfig
from rlalign.serving.crew import Crew
from rlalign.serving.meters import CONTENT_TYPE, Meters
from rlalign.types import Prompt

BUSY_S, ENDING_S = 1, 5  # after which to come again
ARRIVE_S = 60.0  # for the whole body
LONGEST_KEY = 200


@dataclass(slots=True)
class Remembered:
    """A request with a key: what it said, and its outcome or whoever is at it."""

    digest: bytes
    outcome: asyncio.Task[Outcome]


class Service:
    """Made inside of the event loop."""

    def __init__(self, config: ServeConfig, crew: Crew, name: str, token: str | None) -> None:
        self.config, self.crew, self.token, self.meters = config, crew, token, crew.meters
        self.ending = False
        self._reading = 0
        self._open: set[asyncio.Task[Outcome]] = set()
        self._known: dict[str, Remembered] = {}
        self.app = web.Application(client_max_size=round(config.max_mb * 1e6), middlewares=[self._in_words])
        for path in dict.fromkeys(("/", "/score", f"/{name}")):
            self.app.router.add_post(path, self._score)
        self.app.router.add_get("/health", self._health)
        self.app.router.add_get("/metrics", self._metrics)
        self.app.router.add_get("/schema", self._schema)

    async def finish(self) -> None:
        """Nothing new from now on; returns when all that was accepted is answered, or time is up."""
        self.ending = True
        if self._open:
            await asyncio.wait(self._open, timeout=self.config.drain_s)

    # --- what is asked

    async def _score(self, request: web.Request) -> web.Response:
        started = time.monotonic()
        self._check(request)
        key = request.headers.get("Idempotency-Key")
        if key is not None and len(key) > LONGEST_KEY:
            raise Refusal(400, f"the Idempotency-Key is longer than {LONGEST_KEY} letters")
        if key not in self._known:
            self._make_room()
        body = await self._body(request)
        outcome = await asyncio.shield(self._outcome(key, request.headers["Content-Type"], body))
        self.meters.seconds.observe(time.monotonic() - started)
        if isinstance(outcome, Refusal):
            raise outcome
        return web.json_response({name: _with_null(numbers) for name, numbers in outcome.items()})

    async def _health(self, request: web.Request) -> web.Response:
        workers = len(self.crew.pids)
        state = "ending" if self.ending else "ok" if workers else "no workers"
        said = {"status": state, "workers": workers, "schema": wire.SCHEMA}
        return web.json_response(said, status=200 if state == "ok" else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        self._require_token(request)
        return web.Response(body=self.meters.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _schema(self, request: web.Request) -> web.Response:
        return web.json_response(wire.Asked.model_json_schema())

    # --- who and what is let in

    def _check(self, request: web.Request) -> None:
        """Before a byte of the body is read."""
        self._require_token(request)
        kinds = (wire.JSON, wire.SAFETENSORS, wire.MULTIPART)
        if request.content_type not in kinds:
            raise Refusal(415, f"the Content-Type is {request.content_type}; send {', '.join(kinds)}")
        if not request.headers["Content-Type"].isascii():
            raise Refusal(400, "the Content-Type has letters that no header may have")
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise Refusal(415, "a compressed request is not unpacked here; send it as it is")
        if (request.content_length or 0) > self.config.max_mb * 1e6:
            raise self._too_large()

    def _require_token(self, request: web.Request) -> None:
        wrong = tokens.refusal(request.headers.get("Authorization"), self.token)
        if wrong:
            raise Refusal(401, wrong)

    def _make_room(self) -> None:
        if self.ending:
            raise Refusal(503, "the server is ending and takes nothing new", ENDING_S)
        if self.crew.lost.done():
            raise Refusal(503, self.crew.lost.result())
        if self._reading + len(self._open) >= self.config.max_waiting:
            raise Refusal(503, f"{self.config.max_waiting} requests are waiting already; come again", BUSY_S)

    async def _body(self, request: web.Request) -> bytes:
        self._reading += 1
        self._count()
        try:
            async with asyncio.timeout(ARRIVE_S):
                return await request.read()
        except TimeoutError:
            raise Refusal(408, f"the request did not arrive within {ARRIVE_S:g} s") from None
        except web.HTTPRequestEntityTooLarge:
            raise self._too_large() from None
        except (ConnectionError, web.RequestPayloadError):
            raise Refusal(400, "the request did not arrive whole") from None
        finally:
            self._reading -= 1
            self._count()

    def _too_large(self) -> Refusal:
        return Refusal(
            413, f"the request is larger than {self.config.max_mb:g} MB (--set max_mb=...); send fewer pictures"
        )

    # --- once and no more

    def _outcome(self, key: str | None, kind: str, body: bytes) -> asyncio.Task[Outcome]:
        """Of this request, or of an equal one before it."""
        digest = hashlib.sha256(kind.encode() + b"\n" + body).digest()
        known = self._known.get(key) if key is not None else None
        if known is not None and known.digest != digest:
            raise Refusal(422, "this Idempotency-Key belongs to another request; a new request needs a new one")
        if known is not None:
            self.meters.repeats.inc()
            return known.outcome
        self._make_room()  # others may have come while the body did
        task = asyncio.create_task(self._scored(kind, body))
        self._open.add(task)
        self._count()
        if key is not None:
            self._known[key] = Remembered(digest, task)
        task.add_done_callback(lambda done: self._ended(key, done))
        return task

    def _ended(self, key: str | None, task: asyncio.Task[Outcome]) -> None:
        self._open.discard(task)
        self._count()
        if key is None:
            return
        if task.cancelled() or task.exception() is not None or isinstance(task.result(), Refusal):
            del self._known[key]
        else:
            asyncio.get_running_loop().call_later(self.config.remember_s, self._known.pop, key, None)

    async def _scored(self, kind: str, body: bytes) -> Outcome:
        budget = wire.Budget(self.config.max_pictures, round(self.config.max_megapixels * 1e6))
        try:
            images, prompts = await asyncio.to_thread(wire.read, kind, body, budget)
        except wire.Malformed as error:
            return Refusal(error.status, str(error))
        if self.crew.groupwise and not _alike(prompts):
            return Refusal(422, "this reward compares pictures of one prompt; ask it with options: {groupwise: true}")
        return await self.crew.score(images, prompts)

    def _count(self) -> None:
        self.meters.waiting.set(self._reading + len(self._open))

    @web.middleware
    async def _in_words(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = await handler(request)
        except Refusal as error:
            response = web.Response(status=error.status, text=f"{error}\n", headers=error.headers)
            if error.status == 401:
                response.headers["WWW-Authenticate"] = "Bearer"
        except web.HTTPException as error:  # aiohttp's own: 404, 405
            response = web.Response(status=error.status, text=f"{error.reason}; POST to /score, or GET /health\n")
        response.headers["Server"] = "rlalign"  # not which versions of what
        self.meters.requests.labels(str(response.status)).inc()
        return response


def _alike(prompts: list[Prompt]) -> bool:
    first, *others = [(prompt.text, prompt.negative, prompt.metadata) for prompt in prompts]
    return all(other == first for other in others)


def _with_null(numbers: list[float]) -> list[float | None]:
    """JSON has neither NaN nor infinity."""
    return [number if math.isfinite(number) else None for number in numbers]


# --- from start to end


async def serve(
    reward: RewardConfig, folder: Path, config: ServeConfig, token: str | None, announce: Callable[[str], None]
) -> None:
    """Until SIGTERM or SIGINT; ValueError, one sentence, when it cannot begin or no worker is left."""
    listening = bound(config.host, config.port)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    this = asyncio.current_task()
    assert this is not None

    def end() -> None:
        if stop.is_set():
            this.cancel()  # asked twice
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    logging.getLogger("aiohttp.server").addFilter(is_our_fault)
    crew = Crew(reward, folder, config, Meters())
    try:
        if not await _first(crew.start(), stop.wait()):
            return
        service = Service(config, crew, reward.name, token)
        runner = web.AppRunner(service.app, access_log=None)
        await runner.setup()
        await web.SockSite(runner, listening).start()
        announce(f"http://{_shown(config.host)}:{listening.getsockname()[1]}")
        await _first(asyncio.shield(crew.lost), stop.wait())
        await service.finish()
        await runner.cleanup()
        if crew.lost.done():
            raise ValueError(crew.lost.result())
    finally:
        await crew.close()
        listening.close()


def bound(host: str, port: int) -> socket.socket:
    """Taken before the reward is loaded, which may take minutes."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listening


def is_our_fault(record: logging.LogRecord) -> bool:
    """Requests that are no HTTP are answered with 400; whoever sends them must not fill the log."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


async def _first(work: Awaitable[object], stop: Awaitable[object]) -> bool:
    """Whether the work came to its end before it was to stop; raises what it raised."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(stop)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
        return tasks[0].done()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
