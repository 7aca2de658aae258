"""What a loader will take, before it takes it."""

from fastssl.loading.loader import READY, UNDER_WAY, BetonLoader


def estimate_memory(loader: BetonLoader) -> dict[str, int]:
    """Bytes by cause. Host memory unless it says device; the file itself is the page cache's."""
    samples, batch, image = loader.samples, loader.batch_size, loader.image_bytes
    on_device = loader.device.type != "cpu"
    batches = UNDER_WAY + READY + 2  # the caller holds two while one takes the other's place
    bill = {
        f"{batches} batches of {batch}{', pinned' if on_device else ''}": batches * batch * image,
        "table of samples": sum(column.nbytes for column in samples[2:]),
    }
    if loader.crop != "gpu":
        largest = int(samples.shape_N2.prod(axis=1).max()) * 3 + int(samples.shape_N2[:, 1].max()) * 12
        bill[f"scratch of {loader.workers} threads"] = loader.workers * largest
    if on_device:
        bill[f"{READY + 2} batches of {batch}, device"] = (READY + 2) * batch * image
    if loader.resident:
        bill["all images, device"] = len(loader.rows) * image
    bill["file, if all of it is to stay in the page cache"] = len(samples.file)
    return bill
