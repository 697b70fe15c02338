"""Questions to a vision-language model behind an OpenAI-compatible endpoint (vLLM, SGLang, a provider).

Requests are POSTs to URL/chat/completions with pictures as PNG data URLs, a few at a time. The token stands in an
environment variable. Redirects are not followed, proxies and .netrc are not consulted. What cannot be reached, answers
with another status than 200 or answers something else than a completion fails the call, and the reward layer tries
again and does what `on_failure` says; an answer without the wanted number is NaN: "I cannot tell".
"""

import base64
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
from PIL import Image
from torch import Tensor

from rlalign.scoring.call import CallFailed, TimedOut

_MAX_BYTES = 4_000_000  # of an answer
_QUOTED = 200  # characters of a server's complaint that are repeated
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Endpoint:
    """Asks one model."""

    def __init__(self, url: str, model: str, token_env: str | None, timeout_s: float, parallel: int) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise ValueError(f"url {url!r} is no endpoint such as http://localhost:8000/v1, without a password")
        if parallel < 1 or timeout_s <= 0:
            raise ValueError("parallel and timeout_s have to be positive")
        self._url = f"{url.rstrip('/')}/chat/completions"
        self._model, self._timeout_s, self._parallel = model, timeout_s, parallel
        self._headers = {"Accept-Encoding": "identity"}
        if token_env is not None:
            token = os.environ.get(token_env, "").strip()
            if not token:
                raise ValueError(f"the environment variable {token_env}, which token_env names, is not set")
            self._headers["Authorization"] = f"Bearer {token}"
        self._ssl = httpx.create_ssl_context()

    def ask_all(self, ask: Callable[[httpx.Client, _Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """`ask(client, item)` of every item, in order, a few at a time; the first failure ends it."""
        with httpx.Client(timeout=self._timeout_s, trust_env=False, verify=self._ssl, headers=self._headers) as client:
            pool = ThreadPoolExecutor(self._parallel)
            try:
                return list(pool.map(lambda item: ask(client, item), items))
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def choice(self, client: httpx.Client, text: str, pictures: Sequence[Tensor], **extra: object) -> dict[str, Any]:
        """The first choice of the completion. pictures: uint8 [3, H, W] each"""
        shown = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in pictures]
        message = {"role": "user", "content": [*shown, {"type": "text", "text": text}]}
        body = {"model": self._model, "messages": [message], "temperature": 0, **extra}
        try:
            with client.stream("POST", self._url, json=body, follow_redirects=False) as response:
                answer = self._read(response)
        except httpx.TimeoutException:
            raise TimedOut(f"{self._url} gave no answer within {self._timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise CallFailed(f"{self._url} cannot be asked: {type(error).__name__}: {error}") from None
        return self._first_choice(answer)

    def _read(self, response: httpx.Response) -> bytes:
        answer = bytearray()
        for piece in response.iter_raw():
            answer += piece
            if len(answer) > _MAX_BYTES:
                raise CallFailed(f"{self._url} answered with more than {_MAX_BYTES / 1e6:g} MB")
        if response.status_code != httpx.codes.OK:
            said = " ".join(answer[:_QUOTED].decode(errors="replace").split())
            raise CallFailed(f"{self._url} answered {response.status_code} {response.reason_phrase}: {said}")
        return bytes(answer)

    def _first_choice(self, answer: bytes) -> dict[str, Any]:
        try:
            choice = json.loads(answer)["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, RecursionError, LookupError, TypeError):
            raise CallFailed(f"{self._url} answered something that is no completion: {answer[:60]!r}") from None
        if not isinstance(text, str | None):
            raise CallFailed(f"{self._url} answered with a {type(text).__name__} instead of text")
        return choice


def number_in(text: str | None, low: float, high: float) -> float:
    """The first number of a text; NaN if there is none or it is out of range."""
    found = _NUMBER.search(text or "")
    value = float(found[0]) if found else float("nan")
    return value if low <= value <= high else float("nan")


def top_tokens(choice: dict[str, Any]) -> dict[str, float]:
    """Log-probabilities of the likeliest first tokens; CallFailed where the server does not give any."""
    try:
        (first, *_) = choice["logprobs"]["content"]
        return {entry["token"]: float(entry["logprob"]) for entry in first["top_logprobs"]}
    except (LookupError, TypeError, ValueError):
        raise CallFailed("the endpoint gives no top_logprobs; choose another server, or mode: score") from None


def middle(picture: Tensor) -> Tensor:
    """A picture [3, H, W] itself, of a video [F, 3, H, W] its middle frame."""
    return picture if picture.ndim == 3 else picture[len(picture) // 2]


def _data_url(picture: Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(file, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
