"""Time to the first batch and memory of a loader for sets of up to a billion samples.

    python benchmarks/billion_samples.py --folder /tmp/sparse [--samples 1000000 1000000000] [--rounds 3]

A set is fabricated from real .beton files with holes: headers, fields, and only those rows of their tables that are
visited; a billion images of 32 px have 3 TB and take 100 MB of the disk. Up to 2**24 samples all rows are read when a
set is opened, so these are all written (1.2 GB). Each line is the median of fresh processes. Memory is counted after
BATCHES batches, beyond that of the same loader on 1,000 samples: anonymous memory, and pages of mapped files, which the
system takes back when it needs them.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 256
BATCHES = 8  # that are read, from the start of an epoch or from its middle
SHARD = 1_000_000  # samples of a file
SIDE = 32  # px; pixels
CLASSES = 1000
ORDERS: dict[str, Any] = {"random": True, "quasi_random": "quasi_random"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, required=True, help="is made, and deleted at the end")
    arguments.add_argument("--samples", type=int, nargs="+", default=[10**6, 2**24, 10**8, 10**9])
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--measure", nargs=2, metavar=("ORDER", "FROM"), help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.measure:
        print(json.dumps(measure(options.folder, *options.measure)))
        return
    print_rates()
    print("\n| samples | order, from | size | imports | open | first batch | anonymous | of files |")
    print("|---|---|---|---|---|---|---|---|")
    small = measured(options, 1000)
    for count in options.samples:
        for (order, start), found in measured(options, count).items():
            beyond = {kind: (found[kind] - small[order, "start"][kind]) / 1e6 for kind in ("anonymous", "files")}
            print(
                f"| {count:,} | {order}, {start} | {found['bytes'] / 1e9:,.4g} GB | {found['imports']:.2f} s | "
                f"{found['open']:.2f} s | {found['first']:.2f} s | {beyond['anonymous']:,.0f} MB | "
                f"{beyond['files']:,.0f} MB |",
                flush=True,
            )


def measured(options: argparse.Namespace, count: int) -> dict[tuple[str, str], dict[str, float]]:
    """Return the medians over fresh processes, in seconds and bytes, by the order and where in the epoch it begins."""
    shutil.rmtree(options.folder, ignore_errors=True)
    fabricate(options.folder, count)
    results = {}
    for order in ORDERS:
        for start in ("start", "middle"):
            command = [sys.executable, __file__, "--folder", options.folder, "--measure", order, start]
            rounds = []
            for number in range(options.rounds + 1):
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                if number:  # the first one brings the pages that it needs into the page cache
                    rounds.append(json.loads(done.stdout.splitlines()[-1]))
            results[order, start] = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    shutil.rmtree(options.folder)
    return results


def fabricate(folder: Path, count: int, shard: int = SHARD, seed: int = 0) -> Path:
    """Write a set of `count` samples, and return the pattern of its files. Sample i has index i and label i mod 1000.

    Of more than `mapped.MOST_IN_MEMORY` samples, only the rows of the first batches and of those in the middle of
    epoch 0 are written, in each order.
    """
    from fastssl.beton import mapped
    from fastssl.beton.format import (
        ALLOCATION,
        FIELD,
        HEADER,
        OUR_FIELDS,
        PAGE_SIZE,
        RAW,
        VERSION,
        data_start,
        metadata_type,
    )
    from fastssl.beton.shards import Shard, set_manifest_path, set_path, shard_path

    folder.mkdir(parents=True)
    sizes = [min(shard, count - first) for first in range(0, count, shard)]
    image_bytes = 3 * SIDE * SIDE
    per_page = PAGE_SIZE // image_bytes
    row_type = metadata_type(OUR_FIELDS)
    tables = HEADER.itemsize + len(OUR_FIELDS) * FIELD.itemsize
    fields = np.zeros(len(OUR_FIELDS), FIELD)
    for field, (name, type_id) in zip(fields, OUR_FIELDS.items()):
        field["type_id"] = type_id
        field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    files = []
    for number, size in enumerate(sizes):
        path = shard_path(folder, "train", Shard(number, len(sizes)))
        whole_pages, rest = divmod(size, per_page)
        end = data_start(size) + whole_pages * PAGE_SIZE + rest * image_bytes
        with open(path, "wb") as file:
            file.write(np.array((VERSION, len(OUR_FIELDS), PAGE_SIZE, size, end), HEADER).tobytes())
            file.write(fields.tobytes())
            file.truncate(end + size * ALLOCATION.itemsize)
        files.append(
            {
                "name": path.name,
                "samples": size,
                "bytes": path.stat().st_size,
                "metadata": f"{number:08x}",  # that of an incomplete table: opening a very large set does not read it
                "checksum": f"{number:064x}",
            }
        )

    def write(row_N: np.ndarray) -> None:
        """Write these rows of the tables, sorted."""
        for number in np.unique(row_N // shard):
            own_N = row_N[row_N // shard == number]
            in_file_N = own_N - number * shard
            metadata = np.zeros(len(own_N), row_type)
            image = metadata["image"]
            image["mode"] = RAW
            image["height"] = image["width"] = metadata["height"] = metadata["width"] = SIDE
            page_N, in_page_N = np.divmod(in_file_N, per_page)
            image["data_ptr"] = data_start(sizes[number]) + page_N * PAGE_SIZE + in_page_N * image_bytes
            metadata["index"] = own_N
            metadata["label"] = own_N % CLASSES
            if len(own_N) == sizes[number]:
                files[number]["metadata"] = f"{zlib.crc32(metadata.tobytes()):08x}"
            allocation = np.zeros(len(own_N), ALLOCATION)
            allocation["sample_id"] = in_file_N
            allocation["ptr"] = image["data_ptr"]
            allocation["size"] = image_bytes
            file = folder / files[number]["name"]
            table_start = files[number]["bytes"] - sizes[number] * ALLOCATION.itemsize
            for start, rows in ((tables, metadata), (table_start, allocation)):
                table = np.memmap(file, rows.dtype, "r+", start, (sizes[number],))
                table[in_file_N] = rows
                table.flush()

    pattern = set_path(folder, "train", len(sizes))
    manifest = {
        "samples": count, "classes": [str(number) for number in range(CLASSES)], "layout": "canvas", "storage": "raw",
        "canvas": SIDE, "channels": 3, "bytes": sum(file["bytes"] for file in files), "files": files,
    }  # fmt: skip
    if count <= mapped.MOST_IN_MEMORY:
        for first in range(0, count, shard):
            write(np.arange(first, min(first + shard, count)))
    set_manifest_path(pattern).write_text(json.dumps(manifest))
    if count > mapped.MOST_IN_MEMORY:
        write(np.unique(np.concatenate(list(visited(pattern, seed)))))
    return pattern


def visited(pattern: Path, seed: int) -> Iterable[np.ndarray]:
    """Yield the rows of the first batches in each order, and of those in the middle of the epoch."""
    from fastssl.beton import read_header
    from fastssl.loading import SampleSelection
    from fastssl.loading.order import epoch_order
    from fastssl.loading.samples import Samples

    samples = Samples.read(read_header(pattern))
    rows = SampleSelection().rows(samples)
    for order in ("random", "quasi_random"):
        position = epoch_order(order, seed, 0, samples, rows)
        for first in (0, middle(len(rows))):
            yield position[first + np.arange(min(len(rows), 2 * BATCHES * BATCH))]  # the loader reads ahead


def middle(count: int) -> int:
    """The position of the batch in the middle of an epoch."""
    return count // BATCH // 2 * BATCH


def measure(folder: Path, order: str, start: str) -> dict[str, float]:
    """Open the set and take batches; in a process of its own."""
    warnings.simplefilter("ignore")  # the file is larger than memory
    begin = time.perf_counter()
    from fastssl.beton import beton_file
    from fastssl.loading import BetonLoader

    imported = time.perf_counter()
    loader = BetonLoader(beton_file(folder, "train"), BATCH, seed=0, shuffle=ORDERS[order])
    if start == "middle":
        loader.load_state_dict({**loader.state_dict(), "position": middle(len(loader.rows))})
    opened = time.perf_counter()
    batches = iter(loader)
    next(batches)
    first = time.perf_counter()
    for _ in range(min(BATCHES, len(loader)) - 1):
        next(batches, None)
    kinds = memory()
    return {
        "imports": imported - begin, "open": opened - imported, "first": first - imported,
        "bytes": float(sum(part.size for part in loader.samples.parts)), **kinds,
    }  # fmt: skip


def memory() -> dict[str, float]:
    """Return the bytes of this process: of its own, and of files that it has mapped."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    kinds = {"anonymous": "RssAnon", "files": "RssFile"}
    return {name: 1024.0 * int(lines[key].split()[0]) for name, key in kinds.items()}


def print_rates() -> None:
    """Print how many positions of an order are computed in a second, next to an array's."""
    from fastssl.common.randomness import permutation
    from fastssl.loading.keyed_order import KeyedPermutation, KeyedWindows

    def seconds(work: Any) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    position_N = np.arange(10**6)
    array = permutation(0, 0, 2**24).numpy()
    lines = {
        "array of 2**24: made, positions/s": 2**24 / seconds(lambda: permutation(0, 0, 2**24)),
        "array of 2**24: looked up, positions/s": 1e6 / seconds(lambda: array[position_N]),
    }
    for name, order in (
        ("random", KeyedPermutation(10**9, 0, 0)),
        ("quasi_random", KeyedWindows(10**9, 2730, 32, 0, 0)),
    ):
        order[position_N]  # compiles
        lines[f"computed of 10**9, {name}: positions/s"] = 1e6 / seconds(lambda: order[position_N])  # noqa: B023
    for name, rate in lines.items():
        print(f"{name}: {rate:,.0f}")


if __name__ == "__main__":
    main()
