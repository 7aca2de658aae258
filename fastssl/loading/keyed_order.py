"""Random orders of sets that are too large for an array: each position is computed when it is asked for.

A Feistel network permutes the numbers of `bits` bits, the fewest that hold all positions: each round changes one half
of the bits by a hash of the other half, which can be undone, so the network is a bijection whatever the hash is. A
result that is no position is permuted again until it is one ("cycle walking"), on average less than twice; what remains
is a bijection of the positions (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).

The hash is Philox4x32-10 of (seed, epoch, purpose), as for all random numbers of a run (common/randomness.py). Its
counter's words are (round, half, epoch, 2 * purpose). Five rounds of an ideal hash suffice for large halves (Patarin,
"Security of Random Feistel Schemes with 5 or More Rounds", CRYPTO 2004). Small and unequal halves need more, and NIST
SP 800-38G uses ten rounds for them, as this file does. With halves of one and two bits, a number is still found up to
5 % too often at some positions after ten rounds, so there are at least six bits.
"""

import numpy as np
import torch

from fastssl.common.compiled import compiled
from fastssl.common.randomness import KEYED_ORDER, KEYED_PAGES, KEYED_WINDOW, uniforms

ROUNDS = 10
FEWEST_BITS = 6
MASK = 0xFFFFFFFF


class KeyedPermutation:
    """A random permutation of 0 to count - 1, which takes no memory: 0.5 microseconds a value.

    Args:
        count: of the numbers that are permuted.
        seed, epoch, purpose: as of `common.randomness.permutation`.
    """

    def __init__(self, count: int, seed: int, epoch: int, purpose: int = KEYED_ORDER) -> None:
        self.count = count
        self.key = np.array([seed & MASK, seed >> 32 & MASK, epoch & MASK, 2 * purpose], np.int64)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position_B: np.ndarray) -> np.ndarray:
        """(B,) int64: the numbers at these positions, each from 0 to count - 1."""
        return _permute(position_B.astype(np.int64), self.count, self.key)


class KeyedWindows:
    """A random permutation of 0 to count - 1 that stays within a part of them for a while, without memory.

    Blocks of `block` neighbors are permuted, then the numbers in each window of so many blocks. The last block may be
    shorter.

    Args:
        count: of the numbers that are permuted.
        block: neighbors that stay in one window.
        window: blocks of a window.
        seed, epoch: as of `common.randomness.permutation`.
    """

    def __init__(self, count: int, block: int, window: int, seed: int, epoch: int) -> None:
        self.count = count
        blocks = -(-count // block)
        # The shorter block has a random place among the others, which are permuted. Every window but its own is then
        # known to hold whole blocks only.
        u = uniforms(seed, epoch, torch.zeros(1, dtype=torch.int64), 1, 1, KEYED_PAGES).item()
        self.sizes = np.array([count, block, window, blocks, int(u * blocks) // window], np.int64)
        self.key_of_blocks = KeyedPermutation(blocks - 1, seed, epoch, KEYED_PAGES).key
        self.key_within = KeyedPermutation(count, seed, epoch, KEYED_WINDOW).key

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position_B: np.ndarray) -> np.ndarray:
        """(B,) int64: the numbers at these positions, each from 0 to count - 1."""
        return _permute_in_windows(position_B.astype(np.int64), self.sizes, self.key_of_blocks, self.key_within)


@compiled()
def _permute(position_B: np.ndarray, count: int, key: np.ndarray) -> np.ndarray:
    out_B = np.empty_like(position_B)
    for b in range(len(position_B)):
        out_B[b] = _permuted(position_B[b], count, key, 0)
    return out_B


@compiled()
def _permute_in_windows(
    position_B: np.ndarray, sizes: np.ndarray, key_of_blocks: np.ndarray, key_within: np.ndarray
) -> np.ndarray:
    """sizes: numbers, of a block, blocks of a window, blocks, and the window that holds the last block."""
    count, block, window, blocks, window_of_last = sizes
    missing = blocks * block - count  # of the last block
    out_B = np.empty_like(position_B)
    for b in range(len(position_B)):
        # Windows after that of the last block begin earlier by what it misses.
        w = position_B[b] // (window * block)
        if w >= window_of_last:
            w = max(window_of_last, (position_B[b] + missing) // (window * block))
        start = w * window * block - (missing if w > window_of_last else 0)
        blocks_here = min(window, blocks - w * window)
        size = blocks_here * block - (missing if w == window_of_last else 0)
        place = _permuted(position_B[b] - start, size, key_within, w)
        if w == window_of_last and place // block == blocks_here - 1:
            out_B[b] = (blocks - 1) * block + place % block
        else:
            # The last block is not among those that are numbered here.
            number = w * window - (1 if w > window_of_last else 0) + place // block
            out_B[b] = _permuted(number, blocks - 1, key_of_blocks, 0) * block + place % block
    return out_B


@compiled()
def _permuted(number: int, count: int, key: np.ndarray, stream: int) -> int:
    """Return what a number below `count` becomes; another `stream` is another permutation."""
    bits = FEWEST_BITS
    while 1 << bits < count:
        bits += 1
    low_bits = bits // 2
    low_mask = (1 << low_bits) - 1
    high_mask = (1 << (bits - low_bits)) - 1
    while True:
        high = number >> low_bits
        low = number & low_mask
        for step in range(stream * ROUNDS, (stream + 1) * ROUNDS, 2):
            high ^= _hash(step, low, key) & high_mask
            low ^= _hash(step + 1, high, key) & low_mask
        number = high << low_bits | low
        if number < count:
            return number


@compiled()
def _hash(step: int, half: int, key: np.ndarray) -> int:
    """The first word of Philox4x32-10: 32 random bits."""
    return philox(step, half, key[2], key[3], key[0], key[1])[0]


@compiled()
def philox(c0: int, c1: int, c2: int, c3: int, k0: int, k1: int) -> tuple[int, int, int, int]:
    """`common.randomness.philox` for one counter; k0 and k1 are the halves of the seed."""
    for _ in range(10):
        # These products overflow 64 bits, which leaves both of their 32-bit halves exact.
        p0 = c0 * 0xD2511F53
        p2 = c2 * 0xCD9E8D57
        c0 = ((p2 >> 32) & MASK) ^ c1 ^ k0
        c1 = p2 & MASK
        c2 = ((p0 >> 32) & MASK) ^ c3 ^ k1
        c3 = p0 & MASK
        k0 = (k0 + 0x9E3779B9) & MASK
        k1 = (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3
