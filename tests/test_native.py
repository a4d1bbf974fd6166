"""The kernel in C for CPUs: the function it computes, its promise, its gradients, its
limits, and what becomes of it where it cannot be built."""

import itertools, os, subprocess, sys
import pytest, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from las_nb import las_attention, las_dense
from las_nb.fast import api, native
from las_nb.fast.bands import _TRUSTED
from las_nb.fast.native import native_attention, reach_of, why_not_native

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(
    native._compiler() is None, reason="no C compiler on this machine"
)
PER_HEAD = ((0.5, 0.5), (0.2, 0.8), (1.0, 0.0))
SPEEDS = (0.0, 0.03, 0.7)


def inputs(B, L, D, Dv=None, dtype=torch.float32, scale=1.0):
    g = torch.Generator().manual_seed(L)
    q, k, v, up = (
        torch.randn(B, 3, L, n, generator=g).to(dtype) for n in (D, D, Dv or D, Dv or D)
    )
    return [t.requires_grad_() for t in (q * scale, k, v)], up


def with_gradients(call, a, up):
    o = call(*a)
    return [o.detach(), *torch.autograd.grad(o, a, up.to(o.dtype))]


def by_matrix(a, up, *how):
    a = [t.detach().double().requires_grad_() for t in a]
    r = torch.tensor(SPEEDS, dtype=torch.float64)
    return with_gradients(lambda *t: las_dense(*t, r, *how), a, up)


def assert_near(got, want, most):
    for x, y in zip(got, want):
        assert x.isfinite().all()
        assert (x - y).abs().max() <= most * max(1, y.abs().max())


@needs_compiler
def test_it_is_there():
    assert why_not_native() is None and native.native_works()


@needs_compiler
@pytest.mark.parametrize("bound", [None, 64.0])
@pytest.mark.parametrize(
    "L,D,Dv,causal,pool,window,ends",
    [
        (1, 4, 4, True, "scores", 3, None),
        (63, 16, 16, True, "scores", 1, None),
        (64, 16, 16, True, "scores", 3, None),
        (65, 20, 12, True, "scores", 3, None),
        (130, 8, 24, True, "weights", 3, None),
        (200, 33, 33, True, "scores", PER_HEAD, None),
        (200, 64, 64, True, "scores", 300, None),
        (600, 16, 16, True, "scores", (0.7, -0.2, 0.5), None),
        (300, 130, 16, False, "scores", 3, (300, 17)),
        (410, 16, 16, False, "weights", 3, None),
        (410, 8, 8, False, "scores", 4, (1, 400)),
    ],
)
def test_it_is_the_matrix(L, D, Dv, causal, pool, window, ends, bound):
    a, up = inputs(2, L, D, Dv)
    n = None if ends is None else torch.tensor(ends)
    if ends:  # what lies behind the end is nobody's
        up = up * (torch.arange(L) < n[:, None])[:, None, :, None]
    how = window, pool, causal, n
    got = with_gradients(
        lambda *t: las_attention(
            *t, SPEEDS, *how, method="native", tol=1e-6, score_bound=bound
        ),
        a,
        up,
    )
    want = by_matrix(a, up, *how)
    if ends:
        real = (torch.arange(L) < n[:, None])[:, None, :, None]
        got[0], want[0] = got[0] * real, want[0] * real
    assert_near(got, want, 2e-5)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    a, up = inputs(1, 200, 16, dtype=dtype)
    got = las_attention(*a, SPEEDS, method="native", tol=1e-6)
    want = las_attention(*(t.float() for t in a), SPEEDS, method="native", tol=1e-6)
    assert got.dtype == dtype and torch.equal(got, want.to(dtype))


@needs_compiler
@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("L", [1300, 2000])
def test_the_worst_keys_keep_the_promise(L, tol):
    "Every far key is as large as the bound allows, and its value against the others."
    bound, rate, D = 4.0, 0.02, 8
    reach, first, _ = reach_of(rate, L, bound, tol)
    assert first < L
    far = torch.arange(L) < first - reach
    for sign in (1, -1):
        q, k, v = torch.zeros(3, 1, 1, L, D)
        q[..., 0] = (bound * D**0.5) ** 0.5
        k[..., 0] = torch.where(far, sign, -sign) * (bound * D**0.5) ** 0.5
        v[..., 0] = torch.where(far, 1.0, -1.0)
        call = dict(window=1, tol=tol, score_bound=1.001 * bound)
        got = las_attention(q, k, v, (rate,), method="native", **call)
        r = torch.tensor([rate], dtype=torch.float64)
        want = las_dense(q.double(), k.double(), v.double(), r, 1)
        error = (got - want).abs()
        assert error.max() <= tol + 1e-6
        # at the first query that has far keys the promise is used, not wasted
        assert tol < 1e-3 or error[..., first, :].max() > 0.02 * tol


