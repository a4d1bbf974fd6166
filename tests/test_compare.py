"""Grids: what a file may say, equal numbers of parameters, what is concluded from
seeds, and the command from start to end."""

import json, math, os, re, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from forked import forked
from las_nb.compare import (
    count,
    equalised,
    load_cells,
    parse_toml,
    parts,
    read_grid,
    spread,
    summarise,
)
from las_nb.results import (
    compare_table,
    paired_difference,
    plot_differences,
    plot_tradeoff,
)
from las_nb.experiments import experiments
from las_nb.settings import stored
from las_nb.train import preset
from pages import ROOT

BIN = Path(sys.executable).parent
TINY = """
seeds = [0, 1]
[tasks.digits]
limit = 96
epochs = 1
dim = 16
depth = 1
n_heads = 2
[mixers.las]
[mixers.s4d]
n_state = 8
[mixers.attention]
positions = ["none", "rotary"]
"""


@pytest.fixture
def grid(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "tiny.toml").write_text(TINY)
    return tmp_path


def las_compare(folder, *args, env=None):
    where = "--cpu --results results --out runs".split()
    return forked("las_compare", "tiny.toml", *args, *where, cwd=folder, env=env)


def test_cells_are_the_product_seeds_outermost(grid):
    cells = read_grid(grid / "tiny.toml")
    labels = ["las", "s4d", "attention-none", "attention-rotary"]
    assert list(cells) == [
        f"tiny/digits-{label}-{seed}" for seed in (0, 1) for label in labels
    ]
    assert (
        cells["tiny/digits-s4d-1"]["mixer_options"] == dict(n_state=8)
        and cells["tiny/digits-attention-none-0"]["positions"] is None
    )
    assert [parts(n) for n in cells][:2] == [
        ("digits", "las", 0),
        ("digits", "s4d", 0),
    ] and parts("a-b/smnist-x-2-y-3") == ("smnist", "x-2-y", 3)


def test_runs_of_other_grids_count_where_settings_are_the_same(grid):
    ours = "seeds = [0]\nalso = ['other']\n[tasks.digits]\nlimit = 96\nepochs = 1\n"
    ours += "[mixers.las]\n[mixers.wide]\nmixer = 'las'\nwindow = 7\n"
    (grid / "tiny.toml").write_text(ours)
    cells = read_grid(grid / "tiny.toml")
    kept = dict(test=50.0, params=1, tokens_per_s=1.0, curve={})
    records = []
    for label, changed in ("a", dict(window=7)), ("b", dict(window=7, lr=1e-4)):
        recipe = preset(**cells["tiny/digits-las-0"] | changed)
        about = dict(task="digits", model="las", seed=0, command="", name=label)
        records.append(kept | about | dict(recipe=stored(recipe)))
    lines = "\n".join(map(json.dumps, records)) + "\n"
    (grid / "results" / "other.jsonl").write_text(lines)
    found = load_cells(cells, grid / "results", also=["other"])
    assert {n: r["name"] for n, r in found.items()} == {"tiny/digits-wide-0": "a"}
    assert not load_cells(cells, grid / "results")
    listed = las_compare(grid, "--action", "list")
    assert "1 of 2 cells are runs of other" in listed.stdout
    assert "tiny/digits-las-0" in listed.stdout and "wide" not in listed.stdout
    (grid / "tiny.toml").write_text(ours.replace("['other']", "'other'"))
    refused = las_compare(grid, "--action", "list")
    assert refused.returncode == 2 and "also must be a list" in refused.stderr


