"""What Hugging Face models hand to their attention: caches of every kind, options, masks
and wishes, dtypes of mixed precision. LaS does it or says no."""

import pytest, torch, torch.nn.functional as F
from las_nb import las_attention
from las_nb.cache import las_cache
from las_nb.adapt import is_las, masked_las_attention, register_las
from las_nb.las import POOLS, las_dense
from las_nb.locality import decay_rates
from tiny_hf import TINY

tf = pytest.importorskip("transformers")
VOCAB, L = 61, 14
SIZES = TINY | dict(vocab_size=VOCAB)
NAMES = ("hf-off", "hf-scores", "hf-weights", "hf-chunk")


@pytest.fixture(scope="module", autouse=True)
def attentions():
    register_las("hf-off", max_rate=0, window=1)
    register_las("hf-scores", max_rate=0.3)
    register_las("hf-weights", max_rate=0.3, window=4, pool="weights")
    register_las("hf-chunk", max_rate=0.3, chunk=4)


def build(kind="Llama", model="ForCausalLM", **sizes):
    torch.manual_seed(0)
    config = getattr(tf, f"{kind}Config")(**(SIZES | sizes))
    return getattr(tf, f"{kind}{model}")(config).eval()


def noise():
    return torch.randint(2, VOCAB, (2, L), generator=torch.Generator().manual_seed(0))


def padding(side):
    "No mask, one of ones, or one with padding."
    if side is None:
        return None
    real = torch.ones(2, L, dtype=torch.long)
    if side == "left":
        real[0, :6] = 0
    if side == "right":
        real[0, -3:] = 0
    return real


def quantized(config):
    "A quantized cache, but for the rounding: what it puts together is looked at."
    kind = pytest.importorskip("transformers.cache_utils").QuantizedLayer

    class Exact(kind):
        def _quantize(self, tensor, axis):
            return tensor.clone()

        def _dequantize(self, tensor):
            return tensor

    cache = tf.DynamicCache()
    cache.layers = [Exact(residual_length=3) for _ in range(config.num_hidden_layers)]
    return cache


def caches(model):
    return dict(
        quantized=quantized(model.config),
        dynamic=tf.DynamicCache(config=model.config),
        static=tf.StaticCache(config=model.config, max_cache_len=32),
        full=tf.StaticCache(config=model.config, max_cache_len=L),
    )


@torch.no_grad()
def in_pieces(model, cache, mask, pieces):
    tokens, end, logits = noise(), 0, []
    for n in pieces:
        end += n
        seen = {} if mask is None else dict(attention_mask=mask[:, :end])
        piece = tokens[:, end - n : end]
        logits.append(
            model(piece, past_key_values=cache, use_cache=True, **seen).logits
        )
    return torch.cat(logits, 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [None, "none", "left", "right"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "full", "quantized"])
