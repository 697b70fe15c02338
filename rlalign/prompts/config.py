"""What a run file says of its prompts."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rlalign.settings import Settings

Layout = Literal["geneval", "drawbench", "parti", "hpdv2", "pickapic", "t2i_compbench"]
WITH_SPLITS = ("pickapic", "t2i_compbench")  # layouts whose folders hold several
Share = Annotated[float, Field(gt=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
Knot = tuple[Annotated[int, Field(ge=0)], Weight]


class Source(Settings):
    """Where prompts come from, other than one prompt file: exactly one of path and dataset."""

    path: Path | None = None
    """A prompt file, or with `layout` a file or folder of that layout."""
    layout: Layout | None = None
    """How a public prompt set is laid out in its files (docs/prompts.md); null: as a prompt file of rlalign."""
    dataset: str | None = None
    """A folder that the library `datasets` reads, or a name on the Hub; needs the extra rlalign[data]."""
    subset: str | None = None
    """Of the dataset, where it has several."""
    revision: str | None = None
    """Of the dataset on the Hub: a branch, a tag or a commit. Only a commit stays what it is."""
    split: str | None = None
    """Of the dataset, train unless given; of a folder of the layout t2i_compbench train or val, of one of pickapic
    train, validation_unique and others."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Which column is what: text, negative, weight, image, video, metadata; any other name becomes a key of metadata.
    Columns that are called so themselves need no mention."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first so many."""

    @model_validator(mode="after")
    def _from_one_place(self) -> "Source":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("name either path or dataset, as in {dataset: my/prompts, columns: {text: caption}}")
        if self.dataset is not None and self.layout is not None:
            raise ValueError("layout is for files; a dataset has columns")
        strange = [key for key in ("subset", "revision", "columns") if getattr(self, key) and self.dataset is None]
        if strange:
            raise ValueError(f"{strange[0]} belongs to a dataset; leave it out, or name a dataset instead of a path")
        if self.split is not None and self.dataset is None and self.layout not in WITH_SPLITS:
            raise ValueError(f"split belongs to a dataset, or to the layouts {' and '.join(WITH_SPLITS)}; leave it out")
        return self


class PromptsConfig(Settings):
    """Prompts to learn on and to judge on."""

    train: Path | Source
    """Prompts to learn on: a .txt, .jsonl or .parquet file, or a block that names a data set or a public layout."""
    heldout: Path | Source | Share
    """Prompts to judge on, none of which should be trained on; a number is the share of train that is held out."""
    test: Path | Source | Share | None = None
    """Prompts for the very end, which only `rlalign evaluate --prompts test` reads; a number is a share of train."""
    split_seed: int = Field(default=0, ge=0)
    """Decides with a prompt's content to which side of the shares it falls."""
    disjoint: bool = False
    """Leave out of train whatever asks for the same as a held-out or test prompt, in any words and order."""
    weights: dict[str, Weight | Annotated[list[Knot], Field(min_length=1)]] = Field(default_factory=dict)
    """How often training prompts with that metadata tag are drawn, 1 for others; [[step, weight], ...] changes it
    along straight lines."""

    @field_validator("weights")
    @classmethod
    def _in_order(cls, weights: dict[str, float | list[Knot]]) -> dict[str, float | list[Knot]]:
        for tag, curve in weights.items():
            if isinstance(curve, list) and any(now >= nxt for (now, _), (nxt, _) in pairwise(curve)):
                raise ValueError(f"the steps of {tag} must rise")
        return weights

    @model_validator(mode="after")
    def _something_left(self) -> "PromptsConfig":
        if sum(self.shares) >= 1:
            raise ValueError("the shares heldout and test leave nothing to train on; make them smaller")
        return self

    @property
    def shares(self) -> tuple[float, float]:
        """Of train that is held out, and kept for the test; 0 where they have sources of their own."""
        heldout, test = (part if isinstance(part, float) else 0.0 for part in (self.heldout, self.test))
        return heldout, test
