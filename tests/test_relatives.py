"""Layers that learn what LaS fixes: each against its formula and against LaS, with gates
so strong that the formula itself fails."""

import pytest, torch, torch.nn.functional as F
from torch import nn
from las_nb.attention import attention_scores, causal_mask, masked_softmax
from las_nb.las import las_dense
from las_nb.locality import decay_rates
from las_nb.mixers import Attention, Canon, Fox, MultiToken, Wall
from las_nb.mixers import filter_steps, fox_scores, wall_scores
from las_nb.model import LaSTransformer
from las_nb.smoothing import smooth_keys, smooth_scores, smooth_values, smooth_weights

KINDS = {"wall": Wall, "fox": Fox, "mta": MultiToken, "canon": Canon}
close = torch.testing.assert_close


def noise(*shape, seed=1):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def make(kind, dim=16, heads=4, **options):
    torch.manual_seed(0)
    layer = KINDS[kind](dim, heads, **options).double()
    with torch.no_grad():  # away from where filters and gates begin
        for p in layer.parameters():
            p += 0.3 * noise(*p.shape, seed=2)
    return layer


def seen(s):
    return s[..., causal_mask(s.shape[-1])]


# --- wall


def by_the_formula(q, k, g):
    "Difference by difference: `(B, H, L, L, D)`."
    L, D = q.shape[2:]
    s = torch.zeros(*q.shape[:3], L, dtype=q.dtype)
    for i in range(L):
        for j in range(i + 1):
            fade = g[:, :, j + 1 : i + 1].sum(2).exp()
            s[:, :, i, j] = (q[:, :, i] * k[:, :, j] * fade).sum(-1) / D**0.5
    return s


@pytest.mark.parametrize("L", [1, 2, 3, 7, 8, 9, 33])
def test_the_split_is_the_formula(L):
    q, k, g = noise(3, 2, 3, L, 4)
    g = F.logsigmoid(3 * g)
    s = wall_scores(q, k, g)
    close(seen(s), seen(by_the_formula(q, k, g)), atol=1e-12, rtol=1e-12)
    assert s.shape == (2, 3, L, L)
    assert (s.isfinite() == causal_mask(L)).all()


@pytest.mark.parametrize("max_rate", [0.001, 0.3, 0.99, 50.0])
def test_a_constant_gate_is_las(max_rate):
    q, k, v = noise(3, 2, 4, 40, 8)
    r = decay_rates(4, max_rate).double()
    g = -r[:, None, None].expand(2, 4, 40, 8)
    close(wall_scores(q, k, g).softmax(-1) @ v, las_dense(q, k, v, r, 1))
    keys = smooth_keys(k, r, 3)
    pooled = las_dense(q, k, v, r, 3, "scores")
    close(wall_scores(q, keys, g).softmax(-1) @ v, pooled, atol=1e-12, rtol=0)
    later = wall_scores(q, k, g).softmax(-1) @ smooth_values(v, 3)
    close(later, las_dense(q, k, v, r, 3, "weights"), atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4, 1e30])
def test_no_gate_is_too_strong(size):
    q, k, g = noise(3, 1, 2, 600, 4).float()
    g = F.logsigmoid(size * g)
    inputs = [t.requires_grad_() for t in (q, k, g)]
    s = wall_scores(*inputs)
    exact = wall_scores(*(t.detach().double() for t in inputs))
    close(seen(s).double(), seen(exact), atol=2e-5, rtol=2e-5)
    grads = torch.autograd.grad(s.softmax(-1)[..., :50].sum() + seen(s).sum(), inputs)
    assert all(x.isfinite().all() for x in grads)


def test_gates_that_are_shut_and_open():
    q, k = noise(2, 1, 1, 20, 4)
    g = torch.zeros(1, 1, 20, 4, dtype=torch.float64)
    close(seen(wall_scores(q, k, g)), seen(attention_scores(q, k)))
    g[:, :, 8] = -torch.inf
    s = wall_scores(q, k, g)
    assert (s[0, 0, 8:, :8] == 0).all()
    close(s[0, 0, 8:, 8:], wall_scores(q, k, 0 * k)[0, 0, 8:, 8:])


