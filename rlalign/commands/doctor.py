"""doctor: can this machine do it, and what is missing?"""

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rlalign import machine
from rlalign.config import recipes
from rlalign.paths import zoo_names
from rlalign.scoring import find_reward, reward_names

EXTRAS = {"rapidocr": "ocr", "onnxruntime": "ocr", "wandb": "wandb", "pynvml": "gpu", "bitsandbytes": "eight-bit"}


def doctor() -> int:
    """Prints what was found; 2 when the shipped recipes could not run here."""
    for name, version in machine.versions().items():
        print(f"{name:14} {version}")
    for name, value in machine.hardware().items():
        print(f"{name:14} {', '.join(value) or 'none' if isinstance(value, list) else value}")
    print(f"{'device':14} {_device()}")
    print(f"{'recipes':14} {', '.join(recipes()) or 'none'}")
    print(f"{'models':14} {', '.join(f'zoo:{name}' for name in zoo_names()) or 'none'}")
    for name in reward_names():
        print(f"{'reward':14} {name}: {_reward(name)}")
    for package, extra in EXTRAS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{'optional':14} {package} is not installed: pip install 'rlalign[{extra}]'")
    problems = [*_problems()]
    for problem in problems:
        print(f"{'PROBLEM':14} {problem}")
    print("something is missing" if problems else "all is well: rlalign train quickstart")
    return 2 if problems else 0


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return f"cpu, {os.cpu_count()} cores (a GPU is not needed for the quickstart)"


def _reward(name: str) -> str:
    try:
        find_reward(name)
    except ValueError as error:
        return str(error)
    return "ok"


def _problems() -> Iterator[str]:
    if not zoo_names():
        yield "no shipped model: install rlalign again"
    if not recipes():
        yield "no recipes: install rlalign again"
    try:
        with tempfile.TemporaryDirectory(dir=Path()):
            pass
    except OSError as error:
        yield f"cannot write into {Path().resolve()}, where runs/ would be: {error.strerror}"
