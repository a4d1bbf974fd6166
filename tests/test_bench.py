import functools, importlib, json
from pathlib import Path
import pytest, torch
from forked import forked
from las_nb import bench
from las_nb.fast.plan import costs_file
from las_nb.bench import (
    WAYS,
    Case,
    compare_ways,
    error_of,
    make_inputs,
    model_speed,
    peak_memory,
    peak_of,
    speed_table,
)

plans = importlib.import_module("las_nb.fast.plan")
RESULTS = Path(__file__).parents[1] / "nbs" / "results"


command = functools.partial(forked, "las_bench")


@pytest.mark.parametrize(
    "args, says",
    [
        (["--lengths", "10x"], "--lengths takes whole numbers"),
        (["--lengths", "0"], "--lengths"),
        (["--max_rate", "-1"], "--max_rate takes numbers >= 0"),
        (["--ways", "plain,fast"], "--ways must be one of 'plain', 'plain-native'"),
        (["--dtype", "float8"], "invalid choice 'float8'"),
        (["--device", "tpu"], "invalid choice 'tpu'"),
        (["--pool", "max"], "--pool is scores or weights"),
        (["--tol", "2"], "--tol must lie"),
        (["--heads", "0"], "--heads takes whole numbers"),
        (["--trained", "/nowhere"], "no folder of save_pretrained"),
    ],
)
def test_bad_options_are_explained(args, says, tmp_path):
    done = command(*args, cwd=tmp_path)
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and done.stderr.startswith("las_bench: ")
        and says in done.stderr
    )
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    done = command(
        "--lengths",
        "40",
        "--ways",
        "auto",
        "--rounds",
        "1",
        "--out",
        str(tmp_path / "file"),
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_the_command(tmp_path):
    done = command(
        "--lengths",
        "300",
        "--max_rate",
        "0.5,0.001",
        "--heads",
        "2",
        "--width",
        "8",
        "--backward",
        "--rounds",
        "2",
        "--out",
        str(tmp_path),
        "--name",
        "x",
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "x.json").read_text())
    assert (
        record["finished"]
        and record["commit"]
        and record["command"].startswith("las bench --lengths")
        and record["backward"]
    )
    assert [(c["L"], c["max_rate"]) for c in record["cases"]] == [
        (300, 0.5),
        (300, 0.001),
    ]
    for c in record["cases"]:
        assert (
            set(c["ways"]) | set(c["skipped"]) == set(WAYS)
            and c["skipped"]["flex"] == "no backward on the CPU"
        )
        assert ("sdpa" in c["skipped"]) == (c["max_rate"] * c["L"] > 80)
        assert sorted(h for g in c["plan"] for h in g["heads"]) == [0, 1]
        for name, w in c["ways"].items():
            assert 0 < w["low"] <= w["seconds"] <= w["high"] and w["rounds"] == 2
            assert w["ratio"] == pytest.approx(
                c["ways"]["plain"]["seconds"] / w["seconds"]
            )
            assert w["error"] is None if name in bench._OTHERS else w["error"] < 1e-3
            assert w["memory"] is None or w["memory"] > 0
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG" and done.stdout.count(
        "| 300 |"
    ) == 2 * (len(WAYS) - 2) - 1  # flex and alibi take no part, nor sdpa at rate 0.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "x.png"]


def test_ways_are_the_same_function():
    for pool in ("scores", "weights"):
        case = Case(L=200, heads=4, width=8, pool=pool, backward=False)
        a, rates = make_inputs(case)
        want = bench.dense(*a, rates, case)
        for name in ("auto", "linear"):
            torch.testing.assert_close(
                bench.call(WAYS[name], case, a, rates), want, rtol=0, atol=case.tol * 6
            )
        assert not torch.allclose(
            bench.call(WAYS["plain"], case, a, rates), want, atol=0.05
        )


def test_the_matrix_one_head_at_a_time(monkeypatch):
    case = Case(L=2100, heads=2, width=4)
    a, rates = make_inputs(case)
    got = bench.call(bench.dense, case, a, rates)
    monkeypatch.setattr(bench, "memory_left", lambda device: 1e6)
    with pytest.raises(bench.Skip, match="matrices need"):
        bench.call(bench.dense, case, a, rates)
    torch.testing.assert_close(
        got, bench.call(WAYS["auto"], case, a, rates), rtol=0, atol=case.tol * 6
    )


def test_errors_are_measured(monkeypatch):
    case = Case(L=150, heads=2, width=8)
    assert (
        error_of("auto", case) < 1e-3
        and error_of("plain", case) is None
        and error_of("auto", case._replace(L=5000)) is None
    )
    monkeypatch.setitem(
        WAYS,
        "wrong",
        lambda q, k, v, rates, case: 1.01 * WAYS["auto"](q, k, v, rates, case),
    )
    assert error_of("wrong", case) > 1e-3


def test_memory_that_was_free_counts_when_it_is_taken():
    "Small blocks stay with the process once freed; the next call is served from them."

    def blocks(n):
        return [bytearray(1000) for _ in range(n)]

    blocks(100_000)
    assert peak_of(lambda: blocks(50_000), "cpu") > 40e6


