"""Singular values of the Jacobians of h and of mu with respect to the pixels: what JEPA-SCORE reads a density from.

The Jacobian J (D, P) of an image has a row per dimension of the embedding and a column per pixel and channel. Rows come
from vector-Jacobian products, each one backward pass for a chunk of images, as D is usually smaller than P.
"""

from collections.abc import Callable, Iterator
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from fastssl.common.errors import UserError
from fastssl.common.randomness import SUBSPACE, normals
from fastssl.evaluation.arrays import Advance
from fastssl.evaluation.features import (
    Features,
    check_finite,
    eval_input,
    in_fp32,
    load_or_compute_features,
    valid_rows,
)
from fastssl.evaluation.runs import BetonSubset, RunEncoder
from fastssl.loading import Batch, BetonLoader
from fastssl.models import Model
from fastssl.models.encoder_only import EncoderOnly
from fastssl.models.gaussian import GaussianHead
from fastssl.models.ssl_model import evaluating
from fastssl.views import describe_eval_transform

Space = Literal["h", "mu"]
Embed = Callable[[Tensor], Tensor]
CHUNK_BYTES = 1 << 28  # of Jacobians held at a time, in float32; at least one image's
CHUNK_IMAGES = 64
# Random directions of the embedding, at most; at most one for four dimensions, as the rank of the Jacobian may be less
# than half of them: of the 512 of a ResNet-18 at 32 px, it was 230, with 200 units of h at zero.
DIRECTIONS = 64
DIMS_PER_DIRECTION = 4


@torch.no_grad()  # of the parameters, which no outer graph records; vjp has its own
def singular_values(embed: Embed, images: Tensor, directions_MD: Tensor | None = None) -> Tensor:
    """The singular values of the Jacobian of `embed` at each image, (B, M) float64, the largest first.

    Args:
        embed: from images (B, C, H, W) to embeddings (B, D), each a function of its own image.
        images: (B, C, H, W).
        directions_MD: orthonormal rows Q; the values are those of Q J, the Jacobian of the embedding's coordinates
            along Q, and take M backward passes. None: those of J itself, D passes.

    Raises:
        UserError: a Jacobian is not finite.
    """
    _, gram_BMM = _embeddings_and_grams(embed, images, directions_MD)
    return _roots(torch.linalg.eigvalsh(gram_BMM)).flip(1)


@torch.no_grad()
def singular_values_of_both(embed: Embed, head: Embed, images: Tensor) -> tuple[Tensor, Tensor]:
    """`singular_values` of h = embed(images), (B, D), and of mu = head(h) with E dimensions, (B, min(D, E)).

    The Jacobian of mu is that of the head, W (E, D), times J. With J J^T = U S^2 U^T it has the singular values of
    W U S, so mu takes no backward passes through the encoder of its own.

    Raises:
        UserError: a Jacobian is not finite.
    """
    h_BD, gram_BDD = _embeddings_and_grams(embed, images, None)
    eigenvalue_BD, axes_BDD = torch.linalg.eigh(gram_BDD)
    head_BED = _jacobians(head, h_BD)[1].double()
    product_BED = head_BED @ (axes_BDD * _roots(eigenvalue_BD)[:, None])
    values_BD = _roots(torch.linalg.eigvalsh(product_BED.mT @ product_BED)).flip(1)
    return _roots(eigenvalue_BD).flip(1), values_BD[:, : head_BED.shape[1]]


