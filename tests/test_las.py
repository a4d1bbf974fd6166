import math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa
from las_nb.attention import attention, causal_mask
from las_nb.fast import las_attention
from las_nb.las import POOLS, las_dense, las_weights
from las_nb.mixers import LaSAttention
from las_nb.locality import decay_rates, distance_matrix, locality_kernel
from las_nb.smoothing import (
    pooling_matrix,
    smooth_keys,
    smooth_scores,
    smooth_values,
    smooth_weights,
)
import naive

EPS = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 8e-2,
}
pools, causals = st.sampled_from(["scores", "weights"]), st.booleans()


def qkv(B, H, L, D, seed=0, dtype=torch.float64, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(B, H, L, D, generator=g, dtype=torch.float64)).to(dtype)
        for _ in range(3)
    ]


def numpy(ts):
    return [t.double().numpy() for t in ts]


@st.composite
def problems(draw):
    B, H, L, D = (draw(st.integers(1, n)) for n in (2, 4, 17, 5))
    rates = torch.tensor(
        draw(
            st.lists(
                st.sampled_from([0.0, 1e-3, 0.05, 0.3, 2.0, 50.0]),
                min_size=H,
                max_size=H,
            )
        ),
        dtype=torch.float64,
    )
    lengths = draw(st.none() | st.lists(st.integers(1, L), min_size=B, max_size=B))
    return (
        B,
        H,
        L,
        D,
        rates,
        None if lengths is None else torch.tensor(lengths),
        draw(st.integers(0, 999)),
    )


@settings(max_examples=150, deadline=None)
@given(
    problems(),
    st.integers(1, 25),
    pools,
    causals,
    st.sampled_from(list(EPS)),
    st.sampled_from([0.1, 1.0, 4.0]),
)
def test_equals_the_naive_loop(problem, W, pool, causal, dtype, scale):
    B, H, L, D, rates, lengths, seed = problem
    if dtype in (torch.float16, torch.bfloat16):
        scale = min(scale, 1.0)
    a = qkv(B, H, L, D, seed, dtype, scale)
    out = las_dense(*a, rates, W, pool, causal, lengths)
    assert out.dtype == dtype and out.shape == (B, H, L, D) and out.isfinite().all()
    want = torch.tensor(naive.las(*numpy(a), rates, W, pool, causal, lengths))
    for b in range(B):
        n = L if lengths is None else lengths[b]
        torch.testing.assert_close(
            out[b, :, :n].double(),
            want[b, :, :n],
            rtol=0,
            atol=EPS[dtype] * scale**2 * 4,
        )


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(1, 25), pools, causals)
def test_padding_never_matters(problem, W, pool, causal):
    B, H, L, D, rates, lengths, seed = problem
    if lengths is None:
        lengths = torch.full((B,), L)
    a = qkv(B, H, L, D, seed)
    dirty = [t.clone() for t in a]
    for t in dirty:
        for b in range(B):
            t[b, :, lengths[b] :] = math.nan
    out = las_dense(*dirty, rates, W, pool, causal, lengths)
    for b in range(B):
        n = int(lengths[b])
        alone = las_dense(*(t[b : b + 1, :, :n] for t in a), rates, W, pool, causal)
        torch.testing.assert_close(out[b : b + 1, :, :n], alone, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(1, 25), pools, st.data())
