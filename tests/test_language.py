"""Text: windows, own files, vocabularies, models that answer at every position."""

import math

import pytest
import torch

from las_nb.lengths import score_at
from las_nb.mixers import MIXERS
from las_nb.model import LaSTransformer
from las_nb.tasks import DataError, load_task
from las_nb.tasks.passages import (
    cut,
    in_text,
    learn_tokens,
    own_text,
    stream,
    wikitext,
    words,
)
from las_nb.train import load_run, preset, score, train
from las_nb.train.recipe import build, identity
from las_nb.writing import draw, likely

TEXT = "the cat sat on the mat, and the dog ate the hat of the cat\n"


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT * 200)
    return path


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_passages_ask_for_every_token_once_and_never_look_across(stride):
    lengths = [1, 2, 7, 8, 9, 30]
    texts = [bytes([k + 1]) * n for k, n in enumerate(lengths)]
    values = stream(texts)
    split = cut(values, 8, stride, (sum(lengths), 6))
    batch = split.rows(slice(None))
    real = torch.ones_like(batch.inputs, dtype=torch.bool)
    if batch.lengths is not None:
        real = torch.arange(8) < batch.lengths[:, None]
    asked = batch.labels >= 0
    assert asked.sum() == sum(lengths) + len(texts) and not (asked & ~real).any()
    for k, n in enumerate(lengths):
        assert (batch.labels == k + 1).sum() == n
    for row, seen in zip(batch.inputs, real):
        assert len(set(row[seen].tolist()) - {0}) <= 1  # of one document
    whole = split.sizes == 8
    context = split.fresh[
        whole
    ]  # at least a whole window less the stride, or the start
    start = values[split.starts[whole]] == 0
    assert (start | (context >= 8 - stride)).all()


def test_bits_and_word_perplexity_by_hand():
    split = cut(stream([b"ab cd\n"]), 8, 8, (6, words(b"ab cd\n")))
    found = in_text(math.log(2), split)  # one bit for each of six bytes and the end
    assert found["bits_per_byte"] == pytest.approx(7 / 6)
    assert found["word_perplexity"] == pytest.approx(2 ** (7 / 3))
    assert in_text(1.0, load_task("digits")["test"]) == {}


@pytest.mark.parametrize("mixer", list(MIXERS))
def test_answers_at_every_position_look_at_the_past_only(mixer):
    if mixer == "linformer":
        with pytest.raises(ValueError):
            LaSTransformer(16, 16, 1, 2, vocab=16, readout="every", mixer=mixer)
        return
    torch.manual_seed(0)
    sizes = dict(dim=16, depth=2, n_heads=2, vocab=16, max_len=24)
    model = LaSTransformer(16, readout="every", mixer=mixer, tied=True, **sizes).eval()
    x = torch.randint(16, (2, 24))
    y = x.clone()
    y[:, 12:] = torch.randint(16, (2, 12))
    a, b = model(x), model(y)
    assert a.shape == (2, 24, 16)
    assert torch.allclose(a[:, :12], b[:, :12], atol=1e-4)
    assert not torch.allclose(a[:, 12:], b[:, 12:], atol=1e-4)


def test_what_a_model_of_every_position_cannot_be():
    sizes = dict(dim=16, depth=1, n_heads=2, readout="every")
    for wrong, said in (
        (dict(vocab=16, causal=False), "causal"),
        (dict(vocab=16, pairs=True), "pairs"),
        (dict(vocab=17, tied=True), "tied"),
        (dict(in_features=1, tied=True), "tied"),
    ):
        with pytest.raises(ValueError, match=said):
            LaSTransformer(16, **sizes, **wrong)
    with pytest.raises(ValueError, match="every"):
        preset("digits", readout="every")
    with pytest.raises(ValueError, match="every"):
        preset("language", readout="mean")
    with pytest.raises(ValueError, match="leave data out"):
        preset("digits", data="x.txt")


