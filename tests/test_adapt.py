"""LaS in a model that was not made for it: a Hugging Face decoder from a config,
torch's own layer, padding on every side."""

import pytest, torch
from hypothesis import given, settings, strategies as st
from tiny_hf import TINY
from las_nb.adapt import (
    las_step,
    masked_las_attention,
    register_las,
    share_heads,
    slide,
)
from las_nb.fast import las_attention
from las_nb.las import POOLS, las_dense
from las_nb.locality import decay_rates

transformers = pytest.importorskip("transformers")
VOCAB = 61


@pytest.fixture(scope="module", autouse=True)
def attentions():
    register_las("las-off", max_rate=0, window=1)
    register_las("las-scores", max_rate=0.3, window=3)
    register_las(
        "las-weights", max_rate=0.3, window=4, pool="weights", spacing="uniform"
    )


def decoder(kind="Llama", **sizes):
    torch.manual_seed(0)
    sizes = TINY | dict(vocab_size=VOCAB) | sizes
    return getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**sizes)
    ).eval()


def padding(left, right, L=14):
    real = torch.ones(2, L, dtype=torch.long)
    if left:
        real[0, :left] = 0
    if right:
        real[0, -right:] = 0
    return real


@torch.no_grad()
def logits(model, attention, tokens, **inputs):
    model.set_attn_implementation(attention)
    return model(tokens, **inputs).logits


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
@pytest.mark.parametrize("left,right", [(0, 0), (5, 0), (0, 5), (3, 2)])
def test_ten_lines_keep_the_weights(kind, left, right):
    """With rates 0 and window 1 the logits are the model's own, under every padding,
    with grouped heads."""
    model, real = decoder(kind), padding(left, right)
    tokens = torch.randint(2, VOCAB, real.shape)
    want, got = (
        logits(model, a, tokens, attention_mask=real) for a in ("sdpa", "las-off")
    )
    torch.testing.assert_close(got[real == 1], want[real == 1], atol=1e-4, rtol=1e-4)
    changed = logits(model, "las-scores", tokens, attention_mask=real)
    assert (changed - want)[real == 1].abs().max() > 1e-4, "LaS is not in the model"


@pytest.mark.parametrize("attention", ["las-scores", "las-weights"])
@pytest.mark.parametrize("left,right", [(5, 0), (0, 5), (3, 2)])
def test_padding_changes_nothing(attention, left, right):
    model, real = decoder(), padding(left, right)
    tokens = torch.randint(2, VOCAB, real.shape)
    keep = real[0] == 1
    places = torch.where(real == 1, real.cumsum(-1) - 1, 0)
    padded = logits(model, attention, tokens, attention_mask=real, position_ids=places)
    alone = logits(model, attention, tokens[:1, keep])
    torch.testing.assert_close(padded[:1, keep], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["las-scores", "las-weights"])
def test_the_future_is_not_seen(attention):
    model, tokens = decoder(), torch.randint(2, VOCAB, (2, 14))
    other = tokens.clone()
    other[:, 9:] = (other[:, 9:] + 1) % VOCAB
    a, b = logits(model, attention, tokens), logits(model, attention, other)
    torch.testing.assert_close(a[:, :9], b[:, :9], atol=1e-5, rtol=1e-5)
    assert (a - b)[:, 9:].abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["las-scores", "las-weights"])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_generation_with_and_without_a_cache(attention, cache):
    model, real = decoder(), padding(5, 0)
    tokens = torch.randint(2, VOCAB, real.shape)
    model.set_attn_implementation(attention)
    write = dict(attention_mask=real, max_new_tokens=10, do_sample=False)
    assert torch.equal(
        model.generate(tokens, use_cache=False, **write),
        model.generate(tokens, use_cache=True, **write, **cache),
    )


def test_it_trains_and_its_checkpoint_is_the_models_own(tmp_path):
    model = decoder()
    model.set_attn_implementation("las-scores")
    tokens = torch.randint(2, VOCAB, (4, 20))
    optimiser, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(12):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, attn_implementation="sdpa"
    )
    assert {n for n, _ in again.named_parameters()} == {
        n for n, _ in decoder().named_parameters()
    }
    model.eval()
    torch.testing.assert_close(
        logits(again.eval(), "las-scores", tokens), logits(model, "las-scores", tokens)
    )


