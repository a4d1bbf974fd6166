"""The layers LaS is compared with: each against a second way to compute it, and all
against what the interface promises."""

import inspect, math
import pytest, scipy.signal, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from las_nb.mixers import EMA, orthogonal_directions
from las_nb.mixers.convolution import ImplicitFilter
from las_nb.mixers import Performer, influence, linear_attention
from las_nb.mixers.convolution import long_conv
from las_nb.fast import las_attention
from las_nb.positions import rotate
from las_nb.conv_kernels import ema_kernel, hyena_kernel, s4d_kernel
from las_nb.mixers import MIXERS, mixer_options, register_mixer
from las_nb.model import LaSTransformer
from las_nb.train import parameter_groups

NAMES = [
    "las",
    "las-chunk",
    "attention",
    "alibi",
    "local",
    "linear",
    "performer",
    "linformer",
    "s4d",
    "sgconv",
    "hyena",
    "mega",
    "las-variant",
    "wall",
    "fox",
    "mta",
    "canon",
]
ONE_WAY = ("hyena", "las-variant", "wall", "fox")
WAYS = [
    (n, c)
    for n in NAMES
    for c in (True, False)
    if (n, c) != ("linformer", True) and (c or n not in ONE_WAY)
]
SMALL = {
    "las-chunk": dict(chunk=7),
    "local": dict(reach=5),
    "linformer": dict(rank=6),
    "s4d": dict(n_state=8),
    "sgconv": dict(width=4),
    "hyena": dict(width=8),
    "mega": dict(n_state=4),
}
every = pytest.mark.parametrize(
    "name, causal",
    WAYS,
    ids=lambda v: v if isinstance(v, str) else "causal" if v else "both",
)


def make(
    name,
    causal=True,
    dim=16,
    heads=4,
    max_len=40,
    seed=0,
    dtype=torch.float64,
    **options,
):
    torch.manual_seed(seed)
    options = SMALL.get(name, {}) | options
    return MIXERS[name](dim, **mixer_options(name, options, heads, causal, max_len)).to(
        dtype
    )


def model(name, causal=True, **kw):
    torch.manual_seed(0)
    return LaSTransformer(
        5,
        16,
        2,
        4,
        in_features=1,
        mixer=name,
        causal=causal,
        max_len=40,
        **SMALL.get(name, {}) | kw,
    )


def noise(*shape, seed=1):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def test_the_register_holds_what_the_book_names():
    assert list(MIXERS) == NAMES


@every
def test_future_does_not_matter_if_causal(name, causal):
    layer, x = make(name, causal), noise(2, 40, 16)
    y = x.clone()
    y[:, 23:] = 100 * noise(2, 17, 16, seed=2)
    moved = (layer(y) - layer(x)).abs().amax((0, 2))
    assert (moved[:23].max() < 1e-9) == causal
    assert moved[23:].min() > 1e-6


@every
@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.sampled_from([0.0, 1e4, float("nan")]),
)
def test_padding_does_not_matter(name, causal, lengths, fill):
    layer, x = make(name, causal), noise(len(lengths), 40, 16)
    padded = x.clone()
    for row, n in zip(padded, lengths):
        row[n:] = fill
    got = layer(padded, torch.tensor(lengths))
    for row, full, n in zip(got, x, lengths):
        torch.testing.assert_close(
            row[:n], layer(full[None, :n])[0], atol=1e-9, rtol=1e-7
        )


SAID = [[200, 5], (200, 5), torch.tensor([200, 5], dtype=torch.uint8)]
SAID += [torch.tensor([200, 5], dtype=torch.int16)]


@every
@pytest.mark.parametrize("said", SAID, ids=lambda s: str(getattr(s, "dtype", type(s))))
def test_lengths_may_be_lists_tuples_and_small_integers(name, causal, said):
    "Of 300 steps: more than a byte holds."
    layer = make(name, causal, max_len=300).eval()
    x, plain = noise(2, 300, 16), torch.tensor([200, 5])
    for got, expected in zip(layer(x, said), layer(x, plain)):
        torch.testing.assert_close(got[:5], expected[:5])


