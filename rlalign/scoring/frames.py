"""What a parent and the child with its reward say to each other: JSON or safetensors with its length in front."""

import asyncio
import json
import struct
from typing import IO, Any

LENGTH = struct.Struct(">Q")


def write(file: IO[bytes], body: bytes) -> None:
    file.write(LENGTH.pack(len(body)))
    file.write(body)
    file.flush()


def write_json(file: IO[bytes], value: Any) -> None:
    write(file, json.dumps(value).encode())


def read(file: IO[bytes]) -> bytes | None:
    """None when the other side is gone."""
    head = file.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    body = file.read(LENGTH.unpack(head)[0])
    return body if len(body) == LENGTH.unpack(head)[0] else None


async def send(stream: asyncio.StreamWriter, body: bytes) -> None:
    stream.write(LENGTH.pack(len(body)))
    stream.write(body)
    await stream.drain()


async def receive(stream: asyncio.StreamReader) -> Any:
    """asyncio.IncompleteReadError when the other side is gone."""
    (length,) = LENGTH.unpack(await stream.readexactly(LENGTH.size))
    return json.loads(await stream.readexactly(length))
