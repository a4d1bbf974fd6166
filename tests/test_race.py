"""What small machines are helped by: short convolutions, augmentation, averages, early
epochs, parts of a pass; and the race, from its file to its table."""

import json, subprocess, sys, time
from pathlib import Path
import pytest, torch
import las_nb.train.loop as loop
from forked import forked
from las_nb.model import LaSTransformer
from las_nb.race import core_minutes, race_records, race_table, read_race
from las_nb.short_convolution import ShortConvolution, short_convolution
from las_nb.tasks import TASKS, Batch, Task, register_task
from las_nb.tasks.augment import COARSE, coarse, fewer_rows, mirror, shift
from las_nb.tasks.digits import small_digits
from las_nb.tasks.listops import evaluate, listops, shuffle_arguments, VOCAB
from las_nb.tasks.listops import partly_evaluated
from las_nb.train import Stopped, Trainer, build, load_run, preset, score, train
from las_nb.train.optim import moving_average
from pages import ROOT

BIN = Path(sys.executable).parent
SMALL = dict(dim=16, depth=1, n_heads=2, limit=96, epochs=3, batch_size=32)
QUIET = dict(progress=False, cpu=True)


# --- the convolution, and a model with it


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 3, 20])
def test_a_short_convolution_is_a_sum_over_lags(dtype, width):
    torch.manual_seed(0)
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    w = torch.randn(6, width, dtype=torch.float64)
    want = torch.zeros_like(x)
    for lag in range(min(width, 11)):
        want[:, lag:] += x[:, : 11 - lag] * w[:, lag]
    got = short_convolution(x.to(dtype), w.to(dtype))
    assert got.dtype == dtype and got.shape == x.shape
    rough = 5e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), want, rtol=rough, atol=rough)


def test_gradients_of_a_short_convolution():
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(short_convolution, (x, w))
    assert torch.autograd.gradgradcheck(short_convolution, (x, w))


@pytest.mark.parametrize("mixer", ["las", "attention", "linear", "s4d"])
@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_convolutions_do_not_see_padding_or_the_future(mixer, prenorm, norm):
    torch.manual_seed(0)
    given = dict(vocab=9, n_heads=2, prenorm=prenorm, norm=norm, mixer=mixer)
    model = LaSTransformer(3, 8, 2, conv=4, input_conv=6, **given).double().eval()
    tokens, lengths = torch.randint(9, (2, 12)), torch.tensor([12, 7])
    alone = model(tokens[1:, :7])
    torch.testing.assert_close(model(tokens, lengths)[1:], alone)
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 9
    before, after = model.features(tokens)[:, :8], model.features(changed)[:, :8]
    torch.testing.assert_close(before, after)


def test_what_a_layer_attends_to_is_seen_through_its_convolution():
    torch.manual_seed(0)
    model = LaSTransformer(3, 8, 1, n_heads=2, in_features=1, conv=4).eval()
    x = torch.randn(2, 10, 1)
    block = model.blocks[0]
    seen = block.conv(block.norm1(model.embedded(x)))
    torch.testing.assert_close(model.attention_maps(x)[0], block.mixer.weights(seen))
    plain = block.mixer.weights(block.norm1(model.embedded(x)))
    assert not torch.allclose(model.attention_maps(x)[0], plain)


def test_models_with_convolutions_are_kept(tmp_path):
    torch.manual_seed(0)
    given = dict(n_heads=2, in_features=1, conv=3, input_conv=5)
    model = LaSTransformer(3, 8, 1, **given).eval()
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 10, 1)
    torch.testing.assert_close(LaSTransformer.from_pretrained(tmp_path)(x), model(x))
    with torch.device("meta"):
        empty = LaSTransformer(3, 8, 1, **given)
    empty.to_empty(device="cpu")
    for module in empty.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(p.isfinite().all() for p in empty.parameters())
    assert empty.blocks[0].conv.weight.shape == (8, 3)
    assert ShortConvolution(4).weight.abs().max() <= 0.5


@pytest.mark.parametrize("width", [0, -1, 2.5, True, "4"])
def test_widths_that_cannot_be(width):
    with pytest.raises(ValueError, match="conv must be a whole number >= 1"):
        LaSTransformer(3, 8, 1, n_heads=2, in_features=1, conv=width)


