"""One small file per data set: where its images and labels are, nothing else.

A builder is a module of this package, found by its name (`fastssl build-beton NAME`). It holds:

- a docstring: the first line says what the data set is (`--list` shows it); then the expected layout, where the
  archives come from, the order of the samples and the license;
- `CANVAS`, the side in px of the stored squares unless the user sets another;
- `SOURCE`, what `--source` has to name; a data set that needs no source leaves it out;
- `DOWNLOAD`, if torchvision can download the data set: per call the name of its class and its options;
- `splits(source)`, which returns for each split its class names and its samples in a fixed order. It raises
  ValueError or FileNotFoundError with one sentence: what was expected, what was found, and how to fix it;
- `SPLITS_BY_NAME = True`, if it takes splits from the names of folders or files. It then has
  `splits(source, by_name=True)`, and with `by_name=False` (`--splits none`) no name is a split's;
- `LISTS_ARRAYS = True`, if it takes images by their suffix. `splits` then also has `arrays=False`, and with
  `arrays=True` (`--channels` other than 3) .npy files are images.

- `IMAGE_CLASSES`, if images are functions: frozen dataclasses whose fields are text or whole numbers, the paths among
  them named `path` or `root`. Processes that build shards then share one list of the samples;
- `LABEL_FILES`, patterns of the files below SOURCE that tell which images there are or their labels, such as "*.txt".
  If one changes, processes that build shards list the samples again. A SOURCE that is a file, and the archives and
  tables that images are in, count without it.

A builder may yield `LeftOut(reason, count)` among its samples: how many images of an archive or a table it leaves out,
and why. (Files and folders of SOURCE that no sample names are counted without its help.)

A builder imports `Sample` and `LeftOut` from fastssl.beton, and what several builders share from `_files.py` and
`_shards.py`. A module whose name begins with an underscore is not a builder.
"""

from collections.abc import Iterable

from fastssl.beton import LeftOut, Sample

Splits = dict[str, tuple[list[str], Iterable[Sample | LeftOut]]]  # split -> (class names, samples)
