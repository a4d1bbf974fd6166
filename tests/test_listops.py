"""ListOps: the evaluator against others, the distribution against the published one,
the files."""

import random, re, statistics
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from las_nb.tasks import DataError, TASKS, load_task, trivial
from las_nb.tasks._files import made_or_official, noted
from las_nb.tasks.listops import (
    OPERATORS,
    VOCAB,
    block_of_lines,
    evaluate,
    grow,
    long_tree,
    read_listops,
    root_and_digits,
    root_and_level,
    root_operator,
    to_text,
    to_tokens,
    write_listops,
)


pytestmark = pytest.mark.usefixtures("own_cache")


def by_python(text):
    "Python's own parser and the statistics module do the work."
    code = re.sub(r"[()]", "", text)
    for name in OPERATORS:
        code = code.replace(f"[{name}", f"{name}([")
    code = re.sub(r"\]", "]),", code)
    code = re.sub(r"(\d)", r"\1,", code)
    names = dict(
        MIN=min,
        MAX=max,
        MED=lambda a: int(statistics.median(a)),
        SM=lambda a: sum(a) % 10,
    )
    # noqa: S307 (generated text only)
    return eval(code.strip(), {"__builtins__": {}}, names)[0]


trees = st.recursive(
    st.integers(0, 9),
    lambda inner: st.tuples(
        st.sampled_from(OPERATORS), st.lists(inner, min_size=1, max_size=6)
    ),
    max_leaves=60,
)


@settings(max_examples=300, deadline=None)
@given(trees)
def test_two_evaluators_agree(tree):
    text = to_text(tree)
    assert evaluate(text) == by_python(text)
    assert evaluate(re.sub("[()]", "", text)) == evaluate(text)


def test_evaluators_agree_on_long_trees():
    source = random.Random(11)
    for _ in range(100):
        text = to_text(long_tree(source)[0])
        assert evaluate(text) == by_python(text)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "one value"),
        ("3 4", "one value"),
        ("]", "closes nothing"),
        ("[MAX ]", "no arguments"),
        ("[MAX 3", "never closed"),
        ("[MEAN 3 ]", "neither"),
        ("12", "neither"),
        ("[MAX 3 ] ]", "closes nothing"),
        ("[ 3 ]", "neither"),
        ("٣", "neither"),
    ],
)
def test_what_is_no_list_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        evaluate(text)


def test_distribution_is_the_published_one():
    "5,000 trees: figures of the official generator, within sampling error."
    source = random.Random(5)
    rows = [long_tree(source) for _ in range(5000)]
    lengths = torch.tensor([float(n) for _, n in rows])
    labels = torch.tensor([evaluate(to_text(t)) for t, _ in rows])
    assert 500 < lengths.min() and lengths.max() < 2000
    error = lengths.std() / 5000**0.5
    assert (
        abs(lengths.mean() - 1039) < 4 * error
        and abs(lengths.median() - 958) < 5 * error
    )
    shares = 100 * labels.bincount(minlength=10) / 5000
    # one standard error is half a point
    for digit in (0, 9):
        assert abs(shares[digit] - 17) < 2.5
    assert all(6 < s < 10 for s in shares[1:9])
    for operator in OPERATORS:
        assert abs(sum(t[0] == operator for t, _ in rows) - 1250) < 200
    arity = torch.tensor([float(len(t[1])) for t, _ in rows])
    assert arity.min() == 2 and arity.max() == 10


def test_a_node_is_drawn_as_described():
    source = random.Random(6)
    drawn = [grow(source, 10**9)[0] for _ in range(40_000)]
    inner = [t for t in drawn if not isinstance(t, int)]
    assert abs(len(inner) / 40_000 - 0.25) < 4 * (0.25 * 0.75 / 40_000) ** 0.5
    count = torch.tensor([len(t[1]) for t in inner]).bincount(minlength=11)[2:] / len(
        inner
    )
    assert (count - 1 / 9).abs().max() < 0.012

    def depth(t):
        return 1 if isinstance(t, int) else 1 + max(map(depth, t[1]))

    assert max(map(depth, drawn)) == 10


