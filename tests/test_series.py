"""Forecasts: windows in the order of time, what is refused, rules beside every score, and
the three commands from a series to its next values."""

import csv, json, math
import pytest, torch
import las_nb
from las_nb.cli import main
from las_nb.settings import Series, Table
from las_nb.tasks import DataError, Forecast, Quantiles, Task, Windows
from las_nb.tasks import beside, bounds, describe, load_task, measure
from las_nb.tasks.series import Line, in_time_order, read_series, rules, season_of
from las_nb.train import preset, train
from las_nb.train.recipe import command_line, identity, read_command

QUIET = dict(progress=False, cpu=True)
LOAD = [10 + 3 * math.sin(i * math.pi / 12) for i in range(400)]


def hour(i):
    return f"2024-03-{1 + i // 24:02d} {i % 24:02d}:00:00"


def write(path, rows, header=("date", "load")):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([header, *rows])
    return path


@pytest.fixture
def load_csv(tmp_path):
    return write(tmp_path / "load.csv", [(hour(i), x) for i, x in enumerate(LOAD)])


# --- windows


@pytest.mark.parametrize("scaling", ["none", "last", "deviation"])
def test_answers_are_put_back_whatever_the_scaling(scaling):
    x = torch.randn(60, 2).cumsum(0) + 100
    windows = Windows(x, 12, 4, 3, scaling)
    rows = windows.rows(slice(None))
    assert rows.inputs.shape == (len(windows), 4, 3) and len(windows) == 2 * 45
    centre, scale = rows.labels[:, -2:].split(1, -1)
    past = rows.inputs.flatten(1) * scale + centre
    for i in (0, 1, 17):
        start, channel = divmod(i, 2)
        assert torch.allclose(past[i], x[start : start + 12, channel], atol=1e-4)
        after = x[start + 12 : start + 16, channel]
        assert torch.equal(rows.labels[i, :4], after)
    perfect = (rows.labels[:, :-2] - centre) / scale
    found = Forecast().scores(Forecast().told(perfect, rows.labels).tolist(), windows)
    assert found["mse"] < 1e-8 and found["r2"] > 0.999


def test_windows_are_what_the_loop_wants():
    windows = Windows(torch.arange(40.0)[:, None], 8, 2, 2)
    assert windows.labels.tolist() == windows.rows(slice(None)).labels[:, 0].tolist()
    assert windows.lengths().shape == (31, 1) and windows.lengths().unique() == 4
    assert (
        len(windows.first(5).labels) == 5 == len(windows.first(5).rows(slice(None))[2])
    )


def test_nothing_is_asked_in_two_splits_and_the_test_is_the_latest():
    values = torch.arange(100.0)[:, None]
    splits = in_time_order(values, (70, 80, 100), length=10, ahead=5)
    asked = [
        set(w.rows(slice(None)).labels[:, :5].flatten().tolist())
        for w in splits.values()
    ]
    assert asked[0] == set(range(10, 70)) and asked[1] == set(range(70, 80))
    assert asked[2] == set(range(80, 100))


def test_scaling_is_learnt_from_the_training_rows_alone(tmp_path):
    x = torch.cat([torch.randn(70), 1000 + torch.randn(30)])
    made = Task.from_series(x, 2, length=4).preparation
    assert abs(made.mean[0]) < 1 and made.deviation[0] < 2


def test_missing_values_are_read_as_the_last_and_never_asked():
    x = torch.arange(60.0)
    x[20:23] = torch.nan
    windows = Windows(x[:, None], 8, 4)
    rows = windows.rows(slice(None))
    assert not rows.inputs.isnan().any() and rows.labels[:, :4].isnan().any()
    known = (~rows.labels[:, :4].isnan()).sum()
    assert Forecast().asked(rows.labels) == known < 4 * len(windows)
    assert measure(Forecast(), windows, Line().fit(windows))["mse"] < 1


# --- the goal


def test_pinball_has_its_least_at_the_quantiles_and_counts_its_band():
    goal = Quantiles((0.1, 0.5, 0.9))
    x = torch.rand(5000, 2)
    labels = torch.cat([x, torch.zeros(5000, 1), torch.ones(5000, 1)], 1)

    def said(*levels):
        outputs = torch.tensor(levels).repeat_interleave(2).expand(5000, 6)
        return goal.scores(goal.told(outputs, labels).tolist(), None)

    best = said(0.1, 0.5, 0.9)
    assert best["inside"] == pytest.approx(0.8, abs=0.02)
    for other in (said(0.2, 0.5, 0.9), said(0.1, 0.6, 0.9), said(0.1, 0.5, 0.8)):
        assert best["pinball"] < other["pinball"]
    assert best["mae"] == pytest.approx(0.25, abs=0.01)
    assert goal.each(labels) == 2 and goal.asked(labels) == 10_000


