"""Every reference case against rlalign, in both precisions. What rlalign lacks is listed in pytest's summary."""

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from .adapters import ADAPTERS, OUT_OF_SCOPE
from .cases import Case, NotImplementedCase, OutOfScopeCase, check, folder, paths

Record = Callable[[str, object], None]
PATHS = paths()


def test_there_are_cases() -> None:
    assert PATHS, f"no .npz files in {folder()}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_case(path: Path, dtype: torch.dtype, record_property: Record) -> None:
    case = Case.load(path, dtype)
    pair = (case.kernel, case.source)
    record_property("reference", [case.path.stem, case.kernel, case.source])
    if pair in OUT_OF_SCOPE:
        leave_out(record_property, "out of scope", OUT_OF_SCOPE[pair])
    if pair not in ADAPTERS:
        leave_out(record_property, "not implemented")
    try:
        computed = ADAPTERS[pair](case)
    except OutOfScopeCase as reason:
        leave_out(record_property, "out of scope", str(reason))
    except NotImplementedCase as reason:
        leave_out(record_property, "not implemented", str(reason))
    check(case, computed)


def leave_out(record_property: Record, status: str, reason: str = "") -> NoReturn:
    record_property("left out", [status, reason])
    pytest.skip(f"{status}: {reason}" if reason else status)
