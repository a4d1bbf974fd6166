"""Models between their states: built before there is memory, copied, averaged, loaded,
cast, compiled, asked for gradients of single samples. Nothing may change on the way."""

import copy
import pytest, torch
from las_nb import padding
from las_nb.fast import las_attention
from las_nb.fast.bands import _kernel_error
from las_nb.mixers import MIXERS
from las_nb.model import LaSTransformer
from las_nb.tasks import batches, load_task, reading_order
from las_nb.train import parameter_groups

LONG = ("s4d", "sgconv", "hyena")


def make(mixer="las", depth=1, **kw):
    torch.manual_seed(0)
    kw = dict(in_features=3, max_len=128, causal=mixer != "linformer") | kw
    return LaSTransformer(4, 16, depth, 4, mixer=mixer, **kw).eval()


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on_meta(model):
    with torch.device("meta"):
        return LaSTransformer(**model.config).eval()


def filled(model, empty):
    "As FSDP does: memory for what had none, with anything in it, then the state."
    model = empty.to_empty(device="cpu")
    for t in (*model.parameters(), *model.buffers()):
        t.data.fill_(777)
    return model


# --- built before there is memory


@pytest.mark.parametrize("mixer", MIXERS)
def test_late_memory_gives_the_same_model(mixer):
    whole, x = make(mixer), noise(2, 100, 3)
    want = whole.features(x)
    late = filled(whole, on_meta(whole))
    late.load_state_dict(whole.state_dict())
    again = filled(whole, copy.deepcopy(whole))
    again.load_state_dict(whole.state_dict())
    assigned = on_meta(whole)
    assigned.load_state_dict(whole.state_dict(), assign=True)
    for model in (late, again, assigned):
        torch.testing.assert_close(model.features(x), want, rtol=0, atol=0)
    if "las" in mixer:
        rates = [m.blocks[0].mixer.rates for m in (whole, late, assigned)]
        assert torch.equal(rates[0], rates[1]) and torch.equal(rates[0], rates[2])


@pytest.mark.parametrize("mixer", MIXERS)
def test_all_buffers_are_in_the_state(mixer):
    model = make(mixer, norm="batch")
    assert {n for n, _ in model.named_buffers()} <= set(model.state_dict())


def test_buildable_without_weights_of_its_own():
    accelerate = pytest.importorskip("accelerate")
    for mixer in MIXERS:
        whole, x = make(mixer), noise(2, 50, 3)
        with accelerate.init_empty_weights():
            model = LaSTransformer(**whole.config).eval()
        model.load_state_dict(whole.state_dict(), assign=True)
        torch.testing.assert_close(model(x), whole(x), rtol=0, atol=0)


# --- slow parameters keep their name


@pytest.mark.parametrize("mixer", LONG)
def test_groups_survive_copies(mixer):
    def names(model):
        name = {id(p): n for n, p in model.named_parameters()}
        return [
            [name[id(p)] for p in g["params"]] for g in parameter_groups(model, 0.1)
        ]

    model = make(mixer)
    want, assigned = names(model), on_meta(model)
    assigned.load_state_dict(model.state_dict(), assign=True)
    average = torch.optim.swa_utils.AveragedModel(model).module
    late = on_meta(model).to_empty(device="cpu")
    assert len(want) == 3
    for other in (copy.deepcopy(model), average, assigned, late):
        assert names(other) == want
    wrapped = parameter_groups(torch.nn.DataParallel(model), 0.1)
    assert [len(g["params"]) for g in wrapped] == [len(n) for n in want]


# --- half precision


@pytest.mark.parametrize("dtype, near", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("mixer", MIXERS)
def test_half_models_are_near_the_whole_one(mixer, dtype, near):
    model, x = make(mixer), noise(2, 100, 3)
    want, n = model.features(x), torch.tensor([100, 40])
    got = copy.deepcopy(model).to(dtype).features(x.to(dtype))
    assert got.dtype == dtype
    assert (got.float() - want).square().mean() < (near * want.std()) ** 2
    assert copy.deepcopy(model).to(dtype)(x.to(dtype), n).isfinite().all()


@pytest.mark.parametrize("mixer", MIXERS)
def test_built_under_a_half_default(mixer):
    try:
        torch.set_default_dtype(torch.bfloat16)
        model = make(mixer)
        assert model(noise(2, 30, 3).bfloat16()).isfinite().all()
    finally:
        torch.set_default_dtype(torch.float32)


# --- BatchNorm over real positions, in one piece and by torch's SyncBatchNorm


def test_batch_norm_with_lengths_is_torch_on_real_positions():
    torch.manual_seed(0)
    model = make(norm="batch", depth=2).double().train()
    sync = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in sync.modules())
    x, n = noise(3, 20, 3).double(), torch.tensor([20, 7, 1])
    for mode in (True, False):
        for lengths in (n, None):
            model.train(mode), sync.train(mode)
            a, b = model(x, lengths), sync(x, lengths)
            torch.testing.assert_close(a, b)
            for p, q in zip(
                torch.autograd.grad(a.square().sum(), list(model.parameters())),
                torch.autograd.grad(b.square().sum(), list(sync.parameters())),
            ):
                torch.testing.assert_close(p, q)
    for p, q in zip(model.buffers(), sync.buffers()):
        torch.testing.assert_close(p, q)


