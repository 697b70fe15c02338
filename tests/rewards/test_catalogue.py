"""What can be known of a reward without its weights."""

import importlib
import inspect
from collections.abc import Callable

import pytest

from rlalign.scoring import find_reward
from tests.rewards.tiny import DECLARED, OPTIONS


def declared(name: str) -> Callable[..., object]:
    module, _, attribute = DECLARED[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_its_card_is_read_without_its_weights(name: str) -> None:
    about = inspect.getdoc(declared(name)) or ""
    assert [word for word in ("Model:", "Score:", "Licence:", "Known hacks:", "Options:") if word not in about] == []


@pytest.mark.parametrize("name", [name for name in sorted(DECLARED) if inspect.isclass(declared(name))])
def test_its_options_are_those_of_its_card(name: str) -> None:
    reward = declared(name)
    about = " ".join((inspect.getdoc(reward) or "").split())
    missing = [option for option in inspect.signature(reward).parameters if option not in about]
    assert missing == []


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(ValueError, match="the catalogue has no 'pickscor'; did you mean 'pickscore'"):
        find_reward("pickscor")
