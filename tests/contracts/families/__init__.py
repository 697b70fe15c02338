"""A tiny random pipeline of each model family, and its library's own way to use it.

A new family adds one file to this folder, which defines CASES: ids of the test, each with its `Case`.
"""

import importlib
import pkgutil

from tests.contracts.families.case import Case, Plain, ode, rollout_settings

__all__ = ["FAMILIES", "FIRST", "Case", "Plain", "ode", "rollout_settings"]

FAMILIES: dict[str, Case] = {}
for _module in pkgutil.iter_modules(__path__):
    FAMILIES |= getattr(importlib.import_module(f"{__name__}.{_module.name}"), "CASES", {})

FIRST = {case.module: case for case in reversed(FAMILIES.values())}
"""One case of each family."""
