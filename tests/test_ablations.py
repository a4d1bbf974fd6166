"Variants of LaS, probes, and tests beyond the training length."

import json
from collections import Counter
from pathlib import Path
import pytest, torch
from las_nb.mixers import LaSVariant
from las_nb.mixers.variant import filter_keys
from las_nb.mixers import Attention, Local
from las_nb.las import las_weights
from las_nb.locality import decayed_scores
from las_nb.mixers import LaSAttention
from las_nb.model import LaSTransformer
from las_nb.tasks import Batch, bounds, load_task
from las_nb.tasks.probes import ORDERS, PROBES, probe
from las_nb.smoothing import window_weights
from las_nb.lengths import lengths_main, score_at, stretched
from las_nb.settings import Lengths
from las_nb.train import attention_entropy, load_run, train
import las_nb.train.loop as lib

QUIET = dict(progress=False, cpu=True)


def noise(*shape, seed=1):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def twins(a, b):
    "Two layers with the same projections."
    a.double()
    b.double()
    b.load_state_dict(a.state_dict(), strict=False)
    return a, b


# --- variants


@pytest.mark.parametrize("pool", ["scores", "weights"])
@pytest.mark.parametrize("window", [1, 3, 6])
@pytest.mark.parametrize("spacing", ["geometric", "uniform", "equal"])
def test_an_unchanged_variant_is_las(pool, window, spacing):
    options = dict(
        dim=16, n_heads=4, max_rate=0.4, window=window, pool=pool, spacing=spacing
    )
    fast, variant = twins(LaSAttention(**options), LaSVariant(**options))
    x, lengths = noise(3, 33, 16), torch.tensor([33, 7, 20])
    for n in None, lengths:
        a, b = fast(x, n), variant(x, n)
        for row, (u, v) in enumerate(zip(a, b)):
            torch.testing.assert_close(
                u[: 33 if n is None else n[row]],
                v[: 33 if n is None else n[row]],
                atol=1e-9,
                rtol=1e-7,
            )
    torch.testing.assert_close(
        variant.weights(x), las_weights(*fast.heads(x)[:2], fast.rates, window, pool)
    )


def test_equal_rates_are_equal_and_none_is_plain():
    assert (
        LaSVariant(16, 4, max_rate=0.2, spacing="equal").rates.tolist()
        == LaSAttention(16, 4, max_rate=0.2, spacing="equal").rates.tolist()
        == [pytest.approx(0.2)] * 4
    )


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_filter_starts_as_las(window):
    a, b = twins(
        LaSAttention(16, 4, window=window),
        LaSVariant(16, 4, window=window, learn="filter"),
    )
    # the taps begin as float32
    torch.testing.assert_close(
        a(noise(2, 30, 16)), b(noise(2, 30, 16)), atol=1e-7, rtol=1e-5
    )


def test_filter_by_loops():
    k, taps = noise(1, 2, 9, 3), noise(2, 4, seed=2)
    for h in range(2):
        for j in range(9):
            want = (
                sum(taps[h, t] * k[0, h, j - t] for t in range(4) if t <= j)
                * 4
                / min(4, j + 1)
            )
            torch.testing.assert_close(filter_keys(k, taps)[0, h, j], want)


def test_learned_rates_start_where_they_were_and_stay_positive():
    layer = LaSVariant(16, 4, learn="both").double()
    torch.testing.assert_close(
        layer.current_rates()[1:], LaSAttention(16, 4).rates[1:].double()
    )
    layer(noise(2, 30, 16)).square().sum().backward()
    assert (layer.raw_rates.grad.abs() > 0).all() and (layer.taps.grad.abs() > 0).any(
        1
    ).all()
    with torch.no_grad():
        layer.raw_rates -= 50
    assert (layer.current_rates() > 0).all() and (layer.current_rates() < 1e-6).all()


@pytest.mark.parametrize("reach", [1, 5, 40])
def test_reach_is_a_sliding_window(reach):
    a, b = twins(
        Local(16, 4, reach=reach),
        LaSVariant(16, 4, max_rate=0.0, window=1, reach=reach),
    )
    torch.testing.assert_close(a(noise(2, 40, 16)), b(noise(2, 40, 16)))


@pytest.mark.parametrize("kind", [LaSVariant, LaSAttention])
def test_rotary_is_that_of_attention(kind):
    a, b = twins(
        Attention(16, 4, rotary=True),
        kind(16, 4, max_rate=0.0, window=1, rotary=True),
    )
    torch.testing.assert_close(a(noise(2, 40, 16)), b(noise(2, 40, 16)))


