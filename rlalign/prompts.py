"""Prompt sets: read once, de-duplicated; which prompts a step uses is a pure function of (seed, step)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlalign.mdp.noise import Noise
from rlalign.types import Prompt


@dataclass(frozen=True, slots=True)
class PromptSet:
    prompts: tuple[Prompt, ...]

    @staticmethod
    def read(path: Path) -> "PromptSet":
        """A .txt (a prompt a line), .jsonl ({"text": ..., "metadata": {...}}) or .parquet file. ValueError in words."""
        if not path.is_file():
            raise ValueError(f"there is no prompts file {path}")
        readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
        if path.suffix not in readers:
            raise ValueError(f"prompts file {path} must end in {', '.join(readers)}")
        try:
            prompts = readers[path.suffix](path)
        except UnicodeDecodeError as error:
            raise ValueError(f"prompts file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
        unique = {prompt_key(prompt): prompt for prompt in prompts}  # a dict keeps the place of the first of equals
        if not unique:
            raise ValueError(f"prompts file {path} holds no prompts; write one a line")
        return PromptSet(tuple(unique.values()))

    def at(self, seed: int, step: int, count: int) -> tuple[Prompt, ...]:
        """The prompts of a step: windows of ``count`` over a fresh permutation an epoch, joined end to end."""
        noise, size = Noise(seed), len(self.prompts)
        places = range(step * count, (step + 1) * count)
        orders = {epoch: noise.permutation("prompts", (epoch, 0, 0), size) for epoch in {p // size for p in places}}
        return tuple(self.prompts[int(orders[place // size][place % size])] for place in places)

    def first(self, count: int) -> tuple[Prompt, ...]:
        """The first ``count``, going round when there are fewer."""
        return tuple(self.prompts[i % len(self.prompts)] for i in range(count))


def prompt_key(prompt: Prompt) -> str:
    return json.dumps([prompt.text, prompt.negative, prompt.metadata], sort_keys=True, default=str)


def _read_text(path: Path) -> list[Prompt]:
    return [Prompt(line.strip()) for line in _lines(path) if line.strip()]


def _read_jsonl(path: Path) -> list[Prompt]:
    lines = enumerate(_lines(path), start=1)
    return [_prompt(_parsed(line, f"{path}, line {n}"), f"{path}, line {n}") for n, line in lines if line.strip()]


def _lines(path: Path) -> list[str]:
    """Lines as JSON counts them: U+2028 and its like may stand inside a text."""
    return path.read_text("utf-8-sig").split("\n")


def _read_parquet(path: Path) -> list[Prompt]:
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-not-found]  # an optional reader
    except ModuleNotFoundError:
        raise ValueError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    rows: Sequence[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return [_prompt(row, f"{path}, row {n}") for n, row in enumerate(rows)]


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg}") from None


def _prompt(row: Any, where: str) -> Prompt:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"].strip():
        raise ValueError(f'{where} needs a "text" that is not empty, as in {{"text": "a red circle"}}')
    strange = row.keys() - {"text", "negative", "metadata"}
    if strange:
        raise ValueError(f"{where} has the unknown key {sorted(strange)[0]!r}; text, negative and metadata are known")
    if not isinstance(row.get("negative"), str | None) or not isinstance(row.get("metadata"), dict | None):
        raise ValueError(f"{where}: negative must be a text and metadata a mapping")
    return Prompt(row["text"], row.get("negative"), row.get("metadata") or {})
