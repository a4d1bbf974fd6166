"""Packed rows: documents laid end to end do not see each other, and each is what it
would be alone, outputs and gradients, by every method."""

import itertools
import pytest, torch
from las_nb import LaSAttention, decay_rates, las_attention
from las_nb.adapt import register_las
from las_nb.mixers import MIXERS
from las_nb.padding import document_ends, documents
from tiny_hf import TINY

ENDS = (0, 70, 75, 76, 300)
RATES = tuple(decay_rates(3, 0.5).tolist())


def inputs(steps, B=1):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(4, B, 3, steps // B, 8, generator=g, dtype=torch.float64)
    return [t.requires_grad_() for t in a[:3]], a[3]


def one_by_one(a, ends, **how):
    "Every document by a call of its own; rows of a batch lie end to end."
    rows = [t.transpose(0, 1).flatten(1, 2)[None] for t in a]
    parts = [
        las_attention(*(t[:, :, i:j] for t in rows), RATES, **how)
        for i, j in itertools.pairwise(ends)
    ]
    o = torch.cat(parts, 2)[0]
    return o.unflatten(1, a[0].shape[:1] + (-1,)).transpose(0, 1)


@pytest.mark.parametrize("method", ["auto", "dense", "sdpa", "linear", "triton"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pool,window", [("scores", 3), ("weights", (0.5, 0.3, 0.2))])
def test_each_document_is_what_it_is_alone(method, causal, pool, window):
    a, up = inputs(ENDS[-1])
    how = dict(method=method, causal=causal, pool=pool, window=window)
    if method == "triton":
        pytest.importorskip("triton")
        a, up = [t.detach().float().requires_grad_() for t in a], up.float()
        a, up = [t[:, :, :90].detach().requires_grad_() for t in a], up[:, :, :90]
    if method == "sdpa":
        how["chunk"] = 64  # or the rate is too large for it
    ends = [*(e for e in ENDS if e < a[0].shape[2]), a[0].shape[2]]
    got = las_attention(*a, RATES, cu_seqlens=torch.tensor(ends), **how)
    want = one_by_one(a, ends, **how)
    most = 1e-5 if method == "triton" else 1e-9
    assert (got - want).abs().max() < most
    grads = [torch.autograd.grad(o, a, up) for o in (got, want)]
    for x, y in zip(*grads):
        assert (x - y).abs().max() < 10 * most


def test_rows_of_a_batch_may_hold_documents_each():
    a, _ = inputs(300, B=2)
    ends = [0, 40, 150, 290, 300]
    got = las_attention(*a, RATES, cu_seqlens=ends)
    torch.testing.assert_close(got, one_by_one(a, ends))
    # a document that goes over the end of a row is one
    ends = [0, 200, 300]
    got = las_attention(*a, RATES, cu_seqlens=ends)
    torch.testing.assert_close(got, one_by_one(a, ends))


def test_batches_are_at_most_half_padding():
    lengths = torch.randint(1, 700, (60,), generator=torch.Generator().manual_seed(0))
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    seen = []
    for where, n in documents(ends, int(ends[-1])):
        assert n.sum() > where.numel() / 2
        real = torch.arange(where.shape[1]) < n[:, None]
        seen += where[real].tolist()
    assert sorted(seen) == list(range(int(ends[-1])))


@pytest.mark.parametrize(
    "ends", [[0, 5], [1, 9], [0, 5, 5, 9], [9], [0, 10], [0, 7, 3]]
)
def test_boundaries_that_do_not_fit(ends):
    with pytest.raises(ValueError, match="rise from 0 to 9"):
        document_ends(ends, 9)
    with pytest.raises(ValueError, match="whole numbers"):
        document_ends(torch.tensor([0.0, 9.0]), 9)


def test_not_with_lengths():
    a, _ = inputs(300)
    with pytest.raises(ValueError, match="not both"):
        las_attention(*a, RATES, lengths=[300], cu_seqlens=ENDS)


def test_in_the_layer():
    torch.manual_seed(0)
    layer, x = LaSAttention(24, 3, max_rate=0.5).double(), torch.randn(1, 300, 24)
    x = x.double()
    got = layer(x, cu_seqlens=torch.tensor(ENDS))
    want = [layer(x[:, i:j]) for i, j in itertools.pairwise(ENDS)]
    torch.testing.assert_close(got, torch.cat(want, 1))
    variant = MIXERS["las-variant"](24, n_heads=3)
    with pytest.raises(ValueError, match="no packed rows"):
        variant(x.float(), cu_seqlens=torch.tensor(ENDS))


# --- Hugging Face


@pytest.fixture(scope="module")
def tf():
    found = pytest.importorskip("transformers")
    register_las("packed-las", max_rate=0.3)
    return found


def build(tf, kind="LlamaForCausalLM"):
    torch.manual_seed(0)
    config = getattr(tf, kind.replace("ForCausalLM", "Config"))(**TINY)
    model = getattr(tf, kind)(config).eval()
    model.set_attn_implementation("packed-las")
    return model


def alone(model, tokens, ends):
    return torch.cat(
        [
            model(tokens[:, i:j], use_cache=False).logits
            for i, j in itertools.pairwise(ends)
        ],
        1,
    )


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("way", ["positions", "flash", "both"])
@torch.no_grad()
def test_a_model_takes_packed_documents(tf, kind, way):
    "By positions that start anew, or by FlashAttention's boundaries."
    model, ends = build(tf, kind), (0, 9, 10, 26, 40)
    tokens = torch.randint(2, 61, (1, 40), generator=torch.Generator().manual_seed(0))
    places = torch.cat([torch.arange(j - i) for i, j in itertools.pairwise(ends)])
    told = dict(position_ids=places[None])
    if way != "positions":
        cu = torch.tensor(ends, dtype=torch.int32)
        told |= dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu)
        told |= dict(max_length_q=16, max_length_k=16)
    if way == "flash":
        told["attention_mask"] = None
    got = model(tokens, use_cache=False, **told).logits
    torch.testing.assert_close(got, alone(model, tokens, ends), atol=2e-5, rtol=0)


def test_gradients_of_packed_documents(tf):
    model, ends = build(tf).train(), (0, 13, 30)
    tokens = torch.randint(2, 61, (1, 30), generator=torch.Generator().manual_seed(1))
    places = torch.cat([torch.arange(13), torch.arange(17)])[None]
    found = []
    for packed in (True, False):
        model.zero_grad()
        if packed:
            logits = model(tokens, position_ids=places, use_cache=False).logits
        else:
            logits = alone(model, tokens, ends)
        logits.square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for x, y in zip(*found):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)


def test_what_is_no_packing_is_refused(tf):
    model = build(tf)
    tokens = torch.randint(2, 61, (1, 12))
    i = torch.arange(12)
    band = ((i <= i[:, None]) & (i > i[:, None] - 4))[None, None]
    shared = ((i <= i[:, None]) | (i < 3))[None, None]  # a prefix that all see
    for mask in (band, shared):
        with pytest.raises(ValueError, match="not windows, prefixes"):
            model(tokens, attention_mask=mask, use_cache=False)
    cu = torch.tensor([0, 5, 12])
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        model(
            tokens,
            use_cache=False,
            cu_seq_lens_q=cu,
            cu_seq_lens_k=cu + cu.clamp(max=1),
        )


def test_autocast_takes_dtypes_that_differ():
    q, k, v = torch.randn(3, 1, 2, 77, 8)
    with torch.autocast("cpu", torch.bfloat16):
        a = q, k.bfloat16(), v.bfloat16(), (0.0, 0.1)
        assert las_attention(*a, cu_seqlens=[0, 30, 77]).dtype == torch.bfloat16
