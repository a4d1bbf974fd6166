"torch.func: gradients and per-sample gradients, at every length."

import pytest, torch
from torch.func import functional_call, grad, jacfwd, jvp, vmap
from las_nb import LaSAttention, LaSTransformer, decay_rates
from las_nb import las_attention, las_dense

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def inputs(L, n=2):
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, n, 2, L, 4, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("bound", [None, 200.0])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("method", ["auto", "linear"])
@pytest.mark.parametrize("L,max_rate", [(20, 0.5), (200, 0.05), (700, 0.5)])
def test_gradients_per_sample(L, max_rate, method, causal, bound):
    "A band where scores have a known bound; without one a vmap takes no short cut."
    rates = tuple(decay_rates(2, max_rate).tolist())
    r, a = torch.tensor(rates, dtype=torch.float64), inputs(L)
    how = dict(method=method, score_bound=bound, tol=1e-4)

    def fast(*x):
        x = (t[None] for t in x)
        return las_attention(*x, rates, causal=causal, **how).square().sum()

    def exact(*x):
        return las_dense(*(t[None] for t in x), r, causal=causal).square().sum()

    want = torch.stack([grad(exact)(*a[:, i]) for i in range(2)])
    for got in (
        vmap(grad(fast))(*a),
        torch.stack([grad(fast)(*x) for x in a.unbind(1)]),
    ):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


def test_bands_take_part():
    "Far keys are left out there as well: the error is there, and within the promise."
    rates, a = (0.0, 0.5), inputs(700, 1)[:, 0]
    how = dict(method="linear", score_bound=200.0, tol=0.3)

    def out(q):
        return las_attention(q[None], a[1][None], a[2][None], rates, **how)

    got, want = vmap(out)(a[0][None])[0], out(a[0])
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    exact = las_dense(*a[:, None], torch.tensor(rates))
    assert (got - exact).abs().max() > 1e-12


def test_a_bound_that_does_not_hold_shows():
    a = inputs(300)
    call = vmap(
        lambda *x: las_attention(*(t[None] for t in x), (0.0, 0.5), score_bound=1.0)
    )
    a[0, 0] *= 0.01
    o = call(*a)
    assert o[0].isfinite().all() and o[1].isnan().all()


def test_per_sample_gradients_of_a_model():
    torch.manual_seed(0)
    model = LaSTransformer(
        3, in_features=1, dim=8, depth=1, n_heads=2, max_rate=0.5, tol=1e-6
    ).double()
    x = torch.randn(3, 600, 1, dtype=torch.float64)
    params = dict(model.named_parameters())

    def loss(p, x):
        return functional_call(model, p, (x[None],)).square().sum()

    got = vmap(grad(loss), (None, 0))(params, x)
    for i in range(3):
        want = torch.autograd.grad(model(x[i : i + 1]).square().sum(), params.values())
        for name, g in zip(params, want):
            torch.testing.assert_close(got[name][i], g, atol=1e-4, rtol=1e-4)


def test_a_gradient_of_a_gradient_leaves_nothing_behind():
    "As in meta-learning: what a call keeps for the next is no part of a transform."
    torch.manual_seed(0)
    net, x = LaSAttention(8, 2, max_rate=0.5), torch.randn(2, 300, 8)
    params = dict(net.named_parameters())

    def loss(p):
        return functional_call(net, p, (x,)).square().mean()

    def after_a_step(p):
        return loss({n: p[n] - 0.1 * g for n, g in grad(loss)(p).items()})

    first, again = grad(after_a_step)(params), grad(after_a_step)(params)
    for name, g in first.items():
        torch.testing.assert_close(again[name], g)
    grad(loss)(params)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("L, rates", [(40, (0.0, 0.1)), (300, (0.5, 1.0))])
def test_vmap_over_one_of_the_three(L, rates, which):
    a = inputs(L)

    def out(x):
        mine = [t[:1] for t in a]
        mine[which] = x[None]
        return las_attention(*mine, rates)

    want = torch.stack([out(x) for x in a[which]])
    torch.testing.assert_close(vmap(out)(a[which]), want, atol=1e-6, rtol=0)


def test_vmap_over_rates_and_windows():
    a, rates = inputs(60), torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    windows = torch.tensor([[0.5, 0.5], [0.3, 0.7]])
    for f, many in (
        (lambda r: las_attention(*a, r), rates),
        (lambda w: las_attention(*a, (0.0, 0.1), w), windows),
    ):
        torch.testing.assert_close(vmap(f)(many), torch.stack([f(x) for x in many]))


@pytest.mark.parametrize("method", ["auto", "linear"])
@pytest.mark.parametrize("rates", [(0.0, 0.01), (0.5, 1.0)])
def test_forward_mode(rates, method):
    a, r = inputs(300, 1)[:, 0], torch.tensor(rates, dtype=torch.float64)

    def with_q(way, r, **how):
        return lambda q: way(*(t[None] for t in (q, *a[1:])), r, **how).sum()

    fast, exact = with_q(las_attention, rates, method=method), with_q(las_dense, r)
    tangent = torch.ones_like(a[0])
    got, want = (jvp(f, (a[0],), (tangent,))[1] for f in (fast, exact))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_forward_mode_of_rates():
    a, r = inputs(300, 1)[:, :1].unbind(0), torch.tensor((0.05, 0.3)).double()
    got = jacfwd(lambda r: las_attention(*a, r).square().sum())(r)
    want = jacfwd(lambda r: las_dense(*a, r).square().sum())(r)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rates", [(0.0, 0.01), (0.5, 1.0)])
@pytest.mark.parametrize("method", ["auto", "linear", "sdpa"])
def test_no_second_derivative_without_the_matrix(rates, method):
    if method == "sdpa" and rates[-1] == 1.0:
        pytest.skip("too fast for it")
    q, k, v = (t[:1] for t in inputs(300, 1))

    def f(x):
        return las_attention(x, k, v, rates, method=method).square().sum()

    with pytest.raises(RuntimeError, match="method='dense'"):
        torch.autograd.functional.hvp(f, q, torch.ones_like(q))
    last = lambda x: las_attention(x, k, v, rates, method=method)[0, 0, -1]  # noqa: E731
    with pytest.raises(RuntimeError, match="method='dense'"):
        torch.autograd.functional.jacobian(last, q, vectorize=True)
