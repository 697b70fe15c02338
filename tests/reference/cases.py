"""Reference cases: numbers of public implementations, one .npz each. The files alone are read, never the manifest."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Outputs = dict[str, Any]
"""What an adapter returns: every output's name, without ``out_``, to a tensor, an array or a number."""


@dataclass(frozen=True)
class Case:
    """One file, to be computed in one precision."""

    path: Path
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    dtype: torch.dtype

    @staticmethod
    def load(path: Path, dtype: torch.dtype) -> "Case":
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name != "meta"}
            return Case(path, json.loads(str(file["meta"])), arrays, dtype)

    @property
    def kernel(self) -> str:
        return self.meta["kernel"]

    @property
    def source(self) -> str:
        return self.meta["source"]

    @property
    def params(self) -> dict[str, Any]:
        return self.meta["params"]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The ``in_`` arrays by name; numbers with a fraction in the case's precision, integers as they are."""
        return {name[3:]: self._tensor(array) for name, array in self.arrays.items() if name.startswith("in_")}

    @property
    def native(self) -> dict[str, np.ndarray]:
        """What the public code returned in its own precision."""
        return {name[4:]: array for name, array in self.arrays.items() if name.startswith("out_")}

    @property
    def double(self) -> dict[str, np.ndarray]:
        """The same in double precision, for as many outputs as the file has it."""
        again = {name[6:]: array for name, array in self.arrays.items() if name.startswith("ref64_")}
        return again | {name[6:]: array for name, array in self.arrays.items() if name.startswith("out64_")}

    @property
    def expected(self) -> dict[str, np.ndarray]:
        """What this case is held against, by output name: double precision if we compute in it and the file has it."""
        return self.native if self.dtype == torch.float32 else self.native | self.double

    def tolerance(self, name: str) -> float:
        """Relative to the array's maximum, as the data's README gives it."""
        if self.dtype == torch.float64 and (name in self.double or self.native[name].dtype != np.float32):
            return 1e-9
        check = self.meta.get("checks", {}).get(name, {}).get("peer_native_vs_ref64_rel", 0.0)
        plain = max(1e-5, 4 * check) if np.isfinite(check) else 1e-5
        loose = name.startswith("grad_") or (name.startswith("log_prob") and self._at_edge())
        return max(1e-3, plain) if loose else plain

    def _at_edge(self) -> bool:
        """Whether a first or last step is among the steps of the case; whole trajectories hold both."""
        steps = self.params.get("step_index")
        if steps is None:
            return True
        last = self.params.get("num_inference_steps", 0) - 1
        return bool({0, last} & set(np.atleast_1d(steps).tolist()))

    def _tensor(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.array(array))
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


Adapter = Callable[[Case], Outputs]


class NotImplementedCase(Exception):
    """An adapter's word that rlalign has no such variant (yet); the case is then reported by name, never dropped."""


class OutOfScopeCase(Exception):
    """An adapter's word, with the reason, that rlalign will not reproduce this variant; reported by name."""


def folder() -> Path:
    return Path(os.environ.get("RLALIGN_REFERENCE_DIR") or Path(__file__).parent / "data")


def paths() -> list[Path]:
    return sorted(folder().glob("*.npz"))


def check(case: Case, computed: Outputs) -> None:
    """Every output of the case agrees; where the public code has no finite number, ours is a refusal (NaN)."""
    missing = case.native.keys() - computed.keys()
    assert not missing, f"the adapter does not compute {sorted(missing)}"
    for name in case.native:
        _check_output(case, name, _array(computed[name]))


def _check_output(case: Case, name: str, ours: np.ndarray) -> None:
    theirs = case.expected[name]
    assert ours.shape == theirs.shape, f"{name}: shape {ours.shape}, expected {theirs.shape}"
    if theirs.dtype.kind in "biuSU":
        assert (ours == theirs).all(), f"{name}: {ours} is not {theirs}"
        return
    ours, theirs = ours.astype(np.float64), _mended(case, name, theirs.astype(np.float64))
    finite = np.isfinite(theirs)
    if not finite.all() and np.isfinite(_mean(case)).all():
        assert np.isnan(ours[~finite]).all(), f"{name}: no refusal where the public code has no number"
    assert np.isfinite(ours[finite]).all(), f"{name}: refused where the public code has a number"
    scale = np.abs(theirs[finite]).max(initial=0.0) or 1.0
    error = np.abs(ours - theirs)[finite].max(initial=0.0) / scale
    assert error <= case.tolerance(name), (
        f"{name}: off by {error:.3g} of the maximum; allowed {case.tolerance(name):.3g}"
    )


def _mended(case: Case, name: str, theirs: np.ndarray) -> np.ndarray:
    """Where float32 left the public code no number but float64 did (a radicand that rounds below 0), the latter."""
    better = case.double.get(name)
    return theirs if better is None else np.where(np.isfinite(theirs), theirs, better)


def _mean(case: Case) -> np.ndarray:
    """The step's mean, which tells a step without noise (finite) from a rounding accident (not finite)."""
    return case.double.get("prev_sample_mean", np.zeros(1))


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
