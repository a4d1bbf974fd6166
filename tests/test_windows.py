"""A window is a whole number or its weights: every path against the loops of naive.py,
and a smoothing that is added by one function."""

import itertools, shutil
import numpy as np, pytest, torch
from las_nb import adapt, las
from las_nb.mixers import LaSVariant
from las_nb.adapt import las_step, masked_las_attention, register_las
from las_nb.fast import las_attention, plan
from las_nb.las import las_dense, las_weights
from las_nb.mixers import LaSAttention
from las_nb.model import LaSTransformer
from las_nb.smoothing import (
    pooling_matrix,
    smooth_keys,
    smooth_scores,
    smooth_values,
    smooth_weights,
    triangle,
    window_weights,
)
import naive

H, L = 4, 45
RATES = (0.0, 0.02, 0.4, 1.5)
LENGTHS = torch.tensor([45, 28])
pools = pytest.mark.parametrize("pool", ["scores", "weights"])
both = pytest.mark.parametrize("causal", [True, False])


def newest_heavy(W):
    "A smoothing from outside: all it takes is a function that returns weights."
    return tuple(1 / (t + 1) for t in range(W))


def noise(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


WINDOWS = {
    "added": newest_heavy(4),
    "triangle": triangle(5),
    "signed": [0.5, -1.0, 0.3],
    "sums to 0": torch.tensor([1.0, -1.0]),
    "a shift": (0, 1),
    "a factor": (2.0,),
    "longer than the sequence": newest_heavy(90),
    "per head": noise(H, 4, seed=9),
}
windows = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)


def qkv(L=L, seed=0):
    return list(noise(3, 2, H, L, 6, seed=seed))


def brute(a, window, pool, causal, lengths=None, chunk=None):
    "By loops, block by block."
    window = window if isinstance(window, int) else np.asarray(window)
    out = torch.zeros_like(a[2])
    for b, n in enumerate([a[0].shape[2]] * 2 if lengths is None else lengths.tolist()):
        for s in range(0, n, chunk or n):
            at = slice(b, b + 1), slice(None), slice(s, min(n, s + (chunk or n)))
            block = (t[at].numpy() for t in a)
            out[at] = torch.tensor(naive.las(*block, RATES, window, pool, causal))
    return out


def real(x, lengths):
    "`x` with zeros in its padding."
    if lengths is None:
        return x
    return x * (torch.arange(x.shape[2]) < lengths[:, None])[:, None, :, None]


@windows
@pools
@both
def test_every_method_is_the_loop(window, pool, causal):
    a = qkv()
    for lengths, chunk in itertools.product((None, LENGTHS), (None, 16)):
        want = brute(a, window, pool, causal, lengths, chunk)
        # padding may hold anything
        dirty = [t.clone() for t in a]
        if lengths is not None:
            for t in dirty:
                t[1, :, 28:] = float("nan")
        for method in ("dense", "sdpa", "linear", "auto"):
            kw = dict(method=method, tol=1e-14, chunk=chunk)
            got = las_attention(*dirty, RATES, window, pool, causal, lengths, **kw)
            got = got if lengths is None else got.nan_to_num()
            error = (real(got, lengths) - want).abs().max()
            # a sum of many weights is larger, and so is its rounding
            assert error <= 1e-12 * max(1, want.abs().max()), (method, lengths, chunk)


@windows
@pools
@both
def test_a_far_field_keeps_its_promise(window, pool, causal):
    a, rates, tol = list(noise(3, 1, 4, 500, 6)), (0.3, 0.4, 0.5, 1.5), 1e-3
    found = plan(rates, 500, torch.float64, "linear", tol, (64.0,) * 4)
    assert any(g.band for g in found)
    got = las_attention(*a, rates, window, pool, causal, method="linear", tol=tol)
    want = las_dense(*a, torch.tensor(rates).double(), window, pool, causal)
    largest = a[2].norm(dim=-1).amax(-1)
    assert ((got - want).norm(dim=-1).amax(-1) <= tol * largest).all()