def test_own_text_is_trained_on_and_tested(book, tmp_path):
    out, small = tmp_path / "run", dict(dim=16, depth=1, n_heads=2, epochs=2, lr=1e-2)
    record = train(
        "language",
        out,
        data=str(book),
        length=64,
        batch_size=2,
        **small,
        options=dict(cpu=True),
    )
    assert len(record["curve"]["nats"]) == 2
    # a text that repeats: much better than eight bits
    assert record["bits_per_byte"] < 4 and record["word_perplexity"] < 1e7
    found = score(out)
    for name in ("bits_per_byte", "nats"):
        assert found[name] == pytest.approx(record[name], rel=1e-4)
    model, recipe = load_run(out)
    assert model.readout == "every" and recipe.data.path == str(book)


def test_a_run_keeps_what_its_model_writes(book, tmp_path):
    small = dict(dim=16, depth=1, n_heads=2, epochs=3, length=32, limit=8, lr=1e-2)
    whole = train("language", tmp_path / "a", data=str(book), **small)
    assert len(whole["samples"]) == 3 == len(whole["curve"]["loss"])
    assert all(isinstance(text, str) for text in whole["samples"])
    again = train("language", tmp_path / "b", data=str(book), **small)
    assert again["samples"] == whole["samples"]


def test_pieces_of_words_make_the_same_text(book):
    texts = own_text(book)
    coder = learn_tokens(texts["train"], 300)
    ids = stream(texts["test"], coder)
    assert len(ids) < len(stream(texts["test"])) / 2 and ids.max() < 300
    assert coder.decode(ids[1:-1].tolist()) == texts["test"][0].decode()
    recipe = preset("language", data=str(book), tokens=300, tied=True, dim=16)
    model = build(recipe)
    assert model.head is None and model.embed.num_embeddings == 300
    data = load_task("language", path=str(book), tokens=300, length=32)
    batch = data["valid"].rows(slice(None))
    assert model(batch.inputs, batch.lengths).shape == (*batch.labels.shape, 300)


def test_files_that_are_no_text(tmp_path):
    for content, said in (
        (b"", "1,000 are the least"),
        (b" \n" * 900, "1,000 are the least"),
        ("déjà vu ".encode("latin-1") * 400, "byte 1 is 0xe9"),
        (b"abc\0" * 400, "byte 3 is 0"),
    ):
        (tmp_path / "x.txt").write_bytes(content)
        with pytest.raises(DataError, match=said):
            own_text(tmp_path / "x.txt")
    with pytest.raises(DataError, match="there is no"):
        own_text(tmp_path / "none.txt")


def test_a_folder_of_files(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02d}.md").write_text(f"{i:02d} " * 50)
    (tmp_path / ".hidden").write_bytes(b"\xff" * 2000)
    found = own_text(tmp_path)
    assert [len(found[p]) for p in ("train", "valid", "test")] == [36, 2, 2]
    assert len({d for part in found.values() for d in part}) == 40
    for f in tmp_path.glob("*.md"):
        f.unlink()
    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.txt").write_text(part * 300)
    assert own_text(tmp_path)["valid"] == [b"valid" * 300]
    (tmp_path / "README.md").write_text("about these files " * 100)
    found = own_text(tmp_path)  # what lies beside named parts is not read
    assert found == {p: [p.encode() * 300] for p in ("train", "valid", "test")}
    (tmp_path / "valid.txt").write_text(" ")
    with pytest.raises(DataError, match="no text for valid"):
        own_text(tmp_path)
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(DataError, match="names no valid, but the other two"):
        own_text(tmp_path)
    (tmp_path / "train.txt").unlink()  # one alone is a name like any other
    assert len(own_text(tmp_path)["train"]) == 2


def test_a_folder_with_a_folder_for_every_part(tmp_path):
    for part in ("train", "validation", "test"):
        (tmp_path / part).mkdir()
        for i in range(3):
            (tmp_path / part / f"{i}.txt").write_text(f"{part} {i} " * 200)
    found = own_text(tmp_path)
    assert {p: len(docs) for p, docs in found.items()} == dict(train=3, valid=3, test=3)
    assert all(doc.startswith(b"validation") for doc in found["valid"])