def test_a_cache_changes_nothing(name, side, cache):
    """Prefill, prefill in chunks (the first all padding for one row), one by one."""
    model, mask = build(), padding(side)
    model.set_attn_implementation(name)
    real = torch.ones(2, L) if mask is None else mask
    with torch.no_grad():
        want = model(noise(), attention_mask=mask, use_cache=False).logits
    for pieces in ((L,), (5, 4, 5), (9, 1, 1, 1, 1, 1)):
        got = in_pieces(model, caches(model)[cache], mask, pieces)
        torch.testing.assert_close(got[real == 1], want[real == 1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize(
    "how",
    [
        dict(cache_implementation="static"),
        dict(prefill_chunk_size=4),
        dict(num_beams=3),
    ],
    ids=str,
)
def test_generation_says_the_same(name, side, how):
    model = build()
    model.set_attn_implementation(name)
    write = dict(max_new_tokens=6, do_sample=False, attention_mask=padding(side))
    beams = {k: n for k, n in how.items() if k == "num_beams"}
    want = model.generate(noise(), use_cache=False, **write, **beams)
    assert torch.equal(model.generate(noise(), **write, **how), want)


def test_compiled_calls():
    "Fixed-size caches, padding, and packed rows, which only a value gives away."
    model = build()
    model.set_attn_implementation("hf-scores")
    fast, tokens = torch.compile(model, backend="eager"), noise()
    with torch.no_grad():
        for mask in (None, padding("left")):
            seen = dict(attention_mask=mask)
            want = model(tokens, use_cache=False, **seen).logits
            got = fast(tokens, use_cache=False, **seen).logits
            torch.testing.assert_close(got[1], want[1])
        cache = caches(model)["static"]
        for end, n in ((9, 9), (10, 1), (14, 4)):
            piece = tokens[:, end - n : end]
            got = fast(piece, past_key_values=cache, use_cache=True).logits
            want = model(tokens[:, :end], use_cache=False).logits[:, -n:]
            torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
        torch._dynamo.reset()
        fast = torch.compile(model, backend="eager")
        got = fast(tokens, use_cache=False).logits
        torch.testing.assert_close(got, model(tokens, use_cache=False).logits)
        packed = torch.arange(L).remainder(7)[None].expand(2, L)
        assert fast(tokens, position_ids=packed, use_cache=False).logits.isnan().all()


# --- options


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("chunk", [None, 1, 4, 8, 20])
@pytest.mark.parametrize("left", [0, 3])
def test_options_hold_in_cached_steps(pool, chunk, left):
    "Against LaS-chunk as its definition has it: every block alone."
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 11, 6, generator=g, dtype=torch.float64)
    rates, mask = decay_rates(4, 0.4), torch.ones(2, 11, dtype=torch.bool)
    mask[0, :left] = False
    for n in (1, 2, 5, 11):
        q_n, how = q[:, :, -n:], dict(mask=mask, pool=pool, chunk=chunk)
        got = masked_las_attention(q_n, k, v, rates, **how)
        for b in range(2):
            a = [t[b : b + 1, :, mask[b]] for t in (q, k, v)]
            blocks = zip(*(t.split(chunk or 11, 2) for t in a))
            want = torch.cat([las_dense(*t, rates, 3, pool) for t in blocks], 2)
            seen = min(n, want.shape[2])
            torch.testing.assert_close(got[b, :, -seen:], want[0, :, -seen:])


@pytest.mark.parametrize(
    "wrong",
    [
        dict(chunk=0),
        dict(method="fast"),
        dict(tol=2),
        dict(score_bound=-1.0),
        dict(pool="weight"),
        dict(window=0),
        dict(spacing="odd"),
        dict(name="sdpa"),
        dict(name="eager"),
        dict(name="a/b"),
    ],
    ids=str,
)
def test_nonsense_is_refused_at_registration(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        register_las(**wrong)


def test_unknown_options_are_refused():
    q = torch.randn(1, 2, 5, 4)
    for n in (1, 5):
        with pytest.raises(TypeError, match="blocks"):
            masked_las_attention(q[:, :, -n:], q, q, (0.0, 0.1), blocks=3)
        with pytest.raises(ValueError, match="score_bound"):
            masked_las_attention(q[:, :, -n:], q, q, (0.0, 0.1), score_bound=(1.0,))
    with pytest.raises(TypeError, match="lengths"):
        register_las(lengths=3)


# --- what a model asks for


def refused(model, match, **inputs):
    model.set_attn_implementation("hf-off")
    with pytest.raises(ValueError, match=match) as e, torch.no_grad():
        model(**inputs)
    assert "\n" not in str(e.value)


def test_wishes_are_refused_by_name():
    t5 = dict(d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4)
    t5 = build("T5", "EncoderModel", **t5)
    refused(t5, "T5Attention asks for position_bias", input_ids=noise())
    small = dict(head_dim=8, num_hidden_layers=1)
    refused(build("Gemma2", **small), "softcap", input_ids=noise())
    llama, whole = build(), dict(input_ids=noise(), use_cache=False)
    own = torch.ones(L, L).tril(1).bool().expand(2, 1, L, L)
    refused(llama, "masks of your own", attention_mask=own, **whole)
    refused(llama, "asks for s_aux", s_aux=torch.zeros(8), **whole)
    holes = torch.ones(2, L).long()
    holes[1, 3] = 0
    refused(llama, "between real tokens", attention_mask=holes, **whole)
    refused(llama, "attention_mask", attention_mask=holes[:, 4:], **whole)
    refused(build("Mistral", sliding_window=4), "sliding_window", **whole)
    four = dict(head_dim=8, num_local_experts=2, intermediate_size_mlp=96)
    four |= dict(attention_chunk_size=4, layer_types=["chunked_attention"] * 2)
    torch.manual_seed(0)
    model = tf.Llama4ForCausalLM(tf.Llama4TextConfig(**(SIZES | four))).eval()
    # within chunks it is LaS-chunk; a cache would need to know where they begin
    model.set_attn_implementation("hf-scores")
    with torch.no_grad():
        got = model(noise(), use_cache=False).logits
        model.config.layer_types = ["full_attention"] * 2
        for layer in model.model.layers:
            layer.layer_type = "full_attention"
        model.set_attn_implementation("hf-chunk")
        want = model(noise(), use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n", [9, L])
def test_cross_attention_is_refused(n):
    sizes = dict(d_model=64, encoder_layers=1, decoder_layers=1, vocab_size=VOCAB)
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4)
    bart = build("Bart", "Model", **sizes, **heads)
    own = dict(input_ids=noise(), decoder_input_ids=noise()[:, :n])
    refused(bart, "BartAttention attends to another sequence", **own)
    bert = build("Bert", "LMHeadModel", is_decoder=True, add_cross_attention=True)
    second = dict(encoder_hidden_states=torch.randn(2, L, 64))
    refused(bert, "BertCrossAttention", input_ids=noise(), **second)


def test_attention_outside_the_table_is_refused():
    """GIT takes its mask from the table and not its attention: it would see the
    future."""
    vision = dict(hidden_size=32, intermediate_size=48, image_size=28)
    vision |= dict(num_hidden_layers=1, num_attention_heads=2, patch_size=14)
    git = build("Git", vision_config=vision)
    refused(git, "GitConfig attend in their own way", input_ids=noise())


OWN_WAYS = (
    "Deberta DebertaV2 Flaubert GPTNeo Longformer Mamba OpenAIGPT Rwkv XLM".split()
)


@pytest.mark.parametrize("kind", OWN_WAYS)
def test_models_that_would_stay_without_are_refused(kind):
    config = getattr(tf, f"{kind}Config")()
    model = getattr(tf, f"{kind}Model")
    with (
        pytest.raises(ValueError, match="attends in its own way"),
        torch.device("meta"),
    ):
        model._from_config(config, attn_implementation="hf-off")


def test_what_is_set_later_is_refused_or_told(caplog):
    from transformers.utils import logging

    few = dict(num_hidden_layers=1)
    mamba = tf.MambaModel(tf.MambaConfig(hidden_size=16, vocab_size=VOCAB, **few))
    with pytest.raises(ValueError, match="MambaModel attends in its own way"):
        mamba.set_attn_implementation("hf-off")
    sizes = dict(n_embd=16, n_layer=1, n_head=2, vocab_size=VOCAB)
    gpt = tf.OpenAIGPTModel(tf.OpenAIGPTConfig(**sizes))
    logging.enable_propagation()
    gpt.set_attn_implementation("hf-off")
    logging.disable_propagation()
    assert "does not support setting its attention" in caplog.text
    assert not is_las(gpt.config)


def test_a_causal_model_may_be_told_to_look_ahead():
    model = build(tie_word_embeddings=False)
    for seen in ({}, dict(attention_mask=padding("left"))):
        how = dict(use_cache=False, is_causal=False, **seen)
        with torch.no_grad():
            model.set_attn_implementation("sdpa")
            want = model(noise(), **how).logits[1]
            model.set_attn_implementation("hf-off")
            torch.testing.assert_close(model(noise(), **how).logits[1], want)


@pytest.mark.parametrize(
    "kind, sizes",
    [
        ("Afmoe", dict(layer_types=["full_attention"] * 2, head_dim=8)),
        ("Doge", {}),
        ("OPT", dict(ffn_dim=96, word_embed_proj_dim=64)),
        ("Phi", {}),
    ],
)
def test_models_that_name_their_mask(kind, sizes):
    "Positional or by keyword: the model's own logits, or a refusal."
    model = build(kind, **sizes)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        want = model(noise()).logits
        model.set_attn_implementation("hf-off")
        try:
            torch.testing.assert_close(model(noise()).logits, want)
        except ValueError as e:
            assert kind == "Doge" and "mask" in str(e)


# --- mixed precision


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "GPTNeoX", "Phi", "Gemma"])
def test_trainer_in_bfloat16(kind, tmp_path):
    pytest.importorskip("accelerate")
    sizes = dict(head_dim=8) if kind == "Gemma" else {}
    model = build(kind, attention_dropout=0.0, **sizes)
    model.set_attn_implementation("hf-scores")
    rows = [dict(input_ids=t, labels=t) for t in noise().repeat(4, 1)]
    how = dict(max_steps=8, per_device_train_batch_size=4, learning_rate=3e-3)
    quiet = dict(report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True)
    args = tf.TrainingArguments(tmp_path, bf16=True, logging_steps=1, **how, **quiet)
    trainer = tf.Trainer(model, args, train_dataset=rows)
    trainer.train()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    assert losses[-1] < losses[0] - 0.3


