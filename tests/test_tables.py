"""Data of one's own: files and arrays of every kind, what is understood of them, what is
refused and how, and the three commands from a file to predictions."""

import csv, gzip, json, math, os, re, subprocess, sys
import numpy as np
import pytest, torch
import las_nb
from las_nb.cli import main
from las_nb.predict import load, predict_file
from las_nb.settings import Table
from las_nb.tasks import Batch, DataError, Numbers, TASKS, Task, bounds, load_task
from las_nb.tasks.tables import read_raw
from las_nb.train import TrainingError, score, train

QUIET = dict(progress=False, cpu=True)
SMALL = dict(dim=16, depth=1, epochs=4, n_heads=2)


def wave(rate, n):
    return [round(math.sin(rate * t), 4) for t in range(n)]


RATES = [0.2 + i / 400 for i in range(30)] + [0.8 + i / 400 for i in range(30)]
WAVES = [wave(rate, 12) for rate in RATES]
NAMES = ["slow"] * 30 + ["fast"] * 30


def write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(
            [header, *rows]
        )
    return path


def wide(path, target="kind", values=NAMES, **more):
    header = [*more, *(f"t{i}" for i in range(12)), target]
    rows = [
        [*(v[i] for v in more.values()), *w, y]
        for i, (w, y) in enumerate(zip(WAVES, values))
    ]
    return write_csv(path, header, rows)


@pytest.fixture
def waves(tmp_path):
    return wide(tmp_path / "waves.csv")


# --- what is understood


def sizes(task):
    return [len(s.labels) for s in load_task(task).values()]


def test_a_wide_table(waves):
    task = Task.from_csv(waves, "kind")
    assert (task.n_classes, task.in_features, task.vocab, task.max_len) == (
        2,
        1,
        None,
        12,
    )
    assert sizes(task) == [48, 6, 6]
    assert task.note.splitlines()[0] == (
        "waves.csv: 60 sequences of 12 values, 2 classes (fast, slow) of kind"
    )
    train = load_task(task)["train"]
    assert train.values.mean().abs() < 1e-5 and train.values.std() == pytest.approx(
        1, abs=0.01
    )
    # the draw is alike in classes, and the same every time
    for part in load_task(task).values():
        assert part.labels.float().mean() == 0.5
    again = load_task(Task.from_csv(str(waves), "kind"))["test"]
    assert torch.equal(again.values, load_task(task)["test"].values)
    assert bounds(task, load_task(task))[0] == {"majority class": 50}


def test_rows_keep_their_labels(tmp_path):
    "Whatever is drawn: what stood in a row stays together."
    rows = [[i, i + 0.5, "ab"[i % 2]] for i in range(100)]
    task = Task.from_csv(write_csv(tmp_path / "x.csv", ["u", "v", "y"], rows))
    made, seen = task.preparation, []
    for part in load_task(task).values():
        values = part.values[:, 0] * made.deviation[0] + made.mean[0]
        first = values.view(-1, 2)[:, 0].round().long()
        assert (first % 2 == part.labels).all()
        seen += first.tolist()
    assert sorted(seen) == list(range(100))


@pytest.mark.parametrize(
    "form", ["tsv", "jsonl", "semicolons", "npz", "parquet", "lists"]
)
def test_the_same_in_every_kind_of_file(form, waves, tmp_path):
    cells = [
        dict(zip([f"t{i}" for i in range(12)], w), kind=n) for w, n in zip(WAVES, NAMES)
    ]
    if form == "tsv":
        path = wide(tmp_path / "same.tsv")
    elif form == "semicolons":
        path = tmp_path / "same.csv"
        path.write_text(waves.read_text().replace(",", ";"))
    elif form == "jsonl":
        path = tmp_path / "same.jsonl"
        path.write_text("\n".join(map(json.dumps, cells)))
    elif form == "npz":
        path = tmp_path / "same.npz"
        np.savez(path, x=np.array(WAVES), y=np.array(NAMES))
    elif form == "lists":
        path = write_csv(
            tmp_path / "same.csv",
            ["wave", "kind"],
            [[" ".join(map(str, w)), n] for w, n in zip(WAVES, NAMES)],
        )
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        path = tmp_path / "same.parquet"
        pq.write_table(pa.Table.from_pylist(cells), path)
    want, got = (
        load_task(Task.from_csv(waves, "kind")),
        load_task(Task.from_csv(path, "kind" if form != "npz" else None)),
    )
    for part in want:
        assert torch.allclose(got[part].values, want[part].values, atol=1e-6)
        assert torch.equal(got[part].labels, want[part].labels)


def third(datasets, i, known=True):
    "A third of the waves; without their classes, where those are not known."
    features = datasets.Features(
        dict(
            look=datasets.Image(),
            wave=datasets.Sequence(datasets.Value("float32")),
            label=datasets.ClassLabel(names=["slow", "fast"]),
        )
    )
    labels = [int(n == "fast") if known else -1 for n in NAMES[i::3]]
    found = dict(look=[None] * 20, wave=WAVES[i::3], label=labels)
    return datasets.Dataset.from_dict(found, features=features)


