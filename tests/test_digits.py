import json, os, re, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from forked import forked
from pages import NBS
from las_nb.digits import MODELS, accuracy, fit, make_model
from las_nb.results import plot_maps, plot_summary, table
from las_nb.tasks.digits import digits_data
from las_nb._util import replace_file
from las_nb.model import LaSTransformer

COMMAND = str(Path(sys.executable).with_name("las_digits"))
RESULTS = json.loads((NBS / "results" / "digits.json").read_text())


class NoBar:
    def update(self, n):
        pass

    def set_postfix(self, **values):
        pass


def few(n=64):
    data = digits_data()
    return {k: v[:n] for k, v in data.items()}


def test_the_split_is_fixed_and_disjoint():
    a, b = digits_data(), digits_data()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert a["x_train"].shape == (1347, 64, 1) and a["x_test"].shape == (450, 64, 1)
    assert a["y_test"].bincount().min() >= 43  # every class, in equal parts


def test_training_is_deterministic_by_seed():
    runs = []
    for seed in (0, 0, 1):
        model = make_model("LaS", seed)
        runs.append(
            (
                fit(model, few(), epochs=2, seed=seed, bar=NoBar()),
                torch.cat([p.flatten() for p in model.parameters()]),
            )
        )
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][1], runs[2][1])


def test_every_model_can_learn_by_heart():
    "A hundred steps on 16 digits: a loop or model with a bug does not get there."
    for name in MODELS:
        model, data = make_model(name), few(16)
        history = fit(model, data, epochs=100, bar=NoBar())
        assert history["loss"][-1] < 0.3 * history["loss"][0], name
        assert accuracy(model, data["x_train"], data["y_train"]) > 80, name


def test_the_four_models_differ_in_nothing_but_what_they_should():
    models = [make_model(name) for name in MODELS]
    states = [m.state_dict() for m in models]
    for s in states[1:]:
        assert all(torch.equal(s[k], states[0][k]) for k in states[0])


def test_command_end_to_end(tmp_path):
    done = subprocess.run(
        [
            COMMAND,
            "--epochs",
            "1",
            "--seeds",
            "3",
            "--out",
            str(tmp_path / "new" / "folder"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "new" / "folder"
    results = json.loads((out / "digits.json").read_text())
    assert [(r["name"], r["seed"]) for r in results["runs"]] == [(n, 3) for n in MODELS]
    for key in (
        "name",
        "task",
        "command",
        "commit",
        "device",
        "torch",
        "seconds",
        "finished",
    ):
        assert results[key]
    for r in results["runs"]:
        assert len(r["curve"]["test"]) == len(r["curve"]["loss"]) == r["epochs"] == 1
        data, model = digits_data(), LaSTransformer.from_pretrained(out / r["weights"])
        assert accuracy(model, data["x_test"], data["y_test"]) == pytest.approx(
            r["test"], abs=0.5
        )
    assert (out / "digits.png").read_bytes()[:4] == b"\x89PNG"
    assert table(results["runs"]) in done.stdout and "digits.png" in done.stdout
    assert all(f"{name:17s}" in done.stderr for name in MODELS)  # a progress bar each
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    "args, says",
    [
        (["--seeds", "a"], "--seeds takes whole numbers"),
        (["--epochs", "0"], "at least 1"),
        (["--jobs", "0"], "at least 1"),
        (["--out", "/dev/null/x"], "cannot write to /dev/null/x"),
        (["--epochs", "many"], "invalid literal for int"),
        (["--lr", "1"], "there is no option --lr"),
    ],
)
def test_bad_calls_end_with_one_line_and_code_2(args, says):
    done = forked("las_digits", *args)
    assert (
        done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    )


def test_ctrl_c_ends_the_command_and_its_workers(tmp_path):
    p = subprocess.Popen(
        [COMMAND, "--out", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # background jobs of a shell inherit that it is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    seen = ""
    # the first bar: training has begun
    while "seed 0" not in seen:
        seen += (c := p.stderr.read(1))
        assert c, seen
    os.killpg(p.pid, signal.SIGINT)
    _, err = p.communicate(timeout=30)
    assert (
        p.returncode == 2
        and "stopped" in err
        and "Traceback" not in seen + err
        and not (tmp_path / "digits.json").exists()
    )
    for _ in range(50):  # Python's own resource tracker may take a moment
        if not group_lives(p.pid):
            break
        time.sleep(0.2)
    else:
        pytest.fail("a process outlived the command")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_do_not_outlive_the_command(number, tmp_path):
    (tmp_path / "digits.json").write_text("{}")  # of an earlier measurement
    p = subprocess.Popen(
        [COMMAND, "--out", str(tmp_path), "--jobs", "1"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    seen = ""
    while "seed 0" not in seen:
        seen += (c := p.stderr.read(1))
        assert c, seen
    p.send_signal(number)
    p.communicate(timeout=30)
    assert not (tmp_path / "digits.json").exists()
    for _ in range(75):
        if not group_lives(p.pid):
            return
        time.sleep(0.2)
    os.killpg(p.pid, signal.SIGKILL)
    pytest.fail("a process outlived the command")


def group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    target = tmp_path / "f"
    replace_file(target, b"old")
    monkeypatch.setattr(
        os,
        "replace",
        lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(OSError):
        replace_file(target, b"new")
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_stored_results_say_what_the_page_says():
    by = {name: [r for r in RESULTS["runs"] if r["name"] == name] for name in MODELS}
    assert all([r["seed"] for r in runs] == [0, 1, 2] for runs in by.values())
    assert len({r["params"] for r in RESULTS["runs"]}) == 1
    mean = {name: sum(r["test"] for r in runs) / 3 for name, runs in by.items()}
    assert mean["LaS"] - mean["plain"] >= 7
    assert abs(mean["LaS + positions"] - mean["plain + positions"]) < 3
    assert re.fullmatch(r"[0-9a-f]{7,}", RESULTS["commit"]), (
        "results come from a committed state"
    )
    for name, f in {"plain": "digits-plain", "LaS": "digits-las"}.items():
        data, model = digits_data(), LaSTransformer.from_pretrained(NBS / "results" / f)
        assert accuracy(model, data["x_test"], data["y_test"]) == pytest.approx(
            by[name][0]["test"], abs=0.5
        )


def test_summary_figure_is_drawn_without_a_display(tmp_path):
    models = {name: make_model(name) for name in ("plain", "LaS")}
    plot_summary(RESULTS["runs"], models, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 20_000


def test_shortest_runs_have_a_schedule():
    # 2 and 10 steps
    for epochs in (1, 5):
        fit(make_model("plain"), few(64), epochs=epochs, bar=NoBar())


def test_maps_of_a_model_with_positions_are_its_own():
    from matplotlib.figure import Figure

    model, x = make_model("LaS + positions"), digits_data()["x_test"][0]
    axs = Figure().subplots(1, 5, squeeze=False)
    plot_maps({"LaS + positions": model}, x, axs)
    block = model.blocks[0]
    want = (
        block.mixer.weights(block.norm1(model.embedded(x[None])))[0, 3].detach().sqrt()
    )
    assert torch.allclose(torch.tensor(axs[0, 4].images[0].get_array()), want)
    with pytest.raises(ValueError, match="'plain'"):
        make_model("las")
