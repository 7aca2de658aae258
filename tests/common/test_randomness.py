"""The counter-based random numbers: known answers, distributions, and what they depend on."""

import numpy as np
import pytest
import torch
from scipy import stats

from fastssl.common.randomness import normals, permutation, philox


def test_philox_equals_the_published_test_vectors():
    """Random123's known answers for philox4x32-10."""

    def run(counter, key):
        words = philox(tuple(torch.tensor(c) for c in counter), key[0] | key[1] << 32)
        return [int(w) for w in words]

    ones = 0xFFFFFFFF
    assert run([0] * 4, [0, 0]) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert run([ones] * 4, [ones, ones]) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert run([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]) == [
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
    ]  # fmt: skip


def test_noise_is_standard_normal_and_independent_of_the_batch():
    index = torch.arange(64)
    noise = normals(3, 7, index, 0, draws=4, dim=500)
    assert noise.shape == (4, 64, 500) and noise.dtype == torch.float32
    flat = noise.flatten().double().numpy()
    assert stats.kstest(flat, "norm").pvalue > 1e-3
    assert abs(flat.mean()) < 0.01 and abs(flat.std() - 1) < 0.01  # 128,000 numbers: 3.6 standard errors
    assert abs(np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1]) < 0.02
    assert torch.equal(noise[:2, 10:20], normals(3, 7, index[10:20], 0, draws=2, dim=500))
    assert not torch.equal(noise, normals(3, 7, index, 1, 4, 500))
    assert not torch.equal(noise, normals(3, 8, index, 0, 4, 500))
    assert not torch.equal(noise, normals(4, 7, index, 0, 4, 500))


def test_each_epoch_has_its_own_permutation():
    first, second = permutation(0, 0, 1000), permutation(0, 1, 1000)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert not torch.equal(first, second)
    assert torch.equal(first, permutation(0, 0, 1000))


@pytest.mark.slow
def test_compiled_noise_has_the_same_bits():
    args = 3, torch.tensor(7), torch.arange(5), 1, 3, 20
    compiled = torch.compile(normals, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(*args), normals(*args))
