"""Reads texts from .parquet files by the pyarrow library."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastgpt.errors import UsageError, shown
from fastgpt.tokenizer.base import check_unicode

BATCH_ROWS = 256  # that are decoded at a time


def group_bytes(path: Path, text_key: str) -> list[int]:
    """The uncompressed bytes of the texts in each group of rows.

    Raises:
        UsageError: pyarrow is missing, the file cannot be read or is damaged, or the column of texts is missing.
    """
    with _opened(path) as file:
        column = _column(file, path, text_key)
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        return [group.column(column).total_uncompressed_size for group in groups]


def texts(path: Path, group: int, text_key: str) -> Iterator[str]:
    """The texts of a group of rows.

    Raises:
        UsageError: as `group_bytes`, or a row, which is named, has no text.
    """
    with _opened(path) as file:
        _column(file, path, text_key)
        row = sum(file.metadata.row_group(number).num_rows for number in range(group))
        batches = file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[text_key], use_threads=False)
        for batch in batches:
            for text in batch.column(0).to_pylist():
                row += 1
                if text is None:
                    raise UsageError(f"{path}, row {row:,} has no text in column {text_key!r}; leave the row out")
                yield check_unicode(text, f"{path}, row {row:,}: the text")


def _column(file: Any, path: Path, text_key: str) -> int:
    """The number of the column of texts among those that are stored."""
    import pyarrow

    schema = file.schema_arrow
    if schema.names.count(text_key) != 1:
        raise UsageError(f"{path} has no column {text_key!r}, only {shown(schema.names)}; name it by `text_key`")
    kind = schema.field(text_key).type
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    is_text = pyarrow.types.is_string(value) or pyarrow.types.is_large_string(value)
    if not is_text and not pyarrow.types.is_string_view(value):
        raise UsageError(f"{path} has {kind} in column {text_key!r}, not text; name the column of texts by `text_key`")
    stored = [file.schema.column(number).path for number in range(len(file.schema))]
    return stored.index(text_key)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open file of pyarrow's, whose errors become `UsageError`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            f"{path} needs pyarrow; pip install 'fastgpt-engine[parquet]', or write the documents as .jsonl"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UsageError(f"{path} cannot be read as Parquet: {reason}; fetch it anew, or leave it out") from None
