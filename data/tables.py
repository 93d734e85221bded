"""Parquet files and datasets saved by Hugging Face `datasets`: ranges of rows, and their texts."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from data.corpus import Source
from data.json_line import text_of
from data.long_line import BadText
from data.place import Place
from data.slices import Part

if TYPE_CHECKING:
    from data.reading import Record

BATCH = 4 << 20
"""Bytes of text, about, held at once."""

MOST_ROWS = 4096


def bulks(source: Source, key: str, most: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, bytes) of ranges of about `most` bytes: row groups of a Parquet file, rows of a dataset.

    Raises ValueError when the file is damaged or has no column of strings named `key`.
    """
    if source.kind == "parquet":
        meta = _parquet(source, key).metadata
        column = [meta.schema.column(leaf).path for leaf in range(len(meta.schema.names))].index(key)
        for group in range(meta.num_row_groups):
            yield group, group + 1, meta.row_group(group).column(column).total_uncompressed_size
        return
    dataset = _dataset(source, key)
    width = max(1, source.size // max(1, len(dataset)))
    step = max(1, most // width)
    for start in range(0, len(dataset), step):
        stop = min(start + step, len(dataset))
        yield start, stop, (stop - start) * width


def read_rows(part: Part, key: str) -> "Iterator[Record]":
    """Every text of a part, in order; a long one is held in memory as a whole (these formats give no less)."""
    from data.reading import Bad, Batch

    source = part.source
    for first, column in _columns(part, key):
        texts: list[str] = []
        places: list[Place] = []
        for row, cell in enumerate(column, start=first + 1):
            place = Place(path=str(source.path), number=row, unit="row")
            try:
                texts.append(text_of(cell.as_py(), key))
                places.append(place)
            except (BadText, UnicodeDecodeError) as error:
                if texts:
                    yield Batch(texts=texts, places=places)
                    texts, places = [], []
                why = str(error) if isinstance(error, BadText) else f"{key!r} is not UTF-8 at byte {error.start}"
                yield Bad(place=place, why=why)
        if texts:
            yield Batch(texts=texts, places=places)


def _columns(part: Part, key: str) -> Iterator[tuple[int, Any]]:
    """Columns of about BATCH bytes, with the number of their first row in the file."""
    import pyarrow

    source = part.source
    if source.kind == "parquet":
        file = _parquet(source, key)
        groups = range(part.start, part.stop)
        row = sum(file.metadata.row_group(group).num_rows for group in range(part.start))
        rows = sum(file.metadata.row_group(group).num_rows for group in groups)
        width = max(1, part.size // max(1, rows))
        step = max(1, min(MOST_ROWS, BATCH // (4 * width)))  # packed bytes: a quarter of the text, or so
        try:
            for batch in file.iter_batches(batch_size=step, row_groups=list(groups), columns=[key], use_threads=False):
                yield row, batch.column(0)
                row += len(batch)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{source.path}: damaged after row {row} ({str(error).splitlines()[0]})") from None
        return
    dataset = _dataset(source, key).with_format("arrow")
    step = max(1, min(MOST_ROWS, BATCH // max(1, part.size // max(1, part.stop - part.start))))
    for start in range(part.start, part.stop, step):
        yield start, dataset[start : min(start + step, part.stop)].column(0)


def _parquet(source: Source, key: str) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(source.path, buffer_size=1 << 20, pre_buffer=False)
        schema = file.schema_arrow
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{source.path}: not a Parquet file, or damaged ({str(error).splitlines()[0]})") from None
    _check_column(source, key, {name: schema.field(name).type for name in schema.names})
    return file


def _dataset(source: Source, key: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{source.path}: a saved dataset needs the package `datasets`: install it, or export Parquet or JSONL") from None

    try:
        dataset = datasets.load_from_disk(str(source.path))
    except Exception as error:  # the library raises whatever its readers raise
        raise ValueError(f"{source.path}: not a saved dataset, or damaged ({str(error).splitlines()[0]})") from None
    _check_column(source, key, {name: dataset.features.arrow_schema.field(name).type for name in dataset.column_names})
    return dataset.select_columns([key])


def _check_column(source: Source, key: str, types: dict[str, Any]) -> None:
    import pyarrow.types as kinds

    if key not in types:
        raise ValueError(f"{source.path}: no column {key!r}; it has {', '.join(map(repr, types)) or 'none'}: choose another key")
    kind = types[key]
    if not (kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)):
        raise ValueError(f"{source.path}: column {key!r} holds {kind}, not strings: choose another key")
