"""From logits to tokens. The noise of a token is a function of its request's seed and its position, nothing else.

Shape suffixes: S sequences, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch


def uniform(seeds_S: np.ndarray, positions_S: np.ndarray) -> np.ndarray:
    """A uniform number in [0, 1) for each (seed, position): SplitMix64's finaliser over both (uint64 in, float64 out)."""
    with np.errstate(over="ignore"):
        z = seeds_S * np.uint64(0x9E3779B97F4A7C15) + positions_S * np.uint64(0xD1B54A32D192ED03) + np.uint64(0x2545F4914F6CDD1D)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def noise(seeds_S: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
    """`uniform` of int64 tensors on any device, to the bit: int64 wraps as uint64 does."""
    def signed(number: int) -> int:
        return number - 2**64 if number >= 2**63 else number

    def shifted(z: torch.Tensor, by: int) -> torch.Tensor:
        return (z >> by) & (2 ** (64 - by) - 1)

    z = seeds_S * signed(0x9E3779B97F4A7C15) + positions_S * signed(0xD1B54A32D192ED03) + 0x2545F4914F6CDD1D
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ shifted(z, shift)) * signed(factor)
    return shifted(z ^ shifted(z, 31), 11).double() * 2.0**-53


def sample(logits_SV: torch.Tensor, temperature_S: torch.Tensor, top_p_S: torch.Tensor, uniform_S: torch.Tensor,
           any_narrow: bool | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [S] and their log-probs [S] under the distribution with temperature, before top-p. Temperature 0 is greedy
    (its log-probs are those at temperature 1). Where `any_narrow` says whether a top_p matters, no shape depends on the data,
    and nothing waits for the device."""
    greedy = temperature_S == 0
    logprobs = (logits_SV.float() / torch.where(greedy, 1.0, temperature_S)[:, None]).log_softmax(-1)
    probs = logprobs.exp()
    narrow = (top_p_S < 1) & ~greedy
    if any_narrow:
        probs = torch.where(narrow[:, None], keep_top_p(probs, top_p_S), probs)
    elif any_narrow is None and narrow.any():
        probs[narrow] = keep_top_p(probs[narrow], top_p_S[narrow])
    # the inverse of the cumulative distribution, in float64 so that a long tail keeps its share
    cumulative = probs.double().cumsum(-1)
    point = uniform_S.double()[:, None] * cumulative[:, -1:]
    drawn = (cumulative <= point).sum(-1).clamp(max=logits_SV.shape[-1] - 1)
    tokens = torch.where(greedy, logits_SV.argmax(-1), drawn)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def keep_top_p(probs_SV: torch.Tensor, top_p_S: torch.Tensor) -> torch.Tensor:
    """Zero all but the smallest set of most likely tokens whose probability reaches top_p (at least one)."""
    ranked, order = probs_SV.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    # a top_p too small for float32 is 0 by now, and would leave none
    ranked = ranked.masked_fill((before >= top_p_S[:, None]) & (before > 0), 0.0)
    return torch.zeros_like(probs_SV).scatter_(1, order, ranked)