@pytest.mark.parametrize("readout", ["mean", "last"])
@pytest.mark.parametrize("said", SAID, ids=lambda s: str(getattr(s, "dtype", type(s))))
def test_a_model_and_the_function_take_them_too(readout, said):
    net = LaSTransformer(5, 16, 1, 4, in_features=1, max_len=300, readout=readout)
    x, plain = noise(2, 300, 1).float(), torch.tensor([200, 5])
    torch.testing.assert_close(net.eval()(x, said), net(x, plain))
    q = noise(2, 2, 300, 4).float()
    for method in ("dense", "sdpa", "flex", "linear"):
        for causal in (True, False):
            how = dict(causal=causal, method=method)
            got = las_attention(q, q, q, [0.0, 0.1], lengths=said, **how)
            expected = las_attention(q, q, q, [0.0, 0.1], lengths=plain, **how)
            torch.testing.assert_close(got[0, :, :200], expected[0, :, :200])
            torch.testing.assert_close(got[1, :, :5], expected[1, :, :5])


@pytest.mark.parametrize("wrong", [[], [1.5, 2], [[3, 4]], torch.ones(2), [True, True]])
def test_lengths_that_are_no_whole_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="whole numbers"):
        make("las")(noise(2, 40, 16), wrong)


@every
def test_every_parameter_learns_and_padding_gets_no_gradient(name, causal):
    layer, x = make(name, causal), noise(2, 30, 16).requires_grad_()
    out = layer(x, torch.tensor([30, 20]))
    (out[0] * noise(30, 16, seed=3)).sum().add(
        (out[1, :20] * noise(20, 16, seed=4)).sum()
    ).backward()
    for n, p in layer.named_parameters():
        assert (
            p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0
        ), n
    assert (x.grad[1, 20:] == 0).all() and (x.grad[0].abs().sum(-1) > 0).all()


@every
def test_half_precision_is_near(name, causal):
    layer, x = make(name, causal, dtype=torch.float32), noise(2, 40, 16).float()
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert (got - want).abs().max() < 0.05 * want.abs().max() + 0.02


@every
def test_models_come_back_from_disk(name, causal, tmp_path):
    m = model(name, causal).eval()
    m.save_pretrained(tmp_path)
    again, x = LaSTransformer.from_pretrained(tmp_path), noise(2, 33, 1).float()
    assert (
        again.config == m.config
        and again.config["mixer"] == name
        and again.config["causal"] == causal
    )
    assert torch.equal(again(x), m(x))


@every
def test_any_length_up_to_the_longest(name, causal):
    layer = make(name, causal)
    for L in (1, 2, 7, 39, 40):
        assert layer(noise(1, L, 16)).isfinite().all()
    x = noise(1, 41, 16)
    if "max_len" in inspect.signature(MIXERS[name]).parameters:
        with pytest.raises(ValueError, match="raise max_len"):
            layer(x)
    else:
        layer(x)


def test_gradients_are_right():
    for name, causal in WAYS:
        if name.startswith("las"):
            continue  # tested against the matrix elsewhere
        layer = make(name, causal, dim=4, heads=2)
        assert torch.autograd.gradcheck(
            layer, noise(1, 6, 4).requires_grad_(), atol=1e-4
        ), name


def test_influence_is_a_jacobian():
    A = torch.tril(noise(6, 6))

    class Mix(torch.nn.Module):
        def forward(self, x):
            return A @ x

    torch.manual_seed(0)
    # |A_ij|^2 times chi-squared of 3
    draws = torch.stack(
        [influence(Mix(), noise(6, 3)).square() for _ in range(400)]
    ).mean(0)
    torch.testing.assert_close(draws, 3 * A.square(), rtol=0.35, atol=1e-9)


# --- attention


def test_rotary_is_that_of_the_package():
    package = pytest.importorskip("rotary_embedding_torch")
    x = noise(2, 3, 20, 8).float()
    torch.testing.assert_close(
        rotate(x),
        package.RotaryEmbedding(8).rotate_queries_or_keys(x),
        atol=1e-5,
        rtol=1e-5,
    )


def test_rotary_model_knows_order_and_plain_does_not_if_bidirectional():
    x = noise(1, 20, 1).float()
    swapped = x.flip(1)
    for positions, knows in ((None, False), ("rotary", True)):
        m = model("attention", causal=False, positions=positions).eval()
        assert ((m(x) - m(swapped)).abs().max() > 1e-4) == knows


