"""The fast paths where numbers are extreme: rates, sizes of queries and keys, half
precision, windows as wide as the sequence; and what is refused."""

import math, shutil
import numpy as np, pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode
from las_nb.fast import TOL, las_attention, plan, score_bounds
from las_nb.fast.bands import between, level, two_sided
from las_nb.las import las_dense
from las_nb.locality import decay_rates
from las_nb.mixers import LaSAttention
import naive

both = pytest.mark.parametrize("causal", [True, False])
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def noise(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def error(got, want, v):
    "Of the worst output, relative to the largest value."
    assert got.isfinite().all()
    off = (got.double() - want.double()).norm(dim=-1).max()
    return (off / v.double().norm(dim=-1).max()).item()


@both
@pytest.mark.parametrize("method", ["dense", "linear"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_rate(dtype, method, causal):
    rates = (1e-300, 1e-40, 1e-3, 20.0, 79.0, 120.0, 178.0, 1e3, 1e6, 1e40, 1e300)
    q, k, v = (t.to(dtype) for t in noise(3, 1, len(rates), 50, 4))
    q = 40 * q
    for window in (1, 3):
        a = [t.clone().requires_grad_() for t in (q, k, v)]
        got = las_attention(*a, rates, window, causal=causal, method=method)
        numbers = (t.double().numpy() for t in (q, k, v))
        want = torch.tensor(naive.las(*numbers, rates, window, "scores", causal))
        assert error(got, want, v) < TOL[dtype]
        assert all(g.isfinite().all() for g in torch.autograd.grad(got.sum(), a))
        # the plan of its own choice, where a matrix is too small to be a test
        long = [t.repeat(1, 1, 5, 1) for t in (q, k, v)]
        got = las_attention(*long, rates, window, causal=causal)
        exact = torch.tensor(rates, dtype=torch.float64)
        want = las_dense(*(t.double() for t in long), exact, window, causal=causal)
        assert error(got, want, v) < TOL[dtype]


def test_a_rate_that_a_layer_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="finite in torch.float32; got 1e"):
        decay_rates(4, 1e300)


SIZES = {torch.float16: 2e3, torch.bfloat16: 1e22, torch.float32: 1e22}


@both
@pytest.mark.parametrize("dtype", [*SIZES, torch.float64])
def test_tiny_queries_and_huge_keys(dtype, causal):
    L, size = 400, SIZES.get(dtype, 1e150)
    q, k, v = noise(3, 1, 4, L, 8)
    pairs = (q / size, k * size), (q * size, k / size)
    # one key that is larger than all others
    uneven = torch.where(torch.arange(L)[:, None] == 200, 1.0, 1e-3)
    for q, k in (*pairs, (q / size, k * size * uneven)):
        a = [t.to(dtype) for t in (q, k, v)]
        rates = (2 / L, 10 / L, 60 / L, 0.5)
        exact = torch.tensor(rates, dtype=torch.float64)
        want = las_dense(*(t.double() for t in a), exact, 1, causal=causal)
        for method in ("auto", "linear"):
            got = las_attention(*a, rates, 1, causal=causal, method=method)
            assert error(got, want, v) < TOL[dtype]


def test_levelling_rounds_nothing():
    q, k = noise(2, 3, 2, 9, 4).float()
    for size in (1e-30, 1e-3, 1.0, 1e25):
        a, b = level(q * size, k / size)
        for x, y in ((a, q * size), (b, k / size)):
            assert torch.equal(x.frexp().mantissa, y.frexp().mantissa)
        ratio = a.abs().amax((0, 2, 3)) / b.abs().amax((0, 2, 3))
        assert ((ratio > 0.49) & (ratio < 2.05)).all()
    for bad in (0.0, math.inf, math.nan):
        a, b = level(q.clone().fill_(bad), k)
        assert b.isfinite().all() and b.abs().max() > 0
    # scores whose factors overflow when they are squared
    assert score_bounds(q * 1e25, k / 1e25) == pytest.approx(score_bounds(q, k))


@halves
@pytest.mark.parametrize("width", [16, 24])
@both
def test_half_precision_keeps_its_promise_where_scores_are_large(dtype, width, causal):
    L, rates = 500, (0.0, 8 / 500, 60 / 500, 0.3)
    for window, pool in ((1, "scores"), (3, "scores"), (3, "weights")):
        q, k = (t.to(dtype) for t in noise(2, 1, 4, L, 16))
        q, v = 40 * q, noise(1, 4, L, width, seed=1).to(dtype)
        wide, exact = [t.double() for t in (q, k, v)], torch.tensor(rates).double()
        want = las_dense(*wide, exact, window, pool, causal)
        dense = error(las_dense(q, k, v, exact, window, pool, causal), want, v)
        for method in ("auto", "linear"):
            o = las_attention(q, k, v, rates, window, pool, causal, method=method)
            assert o.dtype == dtype and error(o, want, v) < 1.5 * dense + 1e-3


def test_a_row_that_is_not_finite_leaves_the_past_alone():
    q, k, v = noise(3, 1, 2, 600, 8)
    q, rates = 20 * q, (0.1, 0.4)
    want = las_dense(q, k, v, torch.tensor(rates).double(), 1)
    for bad in (math.nan, math.inf):
        k[:, :, -1] = bad
        got = las_attention(q, k, v, rates, 1, method="linear", tol=1e-4)
        assert error(got[:, :, :400], want[:, :, :400], v) < 1e-4


class Count(TorchDispatchMode):
    "How many operations run."

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


def test_wide_windows_take_few_steps():
    a, rates, taken = noise(3, 1, 2, 90, 4), torch.tensor([0.0, 0.1]), []
    for window in (5, 21, 85):
        with Count() as count:
            between(*a, rates, window)
        taken.append(count.n)
    # a few for every weight, not for every pair of them
    assert taken[2] - taken[0] <= 4 * (85 - 5)


@pytest.mark.parametrize("window", [4, 63, 80, 300])
def test_windows_of_any_width_on_both_sides(window):
    a, ends = noise(3, 2, 2, 64, 4), torch.tensor([64, 40])
    rates = torch.tensor([0.0, 0.2]).double()
    q, k, v = (t * (torch.arange(64) < ends[:, None])[:, None, :, None] for t in a)
    for lengths in (None, ends):
        got = two_sided(q, k, v, rates, window, lengths=lengths)
        for b, n in enumerate((64, 64) if lengths is None else (64, 40)):
            x = (t[b : b + 1, :, :n].numpy() for t in (q, k, v))
            want = naive.las(*x, rates.numpy(), window, "scores", False)
            np.testing.assert_allclose(got[b : b + 1, :, :n], want, atol=1e-12)


def test_the_plan_knows_the_window():
    for window, method in ((1, "sdpa"), (300, "sdpa"), (2000, "dense")):
        assert plan((0.0, 0.01), 1000, window=window)[0].method == method

    # on both sides, every key of a window is a pass over the matrix
    for L, window, dense in ((128, 3, True), (512, 64, False), (512, 200, False)):
        found = plan(decay_rates(8, 0.1), L, batch=2, window=window, causal=False)
        assert [g.method == "dense" for g in found] == [dense] * len(found)


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="flex needs a C++ compiler on the CPU",
)
def test_flex_takes_a_second_length_and_a_second_window():
    for L, window in ((70, 3), (90, 5)):
        a, rates = noise(3, 1, 2, L, 8).float(), (0.02, 0.4)
        with torch.no_grad():
            got = las_attention(*a, rates, window, causal=False, method="flex")
        x = (t.double().numpy() for t in a)
        want = torch.tensor(naive.las(*x, rates, window, "scores", False))
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@both
@pytest.mark.parametrize("method", ["dense", "sdpa", "linear", "auto"])
def test_a_bound_is_kept_whatever_the_plan(method, causal):
    for L, rates in ((20, (0.0, 0.1)), (300, (0.0, 0.1)), (300, (0.0, 0.2))):
        a = noise(3, 1, 2, L, 4)
        kw = dict(causal=causal, method=method)
        S = 1.01 * score_bounds(*a[:2]).max().item()
        got = las_attention(*a, rates, score_bound=S, **kw)
        want = las_attention(*a, rates, method="dense", causal=causal)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
        for chunk in (None, 16):
            with pytest.raises(ValueError, match="above score_bound=1: raise it"):
                las_attention(*a, rates, score_bound=1.0, chunk=chunk, **kw)


def test_a_compiled_matrix_turns_into_nan():
    def f(q, k, v):
        return las_attention(q, k, v, (0.1, 0.2), score_bound=30.0, method="dense")

    g, a = torch.compile(f, fullgraph=True, backend="aot_eager"), noise(3, 1, 2, 20, 4)
    torch.testing.assert_close(g(*a), f(*a))
    assert g(*(10 * a)).isnan().all()


@pytest.mark.parametrize(
    "kw, says",
    [
        *(
            (dict(rates=r), "rates must be 2")
            for r in (None, 0.1, "ab", ("0.1", 1), {})
        ),
        *(
            (dict(score_bound=s), "score_bound must be .* no tensor")
            for s in (torch.tensor(40.0), torch.tensor([40.0, 40.0]), "40")
        ),
        *((dict(tol=t), "tol must lie") for t in ("0.1", torch.tensor([0.1, 0.2]))),
    ],
)
def test_other_types_are_explained(kw, says):
    with pytest.raises(ValueError, match=says):
        las_attention(*noise(3, 1, 2, 300, 4), **(dict(rates=(0.3, 0.5)) | kw))


@both
def test_a_tolerance_no_number_can_meet_is_exact(causal):
    a, rates = noise(3, 1, 2, 300, 4), (0.3, 4.0)
    want = las_attention(*a, rates, method="dense", causal=causal)
    for tol in (0.0, 5e-324, 1e-310, 1e-100):
        got = las_attention(*a, rates, method="linear", tol=tol, causal=causal)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_derived_bound_holds_under_autocast():
    "Heads of one channel, and the input that makes their scores largest."
    torch.manual_seed(0)
    layer, norm = LaSAttention(4, 4), torch.nn.LayerNorm(4)
    torch.nn.init.zeros_(layer.qkv.bias)
    worst = 0.0
    for _ in range(300):
        w = torch.randn(4)
        w = w - w.mean()
        layer.qkv.weight.data = w.expand(12, 4).clone()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            q, k, _ = layer.heads(norm(1e4 * w).view(1, 1, 4))
        exact = 4 * w.double().square().sum()  # |w| sqrt(4), squared
        found = score_bounds(q, k).double()
        assert (found <= torch.tensor(layer.derive_bound(norm)).double()).all()
        worst = max(worst, (found / exact).max().item())
    assert worst > 1.01  # what was allowed before


# --- rows that are not finite


@both
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("method", ["auto", "linear", "sdpa"])
def test_what_is_not_finite_spoils_what_sees_it_alone(method, which, value, causal):
    L, j, rates = 400, 90, (0.0, 0.15)
    a = dict(zip("qkv", noise(3, 2, 2, L, 8).float()))
    clean = las_attention(**a, rates=rates, causal=causal, method=method)
    a[which][1, 1, j, 3] = value
    a = {name: t.clone().requires_grad_() for name, t in a.items()}
    out = las_attention(**a, rates=rates, causal=causal, method=method)
    spoiled = torch.zeros(2, 2, L, dtype=torch.bool)
    rows = [j] if which == "q" else range(j if causal else 0, L)
    spoiled[1, 1, list(rows)] = True
    assert torch.equal(out.isnan().all(-1), spoiled)
    assert torch.equal(out.isnan().any(-1), spoiled)
    off = (out - clean).abs().amax(-1)[~spoiled].max()
    assert off < 1e-3
    # and no gradient hides it
    (grad,) = torch.autograd.grad(out.sum(), a["v"])
    assert grad[1, 1].isnan().any() and grad[0].isfinite().all()


@both
def test_norms_that_overflow_are_no_small_norms(causal):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 600, 128, generator=g).sign() * 2.0**63
    at = torch.randint(128, (1, 1, 600, 1), generator=g)
    k = torch.zeros_like(q).scatter_(3, at, 2.0**63)
    v = torch.randn(1, 1, 600, 128, generator=g)
    want = las_dense(q, k, v, torch.tensor([0.5]), 1, causal=causal)
    for method in ("auto", "linear"):
        got = las_attention(q, k, v, (0.5,), 1, causal=causal, method=method)
        torch.testing.assert_close(got, want)