# --- other inputs, the same answers


def test_pictures_are_shifted_each_by_itself():
    torch.manual_seed(0)
    x = torch.rand(200, 36, 2) + 1
    moved = shift(fill=-1.0, reach=2)(Batch(x, None, None), torch.Generator()).inputs
    pictures = x.view(200, 6, 6, 2)
    found = set()
    for before, after in zip(pictures, moved.view(200, 6, 6, 2)):
        wide = torch.full((10, 10, 2), -1.0)
        wide[2:8, 2:8] = before
        places = [
            (i, j)
            for i in range(5)
            for j in range(5)
            if torch.equal(wide[i : i + 6, j : j + 6], after)
        ]
        assert len(places) == 1
        found |= {*places}
    assert len(found) == 25


def test_pictures_are_mirrored_and_made_coarse():
    x = torch.rand(100, 16, 1)
    turned = mirror(Batch(x, None, None), torch.Generator().manual_seed(0)).inputs
    flipped = x.view(100, 4, 4).flip(2).reshape(100, 16, 1)
    as_it_was = (turned == x).all(2).all(1)
    assert 30 < as_it_was.sum() < 70
    assert torch.equal(turned[~as_it_was], flipped[~as_it_was])
    small = coarse(Batch(x, None, None)).inputs
    want = x.view(100, 2, 2, 2, 2).mean((2, 4)).view(100, 4, 1)
    torch.testing.assert_close(small, want)
    low = fewer_rows(4)(Batch(x, None, None)).inputs
    torch.testing.assert_close(low, x.view(100, 4, 4, 1).mean(1))
    with pytest.raises(ValueError, match="no square pictures: 12 steps"):
        coarse(Batch(torch.rand(2, 12, 1), None, None))


def test_shuffled_lists_have_the_same_value(tmp_path):
    train_set = listops(tmp_path, sample=True)["train"]
    batch = train_set.rows(torch.arange(40))
    other = shuffle_arguments(batch, torch.Generator().manual_seed(0))
    again = shuffle_arguments(batch, torch.Generator().manual_seed(0))
    assert torch.equal(other.inputs, again.inputs)
    assert other.lengths is batch.lengths and other.labels is batch.labels
    assert (other.inputs != batch.inputs).any(1).all()
    for tokens, label in zip(other.inputs.tolist(), batch.labels.tolist()):
        assert evaluate(" ".join(VOCAB[t] for t in tokens if t > 1)) == label


def test_inner_lists_as_their_values_leave_the_answer(tmp_path):
    batch = listops(tmp_path, sample=True)["train"].rows(torch.arange(40))
    seen = set()
    for seed in range(30):
        other, again = (
            partly_evaluated(batch, torch.Generator().manual_seed(seed))
            for _ in range(2)
        )
        assert torch.equal(other.inputs, again.inputs)
        assert other.inputs.dtype == batch.inputs.dtype
        assert other.inputs.shape[1] % 64 == 0
        assert torch.equal((other.inputs > 0).sum(1), other.lengths)
        assert (other.lengths <= batch.lengths).all()
        seen.add(int(other.lengths.sum()))
        for tokens, label in zip(other.inputs.tolist(), batch.labels.tolist()):
            assert tokens[: tokens.index(1) + 1].count(2) == sum(t > 12 for t in tokens)
            assert evaluate(" ".join(VOCAB[t] for t in tokens if t > 1)) == label
    assert len(seen) > 5 and max(seen) == batch.lengths.sum()  # of nine depths


# --- the loop

LATER = dict(
    norm="batch",
    dropout=0.2,
    conv=4,
    input_conv=8,
    ema=0.9,
    label_smoothing=0.1,
    early_epochs=1,
    early_batch_size=48,
    epoch_size=70,
    augment="shift+mirror",
    coarse_epochs=2,
    coarse="few-rows",
)


@pytest.fixture
def pictures():
    "The 8x8 digits, as a task of pictures."
    changes = dict(shift=shift(reach=1), mirror=mirror)
    about = TASKS["digits"]._replace(augments=changes, coarse=COARSE)
    register_task("pictures", about)
    yield
    TASKS.pop("pictures")


