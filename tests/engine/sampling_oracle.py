"""The next token of one row, by the definitions alone: one row and one number at a time, by nothing of the server's.

Only the softmax is torch's: what is kept of a row is defined on its probabilities in float32.
"""

import math

import torch
from torch import Tensor

from swaplora_server.engine.request import SamplingParams, Sequence

GROUP = 256
WORD = 2**32


def filtered_probs(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities of one row [vocab_size] after temperature, then top_k, top_p and min_p, each of what is left."""
    probs = ((logits - logits.max()) / params.temperature).softmax(-1)
    if params.top_k or params.top_p < 1.0:
        ordered, order = probs.sort(descending=True, stable=True)
        drop = torch.zeros_like(ordered, dtype=torch.bool)
        if params.top_k:
            drop[params.top_k :] = True
        kept = ordered.masked_fill(drop, 0.0)
        kept = kept / kept.sum()
        drop |= kept.cumsum(-1) - kept >= params.top_p
        drop[0] = False
        probs = probs.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), 0.0)
    if params.min_p:
        probs = probs.masked_fill(probs < params.min_p * probs.max(), 0.0)
    return probs


def kept_tokens(logits: Tensor, params: SamplingParams) -> set[int]:
    """The same filters in exact sums, of probabilities cut to multiples of 2^-60: what is less than that is nothing."""
    probs: list[float] = ((logits - logits.max()) / params.temperature).softmax(-1).tolist()
    masses = [int(p * 2**60) for p in probs]
    order = sorted(range(len(probs)), key=lambda token_id: (-probs[token_id], token_id))
    order = order[: params.top_k or None]
    wanted = math.ceil(params.top_p * float(sum(masses[token_id] for token_id in order)))
    before = 0
    kept: list[int] = []
    for token_id in order:
        if kept and params.top_p < 1.0 and before >= wanted:
            break
        kept.append(token_id)
        before += masses[token_id]
    least = float(torch.tensor(params.min_p) * float(max(probs)))
    return {token_id for token_id in kept if not params.min_p or probs[token_id] >= least}


def shaped(logits: Tensor, sequence: Sequence, allowed: set[int] | None = None) -> Tensor:
    """Bias, then what is forbidden, then penalties."""
    params, x = sequence.request.params, logits.double().clone()
    generated = sequence.token_ids[len(sequence.request.prompt_ids) :]
    for token_id, value in params.logit_bias:
        x[token_id] += value
    for token_id in range(len(x)):
        if params.allowed_token_ids is not None and token_id not in params.allowed_token_ids:
            x[token_id] = -math.inf
        if allowed is not None and token_id not in allowed:
            x[token_id] = -math.inf
        if len(generated) < params.min_tokens and token_id in params.stop_token_ids:
            x[token_id] = -math.inf
        if token_id in sequence.token_ids:
            x[token_id] *= 1 / params.repetition_penalty if x[token_id] > 0 else params.repetition_penalty
        count = generated.count(token_id)
        x[token_id] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    return x.float()


def draw(probs: list[float], seed: int, index: int, position: int) -> int:
    """The token that wins: a race of the groups of 256 tokens, then one within the group that has won it."""
    groups = [probs[start : start + GROUP] for start in range(0, len(probs), GROUP)]
    noise = exponentials(seed, index, position, GROUP + len(groups))
    scores = [sum(group) / e for group, e in zip(groups, noise[GROUP:], strict=True)]
    group = scores.index(max(scores))
    within = [p / e for p, e in zip(groups[group], noise, strict=False)]
    return group * GROUP + within.index(max(within))


def exponentials(seed: int, index: int, position: int, count: int) -> list[float]:
    """-log of `count` random numbers between 0 and 1, four of each block."""
    words = [
        word
        for block in range(-(-count // 4))
        for word in philox([block, position, index, 0], [seed % WORD, seed // WORD % WORD])
    ]
    return [-math.log((word + 0.5) / WORD) for word in words[:count]]


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 as its paper writes it."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, WORD)
        high1, low1 = divmod(0xCD9E8D57 * c2, WORD)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return [c0, c1, c2, c3]