def test_memory_is_measured_apart():
    small, large = (
        peak_memory("dense", Case(L=L, heads=1, width=8, backward=False))
        for L in (256, 2048)
    )
    assert large > 2048**2 * 4 and large > 5 * small  # at least one matrix
    # no backward here: nothing to measure
    assert peak_memory("flex", Case(L=128)) is None


def test_skipped_ways_say_why():
    found, skipped = compare_ways(
        Case(L=200, heads=2, width=8, max_rate=9.0), ("sdpa", "flex"), rounds=1
    )
    assert (
        list(found) == ["plain"]
        and "rate * L" in skipped["sdpa"]
        and skipped["flex"] == "no backward on the CPU"
    )


def test_scaled_and_trained_inputs():
    (q, k, v), rates = make_inputs(Case(L=100, heads=3))
    (q4, k4, _), _ = make_inputs(Case(L=100, heads=3, score_scale=4.0))
    assert (
        torch.equal(q4, 4 * q)
        and torch.equal(k4, k)
        and len(rates) == 3
        and q.requires_grad
    )
    (q, k, v), rates = make_inputs(
        Case(
            L=90,
            heads=4,
            width=12,
            batch=2,
            trained=str(RESULTS / "smnist-short-las-none-0"),
        )
    )
    assert q.shape == k.shape == v.shape == (2, 4, 90, 12) and not torch.equal(
        q[0], q[1]
    )


def test_whole_models(monkeypatch):
    monkeypatch.setitem(
        bench.WHOLE_MODELS, "tiny", (50, 4, 2, dict(dim=16, depth=1, n_heads=2))
    )
    speed = model_speed("tiny", rounds=1)
    assert (
        set(speed) == {"plain", "rotary", "auto", "auto 0.5", "auto 0.001", "dense"}
        and speed["plain"]["ratio"] == 1
        and all(s["tokens_per_s"] > 0 for s in speed.values())
    )


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("bench-*.json")), ids=lambda p: p.stem
)
def test_stored_results_are_whole(path):
    record = json.loads(path.read_text())
    assert record["commit"] != "unknown" and record["name"] == path.stem
    # a GPU was lent for minutes: cut short, with tiles chosen there; the page says so
    if "gpu" not in path.stem:
        assert record["finished"] and "dirty" not in record["commit"]
    for c in record["cases"]:
        for w in c["ways"].values():
            assert w["error"] is None or w["error"] <= c["tol"]
    assert speed_table(record).count("\n") > 2


def test_it_writes_over_benchmarks_alone(tmp_path):
    quick = "--device cpu --lengths 40 --heads 2 --width 8 --rounds 1".split()
    quick += ["--max_rate", "0.5", "--ways", "plain", "--out", tmp_path]
    (tmp_path / "results.json").write_text('{"test": 1}')
    done = command(*quick, "--name", "results")
    assert done.returncode == 2 and "is no benchmark" in done.stderr
    assert (tmp_path / "results.json").read_text() == '{"test": 1}'
    for _ in range(2):
        assert command(*quick, "--name", "x").returncode == 0
    assert json.loads((tmp_path / "x.json").read_text())["finished"]
    assert not list(tmp_path.glob("*.partial.json"))
    for scale in ("nan", "0", "-1"):
        done = command(*quick, "--score_scale", scale)
        assert done.returncode == 2 and "--score_scale" in done.stderr


# --- costs of the plan, measured


def test_costs_are_measured_and_kept(own_cache):
    done = command("--calibrate", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    path = costs_file()
    found = json.loads(path.read_text())
    for side in ("causal", "two_sided"):
        assert set(found[side]) == {"dense", "sdpa", "linear"}
        for costs in found[side].values():
            assert len(costs) == 3 and min(costs) >= 0 < max(costs)
    assert str(path) in done.stdout


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"causal": 1, "two_sided": 2}', '{"causal": {}}']
)
def test_damaged_costs_are_left_aside(text, own_cache):
    costs_file().parent.mkdir(parents=True)
    costs_file().write_text(text)
    with pytest.warns(UserWarning, match="las bench --calibrate"):
        assert plans._measured_costs() == [plans._CAUSAL, plans._TWO_SIDED]


def test_costs_that_were_measured_are_used(own_cache):
    costs = {way: [n, 2 * n, 3 * n] for n, way in enumerate(plans._CAUSAL, 1)}
    costs_file().parent.mkdir(parents=True)
    costs_file().write_text(json.dumps(dict(causal=costs, two_sided=costs)))
    assert plans._measured_costs()[1]["sdpa"] == (2.0, 4.0, 6.0)


def test_a_fit_finds_the_costs_that_made_the_times():
    true, rows = (1.5, 200.0, 3e5), []
    for keys, queries, known in ((1e6, 1e3, 1e5), (1e7, 2e4, 0.0), (1e5, 3e4, 10.0)):
        units = keys * true[0] + queries * true[1] + true[2] + known
        rows.append((units * 2e-9, (keys, queries, 1.0, known)))
    assert bench._fitted(rows, 2e-9) == pytest.approx(true, rel=1e-2)
