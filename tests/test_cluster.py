"""Grids on a Ray cluster of this machine: what a killed worker leaves is gone on with."""

import os, signal, subprocess, sys, time
from pathlib import Path
import psutil, pytest
from filelock import FileLock
from las_nb.results.record import read_records
from las_nb.train import checkpoints, train

pytest.importorskip("ray")
LAS = Path(sys.executable).parent / "las"
SMALL = dict(dim=16, depth=1, n_heads=2, limit=200, epochs=3, batch_size=4)
GRID = """
seeds = [0]
cost = false
[tasks.digits]
{settings}
[mixers.las]
[mixers.mine]
"""
LAYER = """
from torch import nn
from las_nb import register_mixer
class Mean(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.out = nn.Linear(dim, dim)
    def forward(self, x):
        return self.out(x.cumsum(1))
register_mixer("mine", Mean)
"""


def workers(process):
    "Processes of Ray that make a run now, by the name that Ray gives them."
    found = psutil.Process(process.pid).children(recursive=True)
    return [
        p for p in found if p.is_running() and "ray::_call" in " ".join(p.cmdline())
    ]


@pytest.fixture(autouse=True)
def one_cluster_at_a_time(tmp_path_factory):
    "Two that start at once on two cores wait for each other, minutes long."
    with FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock"):
        yield


def wait_for(condition, process, seconds=600):
    "What a condition gives once it holds, while a command is running."
    until = time.time() + seconds
    while time.time() < until:
        if found := condition():
            return found
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("nothing happened")


def start(tmp_path, **changes):
    "A grid with a layer of one's own, started on two cores of this machine."
    settings = SMALL | changes
    settings = "\n".join(f"{name} = {value}" for name, value in settings.items())
    (tmp_path / "tiny.toml").write_text(GRID.format(settings=settings))
    (tmp_path / "my_layers.py").write_text(LAYER)
    words = "compare tiny.toml --out runs --results results --cpu --on ray"
    quick = ["--save_minutes", "0", "--import", "my_layers"]
    return subprocess.Popen(
        [LAS, *words.split(), *quick],
        cwd=tmp_path,
        env=os.environ | dict(RAY_raylet_start_wait_time_s="600"),
        # whatever started these tests may ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_worker_loses_nothing(tmp_path):
    command = start(tmp_path)
    run = tmp_path / "runs" / "tiny" / "digits-las-0"
    first = wait_for(lambda: checkpoints(run), command)[-1]
    victims = wait_for(lambda: workers(command), command)
    for p in victims:
        p.send_signal(signal.SIGKILL)
    out, err = command.communicate(timeout=600)
    assert command.returncode == 0, err
    assert "2 of 2 finished" in out
    records = read_records(tmp_path / "results" / "tiny.jsonl")
    assert set(records) == {"tiny/digits-las-0", "tiny/digits-mine-0"}
    whole = train("digits", tmp_path / "whole", options=dict(cpu=True), **SMALL)
    assert records["tiny/digits-las-0"]["curve"] == whole["curve"]
    assert int(first.name[11:]) >= 0  # there was a checkpoint before the kill


def test_ctrl_c_saves_every_run(tmp_path):
    "So many epochs that the run cannot end before the signal comes."
    command = start(tmp_path, epochs=100_000)
    run = tmp_path / "runs" / "tiny" / "digits-las-0"
    wait_for(lambda: checkpoints(run), command)
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=600)
    assert command.returncode == 130 and "go on with the same command" in err
    assert checkpoints(run) and not (run / "results.json").exists()
