"""What people, or anything else, said of recorded images before the run: with `rollout.source: data`."""

from collections.abc import Sequence
from itertools import groupby

from torch import Tensor

from rlalign.scoring import groupwise, of_recordings
from rlalign.types import Prompt


@of_recordings
@groupwise
def recorded(images: Tensor, prompts: Sequence[Prompt], key: str = "scores") -> list[float]:
    """The numbers in each prompt's metadata under `key`, one for each of its images in their order.

    Score: whatever was recorded, on its own scale; asked of the images of `rollout.source: data` alone.
    Known hacks: none, since no picture of the model is scored.
    Options: key.
    """
    return [score for _, rows in groupby(prompts, id) for score in _scores(list(rows), key)]


def _scores(rows: Sequence[Prompt], key: str) -> list[float]:
    """Of the images of one prompt."""
    scores = rows[0].metadata.get(key)
    if not isinstance(scores, list) or len(scores) < len(rows):
        raise ValueError(f"the prompt {rows[0].text!r} has no {len(rows)} numbers under {key!r} in its metadata")
    return [float(score) for score in scores[: len(rows)]]