def test_past_does_not_move(problem, W, pool, data):
    B, H, L, D, rates, _, seed = problem
    cut = data.draw(st.integers(0, L))
    a, b = qkv(B, H, L, D, seed), qkv(B, H, L, D, seed + 1, scale=30.0)
    mixed = [torch.cat([x[:, :, :cut], y[:, :, cut:]], 2) for x, y in zip(a, b)]
    assert torch.equal(
        las_dense(*a, rates, W, pool)[:, :, :cut],
        las_dense(*mixed, rates, W, pool)[:, :, :cut],
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), causals, st.integers(0, 99))
def test_smoothing_is_the_matrix(L, W, causal, seed):
    g = torch.Generator().manual_seed(seed)
    e = torch.randn(2, L, L, generator=g, dtype=torch.float64)
    v = torch.randn(2, L, 3, generator=g, dtype=torch.float64)
    P = torch.zeros(L, L, dtype=torch.float64)
    for k in range(L):
        keys = naive.window_keys(k, L, W, causal)
        P[k, keys] = 1 / len(keys)
    for got, want in (
        (pooling_matrix(L, W, causal), P),
        (smooth_scores(e, W, causal), e @ P.T),
        (smooth_weights(e, W, causal), e @ P),
        (smooth_values(v, W, causal), P @ v),
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(1, 25))
def test_identities(problem, W):
    B, H, L, D, rates, _, seed = problem
    q, k, v = qkv(B, H, L, D, seed)
    for causal in (True, False):
        torch.testing.assert_close(
            las_dense(q, k, v, rates, W, "weights", causal),
            las_dense(q, k, smooth_values(v, W, causal), rates, 1, causal=causal),
            rtol=0,
            atol=1e-12,
        )
    torch.testing.assert_close(
        las_dense(q, k, v, rates, W, "scores"),
        las_dense(q, smooth_keys(k, rates, W), v, rates, 1),
        rtol=0,
        atol=1e-11,
    )


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("causal", [True, False])
def test_the_plain_corner_is_sdpa(dtype, causal):
    a = qkv(2, 3, 31, 8, dtype=dtype)
    want = sdpa(*(t.double() for t in a), is_causal=causal).to(dtype)
    for got in (
        las_dense(*a, torch.zeros(3), 1, "scores", causal),
        las_dense(*a, torch.zeros(3), 1, "weights", causal),
        attention(*a, causal),
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=EPS[dtype])


@pytest.mark.parametrize("pool", ["scores", "weights"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 2])])
def test_gradcheck(pool, causal, lengths):
    a = [t.requires_grad_() for t in qkv(2, 2, 5, 3)]
    rates = torch.tensor([0.05, 0.3], dtype=torch.float64, requires_grad=True)

    def f(q, k, v, r):
        out = las_dense(q, k, v, r, 3, pool, causal, lengths)
        return (
            out
            if lengths is None
            else torch.cat([out[0], out[1, :, :2].repeat(1, 3, 1)[:, :5]])
        )

    assert torch.autograd.gradcheck(f, (*a, rates))


@pytest.mark.parametrize("L", [1, 2, 7])
@pytest.mark.parametrize("W", [1, 3, 100])
@pytest.mark.parametrize("pool", ["scores", "weights"])
@pytest.mark.parametrize("causal", [True, False])
def test_rows_sum_to_one(L, W, pool, causal):
    q, k, _ = qkv(2, 3, L, 4)
    w = las_weights(q, k, decay_rates(3, 0.3), W, pool, causal)
    torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]))
    if causal:
        assert (w * ~causal_mask(L)).abs().max() == 0


def test_large_scores_stay_finite():
    for dtype in EPS:
        q, k, v = qkv(1, 2, 20, 8, dtype=dtype, scale=60.0)
        q = q.requires_grad_()
        for pool in ("scores", "weights"):
            out = las_dense(q, k, v, torch.tensor([0.0, 0.3]), 3, pool)
            (grad,) = torch.autograd.grad(out.sum(), q)
            assert out.isfinite().all() and grad.isfinite().all()


def test_rates():
    assert decay_rates(1, 0.5).tolist() == [0.0]
    assert decay_rates(4, 0.8).tolist() == pytest.approx([0, 0.2, 0.4, 0.8])
    uniform = decay_rates(5, 0.5, "uniform")
    np.testing.assert_allclose(
        np.exp(-uniform.numpy()), np.linspace(1, math.exp(-0.5), 5), atol=1e-6
    )
    assert uniform.min() >= 0 and decay_rates(6, 0.0).abs().max() == 0
    assert locality_kernel(torch.tensor([0.5]), 3)[0, 2].tolist() == pytest.approx(
        [math.exp(-1), math.exp(-0.5), 1]
    )
    assert distance_matrix(3).tolist() == [[0, 1, 2], [1, 0, 1], [2, 1, 0]]


