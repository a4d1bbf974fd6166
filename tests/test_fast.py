import math, os, shutil, subprocess, sys
import pytest, torch, torch.nn.functional as F
from hypothesis import assume, given, settings, strategies as st
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from las_nb.fast import api, bands as lib, heads as heads_lib
from las_nb.fast import METHODS, TOL, Band, las_attention, plan, score_bounds
from las_nb.fast.bands import (
    band_error,
    far_delta,
    far_error,
    flash,
    flash_backward,
    one_sided,
    safe_limit,
    two_sided,
)
from las_nb.fast.plan import fit_band, serves
from las_nb.las import las_dense

RATES = [0.0, 1e-3, 0.05, 0.3, 2.0, 50.0]
EPS = {
    torch.float64: 1e-10,
    torch.float32: 3e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
HALF = (torch.float16, torch.bfloat16)
pools, causals = st.sampled_from(["scores", "weights"]), st.booleans()
both = pytest.mark.parametrize("causal", [True, False])


def qkv(B, H, L, D, seed=0, dtype=torch.float64, scale=1.0, width=None):
    g = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(B, H, L, d, generator=g, dtype=torch.float64)).to(dtype)
        for d in (D, D, width or D)
    ]


def norms(x):
    return torch.linalg.vector_norm(x.double(), dim=-1)  # (B, H, L)


def excess(got, want, v, tol):
    "By how much an error exceeds `tol` times the largest value of its head."
    return (
        (norms(got.double() - want.double()).amax(-1) - tol * norms(v).amax(-1))
        .max()
        .item()
    )


def tensor(rates):
    return torch.tensor(rates, dtype=torch.float64)


def blockwise(q, k, v, rates, W, pool, causal, lengths, chunk):
    "las_dense on every block of every real sequence, each by itself."
    B, H, L, _ = q.shape
    out = torch.zeros_like(v)
    for b in range(B):
        n = L if lengths is None else int(lengths[b])
        for s in range(0, n, chunk or L):
            at = slice(b, b + 1), slice(None), slice(s, min(n, s + (chunk or L)))
            out[at] = las_dense(q[at], k[at], v[at], rates, W, pool, causal)
    return out


@st.composite
def problems(draw, longest=200):
    B, H, L, D = (draw(st.integers(1, n)) for n in (2, 4, longest, 9))
    rates = draw(st.lists(st.sampled_from(RATES), min_size=H, max_size=H))
    lengths = draw(st.none() | st.lists(st.integers(1, L), min_size=B, max_size=B))
    width = draw(st.none() | st.integers(1, 9))
    return (
        B,
        H,
        L,
        D,
        width,
        rates,
        None if lengths is None else torch.tensor(lengths),
        draw(st.integers(0, 999)),
    )