def test_gradients_of_the_split():
    q, k, g = (t.requires_grad_() for t in noise(3, 1, 2, 6, 3))

    def weights(q, k, g):
        return wall_scores(q, k, F.logsigmoid(g)).softmax(-1)

    assert torch.autograd.gradcheck(weights, (q, k, g))


def test_the_beginning_as_published():
    x = noise(1, 30, 16).float()
    for layer, open_ in ((Wall(16, 4), 0.9997), (Fox(16, 4), 0.5)):
        nn.init.zeros_(layer.gate.weight)
        close(layer.log_gates(x).exp().mean().item(), open_, atol=1e-4, rtol=0)
    plain = Attention(16, 4)
    plain.load_state_dict(Wall(16, 4).state_dict(), strict=False)
    wall = Wall(16, 4)
    wall.load_state_dict(plain.state_dict(), strict=False)
    close(wall(x), plain(x), atol=5e-3, rtol=0)


# --- the forgetting transformer


def test_fox_by_loops():
    layer, x = make("fox"), noise(1, 12, 16)
    q, k, v = layer.heads(x)
    g = layer.log_gates(x)
    want = torch.zeros_like(v)
    for h in range(4):
        for i in range(12):
            s = [
                q[0, h, i] @ k[0, h, j] / 2 + g[0, h, j + 1 : i + 1].sum()
                for j in range(i + 1)
            ]
            want[0, h, i] = torch.stack(s).softmax(0) @ v[0, h, : i + 1]
    got = layer.weights(x) @ v
    close(got, want, atol=1e-12, rtol=1e-12)
    close(layer(x), layer.out(want.transpose(1, 2).flatten(-2)))


def test_a_constant_gate_is_alibi():
    q, k = noise(2, 1, 2, 30, 4)
    slopes = torch.tensor([0.5, 0.01], dtype=torch.float64)
    i = torch.arange(30)
    bias = -slopes[:, None, None] * (i[:, None] - i)
    s = fox_scores(q, k, -slopes[:, None, None].expand(1, 2, 30, 1))
    close(seen(s), seen(attention_scores(q, k) + bias), atol=1e-12, rtol=1e-12)


def test_the_shift_by_loops():
    layer, x = make("fox", shift=True), noise(2, 9, 16)
    plain = make("fox")
    plain.load_state_dict(layer.state_dict(), strict=False)
    share = layer.shift(x).sigmoid().unflatten(-1, (4, 2))  # (B, L, H, 2)
    for which in (0, 1):
        raw, got = plain.heads(x)[1 + which], layer.heads(x)[1 + which]
        a = share[..., which].transpose(1, 2)[..., None]  # (B, H, L, 1)
        for t in range(9):
            before = raw[:, :, t - 1] if t else 0
            want = a[:, :, t] * before + (1 - a[:, :, t]) * raw[:, :, t]
            close(got[:, :, t], want)


# --- filters of keys and values


