"""The model card beside exported weights: what they are, how they came about, what evaluation found, how to use them.

It is the README.md that the Hub reads, with its front matter. A card is read elsewhere, so that paths of the run are
shortened to names, and what looks like a token is left out.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from rlalign.files import in_words, write_atomically
from rlalign.reporting import licence, summary
from rlalign.reporting.alarms import read_alarms
from rlalign.reporting.charts import save_reward_chart
from rlalign.reporting.metrics import read
from rlalign.reporting.summary import LEAST_DIVERSITY, Series
from rlalign.rundir import RunDir

MARK = "<!-- Written by `rlalign export`, which may replace this file. -->"
SECRET = re.compile(r"(token|key|password|secret)$", re.IGNORECASE)
"""Options of rewards that a card must not tell; token_env, the name of a variable, may stand there."""
NEAR = 1e-3
"""Of a held-out number's size: a smaller change is none."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What stands beside the card."""

    what: str  # "A LoRA"
    relation: str  # adapter | finetune, in the Hub's words
    weights: str  # policy | ema
    step: int
    language: str  # of ``use``
    use: str  # lines of code that load it
    about: str  # the algorithm's first sentence
    base: str | None  # the base model's id on the Hub
    base_folder: Path | None  # and where it lies, if that is known
    heldout: str = "held-out prompts"  # what is known of them


def write_card(run_dir: Path, card: Path, exported: Exported) -> list[Path]:
    """Writes the card and its picture, and says which files; ValueError where another card would be lost."""
    run, picture = RunDir(run_dir), picture_of(card)
    require_ours(card)
    info, config = run.read_info(), run.read_config()
    rows = read(run.metrics) if run.metrics.exists() else []
    held_out = summary.evaluations(rows)
    drawn = save_reward_chart(rows, held_out, picture)
    front, evaluation = _front_matter(config, exported), config.get("evaluation", {})
    page = _template().render(
        front=f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n",
        name=run_dir.resolve().name,
        base=_short(config["model"]["path"] or config["model"]["family"]),
        family=_short(config["model"]["family"]),
        algorithm=_short(config["algorithm"]["name"]),
        about=_linked(exported.about),
        prompts=_prompts(config["prompts"]),
        recorded=_is_recorded(config),
        cards=summary.cards(rows, held_out, config),
        rewards=_shortened(config["rewards"]),
        picture=picture.name if drawn else None,
        changes=summary.changes(held_out),
        sampling=_sampling(evaluation),
        evaluated=max((max(by_step) for by_step in held_out.values()), default=0),
        remarks=[
            *remarks(config["rewards"], held_out, [alarm["name"] for alarm in read_alarms(run.alarms)]),
            *_other_weights(held_out, evaluation, exported),
        ],
        licence=licence.sentence(front),
        hardware=", ".join(dict.fromkeys(info.hardware.get("gpus") or [info.hardware.get("cpu", "unknown hardware")])),
        config=yaml.safe_dump(_shortened(config), sort_keys=False, allow_unicode=True),
        mark=MARK,
        info=info,
        **{name: getattr(exported, name) for name in ("what", "weights", "step", "language", "use", "heldout")},
    )
    with in_words(f"write {card}"):
        card.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(card, page.encode())
    return [card, picture] if drawn else [card]


def picture_of(card: Path) -> Path:
    """Where its picture lies."""
    return card.with_name("reward.png" if card.name == "README.md" else f"{card.stem}.png")


def require_ours(card: Path, *others: Path) -> None:
    """ValueError where the card is there and no export wrote it, or ``others`` of an export without their card."""
    ours = card.exists() and MARK in card.read_text(errors="replace")
    for path in (card, *others):
        if path.exists() and not ours:
            raise ValueError(f"{path} is there already, and rlalign did not write it; name another place with --to")