def test_large_weights_widen_the_band():
    "Scores that are 300 times larger after smoothing must not count as far too soon."
    u = torch.zeros(6, dtype=torch.float64)
    u[0] = 1.0
    q = k = 0.5 * u.expand(1, 1, 400, 6)
    v = torch.where(torch.arange(400)[:, None] % 2 == 0, u, -u).expand(1, 1, 400, 6)
    # keys and values of the same sign: errors add up
    k = k * torch.sign(v[..., :1])
    for pool, bound in itertools.product(("scores", "weights"), (None, 0.2)):
        kw = dict(method="linear", tol=1e-3, score_bound=bound)
        got = las_attention(q, k, v, (0.1,), (300.0,), pool, **kw)
        want = las_dense(q, k, v, torch.tensor([0.1]).double(), (300.0,), pool)
        assert (got - want).norm(dim=-1).max() <= 1e-3, (pool, bound)


@windows
@pools
@both
def test_the_matrix_is_the_loop(window, pool, causal):
    q, k, v = qkv(23)
    rates = torch.tensor(RATES, dtype=torch.float64)
    w = las_weights(q, k, rates, window, pool, causal)
    want = brute((q, k, v), window, pool, causal)
    torch.testing.assert_close(w @ v, want, rtol=1e-12, atol=1e-12)


@windows
@both
def test_smoothing_is_the_matrix(window, causal):
    e, v = noise(2, H, 13, 13), noise(2, H, 13, 3)
    rows = window_weights(window).expand(H, -1)
    P = torch.zeros(H, 13, 13, dtype=torch.float64)
    for h, j in itertools.product(range(H), range(13)):
        for key, share in naive.window_shares(j, 13, rows[h].tolist(), causal).items():
            P[h, j, key] = share
    zero = torch.zeros(H)
    future = 0 if causal else rows.shape[1] // 2
    for got, want in (
        (pooling_matrix(13, window, causal).expand(H, -1, -1), P),
        (smooth_scores(e, window, causal), e @ P.mT),
        (smooth_weights(e, window, causal), e @ P),
        (smooth_values(v, window, causal), P @ v),
        (smooth_keys(v, zero, window, future), P @ v),
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("W", [1, 2, 3, 8, 90])
@both
def test_a_whole_number_is_equal_weights(W, causal):
    e = noise(2, H, 13, 13)
    for smooth in (smooth_scores, smooth_weights, smooth_values):
        got, want = smooth(e, [1 / W] * W, causal), smooth(e, W, causal)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


@windows
def test_the_past_does_not_move(window):
    a, b = qkv(), qkv(seed=1)
    kw = dict(score_bound=300.0, tol=1e-2)
    for pool, method in itertools.product(
        ("scores", "weights"), ("dense", "linear", "auto", "sdpa")
    ):
        out = las_attention(*a, RATES, window, pool, method=method, **kw)
        for cut in (1, 20, 44):
            mixed = [torch.cat([x[:, :, :cut], y[:, :, cut:]], 2) for x, y in zip(a, b)]
            moved = las_attention(*mixed, RATES, window, pool, method=method, **kw)
            assert torch.equal(out[:, :, :cut], moved[:, :, :cut])


@windows
@pools
def test_a_step_is_the_loop(window, pool):
    q, k, v = qkv(19)
    want = brute((q, k, v), window, pool, True)
    rates = torch.tensor(RATES, dtype=torch.float64)
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[1, :6] = False
    alone = brute([t[:, :, 6:] for t in (q, k, v)], window, pool, True)
    for n in (1, 5, 19):
        new = q[:, :, -n:]
        got = las_step(new, k, v, rates, window, pool)
        torch.testing.assert_close(got, want[:, :, -n:], rtol=1e-12, atol=1e-12)
        got = masked_las_attention(new, k, v, RATES, mask, window, pool)
        torch.testing.assert_close(got[:1], want[:1, :, -n:], rtol=1e-12, atol=1e-12)
        there = min(n, 13)
        torch.testing.assert_close(
            got[1, :, -there:], alone[1, :, -there:], rtol=1e-12, atol=1e-12
        )


@windows
@pools
def test_layers_and_variants_are_the_loop(window, pool):
    torch.manual_seed(0)
    layer = LaSAttention(24, H, 0.4, window, pool).double()
    others = [LaSVariant(24, H, 0.4, window, pool).double()]
    if pool == "scores":
        others.append(LaSVariant(24, H, 0.4, window, learn="filter").double())
        # the taps begin as float32
        others[-1].taps.data = window_weights(window).expand(H, -1).clone()
    x = noise(2, 21, 24)
    q, k, v = (t.detach() for t in layer.heads(x))
    rates, W = layer.rates, window if isinstance(window, int) else np.asarray(window)
    want = torch.tensor(
        naive.las(*(t.numpy() for t in (q, k, v)), rates, W, pool, True)
    )
    for other in (layer, *others):
        got = other.mix(q, k, v, None)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        layer.weights(x) @ v, layer.mix(q, k, v, None), rtol=1e-12, atol=1e-12
    )
    assert str(window)[:4] in repr(layer) or "window=(" in repr(layer)


