import itertools
import pytest, torch
from las_nb.mixers import LaSAttention
from las_nb.model import LaSTransformer, MaskedBatchNorm, count_parameters
from las_nb.model import pool_positions

GRID = list(
    itertools.product(
        ["layer", "batch"],
        [True, False],
        ["scores", "weights"],
        [None, "sinusoidal", "learned"],
    )
)


def make(norm="layer", prenorm=True, pool="scores", positions=None, **kw):
    torch.manual_seed(0)
    kw = dict(vocab=11, dim=16) | kw
    return LaSTransformer(
        3,
        depth=2,
        n_heads=4,
        norm=norm,
        prenorm=prenorm,
        pool=pool,
        positions=positions,
        **kw,
    ).double()


def train_a_little(model):
    "Gives BatchNorm running statistics that differ from its initial ones."
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randint(11, (8, 9)))
    return model.eval()


@pytest.mark.parametrize("norm, prenorm, pool, positions", GRID)
def test_the_whole_model_is_causal(norm, prenorm, pool, positions):
    model = train_a_little(make(norm, prenorm, pool, positions, window=4))
    x = torch.randint(11, (2, 13))
    for cut in (1, 5, 12):
        y = x.clone()
        y[:, cut:] = (y[:, cut:] + 1) % 11
        moved = (model.features(y) - model.features(x)).abs().amax((0, 2))
        assert moved[:cut].max() == 0 and moved[cut:].max() > 0


@pytest.mark.parametrize("norm, prenorm, pool, positions", GRID)
@pytest.mark.parametrize("readout", ["mean", "last"])
@pytest.mark.parametrize("causal", [True, False])
def test_padded_batches_equal_single_sequences(
    norm, prenorm, pool, positions, readout, causal
):
    model = train_a_little(
        make(norm, prenorm, pool, positions, readout=readout, causal=causal)
    )
    x, lengths = torch.randint(11, (3, 9)), torch.tensor([9, 4, 1])
    out = model(x, lengths)
    for b, n in enumerate(lengths):
        torch.testing.assert_close(
            out[b : b + 1], model(x[b : b + 1, :n]), rtol=0, atol=1e-10
        )
    y = x.clone()
    y[1, 4:] = 0
    assert torch.equal(model(y, lengths), out)


def test_batchnorm_ignores_padding_while_training():
    a, b = make("batch"), make("batch")
    x, y = torch.randint(11, (2, 9)), None
    y = x.clone()
    y[1, 4:] = (y[1, 4:] + 5) % 11
    torch.testing.assert_close(a(x, torch.tensor([9, 4])), b(y, torch.tensor([9, 4])))
    torch.testing.assert_close(
        a.blocks[0].norm1.running_var, b.blocks[0].norm1.running_var
    )


def test_values_padding_may_be_nan():
    model = make(vocab=None, in_features=2).eval()
    x = torch.randn(2, 6, 2, dtype=torch.float64)
    dirty = x.clone()
    dirty[1, 3:] = torch.nan
    assert torch.equal(
        model(dirty, torch.tensor([6, 3])), model(x, torch.tensor([6, 3]))
    )
    grads = torch.autograd.grad(
        model(dirty, torch.tensor([6, 3])).sum(), list(model.parameters())
    )
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("positions", [None, "sinusoidal"])
def test_plain_corner_is_torchs_transformer(positions):
    "An independent oracle: torch's own encoder layers with the same weights."
    model = make(max_rate=0, window=1, positions=positions).eval()
    layer = torch.nn.TransformerEncoderLayer(
        16, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    x = torch.randint(11, (2, 13))
    h = model.embed(x)
    if positions:
        i, d = torch.arange(13.0)[:, None].double(), torch.arange(0, 16, 2).double()
        angle = i / 10_000 ** (d / 16)
        h[..., 0::2] += angle.sin()
        h[..., 1::2] += angle.cos()
    mask = torch.nn.Transformer.generate_square_subsequent_mask(13, dtype=torch.float64)
    for block in model.blocks:
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": block.mixer.qkv.weight,
                "self_attn.in_proj_bias": block.mixer.qkv.bias,
                "self_attn.out_proj.weight": block.mixer.out.weight,
                "self_attn.out_proj.bias": block.mixer.out.bias,
                "linear1.weight": block.feedforward[0].weight,
                "linear1.bias": block.feedforward[0].bias,
                "linear2.weight": block.feedforward[2].weight,
                "linear2.bias": block.feedforward[2].bias,
                "norm1.weight": block.norm1.weight,
                "norm1.bias": block.norm1.bias,
                "norm2.weight": block.norm2.weight,
                "norm2.bias": block.norm2.bias,
            }
        )
        h = layer(h, src_mask=mask)
    torch.testing.assert_close(model.features(x), model.norm(h), rtol=0, atol=1e-10)


