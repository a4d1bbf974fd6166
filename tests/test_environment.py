"""Commands and runs in odd environments: they work, or say in one line what to do."""

import os, pwd, signal, subprocess, sys
from pathlib import Path
import pytest
import las_nb._util as util
import las_nb.train.loop as lib
from las_nb._command import parse
from las_nb.cli import main
from las_nb.compare import read_toml
from las_nb.model import LaSTransformer
from las_nb.results.record import migrate_records, read_record, read_records
from las_nb.results.record import write_record
from las_nb.settings import Compare, Eval, Train
from las_nb.tasks import DataError, data_root
from las_nb.tasks.listops import write_listops
from las_nb.tasks.pathfinder import write_pathfinder
from las_nb.train import load_run, train

LAS = [sys.executable, "-c", "from las_nb.cli import main; main()"]
TINY = dict(dim=8, depth=1, n_heads=2, limit=16, epochs=1, batch_size=8)
QUIET = dict(progress=False, cpu=True)


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A home folder, and a folder to work in."
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


# --- what a launcher or a scheduler leaves behind


@pytest.mark.parametrize(
    "name, value, instead",
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--accumulate"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "0", "--accumulate"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "--precision"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--compile"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5", "--clip"),
        ("ACCELERATE_USE_FSDP", "true", "unset it"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "unset it"),
        ("ACCELERATE_USE_ANYTHING_NEW", "1", "unset it"),
        ("LOCAL_RANK", "1", "torchrun"),
        ("WORLD_SIZE", "two", "whole number"),
        ("WORLD_SIZE", "", "whole number"),
        ("LOCAL_RANK", "abc", "whole number"),
        ("OMPI_COMM_WORLD_SIZE", "abc", "whole number"),
        ("ACCELERATE_TORCH_DEVICE", "meta", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_what_would_change_a_run_unseen_is_refused(
    name, value, instead, tmp_path, monkeypatch
):
    for known in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name) as e:
        train("digits", tmp_path / "r", options=QUIET, **TINY)
    assert instead in str(e.value) and not (tmp_path / "r").exists()


def test_what_the_launcher_says_by_itself_is_no_wish(tmp_path, monkeypatch):
    "The variables that `accelerate launch` sets when nothing is asked."
    for name, value in dict(
        ACCELERATE_USE_CPU="False",
        ACCELERATE_MIXED_PRECISION="no",
        ACCELERATE_DYNAMO_BACKEND="NO",
        ACCELERATE_DYNAMO_MODE="default",
        ACCELERATE_DYNAMO_USE_FULLGRAPH="False",
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS="1",
        ACCELERATE_USE_FSDP="false",
    ).items():
        monkeypatch.setenv(name, value)
    assert train("digits", tmp_path / "r", options=QUIET, **TINY)["device"] == "cpu"


def test_products_below_float32_are_on_record(tmp_path, monkeypatch):
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 sets what this sets."
    import torch

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        record = train("digits", tmp_path / "r", options=QUIET, **TINY)
    finally:
        torch.set_float32_matmul_precision(before)
    assert record["precision"] == "no (float32 matmul: high)"


@pytest.mark.parametrize(
    "world, rank, first",
    [
        (None, None, True),
        (None, "1", True),
        ("1", "3", True),
        ("2", "0", True),
        ("2", "1", False),
        ("", "", True),
    ],
)
def test_who_is_first(world, rank, first, monkeypatch):
    for name, value in dict(WORLD_SIZE=world, RANK=rank).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert util.is_first() == first


def test_a_stray_rank_swallows_nothing(home, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        main(["train", "nosuchtask"])
    assert "task must be one of" in capsys.readouterr().err
    main(
        [
            "train",
            "digits",
            "--out=r",
            "--cpu",
            *(f"--{k}={v}" for k, v in TINY.items()),
        ]
    )
    assert "weights, curves.png" in capsys.readouterr().out


# --- homes


@pytest.mark.parametrize(
    "kind, words, option",
    [
        (Train, ["digits", "--out=~/x"], "run.out"),
        (Train, ["digits", "--root", "~/x"], "run.root"),
        (Eval, ["~/x"], "checkpoint"),
        (Compare, ["--results=~/r", "~/x"], "grid"),
    ],
)
def test_commands_know_where_home_is(kind, words, option, home):
    found, _ = parse(kind, words, "las")
    for name in option.split("."):
        found = getattr(found, name)
    assert found == str(home / "x")


def test_functions_know_where_home_is(home):
    train("digits", "~/run", options=QUIET, **TINY)
    assert (home / "run" / "results.json").exists() and not Path("~").exists()
    model, recipe = load_run("~/run")
    assert recipe.model.dim == 8
    LaSTransformer.from_pretrained("~/run").save_pretrained("~/copy")
    assert (home / "copy" / "model.safetensors").exists() and not Path("~").exists()


def test_files_that_are_written_and_read_lie_at_home(home):
    record = dict(name="x", command="", curve={}, test=50.0)
    write_record("~/results", "x", record)
    assert read_record("~/results", "x") == record
    assert len(read_records(Path("~/results/runs.jsonl"))) == 1
    assert migrate_records(home / "none") == 0
    write_listops("~/lists", 12, jobs=1, low=20, high=60)
    write_pathfinder("~/paths", 32, 12, jobs=1)
    (home / "grid.toml").write_text("a = 1")
    assert read_toml("~/grid.toml") == dict(a=1) and not Path("~").exists()
    made = {p.name for p in home.iterdir()}
    assert made == {"results", "lists", "paths", "grid.toml"}


def test_nobody_has_a_home(monkeypatch, capsys):
    "As in a container with a user that has no name."

    def nobody(*_):
        raise KeyError("no such user")

    for name in ("HOME", "XDG_CACHE_HOME", "LAS_NB_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        data_root()
    with pytest.raises(SystemExit):
        main(["eval", "~/run"])
    assert capsys.readouterr().err.endswith("in ~/run: set HOME\n")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert data_root() == Path("/cache/las_nb")


# --- nobody listens


def said(line, **env):
    "What a shell says of a line, in which $LAS is the command."
    las = f"'{LAS[0]}' -c '{LAS[2]}'"
    done = subprocess.run(
        line.replace("$LAS", las),
        shell=True,
        capture_output=True,
        text=True,
        env=os.environ | env,
    )
    return done.returncode, done.stdout, done.stderr


def test_closed_and_full_streams():
    assert said("$LAS --help >&-") == (0, "", "")
    assert said("$LAS train digits --lrr 3 2>&-")[0] == 2
    code, _, err = said("$LAS train --help <&- >/dev/full")
    assert code == 2 and err == "-c: No space left on device: standard output\n"
    assert said("$LAS train --help | head -1")[1:] == (
        "usage: las train [-h] [OPTIONS] TASK\n",
        "",
    )
    # an encoding that knows no boxes
    plain = dict(PYTHONIOENCODING="ascii", LC_ALL="C")
    assert said("$LAS train --help | tail -5", **plain)[2] == ""


def test_a_run_that_nobody_listens_to(tmp_path):
    "Its standard streams are closed; no file of the run takes their place."
    options = " ".join(f"--{k}={v}" for k, v in TINY.items())
    out = tmp_path / "r"
    line = f"$LAS train digits --cpu --out {out} {options} <&- >&- 2>&-"
    assert said(line)[0] == 0 and (out / "results.json").exists()


def test_a_bar_whose_reader_has_gone(tmp_path):
    options = [f"--{k}={v}" for k, v in TINY.items()]
    read, write = os.pipe()
    os.close(read)
    words = ["train", "digits", "--cpu", "--out", tmp_path / "r", *options]
    done = subprocess.run([*LAS, *words], stderr=write, stdout=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 0 and b"weights, curves.png" in done.stdout


# --- signals


class _Run:
    signal = None


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_is_heard_unless_nohup(ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        run = _Run()
        with lib._listening(run):
            # the shell and the system both tell
            for _ in range(2):
                signal.raise_signal(signal.SIGHUP)
        assert run.signal == (None if ignored else signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "value, only, says",
    [("", "nothing-*", "no experiment"), ("abc", "smnist-las-none-0", "WORLD_SIZE")],
)
def test_lists_of_runs_in_odd_launchers(value, only, says, tmp_path):
    words = ["experiments", "run", "--only", only]
    env = os.environ | dict(WORLD_SIZE=value)
    done = subprocess.run(
        [*LAS, *words], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert says in done.stderr


def test_stopped_while_it_loads(tmp_path, monkeypatch, capsys):
    def late(words):
        raise KeyboardInterrupt

    monkeypatch.setattr("las_nb.cli._obey", late)
    with pytest.raises(SystemExit) as e:
        main(["experiments", "list"])
    assert e.value.code == 130 and "stopped at once" in capsys.readouterr().err