def test_autocast_casts_as_torch_does():
    q, k, v = torch.randn(3, 1, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    ways = [las_dense, las_attention, masked_las_attention]
    for a in ((q, k, v.bfloat16()), (q.bfloat16(), k, v)):
        with torch.autocast("cpu", torch.bfloat16):
            want = F.scaled_dot_product_attention(*a, is_causal=True)
            for way in ways:
                got = way(*a, torch.zeros(4), window=1)
                assert got.dtype == want.dtype == torch.bfloat16
                torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)
            step = masked_las_attention(a[0][:, :, -1:], *a[1:], (0.0,) * 4, window=1)
            torch.testing.assert_close(step, want[:, :, -1:], atol=0.02, rtol=0.02)
        for way in ways:
            with pytest.raises(ValueError, match="dtype"):
                way(*a, torch.zeros(4), window=1)


# --- what is kept on disk


def again(path, **how):
    return tf.AutoModelForCausalLM.from_pretrained(path, **how)


def test_a_saved_model_remembers_las(tmp_path):
    model = build()
    model.set_attn_implementation("hf-weights")
    model.save_pretrained(tmp_path)
    loaded = again(tmp_path).eval()
    assert loaded.config._attn_implementation == "hf-weights"
    assert loaded.config.las["window"] == 4 and loaded.config.las["max_rate"] == 0.3
    with torch.no_grad():
        assert torch.equal(loaded(noise()).logits, model(noise()).logits)
    loaded.set_attn_implementation("sdpa")
    loaded.save_pretrained(tmp_path)
    plain = again(tmp_path)
    assert plain.config._attn_implementation == "sdpa"
    assert not hasattr(plain.config, "las")


