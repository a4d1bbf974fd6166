"""LaS attention once more, from the definitions, in NumPy float64 loops: shares no code
with the library."""

import numpy as np


def window_keys(j, L, W, causal):
    "The keys that exist in the window of key `j`."
    lo, hi = (j - W + 1, j) if causal else (j - (W - 1) // 2, j + W // 2)
    return [t for t in range(lo, hi + 1) if 0 <= t < L]


def window_shares(j, L, W, causal):
    """What the keys in the window of key `j` count: of a whole number W, or of weights,
    newest key first."""
    weights = [1 / W] * W if isinstance(W, int) else [float(w) for w in W]
    newest = j if causal else j + len(weights) // 2
    shares = {newest - t: w for t, w in enumerate(weights)}
    exist = {key: w for key, w in shares.items() if 0 <= key < L}
    there = sum(abs(w) for w in exist.values())
    scale = sum(abs(w) for w in weights) / there if there else 0
    return {key: scale * w for key, w in exist.items()}


def las_head(q, k, v, alpha, W, pool, causal):
    "One head of one sequence without padding: `(L, D)` each."
    L, D = q.shape
    out = np.zeros((L, v.shape[1]))
    windows = [window_shares(j, L, W, causal) for j in range(L)]
    for i in range(L):
        seen = [j for j in range(L) if j <= i or not causal]
        e = [
            np.exp(-alpha * abs(i - j)) * np.dot(q[i], k[j]) / np.sqrt(D)
            for j in range(L)
        ]
        if pool == "scores":
            e = [sum(part * e[t] for t, part in keys.items()) for keys in windows]
        top = max(e[j] for j in seen)
        w = {j: np.exp(e[j] - top) for j in seen}
        total = sum(w.values())
        for j in seen:
            share = w[j] / total
            if pool == "scores":
                out[i] += share * v[j]
            else:
                for t, part in windows[j].items():
                    out[i] += share * part * v[t]
    return out


def las(q, k, v, rates, W, pool, causal, lengths=None):
    """`(B, H, L, D)` arrays; rows beyond a sequence's length are zero. `W` is a whole
    number, weights, or an array of them with one row per head."""
    B, H, L, _ = q.shape
    out = np.zeros(v.shape)
    for b in range(B):
        n = L if lengths is None else int(lengths[b])
        for h in range(H):
            W_h = W[h] if np.ndim(W) == 2 else W
            head = (t[b, h, :n] for t in (q, k, v))
            out[b, h, :n] = las_head(*head, float(rates[h]), W_h, pool, causal)
    return out