def remarks(rewards: Sequence[Mapping[str, Any]], held_out: Mapping[str, Series], alarms: Sequence[str]) -> list[str]:
    """What held-out evaluation showed, good or bad, and what it cannot show."""
    changes = {change.name: change for change in summary.changes(held_out)}
    found = [_trained_for(changes.get("reward/mean"))]
    watching = {one["name"] for one in rewards if one["role"] != "train"}
    fell = [n for n in sorted(watching) if (one := changes.get(f"reward/{n}/mean")) and (one.difference or 0) < 0]
    if not watching:
        found.append("No other reward watched the run, so nothing here tells a better model from a fooled reward.")
    elif fell:
        found.append(f"What was not trained for and fell: {', '.join(f'`{name}`' for name in fell)}.")
    if (diversity := changes.get("diversity")) and diversity.after is not None:
        narrow = f"below {LEAST_DIVERSITY}, so the model has narrowed" if diversity.after < LEAST_DIVERSITY else ""
        words = f"Pictures of one prompt are {diversity.after:.2f} times as far apart as the base model's"
        found.append(f"{words}, {narrow}." if narrow else f"{words}.")
    if alarms:
        found.append(f"The run raised alarms: {', '.join(f'`{name}`' for name in dict.fromkeys(alarms))}.")
    return [*found, "One run with one seed. Rewards are proxies: look at pictures before you rely on it."]


def _other_weights(held_out: Mapping[str, Series], evaluation: Mapping[str, Any], exported: Exported) -> list[str]:
    """A sentence where the numbers are not those of the weights that were exported."""
    judged = {max(by_step) for by_step in held_out.values()}
    found: list[str] = []
    if judged and evaluation.get("weights", "policy") != exported.weights:
        found.append(
            f"Evaluated were the `{evaluation['weights']}` weights; exported are the `{exported.weights}` ones."
        )
    if judged and max(judged) != exported.step:
        found.append(
            f"Evaluated were the weights after {max(judged)} updates; exported are those after {exported.step}."
        )
    return found


def _trained_for(change: summary.Change | None) -> str:
    if change is None:
        return "The run was not evaluated on held-out prompts: there is no evidence that it improved anything."
    if change.after is None or change.difference is None:
        return "The base was evaluated on held-out prompts and the trained weights were not: nothing can be compared."
    if abs(change.difference) <= NEAR * max(abs(change.before), abs(change.after)):
        return "On held-out prompts the reward that it was trained for stayed as it was."
    moved = "rose" if change.difference > 0 else "fell"
    numbers = f"from {summary.number(change.before)} to {summary.number(change.after)}"
    return f"On held-out prompts the reward that it was trained for {moved} {numbers}."


def _front_matter(config: Mapping[str, Any], exported: Exported) -> dict[str, Any]:
    """What the Hub understands."""
    named = {"base_model": exported.base, "base_model_relation": exported.relation} if exported.base else {}
    online = [] if _is_recorded(config) else ["reinforcement-learning"]
    tags = ["rlalign", *online, _short(config["algorithm"]["name"])]
    return {
        **licence.declared(exported.base_folder),
        **named,
        "library_name": "diffusers",
        "tags": ["lora", *tags] if exported.relation == "adapter" else tags,
    }


def _is_recorded(config: Mapping[str, Any]) -> bool:
    """Whether it learnt from images that the run did not make."""
    return config.get("rollout", {}).get("source") == "data"


def _sampling(evaluation: Mapping[str, Any]) -> str:
    return (
        f"{evaluation.get('num_images', '?')} images, {evaluation.get('num_steps', '?')} steps of "
        f"{evaluation.get('solver', '?')}, guidance {evaluation.get('guidance_scale', '?')}, weights "
        f"`{evaluation.get('weights', '?')}`"
    )


def _shortened(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: "left out" if SECRET.search(str(key)) else _shortened(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_shortened(value) for value in tree]
    return _short(tree) if isinstance(tree, str) else tree


def _prompts(block: Mapping[str, Any]) -> str:
    """Where they come from: a file, a data set, or a share of the training prompts."""
    parts: list[str] = []
    for part in ("train", "heldout", "test"):
        source = block.get(part)
        if isinstance(source, float):
            parts.append(f"{source:.0%} of train ({part})")
        elif source is not None:
            name = (source["dataset"] or source["path"]) if isinstance(source, dict) else source
            parts.append(f"`{_short(name)}` ({part})")
    return ", ".join(parts)


def _short(text: str) -> str:
    """The last part of an absolute path, as in reward.py:function."""
    return text.rpartition("/")[2] if text.startswith("/") else text


def _linked(about: str) -> str:
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", about)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rlalign.reporting"),
        autoescape=False,  # Markdown
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": summary.number, "signed": summary.signed}
    return environment.get_template("card.md.jinja")