def test_a_hugging_face_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = [third(datasets, i) for i in range(3)]
    whole = datasets.DatasetDict(dict(zip(("train", "validation", "test"), parts)))
    whole.save_to_disk(str(tmp_path / "waves"))
    task = Task.from_csv(tmp_path / "waves")
    assert task.preparation.classes == ["fast", "slow"] and sizes(task) == [20, 20, 20]
    parts[0].save_to_disk(str(tmp_path / "one"))
    assert sizes(Task.from_csv(tmp_path / "one")) == [16, 2, 2]
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="^cannot read .*one: ") as e:
        Task.from_csv(tmp_path / "one")
    assert "\n" not in str(e.value)


def test_a_dataset_by_its_name(tmp_path, monkeypatch, capsys):
    """Pictures, other splits and those whose classes are secret are left out; one of
    several configurations is asked for."""
    datasets = pytest.importorskip("datasets")
    parts = [third(datasets, i, known=i < 2) for i in range(3)]
    names = "train", "unsupervised", "test"
    asked = []

    def give(*name):
        asked.append(name)
        return datasets.DatasetDict(dict(zip(names, parts)))

    monkeypatch.setattr(datasets, "load_dataset", give)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert sizes(Task.from_csv("hf:some/waves")) == [16, 2, 2]
    Task.from_csv("hf:waves")
    words = ["train", "--data", "hf:some/waves/long", "--out", str(tmp_path / "r")]
    main([*words, *"--dim 8 --depth 1 --epochs 1 --cpu".split()])
    assert asked[:3] == [("some/waves",), ("waves",), ("some/waves", "long")]
    assert "long: 20 sequences of 12 values, 2 classes" in capsys.readouterr().out
    out = tmp_path / "out.csv"
    assert predict_file(tmp_path / "r", "hf:some/waves/long", out, cpu=True) == 20

    def refuse(*name):
        raise ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"cannot read hf:other/waves: .* \['a', 'b'\]"):
        Task.from_csv("hf:other/waves")
    with pytest.raises(
        DataError, match="no stanfordnlp/imdb.*or hf:stanfordnlp/imdb for"
    ):
        Task.from_csv("stanfordnlp/imdb")


