"""The licence of a base model, as its own card declares it: what was made out of it is bound by it too."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

KEYS = ("license", "license_name", "license_link")


def declared(base: Path | None) -> dict[str, str]:
    """``KEYS`` of the front matter of the README.md in a model's folder; nothing where there is none."""
    if base is None or not (card := base / "README.md").is_file():
        return {}
    front = front_matter(card.read_text(errors="replace"))
    return {key: front[key] for key in KEYS if isinstance(front.get(key), str)}


def front_matter(card: str) -> Mapping[str, Any]:
    """The YAML between two lines of dashes at the top; nothing where it is missing or broken."""
    top, *rest = card.lstrip("\ufeff").split("\n---", 1)
    if not rest or not top.startswith("---"):
        return {}
    try:
        found = yaml.safe_load(top.removeprefix("---"))
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def sentence(declared: Mapping[str, str]) -> str:
    """For people."""
    if "license" not in declared:
        return (
            "The base model's licence governs these weights. Which one that is was not to be read from the base "
            "model's folder: look it up before you pass them on."
        )
    named = declared.get("license_name", declared["license"])
    link = f", {declared['license_link']}" if "license_link" in declared else ""
    return f"The base model's licence governs these weights. Its card declares: {named}{link}."