def test_all_at_once_goes_on_bit_for_bit(pictures, tmp_path):
    "Cut after every step, and tested where it was cut."
    kw = SMALL | LATER
    whole = train("pictures", tmp_path / "a", options=QUIET, **kw)
    for cuts in range(40):
        try:
            options = QUIET | dict(deadline=time.monotonic())
            record = train("pictures", tmp_path / "b", True, options=options, **kw)
            break
        except Stopped:
            score(tmp_path / "b")
    assert cuts > 6
    a, b = (load_run(tmp_path / n)[0].state_dict() for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert record["curve"] == whole["curve"] and record["test"] == whole["test"]
    assert score(tmp_path / "a")["accuracy"] == pytest.approx(whole["test"])
    seconds = record["cost"]["seconds"]
    assert len(seconds) == 3 and seconds == sorted(seconds) and seconds[0] > 0
    assert all(unit > 0 for unit in record["cost"]["unit"])


def steps_of(monkeypatch, tmp_path, **changes):
    "The batches that a run learns from."
    seen, real = [], loop.share_loss

    def look(logits, labels, *rest):
        seen.append((len(labels), rest))
        return real(logits, labels, *rest)

    monkeypatch.setattr(loop, "share_loss", look)
    train("digits", tmp_path, options=QUIET, **SMALL | changes)
    return seen


def test_early_batches_and_parts_of_a_pass(monkeypatch, tmp_path):
    seen = steps_of(
        monkeypatch,
        tmp_path / "r",
        early_epochs=1,
        early_batch_size=48,
        epoch_size=40,
        label_smoothing=0.25,
    )
    assert [n for n, _ in seen] == [40, 32, 8, 32, 8]
    assert {rest[2] for _, rest in seen} == {0.25}


def test_epochs_of_a_pass_have_no_sequence_in_common(tmp_path):
    trainer = Trainer(preset("digits", **SMALL | dict(epoch_size=45)), tmp_path)
    orders = []
    for epoch in range(4):
        trainer.epoch = epoch
        orders.append(set(trainer.order(32).tolist()))
    assert all(len(order) == 45 for order in orders)
    assert not orders[0] & orders[1] and not orders[2] & orders[3]
    assert orders[0] | orders[1] != orders[2] | orders[3]
    trainer.lock.release()


def test_the_mean_of_the_weights_is_what_is_kept(tmp_path):
    "By hand: every step's weights, averaged."
    kw = SMALL | dict(ema=0.8, epochs=2)
    steps = []
    trainer = Trainer(preset("digits", **kw), tmp_path / "r", **QUIET)
    update = trainer.average.update_parameters

    def note(model):
        steps.append({k: v.clone() for k, v in model.state_dict().items()})
        update(model)

    trainer.average.update_parameters = note
    trainer.run()
    assert len(steps) == 6
    mean = steps[0]
    for n, now in enumerate(steps[1:], 1):
        kept = min(0.8, (1 + n) / (10 + n))
        mean = {
            k: kept * m + (1 - kept) * now[k] if m.is_floating_point() else now[k]
            for k, m in mean.items()
        }
    model, _ = load_run(tmp_path / "r")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, mean[name], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(mean["head.weight"], steps[-1]["head.weight"])


def test_the_first_step_is_the_first_mean():
    net = torch.nn.BatchNorm1d(2)
    move = moving_average(0.99)
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=move, use_buffers=True
    )
    for step in range(3):
        net.weight.data.fill_(step)
        net.num_batches_tracked += 1
        average.update_parameters(net)
    assert average.module.num_batches_tracked == 3
    assert 1 < average.module.weight[0] < 2  # soon after the last, at first


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(augment="shift"), "digits has no augmentations"),
        (dict(coarse_epochs=1), "digits has no form at half resolution"),
        (dict(early_epochs=1), "early_epochs and early_batch_size need each other"),
        (dict(early_batch_size=8), "early_epochs and early_batch_size need each other"),
        (dict(ema=1.0), "ema must be at least 0 and below 1"),
        (dict(label_smoothing=-0.1), "label_smoothing must be at least 0"),
        (dict(epoch_size=0), "epoch_size must be at least 1"),
        (dict(conv=0), "conv must be a whole number >= 1"),
    ],
)
def test_settings_that_cannot_be(changes, says):
    with pytest.raises(ValueError, match=says):
        build(preset("digits", **changes))