@pytest.mark.parametrize(
    "kw, says",
    [
        (dict(window=0), "window must be"),
        (dict(window=2.5), "window must be"),
        (dict(pool="mean"), "'scores', 'weights'"),
        (dict(method="flash"), "'dense'"),
        (dict(rates=torch.zeros(2)), r"shape \(3,\)"),
        (dict(rates=torch.tensor([0.0, -1, 0])), ">= 0"),
        (dict(rates=torch.tensor([0.0, math.nan, 0])), "finite"),
        (dict(lengths=torch.tensor([3])), "one per sequence"),
        (dict(lengths=torch.tensor([0, 3])), "between 1 and 6"),
        (dict(lengths=torch.tensor([7, 3])), "between 1 and 6"),
        (dict(lengths=torch.tensor([1.0, 3.0])), "whole numbers"),
        (dict(k=torch.zeros(2, 3, 5, 4)), "share the shape"),
        (dict(v=torch.zeros(2, 3, 6, 4, dtype=torch.float64)), "dtype"),
        (dict(q=torch.zeros(6, 4)), r"\(B, H, L, D\)"),
    ],
)
def test_bad_input_is_explained(kw, says):
    args = (
        dict(
            q=torch.zeros(2, 3, 6, 4),
            k=torch.zeros(2, 3, 6, 4),
            v=torch.zeros(2, 3, 6, 4),
            rates=torch.zeros(3),
        )
        | kw
    )
    with pytest.raises(ValueError, match=says):
        las_attention(**args)


@pytest.mark.parametrize(
    "kw, says",
    [
        (dict(dim=30), "multiple of n_heads"),
        (dict(max_rate=-1.0), "max_rate"),
        (dict(max_rate=math.inf), "max_rate"),
        (dict(n_heads=0), "n_heads"),
        (dict(spacing="log"), "spacing"),
        (dict(window=-3), "window"),
        (dict(pool="max"), "pool"),
    ],
)
def test_bad_layers_are_explained(kw, says):
    with pytest.raises(ValueError, match=says):
        LaSAttention(**(dict(dim=32) | kw))


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("pool", ["scores", "weights"])
def test_layer(dtype, pool):
    torch.manual_seed(0)
    layer = LaSAttention(16, n_heads=4, pool=pool).to(dtype)
    x = torch.randn(2, 11, 16, dtype=dtype)
    changed = x.clone()
    changed[:, 6:] += 3
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x)[:, :6], layer(changed)[:, :6])
    with pytest.raises(ValueError, match="B, L, 16"):
        layer(x[0])


def test_casting_keeps_the_rates():
    layer = LaSAttention(16, max_rate=0.3)
    exact = layer.rates.clone()
    assert torch.equal(layer.bfloat16().rates, exact) and torch.equal(
        layer.float().rates, exact
    )
    assert layer.to("meta").rates.device.type == "meta"


def test_nan_in_padding_reaches_no_gradient():
    layer = LaSAttention(16, n_heads=4, causal=False)
    x = torch.randn(2, 6, 16)
    x[1, 3:] = math.nan
    lengths = torch.tensor([6, 3])
    layer(x, lengths)[1, :3].sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert layer.weights(x, lengths).isfinite().all()


def test_rates_reach_both_ends_exactly():
    for max_rate in (1e-8, 1e-3, 0.3, 5.0, 500.0):
        for spacing in ("geometric", "uniform"):
            rates = decay_rates(8, max_rate, spacing)
            assert (
                rates[0] == 0
                and rates[-1] == torch.tensor(max_rate)
                and rates.isfinite().all()
                and (rates.diff() >= 0).all()
            )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pool", POOLS)
def test_matrices_of_layers_with_blocks(causal, pool):
    torch.manual_seed(0)
    layer = LaSAttention(16, 4, pool=pool, causal=causal, chunk=8).double()
    x, lengths = torch.randn(2, 21, 16).double(), torch.tensor([21, 11])
    for n in (None, lengths):
        q, k, v = layer.heads(x, n)
        got, want = layer.weights(x, n) @ v, layer.mix(q, k, v, n)
        for b, end in enumerate((21, 21 if n is None else 11)):
            torch.testing.assert_close(got[b, :, :end], want[b, :, :end])


@pytest.mark.parametrize("kind", [tuple, list])
def test_rates_may_be_plain_numbers(kind):
    q, k, v = qkv(2, 3, 9, 4)
    rates = torch.tensor([0.0, 0.1, 0.7], dtype=torch.float64)
    given = kind(rates.tolist())
    for f, a in ((las_dense, (q, k, v)), (las_weights, (q, k))):
        assert torch.equal(f(*a, given), f(*a, rates))
    assert torch.equal(locality_kernel(given, 9), locality_kernel(rates, 9))
    assert torch.equal(smooth_keys(k, given, 3), smooth_keys(k, rates, 3))
    wrong = 0.1, None, "abc", kind([0.1]), kind([0.1, 0.2, -1]), kind([0, 0, math.inf])
    for bad in wrong:
        for f, a in ((las_dense, (q, k, v)), (las_weights, (q, k))):
            with pytest.raises(ValueError, match="^rates must be"):
                f(*a, bad)
