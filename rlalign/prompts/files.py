"""Prompt files: .txt, .jsonl and .parquet."""

from pathlib import Path
from typing import Any

from rlalign.prompts.rows import Row, of_a_table, parsed, row_of
from rlalign.types import Prompt


def read_file(path: Path) -> list[Row]:
    """A .txt (a prompt a line), .jsonl ({"text": ..., "metadata": {...}}) or .parquet file. ValueError in words."""
    if not path.is_file():
        raise ValueError(f"there is no prompts file {path}")
    readers = {".txt": _text, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix not in readers:
        raise ValueError(f"prompts file {path} must end in {', '.join(readers)}")
    return readers[path.suffix](path)


def text_of(path: Path) -> str:
    """A file's text; ValueError where it is not UTF-8."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def lines_of(path: Path) -> list[tuple[str, str]]:
    """Where it stands and the line, of those that are not blank, as JSON counts them: U+2028 may stand in a text."""
    lines = enumerate(text_of(path).split("\n"), start=1)
    return [(f"{path}, line {n}", line) for n, line in lines if line.strip()]


def table_of(path: Path, columns: list[str] | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Where it stands and the row, of a parquet file, all columns or some."""
    try:
        import pyarrow as arrow  # type: ignore[import-not-found]  # an optional reader
        import pyarrow.parquet as parquet  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        raise ValueError(f'reading {path} needs pyarrow: pip install "rlalign[data]"') from None
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path, columns=columns).to_pylist()
    except (arrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from None
    return [(f"{path}, row {n}", row) for n, row in enumerate(rows)]


def _text(path: Path) -> list[Row]:
    return [Row(where, Prompt(line.strip())) for where, line in lines_of(path)]


def _jsonl(path: Path) -> list[Row]:
    return [row_of(parsed(line, where), where, path.parent) for where, line in lines_of(path)]


def _parquet(path: Path) -> list[Row]:
    return [row_of(of_a_table(row, where), where, path.parent) for where, row in table_of(path)]