def test_unknown_ways_to_be_coarse_are_named():
    with pytest.raises(ValueError, match="did you mean rows"):
        preset("smnist", coarse_epochs=1, coarse="row")


def test_unknown_augmentations_are_named():
    with pytest.raises(ValueError, match="did you mean shift"):
        preset("smnist", augment="shft")
    with pytest.raises(ValueError, match="no augmentations"):
        preset("pmnist", augment="shift")


# --- the race

ROWS = """
goals = [0, 99.9]
[all]
task = "digits"
limit = 96
epochs = 2
dim = 16
depth = 1
n_heads = 2
[rows.las]
[rows.convolution]
conv = 4
seeds = [0, 1]
"""


def test_a_race_from_its_file_to_its_table(tmp_path):
    (tmp_path / "mine.toml").write_text(ROWS)
    where = "--cpu --results results --out runs".split()

    def race(*args):
        return forked("las", "race", "mine.toml", *args, *where, cwd=tmp_path)

    empty = race("--action", "show")
    assert empty.returncode == 0 and "no run has begun" in empty.stdout
    assert "mine/las-0" in race("--action", "list").stdout
    command = [BIN / "las", "race", "mine.toml", *where]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 3 and "minutes to 99.9 %" in rows[0]
    runs, goals = read_race(tmp_path / "mine.toml")
    assert goals == (0, 99.9) and len(runs) == 3
    records = race_records(runs, tmp_path / "results")
    assert race_table(records, goals) in done.stdout
    for record in records.values():
        assert 0 < core_minutes(record, 0) < record["cpu_seconds"] / 60
        assert core_minutes(record, 101) is None
        assert record["command"].startswith("las train digits")
    # what is under way is shown as such
    lines = (tmp_path / "results" / "mine.jsonl").read_text().splitlines()
    cut = [json.loads(line) for line in lines if '"mine/las-0"' in line][0]
    del cut["test"]
    (tmp_path / "results" / "mine.jsonl").unlink()
    (tmp_path / "results" / "unfinished" / "mine").mkdir(parents=True, exist_ok=True)
    path = tmp_path / "results" / "unfinished" / "mine" / "las-0.json"
    path.write_text(json.dumps(cut))
    assert "under way (100%)" in race("--action", "show").stdout


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "has no rows: write"),
        ("rows = 3", "has no rows: write"),
        ("[rows]\nlas = 3", "has no rows: write"),
        ("[rows.las]\nmixer = 'lsa'", "did you mean las"),
        ("[rows.las]\ntask = 'sminst'", "did you mean smnist"),
        ("goal = [3]\n[rows.las]", "did you mean goals"),
        ("imports = ['nowhere']\n[rows.las]", "nowhere"),
        ("[rows.las", "is no TOML"),
    ],
)
def test_files_that_are_no_race(text, says, tmp_path):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ValueError, match=says):
        read_race(tmp_path / "mine.toml")
    done = forked("las", "race", "mine.toml", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", sorted((ROOT / "nbs" / "races").glob("*.toml")))
def test_the_books_races_can_be_run(path):
    runs, goals = read_race(path)
    assert runs and list(goals) == sorted(goals)
    assert len({json.dumps(args, sort_keys=True) for args in runs.values()}) == len(
        runs
    )


def test_a_task_of_ones_own_names_its_augmentations(tmp_path):
    def double(batch, generator):
        return batch._replace(inputs=2 * batch.inputs)

    about = Task(lambda root, **_: small_digits(), 10, in_features=1, max_len=64)
    register_task("mine", about._replace(augments=dict(double=double)))
    try:
        recipe = preset("mine", augment="double", **SMALL)
        trainer = Trainer(recipe, tmp_path / "r", **QUIET)
        batch = trainer.data["train"].rows(slice(4))
        twice = trainer.altered(batch, torch.Generator()).inputs
        assert torch.equal(twice, 2 * batch.inputs)
        trainer.lock.release()
    finally:
        TASKS.pop("mine")
