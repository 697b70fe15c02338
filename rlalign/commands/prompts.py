"""prompts show, generate and convert: prompt files, looked into and written."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

from rlalign.commands.problems import in_preparation
from rlalign.commands.runs import config_of
from rlalign.files import in_words, write_atomically
from rlalign.plugins import did_you_mean
from rlalign.prompts import PromptSet, evenly, read
from rlalign.prompts.config import Layout
from rlalign.prompts.files import read_file
from rlalign.prompts.generate import Kind
from rlalign.prompts.generate import generate as drawn
from rlalign.prompts.layouts import read_layout
from rlalign.prompts.matching import identity, shared
from rlalign.prompts.pairs import recordings
from rlalign.prompts.sources import Part, others
from rlalign.types import Prompt

FILES = (".txt", ".jsonl", ".parquet")
NO_TAG = "(no tag)"


@dataclass(frozen=True, slots=True)
class Wish:
    """What `prompts generate` is to write."""

    kind: Kind
    to: Path
    num: int
    heldout: Path | None
    num_heldout: int
    share: float
    seed: int


def generate(wish: Wish) -> int:
    with in_preparation():
        wanted = [(wish.to, wish.num, False)]
        if wish.heldout is not None:
            if wish.heldout.absolute() == wish.to.absolute():
                raise ValueError("--heldout and --to name the same file; give two")
            wanted.append((wish.heldout, wish.num_heldout, True))
        _refuse_overwriting(*(path for path, _, _ in wanted))
        made = [(path, drawn(wish.kind, num, wish.seed, wish.share, heldout=heldout)) for path, num, heldout in wanted]
        for path, prompts in made:
            _write(path, [{"text": prompt.text, "metadata": prompt.metadata} for prompt in prompts])
    for path, prompts in made:
        print(f"written      {len(prompts):,} prompts in {path}: {_counted(_tags(prompts))}")
    return 0


def convert(layout: str, path: Path, to: Path, split: str | None, pairs: bool) -> int:
    with in_preparation():
        known = get_args(Layout)
        if layout not in known:
            raise ValueError(f"no layout is called {layout!r}{did_you_mean(layout, [*known])}")
        _refuse_overwriting(to)
        with in_words(f"write {to}"):
            to.parent.mkdir(parents=True, exist_ok=True)
        if pairs:
            lines: Sequence[Mapping[str, Any]] = list(recordings(layout, path, to, split))
        else:
            found = PromptSet.of(read_layout(_layout(layout), path, split), str(path))
            lines = [_line(prompt) for prompt in found.prompts]
        if not lines:
            raise ValueError(f"{path} holds no judged images")
        _write(to, lines)
    print(f"written      {len(lines):,} {'groups of judged images' if pairs else 'prompts'} in {to}")
    return 0


def show(target: str, overrides: Sequence[str], examples: int) -> int:
    with in_preparation():
        if Path(target).suffix in FILES:
            if overrides:
                raise ValueError(f"{target} is a prompt file, which has no settings to override such as {overrides[0]}")
            rows = [row.prompt for row in read_file(Path(target))]
            lines = [*_about("prompts", PromptSet.read(Path(target)), examples), *_repeated(rows)]
        else:
            config = config_of(target, overrides).prompts
            sets: dict[Part, PromptSet] = {part: read(config, part) for part in ("train", *others(config))}
            lines = [line for part, prompts in sets.items() for line in _about(part, prompts, examples)]
            lines += _overlaps(sets)
    for name, words in lines:
        print(f"{name:12} {words}")
    return 0


# --- writing


def _layout(name: str) -> Layout:
    return next(layout for layout in get_args(Layout) if layout == name)


def _refuse_overwriting(*paths: Path) -> None:
    for path in paths:
        if path.suffix != ".jsonl":
            raise ValueError(f"{path} must end in .jsonl, which is what is written")
        if path.exists():
            raise ValueError(f"{path} is there already; choose another name")


def _line(prompt: Prompt) -> dict[str, Any]:
    return {"text": prompt.text} | ({"metadata": prompt.metadata} if prompt.metadata else {})


def _write(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with in_words(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode())


# --- showing


def _about(part: str, prompts: PromptSet, examples: int) -> Iterator[tuple[str, str]]:
    yield part, f"{len(prompts.prompts):,} different ones: {_counted(_tags(prompts.prompts))}"
    alike = len(prompts.prompts) - len({identity(prompt) for prompt in prompts.prompts})
    if alike:
        yield "", f"{alike:,} of them ask for the same as an earlier one in other words"
    if not prompts.weights.uniform:
        yield "", f"drawn by weight; at step 0: {_expected(prompts)}"
    for place in evenly(len(prompts.prompts), examples):
        yield "", f"  {prompts.prompts[place].title}"


def _repeated(rows: Sequence[Prompt]) -> Iterator[tuple[str, str]]:
    texts = Counter(prompt.title for prompt in rows)
    text, most = texts.most_common(1)[0]
    if most > 1:
        yield "repeated", f"{len(rows) - len(texts):,} lines repeat a text, {text!r} {most} times"


def _expected(prompts: PromptSet) -> str:
    """Shares of the draws by tag."""
    weights = prompts.weights.at(0, prompts.prompts)
    if not weights.any():
        return "nothing, since all weights are 0"
    shares: Counter[str] = Counter()
    for prompt, weight in zip(prompts.prompts, weights / weights.sum(), strict=True):
        shares[_tag(prompt)] += float(weight)  # pyright: ignore[reportArgumentType]  # typeshed counts whole things only
    return ", ".join(f"{tag} {share:.1%}" for tag, share in shares.most_common())


def _overlaps(sets: Mapping[Part, PromptSet]) -> Iterator[tuple[str, str]]:
    for one, other in combinations(sets, 2):
        both = shared(sets[one].prompts, sets[other].prompts)
        words = f"{len(both):,} prompts of {one} ask for the same as one of {other}"
        yield "overlap", words + (f", {min(prompt.title for prompt in both)!r} for one" if both else "")


def _tag(prompt: Prompt) -> str:
    return str(prompt.metadata.get("tag", NO_TAG))


def _tags(prompts: Sequence[Prompt]) -> Counter[str]:
    return Counter(_tag(prompt) for prompt in prompts)


def _counted(tags: Counter[str]) -> str:
    return ", ".join(f"{tag} {count:,}" for tag, count in tags.most_common())