def _embeddings_and_grams(embed: Embed, images: Tensor, directions_MD: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return embeddings (B, D), and Q J (Q J)^T of each image, (B, M, M) float64."""
    embedding_BD, jacobian_BMP = _jacobians(embed, images, directions_MD)
    gram_BMM = torch.stack([rows_MP.double() @ rows_MP.double().T for rows_MP in jacobian_BMP])
    if not gram_BMM.isfinite().all():
        raise UserError("The Jacobian of the encoder is not finite", hint="leave JEPA-SCORE out, or train it again")
    return embedding_BD, gram_BMM


def _jacobians(function: Embed, inputs: Tensor, directions_MD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the outputs (B, D), and of each its Jacobian along the directions, by default all, (B, M, P)."""
    output_BD, vjp = cast(tuple[Tensor, Callable[[Tensor], tuple[Tensor]]], torch.func.vjp(function, inputs))
    if directions_MD is None:
        directions_MD = torch.eye(output_BD.shape[1], dtype=output_BD.dtype, device=inputs.device)
    jacobian_BMP = inputs.new_empty(len(inputs), len(directions_MD), inputs[0].numel())
    for m, direction_D in enumerate(directions_MD):
        jacobian_BMP[:, m] = vjp(direction_D.expand_as(output_BD))[0].flatten(1)
    return output_BD, jacobian_BMP


def _roots(eigenvalues: Tensor) -> Tensor:
    """Return singular values from eigenvalues of the Gram matrix of the rows.

    In float64 they are as exact as float32 rows are, and take a tenth of the time of singular values of the rows.
    """
    return eigenvalues.clamp(min=0).sqrt()


def directions_of(dims: int) -> int:
    """The number of random directions for an embedding of some dimensions; 0 for none."""
    return min(dims, max(1, min(DIRECTIONS, dims // DIMS_PER_DIRECTION)))


def random_subspace(dims: int, device: torch.device) -> Tensor:
    """Return orthonormal rows (M, dims) float32 that span a random subspace, always the same."""
    image_1 = torch.zeros(1, dtype=torch.int64)
    noise_MD = normals(0, 0, image_1, 0, directions_of(dims), dims, SUBSPACE)[:, 0].double()
    return torch.linalg.qr(noise_MD.T).Q.T.float().to(device)


def has_mu_of_z(model: Model | EncoderOnly) -> bool:
    """Whether the stochastic embedding that `embed` returns is z, so that its mean mu is not h."""
    return "z" in model.heads and "h" not in model.heads


def _dims(model: Model | EncoderOnly) -> tuple[int, int]:
    """Return the dimensions of h, and of mu where it is not h, else 0."""
    of_mu = cast(GaussianHead, model.heads["z"]).mu.out_features if has_mu_of_z(model) else 0
    return cast(int, model.encoder.num_features), of_mu


def jacobian_values(
    encoder: RunEncoder, batch: Batch, exact: bool, advance: Advance = lambda images: None
) -> dict[Space, np.ndarray]:
    """The singular values of the valid images of a batch under the evaluation transform, each (B, K) float32.

    Of h; and of mu, where it is not h. h and mu are those of `embed`, with batch norms in eval mode, in fp32.

    exact: of the Jacobians themselves; else of those along up to 64 random directions, the same for all images.
    """
    model = encoder.model

    def h_of(images: Tensor) -> Tensor:
        h = model.encoder(images)
        return model.heads["h"](h).mu if "h" in model.heads else h

    def mu_of(h: Tensor) -> Tensor:
        return model.heads["z"](model.projector(h)).mu  # type: ignore[operator]

    def values_of(images: Tensor) -> tuple[Tensor, ...]:
        if exact:
            of_both = has_mu_of_z(model)
            return singular_values_of_both(h_of, mu_of, images) if of_both else (singular_values(h_of, images),)
        embeds = (h_of, lambda images: mu_of(h_of(images)))
        dims = (each for each in (dims_h, dims_mu) if each)
        return tuple(
            singular_values(embed, images, random_subspace(d, images.device)) for embed, d in zip(embeds, dims)
        )

    dims_h, dims_mu = _dims(model)
    chunks = []
    with evaluating(model), in_fp32(batch.index.device):
        images = eval_input(encoder.recipe.views)(batch)[batch.valid]
        # Of the larger Jacobian: that with respect to the pixels, or that of mu with respect to h.
        elements = (dims_h if exact else DIRECTIONS) * max(images[0].numel(), dims_mu)
        for part in images.split(max(1, min(CHUNK_IMAGES, CHUNK_BYTES // (4 * elements)))):
            chunks.append(values_of(part))
            advance(len(part))
    columns = [torch.cat(parts).float().cpu().numpy() for parts in zip(*chunks)]
    return cast(dict[Space, np.ndarray], dict(zip(("h", "mu"), columns)))


def cached_jacobian_values(encoder: RunEncoder, data: BetonSubset, exact: bool) -> dict[Space, np.ndarray]:
    """The `jacobian_values` of all images of a .beton, cached in RUN/features/ as one array.

    Raises:
        UserError: as `cached_features`, or a Jacobian is not finite.
    """

    def side_by_side(loader: BetonLoader, advance: Advance) -> Iterator[Features]:
        for batch in loader:
            values_BK = np.concatenate(list(jacobian_values(encoder, batch, exact, advance).values()), axis=1)
            yield Features(values_BK, valid_rows(batch.label, batch), valid_rows(batch.index, batch))

    dims_h, dims_mu = _dims(encoder.model)
    if exact:
        of_h, of_mu = dims_h, min(dims_h, dims_mu)
    else:
        of_h, of_mu = directions_of(dims_h), directions_of(dims_mu)
    features = load_or_compute_features(
        encoder,
        data,
        {"view": describe_eval_transform(encoder.recipe.views), "jacobian_values": "exact" if exact else DIRECTIONS},
        f"JEPA-SCORE of {data.path}",
        lambda loader, advance: check_finite(side_by_side(loader, advance), data.path, "float32"),
        fits=lambda found: found.h.shape[1:] == (of_h + of_mu,),
    )
    values: dict[Space, np.ndarray] = {"h": features.h[:, :of_h]}
    if of_mu:
        values["mu"] = features.h[:, of_h:]
    return values