@pytest.mark.parametrize("pool", ["scores", "weights"])
@pytest.mark.parametrize("window", [2, 3, (0.2, 0.5, 0.3), 50])
def test_centred_windows_are_means_of_what_is_seen(window, pool):
    "Written down key by key; and the future moves nothing."
    layer = LaSVariant(8, 2, 0.3, window, pool, align="centred").double()
    x = noise(1, 12, 8)
    got = layer.weights(x)[0]
    q, k, _ = layer.heads(x)
    e = decayed_scores(q, k, layer.rates)[0]
    w = window_weights(window).tolist()
    ahead = len(w) // 2
    want = torch.zeros_like(got)
    for i in range(12):
        a = e[:, i, : i + 1].softmax(-1)
        pooled = torch.zeros(2, i + 1, dtype=torch.float64)
        for j in range(i + 1):  # the window of key j, as far as i sees it
            inside = {j + ahead - t: w[t] for t in range(len(w))}
            inside = {n: u for n, u in inside.items() if 0 <= n <= i}
            total = sum(inside.values()) / sum(w)
            for n, u in inside.items():
                if pool == "scores":
                    pooled[:, j] += u / total * e[:, i, n]
                else:
                    pooled[:, n] += u / total * a[:, j]
        want[:, i, : i + 1] = pooled.softmax(-1) if pool == "scores" else pooled
    torch.testing.assert_close(got, want)
    y = torch.cat([x[:, :7], noise(1, 5, 8, seed=2)], 1)
    torch.testing.assert_close(layer(y)[:, :7], layer(x)[:, :7], rtol=0, atol=0)


def test_rotary_las_is_its_matrices():
    own = dict(max_rate=0.5, window=3, rotary=True)
    a, b = twins(LaSAttention(16, 4, **own), LaSVariant(16, 4, **own))
    x = noise(2, 300, 16)
    torch.testing.assert_close(a(x), b(x))
    torch.testing.assert_close(a.weights(x), b.weights(x))


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(learn="all"), "learn must be"),
        (dict(reach=0), "reach must be"),
        (dict(learn="filter", pool="weights"), "use pool='scores'"),
        (dict(spacing="log"), "spacing"),
        (dict(align="ahead"), "align must be"),
        (dict(align="centred", learn="filter"), "use align='back'"),
    ],
)
def test_wrong_variants_are_explained(options, says):
    with pytest.raises(ValueError, match=says):
        LaSVariant(16, 4, **options)


# --- what a record says


def test_entropy_of_even_attention_is_one_and_of_a_choice_zero():
    model = LaSTransformer(
        4, 16, 2, 4, vocab=10, max_rate=0.0, window=1, positions="sinusoidal"
    )
    data = probe("needle", limit=20)["train"]
    for b in model.blocks:
        torch.nn.init.zeros_(b.mixer.qkv.weight)
    assert all(
        h == pytest.approx(1, abs=1e-6)
        for block in attention_entropy(model, data)
        for h in block
    )
    for b in model.blocks:
        b.mixer.qkv.weight.data[:32] = 1e4 * torch.randn(32, 16)
    assert all(h < 0.2 for h in attention_entropy(model, data)[0])
    assert (
        attention_entropy(LaSTransformer(4, 16, 2, 4, vocab=10, mixer="s4d"), data)
        is None
    )
    assert attention_entropy(model, data, longest=32) is None


def test_entropy_leaves_padding_out():
    model = LaSTransformer(4, 16, 2, 4, vocab=10, causal=False).double()
    x = probe("needle", limit=8)["train"]
    padded = x._replace(
        inputs=torch.cat([x.inputs, torch.full((8, 20), 3)], 1),
        lengths=torch.full((8,), 64),
    )
    torch.testing.assert_close(
        torch.tensor(attention_entropy(model, x)),
        torch.tensor(attention_entropy(model, padded)),
    )


def test_a_record_holds_norms_and_entropy(tmp_path):
    r = train("needle", tmp_path, options=QUIET, length=40, limit=64, epochs=3)
    assert r["length"] == 40 and torch.tensor(r["entropy"]).shape == (2, 4)
    assert len(r["curve"]["norm"]) == len(r["curve"]["worst"]) == 3
    assert all(n > 0 for n in r["curve"]["norm"]) and all(
        w >= l for w, l in zip(r["curve"]["worst"], r["curve"]["loss"])
    )