@pytest.mark.parametrize("pool", ["scores", "weights", "both"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_filters_are_convolutions_of_the_matrix(pool, causal, width):
    layer = make("mta", causal=causal, width=width, pool=pool)
    x, back = noise(2, 12, 16), (width - 1 if causal else (width - 1) // 2)
    q, k, v = layer.heads(x)

    def convolved(m, taps, sign):
        out = torch.zeros_like(m)
        for w, lag in zip(taps.T, range(back - width + 1, back + 1)):
            for j in range(12):
                if 0 <= j - sign * lag < 12:
                    out[..., j] += w[:, None] * m[..., j - sign * lag]
        return out

    s = attention_scores(q, k)
    if layer.key_taps is not None:
        s = convolved(s, layer.key_taps, 1)
    A = masked_softmax(s, causal_mask(12) if causal else None)
    if layer.value_taps is not None:
        A = convolved(A, layer.value_taps, -1)
    close(layer.weights(x), A, atol=1e-12, rtol=1e-12)
    close(layer.mix(q, k, v, None), A @ v, atol=1e-12, rtol=1e-12)


def test_a_mean_is_las_without_decay():
    q, k, v = noise(3, 1, 4, 30, 8)
    mean = torch.full((4, 3), 1 / 3, dtype=torch.float64)
    s = attention_scores(q, filter_steps(k, mean))
    want = smooth_scores(attention_scores(q, k), 3)
    close(s[..., 2:], want[..., 2:], atol=1e-12, rtol=0)
    A = attention_scores(q, k).softmax(-1)
    got = A[..., 2:] @ filter_steps(v, mean)[:, :, 2:]
    edge = A.clone()
    edge[..., :2] = 0
    close(got, smooth_weights(edge, 3) @ v, atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_the_identity_is_attention(causal):
    torch.manual_seed(0)
    layer, plain = MultiToken(16, 4, causal, pool="both"), Attention(16, 4, causal)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = noise(2, 20, 16).float()
    for lengths in (None, torch.tensor([20, 7])):
        a, b = layer(x, lengths), plain(x, lengths)
        close(a[0], b[0]), close(a[1, :7], b[1, :7])


# --- Canon


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("positions", [None, "rotary"])
def test_canon_is_attention_behind_a_convolution(causal, positions):
    how = dict(in_features=1, causal=causal, positions=positions)
    canon = LaSTransformer(5, 16, 2, 4, mixer="canon", **how).double()
    plain = LaSTransformer(5, 16, 2, 4, mixer="attention", conv=4, **how).double()
    state = {n.replace("mixer.conv", "conv"): p for n, p in canon.state_dict().items()}
    plain.load_state_dict(state)
    x = noise(2, 20, 1)
    for lengths in (None, torch.tensor([20, 7])):
        close(canon(x, lengths), plain(x, lengths))


# --- what they share


@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_what_the_layer_does(kind):
    layer, x = make(kind), noise(2, 25, 16)
    want = layer.weights(x) @ layer.heads(x)[2]
    close(layer(x), layer.out(want.transpose(1, 2).flatten(-2)))
    model = LaSTransformer(5, 16, 2, 4, in_features=1, mixer=kind)
    maps = model.attention_maps(torch.randn(2, 25, 1), torch.tensor([25, 9]))
    assert [m.shape for m in maps] == [(2, 4, 25, 25)] * 2
    assert (maps[1][0].triu(1) == 0).all()


@pytest.mark.parametrize("kind", ["mta", "canon"])
def test_maps_of_both_sides_leave_padding_out(kind):
    layer, x = make(kind, causal=False), noise(2, 25, 16)
    maps = layer.weights(x, torch.tensor([25, 9]))
    assert (maps[1, :, :9, 9:] == 0).all()
    close(maps[1, :, :9, :9], layer.weights(x[1:, :9])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind):
    layer, x = make(kind).float(), noise(2, 25, 16).float()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    close(compiled(x), layer(x))


@pytest.mark.parametrize("dtype, near", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays_near_on_long_sequences(kind, dtype, near):
    layer, x = make(kind).float(), noise(1, 700, 16).float()
    want, got = layer(x), layer.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert (got.float() - want).square().mean().sqrt() < near * want.std()


@pytest.mark.parametrize(
    "kind, options, says",
    [
        ("wall", dict(gate_bias=None), "gate_bias must be a finite number"),
        ("fox", dict(gate_bias=float("nan")), "gate_bias must be a finite number"),
        ("wall", dict(causal=False), "cannot be bidirectional"),
        ("fox", dict(causal=False), "cannot be bidirectional"),
        ("fox", dict(positions="rotary"), "cannot be given rotary positions"),
        ("mta", dict(width=0), "width must be a whole number"),
        ("mta", dict(pool="keys"), "pool must be"),
        ("mta", dict(start="zeros"), "start must be"),
        ("canon", dict(width=2.5), "width must be a whole number"),
    ],
)
def test_wrong_options_are_explained(kind, options, says):
    with pytest.raises(ValueError, match=says):
        LaSTransformer(5, 16, 1, 4, in_features=1, mixer=kind, **options)