# --- one mask per forward


def test_one_mask_serves_a_forward(monkeypatch):
    made, make_mask = [], padding._make_mask
    monkeypatch.setattr(
        padding, "_make_mask", lambda *a: made.append(a[1:3]) or make_mask(*a)
    )
    for kind in (torch.int64, torch.int32):
        for norm in ("layer", "batch"):
            for mixer in MIXERS:
                model, n = make(mixer, depth=4, norm=norm), torch.tensor([30, 7])
                made.clear()
                model(noise(2, 30, 3), n.to(kind))
                assert len(made) <= 1 or mixer == "las-chunk" and len(made) <= 5


def test_the_mask_follows_its_lengths():
    n = torch.tensor([3, 5])
    a = padding.key_mask(n, 2, 5)
    assert padding.key_mask(n, 2, 5) is a
    n[0] = 4
    assert padding.key_mask(n, 2, 5).sum(1).tolist() == [4, 5]
    assert padding.key_mask(n, 2, 6).shape == (2, 6)
    padding.key_mask(n, 2, 6).fill_(False)  # somebody else's accident
    assert padding.key_mask(n, 2, 6).sum(1).tolist() == [4, 5]
    with torch.inference_mode():
        m = torch.tensor([2, 5])
        padding.key_mask(m, 2, 5), padding.key_mask(n, 2, 5)
    assert not padding.key_mask(n, 2, 5).is_inference()
    with pytest.raises(ValueError, match="between 1 and 4"):
        padding.key_mask(n, 2, 4)
    del n
    assert padding._LAST[0] is None


# --- compiled, exported


@pytest.mark.parametrize(
    "kind",
    [dict(vocab=9, in_features=None), dict(in_features=3)],
    ids=["tokens", "values"],
)
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_export_knows_lengths(kind, norm):
    model = make(norm=norm, **kind)
    x = noise(2, 40, 3) if model.vocab is None else torch.randint(9, (2, 40))
    for args in ((x,), (x, torch.tensor([40, 9]))):
        whole = torch.export.export(model, args).module()
        torch.testing.assert_close(whole(*args), model(*args))


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_one_compile_serves_many_lengths(norm):
    "One graph for all lengths of one plan; where the plan changes, one more."
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = make(norm=norm, vocab=9, in_features=None), CompileCounter()
    fast = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for L, graphs in ((264, 1), (280, 1), (272, 1), (312, 1), (328, 2)):
            x, n = torch.randint(9, (2, L)), torch.tensor([L, 9])
            torch.testing.assert_close(fast(x, n), model(x, n))
            assert counter.frame_count <= graphs, L


def test_a_graph_holds_no_measurements():
    "Rates whose bands depend on the scores: break, ask for a bound, or need none."
    torch._dynamo.reset()

    class Call(torch.nn.Module):
        def forward(self, q, k, v, **kwargs):
            return las_attention(q, k, v, (0.5, 0.01), **kwargs)

    call, a = Call(), 3 * noise(3, 1, 2, 600, 8)
    want = las_attention(*a, (0.5, 0.01), method="dense")
    torch.testing.assert_close(torch.compile(call, backend="eager")(*a), want)
    exported = torch.export.export(call, tuple(a)).module()
    torch.testing.assert_close(exported(*a), want)
    torch._dynamo.reset()
    whole = torch.compile(call, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="give score_bound"):
        whole(*a)
    torch.testing.assert_close(whole(*a, score_bound=300.0), want)


def test_training_with_lengths_compiles():
    torch._dynamo.reset()
    model = make(norm="batch").train()
    fast = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    x, n = noise(2, 40, 3), torch.tensor([40, 9])
    torch.testing.assert_close(fast(x, n), model(x, n))


# --- no second derivative is better than a wrong one


