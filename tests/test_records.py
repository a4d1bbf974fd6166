"""Records: one file of JSON lines per grid, whole whatever happens, whole recipes."""

import json, subprocess, sys
import pytest
from las_nb.results import load_results
from las_nb.results.record import gather_records, read_record, record_file, write_record
from las_nb.train import TrainingError, train
from pages import NBS

RESULTS = NBS / "results"


def test_a_record_comes_back_and_replaces_its_elder(tmp_path):
    for test in (1.0, 2.0):
        write_record(tmp_path, "grid/a-0", dict(test=test, curve=dict(valid=[3.0])))
    write_record(tmp_path, "grid/a-1", dict(test=5.0))
    write_record(tmp_path, "alone-0", dict(test=7.0))
    assert read_record(tmp_path, "grid/a-0")["test"] == 2
    assert read_record(tmp_path, "grid/a-0")["name"] == "grid/a-0"
    assert read_record(tmp_path, "alone-0")["test"] == 7
    assert read_record(tmp_path, "grid/a-2") is read_record(tmp_path, "b/c") is None
    files = {p.name: len(p.read_text().splitlines()) for p in tmp_path.glob("*.jsonl")}
    assert files == {"grid.jsonl": 2, "runs.jsonl": 1}


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    code = (
        "import sys; from las_nb.results.record import write_record\n"
        "for i in range(15):\n"
        "    write_record(sys.argv[1], f'grid/{sys.argv[2]}-{i}', dict(test=i))"
    )
    args = [sys.executable, "-c", code, str(tmp_path)]
    writers = [subprocess.Popen([*args, who]) for who in ("a", "b")]
    assert [w.wait() for w in writers] == [0, 0]
    assert len((tmp_path / "grid.jsonl").read_text().splitlines()) == 30


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "grid.jsonl").write_text('{"name": "grid/a"}\n{"na')
    with pytest.raises(ValueError, match="grid.jsonl is no results file"):
        read_record(tmp_path, "grid/a")
    with pytest.raises(ValueError, match="grid.jsonl is no results file"):
        write_record(tmp_path, "grid/b", {})
    (tmp_path / "runs.jsonl").write_text("[]")
    with pytest.raises(TrainingError, match="runs.jsonl is no results file"):
        load_results(tmp_path, "a-*")


def test_patterns_choose_single_runs_and_unfinished_ones(tmp_path):
    for name in ("a-1", "b-0", "a-0"):
        write_record(tmp_path, name, dict(curve=dict(valid=[])))
    assert [r["name"] for r in load_results(tmp_path, "a-*")] == ["a-0", "a-1"]
    (tmp_path / "unfinished").mkdir()
    one = dict(name="a-2", curve=dict(valid=[50.0]))
    (tmp_path / "unfinished" / "a-2.json").write_text(json.dumps(one))
    assert load_results(tmp_path / "unfinished", "a-*") == [one]


def test_records_of_earlier_versions_are_taken_over(tmp_path):
    (tmp_path / "grid").mkdir()
    record = dict(command="las_train digits", curve=dict(valid=[1.0]), test=2.0)
    for path in ("grid/a-0.json", "alone.json"):
        (tmp_path / path).write_text(json.dumps(record))
    (tmp_path / "grid" / "cost.json").write_text("{}")
    assert gather_records(tmp_path) == 2 and gather_records(tmp_path) == 0
    assert read_record(tmp_path, "grid/a-0")["test"] == 2
    assert read_record(tmp_path, "alone")["test"] == 2
    assert [p.name for p in tmp_path.rglob("*.json")] == ["cost.json"]


def test_the_results_of_the_book_are_few_files_and_whole():
    assert sum(p.is_file() for p in RESULTS.rglob("*") if p.suffix != ".lock") <= 80
    for path in RESULTS.glob("*.jsonl"):
        names = [json.loads(line)["name"] for line in path.read_text().splitlines()]
        assert len(names) == len(set(names)) > 0
        assert all(record_file(RESULTS, name) == path for name in names)


@pytest.mark.parametrize(
    "line",
    ['{"test": 1}', "[]", '{"name": "a", "recipe": []}', '{"name": "a", "test": null}'],
)
def test_lines_that_are_no_records_are_named(line, tmp_path):
    (tmp_path / "runs.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="runs.jsonl is no results file"):
        read_record(tmp_path, "a")


@pytest.mark.parametrize("text", ["garbage", "[]", "{}"])
@pytest.mark.parametrize("name", ["results.json", "recipe.json"])
def test_a_damaged_run_is_named(name, text, tmp_path):
    small = dict(dim=8, depth=1, n_heads=2, limit=16, epochs=1, batch_size=8)
    quiet = dict(progress=False, cpu=True)
    train("digits", tmp_path / "run", options=quiet, **small)
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises((ValueError, TrainingError), match=f"{name} is damaged|files"):
        train("digits", tmp_path / "run", resume=True, options=quiet, **small)


@pytest.mark.parametrize("score", ["NaN", "1e9", "-1"])
def test_a_score_that_is_none_is_damage(score, tmp_path):
    (tmp_path / "runs.jsonl").write_text(f'{{"name": "a", "test": {score}}}\n')
    with pytest.raises(ValueError, match="is no results file"):
        read_record(tmp_path, "a")