def test_a_loss_is_a_mean_over_steps():
    from las_nb.train.optim import share_loss

    labels = torch.tensor([[1.0, 3.0, 0.0, 1.0]])
    loss = share_loss(torch.zeros(1, 2), labels, 1, goal=Forecast())
    assert loss == 5  # (1 + 9) / 2


# --- rules


def test_rules_know_a_period_and_a_line():
    x = torch.tensor(LOAD)[:, None]
    assert season_of(x, 100) == 24
    windows = Windows(x, 48, 24)
    task = Task(dict, 24, in_features=1, goal=Forecast(), guesses=rules(24, 24))
    known = beside(task, dict(train=windows, test=windows))
    found = {name: scores["mse"] for name, scores in known.items()}
    assert list(found) == ["last value", "last 24", "line"]
    assert found["last value"] > 1 and found["last 24"] < 1e-4 and found["line"] < 1e-3
    # as many answers as there are quantiles
    for guess in rules(24, 24, 3).values():
        guess = guess.fit(windows) if hasattr(guess, "fit") else guess
        assert guess(windows.rows(slice(2))).shape == (2, 72)


def test_white_noise_has_no_period():
    torch.manual_seed(0)
    assert season_of(torch.randn(500, 1), 100) == 1


# --- files


def test_what_is_understood(load_csv):
    task = Task.from_series(load_csv, 24, length=48, patch=4)
    assert (task.n_classes, task.in_features, task.max_len) == (24, 4, 12)
    assert "400 rows of load; 24 values are asked after 48 (in steps of 4)" in task.note
    assert "280 rows to train, 40 to validate, 80 to test; a period of 24" in task.note
    floors, ceiling = bounds(task, load_task(task))
    assert list(floors) == ["last value", "last 24", "line"] and ceiling is None


def test_order_does_not_depend_on_the_zone_of_this_machine(tmp_path, monkeypatch):
    # in this zone 2:30 does not exist on that day, and was read as 3:30
    monkeypatch.setenv("TZ", "Europe/Berlin")
    rows = [
        (f"2024-03-31 {h:02d}:{m:02d}", h + m / 60) for h in range(24) for m in (0, 30)
    ]
    assert read_series(write(tmp_path / "x.csv", rows), Table()).gaps == 0


def mixed(rows):
    return [*rows[:5], rows[9], *rows[5:9], *rows[10:]]


@pytest.mark.parametrize(
    "rows, options, says",
    [
        (mixed, {}, "line 8: date does not rise .*sort the lines"),
        (lambda r: [*r[:7], r[6], *r[7:]], {}, "line 9: date does not rise"),
        (lambda r: r[:100], {}, "100 rows; 241 are the least to forecast 24 from 48"),
        (lambda r: r, dict(values="lod"), "no column 'lod'.*load"),
        (lambda r: [*r[:3], (r[3][0], "x"), *r[4:]], {}, "line 5: 'x' is no number"),
    ],
)
def test_one_line_says_what_is_wrong(rows, options, says, tmp_path):
    path = write(
        tmp_path / "load.csv", rows([(hour(i), x) for i, x in enumerate(LOAD)])
    )
    with pytest.raises(DataError, match=says):
        Task.from_series(path, 24, **options)


def test_settings_that_do_not_fit():
    for wrong, says in (
        (dict(quantiles=(0.9, 0.5, 0.1)), "rising"),
        (dict(quantiles=(0.1, 0.9)), "one in the middle"),
        (dict(forecast=0), "forecast must be at least 1"),
        (dict(scaling="mean"), "scaling"),
    ):
        with pytest.raises(ValueError, match=says):
            Series(**wrong)
    with pytest.raises(ValueError, match="no multiple of patch"):
        Task.from_series(torch.arange(400.0), 24, length=50, patch=4)
    with pytest.raises(ValueError, match="digits has data of its own: leave forecast"):
        preset("digits", forecast=3)
    with pytest.raises(DataError, match=r"\(T,\) or \(T, channels\)"):
        Task.from_series(torch.zeros(3, 3, 3), 1)


def test_recipes_of_before_stay_what_they_were():
    recipe = preset("series", data="x.csv", forecast=24, quantiles=(0.1, 0.5, 0.9))
    assert read_command(command_line(recipe)) == recipe
    # a task without series has the identity that it had before there were any
    assert identity(preset("digits")) == "9557a4e710bb"


# --- from a series to its next values


def las(line, capsys):
    main(line.split())
    return capsys.readouterr().out


