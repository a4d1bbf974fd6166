"""Decoding with bounded memory: token by token the outputs are those of the whole
forward, whatever is kept, forgotten, begun anew, reordered or saved on the way."""

import pytest, torch
from las_nb.fast import las_attention, las_state
from las_nb.fast.bands import far_error
from las_nb.fast.state import keep_plan, near_keys
from las_nb.las import las_dense
from las_nb.mixers import MIXERS, LaSAttention, untrained
from las_nb.model import LaSTransformer

MIXED = (0.0, 0.01, 0.1, 0.8)
BOUND = 24.0


def inputs(B=2, L=300, D=8, dtype=torch.float64, seed=0, H=4):
    g = torch.Generator().manual_seed(seed)
    return [t.to(dtype) for t in torch.randn(3, B, H, L, D, generator=g)]


def cut(a, start, end):
    return [t[:, :, start:end] for t in a]


def read(state, a, pieces):
    "The outputs of pieces of so many tokens; what is left comes one by one."
    found, at, L = [], 0, a[0].shape[2]
    for n in [*pieces, *[1] * (L - sum(pieces))]:
        found.append(state.step(*cut(a, at, at + n)))
        at += n
    return torch.cat(found, 2)


def off(o, want, v):
    return ((o - want).norm(dim=-1).max() / v.norm(dim=-1).max()).item()


def make(B, rates=MIXED, D=8, tol=None, dtype=torch.float64, **kw):
    bound = None if tol is None else BOUND
    return las_state(B, rates, D, tol=tol, score_bound=bound, dtype=dtype, **kw)


# --- the whole forward


