"""The GPU kernel, run by Triton's interpreter where there is no GPU: the function it
computes, far tiles included, its gradients, its limits, and the check before its first
use."""

import importlib, itertools, math, os, subprocess, sys
from pathlib import Path
import pytest, torch
from las_nb import decay_rates, las_attention, las_dense
from las_nb.fast import api, bands

fused = pytest.importorskip("las_nb.fast.fused", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPEEDS = tuple(decay_rates(3, 0.5).tolist())


def inputs(L, D=16, Dv=None, dtype=torch.float32):
    g = torch.Generator().manual_seed(L)
    a = [torch.randn(1, 3, L, n, generator=g) for n in (D, D, Dv or D, Dv or D)]
    a = [t.to(DEVICE, dtype) for t in a]
    return [t.requires_grad_() for t in a[:3]], a[3]


def with_gradients(call, a, up):
    o = call(*a)
    return [o, *torch.autograd.grad(o, a, up)]


def assert_near(got, want, most):
    for x, y in zip(got, want):
        assert x.isfinite().all()
        assert (x - y).abs().max() < most * y.abs().max()


PER_HEAD = ((0.5, 0.5), (0.2, 0.8), (1.0, 0.0))


@pytest.mark.parametrize("bound", [None, 64.0])
@pytest.mark.parametrize(
    "L,D,Dv,causal,pool,window,ends",
    [
        (300, 16, 16, True, "scores", 3, None),
        (150, 16, 16, False, "scores", 3, None),
        (140, 16, 8, True, "weights", 4, None),
        (140, 8, 24, False, "scores", 4, (140, 90)),
        (140, 12, 12, True, "scores", (0.5, 0.3, -0.3), (140, 70)),
        (140, 16, 16, False, "weights", 3, (140, 60)),
        (129, 40, 40, True, "scores", 1, None),
        (140, 16, 16, True, "scores", PER_HEAD, None),
    ],
)
def test_it_is_the_matrix(L, D, Dv, causal, pool, window, ends, bound):
    a, up = inputs(L, D, Dv)
    if ends:  # a batch of two, one of them padded
        a, up = (
            [t.detach().repeat(2, 1, 1, 1).requires_grad_() for t in a],
            up.repeat(2, 1, 1, 1),
        )
    lengths = None if ends is None else torch.tensor(ends, device=DEVICE)
    real = torch.ones(len(ends or (L,)), 1, L, 1, device=DEVICE)
    if ends:
        at = torch.arange(L, device=DEVICE)
        real = (at < lengths[:, None]).float()[:, None, :, None]
    how = dict(window=window, pool=pool, causal=causal, lengths=lengths)

    def call(method, **kw):
        of = lambda *a: las_attention(*a, SPEEDS, method=method, **kw, **how) * real
        return with_gradients(of, a, up)

    got = call("triton", tol=1e-4, score_bound=bound)
    assert_near(got, call("dense"), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_that_of_its_dtype(dtype):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no products of bfloat16")
    a, up = inputs(200, 32, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in a]
    rates = torch.tensor(SPEEDS, device=DEVICE, dtype=torch.float64)
    want = with_gradients(lambda *a: las_dense(*a, rates), exact, up.double())
    got = with_gradients(lambda *a: las_attention(*a, SPEEDS, method="triton"), a, up)
    assert [t.dtype for t in got] == [dtype] * 4
    assert_near(got, want, 4 * torch.finfo(dtype).eps)


def by_tiles(q, k, v, speeds, reach):
    "What the kernel computes: scores of far tiles count as 0."
    L = q.shape[2]
    i = torch.arange(L)
    d = (i[:, None] - i).clamp(min=0)
    rates = torch.tensor(speeds, dtype=torch.float64)[:, None, None]
    e = q @ k.mT / math.sqrt(q.shape[3]) * torch.exp(-rates * d)
    tile = i // 128
    far = tile[:, None] - tile > torch.tensor(reach)[:, None, None]
    e = torch.where(far, 0.0, e).masked_fill(i[:, None] < i, -math.inf)
    return e.softmax(-1) @ v, e.logsumexp(-1)


@pytest.mark.parametrize("bounds", [None, (2.0, 2.0, 2.0)])
def test_far_keys_and_their_gradients(bounds):
    "A tolerance so large that the error shows, and gradients of both results."
    a, up = inputs(420)
    for t in a:
        t.data *= 0.5
    speeds = (0.0, 0.015, 0.03)
    o, lse = fused.fused_attention(*a, speeds, 0.6, bounds)
    g_lse = torch.randn(lse.shape, generator=torch.Generator().manual_seed(1))
    g_lse = g_lse.to(DEVICE)
    got = [o, lse, *torch.autograd.grad((o, lse), a, (up, g_lse))]
    delta = bands.far_delta(0.6)
    rates, *_ = fused._tables(speeds, 1, a[0].device)
    nothing = torch.empty(0, dtype=torch.int32, device=DEVICE)
    given = nothing
    if bounds:
        given = fused._known_reach(speeds, bounds, 0.6, a[0].device)
    *_, reach = fused._forward_call(*a, rates, given, 0.25, delta)
    reach = reach.clamp(max=10).tolist()
    assert reach == [10, 2, 1]
    exact = [t.detach().double().cpu().requires_grad_() for t in a]
    o, lse = by_tiles(*exact, speeds, reach)
    up, g_lse = up.double().cpu(), g_lse.double().cpu()
    want = [o, lse, *torch.autograd.grad((o, lse), exact, (up, g_lse))]
    assert_near([t.cpu() for t in got], want, 2e-5)
    # and the promise holds
    rates = torch.tensor(speeds, dtype=torch.float64)
    off = (o - las_dense(*exact, rates, 1)).norm(dim=-1).max()
    assert 1e-5 < off <= 0.6 * exact[2].norm(dim=-1).max()


def test_reach_is_that_of_the_plan():
    "On the device as on the host, at every rate: none, tiny, huge; and scores too."
    speeds = (0.0, 1e-6, 0.01, 0.3, 50.0)
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 260, 16, generator=g).to(DEVICE)
    q = q * torch.tensor([1.0, 1.0, 100.0, 0.0, 1.0], device=DEVICE)[:, None, None]
    rates, *_ = fused._tables(speeds, 1, q.device)
    nothing = torch.empty(0, dtype=torch.int32, device=DEVICE)
    found = fused._forward_call(q, k, v, rates, nothing, 0.25, bands.far_delta(1e-3))
    norms = [t.norm(dim=-1).amax((0, 2)) for t in (q, k)]
    bounds = tuple((norms[0] * norms[1] / 4).tolist())
    known = fused._known_reach(speeds, bounds, 1e-3, q.device)
    assert torch.equal(found[2].clamp(max=99), known.clamp(max=99))
    # scores of 0 count as 1: their gradients do not vanish
    assert known.tolist()[3:] == [1, 1] and known[0] > 1000


def test_rows_that_are_not_finite_do_not_count():
    a, _ = inputs(300)
    with torch.no_grad():
        want = las_attention(*a, SPEEDS, method="triton")
        a[1][0, :, 290] = math.nan
        got = las_attention(*a, SPEEDS, method="triton")
    assert got[0, :, 290:].isnan().all()
    assert_near([got[0, :, :256]], [want[0, :, :256]], 1e-6)


def test_a_bound_makes_outputs_depend_on_their_past_alone():
    a, _ = inputs(300)
    with torch.no_grad():
        how = dict(method="triton", score_bound=1e3)
        want = las_attention(*a, SPEEDS, **how)
        for t in a:
            t[:, :, 200:] = 3 * torch.randn_like(t[:, :, 200:])
        got = las_attention(*a, SPEEDS, **how)
    assert torch.equal(got[:, :, :200], want[:, :, :200])
    with pytest.raises(ValueError, match="above score_bound"):
        las_attention(*a, SPEEDS, method="triton", score_bound=0.1)


def test_views_of_one_projection_are_taken_as_they_are():
    qkv = torch.randn(1, 140, 3, 3, 16, device=DEVICE, requires_grad=True)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    got = las_attention(q, k, v, SPEEDS, method="triton")
    assert got.transpose(1, 2).is_contiguous()
    (g,) = torch.autograd.grad(got.square().sum(), qkv)
    want = las_attention(q, k, v, SPEEDS, method="dense")
    assert_near([got, g], [want, *torch.autograd.grad(want.square().sum(), qkv)], 1e-5)


def test_compiled_in_one_graph():
    a, up = inputs(140)

    def call(q, k, v):
        return las_attention(q, k, v, SPEEDS, method="triton", score_bound=100.0)

    fast = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=False)
    got, want = with_gradients(fast, a, up), with_gradients(call, a, up)
    assert_near(got, want, 1e-6)


