"""LaS attention once more, from the definitions, in NumPy float64 loops: shares no code
with the library."""

import numpy as np


def window_keys(j, L, W, causal):
    "The keys that exist in the window of key `j`."
    lo, hi = (j - W + 1, j) if causal else (j - (W - 1) // 2, j + W // 2)
    return [t for t in range(lo, hi + 1) if 0 <= t < L]


def las_head(q, k, v, alpha, W, pool, causal):
    "One head of one sequence without padding: `(L, D)` each."
    L, D = q.shape
    out = np.zeros((L, v.shape[1]))
    for i in range(L):
        seen = [j for j in range(L) if j <= i or not causal]
        e = [
            np.exp(-alpha * abs(i - j)) * np.dot(q[i], k[j]) / np.sqrt(D)
            for j in range(L)
        ]
        if pool == "scores":
            e = [
                np.mean([e[t] for t in window_keys(j, L, W, causal)]) for j in range(L)
            ]
        top = max(e[j] for j in seen)
        w = {j: np.exp(e[j] - top) for j in seen}
        total = sum(w.values())
        for j in seen:
            share = w[j] / total
            if pool == "scores":
                out[i] += share * v[j]
            else:
                keys = window_keys(j, L, W, causal)
                for t in keys:
                    out[i] += share / len(keys) * v[t]
    return out


def las(q, k, v, rates, W, pool, causal, lengths=None):
    "`(B, H, L, D)` arrays; rows beyond a sequence's length are zero."
    B, H, L, _ = q.shape
    out = np.zeros(v.shape)
    for b in range(B):
        n = L if lengths is None else int(lengths[b])
        for h in range(H):
            out[b, h, :n] = las_head(
                q[b, h, :n], k[b, h, :n], v[b, h, :n], float(rates[h]), W, pool, causal
            )
    return out