@pytest.mark.parametrize("pool", ["scores", "weights"])
@pytest.mark.parametrize("window", [1, 3, (0.5, 0.2, -0.3), torch.rand(4, 3).tolist()])
@pytest.mark.parametrize("chunk", [None, 40])
def test_without_a_tolerance_every_output_is_that_of_the_matrix(pool, window, chunk):
    a = inputs()
    want = las_attention(*a, MIXED, window, pool, method="dense", chunk=chunk)
    for pieces in ([], [1, 2, 77, 1, 93], [299], [300]):
        state = make(2, window=window, pool=pool, chunk=chunk)
        torch.testing.assert_close(read(state, a, pieces), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rates", [(0.0,) * 4, (0.002,) * 4, (0.5,) * 4, MIXED])
@pytest.mark.parametrize("pool", ["scores", "weights"])
@pytest.mark.parametrize("window", [1, 3, (0.8, -0.6)])
def test_a_tolerance_is_kept(rates, pool, window):
    a = inputs(L=500)
    want = las_dense(*a, torch.tensor(rates).double(), window, pool)
    for tol in (1e-2, 1e-5):
        state = make(2, rates, tol=tol, window=window, pool=pool)
        assert off(read(state, a, [5, 133, 1, 171]), want, a[2]) < tol


@pytest.mark.parametrize("order", [0, 1])
def test_worst_keys_stay_within_the_promise(order):
    "All far keys have the largest score there may be, and values that differ most."
    rate, S, tol, D = 0.05, 4.0, 1e-2, 1
    state = las_state(1, (rate,), D, 1, tol=tol, score_bound=S, dtype=torch.float64)
    R = near_keys(rate, S, tol, order)
    state.kept[0] = state.kept[0]._replace(reach=R, order=order)
    state.tensors["0.state"] = torch.zeros(1, 1, D, D + 1).double()
    L = 4 * R
    q = torch.full((1, 1, L, D), S**0.5).double()
    for sign in (1, -1):
        state.reset()
        v = torch.where(torch.arange(L) < L // 2, 1.0, -1.0).double()[
            None, None, :, None
        ]
        want = las_dense(q, sign * q, v, torch.tensor([rate]).double(), 1)
        got = read(state, [q, sign * q, v], [3])
        assert 0 < off(got, want, v) < tol


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    a = inputs(dtype=dtype)
    want = las_dense(*(t.float() for t in a), torch.tensor(MIXED), 3)
    state = make(2, tol=1e-3, dtype=torch.float32)
    o = read(state, a, [120])
    assert o.dtype == dtype
    assert off(o.float(), want, a[2].float()) < {torch.float32: 1e-3}.get(dtype, 1e-2)
    small = read(make(2, tol=1e-3, dtype=dtype), a, [120])  # what is kept is rounded
    assert off(small.float(), want, a[2].float()) < 2e-2


def test_values_may_have_a_width_of_their_own():
    q, k, v = inputs()
    state = make(2, tol=1e-4, value_width=3)
    want = las_dense(q, k, v[..., :3], torch.tensor(MIXED).double(), 3)
    assert off(read(state, [q, k, v[..., :3]], [50]), want, v) < 1e-4


def test_the_first_prompt_is_the_forward_itself():
    a = inputs(L=400, dtype=torch.float32)
    state = make(2, tol=1e-3, dtype=torch.float32)
    want = las_attention(*a, MIXED, tol=1e-3, score_bound=BOUND)
    assert torch.equal(state.step(*a), want)


# --- what is kept


def test_what_is_near_follows_from_rate_bound_and_tolerance():
    for rate in (0.003, 0.1, 3.0):
        for order in (0, 1):
            R = near_keys(rate, 16.0, 1e-4, order)
            delta = [16 * torch.e ** (-rate * (n + 1)) for n in (R, R - 1)]
            assert far_error(delta[0], order, rate) <= 1e-4
            assert R == 1 or far_error(delta[1], order, rate) > 1e-4
    assert near_keys(0.0, 16.0, 1e-4) is None
    assert near_keys(1e-300, 16.0, 1e-4) is None
    groups = keep_plan((0.0, 0.3, 0.001, 0.0), (16.0,) * 4, 1e-4)
    assert sorted(h for g in groups for h in g.heads) == [0, 1, 2, 3]
    assert groups[0].heads == (0, 3) and groups[0].reach is None


def test_fast_heads_stay_as_large_as_they_are():
    "While 20,000 tokens go by, in pieces and one by one."
    a = inputs(1, 20_000, dtype=torch.float32, H=3)
    state = make(1, (0.05, 0.2, 0.8), tol=1e-3, dtype=torch.float32)
    sizes = []
    for at in range(0, 19_800, 1980):
        state.step(*cut(a, at, at + 1980))
        sizes.append(state.nbytes)
    assert {*sizes[1:]} == {sizes[1]}  # before, no key was far
    for at in (19_800, 19_900):  # token by token what age decides is held as well
        read(state, cut(a, at, at + 100), [])
        sizes.append(state.nbytes)
    assert sizes[-1] == sizes[-2] and sizes[0] < sizes[-1] < 300_000
    assert int(state.positions) == 20_000


def test_room_for_slow_heads_doubles():
    a, state, rooms = inputs(1, 300, H=1), make(1, (0.0,)), set()
    for at in range(300):
        state.step(*cut(a, at, at + 1))
        rooms.add(state.tensors["0.k"].shape[2])
    assert rooms == {64, 128, 256, 512}


def test_equal_values_are_returned_after_100_000_tokens():
    "The worst for a running sum: every addition rounds the same way."
    rates, x = (0.05, 0.5), torch.randn(1, 2, 1000, 4)
    v = torch.full_like(x, 0.1)
    state = las_state(1, rates, 4, 1, tol=1e-4, score_bound=20.0)
    for _ in range(100):
        o = state.step(x, x, v)
    assert (o / 0.1 - 1).abs().max() < 2e-6


# --- streams


@pytest.mark.parametrize("tol", [None, 1e-4])
@pytest.mark.parametrize("pool", ["scores", "weights"])
@pytest.mark.parametrize("chunk", [None, 30])
def test_streams_of_unequal_lengths(tol, pool, chunk):
    a = inputs(3, L=260)
    how = dict(pool=pool, chunk=chunk)
    want = las_attention(*a, MIXED, 3, pool, method="dense", chunk=chunk)
    state, at = make(3, tol=tol, **how), torch.zeros(3, dtype=torch.long)
    g = torch.Generator().manual_seed(1)
    for n in (100, 1, 7, 60, 1, 1, 30):
        lengths = torch.randint(0 if n < 100 else 1, n + 1, (3,), generator=g)
        lengths[0] = n
        rows = [torch.full((3, 4, n, 8), torch.nan).double() for _ in a]
        for b, m in enumerate(lengths):
            for x, t in zip(rows, a):
                x[b, :, :m] = t[b, :, at[b] : at[b] + m]
        o = state.step(*rows, lengths)
        for b, m in enumerate(lengths):
            mine = want[b, :, at[b] : at[b] + m]
            assert off(o[b, :, :m], mine, a[2]) < (tol or 1e-12) if m else True
        at += lengths
        assert torch.equal(state.positions, at)


def test_one_stream_does_not_touch_another():
    a, b = inputs(2), inputs(2, seed=5)
    mixed = [torch.cat([s[:1], t[1:]]) for s, t in zip(a, b)]
    o, p = (read(make(2, tol=1e-3), x, [50, 1, 60]) for x in (a, mixed))
    torch.testing.assert_close(o[0], p[0], rtol=0, atol=1e-14)


def test_a_stream_begins_anew():
    a = inputs(2)
    for rows in ([1], torch.tensor([False, True])):
        state = make(2, tol=1e-4)
        spoiled = [t.clone() for t in a]
        spoiled[1][1, :, 40], spoiled[2][1, :, 50] = torch.nan, torch.inf
        read(state, cut(spoiled, 0, 200), [100])
        state.reset(rows)
        assert state.positions.tolist() == [200, 0]
        rest = [torch.stack([t[0, :, 200:], t[1, :, :100]]) for t in a]
        o, rates = read(state, rest, [30]), torch.tensor(MIXED).double()
        want = las_dense(*a, rates)
        assert off(o[0], want[0, :, 200:], a[2]) < 1e-4
        assert off(o[1], want[1, :, :100], a[2]) < 1e-4
    state.reset()
    assert not state.positions.any()
    assert torch.equal(read(state, a, [9]), read(make(2, tol=1e-4), a, [9]))


def test_streams_in_another_order():
    a, state = inputs(3), make(3, tol=1e-4)
    read(state, cut(a, 0, 200), [100, 50])
    index = [2, 0, 0, 2]
    state.reorder(torch.tensor(index))
    o = read(state, [t[index][:, :, 200:] for t in a], [])
    want = las_dense(*a, torch.tensor(MIXED).double())[index][:, :, 200:]
    assert off(o, want, a[2]) < 1e-4


@pytest.mark.parametrize("tol", [None, 1e-4])
def test_save_and_load(tol, tmp_path):
    from safetensors.torch import load_file, save_file

    a = inputs(2, dtype=torch.float32)
    state = make(2, tol=tol, dtype=torch.float32)
    read(state, cut(a, 0, 200), [100, 50])
    save_file(state.state_dict(), tmp_path / "state.safetensors")
    kept = state.state_dict()
    o = read(state, cut(a, 200, 300), [])
    for tensors in (load_file(tmp_path / "state.safetensors"), kept):
        other = make(1, tol=tol, dtype=torch.float32)
        other.load_state_dict(tensors)
        assert torch.equal(read(other, cut(a, 200, 300), []), o)
    for wrong in (dict(pool="weights", D=9), dict(rates=(0.1,) * 4, tol=1e-4)):
        with pytest.raises(ValueError, match="made with other options"):
            make(2, **dict(tol=tol) | wrong).load_state_dict(kept)
    with pytest.raises(ValueError, match="made with other options"):
        make(2, tol=1e-2 if tol else 1e-4).load_state_dict(kept)


def test_moved_and_rounded():
    a = inputs(2, dtype=torch.float32)
    state = make(2, tol=1e-3, dtype=torch.float32)
    read(state, cut(a, 0, 200), [100])
    before = state.nbytes
    assert state.to("cpu", torch.bfloat16) is state and state.nbytes < 0.7 * before
    assert state.tensors["1.sum"].dtype == torch.float64
    o = read(state, cut(a, 200, 300), [40])
    want = las_dense(*a, torch.tensor(MIXED))[:, :, 200:]
    assert o.dtype == torch.float32 and off(o, want, a[2]) < 1e-2


def test_no_gradient_and_no_mode_matters():
    a, state = inputs(2), make(2, tol=1e-3)
    with torch.inference_mode():
        state.step(*(t.clone() for t in cut(a, 0, 100)))
        state.step(*(t.clone() for t in cut(a, 100, 101)))
    o = state.step(*(t.requires_grad_() for t in cut(a, 101, 102)))
    assert not o.requires_grad
    want = las_dense(*a, torch.tensor(MIXED).double())[:, :, 101:102]
    assert off(o, want, a[2]) < 1e-3


# --- what is refused


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(tol=1e-3, score_bound=None), "needs a score_bound"),
        (dict(batch=0), "batch must be a whole number"),
        (dict(rates=(-1.0,)), "rates must be finite"),
        (dict(window=0), "window must be"),
        (dict(pool="keys"), "pool must be one of"),
        (dict(tol=2.0), "tol must lie"),
        (dict(chunk=0), "chunk must be"),
        (dict(width=0), "width must be a whole number"),
    ],
)
def test_options_that_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message) as e:
        las_state(**dict(batch=2, rates=MIXED, width=8, score_bound=9.0) | wrong)
    assert "\n" not in str(e.value)