def test_wikitext_that_is_something_else(tmp_path):
    (tmp_path / "wikitext-2").mkdir()
    for part in ("train", "valid", "test"):
        path = tmp_path / "wikitext-2" / f"wiki.{part}.tokens"
        path.write_text(" \n = A = \n \n b c \n" * 3)
    with pytest.raises(DataError, match="words in 3 articles, not 2,088,628 in 600"):
        wikitext(tmp_path)


def test_runs_of_other_tasks_stay_what_they_were():
    # as before there were texts
    assert identity(preset("smnist")) == identity(preset("smnist", tied=False))


@pytest.mark.parametrize("hybrid", ("rotary", "s4d"))
def test_every_second_block_is_of_another_kind(hybrid):
    torch.manual_seed(0)
    sizes = dict(dim=16, depth=3, n_heads=2, vocab=16, readout="every")
    model = LaSTransformer(16, hybrid=hybrid, **sizes).eval()
    kinds = [type(block.mixer).__name__ for block in model.blocks]
    other = {"rotary": "Attention", "s4d": "S4D"}[hybrid]
    assert kinds == ["LaSAttention", other, "LaSAttention"]
    assert [getattr(b.mixer, "rotary", None) for b in model.blocks][1::2] == [
        {"rotary": True, "s4d": None}[hybrid]
    ]
    x, state = torch.randint(16, (2, 30)), model.state(2)
    with torch.no_grad():
        steps = [model.step(x[:, :20], state)]
        steps += [model.step(x[:, t : t + 1], state) for t in range(20, 30)]
        assert torch.allclose(torch.cat(steps, 1), model.features(x), atol=1e-5)


def test_half_of_the_heads_smooth():
    w, alone = (1 / 3,) * 3, (1.0, 0.0, 0.0)
    for heads, rows in (
        ("slow", (w, alone, alone)),
        ("fast", (alone, w, w)),
    ):
        recipe = preset("digits", window_heads=heads, n_heads=3)
        assert build(recipe).blocks[0].mixer.window == rows
    for wrong in (dict(n_heads=1), dict(model="s4d")):
        with pytest.raises(ValueError, match="window_heads|pools nothing"):
            preset("digits", window_heads="slow", **wrong)
    with pytest.raises(ValueError, match="there is no mixer 'foo'"):
        LaSTransformer(10, 16, 2, 2, vocab=16, hybrid="foo")


def test_a_text_is_read_with_more_context_than_in_training(book, tmp_path):
    torch.manual_seed(0)
    sizes = dict(dim=16, depth=1, n_heads=2, vocab=256, readout="every")
    model = LaSTransformer(256, **sizes).eval()
    found = {
        L: score_at(model, "language", L, 10_000, path=str(book)) for L in (16, 64)
    }
    data = load_task("language", length=64, path=str(book))["test"]
    for f in found.values():  # whatever the context, every token is asked for once
        assert f["n"] == len(data.values) - 1
    b = data.rows(slice(0, 1))
    want = torch.nn.functional.cross_entropy(model(b.inputs)[0], b.labels[0])
    same = [
        score_at(model, "language", L, 10_000, 400, path=str(book)) for L in (16, 64)
    ]
    assert same[0]["n"] == same[1]["n"] == 400  # the same letters at every length
    one = score_at(model, "language", 64, 1, path=str(book))
    assert one["n"] == 64 and one["nats"] == pytest.approx(want.item(), rel=1e-5)


def test_no_token_is_drawn_where_none_is_likeliest():
    "NaN would win every time."
    for bad in (float("nan"), float("inf")):
        logits = torch.tensor([[1.0, bad, 3.0]])
        for random in (None, torch.Generator()):
            with pytest.raises(ValueError, match="no finite logits"):
                draw(logits, generator=random)
    tiny = likely(torch.tensor([[1.0, 2.0, float("-inf")]]), temperature=1e-310)
    assert tiny.tolist() == [[0.0, 1.0, 0.0]]
