"""A reward on another machine: pictures go over HTTP as PNG in JSON or as safetensors, numbers come back as JSON.

`rlalign serve-reward` is such a server, and any other will do that knows `rlalign.scoring.wire`: the request is a POST
with {"schema": 1, "images": [PNG in base64, ...], "prompts": [{"text", "negative", "metadata"}, ...]}, one prompt an
image; a video is a list of its frames' PNGs. The image or video that a sample is made from stands beside the text of
its prompt, as "image" or "video" in the same form. The answer has status 200 and {"score": [number, ...]}, one number
an image, `null` for "I cannot tell"; every other key is a detail for the log, of the same length.

    rewards:
      - {use: "https://scorer.example/beauty", batch_size: 16, options: {token_env: BEAUTY_TOKEN}}

The token stands in an environment variable, never in the run file, and is sent as `Authorization: Bearer ...`; outside
a network you trust use https, since a token over http can be read on the way. Redirects are not followed, proxies and
.netrc are not consulted, and an answer over a size limit is refused. Equal requests carry equal `Idempotency-Key`s, so
that a server can tell a call that is tried again from a new one. A server that answers 503 with `Retry-After` is asked
again within the same call, as long as its time lasts.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
from pydantic import Field
from torch import Tensor

from rlalign.scoring import wire
from rlalign.scoring.call import CallFailed, TimedOut
from rlalign.settings import Settings
from rlalign.types import Prompt

Format = Literal["png", "safetensors"]

_QUOTED = 300  # characters of a server's complaint that are repeated


class RemoteOptions(Settings):
    """The `options` of a reward that is a URL."""

    token_env: str | None = None
    """The environment variable that holds the bearer token."""
    max_response_mb: float = Field(default=4.0, gt=0)
    """A longer answer is refused."""
    format: Format = "png"
    """How pictures are sent: every server takes png; safetensors needs no packing, and `rlalign serve-reward`."""
    groupwise: bool = False
    """The reward there compares: it gets all pictures of one prompt, and nothing else, in a call."""


class RemoteReward:
    """Asks a server for the scores; blocks until its answer is complete or the time is up."""

    def __init__(self, url: str, timeout_s: float, options: RemoteOptions) -> None:
        self._url = _checked(url)
        self._timeout_s = timeout_s
        self._max_bytes = int(options.max_response_mb * 1e6)
        self._format: Format = options.format
        self._headers = {
            "Content-Type": wire.JSON if options.format == "png" else wire.SAFETENSORS,
            "Accept": "application/json",
            "Accept-Encoding": "identity",
        }
        if options.token_env is not None:
            self._headers["Authorization"] = f"Bearer {_token(options.token_env)}"
        self._ssl = httpx.create_ssl_context()  # reading the certificates takes longer than a request

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Any]:
        answer = self._post(_request(images, prompts, self._format))
        try:
            parsed = json.loads(answer)
        except (ValueError, RecursionError):
            raise CallFailed(f"{self._url} answered something that is not JSON: {answer[:60]!r}") from None
        if not isinstance(parsed, dict):
            raise CallFailed(f"{self._url} answered with a JSON {type(parsed).__name__}, not with an object")
        return {key: _with_nan(value) for key, value in parsed.items()}

    def _post(self, body: bytes) -> bytes:
        headers = self._headers | {"Idempotency-Key": hashlib.sha256(body).hexdigest()}
        deadline = time.monotonic() + self._timeout_s
        try:
            with httpx.Client(timeout=self._timeout_s, trust_env=False, verify=self._ssl) as client:
                while True:
                    response, answer = self._once(client, body, headers, deadline)
                    pause = _pause(response)
                    if pause is None or time.monotonic() + pause > deadline:
                        break
                    time.sleep(pause)
        except httpx.TimeoutException:
            raise TimedOut(f"{self._url} gave no answer within {self._timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise CallFailed(f"{self._url} cannot be asked: {type(error).__name__}: {error}") from None
        self._check_status(response, answer)
        return answer

    def _once(
        self, client: httpx.Client, body: bytes, headers: dict[str, str], deadline: float
    ) -> tuple[httpx.Response, bytes]:
        with client.stream("POST", self._url, content=body, headers=headers, follow_redirects=False) as response:
            return response, self._read(response, deadline)

    def _read(self, response: httpx.Response, deadline: float) -> bytes:
        """The whole answer as it came, undecoded: a compressed one could unpack to any size."""
        answer = bytearray()
        for piece in response.iter_raw():
            answer += piece
            if len(answer) > self._max_bytes:
                limit = f"{self._max_bytes / 1e6:g} MB (option max_response_mb)"
                raise CallFailed(f"{self._url} answered with more than {limit}")
            if time.monotonic() > deadline:  # httpx counts the time between pieces only
                raise TimedOut(f"{self._url} did not finish its answer within {self._timeout_s:g} s")
        return bytes(answer)

    def _check_status(self, response: httpx.Response, answer: bytes) -> None:
        if response.is_redirect:
            target = response.headers.get("location", "nowhere")
            raise CallFailed(f"{self._url} redirects to {target}, which is not followed; write the final URL")
        if response.status_code != httpx.codes.OK:
            said = " ".join(answer[:_QUOTED].decode(errors="replace").split())
            raise CallFailed(f"{self._url} answered {response.status_code} {response.reason_phrase}: {said}")


def _pause(response: httpx.Response) -> float | None:
    """Seconds after which a busy server wants to be asked again."""
    after = response.headers.get("retry-after", "")
    return float(after) if response.status_code == httpx.codes.SERVICE_UNAVAILABLE and after.isdecimal() else None


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if not parts.hostname:
        raise ValueError(f"{url!r} names no host")
    if parts.username or parts.password:
        raise ValueError("a URL with a password would stand in every log; put a token in the variable of token_env")
    return url


def _token(variable: str) -> str:
    token = os.environ.get(variable, "").strip()
    if not token:
        raise ValueError(f"the environment variable {variable}, which token_env names, is not set")
    return token


def _request(images: Tensor, prompts: Sequence[Prompt], format: Format = "png") -> bytes:
    try:
        return (wire.as_json if format == "png" else wire.as_safetensors)(images, prompts)
    except TypeError as error:
        raise CallFailed(f"a prompt's metadata cannot be sent as JSON: {error}") from None


def _with_nan(value: Any) -> Any:
    """JSON's null among numbers is our NaN."""
    return [math.nan if number is None else number for number in value] if isinstance(value, list) else value