def test_what_las_does_not_do_is_refused():
    tokens = torch.randint(2, VOCAB, (1, 6))
    model = decoder(attention_dropout=0.1).train()
    model.set_attn_implementation("las-scores")
    with pytest.raises(ValueError, match="LlamaAttention asks for dropout"):
        model(tokens)
    model = decoder("Mistral", sliding_window=4)
    model.set_attn_implementation("las-scores")
    with pytest.raises(ValueError, match="asks for sliding_window"):
        model(tokens)
    with pytest.raises(ValueError, match="max_rate"):
        register_las(max_rate=-1)
    with pytest.raises(ValueError, match="did you mean weights"):
        register_las(pool="weight")


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 12),
    st.integers(1, 12),
    st.sampled_from(POOLS),
    st.integers(1, 5),
    st.integers(0, 5),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 10**6),
)
def test_the_step_is_the_last_rows(L, n, pool, window, left, groups, seed):
    n, left = min(n, L - min(left, L - 1)), min(left, L - 1)
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, h, L, 5, generator=g, dtype=torch.float64)
        for h in (4, groups, groups)
    )
    mask = torch.ones(2, L, dtype=torch.bool)
    mask[0, :left] = False
    rates = decay_rates(4, 0.4).double()
    whole = masked_las_attention(q, k, v, rates, mask, window, pool)
    for b in range(2):
        real = mask[b]
        alone = las_dense(
            *(share_heads(t[b : b + 1, :, real], 4) for t in (q, k, v)),
            rates,
            window,
            pool,
        )
        torch.testing.assert_close(whole[b : b + 1, :, real], alone)
    torch.testing.assert_close(
        masked_las_attention(q[:, :, -n:], k, v, rates, mask, window, pool),
        whole[:, :, -n:],
    )


def test_slide_and_back():
    x, steps = torch.randn(3, 2, 7, 4), torch.tensor([0, 3, 6])
    assert torch.equal(slide(slide(x, steps), -steps), x) and torch.equal(
        slide(x, steps)[1, :, 0], x[1, :, 3]
    )


def test_half_precision_and_gradients():
    q, k, v = (
        torch.randn(2, h, 9, 16, dtype=torch.bfloat16, requires_grad=True)
        for h in (4, 2, 2)
    )
    rates = tuple(decay_rates(4, 0.2).tolist())
    mask = padding(3, 0, 9).bool()
    o = masked_las_attention(q, k, v, rates, mask)
    o[mask[:, None, :].expand(2, 4, 9)].sum().backward()
    assert (
        o.dtype == torch.bfloat16
        and all(t.grad.isfinite().all() for t in (q, k, v))
        and k.grad[0, :, :3].abs().max() == 0
    )
    step = las_step(
        q[:, :, -2:], share_heads(k, 4), share_heads(v, 4), torch.tensor(rates)
    )
    assert step.dtype == torch.bfloat16 and step.shape == (2, 4, 2, 16)


def test_a_step_at_every_rate_with_anything_in_its_padding():
    q, k, v = torch.randn(3, 1, 3, 50, 8)
    rates = torch.tensor([0.1, 1e39, 1e300], dtype=torch.float64)
    whole = las_attention(q, k, v, rates)[:, :, 29:30]
    for x in (k, v):
        x[:, :, 30:] = torch.nan
    step = las_step(q[:, :, 29:30], k, v, rates, lengths=torch.tensor([30]))
    torch.testing.assert_close(step, whole)
    with pytest.raises(ValueError, match="finite"):
        las_step(q[:, :, -1:], k, v, rates * torch.inf)


def test_masks_that_do_not_fit():
    q = k = v = torch.randn(1, 2, 6, 4)
    rates = decay_rates(2, 0.1)
    for mask, words in (
        ([[1, 0, 1, 1, 1, 1]], "between real tokens"),
        ([[1, 1, 1]], r"shape \(1, 6\)"),
    ):
        with pytest.raises(ValueError, match=words):
            masked_las_attention(q, k, v, rates, torch.tensor(mask).bool())
    with pytest.raises(ValueError, match="boolean"):
        masked_las_attention(q, k, v, rates, torch.ones(1, 6))
    with pytest.raises(ValueError, match="causal=True"):
        masked_las_attention(q[:, :, -1:], k, v, rates, causal=False)
    with pytest.raises(ValueError, match="multiple"):
        share_heads(torch.randn(1, 3, 6, 4), 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, list])
def test_a_step_takes_lengths_of_every_kind(dtype):
    "In small integers, differences would wrap."
    q, k, v = torch.randn(3, 1, 2, 77, 8)
    n = [3] if dtype is list else torch.tensor([3], dtype=dtype)
    a = q[:, :, :5], k, v, (0.0, 0.1)
    want = las_step(*a, lengths=torch.tensor([3]))
    torch.testing.assert_close(las_step(*a, lengths=n), want)


def test_a_step_refuses_and_survives():
    q, k, v = torch.randn(3, 1, 2, 77, 8)
    rates = torch.tensor([0.0, 0.1])
    with pytest.raises(ValueError, match="between 1 and 77"):
        las_step(q[:, :, :1], k, v, rates, lengths=[500])
    with pytest.raises(ValueError, match="chunk must be"):
        las_step(q[:, :, :1], k, v, rates, chunk=0)
    k[:, :, 40:] = torch.nan  # padding
    q = q[:, :, :1].requires_grad_()
    o = las_step(q, k, v, rates, lengths=[40])
    assert torch.autograd.grad(o.sum(), q)[0].isfinite().all()