@pytest.mark.parametrize("quantiles", [None, "0.1,0.5,0.9"])
def test_three_commands(quantiles, load_csv, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "next.csv"
    more = f"--quantiles {quantiles}" if quantiles else ""
    said = las(
        f"train --data {load_csv} --forecast 24 --length 48 --patch 4 --dim 16 --depth 1 "
        f"--epochs 30 --lr 0.005 --out {run} --cpu {more}",
        capsys,
    )
    assert "by rules, on the test: last value MSE" in said
    record = json.loads((run / "results.json").read_text())
    assert record["task"] == "series" and record["name"] == "load-las-none-0"
    assert list(record["trivial"]) == ["last value", "last 24", "line"]
    assert record["beside"]["line"]["mse"] < 0.01 > record["mse"]
    assert ("inside" in record) == bool(quantiles)
    assert f"MSE {record['mse']:.4g}" in las(f"eval {run} --cpu", capsys)
    assert "of 329 sequences" in las(f"eval {run} --cpu --data {load_csv}", capsys)
    las(f"predict {run} --data {load_csv} --out {out} --cpu", capsys)
    rows = list(csv.reader(out.open()))
    names = [f"load {q}" for q in ("0.1", "0.5", "0.9")] if quantiles else ["load"]
    assert rows[0] == ["date", *names] and len(rows) == 25
    assert [r[0] for r in rows[1:3]] == [hour(400), hour(401)]
    model = las_nb.load(run)
    ahead = model.forecast(torch.tensor(LOAD))
    middle = ahead[1] if quantiles else ahead
    wanted = torch.tensor(
        [10 + 3 * math.sin(i * math.pi / 12) for i in range(400, 424)]
    )
    assert (middle[:, 0] - wanted).abs().mean() < 1.5
    assert float(rows[1][len(rows[1]) // 2]) == pytest.approx(
        middle[0, 0].item(), abs=1e-3
    )
    with pytest.raises(DataError, match="use forecast"):
        model([LOAD])
    with pytest.raises(DataError, match="47 rows; the model reads 48"):
        model.forecast(torch.zeros(47))
    with pytest.raises(DataError, match="2 channels; the model reads 1"):
        model.forecast(torch.zeros(100, 2))


def test_channels_share_a_model_and_keep_their_units(tmp_path):
    x = torch.tensor(LOAD)
    task = Task.from_series(torch.stack([x, 1000 + 50 * x.roll(6)], 1), 12, length=24)
    sizes = dict(dim=16, depth=1, epochs=6)
    train(task, tmp_path / "run", options=QUIET, readout="last", lr=4e-3, **sizes)
    ahead = las_nb.load(tmp_path / "run").forecast(torch.stack([x, 1000 + 50 * x], 1))
    assert ahead.shape == (12, 2)
    assert 5 < ahead[:, 0].mean() < 15 and 1200 < ahead[:, 1].mean() < 1800


def test_commands_refuse_in_one_line(load_csv, capsys):
    for words, says in (
        (f"--data {load_csv} --forecast 24 --target load", "leave target out"),
        (f"--data {load_csv} --forecast 24 --quantiles 0.9,0.1", "rising"),
        ("series", "this is for a file of your own"),
    ):
        with pytest.raises(SystemExit):
            main(["train", *words.split(), "--cpu"])
        assert says in capsys.readouterr().err


# --- ETTh1


def test_the_months_of_etth1(tmp_path):
    from las_nb.tasks import TASKS

    (tmp_path / "ETT-small").mkdir()
    days = [
        f"{2016 + m // 12}-{1 + m % 12:02d}-{d:02d}"
        for m in range(21)
        for d in range(1, 29)
    ]
    rows = [(f"{d} {h:02d}:00:00", h, k) for k, d in enumerate(days) for h in range(24)]
    path = write(
        tmp_path / "ETT-small" / "ETTh1.csv", rows[:14_000], ("date", "a", "b")
    )
    with pytest.raises(DataError, match="cut short"):
        load_task("etth1-96", tmp_path)
    hours = range(14_500)
    rows = [(h, math.sin(h * math.pi / 12), h) for h in hours]
    write(path, rows, ("date", "a", "b"))
    splits = load_task("etth1-96", tmp_path)
    sizes = [(8640 - 336 - 96 + 1) * 2, (2880 - 96 + 1) * 2, (2880 - 96 + 1) * 2]
    assert [len(s.labels) for s in splits.values()] == sizes
    seen = splits["train"].values
    assert seen.mean(0).abs().max() < 1e-3 and abs(seen.std(0) - 1).max() < 1e-3
    assert TASKS["etth1-720"].n_classes == 720
    assert "| test | 5,570 | 14 to 14, mean 14 | - | - |" in describe(
        "etth1-96", tmp_path
    )
