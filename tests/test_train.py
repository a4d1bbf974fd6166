import errno, json, math, os, re, resource, shlex, shutil, signal, subprocess, sys, time
from pathlib import Path
import psutil, pytest, torch
from forked import forked as las
from torchvision.datasets import MNIST
import las_nb.cli, las_nb.experiments
import las_nb.train.checkpoint, las_nb.train.loop as lib
from las_nb.results.record import read_record, read_records, record_file
from las_nb.tasks import DataError, TASKS, load_task
from las_nb.model import LaSTransformer
from las_nb.cli import main
from las_nb.experiments import experiments, status
from las_nb.settings import flat, read_recipe, short_names, stored
from las_nb.train.recipe import read_command
from las_nb.train import (
    Stopped,
    Trainer,
    TrainingError,
    best_precision,
    build,
    checkpoints,
    command_line,
    learning_rate,
    load_checkpoint,
    load_run,
    preset,
    presets,
    save_checkpoint,
    score,
    train,
)

BIN = Path(sys.executable).parent
SMALL = dict(dim=16, depth=1, n_heads=2, limit=96, epochs=2, batch_size=32)
ARGS = [f"--{k}={v}" for k, v in SMALL.items()]
QUIET = dict(progress=False, cpu=True)


def weights(folder):
    return LaSTransformer.from_pretrained(folder).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nobody disturbed."
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, train("digits", out, options=QUIET, **SMALL)


# --- recipes


