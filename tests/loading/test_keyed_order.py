"""The order of very large sets: a bijection, uniform, without correlations, and the same on every machine."""

import numpy as np
import pytest
import torch
from scipy import stats

from fastssl.common.randomness import KEYED_LIMIT, philox
from fastssl.loading import keyed_order
from fastssl.loading.keyed_order import KeyedPermutation, KeyedWindows

COUNTS = [*range(1, 71), 97, 127, 128, 129, 997, 1000, 1023, 1024, 1025, 4096, 4097, 65_521, 65_537]
BILLION = 10**9


def test_the_hash_is_that_of_all_random_numbers():
    words = np.random.default_rng(0).integers(0, 1 << 32, (200, 6))
    for c0, c1, c2, c3, k0, k1 in words.tolist():
        want = philox(tuple(torch.tensor([word]) for word in (c0, c1, c2, c3)), k1 << 32 | k0)
        assert keyed_order.philox(c0, c1, c2, c3, k0, k1) == tuple(int(word) for word in want)


def in_plain_python(number: int, count: int, seed: int, epoch: int, purpose: int) -> int:
    """The permutation as the module's docstring describes it, by the hash of common/randomness.py."""
    bits = max(6, (count - 1).bit_length())
    low_bits = bits // 2
    while True:
        high, low = divmod(number, 1 << low_bits)
        for step in range(0, 10, 2):
            high = (high ^ hashed(step, low, seed, epoch, purpose)) % (1 << (bits - low_bits))
            low = (low ^ hashed(step + 1, high, seed, epoch, purpose)) % (1 << low_bits)
        number = (high << low_bits) + low
        if number < count:
            return number


def hashed(step: int, half: int, seed: int, epoch: int, purpose: int) -> int:
    counter = tuple(torch.tensor([word]) for word in (step, half, epoch, 2 * purpose))
    return int(philox(counter, seed)[0])


@pytest.mark.parametrize("count", [5, 100, 2**24 + 1, BILLION])
def test_the_compiled_permutation_is_that_of_plain_python(count):
    number_B = np.random.default_rng(count).integers(0, count, 20)
    want = [in_plain_python(number, count, 2**35 + 9, 4, KEYED_LIMIT) for number in number_B.tolist()]
    assert KeyedPermutation(count, 2**35 + 9, 4, KEYED_LIMIT)[number_B].tolist() == want


@pytest.mark.parametrize("count", COUNTS)
def test_every_number_comes_once(count):
    for seed, epoch in ((0, 0), (0, 1), (2**40 + 3, 7)):
        permuted = KeyedPermutation(count, seed, epoch)
        assert len(permuted) == count
        assert np.array_equal(np.sort(permuted[np.arange(count)]), np.arange(count))


@pytest.mark.parametrize("window", [1, 2, 32])
@pytest.mark.parametrize("block", [1, 2, 7, 50, 2000])
@pytest.mark.parametrize("count", [1, 2, 3, 31, 32, 33, 64, 97, 1000, 3200, 4999])
def test_every_number_comes_once_in_windows_too(count, block, window):
    """Also where the last block is shorter, in whichever window it comes."""
    for epoch in range(6):
        permuted = KeyedWindows(count, block, window, 3, epoch)
        assert np.array_equal(np.sort(permuted[np.arange(count)]), np.arange(count))