@pytest.mark.parametrize("offline", ["", "1"])
def test_a_name_that_cannot_be_reached_gets_one_line(offline, tmp_path):
    "At once: load_dataset alone tries for half a minute."
    pytest.importorskip("datasets")
    words = ["train", "--data", "hf:some/waves"]
    nowhere = dict(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    tried = subprocess.run(
        [sys.executable, "-c", f"from las_nb.cli import main; main({words})"],
        env=os.environ | nowhere | dict(HF_HUB_OFFLINE=offline),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    says = "cannot read hf:some/waves" if offline else "HF_HUB_OFFLINE=1 reads"
    assert tried.returncode == 2 and says in tried.stderr, tried.stderr
    assert tried.stderr.count("\n") == 1


def test_sequences_of_many_lengths_and_missing_values(tmp_path):
    "A row ends where only empty cells follow; a value that is missing inside is the last."
    rows = [
        [*w[:n], *[""] * (12 - n), y] for w, n, y in zip(WAVES, [5, 12, 9] * 20, NAMES)
    ]
    rows[0][2], rows[1][0] = "NA", ""
    header = [*(f"t{i}" for i in range(12)), "kind"]
    split = [*["train"] * 40, *["test"] * 20]
    path = write_csv(
        tmp_path / "x.csv", ["split", *header], [[s, *r] for s, r in zip(split, rows)]
    )
    task = Task.from_csv(path, "kind", split="split")
    assert "5 to 12 values" in task.note and "are missing" in task.note
    made, raw = task.preparation, read_raw(path, Table("kind", split="split"))
    assert raw.starts.diff().tolist() == [5, 12, 9] * 20
    from las_nb.tasks import prepared

    whole = prepared(made, raw)
    assert whole.values[2] == whole.values[1] and whole.values[5] == 0
    assert not whole.values.isnan().any()


def test_a_long_table(tmp_path):
    rows = []
    for i, w in enumerate(WAVES):
        for t in range(5 + i % 4):
            rows.append([f"2024-01-{t + 1:02d}", f"s{i}", w[t], 2 * w[t], NAMES[i]])
    import random

    random.Random(0).shuffle(rows)
    path = write_csv(tmp_path / "long.csv", ["day", "who", "a", "b", "kind"], rows)
    task = Task.from_csv(path, "kind", group="who", time="day")
    assert task.in_features == 2 and sum(sizes(task)) == 60
    assert "60 sequences of 5 to 8 steps, 2 values each (a, b)" in task.note
    raw = read_raw(path, Table("kind", group="who", time="day"))
    i = raw.names.index("s31")
    a, b = raw.starts[i : i + 2].tolist()
    want = torch.tensor(WAVES[31][: 5 + 31 % 4])
    assert torch.allclose(raw.values[a:b], torch.stack([want, 2 * want], 1))
    rows[7][-1] = "slow" if rows[7][-1] == "fast" else "fast"
    path = write_csv(tmp_path / "odd.csv", ["day", "who", "a", "b", "kind"], rows)
    with pytest.raises(
        DataError, match=rf"odd.csv, line \d+: kind is .* elsewhere in who {rows[7][1]}"
    ):
        Task.from_csv(path, "kind", group="who", time="day")


def test_texts_words_and_class_folders(tmp_path):
    path = tmp_path / "texts.jsonl"
    texts = [("good ö " if i % 2 else "bad ") * (1 + i % 5) for i in range(40)]
    path.write_text(
        "\n".join(
            json.dumps(dict(id=i, review=t, y="nay"[i % 2 :: 2]))
            for i, t in enumerate(texts)
        )
    )
    task = Task.from_csv(path, "y")
    assert task.vocab == 256 and "4 to 40 bytes" in task.note
    first = load_task(task)["train"].rows(slice(1))
    assert (
        bytes(
            first.inputs[
                0, : first.lengths[0] if first.lengths is not None else None
            ].tolist()
        )
        .decode()
        .strip()
    )
    path.write_text(
        "\n".join(json.dumps(dict(w=t.split(), y=i % 2)) for i, t in enumerate(texts))
    )
    task = Task.from_csv(path, "y")
    assert sorted(task.preparation.vocab) == ["bad", "good", "ö"] and task.vocab == 4
    assert task.preparation.classes == ["0", "1"]
    for i, t in enumerate(texts):
        (tmp_path / "folders" / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "folders" / f"c{i % 2}" / f"{i}.txt").write_text(t)
    task = Task.from_csv(tmp_path / "folders")
    assert task.preparation.classes == ["c0", "c1"] and sum(sizes(task)) == 40
    assert task.preparation.kind == "text"
    for i, w in enumerate(WAVES):
        folder = tmp_path / "arrays" / ("test" if i % 3 == 0 else "train") / NAMES[i]
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{i}.npy", np.array(w))
    task = Task.from_csv(tmp_path / "arrays")
    assert task.in_features == 1 and sizes(task) == [36, 4, 20]


def test_splits_that_are_given(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    header = [*(f"t{i}" for i in range(12)), "kind"]
    rows = [[*w, n] for w, n in zip(WAVES, NAMES)]
    for name, some in dict(train=rows[::2], val=rows[1::4], test=rows[3::4]).items():
        write_csv(folder / f"{name}.csv", header, some)
    task = Task.from_csv(folder, "kind")
    assert sizes(task) == [30, 15, 15] and "splits as given" in task.note
    (folder / "val.csv").unlink()
    assert sizes(Task.from_csv(folder, "kind")) == [27, 3, 15]
    (folder / "test.csv").unlink()
    assert sizes(Task.from_csv(folder, "kind")) == [24, 3, 3]
    (folder / "train.csv").rename(folder / "test.csv")
    with pytest.raises(DataError, match="has no split train; there are test"):
        Task.from_csv(folder, "kind")


def test_splits_by_group_and_in_time_order(tmp_path):
    who = [f"p{i // 4}" for i in range(60)]
    path = wide(tmp_path / "g.csv", who=who)
    raw = read_raw(path, Table("kind", group="who"))
    from las_nb.tasks.tables import splits_of

    parts, how = splits_of(raw, "classes")
    owners = [{who[i] for i in part.tolist()} for part in parts.values()]
    assert (
        how == "by group"
        and not owners[0] & owners[1] | owners[0] & owners[2] | owners[1] & owners[2]
    )
    assert all(owners) and sum(map(len, owners)) == 15
    path = wide(tmp_path / "t.csv", when=[(7 * i) % 60 for i in range(60)])
    raw = read_raw(path, Table("kind", time="when"))
    parts, how = splits_of(raw, "classes")
    when = [{(7 * i) % 60 for i in part.tolist()} for part in parts.values()]
    assert (
        how == "the latest to test"
        and when[2] == set(range(54, 60))
        and when[1] == set(range(48, 54))
    )


def test_classes_or_numbers(tmp_path):
    def goal(values, said=None):
        path = wide(tmp_path / "x.csv", values=values)
        return Task.from_csv(path, "kind", goal=said).preparation

    assert goal(NAMES).goal == "classes"
    assert goal([i % 3 for i in range(60)]).classes == ["0", "1", "2"]
    assert goal(["01", "10"] * 30).classes == ["01", "10"]
    assert goal(RATES).goal == "numbers"
    assert goal(range(60)).goal == "numbers"
    assert goal([i % 3 for i in range(60)], "numbers").goal == "numbers"
    with pytest.raises(DataError, match="kind has 60 different values in 60 sequences"):
        goal([f"n{i}" for i in range(60)])
    with pytest.raises(DataError, match="line 2: kind is 'slow', no number"):
        goal(NAMES, "numbers")


def test_from_arrays_and_datasets():
    x = torch.tensor(WAVES)
    task = Task.from_arrays(x, [int(n == "fast") for n in NAMES])
    assert task.preparation.classes == [0, 1] and task.in_features == 1
    same = Task.from_arrays(
        np.array(WAVES), np.array([int(n == "fast") for n in NAMES], np.uint8)
    )
    for part, split in load_task(task).items():
        assert torch.equal(split.values, load_task(same)[part].values)
    ragged = Task.from_arrays([w[: 3 + i % 5] for i, w in enumerate(WAVES)], RATES)
    assert ragged.preparation.goal == "numbers" and ragged.n_classes == 1
    padded = Task.from_arrays(x, RATES, [3 + i % 5 for i in range(60)])
    assert torch.equal(
        load_task(padded)["test"].values, load_task(ragged)["test"].values
    )
    tokens = Task.from_arrays(torch.randint(9, (60, 7)), NAMES)
    assert tokens.vocab <= 9 and tokens.in_features is None
    data = torch.utils.data.TensorDataset(x, torch.tensor(RATES))
    task = Task.from_dataset(data, test=torch.utils.data.Subset(data, range(10)))
    assert sizes(task) == [54, 6, 10] and isinstance(task.goal, Numbers)
    parts = dict(valid=(x[:4], NAMES[:4]), test=(x[-4:], NAMES[-4:]))
    assert sizes(Task.from_arrays(x, NAMES, **parts)) == [60, 4, 4]


def test_long_sequences_are_cut(waves):
    task = Task.from_csv(waves, "kind", length=5)
    assert task.max_len == 5 and "cut to 5" in task.note
    assert load_task(task)["test"].rows(slice(None)).inputs.shape == (6, 5, 1)


# --- what is wrong with a file


@pytest.mark.parametrize(
    "text, options, says",
    [
        ("", {}, "has no header|has no rows"),
        ("a,y\n", {}, "x.csv has no rows"),
        ("1,2\n3,4\n", {}, "x.csv has no header: write names above its columns"),
        ("a,a,y\n1,2,3\n", {}, "x.csv has two columns 'a'; rename one"),
        ("a,b,y\n1,2\n", {}, "x.csv, line 2: 2 cells, and the header has 3; correct"),
        (
            "a,b,y\n1,2,u\n1,zwei,v\n",
            {},
            "x.csv, line 3: 'zwei' is no number .column b.",
        ),
        ("a,b,y\n1,2,u\n1,inf,v\n", {}, "x.csv, line 3: 'inf' is no number"),
        ("a,b,y\n1,2,u\n,,v\n", {}, "x.csv, line 3: no value at all; fill the line"),
        ("a,b,y\n1,2,u\n1,2,\n", {}, "x.csv, line 3: no y; fill it"),
        ("a,b,c\n1,2,u\n", {}, "answered with --target; there are a, b, c"),
        ("a,b,y\n1,2,u\n", dict(target="z"), "no column 'z'.*there are a, b, y"),
        ("alpha,b,y\n1,2,u\n", dict(values="alhpa"), "did you mean alpha"),
        (
            "a,t,y\n1,a long text it seems to be,u\n",
            {},
            "numbers stand in a, texts in t",
        ),
        (
            "a,s,y\n1,train,u\n1,tset,u\n",
            dict(split="s"),
            "line 3: s is 'tset'; train, valid or test",
        ),
        (
            "a,y\n1,u\n2,v\n",
            {},
            "x.csv has 2 sequences to split; 10 are the least|different values",
        ),
        (
            "a,t,g,y\n1,noon,p,u\n",
            dict(group="g", time="t"),
            "line 2: t is 'noon', neither",
        ),
        (
            "x,y\n1 2 3,u\n4 five 6,v\n",
            dict(values="x"),
            "line 3: '4 five 6' is no list of numbers",
        ),
        ("a;b;y\n1;0,5;u\n2;1,5;v\n", {}, "line 2: '0,5' may be a number or a list"),
        ('text,y\n"one,u\n"two,v\n', {}, "x.csv, line 3: ',' expected after"),
        (
            "a,y\n" + "1,1.5\n2,2.5\n" * 9 + "3,inf\n",
            {},
            "line 20: y is 'inf', no number",
        ),
        ("a,y\n1,u\n", dict(values="a,y"), "y is what is to be answered: read other"),
        ("t,y\na text,u\n", dict(text="y"), "y is what is to be answered: read other"),
    ],
)
def test_one_line_says_what_is_wrong_and_where(text, options, says, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=says) as e:
        Task.from_csv(path, **options)
    assert "\n" not in str(e.value)


def test_files_that_nobody_can_read(tmp_path):
    def says(path, text):
        with pytest.raises(DataError, match=text) as e:
            Task.from_csv(path)
        assert "\n" not in str(e.value)

    says(tmp_path / "none.csv", "there is no .*none.csv; name a file or a folder")
    (tmp_path / "x.xlsx").write_bytes(b"PK")
    says(tmp_path / "x.xlsx", "x.xlsx is of no kind that is known: .csv .tsv")
    (tmp_path / "x.csv").write_bytes("x,y\nä,1\n".encode("latin-1"))
    says(tmp_path / "x.csv", "x.csv is not UTF-8")
    (tmp_path / "x.jsonl").write_text('{"x": 1, "y": 2}\n{"x": \n')
    says(tmp_path / "x.jsonl", "x.jsonl, line 2 is no JSON")
    (tmp_path / "x.jsonl").write_text('{"x": 1, "y": 2}\n[1]\n')
    says(tmp_path / "x.jsonl", "x.jsonl, line 2 is no object")
    (tmp_path / "x.jsonl").write_text(
        '{"x": [1, 2], "y": 2}\n{"x": [1, "b"], "y": 2}\n'
    )
    says(tmp_path / "x.jsonl", "x.jsonl, line 2 is no sequence of numbers")
    (tmp_path / "x.jsonl").write_text('{"x": 1, "y": 2}\n{"x": 1, "z": 2}\n')
    says(tmp_path / "x.jsonl", "line 2 has 'z', which the first row lacks")
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    says(tmp_path / "x.npz", "x.npz holds a; x and y are wanted")
    for found in ([0], {"k": 0}):
        (tmp_path / "x.jsonl").write_text(json.dumps(dict(a=1, y=found)) + "\n")
        says(tmp_path / "x.jsonl", "line 1: y is .*; one class or number is wanted")
    (tmp_path / "x.jsonl").write_text('{"a": {"b": 1}, "y": 2}\n')
    says(tmp_path / "x.jsonl", "numbers stand in no column, texts in no column")
    (tmp_path / "x.json").write_text('[{"x": 1, "y": 2}]')
    says(tmp_path / "x.json", "line 1 is no object; every line is one, such as")
    for name in ("x.csv", "x.csv.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"x,y\n1,2\n"))
        says(tmp_path / name, f"{name} is packed .gz.: unpack it first")
    (tmp_path / "empty").mkdir()
    says(tmp_path / "empty", "holds no file of a known kind")


def test_files_that_are_unusual_and_can_be_read(tmp_path):
    "A mark at the beginning, ends of lines, an index without a name, long texts, ..."
    path = tmp_path / "x.csv"

    def note(rows, header, **options):
        text = "\r\n".join([header, *rows]) + "\r\n"
        path.write_bytes(("\ufeff" + text).encode())
        return Task.from_csv(path, **options).note

    says = "x.csv: 40 sequences of 2 values, 2 classes (0, 1) of y\nsplits at random"
    twice = [f"{i};{i / 2};{i % 2}" for i in range(40)]
    assert note(twice, "a;b;y").startswith(says)
    indexed = [f"{i},{i},{i / 2},{i % 2}" for i in range(40)]
    assert note(indexed, ",a,b,y").startswith(says)  # of pandas
    odd = [f"{i % 3 == 0},2024-01-{1 + i % 28},{i},{i / 2},{i % 2}" for i in range(40)]
    assert note(odd, "c,when,a,b,y").split("\n")[0].endswith("y; not read: c, when")
    quoted = [f'"line\r\n""{i}"", {"x" * 200_000}",{i % 2}' for i in range(12)]
    assert "12 sequences of 200,011 to 200,012 bytes" in note(quoted, "text,y")
    decomposed = [f"{i},{i % 2}" for i in range(40)]
    assert "1 values" in note(
        decomposed, "gro\u0308\u00dfe,y", values="gr\u00f6\u00dfe"
    )
    parted = [f"{'train' if i < 30 else 'test'},{i},{i // 15}" for i in range(40)]
    assert note(parted, "s,a,y", split="s").endswith("; nothing to train on of 2")


@pytest.mark.parametrize(
    "x, y, options, says",
    [
        (np.arange(40), NAMES, {}, "x has shape .40,.; an array or a list"),
        ([1, 2, 3], NAMES, {}, "row 0 of train is 1; a sequence is wanted"),
        ("abc", NAMES, {}, "x is str; an array or a list of sequences is wanted"),
        (iter(WAVES), NAMES, {}, "x is list_iterator; an array or a list"),
        (np.full((60, 3), np.datetime64("2024-01-01")), NAMES, {}, "x is datetime64"),
        (np.ones((60, 3)) * 1j, NAMES, {}, "row 0 of train is complex"),
        (WAVES, None, {}, "y is None; one target per sequence is wanted"),
        (WAVES, [{1}] * 60, {}, "row 0 of train: target is .1.; one class or number"),
        (WAVES, NAMES, dict(length=-1), "length must be at least 1; got -1"),
        (["ab"] * 60, NAMES, dict(tokens=5), "tokens must be at least 257; got 5"),
        (WAVES, NAMES, dict(goal="clases"), "goal must be one of .* got 'clases'"),
    ],
)
def test_arrays_that_are_none(x, y, options, says):
    with pytest.raises((DataError, ValueError), match=says) as e:
        Task.from_arrays(x, y, **options)
    assert "\n" not in str(e.value)


def test_series_that_are_none():
    for x, says in (
        (np.full(100, np.nan), "channel 0 has no value in the training rows"),
        (["a"] * 100, "the series is no sequence of numbers"),
    ):
        with pytest.raises(DataError, match=says):
            Task.from_series(x, 3)


def test_nan_in_arrays_is_named_with_its_row():
    x = torch.tensor(WAVES)
    x[7, 3] = math.nan
    with pytest.raises(DataError, match="row 7.*, step 3: NaN is no value"):
        Task.from_arrays(x, NAMES)
    x[7, 3] = math.inf
    with pytest.raises(DataError, match="row 7.*, step 3: infinity is no value"):
        Task.from_arrays(x, NAMES)
    for y, says in (
        (NAMES[1:], "60 sequences, 59 targets; one for each"),
        (torch.zeros(60, 2), "target 0 is .0.0, 0.0.; one number is wanted"),
        ([*NAMES[1:], None], "row 59.*: no target"),
    ):
        with pytest.raises(DataError, match=says):
            Task.from_arrays(WAVES, y)


# --- tasks of one's own, made by hand


X, Y = torch.randn(12, 5, 1), torch.arange(12) % 3


def mine(split, **more):
    return Task(
        lambda root, **_: dict.fromkeys(("train", "valid", "test"), split),
        3,
        in_features=1,
        **more,
    )


@pytest.mark.parametrize(
    "batch",
    [
        Batch(X.double(), None, Y),
        Batch(X.numpy(), None, Y.numpy()),
        Batch(X.tolist(), None, Y.tolist()),
        Batch(X, None, Y.int()),
        Batch(X, None, Y.to(torch.uint8)),
        Batch(X, [5] * 12, Y),
        Batch(X, torch.full((12,), 5, dtype=torch.int32), Y),
    ],
    ids=[
        "float64",
        "numpy",
        "lists",
        "int32",
        "uint8",
        "list of lengths",
        "int32 lengths",
    ],
)
def test_what_is_harmless_is_converted(batch, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "mine", mine(batch))
    usual = load_task(mine(Batch(X, None, Y)))["train"]
    got = load_task("mine")["train"]
    assert torch.equal(got.inputs, usual.inputs) and torch.equal(
        got.labels, usual.labels
    )
    assert train("mine", tmp_path / "r", options=QUIET, **SMALL)["epochs"] == 4


def test_a_loader_takes_the_keywords_it_takes():
    splits = dict.fromkeys(("train", "valid", "test"), Batch(X, None, Y))
    for load_it in (
        lambda: splits,
        lambda root: splits,
        lambda root, limit=None: splits,
    ):
        found = load_task(Task(load_it, 3, in_features=1), limit=5)
        assert [len(b.labels) for b in found.values()] == [5, 1, 5]


BAD = X.clone()
BAD[4, 2] = math.nan


@pytest.mark.parametrize(
    "split, says",
    [
        (
            (X, Y),
            "split 'train' of the task is a tuple; Batch.inputs, lengths, labels. is wanted; Task.from_arrays",
        ),
        (
            torch.utils.data.TensorDataset(X, Y),
            "is a TensorDataset; .*Task.from_dataset reads it",
        ),
        (
            Batch(X, None, Y + 1),
            r"labels of .* lie between 1 and 3 \(first in row 2\); 3 classes are 0 to 2: subtract 1",
        ),
        (Batch(X, None, Y + 5), "lie between 5 and 7 .* or raise n_classes"),
        (
            Batch(X, None, Y.float()),
            "labels of .* are torch.float32; whole numbers are wanted, or goal=Numbers",
        ),
        (Batch(X[:0], None, Y[:0]), "split 'train' of the task is empty"),
        (Batch(X, None, Y[:5]), "has 12 sequences and 5 labels; one for each"),
        (
            Batch(BAD, None, Y),
            "inputs of split 'train' of the task, row 4, hold NaN or infinity",
        ),
        (
            Batch(X[..., 0], None, Y),
            r"have shape \(12, 5\); \(B, L, 1\) is wanted.*x\[..., None\]",
        ),
        (
            Batch(X, [5, 6] * 6, Y),
            "lengths of .*, row 1, say 6; 1 to 5 steps are there",
        ),
        (Batch(X, [5] * 3, Y), "lengths of .* are 3; one for each of 12"),
        (Batch([[1.0], [1.0, 2.0]], None, [0, 1]), "are no tensor"),
    ],
)
def test_misuse_gets_one_line(split, says, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=says) as e:
        load_task(mine(split))
    assert "\n" not in str(e.value)
    monkeypatch.setitem(TASKS, "mine", mine(split))
    with pytest.raises(DataError, match=says.replace("the task", "mine")):
        train("mine", tmp_path / "r", options=QUIET, **SMALL)


def test_other_misuse():
    whole = Batch(X, None, Y)
    for splits, says in (
        (
            dict(train=whole, test=whole),
            "has no split 'valid', it has train, test; hold_out",
        ),
        ((whole, whole, whole), "the loader of the task gave a tuple; a dictionary"),
    ):
        with pytest.raises(DataError, match=says):
            load_task(Task(lambda root, **_: splits, 3, in_features=1))
    tokens = Batch(torch.tensor([[0, 5]] * 3), None, Y[:3])
    with pytest.raises(
        DataError, match="row 0, have tokens from 0 to 5; they must lie between 0 and 4"
    ):
        load_task(mine(tokens)._replace(in_features=None, vocab=5))
    numbers = mine(Batch(X, None, torch.randn(12, 2)), goal=Numbers())
    with pytest.raises(DataError, match="are 2 per sequence; n_classes says 3"):
        load_task(numbers)


# --- text in learnt tokens


GOOD = ["a fine film, and well played", "well played, and a fine story", "fine, fine"]
BAD = ["a dull film, badly played", "badly played, and a dull story", "dull, dull"]
REVIEWS = [text + "!" * i for i in range(10) for text in GOOD + BAD]
VERDICTS = ["good"] * 3 + ["bad"] * 3


def reviews(path, odd=""):
    rows = [*zip(REVIEWS, VERDICTS * 10)]
    split = [*["train"] * 48, *["test"] * 12]
    rows = [(s, t + odd * (s == "test"), v) for s, (t, v) in zip(split, rows)]
    return write_csv(path, ["split", "review", "verdict"], rows)


def learns_tokens(path, out, *more):
    words = asks(path, out, "verdict") + ["--text", "review", "--split", "split"]
    sizes = "--tokens 280 --dim 16 --depth 1 --n_heads 2 --epochs 8 --cpu".split()
    return [*words, *sizes, *more]


def test_text_in_learnt_tokens(tmp_path, capsys):
    "Learnt on the training part, kept beside the weights, and the same for new text."
    pytest.importorskip("tokenizers")
    path, run = reviews(tmp_path / "reviews.csv"), tmp_path / "run"
    main(learns_tokens(path, run))
    said = capsys.readouterr().out
    assert re.search("60 sequences of 10 to 39 bytes, at most 17 of 280 tokens", said)
    model = load(run)
    made, vocab = model.preparation, model.model.vocab
    assert (vocab, made.tokens, made.facts()["vocab"]) == (280, 280, 280)
    laid = model.sequences(REVIEWS[:2])
    assert laid.starts[1] < len(REVIEWS[0]) / 1.5 and laid.values.max() < 280
    main(["eval", str(run), "--cpu"])
    assert "test 100.00 % of 12 sequences" in capsys.readouterr().out
    assert model([GOOD[1], BAD[1]]) == ["good", "bad"]
    new = tmp_path / "new.csv"
    write_csv(new, ["review"], [[GOOD[0]], [BAD[0]], ["\u00e9\U0001f600"]])
    assert predict_file(run, new, tmp_path / "p.csv", cpu=True) == 3
    found = [
        r["predicted verdict"] for r in csv.DictReader((tmp_path / "p.csv").open())
    ]
    assert found[:2] == ["good", "bad"]
    # what stands in the test alone is not learnt
    other = Task.from_csv(
        reviews(tmp_path / "odd.csv", " zzzzzzzzzzzzzzzz" * 3),
        "verdict",
        text="review",
        split="split",
        tokens=280,
    )
    assert other.preparation.coder == made.coder and other.vocab == 280
    # and learnt again it is the same
    again = Task.from_arrays(REVIEWS[:48], VERDICTS * 8, tokens=280)
    assert again.vocab == 280 and again.preparation.kind == "text"


def test_a_cut_run_in_tokens_goes_on(tmp_path):
    pytest.importorskip("tokenizers")
    from las_nb.train import Stopped

    path = str(reviews(tmp_path / "reviews.csv"))
    options = dict(data=path, target="verdict", text="review", split="split")
    options |= dict(tokens=280, **SMALL)
    with pytest.raises(Stopped):
        train("table", tmp_path / "r", options=QUIET | dict(deadline=0), **options)
    assert len(load(tmp_path / "r")(REVIEWS)) == 60
    whole = train("table", tmp_path / "whole", options=QUIET, **options)
    again = train("table", tmp_path / "r", resume=True, options=QUIET, **options)
    assert again["curve"] == whole["curve"]


def test_tokens_are_learnt_of_text_alone(waves):
    says = "waves.csv holds values, and tokens are learnt of text: leave tokens out"
    with pytest.raises(DataError, match=says):
        Task.from_csv(waves, "kind", tokens=300)
    with pytest.raises(DataError, match="the arrays holds values, and tokens"):
        Task.from_arrays(WAVES, NAMES, tokens=300)


# --- from a file to predictions


def asks(path, out, target="kind"):
    "The words that train on a file."
    return ["train", "--data", str(path), "--target", target, "--out", str(out)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    path = wide(folder / "waves.csv")
    words = asks(path, folder / "run")
    options = ["--dim", "16", "--depth", "1", "--epochs", "12", "--cpu"]
    main([*words, *options])
    return path, folder / "run"


def test_three_commands(trained, tmp_path, capsys):
    path, run = trained
    main(["eval", str(run), "--cpu"])
    assert re.fullmatch(
        rf"{re.escape(str(run))}: test 100.00 % of 6 sequences\n",
        capsys.readouterr().out,
    )
    new, out = tmp_path / "new.csv", tmp_path / "out" / "predictions.csv"
    rows = [[f"n{i}", *wave(r, 12)] for i, r in enumerate((0.25, 0.85))]
    write_csv(new, ["id", *(f"t{i}" for i in range(12))], rows)
    main(["predict", str(run), "--data", str(new), "--out", str(out), "--cpu"])
    assert "2 predictions" in capsys.readouterr().out
    said = list(csv.DictReader(out.open()))
    assert [r["predicted kind"] for r in said] == ["slow", "fast"]
    assert [r["id"] for r in said] == ["n0", "n1"]
    assert all(0.5 < float(r["probability"]) <= 1 for r in said)
    main(["eval", str(run), "--data", str(path), "--cpu"])
    assert "of 60 sequences" in capsys.readouterr().out


def test_what_is_printed_before_training(tmp_path, capsys):
    path = wide(tmp_path / "waves.csv")
    main(
        [
            *asks(path, tmp_path / "r"),
            "--preset",
            "smoke",
            "--dim",
            "16",
            "--cpu",
        ]
    )
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("waves.csv: 60 sequences of 12 values, 2 classes")
    assert said[1] == "splits at random: 48 to train, 6 to validate, 6 to test"
    assert said[2] == "without reading, on the test: majority class 50.0 %"
    record = json.loads((tmp_path / "r" / "results.json").read_text())
    assert (
        record["command"]
        == f"las train table --preset smoke --dim 16 --target kind --data {path}"
    )
    assert record["name"] == "waves-smoke-las-none-0" and record["trivial"] == {
        "majority class": 50
    }


def test_in_python(trained):
    path, run = trained
    model = las_nb.load(run)
    assert model([wave(0.25, 9), wave(0.9, 12)]) == ["slow", "fast"]
    p = model.probabilities(np.array(WAVES))
    assert p.shape == (60, 2) and torch.allclose(p.sum(1), torch.ones(60))
    # one by one as together, in their order
    alone = torch.cat([model.probabilities([w]) for w in WAVES])
    assert torch.allclose(alone, p, atol=1e-5)
    assert model.embeddings(WAVES).shape == (60, 16)
    for x, says in (
        ([[1.0, math.inf]], "sequence 0, step 1: infinity is no value"),
        ([[1.0], []], "sequence 1 has 0 steps"),
        ([[[1.0, 2.0]]], "sequence 0 has 2 values per step; the model reads 1"),
        (["text"], "sequence 0 is no sequence of numbers"),
    ):
        with pytest.raises(DataError, match=says):
            model(x)


def test_eval_and_predict_refuse_what_does_not_fit(trained, tmp_path):
    path, run = trained
    bad = write_csv(tmp_path / "bad.csv", ["t0", "t1"], [[1, 2]])
    with pytest.raises(DataError, match="bad.csv has no column 't2'.*there are t0, t1"):
        predict_file(run, bad, tmp_path / "p.csv")
    odd = wide(tmp_path / "odd.csv", values=["slow", "odd"] * 30)
    with pytest.raises(
        DataError, match="line 3: kind is 'odd', no class of fast, slow"
    ):
        score(run, new=odd, cpu=True)
    with pytest.raises(SystemExit):
        main(["predict", str(run)])


def test_a_file_that_changed_is_not_what_was_trained_on(tmp_path):
    path = wide(tmp_path / "waves.csv")
    out = tmp_path / "r"
    options = dict(data=str(path), target="kind", options=QUIET, **SMALL)
    train("table", out, **options)
    wide(path, values=NAMES[::-1])
    rows = path.read_text().replace("0.", "1.")
    path.write_text(rows)
    with pytest.raises(TrainingError, match="waves.csv is not what .* was trained on"):
        score(out, cpu=True)
    assert load(out)([wave(0.2, 9)])  # predicts all the same


def test_checkpoints_of_a_cut_run_predict(tmp_path):
    from las_nb.train import Stopped

    path = wide(tmp_path / "waves.csv")
    options = dict(data=str(path), target="kind", **SMALL)
    with pytest.raises(Stopped):
        train("table", tmp_path / "r", options=QUIET | dict(deadline=0), **options)
    assert len(load(tmp_path / "r")(WAVES)) == 60
    whole = train("table", tmp_path / "whole", options=QUIET, **options)
    again = train("table", tmp_path / "r", resume=True, options=QUIET, **options)
    assert again["curve"] == whole["curve"]


def test_numbers_are_learnt_and_told_in_their_unit(tmp_path, capsys):
    path = wide(tmp_path / "rates.csv", "rate", [100 * r for r in RATES])
    out = str(tmp_path / "r")
    main(
        [
            *asks(path, out, "rate"),
            "--cpu",
            "--dim",
            "16",
            "--depth",
            "1",
            "--epochs",
            "40",
        ]
    )
    said = capsys.readouterr().out
    assert "rate: a number from 20 to 87.25" in said and "mean R² " in said
    record = json.loads((tmp_path / "r" / "results.json").read_text())
    assert record["test"] == pytest.approx(100 * record["r2"]) and record["r2"] > 0.8
    found = score(out, cpu=True)
    assert found["mse"] == pytest.approx(record["mse"], rel=1e-4)
    model = load(out)
    test = load_task(Task.from_csv(path, "rate"))["test"]
    truth = (
        test.labels[:, 0].double() * model.preparation.spread + model.preparation.centre
    )
    rows = (
        test.rows(slice(None)).inputs[..., 0] * model.preparation.deviation[0]
        + model.preparation.mean[0]
    )
    error = torch.tensor(model(rows)) - truth
    assert error.square().mean() == pytest.approx(found["mse"], rel=1e-3)
    assert error.abs().mean() == pytest.approx(found["mae"], rel=1e-3)
    assert 1 - error.square().mean() / truth.var(correction=0) == pytest.approx(
        found["r2"], abs=1e-3
    )
    main(["eval", out, "--cpu"])
    assert re.search(
        r"R² 0\.\d+, MSE \S+, MAE \S+ of 6 sequences", capsys.readouterr().out
    )


def test_a_task_from_python_trains_and_predicts(tmp_path):
    task = Task.from_arrays([w[: 6 + i % 5] for i, w in enumerate(WAVES)], NAMES)
    record = train(task, tmp_path / "r", options=QUIET, **SMALL | dict(epochs=30))
    assert record["task"] == "own" and record["test"] > 80
    assert load(tmp_path / "r")([wave(0.9, 10)]) == ["fast"]
    with pytest.raises(DataError, match="data that came from Python"):
        predict_file(tmp_path / "r", tmp_path / "x.csv")
    TASKS.pop("own")
    with pytest.raises(TrainingError, match="name a labelled file with --data"):
        score(tmp_path / "r", cpu=True)


@pytest.mark.parametrize(
    "words, says",
    [
        (["train", "table"], "this is for a file of your own: las train --data PATH"),
        (
            ["train", "digits", "--data", "x.csv"],
            "digits has data of its own: leave data out",
        ),
        (
            ["train", "digits", "--target", "y"],
            "digits has data of its own: leave target out",
        ),
        (["train", "--data", "nowhere.csv"], "there is no nowhere.csv"),
        (
            ["train", "--data", "x.csv", "--text", "a", "--values", "b"],
            "give one of them",
        ),
        (["train", "--data", "x.csv", "--goal", "clases"], "goal"),
        (
            ["train", "--data", "x.csv", "--forecast", "3", "--tokens", "300"],
            "series has no tokens to learn",
        ),
        (["predict", "runs/none"], "name the file to answer for with --data"),
        (["predict", "runs/none", "--data", "x.csv"], "there is no run in runs/none"),
    ],
)
def test_commands_refuse_in_one_line(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        main(words)
    said = capsys.readouterr().err
    assert e.value.code == 2 and says in said and said.count("\n") == 1