@pytest.mark.parametrize(
    "change,why",
    [
        (lambda q, k, v: (q.double(), k.double(), v.double()), "half precision"),
        (lambda q, k, v: 3 * [torch.ones(1, 3, 4, 130)], "width 128 at most"),
    ],
)
def test_refused(change, why):
    a, _ = inputs(40)
    with pytest.raises(ValueError, match=f"'triton' needs .*{why}; use 'auto'"):
        las_attention(*change(*a), SPEEDS, method="triton")


def test_refused_with_trained_windows_and_without_a_gpu(monkeypatch):
    a, _ = inputs(40)
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="not trained"):
        las_attention(*a, SPEEDS, w, method="triton")
    monkeypatch.setattr(api, "_INTERPRETS", False)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="needs a GPU"):
            las_attention(*a, SPEEDS, method="triton")


def test_no_second_derivative():
    a, up = inputs(40)
    o = las_attention(*a, SPEEDS, method="triton")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(o, a, up, create_graph=True)


@pytest.fixture
def untried(monkeypatch):
    monkeypatch.setattr(bands, "_TRUSTED", {})


def test_a_wrong_kernel_is_found_out(monkeypatch, untried):
    "A kernel of torch that answers wrongly: one warning, then plain products."
    real = bands.flash

    def wrong(q, k, v, scale, kind):
        o, lse, rest = real(q, k, v, scale, None)
        return (o * 1.2 if kind == "efficient" else o), lse, rest

    real_back = bands.flash_backward
    monkeypatch.setattr(bands, "flash", wrong)
    monkeypatch.setattr(bands, "made_for", lambda x: "efficient")
    monkeypatch.setattr(bands, "flash_backward", lambda *a: real_back(*a[:-1], None))
    a, up = inputs(400)
    want = with_gradients(lambda *a: las_dense(*a, torch.tensor(SPEEDS)), a, up)
    call = lambda *a: las_attention(*a, SPEEDS, method="linear", tol=1e-4)
    with pytest.warns(UserWarning, match="efficient kernel is not used on .*off by"):
        got = with_gradients(call, a, up)
    assert_near(got, want, 1e-4)
    with monkeypatch.context() as m:
        m.setattr(bands.warnings, "warn", lambda *_: pytest.fail("warned again"))
        assert_near(with_gradients(call, a, up), want, 1e-4)