def test_a_share_is_read_again_and_again(tmp_path, monkeypatch):
    seen, cut = [], lib.batches

    def spy(split, size, order=None, *args, **kw):
        if len(split.labels) == 128:
            seen.append(order)
        return cut(split, size, order, *args, **kw)

    monkeypatch.setattr(lib, "batches", spy)
    train("motif", tmp_path / "a", options=QUIET, limit=128, epochs=2, share=0.25)
    train("motif", tmp_path / "b", options=QUIET, limit=128, epochs=1)
    parts = [o for o in seen if len(o) == 128]
    assert sorted(parts[0].tolist()) == sorted(list(range(32)) * 4) and sorted(
        parts[-2].tolist()
    ) == list(range(128))


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(share=0.0), "share must lie"),
        (dict(share=1.5), "share must lie"),
        (dict(task="digits", length=99), "leave length out"),
        (dict(length=8), "32 steps"),
    ],
)
def test_wrong_shares_and_lengths_are_explained(changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        train(
            changes.pop("task", "needle"),
            tmp_path / "run",
            options=QUIET,
            limit=32,
            epochs=1,
            **changes,
        )


# --- probes


@pytest.mark.parametrize("name", PROBES)
def test_probes_repeat_and_splits_differ(name):
    a, b = probe(name, 48), probe(name, 48)
    for part in a:
        assert torch.equal(a[part].inputs, b[part].inputs) and torch.equal(
            a[part].labels, b[part].labels
        )
    rows = [tuple(r) for part in a for r in a[part].inputs.tolist()]
    assert len(set(rows)) > 0.99 * len(rows)
    assert not torch.equal(probe(name, 48, seed=1)["train"].inputs, a["train"].inputs)


@pytest.mark.parametrize("L", [32, 47, 48, 64, 80, 96, 128, 333])
def test_one_order_of_a_motif_leads_alone(L):
    "Counted from left to right, as a reader does who knows nothing of slots."
    x, y, _ = PROBES["motif"](300, L, torch.Generator().manual_seed(2))
    for row, label in zip(x.tolist(), y.tolist()):
        found = [t for t in zip(row, row[1:], row[2:]) if sorted(t) == [8, 9, 10]]
        assert len(found) == L // 16
        (first, most), *rest = Counter(found).most_common()
        assert tuple(ORDERS[label].tolist()) == first
        assert not rest or rest[0][1] < most


@pytest.mark.parametrize("name", PROBES)
def test_floors_and_ceiling_of_probes(name):
    for L in (32, 64, 100):
        floors, ceiling = bounds(name, load_task(name, length=L, limit=300))
        assert ceiling == 100 and len(floors) == 2
        assert all(0 < score < 100 for score in floors.values()) or L == 32


def test_a_record_holds_floors_and_ceiling(run):
    record = json.loads((run / "needle-las-0" / "results.json").read_text())
    assert record["ceiling"] == 100
    assert set(record["trivial"]) == {"majority class", "most frequent token"}


@pytest.mark.parametrize("name", [n for n in PROBES if n != "motif"])
def test_only_what_decides_decides(name):
    """The label can be told from the marked tokens alone: sequences that agree there
    agree in their labels."""
    x, y, deciding = PROBES[name](3000, 40, torch.Generator().manual_seed(0))
    known = {}
    for row, label, mask in zip(x.tolist(), y.tolist(), deciding.tolist()):
        key = tuple(t if m else -1 for t, m in zip(row, mask))
        assert known.setdefault(key, label) == label


# --- longer than trained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train("needle", folder / "needle-las-0", options=QUIET, limit=64, epochs=1)
    return folder


def test_lengths_are_measured_once(run, tmp_path, capsys):
    where = dict(results=str(tmp_path), cpu=True)
    lengths_main(Lengths(str(run), "64,128", tokens=2000, **where))
    first = json.loads((tmp_path / "lengths.json").read_text())
    found = first["runs"]["needle-las-0"]["found"]
    assert {L: f["n"] for L, f in found.items()} == {"64": 31, "128": 15} and first[
        "runs"
    ]["needle-las-0"]["trained_at"] == 64
    lengths_main(Lengths(str(run), "64,128,256", tokens=9000, **where))
    again = json.loads((tmp_path / "lengths.json").read_text())["runs"]["needle-las-0"][
        "found"
    ]
    assert again["64"] == found["64"] and again["256"]["n"] == 35
    model, _ = lib.load_run(run / "needle-las-0")
    again = score_at(model, "needle", 64, 31)
    assert (again["right"], again["n"]) == (found["64"]["right"], 31)


@pytest.mark.parametrize(
    "lengths, only, says",
    [
        ("64,x", "*-0", "whole numbers"),
        ("0", "*-0", "whole numbers"),
        ("64", "", "--only names runs"),
        ("64", "nothing*", "no finished run"),
        ("8", "*-0", "32 steps"),
    ],
)
def test_wrong_lengths_are_explained(run, lengths, only, says, tmp_path, capsys):
    try:
        lengths_main(Lengths(str(run), lengths, only, results=str(tmp_path), cpu=True))
    except SystemExit as e:
        assert e.code == 2
    out = capsys.readouterr()
    assert says in out.out + out.err


def test_other_runs_of_the_same_name_are_not_passed_over(run, tmp_path, capsys):
    asked = Lengths(str(run), "64", tokens=640, results=str(tmp_path), cpu=True)
    lengths_main(asked)
    path = tmp_path / "lengths.json"
    found = json.loads(path.read_text())
    mine = found["runs"]["needle-las-0"]
    for broken in (mine | dict(identity="another"), 3, {}, mine | dict(found=[])):
        path.write_text(json.dumps(dict(runs={"needle-las-0": broken})))
        with pytest.raises(SystemExit):
            lengths_main(asked)
        said = capsys.readouterr().err
        assert "has another run called" in said or "is damaged" in said


@pytest.mark.parametrize("causal", [True, False])
def test_entropy_of_blocks_is_a_share_of_what_a_block_has(causal):
    model = LaSTransformer(4, 16, 1, 4, vocab=10, mixer="las-chunk", causal=causal)
    torch.nn.init.zeros_(model.blocks[0].mixer.qkv.weight)
    torch.nn.init.zeros_(model.blocks[0].mixer.qkv.bias)
    data = Batch(torch.randint(10, (2, 150)), None, torch.zeros(2).long())
    [shares] = attention_entropy(model, data)
    torch.testing.assert_close(torch.tensor(shares), torch.ones(4))


def test_stretched_models_are_those_of_slower_rates():
    torch.manual_seed(0)
    given = dict(vocab=9, n_heads=4, window=3)
    model = LaSTransformer(3, 8, 2, max_rate=0.4, **given).eval()
    slow = LaSTransformer(3, 8, 2, max_rate=0.1, **given).eval()
    slow.load_state_dict(model.state_dict())
    tokens = torch.randint(9, (2, 50))
    other = stretched(model, 4.0)
    torch.testing.assert_close(other(tokens), slow(tokens))
    assert other.config["stretch"] == 4.0
    assert model.blocks[0].mixer.plain_rates[-1] == 0.4
    with pytest.raises(ValueError, match="stretch must be a number above 0"):
        stretched(model, 0)
    plain = LaSTransformer(3, 8, 1, vocab=9, n_heads=2, mixer="attention")
    with pytest.raises(ValueError, match="no option 'stretch'"):
        stretched(plain, 2.0)


def test_lengths_may_be_read_with_stretched_rates(tmp_path):
    small = dict(limit=60, epochs=1, dim=8, depth=1, n_heads=2)
    run = tmp_path / "runs" / "needle-las-0"
    train("needle", run, options=dict(progress=False, cpu=True), **small)
    where = dict(results=str(tmp_path), cpu=True, tokens=2000)
    for stretch in (False, True):
        folder = str(run.parent)
        lengths_main(Lengths(folder, "64,128", "needle-*", stretch=stretch, **where))
    runs = json.loads((tmp_path / "lengths.json").read_text())["runs"]
    assert sorted(runs) == ["needle-las-0", "needle-las-0-stretched"]
    as_is, slow = (runs[n]["found"] for n in sorted(runs))
    assert as_is["64"]["right"] == slow["64"]["right"]  # nothing to stretch
    assert slow["128"]["command"].endswith("--stretch")
    model, _ = load_run(run)
    wanted = score_at(stretched(model, 2.0), "needle", 128, 15)
    assert wanted.items() <= slow["128"].items()


def test_weights_kept_beside_their_record_are_read(tmp_path):
    "The book's own have no recipe in their folder."
    kept = Path(__file__).parents[1] / "nbs" / "results" / "memory"
    assert not (kept / "needle-las-0" / "recipe.json").exists()
    asked = dict(only="needle-las-0", lengths="64", tokens=6400, cpu=True)
    lengths_main(Lengths(str(kept), results=str(tmp_path), **asked))
    found = json.loads((tmp_path / "lengths.json").read_text())["runs"]
    measured = found["needle-las-0"]
    assert measured["trained_at"] == 64
    assert measured["found"]["64"]["right"] > 90  # of a hundred
