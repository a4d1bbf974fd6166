"""The same mathematics on a GPU, by the kernels that only a GPU runs. Without one, all
of this is skipped."""

import pytest, torch
from las_nb import LaSTransformer, decay_rates, las_attention, las_dense
from las_nb.__main__ import MOST_ERROR, health
from las_nb.fast.api import gpu_kernels
from las_nb.mixers import MIXERS
from las_nb.train import Trainer, preset
from tiny_hf import TINY

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
METHODS = ("auto", "dense", "sdpa", "linear", "flex", "triton")
# of outputs and gradients, relative to the largest: rounding, and `tol` of the dtype
ERRORS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 2e-2}
ERRORS[torch.float16] = ERRORS[torch.bfloat16]


@pytest.fixture(autouse=True)
def whole_products():
    "Products of float32 in float32, whatever a test before has asked for."
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def inputs(L, D=16, dtype=torch.float32, B=2, H=4):
    g = torch.Generator().manual_seed(L)
    a = torch.randn(4, B, H, L, D, generator=g, dtype=torch.float64).to(dtype)
    return [t.cuda().requires_grad_() for t in a[:3]], a[3].cuda()


def with_gradients(call, a, up):
    o = call(*a)
    return [o, *torch.autograd.grad(o, a, up)]


def check(got, want, most, real=slice(None)):
    for g, w in zip(got, want):
        g, w = g.double()[real], w.double()[real]
        assert g.isfinite().all()
        assert (g - w).abs().max() < most * w.abs().max()


def test_health():
    assert health("cuda:0") < MOST_ERROR
    kernels = gpu_kernels("cuda:0")
    assert kernels and all(kernels.values())


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("L,max_rate", [(77, 0.3), (300, 0.1), (640, 0.5)])
def test_methods(L, max_rate, causal, method, dtype):
    if method in ("flex", "triton") and dtype == torch.float64:
        return
    if method == "flex" and L != 300:  # compiles for every length
        return
    if method == "sdpa" and L * max_rate > 70:
        max_rate = 70 / L
    rates = tuple(decay_rates(4, max_rate).tolist())
    a, up = inputs(L, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in a]
    r = torch.tensor(rates, dtype=torch.float64, device="cuda")
    how = dict(window=3, causal=causal)
    want = with_gradients(lambda *a: las_dense(*a, r, **how), exact, up.double())
    got = with_gradients(
        lambda *a: las_attention(*a, rates, method=method, **how), a, up
    )
    check(got, want, ERRORS[dtype])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("causal", [True, False])
def test_padding(causal, method):
    lengths, rates = torch.tensor([50, 220]), tuple(decay_rates(4, 0.2).tolist())
    a, up = inputs(220)
    for t in (*a, up):
        t.data[0, :, 50:] = 0
    r = torch.tensor(rates, device="cuda")
    how = dict(causal=causal, lengths=lengths)
    want = with_gradients(lambda *a: las_dense(*a, r, **how), a, up)
    got = with_gradients(
        lambda *a: las_attention(*a, rates, method=method, **how), a, up
    )
    real = (torch.arange(220) < lengths[:, None])[:, None, :, None].expand(got[0].shape)
    check(got, want, 1e-3, real.cuda())


@pytest.mark.parametrize("D", [8, 12, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths(D, dtype):
    a, up = inputs(512, D, dtype)
    rates = tuple(decay_rates(4, 0.5).tolist())
    r = torch.tensor(rates, dtype=torch.float64, device="cuda")
    exact = [t.detach().double().requires_grad_() for t in a]
    want = with_gradients(lambda *a: las_dense(*a, r), exact, up.double())
    for method in ("auto", "linear"):
        got = with_gradients(lambda *a: las_attention(*a, rates, method=method), a, up)
        check(got, want, ERRORS[dtype])


@pytest.mark.parametrize("method", ["auto", "linear"])
def test_compiled(method):
    "In one graph, with a bound; the second length through the same code."
    rates = tuple(decay_rates(4, 0.5).tolist())

    def call(q, k, v):
        return las_attention(q, k, v, rates, method=method, score_bound=64.0)

    fast = torch.compile(call, fullgraph=True, dynamic=False)
    for L in (512, 768):
        a, up = inputs(L)
        check(with_gradients(fast, a, up), with_gradients(call, a, up), 1e-4)


@pytest.mark.parametrize("mixer", list(MIXERS))
def test_every_mixer(mixer):
    torch.manual_seed(0)
    sizes = dict(dim=32, depth=1, n_heads=4, max_len=160)
    model = LaSTransformer(
        4, in_features=1, mixer=mixer, causal=mixer != "linformer", **sizes
    )
    model.eval()
    x, lengths = torch.randn(2, 160, 1), torch.tensor([100, 160])

    def of(device):
        model.to(device).zero_grad()
        y = model(x.to(device), lengths.to(device))
        y.square().sum().backward()
        return [y, *(p.grad for p in model.parameters() if p.grad is not None)]

    want = [t.detach().clone().cuda() for t in of("cpu")]
    check(of("cuda"), want, 5e-3)


def test_long():
    "Half a million steps, in memory that grows with the length alone."
    rates = tuple(decay_rates(4, 0.5).tolist())[1:]
    peaks = []
    for L in (1 << 17, 1 << 19):
        q, k, v = torch.randn(3, 1, 3, L, 16, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        o = las_attention(q, k, v, rates, method="linear", tol=1e-3)
        peaks.append(torch.cuda.max_memory_allocated())
        assert o.isfinite().all()
        # the last rows depend on what is near, and on the mean of the rest
        n = 3000
        r = torch.tensor(rates, dtype=torch.float64, device="cuda")
        assert (
            o[:, :, :n] - las_dense(*(t[:, :, :n].double() for t in (q, k, v)), r)
        ).abs().max() < 1e-2
        del q, k, v, o
    assert peaks[1] < 4.5 * peaks[0]


def test_a_run_learns_and_goes_on(tmp_path):
    "Mixed precision, evaluation, and a second part from a checkpoint."
    changes = dict(limit=300, epochs=2, dim=16, depth=1, n_heads=2, batch_size=30)
    trainer = Trainer(preset("motif", **changes), tmp_path)
    record = trainer.run()
    assert "cuda" in str(trainer.accelerator.device)
    curve = record["curve"]["loss"]
    assert curve[-1] < curve[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hugging_face(dtype):
    tf = pytest.importorskip("transformers")
    from las_nb.adapt import register_las

    register_las("gpu-las", max_rate=0.3)
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TINY)).eval()
    model.set_attn_implementation("gpu-las")
    tokens = torch.randint(2, 61, (2, 40))
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    with torch.no_grad():
        want = model(tokens, attention_mask=mask).logits
        model = model.to("cuda", dtype)
        ids = tokens.cuda(), mask.cuda()
        got = model(ids[0], attention_mask=ids[1]).logits.float().cpu()
    real = mask == 1
    most = 1e-3 if dtype == torch.float32 else 3e-2
    assert (got - want)[real].abs().max() < most * want[real].abs().max()
    grown = model.generate(
        ids[0], attention_mask=ids[1], max_new_tokens=8, do_sample=False
    )
    slow = model.generate(
        ids[0],
        attention_mask=ids[1],
        max_new_tokens=8,
        do_sample=False,
        use_cache=False,
    )
    assert dtype != torch.float32 or torch.equal(grown, slow)
