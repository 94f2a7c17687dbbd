"""Causal attention and its gradients in float64, one score at a time."""

import math

import numpy as np


def attention(query, key, value, *, scale, window=None, segments=None, softcap=None):
    """query [B, T, N, H], key and value [B, T, G, H] -> [B, T, N, H].

    Query head n reads key head n // (N / G).
    """
    return _attention(query, key, value, scale, window, segments, softcap)[0]


def gradients(query, key, value, weight, *, scale, window=None, segments=None, softcap=None):
    """Of the sum of weight times attention, by query, key and value."""
    query, key, value, weight = (np.asarray(x, np.float64) for x in (query, key, value, weight))
    _, every = _attention(query, key, value, scale, window, segments, softcap)
    by_query, by_key, by_value = np.zeros(query.shape), np.zeros(key.shape), np.zeros(value.shape)
    group = query.shape[2] // key.shape[2]
    for (b, t, n), (shares, slopes) in every.items():
        g = n // group
        by_share = {s: float(np.dot(weight[b, t, n], value[b, s, g])) for s in shares}
        mean = sum(shares[s] * by_share[s] for s in shares)
        for s, share in shares.items():
            by_value[b, s, g] += share * weight[b, t, n]
            by_product = share * (by_share[s] - mean) * slopes[s] * scale
            by_query[b, t, n] += by_product * key[b, s, g]
            by_key[b, s, g] += by_product * query[b, t, n]
    return by_query, by_key, by_value


def _attention(query, key, value, scale, window, segments, softcap):
    """The result, and for each (row, position, head) the shares and the soft cap's slopes by position."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    rows, length, heads, _ = query.shape
    group = heads // key.shape[2]
    out, every = np.zeros(query.shape), {}
    for b in range(rows):
        for t in range(length):
            for n in range(heads):
                scores, slopes = {}, {}
                for s in range(t + 1):
                    if window is not None and t - s >= window:
                        continue
                    if segments is not None and segments[b][s] != segments[b][t]:
                        continue
                    score, slope = scale * float(np.dot(query[b, t, n], key[b, s, n // group])), 1.0
                    if softcap is not None:
                        bent = math.tanh(score / softcap)
                        score, slope = softcap * bent, 1 - bent**2
                    scores[s], slopes[s] = score, slope
                largest = max(scores.values())
                total = sum(math.exp(score - largest) for score in scores.values())
                shares = {s: math.exp(score - largest) / total for s, score in scores.items()}
                for s, share in shares.items():
                    out[b, t, n] += share * value[b, s, n // group]
                every[b, t, n] = shares, slopes
    return out, every
