import functools, hashlib, http.server, os, threading
from pathlib import Path
import pytest, torch
from forked import forked
from torchvision.datasets import MNIST
import tiny_mnist
from las_nb.tasks import (
    Batch,
    DataError,
    batches,
    data_root,
    describe,
    epoch_order,
    load_task,
    shuffled,
)
from las_nb.tasks.smnist import mnist_file


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "A small MNIST in place of the real one, in a folder."
    monkeypatch.setattr(
        MNIST, "resources", tiny_mnist.files(tmp_path / "MNIST" / "raw")
    )
    return tmp_path


@pytest.fixture
def served(tiny, monkeypatch):
    "The small MNIST behind an address, as a mirror would have it."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a):
            pass

    folder = tiny / "MNIST" / "raw"
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # the first is dead
    monkeypatch.setattr(
        MNIST,
        "mirrors",
        ["http://127.0.0.1:9/", f"http://127.0.0.1:{server.server_port}/"],
    )
    yield folder
    server.shutdown()


def test_splits_are_disjoint_and_fixed(tiny):
    a, b = load_task("smnist", tiny), load_task("smnist", tiny)
    assert [len(a[p].labels) for p in ("train", "valid", "test")] == [90, 10, 40]
    assert all(torch.equal(a[p].inputs, b[p].inputs) for p in a)
    rows = torch.cat([a["train"].inputs, a["valid"].inputs]).flatten(1)
    assert len(rows.unique(dim=0)) == 100  # nothing twice, nothing lost
    assert (
        a["train"].inputs.shape == (90, 784, 1)
        and a["train"].inputs.dtype == torch.float32
        and a["train"].labels.dtype == torch.int64
    )


def test_pmnist_is_smnist_permuted(tiny):
    s, p = load_task("smnist", tiny), load_task("pmnist", tiny)
    for part in s:
        assert torch.equal(
            s[part].inputs[:, shuffled(784)], p[part].inputs
        ) and torch.equal(s[part].labels, p[part].labels)
        assert not torch.equal(s[part].inputs, p[part].inputs)


def test_the_permutation_is_pinned():
    "Another one would be another task: published figures rest on it."
    assert sorted(shuffled(784).tolist()) == list(range(784))
    assert (
        hashlib.sha256(shuffled(784).numpy().astype("<i8").tobytes()).hexdigest()[:16]
        == "fe62e3fef305ce16"
    )


@pytest.mark.skipif(
    not tiny_mnist.real(), reason="MNIST is not at hand; las_data smnist gets it"
)
def test_the_real_files():
    data = load_task("smnist")
    assert {p: len(b.labels) for p, b in data.items()} == dict(
        train=54_000, valid=6_000, test=10_000
    )
    assert data["test"].labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert (
        abs(data["train"].inputs.mean()) < 0.01
        and abs(data["train"].inputs.std() - 1) < 0.01
    )


def test_root_is_option_then_variable_then_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LAS_NB_DATA", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data_root("/two") == Path("/two") and data_root() == Path("/one")
    monkeypatch.delenv("LAS_NB_DATA")
    assert data_root() == tmp_path / "las_nb"


def test_download_goes_on_to_the_next_mirror(served, tmp_path):
    root = tmp_path / "fresh"
    assert len(load_task("smnist", root)["test"].labels) == 40
    # and nothing aside
    assert sorted(p.name for p in (root / "MNIST" / "raw").iterdir()) == sorted(
        n for n, _ in MNIST.resources
    )


def test_a_download_that_arrives_damaged_leaves_nothing(served, tmp_path):
    name = MNIST.resources[0][0]
    (served / name).write_bytes((served / name).read_bytes()[:-7])
    with pytest.raises(DataError, match=f"cannot get {name}"):
        load_task("smnist", tmp_path / "fresh")
    assert not list((tmp_path / "fresh" / "MNIST" / "raw").iterdir())


def test_a_damaged_file_is_named_and_kept(tiny):
    path = tiny / "MNIST" / "raw" / MNIST.resources[0][0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged .* delete it"):
        load_task("smnist", tiny)
    assert path.read_bytes() == content


def test_no_network_and_no_files(monkeypatch, tmp_path):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(DataError, match="Connection refused.*LAS_NB_DATA"):
        mnist_file("train-images-idx3-ubyte.gz", tmp_path)
    with pytest.raises(DataError, match="cannot get"):
        mnist_file("train-images-idx3-ubyte.gz", Path("/dev/null"))


def test_limit_keeps_the_first():
    whole, some = load_task("digits"), load_task("digits", limit=90)
    assert [len(some[p].labels) for p in ("train", "valid", "test")] == [90, 10, 90]
    assert torch.equal(some["train"].inputs, whole["train"].inputs[:90])


def test_batches_with_lengths_and_shares():
    split = Batch(torch.arange(22).view(11, 2), torch.arange(1, 12), torch.arange(11))
    order = epoch_order(11, seed=1, epoch=2)
    got = list(batches(split, 4, order))
    assert [len(b.labels) for b in got] == [4, 4, 3] and torch.equal(
        torch.cat([b.lengths for b in got]), split.lengths[order]
    )
    for b in got:
        assert torch.equal(b.inputs[:, 0], 2 * b.labels) and torch.equal(
            b.lengths, b.labels + 1
        )
    for world in (2, 3, 5):
        for whole, *parts in zip(
            got,
            *(
                batches(split, 4, order, share=slice(r, None, world))
                for r in range(world)
            ),
        ):
            assert sorted(torch.cat([p.labels for p in parts]).tolist()) == sorted(
                whole.labels.tolist()
            )
    assert not torch.equal(order, epoch_order(11, 1, 3)) and torch.equal(
        order, epoch_order(11, 1, 2)
    )
    assert Batch(torch.zeros(2, 3), None, torch.zeros(2)).rows(slice(1)).lengths is None


def test_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean smnist"):
        load_task("mnist")


def test_command(tmp_path):
    done = forked("las_data", "digits")
    assert (
        done.returncode == 0
        and describe("digits") in done.stdout
        and "1,212" in done.stdout
    )
    for args, says in (
        (["smist"], "did you mean smnist"),
        (["smnist", "--root", "/dev/null"], "cannot get"),
    ):
        nowhere = "http://127.0.0.1:9"
        env = os.environ | dict(http_proxy=nowhere, https_proxy=nowhere)
        done = forked("las_data", *args, env=env)
        assert (
            done.returncode == 2
            and says in done.stderr
            and done.stderr.count("\n") == 1
        )


def test_digits_come_at_any_resolution(tiny):
    whole = load_task("smnist", tiny)["test"].inputs
    pixels = whole[:7].view(7, 1, 28, 28)
    half = load_task("smnist", tiny, limit=7, length=196)["test"].inputs
    want = torch.nn.functional.interpolate(
        pixels, (14, 14), mode="bilinear", antialias=True
    )
    torch.testing.assert_close(half, want.view(7, 196, 1))
    same = load_task("smnist", tiny, length=784)["test"].inputs
    assert torch.equal(same, whole)
    with pytest.raises(ValueError, match="square number"):
        load_task("smnist", tiny, length=200)
    with pytest.raises(ValueError, match="pmnist has sequences of its own length"):
        load_task("pmnist", tiny, length=196)
