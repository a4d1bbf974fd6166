"torch.func: gradients and per-sample gradients, at every length."

import pytest, torch
from torch.func import functional_call, grad, vmap
from las_nb import LaSTransformer, decay_rates, las_attention, las_dense

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
