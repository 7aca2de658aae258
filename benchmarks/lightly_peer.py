"""lightly's Barlow Twins, as end_to_end.py and parity.py train it, and the images that both packages train on."""

from pathlib import Path
from typing import Any

BATCH = 128
SIZE = 32  # px


def link_images(source: Path, target: Path, per_class: int | None) -> int:
    """Link the first images of each class folder of `source` into `target`, and return their number."""
    linked = 0
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        (target / folder.name).mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.iterdir())[:per_class]:
            if not (link := target / folder.name / file.name).exists():
                link.symlink_to(file.resolve())
            linked += 1
    return linked


def make_loader(images: Path, workers: int = 0, pin_memory: bool = False, **views: Any):
    """Return lightly's images in batches of two views: those of recipes/barlow.yaml, but for what `views` changes.

    lightly's other defaults agree: gray 0.2, blur 1.0 and 0.1, solarize 0 and 0.2.
    """
    import torch
    from lightly.data import LightlyDataset
    from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform

    shared = dict(input_size=SIZE, cj_prob=0.8, cj_bright=0.4, cj_contrast=0.4, cj_sat=0.2, cj_hue=0.1, min_scale=0.08)
    transform = BYOLTransform(BYOLView1Transform(**shared, **views), BYOLView2Transform(**shared, **views))
    return torch.utils.data.DataLoader(
        LightlyDataset(str(images), transform=transform), BATCH, shuffle=True, drop_last=True, num_workers=workers,
        pin_memory=pin_memory,
    )  # fmt: skip


def make_model(device: str = "cpu"):
    """Return the encoder, a ResNet-18 with the ImageNet stem; encoder and projector; and the loss of their outputs."""
    import timm
    import torch
    from lightly.loss import BarlowTwinsLoss
    from lightly.models.modules import BarlowTwinsProjectionHead

    encoder = timm.create_model("resnet18", num_classes=0)
    model = torch.nn.Sequential(encoder, BarlowTwinsProjectionHead(512, 1024, 1024))
    return encoder, model.to(device, memory_format=torch.channels_last).train(), BarlowTwinsLoss()