@pytest.mark.parametrize("mixer", ["las", "las-chunk", "las-variant"])
@pytest.mark.parametrize("name", ["added", "per head", "signed"])
def test_a_model_keeps_its_window(mixer, name, tmp_path):
    torch.manual_seed(0)
    sizes = dict(n_classes=3, dim=16, depth=1, n_heads=H, vocab=7)
    model = LaSTransformer(**sizes, window=WINDOWS[name], mixer=mixer).eval()
    model.save_pretrained(tmp_path)
    again = LaSTransformer.from_pretrained(tmp_path)
    assert again.config == model.config and isinstance(again.config["window"], tuple)
    assert again.blocks[0].mixer.window == model.blocks[0].mixer.window
    tokens = torch.randint(7, (2, 20))
    assert torch.equal(again(tokens), model(tokens))
    plain = LaSTransformer(**sizes, mixer=mixer).eval()
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(plain(tokens), model(tokens))


@pools
@both
@pytest.mark.parametrize("method", ["dense", "sdpa", "linear", "auto"])
def test_weights_get_gradients(method, pool, causal):
    a, rates = list(noise(3, 2, H, 90, 6)), torch.tensor(RATES, dtype=torch.float64)
    for shape in ((4,), (H, 4)):
        w = noise(*shape, seed=3).requires_grad_()
        kw = dict(pool=pool, causal=causal, lengths=torch.tensor([90, 50]))
        up = real(noise(2, H, 90, 6, seed=4), kw["lengths"])
        got = las_attention(*a, RATES, w, method=method, tol=1e-14, **kw)
        want = las_dense(*a, rates, w, **kw)
        got, want = (torch.autograd.grad(o, w, up)[0] for o in (got, want))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    small = noise(3, 1, 2, 5, 3)
    w = noise(2, 3, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: las_dense(*small, rates[1:3], w, pool, causal), w
    )


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="flex needs a C++ compiler on the CPU",
)
@pytest.mark.parametrize(
    # as many weights in both: torch's CPU kernel takes one number of diagonals
    "window",
    [WINDOWS["signed"], WINDOWS["per head"][:, :3]],
    ids=["signed", "per head"],
)
def test_flex_is_the_loop(window):
    a = qkv()
    for pool, causal in itertools.product(("scores", "weights"), (True, False)):
        want = brute(a, window, pool, causal, LENGTHS)
        single = (t.float() for t in a)
        with torch.no_grad():
            got = las_attention(*single, RATES, window, pool, causal, LENGTHS, "flex")
        torch.testing.assert_close(
            real(got, LENGTHS).double(), want, rtol=1e-4, atol=1e-4
        )
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="no backward on the CPU"):
        las_attention(*(t.float() for t in a), RATES, w, causal=False, method="flex")


