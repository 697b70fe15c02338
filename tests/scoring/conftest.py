import threading
from collections.abc import Iterator

import pytest
from torch import Tensor

from rlalign.types import Unit
from tests.scoring.helpers import numbered_images, three_groups


@pytest.fixture
def unit() -> Unit:
    return three_groups()


@pytest.fixture
def images(unit: Unit) -> Tensor:
    return numbered_images(len(unit.prompts) * unit.samples)


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """What a hanging reward waits for; set when the test is over, so that no thread outlives it."""
    event = threading.Event()
    yield event
    event.set()
