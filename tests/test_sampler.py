"""Sampling: the noise is uniform and depends on (seed, position) only, and tokens come as often as they should."""

import math
import random

import numpy as np
import pytest
import torch

from jevons.engine.sampler import keep_top_p, sample, uniform


# A sound sampler goes past this (five and a half standard deviations and a margin) less than once in a million.
def chi_square_bound(degrees):
    return degrees + 5.5 * math.sqrt(2 * degrees) + 12


def chi_square(counts, shares):
    expected = np.asarray(shares) * np.sum(counts)
    assert expected.min() >= 5
    return float(((np.asarray(counts) - expected) ** 2 / expected).sum())


def noise(seeds, positions):
    return uniform(np.asarray(seeds, dtype=np.uint64), np.asarray(positions, dtype=np.uint64))


@pytest.mark.parametrize("axis", ["seed", "position"])
def test_noise_is_uniform_over_neighbours(axis):
    """Neighbouring seeds and positions are what runs use; pairs of neighbours must fill the square evenly too."""
    count, start, other = 20000, random.randrange(2**63), random.randrange(2**20)
    run = start + np.arange(count, dtype=np.uint64)
    fixed = np.full(count, other, dtype=np.uint64)
    u = noise(run, fixed) if axis == "seed" else noise(fixed, run % np.uint64(2**40))
    assert u.dtype == np.float64 and u.min() >= 0 and u.max() < 1
    cells = np.histogram(u, bins=64, range=(0, 1))[0]
    assert chi_square(cells, np.full(64, 1 / 64)) < chi_square_bound(63)
    for lag in (1, 2, 7):
        pairs = np.histogram2d(u[:-lag], u[lag:], bins=12, range=[(0, 1), (0, 1)])[0].flatten()
        assert chi_square(pairs, np.full(144, 1 / 144)) < chi_square_bound(143)


def test_noise_is_a_function_of_seed_and_position():
    seeds, positions = np.random.randint(0, 2**62, 50).astype(np.uint64), np.random.randint(0, 4096, 50).astype(np.uint64)
    u = noise(seeds, positions)
    order = np.random.permutation(50)
    assert (noise(seeds[order], positions[order]) == u[order]).all()
    assert all(noise([s], [p])[0] == v for s, p, v in zip(seeds, positions, u, strict=True))
    assert len(set(u)) == 50
    assert noise([2**64 - 1], [3])[0] != noise([0], [3])[0]


def test_noise_is_splitmix_of_both():
    """Spelt out in whole numbers: whoever keeps a seed keeps the text, in later versions too."""
    for _ in range(30):
        seed, position = random.randrange(2**64), random.randrange(2**20)
        z = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        assert noise([seed], [position])[0] == ((z ^ z >> 31) >> 11) / 2**53


def test_tokens_come_as_often_as_softmax_says():
    vocab, draws = random.randint(5, 12), 30000
    logits, temperature = torch.randn(vocab) * 1.5, random.uniform(0.4, 2.0)
    u = torch.from_numpy(noise(np.arange(draws), np.full(draws, random.randrange(999))))
    tokens, logprobs = sample(logits.expand(draws, -1), torch.full((draws,), temperature), torch.ones(draws), u)
    expected = (logits.double() / temperature).log_softmax(-1)
    common = [i for i in range(vocab) if expected[i].exp() * draws >= 8]
    counts = np.array([(tokens == i).sum().item() for i in common])
    shares = expected[common].exp().numpy()
    if len(common) < vocab:  # those too rare to count apart go together
        counts, shares = np.append(counts, draws - counts.sum()), np.append(shares, 1 - shares.sum())
        if shares[-1] * draws < 5:
            counts, shares = counts[:-1], shares[:-1] / shares[:-1].sum()
    assert chi_square(counts, shares) < chi_square_bound(len(shares) - 1)
    torch.testing.assert_close(logprobs.double(), expected[tokens], atol=1e-5, rtol=0)


def test_a_token_is_the_inverse_of_the_cumulative_distribution():
    rows, vocab = 200, 300
    logits = torch.randn(rows, vocab, dtype=torch.float64) * 3
    temperature, u = torch.rand(rows) + 0.3, torch.rand(rows, dtype=torch.float64)
    tokens, _ = sample(logits.float(), temperature, torch.ones(rows), u)
    edges = (logits / temperature[:, None].double()).softmax(-1).cumsum(-1)
    upper = edges.gather(1, tokens[:, None]).squeeze(1)
    lower = torch.where(tokens == 0, 0.0, edges.gather(1, (tokens - 1).clamp(min=0)[:, None]).squeeze(1))
    assert ((lower - 1e-6 <= u) & (u <= upper + 1e-6)).all()