@pytest.mark.parametrize("causal", [True, False])
def test_local_is_that_of_the_package(causal):
    package = pytest.importorskip("local_attention")
    q, k, v = noise(3, 1, 2, 24, 4).float()
    want = package.LocalAttention(
        dim=4,
        window_size=6,
        causal=causal,
        look_backward=1,
        look_forward=0 if causal else 1,
        use_rotary_pos_emb=False,
        exact_windowsize=True,
        autopad=True,
    )(q, k, v)
    # its window does not count the own key
    got = make("local", causal, dim=8, heads=2, reach=7, dtype=torch.float32).mix(
        q, k, v, None
    )
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_alibi_by_loops(causal):
    layer = make("alibi", causal, dim=8, heads=2)
    q, k, v = noise(3, 1, 2, 9, 4)
    want = torch.zeros_like(v)
    for h in range(2):
        for i in range(9):
            seen = range(i + 1) if causal else range(9)
            s = torch.stack(
                [
                    q[0, h, i] @ k[0, h, j] / 2 - 2.0 ** (-4 * (h + 1)) * abs(i - j)
                    for j in seen
                ]
            ).softmax(0)
            want[0, h, i] = sum(w * v[0, h, j] for w, j in zip(s, seen))
    torch.testing.assert_close(layer.mix(q, k, v, None), want)


# --- linear attention and Performer


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.integers(1, 33), st.booleans())
def test_blocks_do_not_show(L, block, causal):
    q, k = torch.rand(2, 1, 2, L, 5, dtype=torch.float64)
    v = noise(1, 2, L, 3)
    w = q @ k.mT
    if causal:
        w = w.tril()
    torch.testing.assert_close(
        linear_attention(q, k, v, causal, block), w / w.sum(-1, keepdim=True) @ v
    )


def test_directions_favour_no_half_of_space():
    torch.manual_seed(0)
    w = torch.cat([orthogonal_directions(8, 8) for _ in range(500)])  # (4000, 8)
    assert (
        w.mean(0).abs().max() < 0.08
        and (w.T @ w / len(w) - torch.eye(8)).abs().max() < 0.1
    )
    one = F.normalize(orthogonal_directions(8, 8), dim=-1)
    torch.testing.assert_close(one @ one.T, torch.eye(8), atol=1e-5, rtol=0)


def test_performer_estimates_the_exponential_without_bias():
    torch.manual_seed(0)
    x = 0.6 * torch.randn(2, 1, 1, 5, 8)
    total = torch.zeros(5, 5)
    for _ in range(300):
        p = Performer(8, 1, features=64)
        c = p.directions.square().sum(-1).max() / 4
        q, k = (p.features(t, False)[0, 0] for t in x)
        total += q @ k.T * (2 * c).exp() / 64
    torch.testing.assert_close(
        total / 300, (x[0, 0, 0] @ x[1, 0, 0].T / 8**0.5).exp(), rtol=0.05, atol=0.02
    )


def test_performer_with_large_keys_stays_finite():
    layer = make("performer", dtype=torch.float32)
    assert layer(1e3 * noise(1, 40, 16).float()).isfinite().all()


# --- convolutions


def test_s4d_discretises_as_scipy_does():
    layer = make("s4d", dim=3)
    step = layer.system()[0].exp()
    a = torch.complex(-layer.log_decay.exp(), layer.frequency)[0]
    dt = layer.log_dt.exp()[0].item()
    A, B, *_ = scipy.signal.cont2discrete(
        (
            torch.diag(a).detach().numpy(),
            torch.ones(4, 1).numpy(),
            torch.ones(1, 4).numpy(),
            0,
        ),
        dt,
        "zoh",
    )
    torch.testing.assert_close(
        step[0].detach(), torch.tensor(A).diagonal(), atol=1e-6, rtol=1e-6
    )
    c, plain = layer.system()[1][0, 0], torch.view_as_complex(layer.c)[0, 0]
    torch.testing.assert_close(
        (c / plain).detach(), torch.tensor(B)[:, 0], atol=1e-6, rtol=1e-6
    )