def test_bands_refuse_to_be_differentiated_twice():
    q, k, v = noise(3, 1, 2, 100, 8).requires_grad_()
    out = las_attention(q, k, v, (0.1, 0.2), causal=False, method="linear")
    with pytest.raises(RuntimeError, match="method='dense'"):
        torch.autograd.grad(out.square().sum(), q, create_graph=True)


# --- what changes behind torch's back


def test_lengths_that_change_in_shared_memory_are_read_again():
    numpy = pytest.importorskip("numpy")
    shared = numpy.array([6, 6])
    lengths = torch.from_numpy(shared)
    assert padding.key_mask(lengths, 2, 6).all()
    shared[:] = 2
    assert padding.key_mask(lengths, 2, 6).sum() == 4
    lengths.data[0] = 5
    assert padding.key_mask(lengths, 2, 6).sum() == 7


@pytest.mark.parametrize(
    "options",
    [dict(momentum=None), dict(track_running_stats=False), dict(affine=False)],
    ids=str,
)
def test_norms_of_every_option_leave_padding_out(options):
    from las_nb.model import MaskedBatchNorm

    torch.manual_seed(0)
    ours, torchs = MaskedBatchNorm(4, **options), torch.nn.BatchNorm1d(4, **options)
    lengths, real = torch.tensor([6, 3]), torch.arange(6) < torch.tensor([[6], [3]])
    for training in (True, True, True, False):
        x = noise(2, 6, 4) + torch.randn(4)
        got = ours.train(training)(x, lengths)[real]
        torch.testing.assert_close(got, torchs.train(training)(x[real]))


# --- norms without weights, rates without end


def test_a_bound_from_norms_that_lack_weights():
    layer = MIXERS["las"](32, 4)
    whole = torch.nn.LayerNorm(32)
    for options in (dict(bias=False), dict(elementwise_affine=False)):
        lacking = torch.nn.LayerNorm(32, **options)
        assert layer.derive_bound(lacking) == pytest.approx(layer.derive_bound(whole))


def test_huge_rates_can_be_learned():
    layer = MIXERS["las-variant"](32, 4, max_rate=100.0, learn="both")
    assert layer(noise(2, 50, 32)).isfinite().all()
    torch.testing.assert_close(layer.current_rates()[1:], layer.rates[1:])


def test_windows_as_arrays_at_every_length():
    numpy = pytest.importorskip("numpy")
    for L in (20, 308):
        a = noise(3, 1, 2, L, 8)
        got = las_attention(*a, (0.0, 0.02), window=numpy.array([0.6, 0.4]))
        want = las_attention(*a, (0.0, 0.02), window=(0.6, 0.4))
        torch.testing.assert_close(got, want)


# --- where tensors are made is not where inputs are


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("method", ["auto", "linear"])
@pytest.mark.parametrize("window", [3, (0.5, 0.3, 0.2), ((0.5, 0.5),) * 4])
def test_the_default_device_says_nothing_about_inputs(causal, method, window):
    a = noise(3, 2, 4, 200, 8)
    for options in ({}, dict(lengths=[200, 7]), dict(cu_seqlens=[0, 150, 400])):
        how = dict(window=window, causal=causal, method=method) | options
        rates = 0.0, 0.013, 0.1, 0.43
        with torch.device("meta"):
            got = las_attention(*a, rates, **how)
        # nor is anything kept from there
        assert torch.equal(got, las_attention(*a, rates, **how))


def test_data_stay_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        train = load_task("needle", length=32, limit=20)["train"]
        order = reading_order(train, 5, seed=0)
        batch = next(batches(train, 5, order))
    assert all(t.device.type == "cpu" for t in (order, batch.inputs, batch.labels))


def test_kernels_are_tried_whatever_the_default_device():
    with torch.device("meta"):
        assert _kernel_error("cpu", torch.device("cpu"), torch.float32) < 1e-3


def test_blocks_compile_for_many_lengths():
    torch._dynamo.reset()
    model = make("las-chunk", vocab=9, in_features=None)
    fast = torch.compile(model, backend="aot_eager")
    for L in (40, 300, 70):
        x, n = torch.randint(9, (2, L)), torch.tensor([L, 9])
        torch.testing.assert_close(fast(x, n), model(x, n))


def test_an_exported_model_takes_batches_of_any_size():
    model, size = make("attention"), torch.export.Dim("B", min=2, max=64)
    args = noise(3, 40, 3), torch.tensor([40, 9, 7])
    shapes = {0: size}, {0: size}
    program = torch.export.export(model, args, dynamic_shapes=shapes).module()
    x, n = noise(5, 40, 3), torch.tensor([40, 9, 7, 1, 2])
    torch.testing.assert_close(program(x, n), model(x, n))