def test_las_and_plain_share_names_and_shapes():
    las, plain = make(), make(max_rate=0, window=1)
    assert {k: v.shape for k, v in las.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    assert count_parameters(las) == count_parameters(plain)
    las.load_state_dict(plain.state_dict())
    assert las.blocks[0].mixer.rates.max() > 0  # the weights moved, the rates stayed


def test_attention_arguments_pass_through():
    model = make(
        max_rate=0.7,
        window=5,
        pool="weights",
        causal=False,
        spacing="uniform",
        method="dense",
    )
    for layer in (m for m in model.modules() if isinstance(m, LaSAttention)):
        assert (layer.window, layer.pool, layer.causal, layer.method) == (
            5,
            "weights",
            False,
            "dense",
        )
        assert layer.rates.max() == pytest.approx(0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("L", [1, 2, 53])
def test_any_dtype_and_length(dtype, L):
    model = make().to(dtype).eval()
    out = model(torch.randint(11, (2, L)))
    assert out.dtype == dtype and out.shape == (2, 3) and out.isfinite().all()


def test_determinism_by_seed():
    x = torch.randint(11, (2, 9))
    assert torch.equal(make()(x), make()(x))


def test_autocast_and_compile_free_backward():
    model = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = (
            model(torch.randint(11, (2, 9)), torch.tensor([9, 3]))
            .float()
            .square()
            .sum()
        )
    loss.backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for p in model.parameters()
    )


@pytest.mark.parametrize(
    "kw, says",
    [
        (dict(vocab=0), "vocab must be"),
        (dict(dim=-16), "dim must be"),
        (dict(vocab=2.5), "vocab must be"),
        (dict(vocab=None), "either vocab"),
        (dict(in_features=1), "either vocab"),
        (dict(norm="rms"), "norm must be"),
        (dict(readout="max"), "readout must be"),
        (dict(positions="rotray"), "positions must be"),
        (dict(positions="rotary", dim=12), "even width per head"),
        (dict(max_len=0), "max_len"),
    ],
)
def test_bad_models_are_explained(kw, says):
    with pytest.raises(ValueError, match=says):
        make(**kw)


@pytest.mark.parametrize(
    "inputs, lengths, says",
    [
        (torch.zeros(2, 9), None, "whole numbers"),
        (torch.zeros(9, dtype=torch.long), None, r"\(B, L\)"),
        (torch.full((2, 9), 11), None, "between 0 and 10"),
        (torch.zeros(2, 0, dtype=torch.long), None, "L >= 1"),
        (torch.zeros(2, 9, dtype=torch.long), torch.tensor([9]), "one per sequence"),
        (torch.zeros(2, 9, dtype=torch.long), torch.tensor([9, 10]), "between 1 and 9"),
    ],
)
def test_bad_inputs_are_explained(inputs, lengths, says):
    with pytest.raises(ValueError, match=says):
        make()(inputs, lengths)


def test_learned_positions_say_when_the_table_ends():
    with pytest.raises(ValueError, match="raise max_len"):
        make(positions="learned", max_len=8)(torch.zeros(1, 9, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("readout", ["mean", "last"])
def test_any_integer_dtype(dtype, readout):
    model = make(readout=readout).eval()
    x = torch.randint(11, (2, 9))
    lengths = torch.tensor([9, 4])
    assert torch.equal(model(x.to(dtype), lengths.to(dtype)), model(x, lengths))


def test_padding_may_hold_impossible_tokens():
    model, x = make().eval(), torch.randint(11, (2, 9))
    y = x.clone()
    y[1, 4:] = -100
    assert torch.equal(model(y, torch.tensor([9, 4])), model(x, torch.tensor([9, 4])))


def test_half_precision_mean_does_not_overflow():
    x = torch.full((1, 70_000, 1), 5.0, dtype=torch.float16)
    assert pool_positions(x).item() == 5


def test_batch_norm_needs_two_positions():
    "As torch's own: one position has no spread."
    norm, x = MaskedBatchNorm(4), torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match="at least two real positions"):
        norm(x[:1], torch.tensor([1]))
    assert norm(x, torch.tensor([1, 1])).isfinite().all()
    assert norm.eval()(x[:1], torch.tensor([1])).isfinite().all()


@pytest.mark.parametrize("kind", [list, tuple, lambda n: [*n[0], *n[1]]])
def test_lengths_of_pairs_may_be_lists(kind):
    model, x = make(pairs=True), torch.randint(11, (2, 2, 20))
    n = [(20, 7), (3, 20)]
    want = model(x, torch.tensor(n))
    torch.testing.assert_close(model(x, kind(n)), want, rtol=0, atol=0)