def test_parts_of_a_model_remember_theirs(tmp_path):
    config = tf.LlavaConfig(text_config=dict(model_type="llama"))
    config._attn_implementation = {"text_config": "hf-scores"}
    config.save_pretrained(tmp_path)
    loaded = tf.AutoConfig.from_pretrained(tmp_path)
    assert loaded.text_config._attn_implementation == "hf-scores"
    assert loaded.vision_config._attn_implementation is None


def test_what_cannot_be_restored_is_told(tmp_path):
    from las_nb.adapt import _OURS

    register_las("hf-other", max_rate=0.2)
    model = build()
    model.set_attn_implementation("hf-other")
    model.save_pretrained(tmp_path)
    register_las("hf-other", max_rate=0.1)
    with pytest.warns(UserWarning, match="register_las with the same"):
        again(tmp_path)(noise())
    tf.AttentionInterface._global_mapping.pop("hf-other")
    _OURS.pop("hf-other")
    with pytest.raises(ValueError, match="hf-other"):
        again(tmp_path)


def test_an_old_library_is_named(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.raises(
        ImportError, match="needs transformers >= 5.15 and finds 4.57.6"
    ):
        register_las("hf-old")


@pytest.mark.parametrize(
    "wrong",
    [
        dict(max_rate="0.1"),
        dict(max_rate=None),
        dict(max_rate=True),
        dict(name=None),
        dict(chunk=True),
        dict(score_bound=True),
    ],
    ids=str,
)
def test_what_is_no_number_is_refused_at_registration(wrong):
    with pytest.raises(ValueError):
        register_las(**dict(name="hf-wrong") | wrong)


def test_what_is_registered_stays(tmp_path):
    "Lists that change later, numbers of numpy: the model and its config agree."
    numpy = pytest.importorskip("numpy")
    window = [0.5, 0.5]
    numbers = dict(score_bound=numpy.float32(64), max_rate=numpy.float32(0.3))
    register_las("hf-stays", window=window, **numbers)
    register_las("hf-array", window=numpy.array([0.5, 0.5]), **numbers)
    model, found = build(), []
    for name in ("hf-stays", "hf-array"):
        model.set_attn_implementation(name)
        found.append(model(noise(), use_cache=False).logits)
        window[:] = [0.9, 0.1]
        found.append(model(noise(), use_cache=False).logits)
        model.save_pretrained(tmp_path / name)
        assert type(model).from_pretrained(tmp_path / name).config.las
    assert all(torch.equal(f, found[0]) for f in found)


def copied(layer, args, wishes):
    "As where layers stand on several devices: a mask without its attributes."
    mask = wishes["attention_mask"]
    return args, wishes | dict(attention_mask=None if mask is None else mask.clone())


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_says_who_sees_whom(side, copies):
    "Some layers call themselves bidirectional and are given a causal mask."
    model = build()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
        if copies:
            layer.register_forward_pre_hook(copied, with_kwargs=True)
    found, mask = [], padding(side)
    for name in ("eager", "hf-off"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            call = dict(attention_mask=mask, use_cache=False)
            found.append(model(noise(), **call).logits[mask.bool()])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


# --- masks of one's own, and who sees whom


def whole_mask(kind):
    i = torch.arange(L)
    past = i <= i[:, None]
    if kind == "woven":
        return ((i[:, None] - i) % 2 == 0) & past
    if kind == "a document that goes on after another":
        document = (i > 3) & (i < 8)
        return (document[:, None] == document) & past
    past[:, 2] = False  # a token that nobody sees but itself
    past[2] = i == 2
    return past


@pytest.mark.parametrize("kind", ["woven", "a document that goes on after another", ""])
def test_masks_that_look_like_documents_are_refused(kind):
    model = build()
    model.set_attn_implementation("hf-off")
    with pytest.raises(ValueError, match="masks of your own"):
        model(noise()[:1], attention_mask=whole_mask(kind)[None, None], use_cache=False)


@pytest.mark.parametrize("kind", ["Align", "Clap"])
def test_layers_that_do_not_say_whether_they_are_causal(kind):
    sizes = SIZES | dict(num_key_value_heads=None)
    torch.manual_seed(0)
    model = getattr(tf, f"{kind}TextModel")(getattr(tf, f"{kind}TextConfig")(**sizes))
    model, x = model.eval(), noise()
    longer = F.pad(x, (0, 2)), F.pad(torch.ones_like(x), (0, 2))
    found = []
    for name in ("eager", "hf-off"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            found += [model(x)[0], model(longer[0], attention_mask=longer[1])[0][:, :L]]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-4)


def test_causal_layers_that_call_themselves_bidirectional():
    "Alone and padded alike, and they write."
    model = build("Gemma", head_dim=8, use_bidirectional_attention=True)
    model.set_attn_implementation("hf-scores")
    x = noise()[:1]
    mask = F.pad(torch.ones_like(x), (3, 0))
    with torch.no_grad():
        alone = model(x, use_cache=False).logits
        padded = model(F.pad(x, (3, 0)), attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(padded[:, 3:], alone, atol=1e-4, rtol=1e-4)
    written = model.generate(x, max_new_tokens=3, do_sample=False)
    again = model.generate(x, max_new_tokens=3, do_sample=False, use_cache=False)
    assert written.tolist() == again.tolist()


def test_packed_rows_that_no_mask_tells_of_are_refused():
    model, x = build(), noise()[:1]
    model.set_attn_implementation("hf-scores")
    at = torch.arange(L)[None] % 7
    with pytest.raises(ValueError, match="start anew"):
        model(x, position_ids=at)
    with pytest.raises(ValueError, match="start anew"):
        model(x, position_ids=at, attention_mask=torch.ones_like(x))
    with torch.inference_mode():
        got = model(x, position_ids=at, use_cache=False).logits
    want = torch.cat([model(d, use_cache=False).logits for d in x.split(7, 1)], 1)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_compiled_and_exported_models():
    register_las("hf-bound", max_rate=0.3, score_bound=100.0)
    model, x = build(), noise()
    model.set_attn_implementation("hf-bound")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x, use_cache=False).logits

    for strict in (False, True):
        program = torch.export.export(Logits(), (x,), strict=strict).module()
        torch.testing.assert_close(program(x), Logits()(x))
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eager", fullgraph=True)
    hole = torch.ones_like(x)
    hole[0, 6] = 0
    with torch.no_grad():
        torch.testing.assert_close(fast(x, use_cache=False).logits, Logits()(x))
        torn = torch.compile(model, backend="eager")
        got = torn(x, attention_mask=hole, use_cache=False).logits
    assert got[0].isnan().any() and got[1].isfinite().all()


def test_a_window_that_is_trained_is_refused():
    with pytest.raises(ValueError, match="trained"):
        register_las("hf-learned", window=torch.ones(2, requires_grad=True))


@pytest.mark.parametrize("how", ["right", "left", "static", "in pieces"])
def test_packed_rows_are_refused_beside_padding_and_in_every_cache(how):
    model, x = build(), noise()
    model.set_attn_implementation("hf-scores")
    at, call = (torch.arange(L) % 5).expand(2, -1), {}
    if how in ("right", "left"):
        call = dict(attention_mask=padding(how), use_cache=False)
    elif how == "static":
        call = dict(past_key_values=caches(model)["static"])
    else:
        past = model(x[:, :3], use_cache=True).past_key_values
        x, at, call = x[:, 3:], at[:, 3:], dict(past_key_values=past)
    with pytest.raises(ValueError, match="start anew"):
        model(x, position_ids=at, **call)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_padding_may_be_anything(side):
    model, real = build(), padding(side)
    model.set_attn_implementation("hf-scores")
    at = (real.cumsum(1) - 1).masked_fill(real == 0, 1)
    got = model(noise(), attention_mask=real, position_ids=at, use_cache=False).logits
    alone = model(noise()[:1, real[0].bool()], use_cache=False).logits
    torch.testing.assert_close(got[:1, real[0].bool()], alone, atol=1e-4, rtol=1e-4)


def test_what_is_computed_anew_is_what_was_computed():
    "Gradient checkpointing, with another model called in between."
    sizes = SIZES | dict(num_key_value_heads=None, attention_probs_dropout_prob=0)
    sizes |= dict(hidden_dropout_prob=0)
    other, found = build(), []
    other.set_attn_implementation("hf-scores")
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        model = tf.AlignTextModel(tf.AlignTextConfig(**sizes)).train()
        model.set_attn_implementation("hf-scores")
        if reentrant is not None:
            how = dict(use_reentrant=reentrant)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        embedded = model.get_input_embeddings()(noise())
        out = model(inputs_embeds=embedded)[0]
        other(noise())
        out.square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for again in found[1:]:
        for x, y in zip(again, found[0], strict=True):
            torch.testing.assert_close(x, y)


def forgetful(model, **limits):
    return las_cache(model, **dict(score_bound=4.0, tol=1e-4) | limits)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [None, "none", "left", "right"])
def test_a_cache_that_forgets_changes_little(name, side):
    model, mask = build(), padding(side)
    model.set_attn_implementation(name)
    real = torch.ones(2, L) if mask is None else mask
    with torch.no_grad():
        want = model(noise(), attention_mask=mask, use_cache=False).logits
    pieces = [(L,), (5, 4, 5), (9, 1, 1, 1, 1, 1)]
    for piece in pieces[: 1 if side == "right" else 3]:
        got = in_pieces(model, forgetful(model), mask, piece)
        torch.testing.assert_close(got[real == 1], want[real == 1], atol=1e-3, rtol=0)


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("how", [{}, dict(num_beams=3), dict(do_sample=True)], ids=str)
def test_generation_with_a_cache_that_forgets(side, how):
    model = build()
    model.set_attn_implementation("hf-scores")
    write = dict(max_new_tokens=40, attention_mask=padding(side)) | how
    write.setdefault("do_sample", False)
    torch.manual_seed(0)
    want = model.generate(noise(), **write)
    cache = forgetful(model)
    torch.manual_seed(0)
    assert torch.equal(model.generate(noise(), past_key_values=cache, **write), want)
    cache.reset()
    torch.manual_seed(0)
    assert torch.equal(model.generate(noise(), past_key_values=cache, **write), want)


def test_what_a_cache_that_forgets_refuses():
    model = build()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="use LaS"):
        las_cache(model, score_bound=4.0)
    model.set_attn_implementation("hf-scores")
    with pytest.raises(ValueError, match="no_grad"):  # half of them would be lost
        model(noise(), past_key_values=forgetful(model))
    with torch.no_grad(), pytest.raises(ValueError, match="above score_bound"):
        model(noise(), past_key_values=las_cache(model, score_bound=1e-6))
    cache = forgetful(model)
    with torch.no_grad():
        model(noise(), past_key_values=cache)
    with pytest.raises(ValueError, match="cannot take tokens back"):
        cache.crop(-1)
    model.set_attn_implementation("sdpa")  # does not see the mark
    with torch.no_grad(), pytest.raises(ValueError, match="did not come to LaS"):
        model(noise()[:, :1], past_key_values=cache)
        model(noise()[:, :1], past_key_values=cache)


@pytest.mark.parametrize("name", ["hf-scores", "hf-weights"])
def test_a_small_model_may_guess_ahead(name):
    "Assisted generation takes tokens back, and says what the model says alone."
    model = build()
    torch.manual_seed(1)
    helper = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES | dict(num_hidden_layers=1)))
    for m in (model, helper):
        m.eval().set_attn_implementation(name)
    write = dict(max_new_tokens=20, do_sample=False)
    want = model.generate(noise()[:1], **write)
    got = model.generate(noise()[:1], assistant_model=helper, **write)
    assert torch.equal(got, want)