def test_the_ends_of_the_noise_never_give_an_impossible_token():
    logits = torch.randn(6, 9)
    logits[:, [0, 1, 4, 8]] = float("-inf")
    ends = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-30, 1 - 2.0**-52, 0.999], dtype=torch.float64)
    tokens, logprobs = sample(logits, torch.ones(6), torch.ones(6), ends)
    assert logprobs.isfinite().all() and tokens[0] == 2
    tokens, logprobs = sample(logits, torch.ones(6), torch.full((6,), 0.6), ends)
    assert logprobs.isfinite().all()


def test_greedy_rows_beside_others():
    logits = torch.randn(40, 11)
    temperature = torch.where(torch.arange(40) % 3 == 0, 0.0, 1.3)
    tokens, logprobs = sample(logits, temperature, torch.full((40,), 0.9), torch.rand(40))
    greedy = temperature == 0
    assert (tokens[greedy] == logits[greedy].argmax(-1)).all()
    expected = torch.where(greedy[:, None], logits, logits / 1.3).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)


def nucleus(probs, top_p):
    """The smallest set of most likely tokens that reaches top_p."""
    kept, total = set(), 0.0
    for index in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if kept and total >= top_p:
            break
        kept.add(index)
        total += probs[index]
    return kept


def test_top_p_keeps_exactly_the_nucleus():
    probs = (torch.randn(60, 17) * random.uniform(0.5, 3)).softmax(-1)
    top_p = torch.rand(60).clamp(min=1e-3)
    for row, kept, p in zip(probs, keep_top_p(probs, top_p), top_p.tolist(), strict=True):
        edges = row.double().sort(descending=True).values.cumsum(0)
        if (edges - p).abs().min() < 1e-5:
            continue  # rounding decides
        inside = nucleus(row.tolist(), p)
        assert set(kept.nonzero().flatten().tolist()) == inside
        assert all(kept[i] == row[i] for i in inside)


def test_the_smallest_top_p_there_is_keeps_the_best_token():
    probs = torch.randn(8, 50).softmax(-1)
    kept = keep_top_p(probs, torch.tensor([1e-300, 1e-46, 5e-324, 1e-40] * 2))  # most of them 0 in float32
    assert ((kept > 0).sum(-1) == 1).all() and (kept.argmax(-1) == probs.argmax(-1)).all()


def test_top_p_on_the_edge():
    probs = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).repeat(4, 1)
    kept = keep_top_p(probs, torch.tensor([0.5, 0.50001, 0.75, 1e-6]))
    assert (kept > 0).sum(-1).tolist() == [1, 2, 2, 1]


def test_sampling_within_the_nucleus():
    """Renormalised within; the log-prob is still that of the whole distribution."""
    logits, draws, p = torch.tensor([2.0, 0.3, 1.2, -1.0, 0.9]) + torch.randn(5) * 0.1, 20000, 0.75
    probs = logits.double().softmax(-1)
    inside = sorted(nucleus(probs.tolist(), p))
    u = torch.from_numpy(noise(np.full(draws, random.randrange(10**9)), np.arange(draws)))
    tokens, logprobs = sample(logits.expand(draws, -1), torch.ones(draws), torch.full((draws,), p), u)
    counts = [(tokens == i).sum().item() for i in inside]
    assert sum(counts) == draws and len(inside) > 1
    assert chi_square(counts, (probs[inside] / probs[inside].sum()).numpy()) < chi_square_bound(len(inside) - 1)
    torch.testing.assert_close(logprobs.double(), probs.log()[tokens], atol=1e-5, rtol=0)


def test_what_is_not_finite_shows_in_the_log_prob():
    logits = torch.randn(4, 7)
    logits[1, 3] = float("nan")
    logits[2, 3] = float("inf")
    tokens, logprobs = sample(logits, torch.tensor([1.0, 1.0, 0.5, 0.0]), torch.tensor([1.0, 0.5, 0.5, 1.0]), torch.rand(4))
    assert logprobs.isfinite().tolist() == [True, False, False, True]
    assert ((tokens >= 0) & (tokens < 7)).all()