@pytest.mark.parametrize("task", TASKS)
def test_presets_build_a_model_that_runs(task):
    about = TASKS[task]
    for name in presets(task):
        recipe = preset(task, preset=name)
        model = build(recipe)
        inputs = (
            torch.randn(2, 16, about.in_features or 1)
            if about.vocab is None
            else torch.randint(about.vocab, (2, 2, 16) if about.pairs else (2, 16))
        )
        each = (16,) if about.any_text else ()  # an answer at every position
        assert model(inputs).shape == (2, *each, about.n_classes)
        # survives a file
        assert read_recipe(json.loads(json.dumps(stored(recipe)))) == recipe
        assert command_line(recipe) == f"las train {task}" + f" --preset {name}" * (
            name != "fast"
        )


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(lrr=1), "no option 'lrr'; did you mean lr"),
        (dict(norm="bath"), "did you mean batch"),
        (dict(epochs=1.5), "epochs must be int"),
        (dict(epochs=0), "at least 1"),
        (dict(lr=0), "above 0"),
        (dict(lr=math.nan), "above 0"),
        (dict(warmup=1), "below 1"),
        (dict(clip=-1), "above 0"),
        (dict(prenorm=1), "prenorm must be bool"),
        (dict(window=[]), "window must be int or numbers"),
        (dict(positions="rotery"), "did you mean rotary"),
        (dict(limit=0), "limit must be at least 1"),
        (dict(model="mamba"), "there is no mixer 'mamba'"),
        (dict(schedule="cosin"), "did you mean cosine"),
        (dict(model="plain", max_rate=0.1), "plain attention has no max_rate"),
        (dict(epochs=True), "epochs must be int"),
    ],
)
def test_wrong_options_are_explained(changes, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        build(preset("digits", **changes))


def test_whole_numbers_will_do_for_lr():
    lr = preset("digits", lr=1).optimizer.lr
    assert lr == 1.0 and isinstance(lr, float)


def test_command_line_repeats_the_recipe(monkeypatch):
    for changes in (
        dict(),
        dict(model="plain", positions="sinusoidal", seed=3),
        dict(prenorm=False, limit=7, lr=1e-4, positions="learned", norm="batch"),
        dict(window=(0.5, 0.25, 0.25), score_bound=3.0),
        dict(model="s4d", mixer_options=dict(n_state=4, learn="rates")),
    ):
        try:
            recipe, seen = preset("digits", **changes), {}
        except ValueError:  # not every layer has every option
            changes["mixer_options"].pop("learn")
            recipe, seen = preset("digits", **changes), {}
        said = command_line(recipe)
        assert read_command(said) == recipe

        def see(task, **kw):
            seen.update(task=task, **kw)
            raise ZeroDivisionError

        monkeypatch.setattr(las_nb.train, "train", see)
        with pytest.raises(ZeroDivisionError):
            main(shlex.split(said)[1:])
        for name in ("options", "out", "resume"):
            seen.pop(name)
        assert preset(seen.pop("task"), **seen) == recipe


def test_weight_decay_spares_vectors():
    groups = lib.parameter_groups(build(preset("digits")), 0.5)
    assert (
        all(p.ndim >= 2 for p in groups[0]["params"])
        and all(p.ndim < 2 for p in groups[1]["params"])
        and groups[1]["weight_decay"] == 0
    )


@pytest.mark.parametrize("schedule", ["cosine", "constant", "plateau"])
def test_schedules(schedule):
    r = preset("digits", schedule=schedule, lr=1.0, warmup=0.2)
    rates = [learning_rate(r.optimizer, s, 50) for s in range(50)]
    assert (
        rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
        and max(rates) == 1
    )
    assert rates[-1] < 0.01 if schedule == "cosine" else rates[-1] == 1
    assert learning_rate(r.optimizer, 30, 50, drops=2) == (
        0.25 if schedule == "plateau" else rates[30]
    )


def test_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, want in (
        ((9, 0), "bf16"),
        ((8, 0), "bf16"),
        ((7, 5), "fp16"),
        ((7, 0), "fp16"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability)
        assert best_precision() == want and best_precision(cpu=True) == "no"


# --- a run


def test_a_run_leaves_everything(whole):
    out, record = whole
    assert json.loads((out / "results.json").read_text()) == record
    assert set(
        "name command commit task model positions seed device torch params epochs "
        "curve valid test seconds_per_epoch cpu_seconds tokens_per_s peak_memory "
        "finished".split()
    ) < set(record)
    assert (
        record["name"] == "digits-las-none-0"
        and record["epochs"] == 2
        and record["valid"] == record["curve"]["valid"][-1]
    )
    assert (
        all(len(c) == 2 for c in record["curve"].values())
        and record["peak_memory"] > 1e7
        and record["tokens_per_s"] > 100
    )
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG" and not checkpoints(out)
    found = score(out)
    assert found["accuracy"] == pytest.approx(record["test"]) and found["n"] == 96
    assert found["nats"] == pytest.approx(record["nats"], abs=1e-5)
    assert score(out, "valid")["accuracy"] == pytest.approx(record["valid"])


def test_it_learns(tmp_path):
    "Above chance by far, in the time of a test."
    record = train(
        "digits",
        tmp_path / "r",
        epochs=5,
        dim=32,
        depth=2,
        norm="batch",
        positions="sinusoidal",
        options=QUIET,
    )
    assert (
        record["test"] > 60
        and record["curve"]["loss"][-1] < 0.5 * record["curve"]["loss"][0]
    )


def test_first_loss_is_by_hand(tmp_path):
    "One epoch of one step: its loss is the untrained model's."
    record = train(
        "digits", tmp_path / "r", options=QUIET, **SMALL | dict(limit=32, epochs=1)
    )
    batch = load_task("digits", limit=32)["train"]
    model = build(preset("digits", **SMALL))
    assert record["curve"]["loss"][0] == pytest.approx(
        torch.nn.functional.cross_entropy(model(batch.inputs), batch.labels).item(),
        rel=1e-4,
    )


@pytest.mark.parametrize(
    "changes",
    [
        dict(schedule="plateau", patience=0),
        dict(norm="batch", prenorm=False),
        dict(dropout=0.3, readout="last"),
        dict(model="plain", positions="learned"),
        dict(schedule="constant", warmup=0.0),
        dict(pool="weights", causal=False),
    ],
)
def test_options_run_and_runs_repeat(changes, tmp_path):
    a, b = (
        train("digits", tmp_path / n, options=QUIET, **SMALL | changes) for n in "ab"
    )
    assert a["curve"] == b["curve"] and same(
        weights(tmp_path / "a"), weights(tmp_path / "b")
    )


def test_seed_decides(whole, tmp_path):
    train("digits", tmp_path / "r", seed=1, options=QUIET, **SMALL)
    assert not same(weights(whole[0]), weights(tmp_path / "r"))


def test_padded_tasks_train(tmp_path, monkeypatch):
    "Tokens, lengths, padding: a task that a later chapter might add."
    from las_nb.tasks import Batch, Task

    def load(root, **_):
        g = torch.Generator().manual_seed(0)

        def split(n):
            x = torch.randint(1, 8, (n, 12), generator=g)
            lengths = torch.randint(3, 13, (n,), generator=g)
            return Batch(
                x.masked_fill(torch.arange(12) >= lengths[:, None], 0),
                lengths,
                x[:, 0] % 2,
            )

        return dict(train=split(64), valid=split(16), test=split(16))

    monkeypatch.setitem(TASKS, "parity", Task(load, 2, vocab=8))
    record = train("parity", tmp_path / "r", options=QUIET, **SMALL | dict(limit=None))
    total = load(None)["train"].lengths.sum().item()
    # padding is not counted
    assert record["tokens_per_s"] * record["seconds_per_epoch"] == pytest.approx(total)


# --- cuts


def test_cut_by_the_clock_anywhere(whole, tmp_path):
    cuts = 0
    while True:
        try:
            record = train(
                "digits",
                tmp_path / "r",
                resume=True,
                options=QUIET | dict(deadline=time.monotonic()),
                **SMALL,
            )
            break
        except Stopped as e:
            assert "stopped by the clock at" in str(e)
            cuts += 1
        # a cut run can be looked at
        if cuts == 1:
            assert 0 <= score(tmp_path / "r")["accuracy"] <= 100
        assert cuts < 40 and 1 <= len(checkpoints(tmp_path / "r")) <= 2
    # at every step and every batch of an evaluation, and always a little further
    assert cuts == 2 * 3 + 2 * 1 + 3
    assert (
        same(weights(whole[0]), weights(tmp_path / "r"))
        and record["curve"] == whole[1]["curve"]
        and record["test"] == whole[1]["test"]
    )


def start(out, *args):
    "The command, in a process, up to its first checkpoint."
    p = subprocess.Popen(
        [
            BIN / "las_train",
            "digits",
            "--cpu",
            "--out",
            out,
            "--save_minutes=0.001",
            *args,
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not checkpoints(out):
        assert p.poll() is None, p.stderr.read()
        time.sleep(0.1)
    return p


@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)],
)
def test_signals_save_and_stop(number, code, tmp_path):
    args = ["--limit=400", "--epochs=60", "--dim=16", "--depth=1", "--n_heads=2"]
    p = start(tmp_path / "r", *args)
    p.send_signal(number)
    out, err = p.communicate(timeout=60)
    assert (
        p.returncode == code
        and f"stopped by {number.name}" in err
        and "--resume" in err
        and "Traceback" not in err
    )
    facts = load_checkpoint(checkpoints(tmp_path / "r")[-1])[1]
    assert facts["epoch"] + facts["step"] > 0
    assert (
        "holds a run already"
        in las("las_train", "digits", "--cpu", "--out", tmp_path / "r").stderr
    )


def test_killed_at_every_stage(tmp_path):
    "sMNIST; see killed.py."
    done = subprocess.run(
        [sys.executable, "killed.py", tmp_path],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    deaths = int(
        re.search(r"(\d+) deaths of \d+ possible, 0 made a difference", done.stdout)[1]
    )
    assert deaths > 30 and all(
        f"{when} {what}" in done.stdout
        for when in ("before", "after")
        for what in ("learn", "evaluate", "replace")
    )


def test_two_at_a_time_are_refused(tmp_path):
    p = start(tmp_path / "r", "--epochs=100")
    try:
        assert (
            "another process is training"
            in las(
                "las_train", "digits", "--cpu", "--out", tmp_path / "r", "--resume"
            ).stderr
        )
    finally:
        p.kill()
        p.communicate()


def test_a_finished_run_is_only_read(whole):
    out, record = whole
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert train("digits", out, resume=True, options=QUIET, **SMALL) == record
    assert before == {p: p.stat().st_mtime_ns for p in out.iterdir()}


def test_another_run_in_the_folder_is_refused(whole):
    with pytest.raises(TrainingError, match="has lr 0.004, not 0.1"):
        train("digits", whole[0], resume=True, lr=0.1, options=QUIET)
    with pytest.raises(TrainingError, match="holds a run already"):
        train("digits", whole[0], options=QUIET, **SMALL)


def test_a_trainer_does_not_go_on_with_another_recipe(tmp_path):
    cut_run(tmp_path)
    other = preset("digits", **SMALL | dict(lr=0.03, seed=5))
    with pytest.raises(TrainingError, match="other settings"):
        Trainer(other, tmp_path, **QUIET)


def test_files_of_different_runs_are_told_apart(whole, tmp_path):
    for name in ("results.json", "recipe.json", "config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((whole[0] / name).read_bytes())
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(TrainingError, match="not what results.json was written for"):
        load_run(tmp_path)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    recipe["seed"] = 1
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(TrainingError, match="are of different runs"):
        train("digits", tmp_path, resume=True, options=QUIET)


def test_a_score_on_other_data_says_so(whole, tmp_path):
    for file in whole[0].iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    record = json.loads((tmp_path / "results.json").read_text())
    if not record["data"]:
        pytest.skip("these data have no source")
    record["data"] = "official files"
    (tmp_path / "results.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="trained and tested on official files"):
        score(tmp_path, cpu=True)


# --- trouble


def cut_run(out):
    with pytest.raises(Stopped):
        train("digits", out, options=QUIET | dict(deadline=0.0), **SMALL)
    return checkpoints(out)[-1]


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "facts", "digest"])
def test_damaged_checkpoints_are_named(harm, tmp_path):
    folder = cut_run(tmp_path / "r")
    path = folder / {"facts": "state.json", "digest": "state.sha256"}.get(
        harm, "state-00.safetensors"
    )
    content = path.read_bytes()
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(
            content[:-9]
            if harm == "truncate"
            else content[:99] + bytes([content[99 % len(content)] ^ 1]) + content[100:]
            if len(content) > 99
            else b"x"
        )
    for call in (
        lambda: train("digits", tmp_path / "r", resume=True, options=QUIET, **SMALL),
        lambda: score(tmp_path / "r"),
    ):
        with pytest.raises(
            TrainingError, match=r"is damaged .* delete .*checkpoint-000000 "
        ):
            call()
    if harm != "flip":
        return
    done = las(
        "las_train", "digits", "--cpu", "--resume", "--out", tmp_path / "r", *ARGS
    )
    assert (
        done.returncode == 2
        and done.stderr.strip().count("\n") == 0
        and "is damaged" in done.stderr
    )


def test_a_full_disk_keeps_the_checkpoint_before(whole, tmp_path):
    "The kernel refuses to write files beyond a size, as it does when a disk is full."
    cut_run(tmp_path / "r")
    before = {p.name: p.read_bytes() for p in checkpoints(tmp_path / "r")[-1].iterdir()}
    done = las(
        "las_train",
        "digits",
        "--cpu",
        "--resume",
        "--out",
        tmp_path / "r",
        "--save_minutes=0",
        *ARGS,
        before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)),
    )
    assert (
        done.returncode == 2
        and "cannot write a checkpoint" in done.stderr
        and "the one before is whole" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert {
        p.name: p.read_bytes() for p in checkpoints(tmp_path / "r")[-1].iterdir()
    } == before
    assert not [p for p in (tmp_path / "r").rglob(".*") if p.name != ".lock"]
    train("digits", tmp_path / "r", resume=True, options=QUIET, **SMALL)
    assert same(weights(whole[0]), weights(tmp_path / "r"))


@pytest.mark.parametrize("last", ["model.safetensors", "results.json", "curves.png"])
def test_a_disk_that_fills_at_the_end(last, whole, tmp_path, monkeypatch):
    real = lib.replace_file

    def full(path, content):
        if Path(path).name == last:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    monkeypatch.setattr(lib, "replace_file", full)
    monkeypatch.setattr("las_nb.model.replace_file", full)
    monkeypatch.setattr("las_nb.train.checkpoint.replace_file", full)
    with pytest.raises(
        TrainingError, match="cannot write the results .*No space left.*--resume"
    ):
        train("digits", tmp_path / "r", options=QUIET, **SMALL)
    monkeypatch.undo()
    assert (
        train("digits", tmp_path / "r", resume=True, options=QUIET, **SMALL)["test"]
        == whole[1]["test"]
    )
    assert same(weights(whole[0]), weights(tmp_path / "r"))


@pytest.mark.parametrize("when", [1, 3])
def test_nan_stops_with_step_rate_and_advice(when, tmp_path, monkeypatch):
    real, calls = lib.share_loss, []

    def poisoned(*a):
        calls.append(1)
        return real(*a) * (math.nan if len(calls) == when else 1)

    monkeypatch.setattr(lib, "share_loss", poisoned)
    with pytest.raises(
        TrainingError,
        match=rf"not finite at step {when} \(epoch 1, learning rate 0.\d+\); try --lr 0.001, .*no checkpoint yet",
    ):
        train("digits", tmp_path / "r", options=QUIET, **SMALL)
    assert not checkpoints(tmp_path / "r")


@pytest.mark.parametrize("when", [1, 6])
def test_a_gradient_that_is_not_finite_stops_as_well(when, tmp_path, monkeypatch):
    "The loss is fine and the weights are about to be lost; also at the very last step."

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * math.nan

    real, calls = lib.share_loss, []

    def poisoned(*a):
        calls.append(1)
        return Poison.apply(real(*a)) if len(calls) == when else real(*a)

    monkeypatch.setattr(lib, "share_loss", poisoned)
    with pytest.raises(
        lib.NotFinite, match=f"its gradient is not finite at step {when} "
    ):
        train("digits", tmp_path / "r", options=QUIET | dict(save_minutes=0), **SMALL)
    assert not (tmp_path / "r" / "results.json").exists()
    for folder in checkpoints(tmp_path / "r"):
        assert all(v.isfinite().all() for v in load_checkpoint(folder)[0].values())
    monkeypatch.undo()
    # what was saved is good
    assert (
        train("digits", tmp_path / "r", resume=True, options=QUIET, **SMALL)["epochs"]
        == 2
    )


def test_nan_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    folder = cut_run(tmp_path / "r")
    monkeypatch.setattr(lib, "share_loss", lambda logits, *a: logits.sum() * math.inf)
    with pytest.raises(TrainingError, match="not finite at step 2 .*is from before it"):
        train(
            "digits",
            tmp_path / "r",
            resume=True,
            options=QUIET | dict(save_minutes=0),
            **SMALL,
        )
    assert checkpoints(tmp_path / "r") == [folder] and load_checkpoint(folder)


def test_what_is_not_ours_stays(tmp_path):
    """A folder with other files, hidden ones too, and with checkpoints of other
    programs."""
    out = tmp_path / "r"
    others = [
        out / name
        for name in (
            ".git/config",
            ".env",
            ".x.json.12",
            "checkpoint-500/a.bin",
            "checkpoint-mine/b",
            "checkpoint-000000-best/c",
            "notes.txt",
        )
    ]
    for f in others:
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text("mine")
    train("digits", out, options=QUIET | dict(save_minutes=0), **SMALL)
    assert all(f.read_text() == "mine" for f in others)


def test_a_start_that_fails_leaves_the_folder_free(tmp_path, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(DataError) as kept:
        train("smnist", tmp_path / "r", options=QUIET | dict(root="/dev/null"), **SMALL)
    assert (
        train("digits", tmp_path / "r", options=QUIET, **SMALL)["epochs"] == 2 and kept
    )


def test_precision_may_change_within_a_process(tmp_path):
    a, b, c = (
        train("digits", tmp_path / n, options=QUIET | dict(precision=p), **SMALL)
        for n, p in (("a", "no"), ("b", "bf16"), ("c", "no"))
    )
    assert (a["precision"], b["precision"]) == ("no", "bf16") and a["curve"] == c[
        "curve"
    ] != b["curve"]
    assert b["curve"]["loss"] == pytest.approx(a["curve"]["loss"], rel=0.05) and all(
        v.dtype == torch.float32 for v in weights(tmp_path / "b").values()
    )
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        train("digits", tmp_path / "d", options=QUIET | dict(precision="fp16"), **SMALL)
    with pytest.raises(Stopped):
        train(
            "digits",
            tmp_path / "e",
            options=QUIET | dict(precision="bf16", deadline=0.0),
            **SMALL,
        )
    # both are on record
    assert (
        train("digits", tmp_path / "e", resume=True, options=QUIET, **SMALL)[
            "precision"
        ]
        == "bf16, no"
    )


# --- checkpoints


def test_checkpoints_stay_small(tmp_path):
    """Under 60 MB in files of at most 15 MB, for every preset and for six blocks of
    width 256."""
    for i, recipe in enumerate(
        [*map(preset, TASKS), preset("smnist", dim=256, depth=6, n_heads=8)]
    ):
        model = build(recipe)
        tensors = {
            f"{kind}.{k}": v.clone()
            for kind in ("model", "exp_avg", "exp_avg_sq")
            for k, v in model.state_dict().items()
        }
        folder = save_checkpoint(tmp_path / str(i), tensors, {})
        sizes = [p.stat().st_size for p in folder.iterdir()]
        assert max(sizes) <= 15e6 and sum(sizes) < 60e6
        assert same(load_checkpoint(folder)[0], tensors)


def test_no_pickle_in_a_checkpoint(tmp_path):
    "Nothing that could run code when it is loaded."
    assert {p.suffix for p in cut_run(tmp_path / "r").iterdir()} == {
        ".safetensors",
        ".json",
        ".sha256",
    }
    code = "".join(p.read_text() for p in Path(lib.__file__).parent.glob("*.py"))
    assert "torch.load(" not in code and "pickle" not in code


def test_numbers_survive_json_exactly(tmp_path):
    facts = dict(sums=[0.1 + 0.2, 1 / 3, 1e-300], curve=[math.pi])
    assert {
        k: v
        for k, v in load_checkpoint(
            save_checkpoint(tmp_path, dict(w=torch.ones(1)), facts)
        )[1].items()
        if k in facts
    } == facts


# --- steps in parts


def test_gradients_in_parts_are_those_of_the_batch(tmp_path):
    """Against torch's own mean loss and clipping, with padding; batches that no number
    of parts divides, the last one short."""
    recipe = preset("motif", length=48, limit=50, dim=16, depth=1, n_heads=2, **PARTS)
    trainer = Trainer(recipe, tmp_path / "r", **QUIET)
    batch = trainer.data["train"].rows(slice(0, 16))
    seen = []
    trainer.model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    for rows in (batch, batch.rows(slice(0, 2)), batch.rows(slice(0, 7))):
        n = len(rows.labels)
        logits = trainer.model(rows.inputs, rows.lengths)
        mean = torch.nn.functional.cross_entropy(logits, rows.labels)
        want = torch.autograd.grad(mean, list(trainer.model.parameters()))
        seen.clear()
        loss, hits = trainer.gradients(rows, n, 1)
        assert max(seen) <= 4 and sum(seen) == n
        assert loss.item() == pytest.approx(mean.item(), rel=1e-6)
        assert hits == (logits.argmax(-1) == rows.labels).sum()
        for p, g in zip(trainer.model.parameters(), want):
            assert torch.allclose(p.grad, g, rtol=1e-4, atol=1e-6)
        trainer.optimizer.zero_grad()
    seen.clear()
    trainer.run()
    assert max(seen) == 4  # in evaluations as well
    trainer.lock.release()


PARTS = dict(norm="layer", epochs=1, batch_size=16, accumulate=5)


@pytest.mark.parametrize("parts", [3, 32])
def test_a_run_in_parts_is_the_run_of_the_whole(parts, tmp_path):
    "Up to rounding, without dropout and BatchNorm; 97 sequences: a last batch of one."
    few = SMALL | dict(limit=97, norm="layer")
    whole = train("digits", tmp_path / "a", options=QUIET, **few)
    cut = train("digits", tmp_path / "b", accumulate=parts, options=QUIET, **few)
    for key in ("loss", "norm", "worst"):
        assert cut["curve"][key] == pytest.approx(whole["curve"][key], rel=1e-4)
    for key in ("train", "valid"):
        assert cut["curve"][key] == pytest.approx(whole["curve"][key], abs=1.1)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.allclose(a[k], b[k], atol=2e-3) for k in a)
    assert f"--accumulate {parts}" in cut["command"]
    assert cut["recipe"]["optimizer"]["accumulate"] == parts
    assert cut["identity"] != whole["identity"]


def test_a_run_in_parts_goes_on_bit_for_bit(tmp_path):
    "With BatchNorm and dropout, cut at every step."
    few = SMALL | dict(accumulate=3, dropout=0.2, norm="batch", epochs=1)
    whole = train("digits", tmp_path / "a", options=QUIET, **few)
    for _ in range(20):
        try:
            options = QUIET | dict(deadline=time.monotonic())
            record = train("digits", tmp_path / "b", True, options=options, **few)
            break
        except Stopped:
            continue
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert record["curve"] == whole["curve"] and record["test"] == whole["test"]


def test_records_from_before_parts_stay_what_they_were():
    new = preset("digits")
    old = json.loads(json.dumps(stored(new)))
    del old["optimizer"]["accumulate"]
    record = dict(recipe=old)
    assert read_recipe(old) == new
    # a checksum that was on record when there were no parts
    assert las_nb.train.identity(new) == "9557a4e710bb"
    assert las_nb.experiments.same_settings(record, dict(task="digits"))
    parts = dict(task="digits", accumulate=2)
    assert not las_nb.experiments.same_settings(record, parts)


# --- several processes, half precision, compile, tensorboard


def torchrun(*args):
    return [
        BIN / "torchrun",
        "--nproc_per_node=2",
        "--master_port=0",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
        BIN / "las_train",
        "digits",
        "--cpu",
        *map(str, args),
    ]


@pytest.mark.parametrize("parts", [1, 3])
def test_two_processes_make_the_run_of_one(parts, tmp_path):
    """Over gloo. An odd number of sequences: shares of unequal size, and at the end a
    process without any."""
    args = [a for a in ARGS if "limit" not in a] + ["--limit=97"]
    train("digits", tmp_path / "one", options=QUIET, **SMALL | dict(limit=97))
    done = subprocess.run(
        torchrun(*args, f"--accumulate={parts}", "--out", tmp_path / "two"),
        capture_output=True,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr
    one, two = (
        json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two")
    )
    assert two["device"] == "2 x cpu" and done.stdout.count("weights, curves.png") == 1
    assert two["curve"]["loss"] == pytest.approx(one["curve"]["loss"], rel=1e-4)
    assert two["curve"]["train"] == pytest.approx(
        one["curve"]["train"], abs=1.1
    ) and two["test"] == pytest.approx(one["test"], abs=2.2)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(a[k], b[k], atol=2e-3) for k in a)


def test_two_processes_with_batchnorm_and_few_steps(tmp_path):
    """The accuracy on record is that of the weights on disk; and a run of two steps per
    epoch is saved, and stops."""
    args = [
        "--dim=16",
        "--depth=1",
        "--n_heads=2",
        "--norm=batch",
        "--limit=96",
        "--batch_size=48",
    ]
    env = os.environ | dict(OMP_NUM_THREADS="1")
    p = subprocess.Popen(
        torchrun(
            *args, "--epochs=500", "--save_minutes=0.001", "--out", tmp_path / "r"
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    while not checkpoints(tmp_path / "r"):
        assert p.poll() is None, p.stderr.read()
        time.sleep(0.1)
    p.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in p.communicate(timeout=90)[1]
    done = subprocess.run(
        torchrun(*args, "--epochs=3", "--out", tmp_path / "s"),
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert score(tmp_path / "s")["accuracy"] == pytest.approx(
        json.loads((tmp_path / "s" / "results.json").read_text())["test"]
    )


def test_two_processes_refuse_together(tmp_path):
    done = subprocess.run(
        torchrun("--out", "/dev/null/x"),
        capture_output=True,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
    )
    assert (
        done.returncode != 0
        and done.stderr.count("las_train: cannot write to /dev/null/x") == 1
        and "rank" not in done.stderr.split("cannot write")[0]
    )


def test_two_processes_are_cut_together(tmp_path):
    p = subprocess.Popen(
        torchrun(
            "--dim=16",
            "--depth=1",
            "--n_heads=2",
            "--epochs=400",
            "--save_minutes=0.001",
            "--out",
            tmp_path / "r",
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
    )
    while not checkpoints(tmp_path / "r"):
        assert p.poll() is None, p.stderr.read()
        time.sleep(0.1)
    p.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in p.communicate(timeout=90)[1]
    facts = load_checkpoint(checkpoints(tmp_path / "r")[-1])[1]
    assert (
        facts["epoch"] * 38 + facts["step"] > 0
        and facts["recipe"]["optimizer"]["epochs"] == 400
    )


def test_options_of_the_run(whole, tmp_path):
    "Autocast in bfloat16, torch.compile and TensorBoard, in processes of their own."
    done = las(
        "las_train",
        "digits",
        *ARGS,
        "--cpu",
        "--precision=bf16",
        "--tensorboard",
        "--out",
        tmp_path / "half",
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "half" / "results.json").read_text())
    assert record["precision"] == "bf16" and record["curve"]["loss"] == pytest.approx(
        whole[1]["curve"]["loss"], rel=0.05
    )
    assert record["curve"]["loss"] != whole[1]["curve"]["loss"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "half" / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("valid accuracy (%)")] == pytest.approx(
        record["curve"]["valid"]
    )
    # weights stay float32
    assert same(
        weights(tmp_path / "half"),
        {k: v.float() for k, v in weights(tmp_path / "half").items()},
    )


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_compiled_runs_are_the_same_run(tmp_path):
    few = SMALL | dict(limit=32, epochs=1)
    done = las(
        "las_train",
        "digits",
        *(f"--{k}={v}" for k, v in few.items()),
        "--cpu",
        "--compile",
        "--out",
        tmp_path / "r",
    )
    assert done.returncode == 0, done.stderr
    train("digits", tmp_path / "eager", options=QUIET, **few)
    a, b = weights(tmp_path / "eager"), weights(tmp_path / "r")
    assert (
        all(torch.allclose(a[k], b[k], atol=2e-3) for k in a) and a.keys() == b.keys()
    )


# --- commands


@pytest.mark.parametrize(
    "args, says",
    [
        (["digts"], "did you mean digits?"),
        (["digits", "--windw", "5"], "no option --windw; did you mean window?"),
        (
            ["digits", "--lr", "fast"],
            "--optimizer.lr: could not convert string to float: 'fast'",
        ),
        (["digits", "--epochs", "1.5"], "--optimizer.epochs: invalid literal for int"),
        (["digits", "--prenorm", "maybe"], "takes no 'maybe'"),
        (["digits", "--batch-sise=3"], "did you mean batch_size?"),
        (["digits", "--norm", "bach"], "invalid choice 'bach'"),
        (["digits", "--accumulate", "99"], "accumulate must be at most batch_size"),
        (["digits", "--out", "/dev/null/x"], "cannot write to /dev/null/x"),
        ([], "Missing from las train: TASK"),
        (["--cpu", "digits", "--window", "0"], "window must be a whole number >= 1"),
        (["digits", "--dim", "30", "--n-heads", "4"], "multiple of n_heads"),
        (["smnist", "--root", "/dev/null"], "cannot get train-images"),
        (["digits", "--precision", "fp8"], "invalid choice 'fp8'"),
        (["digits", "--lr"], "could not convert"),
        (["digits", "more"], "takes no 'more'"),
        (["digits", "--import", "nowhere"], "No module named 'nowhere'"),
        (["digits", "--model", "mine"], "is named with --import"),
        (["digits", "--model=s4d", "--mixer.n_sate=3"], "did you mean n_state"),
    ],
)
def test_bad_calls_end_with_one_line_and_code_2(
    args, says, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        out = [] if "--out" in args else ["--out", str(tmp_path / "r")]
        main(["train", *args, *out])
    err = capsys.readouterr().err
    assert e.value.code == 2 and says in err and err.count("\n") == 1, err


def test_help_names_every_option():
    text = las("las_train", "--help").stdout
    for long in (*short_names().values(), "run.out", "run.resume", "run.save_minutes"):
        assert long == "task" or f"--{long}" in text, long
    assert "deadline" not in text


def test_eval_command(whole, tmp_path, monkeypatch, capsys):
    done = las("las_eval", whole[0], "--cpu")
    assert (
        done.returncode == 0
        and f"test {whole[1]['test']:.2f} % of 96 sequences" in done.stdout
    )
    for args, says in (
        ([tmp_path], "there is no run in"),
        ([whole[0], "--split", "tset"], "Expected one of"),
        (["/nowhere"], "there is no run in"),
    ):
        with pytest.raises(SystemExit) as e:
            main(["eval", *map(str, args)])
        err = capsys.readouterr().err
        assert e.value.code == 2 and says in err and err.count("\n") == 1


# --- weights


def test_save_and_load(tmp_path):
    model = LaSTransformer(
        3, 32, 2, vocab=7, norm="batch", positions="learned", max_rate=0.2, window=5
    )
    model.save_pretrained(tmp_path / "m")
    again = LaSTransformer.from_pretrained(tmp_path / "m")
    assert (
        again.config == model.config
        and same(again.state_dict(), model.state_dict())
        and not again.training
    )
    assert (
        torch.equal(again.blocks[0].mixer.rates, model.blocks[0].mixer.rates)
        and again.blocks[0].mixer.window == 5
    )
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        LaSTransformer.from_pretrained(tmp_path)
    for name, content, says in (
        ("model.safetensors", b"x" * 99, "is damaged"),
        ("config.json", b"{", "config.json is damaged"),
    ):
        old = (tmp_path / "m" / name).read_bytes()
        (tmp_path / "m" / name).write_bytes(content)
        with pytest.raises(ValueError, match=says):
            LaSTransformer.from_pretrained(tmp_path / "m")
        (tmp_path / "m" / name).write_bytes(old)


def test_defaults_are_stored_too():
    "A later change of a default must not change models that were saved before."
    assert (
        LaSTransformer(3, 32, 2, vocab=7).config
        | dict(
            max_rate=0.1,
            window=3,
            pool="scores",
            spacing="geometric",
            n_heads=8,
            causal=True,
        )
        == LaSTransformer(3, 32, 2, vocab=7).config
    )


def test_the_hub_gets_and_gives(tmp_path, monkeypatch):
    "What would be sent and fetched, without a network."
    import huggingface_hub

    model, sent = LaSTransformer(3, 32, 1, vocab=7), tmp_path / "sent"

    class Api:
        def __init__(self, **kw):
            pass

        def create_repo(self, repo_id, **kw):
            return type("Repo", (), dict(repo_id=repo_id))

        def upload_folder(self, repo_id, folder_path, **kw):
            shutil.copytree(folder_path, sent)
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert model.push_to_hub("someone/las") == "https://huggingface.co/someone/las"
    assert {p.name for p in sent.iterdir()} == {"config.json", "model.safetensors"}
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **kw: asked.append((name, kw)) or str(sent),
    )
    assert same(
        LaSTransformer.from_pretrained("someone/las", revision="v1").state_dict(),
        model.state_dict(),
    )
    assert asked[0][0] == "someone/las" and asked[0][1]["revision"] == "v1"


# --- experiments


def test_the_list():
    runs = experiments()
    whole = [
        (r["task"], r["model"], r["positions"], r["seed"])
        for name, r in runs.items()
        if not re.search("short|cpu|rate|auto", name)
    ]
    assert len(whole) == len(set(whole)) == 24 + 54
    arena = ["listops", "image", "pathfinder", "text", "retrieval", "pathx"]
    kinds = {
        (t, m, p, s)
        for t in ("smnist", "pmnist")
        for m in ("plain", "las")
        for p in (None, "sinusoidal")
        for s in range(3)
    }
    assert set(whole) == kinds | {
        (t, m, p, s)
        for t in arena
        for m, p in (("plain", "sinusoidal"), ("las", None), ("las", "sinusoidal"))
        for s in range(3)
    }
    assert [s for *_, s in whole] == sorted(s for *_, s in whole)  # seed 0 first
    # in the order of their worth
    assert list(dict.fromkeys(t for t, *_ in whole if t in arena)) == arena
    for r in runs.values():
        assert build(preset(**r))


def test_full_runs_for_two_cores():
    "All of the data, one recipe for all models, and the same learning rate."
    runs = {name: preset(**r) for name, r in experiments().items() if "-cpu-" in name}
    assert list(runs)[:4] == [
        f"smnist-cpu-{kind}-0"
        for kind in (
            "las-none",
            "attention-rotary",
            "plain-sinusoidal",
            "las-sinusoidal",
        )
    ]
    digits = [r for r in runs.values() if r.task == "smnist"]
    assert len(digits) == 11
    assert [r.seed for r in digits if r.mixer.name == "las"] == [0, 0, 1, 2]
    differ = {"model", "positions", "seed", "max_rate", "window"}
    for task in ("smnist", "pmnist", "listops"):
        all_of_task = [flat(r) for r in runs.values() if r.task == task]
        shared = [{k: r[k] for k in r if k not in differ} for r in all_of_task]
        assert all(r == shared[0] for r in shared)
        first = shared[0]
        assert (first["limit"], first["share"], first["sample"]) == (None, 1, False)
    listops = runs["listops-cpu-las-none-0"].model
    assert runs["smnist-cpu-las-none-0"].model.dim == 64
    assert (listops.dim, listops.feedforward) == (80, 160)


def listed(monkeypatch, runs, folder):
    "Let the list of experiments be `runs`, and no more: no grids lie in `folder`."
    monkeypatch.setattr(las_nb.experiments, "experiments", lambda: runs)
    monkeypatch.chdir(folder)


@pytest.fixture
def two(monkeypatch, tmp_path):
    "A list of two small experiments, and folders for them."
    runs = {
        f"digits-{model}": dict(task="digits", model=model, **SMALL)
        for model in ("las", "plain")
    }
    listed(monkeypatch, runs, tmp_path)
    (tmp_path / "results").mkdir()
    return tmp_path / "runs", tmp_path / "results"


def make(folders, action="run", **kw):
    options = dict(out=folders[0], results=folders[1], **kw)
    words = [w for n, v in options.items() for w in (f"--{n}", str(v))]
    main(["experiments", action, "--cpu", *words])


def test_experiments_work_themselves_off(two, capsys):
    out, results = two
    make(two, "list")
    assert capsys.readouterr().out.count("waiting") == 2
    make(two, only="digits-plain")
    assert results_seen(results) == ["digits-plain"]
    assert {p.name for p in (results / "digits-plain").iterdir()} == {
        "config.json",
        "model.safetensors",
    }
    make(two)
    names = {name: read_record(results, name) for name in results_seen(results)}
    assert (
        set(names) == {"digits-las", "digits-plain"}
        and names["digits-las"]["name"] == "digits-las"
        and names["digits-plain"]["model"] == "plain"
    )
    capsys.readouterr()
    make(two)
    assert "2 of 2 finished" in capsys.readouterr().out
    make(two, "list")
    assert capsys.readouterr().out.count("finished") == 2


def test_a_changed_default_shows_as_other_settings(two, capsys, monkeypatch):
    "A record holds its whole recipe, so that today's defaults do not speak for it."
    make(two, only="digits-las")
    record = read_record(two[1], "digits-las")
    recipe = preset("digits", model="las", **SMALL)
    assert record["recipe"] == stored(recipe)
    assert record["identity"] == las_nb.train.identity(recipe)
    assert "other settings" not in status("digits-las", *two)[1]
    usual = las_nb.train.PRESETS
    monkeypatch.setitem(usual, "digits", usual["digits"] | dict(lr=1e-3))
    assert "other settings" in status("digits-las", *two)[1]


def test_experiments_go_on_after_a_cut(two, capsys, monkeypatch):
    out, results = two
    with pytest.raises(Stopped):
        train(
            **las_nb.experiments.experiments()["digits-las"],
            out=out / "digits-las",
            name="digits-las",
            options=QUIET | dict(deadline=0.0),
        )
    assert status("digits-las", out, results)[0] == "cut"
    make(two)
    assert (
        status("digits-las", out, results)[0]
        == status("digits-plain", out, results)[0]
        == "finished"
    )


def test_the_curve_of_an_unfinished_run_is_on_record(two, monkeypatch, tmp_path):
    """One epoch of two, then a cut: its curve stands in `unfinished/`, is not lost when
    the run begins anew elsewhere, and goes when it is finished."""
    out, results = two
    so_far, real = results / "unfinished" / "digits-las.json", Trainer.train_epoch

    def cut(self, bar):
        if self.epoch == self.recipe.optimizer.epochs - 1:
            self.signal = 15
        return real(self, bar)

    monkeypatch.setattr(Trainer, "train_epoch", cut)
    with pytest.raises(SystemExit):
        make(two, only="digits-las")
    known = json.loads(so_far.read_text())
    assert (
        len(known["curve"]["valid"]) == SMALL["epochs"] - 1
        and "test" not in known
        and not results_seen(results)
        and 0 < known["cpu_seconds"] < 600
    )
    so_far.write_text(json.dumps(known | dict(curve=dict(valid=[1.0, 2.0, 3.0]))))
    shutil.rmtree(out)
    with pytest.raises(SystemExit):
        make(two, only="digits-las")
    assert json.loads(so_far.read_text())["curve"] == dict(valid=[1.0, 2.0, 3.0])
    monkeypatch.undo()
    one = {"digits-las": dict(task="digits", model="las", **SMALL)}
    listed(monkeypatch, one, tmp_path)
    make(two, only="digits-las")
    record = read_record(results, "digits-las")
    assert not so_far.exists() and record["cpu_seconds"] > 0 and record["test"] > 0


def test_experiments_stop_in_time(two, capsys, monkeypatch):
    out, results = two
    now = time.monotonic()
    real = Trainer.learn

    # the clock leaps
    def slow(self, batch):
        real(self, batch)
        monkeypatch.setattr(lib.time, "monotonic", lambda: now + 80)

    monkeypatch.setattr(Trainer, "learn", slow)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: time.time())
    with pytest.raises(SystemExit) as e:
        make(two, minutes=1.5)
    assert (
        e.value.code in (0, None) and "stopped by the clock" in capsys.readouterr().err
    )
    assert status("digits-las", out, results)[0] == "cut" and not list(
        results.iterdir()
    )
    monkeypatch.undo()


def test_experiments_do_not_begin_when_there_is_no_time(two, capsys, monkeypatch):
    # half of the minute has gone
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: time.time() - 30)
    make(two, minutes=1)
    assert "0 of 2 finished" in capsys.readouterr().out and not two[0].exists()


def test_an_experiment_that_fails_does_not_stop_the_rest(
    tmp_path, two, capsys, monkeypatch
):
    out, results = two
    real = lib.share_loss
    monkeypatch.setattr(
        lib,
        "share_loss",
        lambda logits, *a: (
            real(logits, *a)
            * (
                math.nan
                if not results_seen(results)
                and not (out / "digits-las" / "failed.txt").exists()
                else 1
            )
        ),
    )
    with pytest.raises(SystemExit) as e:
        make(two)
    assert e.value.code == 2 and results_seen(results) == ["digits-plain"]
    make(two, "list")
    assert "failed" in capsys.readouterr().out
    # not tried again unless it is named
    make(two)
    assert len(results_seen(results)) == 1
    monkeypatch.undo()
    one = {"digits-las": dict(task="digits", model="las", **SMALL)}
    listed(monkeypatch, one, tmp_path)
    make(two, only="digits-las")
    assert len(results_seen(results)) == 2


@pytest.mark.parametrize(
    "trouble, says",
    [
        (RuntimeError("CUDA error: out of memory"), "memory is full"),
        (RuntimeError("cuBLAS\nmore"), "torch stopped with: cuBLAS"),
        ("damage", "is damaged"),
    ],
)
def test_one_bad_experiment_does_not_block_the_rest(
    trouble, says, two, capsys, monkeypatch
):
    out, results = two
    if trouble == "damage":
        with pytest.raises(Stopped):
            train(
                **las_nb.experiments.experiments()["digits-las"],
                out=out / "digits-las",
                options=QUIET | dict(deadline=0.0),
            )
        (checkpoints(out / "digits-las")[-1] / "state.json").write_text("{")
        make(two)
    else:
        real = Trainer.learn

        def broken(self, batch):
            if self.name == "digits-las":
                raise trouble
            real(self, batch)

        monkeypatch.setattr(Trainer, "learn", broken)
        with pytest.raises(SystemExit) as e:
            make(two)
        assert e.value.code == 2
    assert results_seen(results) == ["digits-plain"]
    make(two, "list")
    assert says in capsys.readouterr().out


def test_an_experiment_in_use_is_left_to_the_other_process(two, capsys):
    from filelock import FileLock

    out, results = two
    (out / "digits-las").mkdir(parents=True)
    with FileLock(out / "digits-las" / ".lock"):
        make(two)
    assert (
        results_seen(results) == ["digits-plain"]
        and "another process" in capsys.readouterr().err
    )


def results_seen(results):
    "The names of finished runs."
    return sorted(read_records(record_file(results, "any")))


@pytest.mark.parametrize(
    "args, says",
    [
        (["walk"], "invalid choice 'walk'"),
        (["run", "--only", "smnist-lsa"], "no experiment is called"),
        (["run", "--minutes", "0"], "--minutes must be at least 1"),
    ],
)
def test_experiments_explain(args, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "nbs" / "results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        main(["experiments", *args])
    err = capsys.readouterr().err
    assert e.value.code == 2 and says in err and err.count("\n") == 1


@pytest.mark.parametrize("lr", [4e-3, 5e-4])
def test_slow_parameters_follow_the_schedule_below_their_own_highest_rate(lr, tmp_path):
    t = Trainer(
        preset(
            "digits",
            model="s4d",
            dim=16,
            depth=1,
            limit=64,
            epochs=2,
            lr=lr,
            mixer_options=dict(n_state=4),
        ),
        tmp_path,
        cpu=True,
        progress=False,
    )
    seen = []
    for batch in lib.batches(t.data["train"], 32, torch.arange(64)):
        t.learn(batch)
        seen.append([g["lr"] for g in t.optimizer.param_groups])
    for step, (a, b, slow) in enumerate(seen):
        assert a == b == t.rate(step) and slow == pytest.approx(a * min(1, 1e-3 / lr))
    t.lock.release()


# --- nothing that is there is taken for something else


def test_other_sequences_of_the_same_labels_are_refused(tmp_path, monkeypatch):
    cut_run(tmp_path / "r")
    real = lib.load_data

    def changed(*args):
        found = real(*args)
        found["train"].inputs[3] += 0.5
        return found

    monkeypatch.setattr(lib, "load_data", changed)
    with pytest.raises(TrainingError, match="other data"):
        train("digits", tmp_path / "r", resume=True, options=QUIET, **SMALL)


def test_a_model_of_ones_own_is_not_written_over(tmp_path):
    own = LaSTransformer(10, 16, 1, n_heads=2, in_features=1)
    own.save_pretrained(tmp_path / "own")
    before = weights(tmp_path / "own")
    with pytest.raises(TrainingError, match="holds a model"):
        train("digits", tmp_path / "own", options=QUIET, **SMALL)
    assert same(weights(tmp_path / "own"), before)


@pytest.mark.parametrize(
    "name, value", [("causal", None), ("causal", []), ("n_heads", 1), ("n_heads", True)]
)
def test_files_of_a_run_that_disagree_are_named(name, value, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "r")
    path = tmp_path / "r" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(TrainingError, match=name):
        load_run(tmp_path / "r")


def test_no_model_is_deeper_than_it_can_be():
    for depth in (10**30, 20_000):
        with pytest.raises(ValueError, match="depth"):
            LaSTransformer(10, 16, depth, n_heads=2, in_features=1)