@pytest.mark.parametrize("part", range(5))  # output, its log-sum, three gradients
def test_what_is_no_number_is_found_out(part, monkeypatch, untried):
    ways = bands.flash, bands.flash_backward

    def spoilt(kind, found, first):
        mine = kind == "efficient" and first <= part < first + len(found)
        if mine:
            found[part - first].view(-1)[3] = torch.nan
        return found

    def forward(q, k, v, scale, kind):
        o, lse, rest = ways[0](q, k, v, scale, None)
        return *spoilt(kind, [o, lse], 0), rest

    monkeypatch.setattr(bands, "flash", forward)
    back = lambda *a: spoilt(a[-1], list(ways[1](*a[:-1], None)), 2)
    monkeypatch.setattr(bands, "flash_backward", back)
    monkeypatch.setattr(bands, "made_for", lambda x: "efficient")
    with pytest.warns(UserWarning, match="efficient kernel is not used .*off by nan"):
        assert bands.kernel_for(torch.zeros(1, 2, 40, 16)) is None


def test_the_health_check_sees_what_is_no_number(monkeypatch):
    main = importlib.import_module("las_nb.__main__")
    real = main.las_attention

    def spoilt(q, k, v, *how, **more):
        v = v.clone()
        v.register_hook(lambda g: g * torch.nan)
        return real(q, k, v, *how, **more)

    monkeypatch.setattr(main, "las_attention", spoilt)
    well, words = main.report("cpu")
    assert not well and "DISAGREES" in words