def test_steps_that_are_refused_leave_the_state_as_it_was():
    a, state = inputs(2), make(2, tol=1e-3)
    read(state, cut(a, 0, 100), [100])
    before = state.state_dict()
    q, k, v = cut(a, 100, 102)
    for wrong, message in (
        ((100 * q, k, v), "scores of head 0 may reach"),
        ((q, 100 * k, v), "scores of head 0 may reach"),
        ((q[:1], k[:1], v[:1]), "of the state"),
        ((q, k, v[..., :3]), "of the state"),
        ((q, k, v, [1, 3]), "lengths must be 2 whole numbers from 0 to 2"),
        ((q, k, v, [1]), "lengths must be 2 whole numbers from 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            state.step(*wrong)
    after = state.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in before.items())


def test_a_long_key_is_remembered_where_it_is_no_longer_kept():
    q, k, v = inputs(1, 200, H=1)
    k[:, :, 0] *= 5
    state = make(1, (0.8,), tol=1e-3)
    read(state, cut([q / 5, k, v], 0, 100), [100])
    with pytest.raises(ValueError, match="scores of head 0 may reach"):
        state.step(*cut([2 * q, k, v], 100, 101))


# --- what is not finite, and what is not of this state


@pytest.mark.parametrize("pool", ["scores", "weights"])
@pytest.mark.parametrize("chunk", [None, 40])
@pytest.mark.parametrize("tol", [None, 1e-3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_reach_what_sees_them_and_no_more(
    pool, chunk, tol, bad
):
    L, at = 130, 50
    for which in range(2, 3) if tol and bad == float("inf") else range(3):
        a = inputs(L=L)
        a[which][0, 1, at, 3] = bad
        finite = torch.ones(2, 4, L, dtype=torch.bool)
        last = (
            at + 1
            if which == 0
            else L
            if chunk is None
            else at // chunk * chunk + chunk
        )
        finite[0, 1, at:last] = False
        want = las_attention(*inputs(L=L), MIXED, 3, pool, method="dense", chunk=chunk)
        for pieces in ([L], [10, 90], [49, 1, 1], []):
            state = make(2, pool=pool, chunk=chunk, tol=tol)
            o = read(state, a, pieces)
            assert torch.equal(o.isfinite().all(-1), finite)
            assert torch.equal(o.isfinite().any(-1), finite)
            if which == 0:
                error = (o - want)[finite].abs().max()
                assert error < (1e-2 if tol else 1e-12)
        state.reset([0])
        assert state.step(*cut(inputs(), 0, 9)).isfinite().all()


def test_a_bound_holds_after_a_row_that_is_no_number():
    q, k, v = inputs(2, 20)
    state = make(2, tol=1e-3)
    k[:, :, 3] = float("nan")
    assert state.step(q, k, v)[:, :, 3:].isnan().all()
    with pytest.raises(ValueError, match="scores of head 0 may reach"):
        state.step(*(100 * t[:, :, :1] for t in (q, k, v)))


@pytest.mark.parametrize(
    "other",
    [
        dict(window=5),
        dict(window=(0.2, 0.3, 0.5)),
        dict(rates=(0.0, 0.5, 0.5, 0.5)),
        dict(pool="weights"),
        dict(chunk=64),
    ],
    ids=str,
)
def test_tensors_of_another_state_are_refused(other):
    state = make(2)
    state.step(*inputs(L=20))
    with pytest.raises(ValueError, match="made with other options"):
        make(2, **other).load_state_dict(state.state_dict())
    again = make(3)
    again.load_state_dict(state.state_dict())
    assert again.positions.tolist() == [20, 20]


def test_streams_may_be_named_by_small_whole_numbers():
    state = make(2)
    state.step(*inputs(L=20), lengths=[20, 7])
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.long):
        other = make(2)
        other.load_state_dict(state.state_dict())
        other.reorder(torch.tensor([1, 0, 1], dtype=dtype))
        assert other.positions.tolist() == [7, 20, 7]
        other.reset(torch.tensor([1, 1], dtype=dtype))
        other.reset([])
        other.reset([False, False, True])
        assert other.positions.tolist() == [7, 0, 0]
    for wrong in (1, [[0, 1]], [0.0], [True]):
        with pytest.raises(ValueError, match="streams must be whole numbers"):
            state.reorder(wrong)


def test_what_a_state_was_made_with_may_change_later():
    rates, window = torch.tensor(MIXED).double(), torch.tensor([0.5, 0.3, 0.2]).double()
    a = inputs(L=40)
    want = las_dense(*a, rates.clone(), window.clone())
    state = las_state(2, rates, 8, window, dtype=torch.float64)
    rates.mul_(3), window.mul_(2)
    torch.testing.assert_close(read(state, a, [5]), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tol", [None, 1e-3])
def test_rates_that_float32_does_not_hold(tol):
    rates, a = (0.0, 1e-300, 1e300, 178.0), inputs(L=90)
    want = las_dense(*a, torch.tensor(rates, dtype=torch.float64), 3)
    for pieces in ([90], [40, 1, 49], []):
        state = make(2, rates, tol=tol, dtype=torch.float32)
        o = read(state, [t.float() for t in a], pieces)
        assert off(o.double(), want, a[2]) < (tol or 1e-5)


# --- layers and models


def model(mixer="las", **kw):
    torch.manual_seed(0)
    kw = dict(vocab=11, max_len=128) | kw
    return LaSTransformer(3, 16, 2, 4, mixer=mixer, **kw).eval().double()


def decode(model, x, state, pieces=(30, 1, 1, 20)):
    found, at = [], 0
    for n in [*pieces, *[1] * (x.shape[1] - sum(pieces))]:
        found.append(model.step(x[:, at : at + n], state))
        at += n
    return torch.cat(found, 1)


def tokens(B=2, L=60):
    return torch.randint(11, (B, L), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("positions", [None, "sinusoidal", "learned", "rotary"])
@pytest.mark.parametrize("mixer", ["las", "las-chunk", "attention"])
def test_a_model_step_by_step_gives_its_features(mixer, positions):
    m = model(mixer, positions=positions)
    want = m.features(tokens())
    got = decode(m, tokens(), m.state(2))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mixer", [m for m in MIXERS if m != "linformer"])
@pytest.mark.parametrize(
    "kw", [dict(conv=4, input_conv=3), dict(norm="batch"), dict(prenorm=False)]
)
def test_every_causal_model_decodes(mixer, kw):
    m = model(mixer, **kw)
    want = m.features(tokens())
    got = decode(m, tokens(), m.state(2), (30, 1, 25))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mixer", ["las", "attention", "alibi"])
def test_a_model_reads_streams_of_unequal_lengths(mixer):
    m, x = model(mixer, positions="learned", conv=4, input_conv=3), tokens(3)
    state, want = m.state(3), m.features(x)
    m.step(x[:, :30].clone(), state, [30, 7, 12])
    at = torch.tensor([30, 7, 12])
    for lengths in ([1, 0, 1], [2, 1, 2], [2, 2, 0], [1, 1, 1]):
        n = max(lengths)
        pick = (at[:, None] + torch.arange(n)).clamp(max=59)
        o = m.step(x.gather(1, pick), state, torch.tensor(lengths))
        for b, k in enumerate(lengths):
            mine = want[b, at[b] : at[b] + k]
            torch.testing.assert_close(o[b, :k], mine, rtol=0, atol=1e-6)
        at += torch.tensor(lengths)
    assert torch.equal(state.positions, at)
    state.reorder([2, 2])
    again = m.state(1)
    again.load_state_dict(state.state_dict())
    state.reset([1])
    o = m.step(torch.stack([x[2, at[2]], x[2, 0]])[:, None], state)
    torch.testing.assert_close(o[0, 0], want[2, at[2]], rtol=0, atol=1e-6)
    torch.testing.assert_close(o[1, 0], want[2, 0], rtol=0, atol=1e-6)
    o = m.step(x[[2, 2], at[2]][:, None], again)
    torch.testing.assert_close(o[1, 0], want[2, at[2]], rtol=0, atol=1e-6)


def test_a_model_with_a_tolerance_forgets():
    m, x = model(max_rate=1.0, spacing="equal"), tokens(1, 120)
    want, state, sizes = m.features(x), m.state(1, tol=1e-6), []
    got = decode(m, x, state, (60, 1, 1))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    for _ in range(20):
        m.step(x[:, :100], state)
        sizes.append(state.nbytes)
    assert sizes[2:] == sizes[2:3] * 18
    with pytest.raises(ValueError, match="needs a score_bound"):
        model(norm="batch").state(1, tol=1e-3)


def test_models_that_do_not_decode():
    with pytest.raises(ValueError, match="only causal models decode"):
        model(causal=False).state(1)
    with pytest.raises(ValueError, match="only causal layers decode"):
        LaSAttention(16, 4, causal=False).state(1)
    m = model(positions="learned", max_len=8)
    state = m.state(1)
    m.step(tokens(1, 8), state)
    with pytest.raises(ValueError, match="learned positions reach 8 steps"):
        m.step(tokens(1, 1), state)
    with pytest.raises(ValueError, match="eval mode"):
        m.train().step(tokens(1, 1), state)


def test_a_layer_that_mixes_in_its_own_way_has_no_state_of_another():
    "Those of plain attention, or of LaS, would say something else without a word."
    for mixer in ("alibi", "local", "mta", "canon"):
        with pytest.raises(ValueError, match="mixes in its own way"):
            untrained(mixer).state(1)


def test_a_step_that_is_refused_half_way_is_told():
    m, x = model(), tokens(1)
    with torch.no_grad():
        m.blocks[1].mixer.qkv.weight.mul_(8)
    for block in m.blocks:
        block.mixer.score_bound = 9.0
    state = m.state(1)
    with pytest.raises(ValueError, match="above score_bound=9"):
        m.step(x, state)
    with pytest.raises(ValueError, match="refused half-way"):
        m.step(x[:, :1], state)
    state.reset()
    with torch.no_grad():
        m.blocks[1].mixer.qkv.weight.div_(8)
    m.step(x, state)


@pytest.mark.parametrize("mixer", ["las", "s4d"])
def test_inference_mode_may_begin_and_end_between_steps(mixer):
    m, x = model(mixer, conv=3, input_conv=3), tokens()
    want, state, found = m.features(x), m.state(2), []
    for at in range(0, 60, 20):
        with torch.inference_mode(at != 20):
            found.append(m.step(x[:, at : at + 20], state))
            state.reorder([0, 1])
            state.load_state_dict(state.state_dict())
            state.to(dtype=torch.float64)
    torch.testing.assert_close(torch.cat(found, 1), want, rtol=0, atol=1e-6)
    state.reset()


@pytest.mark.filterwarnings("ignore")
def test_quantised_models_decode_and_derive_no_bound():
    torch.manual_seed(0)
    for mixer in ("las", "attention", "alibi"):
        kw = dict(vocab=11, mixer=mixer, conv=3, input_conv=3)
        m = LaSTransformer(3, 16, 2, 4, **kw).eval()
        m = torch.ao.quantization.quantize_dynamic(m, {torch.nn.Linear})
        want = m.features(tokens())
        torch.testing.assert_close(
            decode(m, tokens(), m.state(2)), want, atol=0.1, rtol=0
        )
    m = LaSTransformer(3, 16, 2, 4, vocab=11).eval()
    m = torch.ao.quantization.quantize_dynamic(m, {torch.nn.Linear})
    for ask in (
        lambda: m.state(1, tol=1e-3),
        lambda: m.blocks[0].mixer.derive_bound(m.blocks[0].norm1),
    ):
        with pytest.raises(ValueError, match="give a score_bound") as e:
            ask()
        assert "\n" not in str(e.value)


def test_a_small_ring_goes_on_as_a_large_one():
    "What was made for the ages of few keys does not outlive them."
    a = inputs(1, 300, dtype=torch.float64, H=3)
    make_one = lambda: make(1, (0.05, 0.2, 0.8), tol=1e-3, dtype=torch.float64)
    large, small = make_one(), make_one()
    read(small, cut(a, 0, 10), [])  # tables of a ring that is not full
    large.step(*cut(a, 0, 290))
    small.load_state_dict(large.state_dict())
    for t in range(290, 300):
        want, got = (s.step(*cut(a, t, t + 1)) for s in (large, small))
        assert torch.equal(got, want)