@needs_compiler
@pytest.mark.parametrize("rate", [0.002, 0.5, 3.0, 1e6])
def test_gradients_of_far_keys(rate):
    L, D = 2100, 16
    a = [torch.randn(1, 1, L, D, generator=torch.Generator().manual_seed(s)) for s in
         range(4)]  # fmt: skip
    up = a.pop()
    a = [t.requires_grad_() for t in a]
    found = []
    for method, dtype, tol in (
        ("native", torch.float32, 1e-4),
        ("linear", torch.float64, 1e-10),
    ):
        mine = [t.detach().to(dtype).requires_grad_() for t in a]
        call = dict(method=method, tol=tol)
        found.append(
            with_gradients(lambda *t: las_attention(*t, (rate,), **call), mine, up)
        )
    assert_near(*found, 3e-4)


@needs_compiler
def test_a_bound_makes_outputs_depend_on_their_past_alone():
    a, _ = inputs(2, 700, 16)
    b = [t.detach().clone() for t in a]
    for t in b:
        t[:, :, 400:] = 50 * torch.randn(2, 3, 300, 16)
    b[0][:, :, 400:] /= 50
    call = dict(method="native", score_bound=1e4, tol=1e-2)
    x, y = (las_attention(*t, SPEEDS, **call) for t in (a, b))
    assert torch.equal(x[:, :, :400], y[:, :, :400])


@needs_compiler
def test_batch_mates_do_not_matter():
    a, _ = inputs(4, 300, 16)
    call = dict(method="native", score_bound=300.0)
    together = las_attention(*a, SPEEDS, **call)
    alone = [
        las_attention(*(t[b : b + 1] for t in a), SPEEDS, **call) for b in range(4)
    ]
    assert torch.equal(together, torch.cat(alone))


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("B,L", [(1, 1500), (3, 200)])
def test_any_number_of_threads(B, L, threads, monkeypatch):
    "Heads are cut into shares; none is lost, and none done twice."
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    a, up = inputs(B, L, 16)
    call = dict(method="native", tol=1e-6)
    got = with_gradients(lambda *t: las_attention(*t, SPEEDS, **call), a, up)
    assert_near(got, by_matrix(a, up, 3), 2e-5)
    units = native._shares([1.0, 3.0, 90.0], B, threads)
    for bh, n in {(bh, n) for bh, _, n in units}:
        assert [s for b, s, _ in units if b == bh] == list(range(n))
    assert sorted({bh for bh, *_ in units}) == list(range(3 * B))


@needs_compiler
def test_strides_of_one_projection():
    x = torch.randn(2, 300, 3, 3, 16, requires_grad=True)
    heads = [t.squeeze(2).transpose(1, 2) for t in x.split(1, 2)]
    assert not heads[0].is_contiguous()
    call = dict(method="native", tol=1e-6)
    got = las_attention(*heads, SPEEDS, **call)
    want = las_attention(*(t.contiguous() for t in heads), SPEEDS, **call)
    assert torch.equal(got, want)
    odd = [t[..., ::2] for t in heads]
    same = [t.contiguous() for t in odd]
    every, packed = (las_attention(*t, SPEEDS, **call) for t in (odd, same))
    assert torch.equal(every, packed)
    # a gradient that is one number for all
    (dx,) = torch.autograd.grad(got.sum(), x, retain_graph=True)
    assert torch.equal(dx, torch.autograd.grad(got, x, torch.ones_like(got))[0])
    # and the log of the denominators alone
    q, k, v = (t.detach().contiguous().requires_grad_() for t in heads)
    _, lse = native_attention(q, k, v, SPEEDS, 0.0, (50.0,) * 3)
    dq, dk = torch.autograd.grad(lse.sum(), (q, k))
    scores = q.double() @ k.double().mT / 4
    gap = torch.arange(300)[:, None] - torch.arange(300)
    decay = (-torch.tensor(SPEEDS)[:, None, None] * gap.clamp(min=0)).exp()
    scores = (scores * decay).masked_fill(gap < 0, -torch.inf)
    assert (lse - scores.logsumexp(-1)).abs().max() < 1e-4
    want = torch.autograd.grad(scores.logsumexp(-1).sum(), (q, k))
    assert_near((dq, dk), want, 1e-4)


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which,at", [*itertools.product(range(3), (0, 70, 199))])
def test_rows_that_are_not_finite_reach_what_sees_them(bad, which, at):
    a, _ = inputs(2, 200, 16)
    a = [t.detach() for t in a]
    a[which][1, 2, at, 3] = bad
    got, want = (las_attention(*a, SPEEDS, method=m) for m in ("native", "dense"))
    assert torch.equal(got.isfinite(), want.isfinite())
    real = want.isfinite()
    assert (got - want)[real].abs().max() < 1e-4


@needs_compiler
@pytest.mark.parametrize("size", [1e-20, 1e4, 1e15, 1e30])
def test_huge_queries_and_tiny_keys(size):
    a, _ = inputs(1, 300, 16)
    b = [a[0] * size, a[1] / size, a[2]]
    got = las_attention(*b, SPEEDS, method="native")
    assert (got - las_attention(*a, SPEEDS, method="dense")).abs().max() < 1e-4


@needs_compiler
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_large_scores(scale):
    "A softmax that is nearly a choice: no overflow, and nothing lost."
    a, up = inputs(1, 300, 16, scale=scale)
    got = las_attention(*a, SPEEDS, method="native")
    r = torch.tensor(SPEEDS, dtype=torch.float64)
    want = las_dense(*(t.double() for t in a), r)
    assert (got - want).abs().max() < 2e-5 * scale


