"""Prompts from a data set that the library `datasets` reads: a folder, or a name on the Hub."""

from pathlib import Path
from typing import Any

from rlalign.prompts.config import Source
from rlalign.prompts.rows import KEYS, Row, of_a_table, row_of


def read_dataset(source: Source) -> list[Row]:
    """Of the asked split. ValueError in words."""
    assert source.dataset is not None
    table, place = _loaded(source), Path(source.dataset)
    columns = _columns(source, table.column_names)
    table = table.select_columns(list(dict.fromkeys(columns.values())))
    _refuse_pictures(source, table.features)
    if source.limit is not None:
        table = table.select(range(min(source.limit, len(table))))
    folder = place if place.is_dir() else Path()
    return [_row(values, columns, f"{source.dataset}, row {n}", folder) for n, values in enumerate(table.to_list())]


def _loaded(source: Source) -> Any:
    """The split as a table of `datasets`."""
    try:
        import datasets  # type: ignore[import-not-found]  # an optional reader
    except ModuleNotFoundError:
        raise ValueError('prompts.dataset needs the library datasets: pip install "rlalign[data]"') from None
    split, place = source.split or "train", Path(str(source.dataset))
    try:
        if not any((place / file).is_file() for file in ("dataset_dict.json", "state.json")):
            return datasets.load_dataset(source.dataset, source.subset, split=split, revision=source.revision)
        saved = datasets.load_from_disk(str(place))  # by Dataset.save_to_disk, which load_dataset does not read
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the dataset {source.dataset}, split {split}, could not be loaded, neither from this machine nor from the "
            f"Hub ({first:.200}); give the folder of a local copy, or fetch it where there is a network"
        ) from error
    if not isinstance(saved, dict):
        if source.split is not None and source.split != str(saved.split or "train"):
            raise ValueError(f"the dataset {source.dataset} is one split, {saved.split}, not {split}; leave split out")
        return saved
    if split not in saved:
        raise ValueError(f"the dataset {source.dataset} has no split {split}, but {', '.join(saved)}")
    return saved[split]


def _columns(source: Source, there: list[str]) -> dict[str, str]:
    """Our key -> its column, our own names standing for themselves where they are there."""
    columns = {key: key for key in KEYS if key in there} | source.columns
    if missing := [column for column in ("text", *columns) if columns.get(column) not in there]:
        wanted = columns.get(missing[0], missing[0])
        raise ValueError(
            f"the dataset {source.dataset} has no column {wanted!r} for {missing[0]}; set columns: {{{missing[0]}: "
            f"NAME}} with one of {', '.join(there)}"
        )
    return columns


def _refuse_pictures(source: Source, features: Any) -> None:
    import datasets  # type: ignore[import-not-found]

    for column, feature in features.items():
        if isinstance(feature, datasets.Image | datasets.Video):
            raise ValueError(
                f"the column {column} of the dataset {source.dataset} holds pictures themselves, which are not read; "
                "save them as files and name their paths in a .jsonl"
            )


def _row(values: dict[str, Any], columns: dict[str, str], where: str, folder: Path) -> Row:
    own = {key: values[column] for key, column in columns.items() if key in KEYS}
    more = {key: values[column] for key, column in columns.items() if key not in KEYS}
    row = of_a_table(own, where)
    metadata = row.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise ValueError(f"{where}: metadata must be a mapping, or JSON text of one")
    found = of_a_table({"metadata": more}, where)["metadata"]
    return row_of({**row, "metadata": {**metadata, **found}}, where, folder)
