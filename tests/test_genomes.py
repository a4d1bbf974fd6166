"""Promoters: two strands, Matthews' correlation, counted words, and the files."""

import random
import pytest, torch
from las_nb.cli import main
from las_nb.tasks import (
    DataError,
    TASKS,
    bounds,
    describe,
    load_task,
    promoters as room,
)
from las_nb.tasks.promoters import BothStrands, Twice, Words, bootstrap, matthews
from las_nb.tasks.promoters import other_strand, read_promoters, strands
from las_nb.tasks.sequences import Batch
from las_nb.train import train

FOLDER = "genomics_dnabert_sample"


def write(path, n=100, letters="ACGT", L=21):
    "Promoters that hold more of GC than others do."
    random.seed(0)
    rows = ["sequence\tlabel"]
    for i in range(n):
        bases = random.choices(letters, [1, 1 + 3 * (i % 2), 1 + 3 * (i % 2), 1], k=L)
        words = ["".join(bases[k : k + 6]) for k in range(L - 5)]
        rows.append(f"{' '.join(words)} \t{i % 2}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture
def root(tmp_path):
    write(tmp_path / FOLDER / "dev.tsv")
    return tmp_path


def test_words_that_overlap_are_read_as_letters(root):
    batch = read_promoters(root / FOLDER / "dev.tsv")
    assert batch.inputs.shape == (100, 21) and batch.labels[:4].tolist() == [0, 1, 0, 1]
    first = (root / FOLDER / "dev.tsv").read_text().splitlines()[1].split()[0]
    assert "".join("ACGT"[i] for i in batch.inputs[0, :6]) == first


def test_the_other_strand_is_the_reverse_complement():
    x = torch.tensor([[0, 0, 1, 2]])  # AACG
    assert other_strand(x).tolist() == [[1, 2, 3, 3]]  # CGTT
    many = torch.randint(4, (50, 9))
    batch = strands(
        Batch(many, None, torch.zeros(50)), torch.Generator().manual_seed(0)
    )
    kept = (batch.inputs == many).all(1)
    assert 10 < kept.sum() < 40
    assert torch.equal(batch.inputs[~kept], other_strand(many)[~kept])


def test_matthews_is_that_of_scikit_learn():
    from sklearn.metrics import matthews_corrcoef

    so, said = torch.randint(2, (2, 200), generator=torch.Generator().manual_seed(1))
    goal = BothStrands()
    outputs = torch.eye(2)[said] * 5
    found = goal.scores(goal.told(outputs, so).tolist(), None)
    assert found["mcc"] == pytest.approx(matthews_corrcoef(so, said), abs=1e-6)
    assert found["mcc"] == found["mcc_one"]
    counts = [found[n] for n in ("yes", "no", "wrong", "missed")]
    assert sum(counts) == 200
    low, high = bootstrap(counts)
    assert low < found["mcc"] < high and 0.2 < high - low < 0.35
    assert matthews(torch.tensor([9, 0, 3, 0])) == 0


def test_the_two_strands_are_averaged_and_told_apart():
    labels = torch.tensor([1, 0])
    first = torch.tensor([[0.0, 4.0], [0.0, 1.0]])  # right, and wrong by a little
    second = torch.tensor([[0.0, 1.0], [4.0, 0.0]])
    goal = BothStrands()
    found = goal.scores(goal.told(torch.cat([first, second]), labels).tolist(), None)
    assert found["accuracy"] == 100 and found["mcc"] == 1 and found["mcc_one"] == 0


def test_splits(root):
    splits = load_task("promoters", root, sample=True)
    assert [len(s.labels) for s in splits.values()] == [60, 10, 30]
    rows = splits["test"].rows(slice(3))
    assert isinstance(splits["test"], Twice) and rows.inputs.shape == (6, 21)
    assert torch.equal(rows.inputs[3:], other_strand(rows.inputs[:3]))
    assert "| 30 | 21 to 21, mean 21 | 2 | " in describe("promoters", root, sample=True)
    write(root / FOLDER / "train.tsv", 50)
    assert [len(s.labels) for s in load_task("promoters", root).values()] == [
        45,
        5,
        100,
    ]


def test_counted_words_learn_what_a_letter_tells(root):
    splits = load_task("promoters", root, sample=True)
    floors, _ = bounds("promoters", splits)
    assert floors["words"] > 80
    assert Words().fit(splits["train"])._texts(torch.tensor([[0, 1]])) == ["AC GT"]


def test_what_is_wrong_is_told_with_its_place(root, monkeypatch):
    path = write(root / "n.tsv", 4, letters="ACGN")
    with pytest.raises(DataError, match=r"n.tsv, line 2: letters other than"):
        read_promoters(path)

    def fetched(url, path, checksum):
        assert url.endswith("/examples/sample_data/ft/6/train.tsv") and checksum is None
        return write(path)

    monkeypatch.setattr(room, "download", fetched)
    with pytest.raises(DataError, match="train.tsv is not what it was"):
        load_task("promoters", root)
    assert not (root / FOLDER / "train.tsv").exists()


def test_a_run(root, tmp_path, capsys):
    quiet = dict(progress=False, cpu=True, root=root)
    sizes = dict(dim=16, depth=1, n_heads=2, epochs=12)
    record = train("promoters", tmp_path / "r", options=quiet, sample=True, **sizes)
    assert record["mcc"] > 0.3 and record["beside"]["words"]["mcc"] > 0.5
    assert record["yes"] + record["no"] + record["wrong"] + record["missed"] == 30
    main(["eval", str(tmp_path / "r"), "--root", str(root), "--cpu"])
    assert f"MCC {record['mcc']:.3f}" in capsys.readouterr().out
    assert "strands" in TASKS["promoters"].augments
