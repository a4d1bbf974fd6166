"""The command `las`: quick to say what it knows, one line for what it does not."""

import functools, json, subprocess, sys
from pathlib import Path
import pytest
from forked import forked
from las_nb.settings import Train, flat
from las_nb._command import parse
from las_nb.train import command_line, preset
from las_nb.train.recipe import read_command

LAS = Path(sys.executable).parent / "las"
LAYER = """
from torch import nn
from las_nb import register_mixer
class Same(nn.Linear):
    def __init__(self, dim, gain=1.0):
        super().__init__(dim, dim)
        self.gain = gain
register_mixer("same", Same)
"""
SMALL = "--dim 8 --depth 1 --n-heads 2 --limit 40 --epochs 1 --cpu".split()


las = functools.partial(forked, "las")


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "las experiments"),
        (["train", "--help"], "--optimizer.lr FLOAT"),
        (["bench", "--help"], "--score_scale"),
        (["train", "digits", "--lrr", "3"], "did you mean lr"),
        (["compare", "grid.toml", "--action", "shwo"], "shwo"),
        (["trian"], "did you mean train"),
    ],
)
def test_help_and_refusals_come_before_torch(words, says):
    code = f"""
import sys, time
from las_nb.cli import main
try:
    main({words!r})
except SystemExit as e:
    print("code", e.code)
assert "torch" not in sys.modules
print("CPU", time.process_time())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout + done.stderr
    assert float(done.stdout.split()[-1]) < 1  # seconds of one core, not of a clock


@pytest.mark.parametrize(
    "said",
    [
        "digits --model.dim 64 --no-prenorm --positions none",
        "--dim=64 digits --prenorm false",
        "--prenorm=false --model.dim=64 digits",
        "digits --no_prenorm --dim 64 --mixer.name las",
    ],
)
def test_short_and_long_names_mean_the_same(said):
    asked, given = parse(Train, said.split(), "las train")
    assert (asked.model.dim, asked.model.prenorm, asked.task) == (64, False, "digits")
    changes = {name: flat(asked)[name] for name in given}
    changed = preset("digits", dim=64, prenorm=False)
    assert preset("digits", **changes) == changed


def test_values_keep_their_types():
    said = "--window 0.5 0.25 0.25 digits --mixer.n_state 16 --mixer.real=true --lr 1"
    asked, _ = parse(Train, said.split(), "las train")
    assert asked.mixer.window == (0.5, 0.25, 0.25)
    assert asked.mixer.options == dict(n_state=16, real=True)
    assert asked.optimizer.lr == 1.0 and asked.seed == 0
    asked, _ = parse(Train, "digits --window 5".split(), "las train")
    assert asked.mixer.window == 5


@pytest.mark.parametrize("window", [5, (1.0,), (0.5, 0.5), (0.5,)])
def test_a_window_survives_its_command(window):
    recipe = preset("digits", window=window)
    assert read_command(command_line(recipe)) == recipe


def test_a_layer_from_outside_in_every_command(tmp_path):
    (tmp_path / "my_layers.py").write_text(LAYER)
    words = ["train", "digits", "--model", "same", *SMALL, "--out", "run"]
    without = las(*words, cwd=tmp_path)
    assert without.returncode == 2 and "named with --import" in without.stderr
    imported = ["--import", "my_layers"]
    done = las(*words, "--mixer.gain=2", *imported, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "run" / "results.json").read_text())["command"]
    assert said.endswith("--import my_layers")
    assert read_command("las train digits --import a") == preset("digits")
    for command in (["eval", "run", "--cpu"], words + ["--resume"]):
        lost = las(*command, cwd=tmp_path)
        assert lost.returncode == 2 and lost.stderr.count("\n") == 1
        assert "there is no mixer 'same'" in lost.stderr and "--import" in lost.stderr
        assert las(*command, *imported, cwd=tmp_path).returncode == 0
    wrong = las(*words, "--mixer.gian=2", *imported, cwd=tmp_path)
    assert wrong.returncode == 2 and "did you mean gain" in wrong.stderr


def test_a_reader_that_has_seen_enough(tmp_path):
    line = f"{LAS} experiments list --results {tmp_path} | head -1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert "waiting" in done.stdout and done.stderr == ""