@pytest.mark.parametrize("method", ["auto", "linear", "sdpa"])
@settings(max_examples=150, deadline=None)
@given(
    problem=problems(),
    W=st.integers(1, 25) | st.just(201),
    pool=pools,
    causal=causals,
    tol=st.sampled_from([1e-2, 1e-5, 1e-10]),
    chunk=st.sampled_from([None, None, 1, 7, 64, 300]),
    scale=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_keeps_its_promise(method, problem, W, pool, causal, tol, chunk, scale):
    B, H, L, D, width, rates, lengths, seed = problem
    if method == "sdpa":
        rates = [r if r * min(L, chunk or L) <= 700 else 0.3 for r in rates]
    a = qkv(B, H, L, D, seed, scale=scale, width=width)
    want = blockwise(*a, tensor(rates), W, pool, causal, lengths, chunk)
    if lengths is not None:
        for b in range(B):
            for t in a:
                t[b, :, lengths[b] :] = math.nan
    out = las_attention(
        *a, tuple(rates), W, pool, causal, lengths, method, tol, chunk=chunk
    )
    assert out.shape == a[2].shape and out.dtype == torch.float64
    for b in range(B):
        n = L if lengths is None else int(lengths[b])
        assert out[b, :, :n].isfinite().all()
        assert excess(out[b, :, :n], want[b, :, :n], a[2][b, :, :n], tol) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("method", ["auto", "linear", "sdpa"])
@both
def test_dtypes(dtype, method, causal):
    rates = (0.0, 1e-3, 0.01) if method == "sdpa" else (0.0, 1e-3, 0.1, 0.3, 50.0)
    for pool in ("scores", "weights"):
        for W in (1, 4):
            for lengths in (None, torch.tensor([400, 211])):
                a = qkv(2, len(rates), 400, 16, W, dtype)
                out = las_attention(*a, rates, W, pool, causal, lengths, method)
                want = las_dense(
                    *(t.double() for t in a), tensor(rates), W, pool, causal, lengths
                )
                assert out.dtype == dtype
                for b, n in enumerate([400, 400] if lengths is None else lengths):
                    assert out[b, :, :n].isfinite().all()
                    assert (
                        excess(
                            out[b, :, :n],
                            want[b, :, :n],
                            a[2][b, :, :n],
                            TOL[dtype] + EPS[dtype] / 2,
                        )
                        <= 0
                    )


def aligned(L, signs, S, D=8):
    """All scores are +S or -S, and values have the sign of their keys: every far error
    adds up."""
    u = torch.zeros(D, dtype=torch.float64)
    u[0] = math.sqrt(S * math.sqrt(D))
    x = signs(torch.arange(L))[:, None] * u  # (L, D)
    return u.expand(L, D), x, x / u[0]


def adversaries(L=600, D=8):
    q, k, v = (t[0, 0] for t in qkv(1, 1, L, D))
    i = torch.arange(L)[:, None]
    sign = 1.0 - 2 * (i % 2)
    run = i[:, 0] // 97 * 97
    hot = torch.zeros(L, D, dtype=torch.float64)
    hot[::113, 0] = 1.0
    yield "norms", (30 * q, k, 30 * v)
    yield "huge", (30 * q, 30 * k, 30 * v)
    yield "constant keys", (q, k[:1].expand(L, D), v)
    yield "one-hot values", (2 * q, k, hot)
    yield "cancelling values", (q, k, sign * v[:1])
    yield (
        "cancelling everywhere",
        (q[:1].expand(L, D), k[:1].expand(L, D), sign * v[:1]),
    )
    yield "runs", (2 * q[run], k[run], v[run])
    yield "same signs", aligned(L, lambda j: torch.ones(L).double(), 5.0)
    yield "alternating", aligned(L, lambda j: 1.0 - 2 * (j % 2).double(), 5.0)
    yield (
        "far against near",
        aligned(L, lambda j: torch.where(j < L - 150, 1.0, -1.0).double(), 5.0),
    )
    yield (
        "near against far",
        aligned(L, lambda j: torch.where(j < L - 150, -1.0, 1.0).double(), 5.0),
    )


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(
    "name, case", list(adversaries()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_adversaries(name, case, dtype):
    rates = (0.1, 0.5)
    q, k, v = (t.to(dtype).expand(1, 2, *t.shape) for t in case)
    S = score_bounds(q, k).max().item() * 1.001
    eps = torch.finfo(dtype).eps
    for causal in (True, False):
        for W in (1, 3):
            want = las_dense(
                q.double(), k.double(), v.double(), tensor(rates), W, "scores", causal
            )
            for tol in (1e-2, 1e-4):
                for bound in (None, S):
                    out = las_attention(
                        q, k, v, rates, W, "scores", causal, None, "linear", tol, bound
                    )
                    assert out.isfinite().all() and out.dtype == dtype
                    assert excess(out, want, v, tol + 2 * eps * (1 + S)) <= 0


@pytest.mark.parametrize("tol, S", [(1e-2, 0.02), (1e-3, 0.003)])
@both
def test_the_worst_case_is_near_the_bound(tol, S, causal):
    def signs(j):
        return 1.0 - 2 * (j % 2).double()

    rates, band = tensor((0.005,)), fit_band(0.005, 800, 1.001 * S, tol)
    a = [t.expand(1, 1, *t.shape) for t in aligned(800, signs, S)]
    out = one_sided(*a, rates, band)[0] if causal else two_sided(*a, rates, 1, band)
    want = las_dense(*a, rates, 1, "scores", causal)
    assert tol / 20 < norms(out - want).max() / norms(a[2]).max() <= tol


@both
def test_heads_may_have_bounds_of_their_own(causal):
    L, rates = 2000, (0.1, 0.11)
    heads = zip(
        *(
            aligned(L, lambda j: torch.where(j < L - 100, 1.0, -1.0).double(), S)
            for S in (1e-2, 50.0)
        )
    )
    a = [torch.stack(t)[None] for t in heads]
    want = las_dense(*a, tensor(rates), 1, "scores", causal)
    for bound in ((1.01e-2, 50.1), None):
        out = las_attention(
            *a, rates, 1, "scores", causal, method="linear", tol=1e-4, score_bound=bound
        )
        assert excess(out, want, a[2], 1e-4) <= 1e-9


@pytest.mark.parametrize("method", ["linear", "sdpa", "auto"])
@pytest.mark.parametrize("pool", ["scores", "weights"])
@both
@pytest.mark.parametrize("lengths", [None, torch.tensor([230, 101])])
def test_gradients(method, pool, causal, lengths):
    rates = (0.5, 0.0, 1.2)
    if method == "linear":
        assert sum(
            bool(g.band)
            for g in plan(rates, 230, torch.float64, method, 1e-10, (64.0,) * 3)
        )
    a = [t.requires_grad_() for t in qkv(2, 3, 230, 5, width=7)]
    weight = qkv(2, 3, 230, 7, 1)[0]
    if lengths is not None:
        weight[1, :, 101:] = 0

    def grads(f, **kw):
        return torch.autograd.grad(
            (f(*a, tensor(rates), 4, pool, causal, lengths, **kw) * weight).sum(), a
        )

    for got, want in zip(
        grads(las_attention, method=method, tol=1e-10), grads(las_dense)
    ):
        assert want.abs().max() > 0.1
        torch.testing.assert_close(got, want, rtol=0, atol=1e-8)


bands = pytest.mark.parametrize(
    "band",
    [
        None,
        Band(2, 2),
        Band(2, 4),
        Band(2, 2, 2),
        Band(2, 4, 9),
        Band(3, 3, 1),
        Band(2, 2, 2, 3),
    ],
)


@bands
def test_gradcheck_one_sided(band):
    a = [t.requires_grad_() for t in qkv(1, 2, 15, 2, scale=0.7)]
    rates = tensor((0.3, 0.8))
    assert torch.autograd.gradcheck(lambda *x: tuple(one_sided(*x, rates, band)), a)
    assert torch.autograd.gradcheck(
        lambda q, k: one_sided(q, k, a[2].detach(), rates, band)[1], a[:2]
    )


@pytest.mark.parametrize("band", [None, Band(2, 4), Band(2, 2, 2)])
@pytest.mark.parametrize(
    "window, lengths",
    [(1, None), (3, None), (3, torch.tensor([10])), (4, torch.tensor([10]))],
)
def test_gradcheck_two_sided(band, window, lengths):
    a = [t.requires_grad_() for t in qkv(1, 2, 12, 2, scale=0.7)]
    n = 12 if lengths is None else 10

    def f(*x):
        # as las_attention does
        if lengths is not None:
            x = [torch.cat([t[:, :, :n], torch.zeros_like(t[:, :, n:])], 2) for t in x]
        return two_sided(*x, tensor((0.3, 0.8)), window, band, lengths)[:, :, :n]

    assert torch.autograd.gradcheck(f, a)


@bands
def test_the_denominator_alone(band):
    q, k, v = (t.requires_grad_() for t in qkv(1, 2, 15, 3, scale=0.7))
    # so fast that nothing of the far scores is left
    rates = tensor((9.0, 12.0) if band else (0.3, 0.8))
    i = torch.arange(15.0).double()
    e = (
        (q @ k.transpose(-2, -1))
        * 3**-0.5
        * torch.exp(-rates[:, None, None] * (i[:, None] - i))
    )
    want = e.masked_fill(i[:, None] < i, -math.inf).logsumexp(-1)
    got, weight = one_sided(q, k, v, rates, band)[1], torch.linspace(-1, 2, 15).double()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    found = [
        torch.autograd.grad((x * weight).sum(), (q, k, v), allow_unused=True)
        for x in (got, want)
    ]
    for x, y in zip(
        *([torch.zeros_like(q) if t is None else t for t in grads] for grads in found)
    ):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-8)


SLOW, FAST = (0.0, 1e-3, 0.05, 0.1), (0.0, 0.1, 0.5, 2.0)


@pytest.mark.parametrize(
    "method, rates", [("dense", FAST), ("sdpa", SLOW), ("linear", FAST), ("auto", FAST)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool", ["scores", "weights"])
def test_past_does_not_move(method, rates, dtype, pool):
    L, kw = 600, dict(method=method, tol=1e-2, score_bound=300.0)
    found = plan(rates, L, dtype, method, 1e-2, (300.0,) * 4, batch=2, width=8)
    if method in ("linear", "auto"):
        assert max(2 * g.band.reach for g in found if g.band) < L
    a, b = qkv(2, 4, L, 8, 0, dtype), qkv(2, 4, L, 8, 1, dtype, 3.0)
    out = las_attention(*a, rates, 3, pool, **kw)
    for cut in (1, 150, 301, 448, 599):
        mixed = [torch.cat([x[:, :, :cut], y[:, :, cut:]], 2) for x, y in zip(a, b)]
        moved = las_attention(*mixed, rates, 3, pool, **kw)
        assert torch.equal(out[:, :, :cut], moved[:, :, :cut]) and not torch.equal(
            out[:, :, cut:], moved[:, :, cut:]
        )


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="flex needs a C++ compiler on the CPU",
)
def test_past_does_not_move_in_flex():
    a, b = qkv(1, 2, 256, 8, 0, torch.float32), qkv(1, 2, 256, 8, 1, torch.float32, 3.0)
    mixed = [torch.cat([x[:, :, :131], y[:, :, 131:]], 2) for x, y in zip(a, b)]
    with torch.no_grad():
        out, moved = (
            las_attention(*x, (0.01, 0.3), 3, method="flex") for x in (a, mixed)
        )
    assert torch.equal(out[:, :, :131], moved[:, :, :131]) and not torch.equal(
        out[:, :, 131:], moved[:, :, 131:]
    )
    torch.testing.assert_close(
        out, las_dense(*a, tensor((0.01, 0.3)), 3), rtol=0, atol=1e-5
    )
    with pytest.raises(ValueError, match="no backward on the CPU"):
        las_attention(*(t.requires_grad_() for t in a), (0.01, 0.3), method="flex")
    with pytest.raises(ValueError, match="float64"):
        las_attention(*qkv(1, 2, 9, 4), (0.01, 0.3), method="flex")


@both
@pytest.mark.parametrize("method", ["dense", "sdpa", "linear", "auto"])
def test_batch_mates_do_not_matter(method, causal):
    rates = SLOW if method == "sdpa" else FAST
    kw = dict(causal=causal, method=method, tol=1e-3, score_bound=4000.0)
    row = qkv(1, 4, 500, 8, 0)
    other = qkv(1, 4, 500, 8, 1)
    huge = qkv(1, 4, 500, 8, 2, scale=18.0)
    beside, beside_huge = (
        las_attention(*(torch.cat(t) for t in zip(row, mate)), rates, **kw)[:1]
        for mate in (other, huge)
    )
    assert torch.equal(beside, beside_huge)
    alone = las_attention(*row, rates, **kw)
    # its plan may know the number of sequences
    if method == "auto":
        assert excess(alone, beside, row[2], 2e-3) <= 0
    else:
        torch.testing.assert_close(alone, beside, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["linear", "auto"])
def test_a_measured_bound_moves_within_tol(method):
    for tol in (1e-1, 1e-3):
        for cut in (200, 450):
            a, b = qkv(1, 4, 600, 8), qkv(1, 4, 600, 8, 1, scale=20.0)
            mixed = [torch.cat([x[:, :, :cut], y[:, :, cut:]], 2) for x, y in zip(a, b)]
            out, moved = (
                las_attention(*x, FAST, method=method, tol=tol)[:, :, :cut]
                for x in (a, mixed)
            )
            assert excess(moved, out, a[2][:, :, :cut], 2 * tol) <= 1e-9
            beside = las_attention(
                *(torch.cat(t) for t in zip(a, b)), FAST, method=method, tol=tol
            )[:1]
            assert (
                excess(
                    beside,
                    las_attention(*a, FAST, method=method, tol=tol),
                    a[2],
                    2 * tol,
                )
                <= 1e-9
            )


@both
def test_an_exceeded_bound_raises(causal):
    q, k, v = qkv(2, 3, 600, 8)
    q[:, 1] *= 20
    S = (1.01 * score_bounds(q, k)).tolist()
    kw = dict(method="linear", tol=1e-3, causal=causal)
    want = las_dense(q, k, v, tensor((0.3, 0.4, 0.5)), causal=causal)
    for bound in (tuple(S), S, max(S)):
        assert (
            excess(
                las_attention(q, k, v, (0.3, 0.4, 0.5), score_bound=bound, **kw),
                want,
                v,
                1e-3,
            )
            <= 1e-9
        )
    for bound, head, shown in (
        ((S[0], S[0], S[2]), 1, f"{S[0]:.3g}"),
        ((S[0], S[1], 2.25), 2, "2.25"),
        (2.5, 0, "2.5"),
        (3, 0, "3"),
    ):
        for chunk in (None, 300):
            with pytest.raises(
                ValueError,
                match=f"head {head} may reach .*score_bound={shown}: raise it",
            ):
                las_attention(
                    q, k, v, (0.3, 0.4, 0.5), score_bound=bound, chunk=chunk, **kw
                )


@pytest.mark.parametrize(
    "kw, says",
    [
        *(
            (dict(score_bound=s), "score_bound must be.*2 of them")
            for s in (
                0.0,
                -1.0,
                math.nan,
                math.inf,
                (1.0, 2.0, 3.0),
                (1.0, -2.0),
                (1.0,),
                (),
            )
        ),
        *(
            (dict(tol=t), "tol must lie between 0 and 1")
            for t in (-0.1, 1.0, 3, math.nan)
        ),
        *(
            (dict(chunk=c), "chunk must be a whole number >= 1")
            for c in (0, -3, 2.5, "7")
        ),
        *(
            (dict(rates=r), "2 finite numbers >= 0")
            for r in (
                (0.1,),
                (0.1, 0.2, 0.3),
                (0.1, -1.0),
                (0.1, math.nan),
                (0.1, math.inf),
            )
        ),
        (dict(rates=torch.zeros(3)), r"shape \(2,\)"),
        (dict(method="linaer"), "did you mean linear"),
        (dict(method="flash"), "'dense', 'sdpa'"),
        (dict(pool="score"), "did you mean scores"),
        (dict(window=0), "window must be"),
        (dict(lengths=torch.tensor([0])), "between 1 and 300"),
    ],
)
@pytest.mark.parametrize("method", ["linear", "auto"])
def test_bad_arguments_are_explained(method, kw, says):
    q, k, v = qkv(1, 2, 300, 4)
    with pytest.raises(ValueError, match=says):
        las_attention(q, k, v, **(dict(rates=(0.3, 0.5), method=method) | kw))


@pytest.mark.parametrize("dtype", TOL)
@both
def test_sdpa_knows_its_limit(dtype, causal):
    a = qkv(1, 2, 100, 4, dtype=dtype, scale=0.3)
    for share in (0.95, 1.05):
        rates = (0.0, share * safe_limit(dtype) / 100)

        def run(**kw):
            return las_attention(*a, rates, causal=causal, **kw)

        if share < 1:
            want = las_dense(*(t.double() for t in a), tensor(rates), causal=causal)
            assert excess(run(method="sdpa"), want, a[2], EPS[dtype]) <= 0
        else:
            with pytest.raises(
                ValueError, match="'sdpa' needs rate .* L <= .* head 1 .*'linear'"
            ):
                run(method="sdpa")
            assert (
                run().isfinite().all() and run(method="sdpa", chunk=50).isfinite().all()
            )
    top = torch.finfo(torch.promote_types(dtype, torch.float32)).max
    assert (
        safe_limit(dtype, 1e37) < safe_limit(dtype)
        and math.exp(safe_limit(dtype, 1e37)) * 1e37 <= top
    )


def test_rates_that_learn():
    a, rates = qkv(1, 3, 200, 4), tensor((0.0, 0.1, 0.5)).requires_grad_()
    weight = qkv(1, 3, 200, 4, 1)[0]
    got, want = (
        torch.autograd.grad((f(*a, rates) * weight).sum(), rates)[0]
        for f in (las_attention, las_dense)
    )
    assert torch.equal(got, want) and got.abs().min() > 0
    got = torch.autograd.grad(
        (las_attention(*a, rates, chunk=64) * weight).sum(), rates
    )[0]
    want = torch.autograd.grad(
        (blockwise(*a, rates, 3, "scores", True, None, 64) * weight).sum(), rates
    )[0]
    torch.testing.assert_close(got, want)
    for method in ("linear", "sdpa", "flex"):
        with pytest.raises(ValueError, match="gradients of rates need method 'dense'"):
            las_attention(*a, rates, method=method)


tols, orders = st.floats(-12, -0.05).map(lambda x: 10**x), st.sampled_from([0, 1])
sizes = st.floats(-3, 7).map(lambda x: 10**x)  # S
speeds = st.just(0.0) | st.floats(-4, 1.8).map(lambda x: 10**x)


@settings(max_examples=200, deadline=None)
@given(tols, orders, speeds, st.integers(1, 10_000))
def test_far_error_and_far_delta(tol, order, rate, n):
    delta = far_delta(tol, order, rate, n)
    assert far_error(delta, order, rate, n) <= tol * (1 + 1e-6)
    if tol < 0.1 and (order == 0 or delta < 0.48):
        assert (
            far_error(delta, order, rate, n) == pytest.approx(tol, rel=1e-4)
            and far_error(1.01 * delta, order, rate, n) > tol
        )
    assert far_error(0.8, 1, rate, n) == math.inf and far_error(0.0, order) == 0
    # the sum of decays promises more than the largest one
    assert far_error(delta, order, rate, n) <= far_error(delta, order) * (1 + 1e-9)


def far_weights(s, band, rate, i):
    "True and approximated weights of the keys `0 .. i` of a query, from its scores."
    far_from = i - band.reach - (i - band.first) % band.block  # first key in its window
    e = torch.exp(-rate * (i - torch.arange(i + 1.0).double())) * s
    place = torch.arange(i + 1)
    exact, state = place >= far_from, place >= far_from - band.zone * band.block
    return e.exp(), torch.where(exact, e.exp(), torch.where(state, 1 + e, 1.0))


@pytest.mark.parametrize("S", [1.0, 16.0])
@pytest.mark.parametrize("rate", [0.02, 0.1])
@pytest.mark.parametrize(
    "band", [Band(8, 48), Band(8, 48, 2), Band(8, 48, 0, 12), Band(8, 64, 4, 6)]
)
def test_no_attack_breaks_the_promise(band, rate, S):
    """Gradient ascent on all scores within S, with the worst values for the weights: each
    value 1 where its key weighs too much, and -1 where too little."""
    promised = band_error(band, rate, S)
    for i in (band.first, band.first + band.block - 1, band.first + 160):
        if promised == math.inf:  # nothing to break
            continue
        found = 0.0
        for start in (3.0, -3.0, 0.0):
            z = torch.full((i + 1,), start).double()
            z += 0.1 * torch.randn(i + 1, generator=torch.Generator().manual_seed(i))
            z.requires_grad_()
            for _ in range(150):
                w, near = far_weights(S * z.tanh(), band, rate, i)
                error = (w / w.sum() - near / near.sum()).abs().sum()
                z = (z + torch.autograd.grad(error, z)[0].sign() * 0.1).detach()
                z.requires_grad_()
            found = max(found, error.item())
        assert found <= promised * (1 + 1e-9)
        if i == band.first and promised < 0.5 and not band.zone:
            assert found > 0.1 * promised  # an attack worth the name


def keeps(band, rate, S, tol, dtype):
    "Does the band promise enough, within the exponents that can be?"
    limit = safe_limit(torch.float32 if dtype == torch.float16 else dtype, S)
    slack = 1 + 1e-9
    return (
        band.reach % band.block == 0
        and band_error(band, rate, S) <= tol * slack
        and rate * (band.first - 1) <= limit * slack
    )


@settings(max_examples=300, deadline=None)
@given(
    speeds,
    st.integers(1, 100_000),
    sizes,
    tols,
    orders,
    st.sampled_from(list(TOL)),
    st.sampled_from([1, 16, 64]),
)
def test_bands_keep_the_promise(rate, L, S, tol, order, dtype, unit):
    band = fit_band(rate, L, S, tol, order, dtype, unit)
    if band:
        assert (
            band.block >= 1
            and band.first < L
            and (order or not band.zone)
            and keeps(band, rate, S, tol, dtype)
        )
    assert (
        fit_band(0.0, L, S, tol, order) is None
        and fit_band(rate, L, S, 0.0, order) is None
    )


def test_bands_are_no_wider_than_needed():
    for rate in (0.03, 0.1, 0.5):
        for order in (0, 1):
            band = fit_band(rate, 100_000, 40.0, 1e-4, order)
            for less in (1, 2):
                narrow = band._replace(reach=band.reach - less * band.block)
                kept = narrow.reach >= 0 and band_error(narrow, rate, 40.0) <= 1e-4
                assert not kept or less == 1
            # what one decay alone would ask for
            need = math.log(40 / far_delta(1e-4, order)) / rate
            assert band.reach < need + band.block <= need + max(16, 2 * need)


@settings(max_examples=200, deadline=None)
@given(
    st.data(),
    st.lists(speeds | st.floats(0.05, 0.5), min_size=1, max_size=6),
    st.integers(1, 20_000),
    st.sampled_from(METHODS),
    st.sampled_from(list(TOL)),
    st.none() | tols,
    st.sampled_from(["cpu", "cuda"]),
    st.sampled_from([1, 8]),
    st.booleans(),
)
def test_plans(data, rates, L, method, dtype, tol, device, batch, bounded):
    bounds = (
        tuple(data.draw(sizes | st.sampled_from([1.0, 1e3])) for _ in rates)
        if bounded
        else None
    )
    limits = [safe_limit(dtype, s) for s in bounds or [1.0] * len(rates)]
    if method == "sdpa":
        assume(all(r * L <= limit for r, limit in zip(rates, limits)))
    groups = plan(tuple(rates), L, dtype, method, tol, bounds, device, batch)
    assert sorted(h for g in groups for h in g.heads) == list(range(len(rates)))
    for g in groups:
        assert (g.method == "linear") == (g.band is not None) and (
            method != "sdpa" or g.method == "sdpa"
        )
        for h in g.heads:
            if g.method == "sdpa":
                assert rates[h] * L <= limits[h]
            if g.band:
                assert keeps(
                    g.band,
                    rates[h],
                    bounds[h] if bounds else 1.0,
                    TOL[dtype] if tol is None else tol,
                    dtype,
                )


@pytest.mark.parametrize("H, L", [(32, 512), (16, 1024), (64, 600)])
def test_heads_share_the_price_of_a_call(H, L):
    "Slow heads of unequal rates go together, though for each alone the matrix is cheaper."
    rates = tuple(0.002 * (1 + h / 100) for h in range(H))
    both = dict(causal=False, window=3)
    assert plan(rates[:1], 300, batch=2, **both)[0].method == "dense"
    assert [(g.method, len(g.heads)) for g in plan(rates, L, **both)] == [("sdpa", H)]


def test_a_band_serves_only_heads_it_keeps_the_promise_for():
    for order in (0, 1):
        answers = []
        for rate in (0.003, 0.02, 0.1):
            for tol in (1e-1, 1e-3, 1e-6):
                band = fit_band(rate, 10**6, 5.0, tol, order, torch.float64)
                assert serves(band, rate, 5.0, tol, torch.float64)
                for faster in (1.0, 1.05, 1.3, 30.0, 500.0):
                    for S in (
                        0.1,
                        5.0,
                        *(5 * math.exp(x / 40) for x in range(1, 60)),
                        1e6,
                    ):
                        answers.append(
                            (
                                serves(band, rate * faster, S, tol, torch.float64),
                                keeps(band, rate * faster, S, tol, torch.float64),
                            )
                        )
        assert (
            all(kept or not yes for yes, kept in answers)
            and 0.3 < sum(yes for yes, _ in answers) / len(answers) < 0.95
        )


@pytest.mark.parametrize("method", ["auto", "linear"])
@pytest.mark.parametrize("tol", [1e-1, 1e-3])
def test_joined_heads_keep_the_promise(method, tol):
    rates = (0.1, 0.11, 0.12, 0.4, 3.0)
    for bounds in (
        (1.0, 1e3, 1.0, 30.0, 1e6),
        (1e3, 1.0, 1.0, 1.0, 1.0),
        (1.0, 2.0, 4.0, 8.0, 16.0),
    ):
        for L in (1000, 20_000):
            for g in plan(rates, L, torch.float64, method, tol, bounds):
                if g.band:
                    assert all(
                        keeps(g.band, rates[h], bounds[h], tol, torch.float64)
                        for h in g.heads
                    )
    # they do join where they can
    assert (
        len(plan((0.1, 0.101), 20_000, torch.float64, "linear", tol, (5.0, 5.0))) == 1
    )


@pytest.mark.parametrize(
    "band",
    [
        Band(5, 10),
        Band(5, 0),
        Band(4, 8, 1),
        Band(4, 4, 3),
        Band(1, 3, 6),
        Band(4, 4, 99),
        Band(4, 8, 1, 3),
        Band(4, 4, 99, 2),
        Band(5, 10, 0, 4),
    ],
)
def test_the_far_field_is_what_it_says(band):
    L, (b, reach, zone, _) = 61, band
    q, k, v = qkv(2, 2, L, 3, scale=0.6)
    rates, i = tensor((0.02, 0.1)), torch.arange(L)
    e = (
        (q @ k.transpose(-2, -1))
        * 3**-0.5
        * torch.exp(-rates[:, None, None] * (i[:, None] - i))
    )
    # the first key in the window of query i
    later = i >= band.first
    start = torch.where(later, (i - band.first) // b * b + band.first - reach, 0)
    near, first = i >= start[:, None], i >= start[:, None] - zone * b
    w = torch.where(near, e.exp(), torch.where(first, 1 + e, 1.0)).masked_fill(
        i[:, None] < i, 0
    )
    o, lse = one_sided(q, k, v, rates, band)
    torch.testing.assert_close(o, w @ v / w.sum(-1, keepdim=True), rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, w.sum(-1).log(), rtol=0, atol=1e-12)


def test_measured_error_beside_the_bound():
    alpha, b, L, D, S = 0.1, 10, 600, 16, 1.0
    q, k, v = qkv(1, 1, L, D)
    # every |score| <= S
    q, k = (t / norms(t)[..., None] * math.sqrt(S * math.sqrt(D)) for t in (q, k))
    rates, errors = tensor((alpha,)), {}
    want = las_dense(q, k, v, rates, 1)
    for near in range(1, 13):  # alpha R
        for order in (0, 1):
            band = Band(b, near * 10, 0 if order == 0 else L)
            errors[near, order] = (
                norms(one_sided(q, k, v, rates, band)[0] - want).max() / norms(v).max()
            ).item()
            bound = far_error(S * math.exp(-alpha * (band.reach + 1)), order)
            promised = band_error(band, alpha, S)
            assert errors[near, order] <= promised + 1e-14 <= bound + 2e-14 < 4
    for order in (0, 1):
        assert errors[1, order] > 1e3 * errors[12, order] > 0
    assert 20 * errors[6, 1] <= errors[6, 0]


@both
@pytest.mark.parametrize(
    "method, rates",
    [
        ("dense", (0.0, 0.2)),
        ("sdpa", (0.0, 0.0)),
        ("sdpa", (0.0, 0.1)),
        ("linear", (0.3, 0.2)),
        ("auto", (0.0, 0.3)),
    ],
)
def test_autocast_changes_nothing(method, rates, causal):
    a = [t.requires_grad_() for t in qkv(1, 2, 400, 16, dtype=torch.float32)]
    for kw in (
        dict(),
        dict(lengths=torch.tensor([333])),
        dict(pool="weights", tol=1e-5),
    ):

        def run():
            return las_attention(*a, rates, causal=causal, method=method, **kw)

        out = run()
        with torch.autocast("cpu", torch.bfloat16):
            cast = run()
        assert cast.dtype == torch.float32
        for x, y in zip(
            (out, *torch.autograd.grad(out.square().sum(), a)),
            (cast, *torch.autograd.grad(cast.square().sum(), a)),
        ):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "method, L, rates",
    [
        ("linear", 300, (0.2, 1.5)),
        ("auto", 700, (0.001, 0.5)),
        ("sdpa", 300, (0.001, 0.05)),
    ],
)
@pytest.mark.parametrize("pool", ["scores", "weights"])
@both
def test_strides(method, L, rates, pool, causal):
    """Inputs and gradients whose last axis is not dense in memory: torch's CPU kernel
    would read past them, unchecked."""
    dense, up = qkv(2, 2, L, 8, dtype=torch.float32), torch.randn(2, 2, L, 8)
    want = las_dense(
        *(t.requires_grad_() for t in dense), torch.tensor(rates), 3, pool, causal
    )
    want = (want, *torch.autograd.grad(want, dense, up))
    for odd in range(4):
        a = [
            t.detach().mT.contiguous().mT.requires_grad_() if n == odd else t
            for n, t in enumerate(dense)
        ]
        assert odd == 3 or a[odd].stride(-1) != 1
        o = las_attention(*a, rates, 3, pool, causal, method=method, tol=1e-5)
        got = (o, *torch.autograd.grad(o, a, up.mT.contiguous().mT if odd == 3 else up))
        for x, y in zip(got, want):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.9"),
    reason="traced in one piece from torch 2.9",
)
def test_compiles():
    def f(q, k, v):
        return las_attention(
            q, k, v, (0.2, 0.5), 3, tol=1e-2, score_bound=40.0, method="linear"
        )

    assert all(
        g.band
        for g in plan((0.2, 0.5), 200, torch.float32, "linear", 1e-2, (40.0, 40.0))
    )
    g = torch.compile(f, fullgraph=True, backend="aot_eager")
    a = [t.requires_grad_() for t in qkv(1, 2, 200, 8, dtype=torch.float32)]
    x, y = f(*a), g(*a)
    # plans may differ: both keep within the promise
    torch.testing.assert_close(x, y, rtol=0, atol=1e-3)
    for s, t in zip(
        torch.autograd.grad(x.square().sum(), a),
        torch.autograd.grad(y.square().sum(), a),
    ):
        torch.testing.assert_close(s, t, rtol=0, atol=1e-2)
    assert g(*(10 * t for t in a)).isnan().all()
    with pytest.raises(ValueError, match="score_bound=40"):
        f(*(10 * t for t in a))


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.9"),
    reason="traced in one piece from torch 2.9",
)
@pytest.mark.parametrize("name", ["rates", "score_bound", "tol"])
def test_numbers_may_change_between_compiled_calls(name):
    def f(q, **changed):
        how = dict(rates=(0.0, 0.5), score_bound=50.0, tol=1e-3) | changed
        return las_attention(q, q, q, how.pop("rates"), **how)

    g = torch.compile(f, fullgraph=True, backend="eager")
    (q,) = qkv(1, 2, 200, 8, dtype=torch.float32)[:1]
    values = dict(rates=[(0.0, r) for r in (0.5, 0.4, 0.3)])
    values |= dict(score_bound=[50.0, 60.0, 70.0], tol=[1e-3, 1e-4, 1e-2])
    for value in values[name]:
        want, got = f(q, **{name: value}), g(q, **{name: value})
        torch.testing.assert_close(got, want, rtol=0, atol=1e-2)


PEAK = """
import sys, torch
from las_nb.fast import las_attention
def peak(): return int([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1]) / 1024
def step(L):
    a = [torch.randn(1, 2, L, 16).requires_grad_() for _ in range(3)]
    las_attention(*a, (.1, .5), method='linear', tol=1e-3, score_bound=40.).sum().backward()
    assert all(t.grad.isfinite().all() for t in a)
torch.manual_seed(0)
step(512)
before = peak()
step(int(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="reads the peak from /proc"
)
def test_memory_is_linear():
    # what is freed goes back at once: only what is alive counts
    env = dict(
        os.environ,
        OMP_NUM_THREADS="1",
        MALLOC_ARENA_MAX="1",
        MALLOC_MMAP_THRESHOLD_="65536",
    )

    def grown(L):
        return float(
            subprocess.run(
                [sys.executable, "-c", PEAK, str(L)],
                env=env,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )

    short, long = grown(16384), grown(65536)
    # MiB; queries, keys and values alone are 6, one L x L matrix is 1024
    assert 6 < short < 250
    assert long < 1.5 * 4 * short  # a matrix would grow sixteenfold


@both
def test_plain_products_do_the_same(monkeypatch, causal):
    a = [t.requires_grad_() for t in qkv(2, 3, 230, 5)]
    rates, seen = (0.5, 0.05, 1.2), []

    def run():
        out = las_attention(*a, rates, 3, causal=causal, method="linear", tol=1e-3)
        return out, *torch.autograd.grad(out.square().sum(), a)

    want = run()
    monkeypatch.setattr(lib, "kernel_for", lambda x: seen.append(x))
    for x, y in zip(run(), want):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11)
    assert seen


@pytest.mark.parametrize("b, K", [(6, 6), (6, 18), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_flash_is_attention(b, K, dtype):
    q, k, v = (
        t[:, :, :n].requires_grad_()
        for t, n in zip(qkv(2, 3, K, 4, dtype=dtype), (b, K, K))
    )
    s = (0.3 * q @ k.transpose(-2, -1)).masked_fill(
        torch.ones(b, K).triu(K - b + 1).bool(), -math.inf
    )
    o, g = s.softmax(-1) @ v, qkv(2, 3, b, 4, 1, dtype)[0]
    grads = torch.autograd.grad(o, (q, k, v), g)
    for plain in (False, True):
        kind = None if plain else "cpu"
        with torch.no_grad():
            found, lse, rest = flash(q, k, v, 0.3, kind)
            back = flash_backward(g, q, k, v, found, lse, rest, 0.3, kind)
        for x, y in zip((found, lse, *back), (o, s.logsumexp(-1), *grads)):
            torch.testing.assert_close(
                x, y, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-5
            )


class Record(TorchDispatchMode):
    "Keep the arguments of every call, by the names of the operator's signature."

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = [a.name for a in func._schema.arguments]
        self.calls[func._schema.name.removeprefix("aten::")] = dict(
            zip(names, args)
        ) | (kwargs or {})
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("flash", torch.bfloat16),
        ("efficient", torch.float32),
        ("efficient", torch.float16),
    ],
)
@pytest.mark.parametrize("b, K", [(16, 16), (16, 48), (40, 120)])
# the second one: 24 wide, with 8 more for the gradient of the denominators
@pytest.mark.parametrize("scale", [32**-0.5, 24**-0.5])
def test_signatures_of_the_gpu_kernels(kind, dtype, b, K, scale):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        # old torch needs a driver for views
        try:
            q, k, v = (
                torch.empty(2, 3, n, 32, dtype=dtype, device="cuda")[..., :]
                for n in (b, K, K)
            )
        except (RuntimeError, AssertionError) as e:
            pytest.skip(f"no fake CUDA tensors here: {e}")
        with Record() as record:
            o, lse, rest = flash(q, k, v, scale, kind)
            g = torch.empty_like(o)
            grads = flash_backward(g, q, k, v, o, lse, rest, scale, kind)
    assert (
        o.shape == q.shape
        and o.dtype == dtype
        and lse.shape == (2, 3, b)
        and lse.dtype == torch.float32
    )
    assert [t.shape for t in grads] == [t.shape for t in (q, k, v)] and all(
        t.dtype == dtype and t.device.type == "cuda" for t in grads
    )
    name = f"_scaled_dot_product_{kind}_attention_backward"
    call = record.calls[name]
    assert call["philox_seed"] is rest[-2] and call["philox_offset"] is rest[-1]
    if kind == "flash":
        assert (
            call["is_causal"] is True
            and call["logsumexp"].shape == (2, 3, b)
            and call["out"].shape == q.shape
        )
        assert (call["max_q"], call["max_k"]) == (b, K)
    else:
        assert (
            call.get("is_causal", False) == (b == K) == (call.get("attn_bias") is None)
            and call["out"].shape == q.shape
        )
        assert not call["grad_input_mask"][3]
        assert call["logsumexp"].shape == (2, 3, b + -b % 32) and (
            b == K or call["attn_bias"].stride(-2) % 8 == 0
        )


@pytest.mark.parametrize("heads, L", [(1, 2048), (1, 2050), (3, 2051)])
def test_few_long_heads_keep_all_cores_busy(heads, L, monkeypatch):
    "In two halves: the same numbers, forward and backward, to rounding."
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(api, "native_works", lambda: False)
    used, split = [], heads_lib.split_attention
    spy = lambda *a: used.append(1) or split(*a)  # noqa: E731
    monkeypatch.setattr(heads_lib, "split_attention", spy)
    *a, up = (t.float() for t in (*qkv(1, heads, L, 8), qkv(1, heads, L, 8)[0]))
    found, torch_one = [], lambda *a: F.scaled_dot_product_attention(*a, is_causal=True)
    for way in (lambda *a: las_attention(*a, (0.0,) * heads, 1), torch_one):
        mine = [t.detach().clone().requires_grad_() for t in a]
        o = way(*mine)
        found.append([o, *torch.autograd.grad(o, mine, up)])
    assert used == [1]
    for x, y in zip(*found):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("L, heads, piece", [(300, 5, 2**11), (900, 3, 2**21)])
@pytest.mark.parametrize("layout", ["heads first", "steps first"])
def test_in_pieces_and_in_any_layout(L, heads, piece, layout, monkeypatch):
    "A few heads at a time, or all at once, with and without bands: the same numbers."
    monkeypatch.setattr(heads_lib, "_PIECE", piece)
    a = qkv(3, heads, L, 8)
    if layout == "steps first":
        a = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in a]
    a = [t.requires_grad_() for t in a]
    rates = (0.0, 0.01, 0.1, 0.3, 0.9)[:heads]
    got = las_attention(*a, rates, method="linear", tol=1e-6)
    want = las_dense(*a, torch.tensor(rates, dtype=torch.float64))
    up = torch.randn_like(want)
    pairs = [(got, want)]
    pairs += zip(*(torch.autograd.grad(o, a, up) for o in (got, want)))
    for x, y in pairs:
        torch.testing.assert_close(x, y, atol=2e-5, rtol=0)


def test_memory_stays_near_that_of_plain_attention():
    "Forward and backward; what a piece of heads needs on the way is small."
    from las_nb.bench import Case, peak_memory

    for rate in (0.5, 0.001):
        case = Case(L=16_384, max_rate=rate)
        mine, plain = (peak_memory(name, case) for name in ("auto", "plain"))
        assert mine < 1.6 * plain


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "how",
    [
        {},
        dict(pool="weights", chunk=8),
        dict(score_bound=2.0),
        dict(lengths=[700, 9]),
        dict(cu_seqlens=[0, 300, 1400]),
    ],
)
def test_shapes_alone(method, causal, how):
    q, v = (torch.zeros(2, 3, 700, D, device="meta") for D in (8, 5))
    with torch.device("meta"):
        for rates in ((0.0, 1e-4, 1e-3), torch.tensor([0.0, 1e-4, 1e-3])):
            o = las_attention(q, q, v, rates, causal=causal, method=method, **how)
            assert o.is_meta and o.shape == v.shape