def test_a_kernel_that_fails_is_found_out(untried):
    def fails():
        raise RuntimeError("out of resource\nand more")

    where = torch.device(DEVICE), torch.float32
    with pytest.warns(UserWarning, match=r"fails \(out of resource\); please report"):
        assert not bands.trusted("own", *where, fails)
    assert not bands.trusted("own", *where, lambda: 0.0)  # asked once
    assert bands.trusted("other", *where, lambda: 0.0)


def test_the_health_check_names_kernels(monkeypatch, capsys):
    main = importlib.import_module("las_nb.__main__")
    seen = {"efficient float32": True, "triton float32": False}
    monkeypatch.setattr(main, "gpu_kernels", lambda device: seen)
    assert main.main() == 0
    said = capsys.readouterr().out
    assert "kernels on cpu: efficient float32 ok, triton float32 NOT USED" in said
    assert api.gpu_kernels("cpu") == {}


@pytest.mark.parametrize("width", [16, 64])
def test_the_check_passes_here(width):
    error = api._fused_error(torch.device(DEVICE), torch.float32, width)
    assert 0 < error < 1e-3


@pytest.mark.parametrize("capability,shared", [(80, 163)])
def test_kernels_compile_for_gpus(capability, shared):
    "Without a GPU: to machine code, within the shared memory that it has."
    triton = pytest.importorskip("triton")
    if not (Path(triton.__file__).parent / "backends/nvidia/bin").exists():
        pytest.skip("this Triton brings no assembler for NVIDIA GPUs")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "warm_kernels.py"
    said = subprocess.run(
        [sys.executable, script, str(capability)],
        capture_output=True, text=True, env=env, timeout=600,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr[-2000:]
    sizes = dict(line.split() for line in said.stdout.splitlines())
    names = ("_forward", "_backward_queries", "_backward_keys")
    for name, dtype in itertools.product(names, ("bfloat16", "float32")):
        assert int(sizes[f"{name}-{dtype}"]) <= shared * 1024


@pytest.mark.parametrize("bound", [None, 1e-5])
def test_far_keys_have_gradients_where_scores_are_small(bound):
    "As at the first step of a layer whose queries begin at zero."
    a, up = inputs(640)
    a[0] = torch.zeros_like(a[0]).requires_grad_()
    slow = 0.0, 0.004, 0.02
    got, want = (
        with_gradients(lambda *a: las_attention(*a, slow, method=m, **kw), a, up)
        for m, kw in (("triton", dict(score_bound=bound)), ("dense", {}))
    )
    for x, y in zip(got, want):
        assert (x - y).norm() <= 1e-4 * y.norm()


@pytest.mark.parametrize("rate", [3e38, 1e300])
def test_rates_that_float32_does_not_hold(rate):
    a, _ = inputs(150)
    o, want = (
        las_attention(*a, (0.0, 0.5, rate), method=m) for m in ("triton", "dense")
    )
    assert_near([o], [want], 1e-5)


@pytest.mark.parametrize("size", [1e19, 1e20, 1e30])
def test_huge_queries_and_tiny_keys(size):
    (q, k, v), _ = inputs(300)
    slow = (0.01,) * 3
    want = las_attention(q, k, v, slow, method="dense")
    got = las_attention(q * size, k / size, v, slow, method="triton")
    assert_near([got], [want], 1e-4)


def test_the_interpreter_has_no_products_of_bfloat16():
    if DEVICE == "cuda":
        pytest.skip("a GPU has")
    a, _ = inputs(40, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="needs a GPU for bfloat16"):
        las_attention(*a, SPEEDS, method="triton")
