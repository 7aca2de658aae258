"""Which image sizes a backbone takes. A forward pass tells, because timm's backbones have rules of many kinds."""

import timm
import torch

from fastssl.common.errors import NO_MEMORY, UserError
from fastssl.models.encoder import build_encoder
from fastssl.models.memory import require_memory
from fastssl.recipe import ModelConfig

MULTIPLES = (8, 14)  # px; a size that is suggested is a multiple of one of these, as patches and strides ask for
# Words in errors of torch that are no fault of the size.
MACHINE_TROUBLE = (*NO_MEMORY, "CUDA", "cuDNN")


def check_image_size(model: ModelConfig, size: int, key: str = "views.size") -> None:
    """Check that the backbone takes images of this size, and that its output depends on all of each image.

    Args:
        size: side in px.
        key: the recipe key that sets it, for the message.

    Raises:
        UserError: with the nearest sizes that work.
    """
    try:
        if sees_whole_image(model, size):
            return
        problem = f"does not see all of an image at {key}={size}, because its patches or strides end before the border"
    except (UserError, MemoryError):
        raise
    except Exception as error:  # backbones raise errors of many types
        if any(word in str(error) for word in MACHINE_TROUBLE):
            raise
        problem = f"takes no images of {key}={size}"
        if model.in_chans != 3 and takes_rgb_only(model, size):
            raise UserError(
                f"model.backbone={model.backbone} takes RGB images only, not model.in_chans={model.in_chans}",
                hint="set another model.backbone",
            ) from None
    sizes = sizes_that_work(model, size)
    fix = f"set {key} to {' or '.join(map(str, sizes))}" if sizes else "set another model.backbone"
    raise UserError(f"model.backbone={model.backbone} {problem}", hint=fix)


def takes_rgb_only(model: ModelConfig, size: int) -> bool:
    """Whether the backbone would take images of this size if they were RGB."""
    try:
        return sees_whole_image(model.model_copy(update={"in_chans": 3}), size)
    except Exception:  # see check_image_size
        return False


@torch.no_grad()
def sees_whole_image(model: ModelConfig, size: int) -> bool:
    """Whether the last row of an image reaches the output of the encoder. Strides leave out rows at this end only.

    A NaN in that row makes the output NaN whatever the weights are, as 0 times NaN is NaN too. Raises what the encoder
    raises for images of a size that it does not take.
    """
    # Without memory and arithmetic first: most sizes that do not work fail here.
    with torch.device("meta"):
        encoder = build_encoder(model.backbone, model.stem, size, model.in_chans).eval()
        require_memory(encoder)
        shape = encoder(torch.empty(1, model.in_chans, size, size)).shape
    if shape != (1, encoder.num_features):
        raise ValueError(f"the output has the shape {tuple(shape)}")
    image = torch.zeros(1, model.in_chans, size, size)
    image[:, :, -1] = float("nan")
    encoder = build_encoder(model.backbone, model.stem, size, model.in_chans).eval()
    return bool(encoder(image).isnan().any())


def sizes_that_work(model: ModelConfig, size: int) -> list[int]:
    """The nearest size below `size` and the nearest above it that the backbone takes, as far as they are found."""

    def works(other: int) -> bool:
        try:
            return sees_whole_image(model, other)
        except Exception:  # see check_image_size
            return False

    sizes = {n for step in MULTIPLES for n in range(step, 2 * size + 1, step) if n >= size / 2}
    config = timm.get_pretrained_cfg(model.backbone)
    if config is not None:
        sizes.add(config.input_size[-1])  # the one that it was made for
    below = next((n for n in sorted(sizes, reverse=True) if n < size and works(n)), None)
    above = next((n for n in sorted(sizes) if n > size and works(n)), None)
    return [n for n in (below, above) if n is not None]
