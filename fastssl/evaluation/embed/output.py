"""The file of embeddings, in one of three formats. Rows are written as they come, so memory does not grow with them."""

import csv
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from fastssl.common.errors import UserError

ROW_GROUP_BYTES = 64 << 20  # of a Parquet file: enough for fast reading
NAMES_AT_A_TIME = 10_000


class Rows(NamedTuple):
    """Embeddings of some images."""

    names: list[str]
    columns: dict[str, np.ndarray]  # by name, in the order of the file: (B,) float64 or (B, D) float32


# Writes all rows to the file at a path. There is at least one row.
Writer = Callable[[Path, Iterable[Rows]], None]


def find_writer(out: Path) -> Writer:
    """Return the function that writes such a file. Raises UserError for another suffix, or without pyarrow."""
    writers: dict[str, Writer] = {".npz": write_npz, ".csv": write_csv, ".parquet": write_parquet}
    if out.suffix not in writers:
        raise UserError(
            f"--out {out} is of no known kind",
            hint=f"write a name that ends in {', '.join(list(writers)[:-1])} or {list(writers)[-1]}",
        )
    if out.is_dir():
        raise UserError(f"--out {out} is a folder", hint="name a file")
    if out.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise UserError(
                f"--out {out} needs the package pyarrow", hint="run `pip install pyarrow`, or write a .npz or a .csv"
            ) from None
    return writers[out.suffix]


def write_npz(path: Path, batches: Iterable[Rows]) -> None:
    """Write the arrays `name` (N,) and those of the columns, as np.savez would; np.load reads them without pickle.

    The bytes of each column wait in a file without a name, as the number of rows comes first in an array.
    """
    names: list[str] = []
    shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}  # of a row
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        for batch in batches:
            names += batch.names
            for name, x in batch.columns.items():
                if name not in files:
                    files[name] = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
                    shapes[name] = x.dtype, x.shape[1:]
                files[name].write(np.ascontiguousarray(x).data)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            text = np.dtype(("U", max(1, max(map(len, names)))))
            with archive.open("name.npy", "w", force_zip64=True) as entry:
                _write_header(entry, text, (len(names),))
                for first in range(0, len(names), NAMES_AT_A_TIME):
                    entry.write(np.array(names[first : first + NAMES_AT_A_TIME], text).tobytes())
            for name, file in files.items():
                dtype, shape = shapes[name]
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    _write_header(entry, dtype, (len(names), *shape))
                    file.seek(0)
                    shutil.copyfileobj(file, entry, 1 << 20)


def _write_header(file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(file, header)


def write_csv(path: Path, batches: Iterable[Rows]) -> None:
    """Write a line per image: name, score, h0, h1, ..., mu0, ..., sigma0, ...; all digits that tell numbers apart."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for number, batch in enumerate(batches):
            if number == 0:
                header = ["name"]
                for name, x in batch.columns.items():
                    header += [name] if x.ndim == 1 else [f"{name}{d}" for d in range(x.shape[1])]
                writer.writerow(header)
            rows = [[name] for name in batch.names]
            for x in batch.columns.values():
                # Nine digits tell all float32 numbers apart, and take half as long as Python's repr.
                as_text = "{:.9g}".format if x.dtype == np.float32 else repr
                for row, values in zip(rows, x.reshape(len(x), -1).tolist()):
                    row += map(as_text, values)
            writer.writerows(rows)


def write_parquet(path: Path, batches: Iterable[Rows]) -> None:
    """Write the columns name (string), score (double), and h, mu, sigma as lists of floats of one length."""
    import pyarrow
    from pyarrow import parquet

    writer: Any = None
    waiting: list[Any] = []  # tables of the next row group
    try:
        for batch in batches:
            columns = {"name": pyarrow.array(batch.names, pyarrow.string())}
            for name, x in batch.columns.items():
                values = pyarrow.array(x.reshape(-1))
                columns[name] = values if x.ndim == 1 else pyarrow.FixedSizeListArray.from_arrays(values, x.shape[1])
            waiting.append(pyarrow.table(columns))
            if writer is None:
                writer = parquet.ParquetWriter(path, waiting[0].schema)
            if sum(table.nbytes for table in waiting) >= ROW_GROUP_BYTES:
                writer.write_table(pyarrow.concat_tables(waiting))
                waiting = []
        if waiting:
            writer.write_table(pyarrow.concat_tables(waiting))
    finally:
        if writer is not None:
            writer.close()
