"""One small file a data set: where its images and labels are, nothing else.

A builder is a module of this package, found by its name (`fastssl build-beton NAME`). It holds

- a docstring: in its first line what the data set is (`--list` shows that), then the layout it
  expects, where the archive comes from, its licence;
- `CANVAS`, the side in px that its images are stored at unless the user says otherwise;
- `splits(source)`, which gives for each split name `(classes, samples)`: the list of class names
  and an iterable of `Sample` in a fixed order. A source that is not laid out as expected raises
  ValueError or FileNotFoundError with one sentence: what was expected, found, and how to mend it.
- `download(source)`, where torchvision can fetch the data set and check it.

It imports `Sample` from fastssl.beton, and from other builders what they share. A module whose name begins
with an underscore is no builder: it reads a format for several.
"""