def test_s4d_with_fast_decay_has_a_finite_kernel():
    layer = make("s4d", dtype=torch.float32)
    with torch.no_grad():
        layer.log_decay.fill_(9.0)
    assert layer.kernel(40).isfinite().all()


def test_kernels_start_as_in_the_kernels_chapter():
    "The same law of size and decay as the functions that drew them."
    torch.manual_seed(0)

    def shape(k):
        return k.square().mean(0).sqrt()[:: len(k[0]) // 8]

    with torch.no_grad():
        torch.testing.assert_close(
            shape(make("s4d", dim=1500, n_state=16).kernel(64)[0]),
            shape(s4d_kernel(1500, 64, 16)),
            rtol=0.25,
            atol=0,
        )
        torch.testing.assert_close(
            shape(EMA(2000, n_state=16).double().kernel(64)[0])[:4],
            shape(ema_kernel(2000, 64))[:4],
            rtol=0.5,
            atol=1e-3,
        )
        a, b = ImplicitFilter(400, 64, 16).double()(64), hyena_kernel(400, 64)
        torch.testing.assert_close(
            a.square().mean(0).sqrt()[::16] / a.square().mean().sqrt(),
            b.square().mean(0).sqrt()[::16] / b.square().mean().sqrt(),
            rtol=0.5,
            atol=0.05,
        )


@pytest.mark.parametrize("ways", [1, 2])
def test_long_convolution_by_sums(ways):
    u, k = noise(3, 11), noise(ways, 3, 11, seed=2)
    want = torch.zeros_like(u)
    for i in range(11):
        for j in range(11):
            if j <= i:
                want[:, i] += k[0, :, i - j] * u[:, j]
            elif ways == 2:
                want[:, i] += k[1, :, j - i - 1] * u[:, j]
    torch.testing.assert_close(long_conv(u, k), want)


def test_sgconv_pieces_double_and_halve():
    layer = make("sgconv", dim=2, max_len=32, width=4)
    with torch.no_grad():
        layer.pieces.fill_(1.0)
    k = (layer.kernel(32) * layer.norm)[0, 0]
    want = torch.cat(
        [
            torch.full((4,), 1.0),
            torch.full((4,), 0.5),
            torch.full((8,), 0.25),
            torch.full((16,), 0.125),
        ]
    )
    torch.testing.assert_close(k.float(), want)
    assert make("sgconv", dim=2, max_len=3, width=16)(noise(1, 3, 2)).shape == (1, 3, 2)


def test_mega_by_loops():
    layer, x = make("mega", dim=4), noise(1, 7, 4)
    with torch.no_grad():
        m = F.silu(layer.ema(x.mT)).mT
        u, z, r, h = layer.gates(m).split([4, 2, 8, 4], -1)
        q, k = (F.silu(z) * layer.scale[i] + layer.shift[i] for i in range(2))
        v, out = F.silu(layer.values(x)), torch.zeros(7, 8, dtype=torch.float64)
        for i in range(7):
            s = torch.stack(
                [
                    q[0, i] @ k[0, j] / 2**0.5 + layer.bias[i - j + 39]
                    for j in range(i + 1)
                ]
            ).softmax(0)
            out[i] = s @ v[0, : i + 1]
        want = u.sigmoid() * (F.silu(h + layer.out(F.silu(r) * out)) - x)
        torch.testing.assert_close(layer(x), want)


# --- training, and layers from elsewhere


def test_dynamics_have_a_slow_group_of_their_own():
    groups = parameter_groups(model("s4d"), 0.1)
    assert (
        len(groups) == 3
        and groups[2]["weight_decay"] == 0
        and groups[2]["most"] == 1e-3
    )
    assert sum(p.numel() for p in groups[2]["params"]) == 2 * (16 * (1 + 4 + 4))

    def slow(name):
        m = model(name)
        found = {id(p) for p in parameter_groups(m, 0.1)[2]["params"]}
        return [n for n, p in m.named_parameters() if id(p) in found]

    hyena = [n for n, _ in model("hyena").named_parameters() if ".filter." in n]
    assert slow("hyena") == hyena
    assert slow("sgconv") == ["blocks.0.mixer.pieces", "blocks.1.mixer.pieces"]
    assert len(parameter_groups(model("las"), 0.1)) == 2


def test_a_layer_from_elsewhere():
    class GRU(torch.nn.GRU):
        def __init__(self, dim):
            super().__init__(dim, dim, batch_first=True)

        def forward(self, x):
            return super().forward(x)[0]

    register_mixer("gru", GRU)
    try:
        m = model("gru").eval()
        x = noise(2, 30, 1).float()
        x[0, 12:] = 7.0
        torch.testing.assert_close(m(x, torch.tensor([12, 30]))[0], m(x[:1, :12])[0])
        with pytest.raises(ValueError, match="cannot be bidirectional"):
            model("gru", causal=False)
        with pytest.raises(ValueError, match="no option 'size'"):
            model("gru", size=3)
    finally:
        del MIXERS["gru"]


@pytest.mark.parametrize(
    "kw, says",
    [
        (dict(name="s4"), "did you mean s4d"),
        (dict(name="linformer"), "cannot be causal"),
        (dict(name="hyena", causal=False), "cannot be bidirectional"),
        (dict(name="s4d", windw=3), "no option 'windw'"),
        (dict(name="las", windw=3), "did you mean window"),
        (dict(name="mega", positions="rotary"), "rotary"),
        (dict(name="s4d", n_state=7), "even number"),
        (dict(name="local", reach=0), "reach must be"),
        (dict(name="performer", features=0), "features must be"),
        (dict(name="attention", positions="rotary", n_heads=16), "even width"),
        (dict(name="attention", n_heads=3), "multiple of n_heads"),
    ],
)
def test_wrong_options_are_explained(kw, says):
    with pytest.raises(ValueError, match=says):
        LaSTransformer(
            5, 16, 1, in_features=1, mixer=kw.pop("name"), **dict(n_heads=4) | kw
        )


@pytest.mark.parametrize("name", ["linear", "performer"])
def test_large_inputs_have_finite_gradients(name):
    "Features that round to zero once made a run's gradient infinite."
    for scale in (1.0, 30.0, 1e3):
        layer = make(name, dtype=torch.float32)
        x = (scale * noise(2, 40, 16).float()).requires_grad_()
        layer(x).square().sum().backward()
        assert x.grad.isfinite().all() and all(
            p.grad.isfinite().all() for p in layer.parameters()
        )


@pytest.mark.parametrize("dt_min", [-1, 0, math.nan, 0.2])
def test_steps_of_a_state_space_are_positive(dt_min):
    with pytest.raises(ValueError, match="step sizes"):
        MIXERS["s4d"](8, dt_min=dt_min)


@every
@pytest.mark.parametrize("L", [20, 300])
@pytest.mark.parametrize("padded", [False, True])
def test_shapes_are_found_without_numbers(name, causal, L, padded):
    with torch.device("meta"):
        model = LaSTransformer(3, 16, 1, 4, 9, mixer=name, causal=causal)
        lengths = torch.tensor([L, 7]) if padded else None
        y = model(torch.zeros(2, L, dtype=torch.long), lengths)
    y.sum().backward()
    assert y.is_meta and y.shape == (2, 3)


@every
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_answer_almost_the_same(name, causal):
    torch.manual_seed(0)
    model = LaSTransformer(3, 16, 1, 4, in_features=2, mixer=name, causal=causal).eval()
    kind, x = {torch.nn.Linear}, torch.randn(2, 40, 2)
    small = torch.ao.quantization.quantize_dynamic(model, kind, dtype=torch.qint8)
    torch.testing.assert_close(small(x), model(x), atol=0.03, rtol=0)
    if hasattr(small.blocks[0].mixer, "weights"):
        assert small.attention_maps(x)[0].shape == (2, 4, 40, 40)


@pytest.mark.parametrize("causal", [True, False])
def test_local_compiles_below_its_reach(causal):
    layer = MIXERS["local"](16, 4, causal=causal, reach=64)
    compiled = torch.compile(layer, backend="aot_eager")
    for L in (20, 30, 41):  # the second one leaves the length open
        x = torch.randn(2, L, 16)
        torch.testing.assert_close(compiled(x), layer(x))
