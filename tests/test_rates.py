"""The same weights are the same function, whatever the default dtype was when a layer was
made: constants are never rounded to half precision, or once at the end."""

import pytest, torch
from las_nb import LaSTransformer
from las_nb.conv_kernels import hyena_kernel
from las_nb.locality import decay_rates, exact_rates
from las_nb.mixers import LaSAttention

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[*HALVES, torch.float64], ids=str)
def other(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=HALVES, ids=str)
def half(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def in_single(make):
    "What `make` returns when the default dtype is float32."
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    made = make()
    torch.set_default_dtype(before)
    return made


@pytest.mark.parametrize("spacing", ["geometric", "uniform", "equal"])
def test_rates_are_exact(half, spacing):
    rates = decay_rates(7, 0.3, spacing)
    assert torch.equal(rates, in_single(lambda: decay_rates(7, 0.3, spacing)))
    assert rates.dtype == torch.float32


@pytest.mark.parametrize("spacing", ["geometric", "uniform", "equal"])
def test_layers_keep_them_under_every_cast(other, spacing):
    layer = LaSAttention(16, 4, max_rate=0.3, spacing=spacing)
    want = in_single(lambda: exact_rates(4, 0.3, spacing))
    single = torch.tensor(want, dtype=torch.float32)
    for cast in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        layer.to(cast)
        assert layer.plain_rates == want
        assert torch.equal(layer.rates.float(), single)
    assert layer.rates.tolist() == list(want)  # in float64


@pytest.mark.parametrize(
    "mixer, n_heads", [("las", 4), ("alibi", 6), ("las-variant", 4)]
)
def test_a_model_is_one_function(half, mixer, n_heads):
    def model():
        made = LaSTransformer(3, 24, 1, n_heads, vocab=9, mixer=mixer)
        return made.float().eval()

    one, two = model(), in_single(model)
    two.load_state_dict(one.state_dict())
    tokens = torch.arange(40)[None] % 9
    torch.testing.assert_close(one(tokens), two(tokens))


def test_kernels_of_hyena(half):
    torch.manual_seed(0)
    rough = hyena_kernel(6, 64)
    torch.manual_seed(0)
    fine = in_single(lambda: hyena_kernel(6, 64))
    # random weights differ in their rounding, the decay does not
    slope = [k.abs().log().diff(dim=-1).mean(-1) for k in (rough, fine)]
    torch.testing.assert_close(*slope, atol=0.02, rtol=0)