def test_length_counts_tokens():
    source = random.Random(7)
    for _ in range(50):
        tree, n = long_tree(source)
        # and the end mark
        assert len(to_tokens(to_text(tree).encode())) == n + 1 and n <= 1999


def test_known_text():
    assert (
        to_text(("MAX", [3, ("SM", [1, 2]), 7]))
        == "( ( ( ( [MAX 3 ) ( ( ( [SM 1 ) 2 ) ] ) ) 7 ) ] )"
    )
    assert [VOCAB[t] for t in to_tokens(b"( ( ( [SM 0 ) 9 ) ] )")] == [
        "[SM",
        "0",
        "9",
        "]",
        "end",
    ]


def test_files_do_not_depend_on_jobs_and_grow_by_prefix(tmp_path):
    write_listops(tmp_path / "a", 1300, jobs=1)
    write_listops(tmp_path / "b", 1300, jobs=2)
    write_listops(tmp_path / "c", 600, jobs=1)
    lines = {
        k: (tmp_path / k / "basic_train.tsv").read_text().splitlines() for k in "abc"
    }
    assert (
        lines["a"] == lines["b"]
        and lines["a"][:601] == lines["c"]
        and len(lines["a"]) == 1301
        and lines["a"][0] == "Source\tTarget"
    )
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "basic_test.tsv",
        "basic_train.tsv",
        "basic_val.tsv",
    ]
    parts = [
        set((tmp_path / "c" / f"basic_{p}.tsv").read_text().splitlines()[1:])
        for p in ("train", "val", "test")
    ]
    # no tree twice, in one file or in two
    assert len(set.union(*parts)) == sum(map(len, parts)) == 1800


def test_other_lengths_and_seeds(tmp_path):
    write_listops(tmp_path, 40, seed=3, jobs=1, low=20, high=60)
    rows = list(read_listops(tmp_path / "basic_train.tsv"))
    assert all(20 < len(t) - 1 < 60 for t, _ in rows) and len(rows) <= 40
    with pytest.raises(ValueError, match="low must be"):
        write_listops(tmp_path, low=50, high=52)


def test_written_and_read_back(tmp_path):
    write_listops(tmp_path, 60, jobs=1)
    texts = [
        line.split("\t")
        for line in (tmp_path / "basic_val.tsv").read_text().splitlines()[1:]
    ]
    for (tokens, label), (text, target) in zip(
        read_listops(tmp_path / "basic_val.tsv"), texts, strict=True
    ):
        assert (
            label == int(target) == by_python(text)
            and [VOCAB[t] for t in tokens[:-1]] == re.sub("[()]", "", text).split()
        )


@pytest.mark.parametrize(
    "damage, line, says",
    [
        (lambda t: b"", 1, "header"),
        (lambda t: t.replace(b"Source", b"Text"), 1, "header"),
        (lambda t: t[: t.index(b"\n") + 1], 2, "no lists"),
        (lambda t: t[:-1], 31, "cut short"),
        (lambda t: t[:-700], 31, "cut short"),
        (
            lambda t: (
                t.replace(b"\t7\n", b"\t8\n")
                .replace(b"\t3\n", b"\t8\n")
                .replace(b"\t0\n", b"\t9\n")
            ),
            None,
            "the label says",
        ),
        (lambda t: t.replace(b"\t0\n", b"\tzero\n"), None, "the label says 'zero'"),
        (lambda t: t.replace(b"[MAX", b"[MOX", 1), None, "neither"),
        (lambda t: t + b"\n", 32, "a list, a tab and a digit"),
        (lambda t: t + b"\xff\xfe 3\t3\n", 32, "not plain text"),
    ],
)
def test_damaged_files_are_told_by_file_and_line(tmp_path, damage, line, says):
    write_listops(tmp_path, 30, jobs=1)
    path = tmp_path / "basic_train.tsv"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        DataError, match=rf"basic_train.tsv, line {line or r'[0-9]+'}: .*{says}"
    ):
        list(read_listops(path))