def test_a_list_is_an_axis():
    assert [
        label
        for label, _ in spread("las", dict(window=[1, 3], pool=["scores", "weights"]))
    ] == ["las-1-scores", "las-1-weights", "las-3-scores", "las-3-weights"]
    assert spread("x", dict(mixer="las")) == [("x", dict(mixer="las"))]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "nbs" / "grids").glob("*.toml")), ids=lambda p: p.stem
)
def test_the_grids_of_the_book_are_equal_within_three_percent(path):
    cells = {name: args for name, args in read_grid(path).items() if args["seed"] == 0}
    for task in {parts(name)[0] for name in cells}:
        mine = {
            parts(name)[1]: count(args)
            for name, args in cells.items()
            if parts(name)[0] == task
        }
        base = mine[parse_toml(path)["reference"]]
        assert all(abs(n - base) <= 0.03 * base for n in mine.values()), mine
        if path.stem == "full" or (path.stem, task) == ("laptop", "digits"):
            models = {
                args["model"] for name, args in cells.items() if parts(name)[0] == task
            }
            assert models == {
                "las",
                "las-chunk",
                "attention",
                "alibi",
                "local",
                "linear",
                "performer",
                "linformer",
                "s4d",
                "sgconv",
                "hyena",
                "mega",
            }
        if (path.stem, task) == ("laptop", "listops"):
            assert len(mine) == 6


