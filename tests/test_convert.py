"""Converting a decoder of transformers: what is measured, kept and refused."""

import json, math
import pytest, torch
from las_nb.adapt import register_las
from las_nb.cli import main
from las_nb.convert import bits_per_byte, convert, token_pieces, train_on
from las_nb.tasks import DataError
from tiny_hf import TINY

tf = pytest.importorskip("transformers")
TEXT = b"the cat sat on the mat, and the dog ate the hat of the cat\n"


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    config = tf.LlamaConfig(**TINY | dict(vocab_size=256))
    model = tf.LlamaForCausalLM(config)
    train_on(model, token_pieces([TEXT * 50], 32)[0], 40, lr=3e-3)
    return model.eval()


@pytest.fixture
def place(decoder, tmp_path):
    decoder.save_pretrained(tmp_path / "decoder")
    (tmp_path / "text.txt").write_bytes(TEXT * 100)
    return tmp_path


def test_pieces_and_bits_by_hand(decoder):
    pieces, width = token_pieces([b"abc", b"de"], 3)
    assert pieces.tolist() == [[0, 97, 98], [99, 0, 100]]
    assert width == 5 / 8
    with pytest.raises(DataError, match="8 tokens; 9 are the least"):
        token_pieces([b"abc", b"de"], 9)
    pieces = torch.randint(256, (20, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = decoder(pieces).logits[:, :-1]
    nats = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), pieces[:, 1:].flatten()
    )
    want = nats.item() / math.log(2) / 2
    assert bits_per_byte(decoder, pieces, 2.0) == pytest.approx(want, rel=1e-4)


def test_without_parts_nothing_changes(decoder):
    register_las("convert-off", max_rate=0, window=1)
    pieces, _ = token_pieces([TEXT * 20], 32)
    state = {n: t.clone() for n, t in decoder.state_dict().items()}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TINY | dict(vocab_size=256)))
    model.load_state_dict(state)
    found = convert(model, pieces, pieces, name="convert-off", steps=3, lr=1e-3)
    assert found["before"] == pytest.approx(found["exchanged"], abs=1e-3)
    assert found["after"] == pytest.approx(found["unchanged"], abs=1e-2)
    assert found["after"] < found["before"]


def test_the_command(place, capsys):
    out, words = place / "new", "--steps 2 --context 32 --batch_size 2".split()
    words += ["--data", str(place / "text.txt"), "--out", str(out)]
    main(["convert", str(place / "decoder"), *words])
    assert "bits per byte before" in capsys.readouterr().out
    record = json.loads((out / "convert.json").read_text())
    assert record["exchanged"] > record["before"] and record["steps"] == 2
    model = tf.AutoModelForCausalLM.from_pretrained(out)
    assert model.config._attn_implementation == "las"
    main(["convert", str(place / "decoder"), *words])  # its own folder it may renew


@pytest.mark.parametrize(
    "words, said",
    [
        (["nothing"], "no decoder of transformers"),
        (["decoder", "--steps", "0"], "--steps must be at least 1"),
        (["decoder", "--data", "nowhere.txt"], "there is no nowhere.txt"),
        (["decoder", "--out", "decoder"], "is no converted model"),
        (["decoder", "--context", "100000"], "are the least"),
        (["decoder", "--window", "0"], "window must be"),
    ],
    ids=str,
)
def test_what_cannot_be_converted(place, words, said, monkeypatch, capsys):
    monkeypatch.chdir(place)
    if "--data" not in words:
        words = [*words, "--data", "text.txt"]
    with pytest.raises(SystemExit) as e:
        main(["convert", *words])
    assert e.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