def test_official_files_are_used_where_they_lie(tmp_path):
    folder = tmp_path / "lra_release" / "lra_release" / "listops-1000"
    write_listops(folder, 40, seed=9, jobs=1, low=20, high=90)
    splits = load_task("listops", tmp_path)
    assert (
        splits["train"].source == "official files"
        and 30 < len(splits["train"].labels) <= 40
        and not (tmp_path / "listops-1000").exists()
    )
    (folder / "basic_val.tsv").unlink()
    with pytest.raises(DataError, match="basic_val.tsv is missing"):
        load_task("listops", tmp_path)


def test_generated_sets_say_so_and_keep_apart(tmp_path):
    splits = load_task("listops", tmp_path, limit=50)
    assert (
        "generated" in splits["train"].source
        and "50" in splits["train"].source
        and len(splits["train"].labels) == 50
    )
    assert "SAMPLE" in load_task("listops", tmp_path, sample=True)["test"].source
    assert not (tmp_path / "listops-1000").exists()
    assert len(load_task("listops", tmp_path, sample=True)["train"].labels) == 500


def test_what_was_half_made_is_made_again(tmp_path):
    def cut(folder):
        (folder / "x").write_text("half")
        raise KeyboardInterrupt

    def whole(folder):
        (folder / "x").write_text("whole")

    with pytest.raises(KeyboardInterrupt):
        made_or_official(tmp_path, "set", cut, "a set")
    assert noted(tmp_path / "set")["done"] is False
    folder, source = made_or_official(tmp_path, "set", whole, "a set")
    assert (folder / "x").read_text() == "whole" and source.startswith("generated")
    with pytest.raises(DataError, match="cannot write a set"):
        made_or_official(Path("/dev/null"), "set", whole, "a set")


def test_trivial_readers(tmp_path):
    splits = load_task("listops", tmp_path, limit=1500)
    train, test = splits["train"], splits["test"]
    assert TASKS["listops"].readers["root operator"] is root_operator
    readers = (None, root_operator, root_and_digits, root_and_level)
    scores = [trivial(train, test, r) for r in readers]
    # 17, 36.5, 48 and 60 on the large set; one standard error is 1.3
    assert 14 < scores[0] < 21 and 30 < scores[1] < 41
    assert 42 < scores[2] < 53 and 54 < scores[3] < 66


def test_root_and_digits_by_hand():
    from las_nb.tasks import Sequences

    texts = {
        "[MAX 3 7 [MIN 1 2 ] ]": ("MAX", 7),
        "[MIN [MAX 1 9 ] 4 6 ]": ("MIN", 4),
        "[MED 1 [SM 5 5 ] 4 8 ]": ("MED", 4),
        "[MED 2 5 ]": ("MED", 3),
        "[SM 9 [MIN 3 3 ] 8 ]": ("SM", 7),
        "[SM [MAX 1 2 ] ]": ("SM", 10),
    }
    rows = [to_tokens(t.encode()) for t in texts]
    split = Sequences(
        torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8),
        torch.tensor([0] + [len(r) for r in rows]).cumsum(0),
        torch.zeros(len(rows)),
    )
    assert root_and_digits(split).tolist() == [
        11 * OPERATORS.index(o) + v for o, v in texts.values()
    ]
    level = (7, 4, 4, 3, 7, 9)  # a MIN for 0, a MAX for 9, an SM for 4
    assert root_and_level(split).tolist() == [
        11 * OPERATORS.index(o) + v for (o, _), v in zip(texts.values(), level)
    ]
    assert root_operator(split).tolist() == [
        13 + OPERATORS.index(o) for o, _ in texts.values()
    ]


def test_blocks_are_seeded():
    a = block_of_lines(0, 20, 90, ("train", 0, 5))
    b = block_of_lines(0, 20, 90, ("train", 1, 5))
    c = block_of_lines(1, 20, 90, ("train", 0, 5))
    assert a != b and a != c and a == block_of_lines(0, 20, 90, ("train", 0, 5))