def test_a_window_has_few_blocks():
    count, block, window = 10_007, 50, 4
    blocks_of_windows = set()
    for epoch in range(20):
        order_N = KeyedWindows(count, block, window, 1, epoch)[np.arange(count)]
        # Every window is 200 numbers long, but that with the last block, which has 7.
        starts = [0]
        while starts[-1] < count:
            has_last = (order_N[starts[-1] : starts[-1] + 157] >= 10_000).any()
            starts.append(starts[-1] + (157 if has_last else 200))
        blocks = [set((order_N[a:b] // block).tolist()) for a, b in zip(starts, starts[1:])]
        assert max(map(len, blocks)) == window and sum(map(len, blocks)) == 201
        assert len(set(order_N[:64] // block)) == window  # a batch mixes the blocks of its window
        blocks_of_windows.add(tuple(sorted(blocks[0])))
    assert len(blocks_of_windows) == 20


def counts_of(values_TN: np.ndarray, count: int) -> np.ndarray:
    """(N, count): how often each value is at each position."""
    return np.stack([np.bincount(values_T, minlength=count) for values_T in values_TN.T])


# 4,000 keys: a value is at a position T/N times on average. The statistic has (N - 1)^2 degrees of freedom, as rows and
# columns add up to T. One test of so many may fall outside of the middle 99.99 %, but not by chance.
@pytest.mark.parametrize("keys", ["seeds", "epochs", "streams"])
@pytest.mark.parametrize("count", [2, 3, 5, 7, 16, 33, 64, 97])
def test_values_are_uniform_at_each_position(count, keys):
    draws, position_N = 4000, np.arange(count)
    if keys == "streams":  # the windows of one epoch
        order = KeyedWindows(count * draws, count, 1, 5, 0)
        values_TN = order[np.arange(count * draws)].reshape(draws, count) % count
    else:
        of = (lambda key: (key, 0)) if keys == "seeds" else (lambda key: (11, key))
        values_TN = np.stack([KeyedPermutation(count, *of(key))[position_N] for key in range(draws)])
    expected = draws / count
    statistic = ((counts_of(values_TN, count) - expected) ** 2 / expected).sum()
    low, high = stats.chi2.ppf([0.00005, 0.99995], (count - 1) ** 2)
    assert low < statistic < high


def test_all_permutations_are_equally_frequent():
    """Of four numbers: a correlation between positions would show here."""
    draws = 24_000
    values_TN = np.stack([KeyedPermutation(4, key, key // 7)[np.arange(4)] for key in range(draws)])
    _, counts = np.unique(values_TN @ [64, 16, 4, 1], return_counts=True)
    assert len(counts) == 24
    statistic = ((counts - draws / 24) ** 2 / (draws / 24)).sum()
    assert stats.chi2.ppf(0.00005, 23) < statistic < stats.chi2.ppf(0.99995, 23)


@pytest.mark.parametrize("count", [BILLION, 2**30, 2**24 + 1, 50_000])
def test_neighbors_epochs_and_seeds_are_not_correlated(count):
    """Their rank correlations are within five standard deviations, 1 / sqrt(n) each, of zero."""
    position_B = np.arange(min(count, 40_000))
    value_B = KeyedPermutation(count, 3, 5)[position_B]
    others = {
        "neighbors": np.roll(value_B, 1),
        "distant ones": np.roll(value_B, 256),
        "epochs": KeyedPermutation(count, 3, 6)[position_B],
        "seeds": KeyedPermutation(count, 4, 5)[position_B],
        "far seeds": KeyedPermutation(count, 3 + 2**32, 5)[position_B],
        "purposes": KeyedPermutation(count, 3, 5, KEYED_LIMIT)[position_B],
        "positions": position_B,
    }
    for name, other_B in others.items():
        correlation = np.corrcoef(value_B, other_B)[0, 1]
        assert abs(correlation) < 5 / np.sqrt(len(position_B)), name
        assert (value_B == other_B).sum() < 10, name
    # And their low bits: 16 classes of equal size.
    statistic = ((np.bincount(value_B % 16) - len(value_B) / 16) ** 2 / (len(value_B) / 16)).sum()
    assert statistic < stats.chi2.ppf(0.99995, 15)


def test_positions_are_the_same_whoever_asks_for_them():
    """In any pieces and on any machine: a change of these numbers would change the batches of every resumed run."""
    permuted, windows = KeyedPermutation(BILLION, 7, 2), KeyedWindows(BILLION, 2730, 32, 7, 2)
    position_B = np.array([0, 1, 2, 999_999_999])
    for order, want in (
        (permuted, [699943755, 471139220, 881180553, 925937326]),
        (windows, [79763990, 734387227, 171332214, 439216733]),
    ):
        value_B = order[position_B]
        assert value_B.tolist() == want
        assert [order[position_B[b : b + 1]][0] for b in range(4)] == want
        assert order[position_B[::-1]].tolist() == want[::-1]
    assert permuted[np.empty(0, np.int64)].shape == (0,)
