"""When two prompts ask for the same, whatever the words and their order, and on which side of a split that falls."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rlalign.types import Prompt

_INVERSE = {"right of": "left of", "below": "above"}
# What GenEval calls three classes of COCO.
_ALIASES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}


def identity(prompt: Prompt) -> str:
    """Equal for prompts that must not stand on both sides of a split.

    Of GenEval's metadata the multiset of objects with their colours, and their relations, as in Flow-GRPO's split
    (https://arxiv.org/abs/2505.05470): "a left of b" is "b right of a". Of a text to render that text, whatever it
    stands on. Of everything else the words, without case, punctuation at the ends and repeated blanks. Images that a
    prompt starts from count by the names of their files.
    """
    include, asked = prompt.metadata.get("include"), prompt.metadata.get("text")
    if isinstance(include, list) and include and all(_is_clause(clause, len(include)) for clause in include):
        what: Any = ["objects", composition(include)]
    elif isinstance(asked, str) and asked.strip():
        what = ["spelling", "".join(_folded(asked).split())]
    else:
        what = ["words", plain(prompt.text)]
    return json.dumps([*what, *names(prompt.files)])


def shared(prompts: Iterable[Prompt], others: Iterable[Prompt]) -> list[Prompt]:
    """Those of the first that ask for the same as one of the second."""
    known = {identity(other) for other in others}
    return [prompt for prompt in prompts if identity(prompt) in known]


def composition(include: Sequence[Mapping[str, Any]]) -> list[Any]:
    """[objects, relations], both sorted: the order of the clauses, and from which end a relation is told, are gone."""
    nodes = [(_class(clause), clause.get("color") or "") for clause in include]
    objects: Counter[tuple[str, str]] = Counter()
    for node, clause in zip(nodes, include, strict=True):
        objects[node] += clause.get("count", 1)
    relations = []
    for node, clause in zip(nodes, include, strict=True):
        if "position" in clause:
            relation, other = clause["position"]
            ends = (node, nodes[other])
            relations.append((_INVERSE.get(relation, relation), ends[::-1] if relation in _INVERSE else ends))
    return [sorted(objects.items()), sorted(relations)]


def plain(text: str) -> str:
    """Without case, blanks that repeat, and punctuation at the ends."""
    folded = " ".join(_folded(text).split())
    return re.sub(r"^\W+|\W+$", "", folded) or folded


def side(key: str, seed: int) -> float:
    """In [0, 1): decided by the key and the seed alone, so that other prompts never move this one."""
    digest = blake2b(f"{seed} {key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _class(clause: Mapping[str, Any]) -> str:
    name: str = clause["class"]
    return _ALIASES.get(name, name)


def _is_clause(clause: Any, clauses: int) -> bool:
    """As GenEval writes it; other metadata may use the same name for something else."""
    if not isinstance(clause, dict) or not isinstance(clause.get("class"), str):
        return False
    position = clause.get("position", ["", 0])
    if not isinstance(position, list | tuple) or len(position) != 2:
        return False
    relation, other = position
    related = isinstance(relation, str) and isinstance(other, int) and other in range(clauses)
    return related and isinstance(clause.get("color"), str | None) and isinstance(clause.get("count", 1), int)


def names(files: Mapping[str, Any]) -> list[Any]:
    """Without their folders: a data set may be moved."""
    return [
        [kind, [Path(path).name for path in ([paths] if isinstance(paths, str) else paths)]]
        for kind, paths in sorted(files.items())
    ]