def test_it_compiles_with_numbers():
    def f(q, k, v):
        kw = dict(tol=1e-2, score_bound=40.0, method="linear")
        return las_attention(q, k, v, (0.2, 0.5), triangle(5), **kw)

    a = list(torch.randn(3, 1, 2, 200, 8))
    g = torch.compile(f, fullgraph=True, backend="aot_eager")
    # plans may differ: both keep within the promise
    torch.testing.assert_close(f(*a), g(*a), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "window",
    [0, -1, 2.5, True, "3", None, (), [[]], (1.0, float("nan")), [[1.0], [2.0, 3.0]]]
    + [torch.tensor(3.0), torch.ones(2, 3), torch.ones(1, H, 3), [None], {1: 2}],
    ids=str,
)
def test_what_is_no_window_is_refused(window):
    a = qkv(9)
    rates = torch.tensor(RATES)
    for call in (
        lambda: las_dense(*a, rates, window),
        lambda: las_weights(*a[:2], rates, window),
        lambda: las_attention(*a, RATES, window, method="linear"),
        lambda: las_attention(*a, RATES, window, chunk=3),
        lambda: las_step(a[0][:, :, -1:], *a[1:], rates, window),
        lambda: LaSAttention(16, H, window=window),
        lambda: LaSVariant(16, H, window=window),
    ):
        with pytest.raises(ValueError, match="window must be a whole number >= 1 or"):
            call()


def test_a_pool_that_a_path_does_not_know_is_refused(monkeypatch):
    "Also one that was added to the list of names, and to nothing else."
    for pool in ("mean", "median"):
        a, rates = qkv(40), torch.tensor(RATES)
        calls = [
            lambda: las_dense(*a, rates, 3, pool),
            lambda: las_weights(*a[:2], rates, 3, pool),
            lambda: las_step(a[0][:, :, -1:], *a[1:], rates, 3, pool),
            lambda: masked_las_attention(*a, RATES, pool=pool),
            lambda: masked_las_attention(a[0][:, :, -1:], *a[1:], RATES, pool=pool),
            lambda: LaSVariant(24, H, pool=pool)(torch.randn(2, 9, 24)),
            lambda: LaSAttention(24, H, pool=pool)(torch.randn(2, 9, 24)),
        ]
        calls += [
            lambda method=method, chunk=chunk: las_attention(
                *a, RATES, 3, pool, method=method, chunk=chunk
            )
            for method in ("dense", "sdpa", "linear", "auto", "flex")
            for chunk in (None, 8)
        ]
        for call in calls:
            with pytest.raises(ValueError, match="pool must be one of 'scores', 'wei"):
                call()
        # now it is in the list
        monkeypatch.setattr(las, "POOLS", ("scores", "weights", "median"))
        monkeypatch.setattr(adapt, "POOLS", ("scores", "weights", "median"))


def test_transformers_take_weights():
    transformers = pytest.importorskip("transformers")
    register_las("las-mean", max_rate=0.3, window=3)
    register_las("las-equal", max_rate=0.3, window=(1 / 3,) * 3)
    register_las("las-triangle", max_rate=0.3, window=triangle(5))
    with pytest.raises(ValueError, match="window must be"):
        register_las("las-wrong", window=0)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, vocab_size=61)
    config = transformers.LlamaConfig(**sizes, **heads, eos_token_id=None)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens, out = torch.randint(2, 61, (2, 14)), {}
    for name in ("las-mean", "las-equal", "las-triangle"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            out[name] = model(tokens).logits
    torch.testing.assert_close(out["las-equal"], out["las-mean"], atol=1e-5, rtol=1e-5)
    assert (out["las-triangle"] - out["las-mean"]).abs().max() > 1e-4
    write = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    with_cache, without = (
        model.generate(tokens, use_cache=cache, **write) for cache in (True, False)
    )
    assert torch.equal(with_cache, without)
