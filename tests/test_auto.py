"""Settings from the data: what is said stands, a run is whole without the preset, and
what is timed is what it costs."""

import csv, json, math
import pytest, torch
from las_nb.cli import main
from las_nb.settings import flat, read_recipe
from las_nb.tasks import Batch, DataError, Sequences, Task
from las_nb.train import chosen, preset, suited, train
from las_nb.train.auto import in_words, size_of
from las_nb.train.recipe import identity, read_command

QUIET = dict(progress=False, cpu=True)


@pytest.fixture
def waves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        [i % 2, *[round(math.sin(r * t), 3) for t in range(12)]]
        for i, r in enumerate(0.2 + i % 2 * 0.6 + i / 400 for i in range(60))
    ]
    with open("waves.csv", "w", newline="") as f:
        csv.writer(f).writerows([["kind", *(f"t{i}" for i in range(12))], *rows])
    return tmp_path / "waves.csv"


def test_the_run_is_whole_without_the_preset(waves, capsys):
    line = (
        "train --data waves.csv --target kind --preset auto --epochs 2 --dim 16 --cpu"
    )
    main(line.split())
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(
        "48 training sequences of up to 12 steps: las train table"
    )
    assert said[1].startswith("about ") and said[1].endswith(" on this machine")
    record = json.loads(
        (waves.parent / "runs/waves-las-none-0/results.json").read_text()
    )
    recipe = read_recipe(record["recipe"])
    assert recipe.preset == "fast" and record["command"] in said[0]
    assert (recipe.optimizer.epochs, recipe.model.dim) == (2, 16)  # as was said
    assert recipe.model.depth == suited(48, 12)["depth"]
    assert identity(read_command(record["command"])) == record["identity"]
    main([*line.split(), "--resume"])
    with pytest.raises(SystemExit):
        main([*line.replace("--dim 16", "--dim 32").split(), "--resume"])
    assert "has dim 16, not 32" in capsys.readouterr().err


def test_a_run_that_was_cut_goes_on(waves):
    import time
    from las_nb.train import Stopped

    say = dict(data="waves.csv", target="kind", preset="auto", epochs=3)
    early = QUIET | dict(deadline=time.monotonic())
    with pytest.raises(Stopped):
        train("table", "run", options=early, **say)
    record = train("table", "run", resume=True, options=QUIET, **say)
    whole = train("table", "whole", options=QUIET, **say)
    assert record["curve"]["loss"] == whole["curve"]["loss"]


def test_a_series_is_no_larger_for_its_windows(waves, tmp_path):
    x = torch.arange(600.0).div(4).sin()
    task = Task.from_series(x, 4, length=16)
    record = train(task, tmp_path / "run", options=QUIET, preset="auto", epochs=1)
    recipe = read_recipe(record["recipe"])
    assert (recipe.model.dim, recipe.model.readout) == (32, "last")


@pytest.mark.parametrize("model", ["attention", "plain", "s4d", "canon"])
def test_every_layer_can_be_chosen_for(model):
    recipe, said = chosen("needle", model=model, limit=80, epochs=1)
    assert recipe.mixer.name == model and f"--model {model}" in said


def test_settings_follow_size_and_length():
    few, many = suited(100, 64), suited(100_000, 64)
    assert few["dim"] < many["dim"] and few["depth"] < many["depth"]
    assert few["epochs"] == 60 and many["epochs"] == 3
    updates = [
        suited(n, 64)["epochs"] * n / suited(n, 64)["batch_size"]
        for n in (1000, 5000, 20_000)
    ]
    assert all(1500 <= u < 2000 for u in updates)
    assert "conv" not in suited(5000, 64, tokens=True) and suited(5000, 64)["conv"] == 4
    assert suited(1500, 3328, tokens=True)["epochs"] < suited(1500, 64)["epochs"]
    for n, length in (1, 1), (10**7, 10**5):
        preset("smnist", **suited(n, length))  # allowed


def test_one_odd_sequence_does_not_decide():
    lengths = torch.tensor([10] * 99 + [5000])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    split = Sequences(torch.zeros(int(starts[-1]), 1), starts, torch.zeros(100))
    assert size_of(split) == (100, 10)
    batch = Batch(torch.zeros(7, 9, 2), None, torch.zeros(7))
    assert size_of(batch) == (7, 9)
    assert size_of(Batch(torch.zeros(7, 9), None, torch.zeros(7)), tokens=True) == (
        7,
        9,
    )


def test_a_guess_of_the_time_has_its_unit():
    assert in_words(7200) == "2.0 hours" and in_words(3) == "3 seconds"


def test_what_cannot_be_chosen_is_one_line(waves):
    with pytest.raises(ValueError, match="presets of its own"):
        chosen("language")
    with pytest.raises(ValueError, match="reads the data first"):
        preset("digits", preset="auto")
    with pytest.raises(DataError, match="there is no"):
        chosen("table", data="nothing.csv", target="kind")
    assert flat(chosen("table", data="waves.csv", target="kind")[0])["preset"] == "fast"