# --- what is no number


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(chunk=True), "chunk must be a whole number"),
        (dict(score_bound=True), "score_bound must be a finite number"),
        (dict(score_bound=10**400), "score_bound must be a finite number"),
        (dict(rates=(True, 0.1)), "rates must be 2 finite numbers"),
        (dict(lengths=[None]), "lengths must be whole numbers"),
        (dict(lengths="ab"), "lengths must be whole numbers"),
        (dict(lengths=[2**70]), "lengths must be whole numbers"),
        (dict(cu_seqlens=[0.0, 40.0]), "cu_seqlens must be whole numbers"),
        (dict(cu_seqlens=[None, 3]), "cu_seqlens must be whole numbers"),
    ],
    ids=str,
)
def test_what_is_no_number_is_named(wrong, says):
    x = noise(1, 2, 40, 8)
    with pytest.raises(ValueError, match=says):
        las_attention(x, x, x, **dict(rates=(0.0, 0.1)) | wrong)


@pytest.mark.parametrize("method, rate", [("auto", 0.1), ("linear", 0.02)])
@pytest.mark.parametrize("bound", [1e-5, 1e-3])
def test_far_keys_have_gradients_where_scores_are_small(method, rate, bound):
    q, k, v = noise(3, 1, 2, 1000, 16).float()
    up, grads = noise(1, 2, 1000, 16, seed=1).float(), []
    for how in (dict(method=method, score_bound=bound), dict(method="dense")):
        a = [t.clone().requires_grad_() for t in (0 * q, k, v)]
        o = las_attention(*a, (rate, rate), **how)
        grads.append(torch.autograd.grad(o, a, up))
    for x, y in zip(*grads):
        assert (x - y).norm() <= 1e-4 * y.norm()


@pytest.mark.parametrize("shape", [(1, 1, 100, 16), (1, 2, 400, 16)])
@pytest.mark.parametrize("which", range(3))
def test_what_is_not_finite_reaches_no_earlier_output(shape, which):
    a = list(noise(3, *shape))
    want = las_attention(*a, (0.1,) * shape[1], score_bound=1e4)
    a[which] = a[which].clone()
    a[which][:, :, -1] = math.nan
    got = las_attention(*a, (0.1,) * shape[1], score_bound=1e4)
    assert torch.equal(got[:, :, :-1], want[:, :, :-1])
    assert got[:, :, -1].isnan().all()


@pytest.mark.parametrize("rows", ["queries", "keys"])
def test_nan_does_not_hide_huge_keys(rows):
    "Huge keys beside tiny queries are levelled, whatever else is not a number."
    q, k, v = noise(3, 1, 2, 400, 16).float()
    want = las_attention(q, k, v, (0.01, 0.15), score_bound=1e4)
    q, k = q * 1e-30, k * 1e30
    (q if rows == "queries" else k)[:, :, -1] = math.nan
    got = las_attention(q, k, v, (0.01, 0.15), score_bound=1e4)
    assert error(got[:, :, :-1], want[:, :, :-1], v) < 1e-3