def test_equalising_counts_right_and_refuses_what_cannot_be():
    args = dict(task="digits", model="s4d", dim=16, depth=2, n_heads=2)
    target = count(dict(args, model="las"))
    wide = equalised(args, target)
    assert abs(count(wide) - target) <= 0.03 * target and wide["feedforward"] != 64
    assert equalised(dict(args, model="las"), target) == dict(args, model="las")
    with pytest.raises(ValueError, match="give it smaller options"):
        equalised(dict(args, model="hyena"), target)
    before = torch.get_rng_state()
    count(args)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "text, says",
    [
        ("seeds = [", "is no TOML"),
        ("", "names no tasks"),
        ("sedes = [1]", "did you mean seeds"),
        ("[tasks.digts]", "did you mean digits"),
        ("[tasks.digits]\n[mixers.mgea]", "did you mean mega"),
        ("[tasks.digits]\nepoch = 3", "no option 'epoch'"),
        ("[tasks.digits]\nlr = -1", "lr must be above 0"),
        ("[tasks.digits]\n[mixers.s4d]\nwindow = 3", "s4d has no window"),
        ("[tasks.digits]\n[mixers.linformer]", "cannot be causal"),
        (
            "[tasks.digits]\nmixers = ['mega']\n[mixers.las]",
            "mixers must be one of 'las'",
        ),
        ("reference = 'mega'\n[tasks.digits]", "reference must be"),
        ("[tasks.digits]\n[mixers.s4d]\nstates = 4", "no option 'states'"),
        ("imports = ['no_such_module']\n[tasks.digits]", "no_such_module"),
        ("seeds = 3\n[tasks.digits]", "seeds must be a list"),
        ("tasks = 3", "tasks must be tables"),
        ("[tasks.digits]\n[mixers]\nlas = 3", "mixers must be tables"),
    ],
)
def test_wrong_grids_are_explained(grid, text, says):
    (grid / "tiny.toml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(says)) as e:
        read_grid(grid / "tiny.toml")
    assert "\n" not in str(e.value)


def test_the_command_says_it_in_one_line(grid):
    (grid / "tiny.toml").write_text("sedes = [1]")
    for args in ("--action", "list"), ("--action", "draw"):
        done = las_compare(grid, *args)
        assert (
            done.returncode == 2
            and done.stderr.startswith("las_compare: ")
            and done.stderr.count("\n") == 1
        ), done.stderr


def test_layers_from_elsewhere_are_imported(grid):
    (grid / "elsewhere.py").write_text(
        "import torch\nfrom las_nb.mixers import register_mixer\nclass "
        "Mean(torch.nn.Module):\n    def __init__(self, dim):\n        "
        "super().__init__(); self.out = torch.nn.Linear(dim, dim)\n    def "
        "forward(self, x): return self.out(x)\nregister_mixer('mean', Mean)\n"
    )
    (grid / "tiny.toml").write_text(
        'imports = ["elsewhere"]\n' + TINY + "[mixers.mean]\n"
    )
    done = las_compare(
        grid, "--action", "list", env=dict(os.environ, PYTHONPATH=str(grid))
    )
    assert done.returncode == 0 and done.stdout.count("tiny/digits-mean-") == 2, (
        done.stderr
    )


def test_the_list_of_experiments_has_the_full_grid():
    done = subprocess.run(
        [BIN / "las_experiments", "list", "--only", "full/*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 0
        and len(done.stdout.splitlines())
        == len(read_grid(ROOT / "nbs/grids/full.toml"))
        and not any("/" in name for name in experiments())
    )


# --- statistics


def test_paired_intervals_are_those_of_scipy():
    from scipy.stats import ttest_rel

    a, b = {0: 91.2, 1: 93.1, 2: 90.8, 5: 1.0}, {0: 90.1, 1: 92.5, 2: 90.9, 7: 3.0}
    mean, low, high = paired_difference(a, b)
    want = ttest_rel(
        [a[s] for s in range(3)], [b[s] for s in range(3)]
    ).confidence_interval(0.95)
    assert mean == pytest.approx((1.1 + 0.6 - 0.1) / 3) and (
        low,
        high,
    ) == pytest.approx((want.low, want.high))
    assert paired_difference({0: 3.0}, {0: 1.0}) == (2.0, -math.inf, math.inf)
    with pytest.raises(ValueError, match="no seed in common"):
        paired_difference({0: 3.0}, {1: 1.0})


def test_intervals_cover_as_often_as_they_say():
    torch.manual_seed(0)
    hits = 0
    for _ in range(1000):
        d = torch.randn(2, 3)
        mean, low, high = paired_difference(
            dict(enumerate(d[0].tolist())), dict(enumerate(d[1].tolist()))
        )
        hits += low <= 0 <= high
    assert 930 <= hits <= 970


def record(test, params=10):
    return dict(test=test, params=params, tokens_per_s=5.0)


def test_rows_and_table():
    records = {
        "g/digits-las-0": record(90.0),
        "g/digits-las-1": record(92.0),
        "g/digits-mega-0": record(95.0),
        "g/digits-mega-1": record(93.0),
        "g/digits-s4d-0": record(80.0),
        "g/listops-las-0": record(1.0),
    }
    rows = summarise(records, "digits")
    assert (
        [r["label"] for r in rows] == ["mega", "las", "s4d"]
        and rows[0]["mean"] == 94
        and rows[0]["error"] == pytest.approx(1.0)
        and rows[2]["error"] is None
    )
    assert rows[0]["difference"][0] == 3.0 and rows[1]["difference"][0] == 0
    cost = {
        "las": dict(seconds=0.2, tokens_per_s=100.0, memory=2**20),
        "mega": dict(seconds=0.5, tokens_per_s=40.0, memory=None),
    }
    lines = compare_table(rows, cost).splitlines()
    assert (
        len(lines) == 5
        and "| mega | 94.0 ± 1.0 | +3.0 (" in lines[2]
        and "| 2.50 | 40 | - |" in lines[2]
        and "| las | 91.0 ± 1.0 | - | 10 | 1.00 | 100 | 1 |" in lines[3]
        and "-10.0 (one seed)" in lines[4]
    )
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axs = plt.subplots(1, 2)
    plot_tradeoff(rows, cost, axs[0], floors={"guess": 90.0})
    plot_differences(rows, axs[1])
    assert {t.get_text() for t in axs[0].texts} >= {"mega 94.0", "las 91.0"} and [
        t.get_text() for t in axs[1].get_yticklabels()
    ] == ["s4d", "mega"]
    plt.close(fig)


# --- the command


def test_from_start_to_end_through_a_cut(grid):
    args = [
        BIN / "las_compare",
        "tiny.toml",
        "--cpu",
        "--results",
        "results",
        "--out",
        "runs",
    ]
    first = subprocess.Popen(
        args, cwd=grid, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for _ in range(600):
        if (grid / "results" / "tiny.jsonl").exists():
            break
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    first.communicate()
    done = (grid / "results" / "tiny.jsonl").read_text().splitlines()
    assert done and len(done) < 9
    again = las_compare(grid)
    assert again.returncode == 0 and "8 of 8 finished" in again.stdout, again.stderr
    # what was there is not made again
    now = (grid / "results" / "tiny.jsonl").read_text().splitlines()
    assert now[: len(done)] == done
    cells = read_grid(grid / "tiny.toml")
    records = load_cells(cells, grid / "results")
    assert len(records) == 8 and all(
        abs(r["params"] - records["tiny/digits-las-0"]["params"]) <= 0.03 * r["params"]
        for r in records.values()
    )
    cost = json.loads((grid / "results" / "tiny" / "cost.json").read_text())
    assert cost["command"] == "las compare tiny.toml" and all(
        c["memory"] > 0 and c["low"] <= c["seconds"] <= c["high"]
        for c in cost["tasks"]["digits"].values()
    )
    assert (grid / "results" / "tiny" / "digits.png").read_bytes()[
        :4
    ] == b"\x89PNG" and "| s4d |" in again.stdout
    command = records["tiny/digits-attention-rotary-1"]["command"]
    assert (
        command.startswith("las train digits --model attention --")
        and "--positions rotary" in command
    )
    shown = las_compare(grid, "--action", "show")
    assert shown.returncode == 0 and "| s4d |" in shown.stdout
    # another model in place of one that was measured, and a record without its size
    changed = TINY.replace("n_state = 8", "n_state = 16").replace(
        "epochs = 1", "epochs = 2"
    )
    (grid / "tiny.toml").write_text(changed)
    shown = las_compare(grid, "--action", "show")
    assert "8 of them with other settings" in shown.stderr and shown.returncode == 0
    row = next(line for line in shown.stdout.splitlines() if line.startswith("| s4d |"))
    assert row.split("|")[5].strip() == row.split("|")[7].strip() == "-"
    (grid / "tiny.toml").write_text(TINY)
    lines = (grid / "results" / "tiny.jsonl").read_text()
    (grid / "results" / "tiny.jsonl").write_text(lines.replace('"params":', '"size":'))
    lacking = las_compare(grid, "--action", "show")
    assert lacking.returncode == 2 and "lacks one of" in lacking.stderr
    (grid / "results" / "tiny.jsonl").write_text("{")
    broken = las_compare(grid, "--action", "show")
    assert broken.returncode == 2 and "is no results file" in broken.stderr


def test_names_of_tasks_may_have_dashes(monkeypatch):
    from las_nb.tasks import TASKS

    monkeypatch.setitem(TASKS, "my-digits", TASKS["digits"])
    assert parts("g/my-digits-las-chunk-2") == ("my-digits", "las-chunk", 2)
    assert parts("g/digits-las-0") == ("digits", "las", 0)


def test_a_cost_is_measured_again_for_another_model(grid):
    from las_nb import compare

    path, cells = grid / "cost.json", read_grid(grid / "tiny.toml")
    cells = {n: a for n, a in cells.items() if "-las-0" in n or "-s4d-0" in n}
    compare._write_cost(path, cells, "tiny.toml", None, True)
    before = path.read_bytes()
    compare._write_cost(path, cells, "tiny.toml", None, True)
    assert path.read_bytes() == before
    wider = {n: a | dict(feedforward=9) for n, a in cells.items()}
    assert compare._known_cost(path, wider) == {}
    assert set(compare._known_cost(path, cells)["digits"]) == {"las", "s4d"}


def test_a_command_repeats_a_cell(grid):
    "What a record says in `command` is the recipe of the cell."
    from las_nb.train import command_line
    from las_nb.train.recipe import read_command

    for args in read_grid(grid / "tiny.toml").values():
        recipe = preset(**args)
        assert read_command(command_line(recipe)) == recipe
