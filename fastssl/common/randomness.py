"""Counter-based random numbers: every random number of a run comes from here, and nothing here has a state.

A number is a function of (seed, epoch or step, sample index, view, purpose). It never depends on batch size, workers,
threads, rank, device or resume point. The generator is Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy
as 1, 2, 3", SC 2011) in integer torch operations, so a CPU, a GPU and a compiled graph compute the same bits.

The four words of the counter are (block, sample index, epoch or step, 2 * purpose + view). The key is the seed.
"""

import math

import torch
from torch import Tensor

# What a number is used for. Two purposes never share a number.
AUGMENTATION, NOISE_Z, ORDER, PAGE_ORDER, NOISE_H, NOISE_EVALUATION, CORRUPTION, DIRECTIONS, SUBSPACE = range(9)
KEYED_ORDER, KEYED_PAGES, KEYED_WINDOW, KEYED_LIMIT = range(9, 13)  # see loading/keyed_order.py

_MASK = 0xFFFFFFFF
_Words = tuple[Tensor, Tensor, Tensor, Tensor]  # int64 tensors of one shape that hold 32-bit values


def philox(counter: _Words, seed: int) -> _Words:
    """Philox4x32-10: map four counter words to four random words."""
    c0, c1, c2, c3 = counter
    k0 = seed & _MASK
    k1 = (seed >> 32) & _MASK
    for _ in range(10):
        # These products overflow 64 bits, which leaves both of their 32-bit halves exact.
        p0 = c0 * 0xD2511F53
        p2 = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p2 >> 32) & _MASK) ^ c1 ^ k0, p2 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0 = (k0 + 0x9E3779B9) & _MASK
        k1 = (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def uniforms(seed: int, time: int | Tensor, index_B: Tensor, view: int | Tensor, count: int, purpose: int) -> Tensor:
    """(B, count) float64 in [0, 1), multiples of 2**-32. `time` is the epoch or the step; `view` is one or (B,)."""
    words = _words(seed, time, index_B, view, math.ceil(count / 4), purpose)
    return torch.stack(words, dim=-1).flatten(1)[:, :count].double() * 2.0**-32


def normals(
    seed: int, step: int | Tensor, index_B: Tensor, view: int, draws: int, dim: int, purpose: int = NOISE_Z
) -> Tensor:
    """(S, B, D) float32 standard normal noise for S = draws, D = dim; draw s does not depend on S.

    Each number picks one of 2**16 equally probable values by 16 random bits: the normal quantiles at the middle of
    each cell, scaled to variance 1. So |x| stays below 4.3 and the distribution function is within 2**-16 of the
    normal's. In return the bits are the same on every device and under every compiler; those of a Box-Muller
    transform are not, because of its logarithm and cosine.
    """
    blocks = math.ceil(dim / 8)  # one hash makes 4 words, 8 numbers
    words = _words(seed, step, index_B, view, draws * blocks, purpose)
    low_high = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    cell_BN8 = torch.stack(low_high, dim=-1)
    cell_BSD = cell_BN8.view(len(index_B), draws, blocks * 8)[:, :, :dim]
    # Look up first, transpose after: torch 2.15 traces the other order with strides that it then does not have.
    return quantiles(index_B.device)[cell_BSD].transpose(0, 1)


def permutation(seed: int, epoch: int, count: int, purpose: int = ORDER) -> Tensor:
    """(count,) int64: a random permutation of 0 to count - 1, sorted by a random 64-bit key per element."""
    rows = torch.arange(count)
    words = _words(seed, epoch, rows, 0, 1, purpose)
    return torch.argsort((words[0][:, 0] << 32) | words[1][:, 0], stable=True)


def _words(seed: int, time: int | Tensor, index_B: Tensor, view: int | Tensor, blocks: int, purpose: int) -> _Words:
    """Four (B, blocks) int64 tensors of 32 random bits each."""
    block = torch.arange(blocks, device=index_B.device)
    time = torch.as_tensor(time, device=index_B.device)
    # Added to a zero that the device makes: copying a number to a GPU would wait for it.
    last = (torch.zeros((), dtype=torch.int64, device=index_B.device) + (2 * purpose + view)).reshape(-1, 1)
    w0, w1, w2, w3 = torch.broadcast_tensors(*philox((block, index_B[:, None] & _MASK, time & _MASK, last), seed))
    return w0, w1, w2, w3


@torch.compiler.assume_constant_result  # otherwise a compiled graph would compute the table in every step
def quantiles(device: torch.device) -> Tensor:
    """(65536,) float32 table: standard normal quantiles at cell middles, scaled to variance 1."""
    if device not in _quantiles:
        cells = 1 << 16
        middle = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
        table = torch.special.ndtri(middle)
        _quantiles[device] = (table / table.square().mean().sqrt()).float().to(device)
    return _quantiles[device]


_quantiles: dict[torch.device, Tensor] = {}