@needs_compiler
@pytest.mark.parametrize("size", [38.0, 41.0])  # bounds are rounded up
@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_as_large_as_need_no_largest_one(size, sign):
    "Below a bound of 40 no score is subtracted: nothing overflows, nothing vanishes."
    (q, k, v), up = inputs(1, 700, 8)
    with torch.no_grad():
        k[:] = 1.0
        q[:] = sign * size / 8**0.5 * torch.linspace(0.9, 1, 700)[:, None]
    got = with_gradients(
        lambda *t: las_attention(*t, SPEEDS, 1, method="native", tol=1e-6),
        (q, k, v),
        up,
    )
    assert_near(got, by_matrix((q, k, v), up, 1), 1e-4)


@needs_compiler
def test_no_second_derivative():
    a, up = inputs(1, 100, 8)
    o = las_attention(*a, SPEEDS, method="native")
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(o, a, up, create_graph=True)


@needs_compiler
def test_auto_takes_it_where_it_can(monkeypatch):
    asked, real = [], api.native_attention

    def spy(*args, **kw):
        asked.append(1)
        return real(*args, **kw)

    monkeypatch.setattr(api, "native_attention", spy)

    def taken(L=400, speeds=SPEEDS, window=3, dtype=torch.float32, **kw):
        asked.clear()
        a, _ = inputs(1, L, 16, dtype=dtype)
        las_attention(*a, speeds, window, **kw)
        return len(asked)

    assert taken() == 1 and taken(dtype=torch.bfloat16) == 1
    assert taken(causal=False) == 2 and taken(speeds=(0.0,) * 3) == 1
    plain = dict(speeds=(0.0,) * 3, window=1)
    assert taken(**plain) == 1
    # torch's own
    assert not taken(dtype=torch.bfloat16, **plain)
    assert not taken(causal=False, **plain)
    assert not taken(dtype=torch.float64) and not taken(method="linear")
    assert taken(L=24) == 1 and not taken(L=100, causal=False)
    trained = torch.full((3,), 1 / 3, requires_grad=True)
    assert not taken(window=trained)


@pytest.mark.parametrize(
    "change, why",
    [
        (dict(dtype=torch.float64), "needs float32 or half precision"),
        (dict(D=300), "needs heads of width 256 at most"),
    ],
)
def test_refused(change, why):
    a, _ = inputs(1, 40, **(dict(D=16) | change))
    with pytest.raises(ValueError, match=f"method 'native' {why}"):
        las_attention(*a, SPEEDS, method="native")


def test_tensors_without_memory_are_refused():
    "Their data pointer is no place to read from."
    with FakeTensorMode():
        x = torch.randn(1, 2, 600, 8)
        with pytest.raises(ValueError, match="needs tensors of torch's own kind"):
            las_attention(x, x, x, (0.1, 0.5), method="native")


def run(code, **env):
    "A process of its own, since the kernel is built once in each."
    env = os.environ | dict(OMP_NUM_THREADS="1") | env
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SAY = "from las_nb.fast.native import *; print(native_works(), why_not_native());"
USE = (
    "import torch; from las_nb import las_attention; x = torch.randn(1, 2, 100, 8);"
    "print(las_attention(x, x, x, (0.1, 0.5)).isfinite().all().item())"
)


def test_without_it_all_goes_on(tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'cc: no such target' >&2; exit 1\n")
    broken.chmod(0o755)
    for env, why in (
        (dict(LAS_NB_NATIVE="0"), "LAS_NB_NATIVE to be unset"),
        (dict(CC="no-such-compiler"), "a C compiler (gcc or clang)"),
        (dict(CC=str(broken)), "that can build it (cc: no such target)"),
    ):
        said = run(SAY + USE, **env)
        assert said.startswith("False") and why in said and said.endswith("True\n")


@needs_compiler
def test_the_cache(tmp_path):
    "Built once; built anew where the file is spoiled, or there is no place for it."
    env = dict(XDG_CACHE_HOME=str(tmp_path))
    assert run(SAY, **env) == "True None\n"
    (made,) = (tmp_path / "las_nb" / "native").iterdir()
    before = made.stat().st_mtime_ns
    assert run(SAY, **env) == "True None\n" and made.stat().st_mtime_ns == before
    made.write_bytes(b"no library")
    assert run(SAY, **env) == "True None\n" and made.stat().st_size > 1000
    (tmp_path / "file").write_text("")
    assert run(SAY, XDG_CACHE_HOME=str(tmp_path / "file")) == "True None\n"


@needs_compiler
def test_a_wrong_kernel_is_found_out(monkeypatch):
    key = "native", CPU, torch.float32
    monkeypatch.delitem(_TRUSTED, key, raising=False)
    monkeypatch.setattr(native, "native_error", lambda: 0.01)
    with pytest.warns(UserWarning, match="native kernel is not used on cpu .*off by"):
        assert not native.native_works()
    monkeypatch.delitem(_TRUSTED, key)
