"""The Long Range Arena: downloads, archives, the loaders of all six tasks, batches of
similar length, training on them."""

import http.server, io, json, os, re, subprocess, sys, tarfile, threading, time
from pathlib import Path
import numpy as np, pytest, torch
from forked import forked
from las_nb.tasks import retrieval, text as reviews
from las_nb.tasks import (
    Batch,
    DataError,
    Sequences,
    batches,
    load_task,
    reading_order,
    trivial,
)
from las_nb.tasks._files import encoded
from las_nb.tasks.listops import write_listops
from las_nb.results import arena_table, averages
from las_nb.tasks import ARENA
from las_nb.tasks._files import download, extract, made_or_official
from las_nb.tasks.arena import from_archive
from las_nb.tasks.image import GREY
from las_nb.tasks.retrieval import read_pairs
from las_nb.tasks.text import read_imdb
from las_nb.settings import flat
from las_nb.train import Stopped, build, preset, train

QUIET = dict(progress=False, cpu=True)


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    "A folder in which the samples of all tasks are made once."
    return tmp_path_factory.mktemp("samples")


# --- downloads

CONTENT = os.urandom(3_000_000)
DIGEST = __import__("hashlib").sha256(CONTENT).hexdigest()


@pytest.fixture
def host():
    "A host that can go on in the middle, cut the line, or begin anew each time."

    class Host(http.server.BaseHTTPRequestHandler):
        mode, asked = "good", []

        def log_message(self, *a):
            pass

        def do_GET(self):
            Host.asked.append(self.headers.get("Range"))
            if self.path == "/gone":
                self.send_error(404)
                return
            start = (
                int(re.sub(r"\D", "", self.headers.get("Range") or "0"))
                if Host.mode != "anew"
                else 0
            )
            if start >= len(CONTENT):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            self.wfile.write(
                CONTENT[start : start + 1_000_000]
                if Host.mode == "cut"
                else CONTENT[start:]
            )

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Host.url, Host.asked = f"http://127.0.0.1:{server.server_port}/file.gz", []
    yield Host
    server.shutdown()


def test_download(host, tmp_path):
    path = download(host.url, tmp_path / "sub" / "file.gz", DIGEST)
    assert (
        path.read_bytes() == CONTENT
        and [p.name for p in path.parent.iterdir()] == ["file.gz"]
        and host.asked == [None]
    )


def test_download_goes_on_where_it_was_cut(host, tmp_path):
    host.mode = "cut"
    for arrived in (1_000_000, 2_000_000):
        with pytest.raises(
            DataError, match="the connection broke off.*goes on from there.*put it at"
        ):
            download(host.url, tmp_path / "file.gz", DIGEST)
        assert (tmp_path / "file.gz.part").stat().st_size == arrived and not (
            tmp_path / "file.gz"
        ).exists()
    host.mode = "good"
    assert download(host.url, tmp_path / "file.gz", DIGEST).read_bytes() == CONTENT
    assert (
        host.asked == [None, "bytes=1000000-", "bytes=2000000-"]
        and not (tmp_path / "file.gz.part").exists()
    )


def test_download_from_a_host_that_begins_anew(host, tmp_path):
    (tmp_path / "file.gz.part").write_bytes(b"x" * 500)
    host.mode = "anew"
    assert download(host.url, tmp_path / "file.gz", DIGEST).read_bytes() == CONTENT


def test_download_that_had_arrived_already(host, tmp_path):
    (tmp_path / "file.gz.part").write_bytes(CONTENT)
    assert download(host.url, tmp_path / "file.gz", DIGEST).read_bytes() == CONTENT


def test_wrong_content_is_not_kept(host, tmp_path):
    with pytest.raises(DataError, match="is not what it was"):
        download(host.url, tmp_path / "file.gz", "0" * 64)
    assert not list(tmp_path.iterdir())


def test_without_a_published_checksum_the_found_one_is_noted(host, tmp_path):
    download(host.url, tmp_path / "file.gz")
    assert (tmp_path / "file.gz.sha256").read_text() == f"{DIGEST}  file.gz\n"


def test_a_broken_answer_is_one_line(tmp_path):
    class Broken(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *a):
            pass

        def do_GET(self):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"5\r\nhello\r\nzz")
            self.close_connection = True

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(DataError, match="cannot get"):
        download(f"http://127.0.0.1:{server.server_port}/f", tmp_path / "f")
    server.shutdown()


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/file.gz",
        "http://no-such-host.invalid/file.gz",
        "{host}/gone",
    ],
)
def test_a_dead_host_gives_one_line_and_the_manual_way(url, host, tmp_path):
    with pytest.raises(DataError) as e:
        download(
            url.replace("{host}", host.url.rpartition("/")[0]),
            tmp_path / "file.gz",
            DIGEST,
        )
    assert (
        "\n" not in str(e.value)
        and f"put it at {tmp_path / 'file.gz'}" in str(e.value)
        and not (tmp_path / "file.gz").exists()
    )


def test_processes_that_want_the_same_data_make_it_once(tmp_path):
    "As the processes of one run do: all ask at once for what is not there."
    code = "import sys; from las_nb.tasks import load_task; s = load_task(sys.argv[1], sys.argv[2], limit=40); print(s['train'].source, len(s['train'].labels), int(s['train'].values.long().sum()))"
    for task in ("listops", "pathfinder"):
        running = [
            subprocess.Popen(
                [sys.executable, "-c", code, task, str(tmp_path)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(3)
        ]
        said = [p.communicate() for p in running]
        assert all(p.returncode == 0 for p in running), said
        assert len({out for out, _ in said}) == 1 and "generated" in said[0][0]


@pytest.mark.parametrize(
    "task, says",
    [
        ("retrieval", "lra_release.gz"),
        ("text", "aclImdb_v1.tar.gz"),
        ("image", "cifar-10-python.tar.gz"),
    ],
)
def test_the_command_without_a_network(task, says, tmp_path):
    env = os.environ | dict(
        http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9"
    )
    done = forked("las_data", task, "--root", tmp_path, env=env)
    assert (
        done.returncode == 2
        and says in done.stderr
        and done.stderr.count("\n") == 1
        and "put" in done.stderr
    )


# --- archives


def tar_of(path, files, mode="w:gz"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                tar.addfile(info)
    return path


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/etc/evil", "a\\..\\evil"]
)
def test_no_path_leads_out(name, tmp_path):
    archive = tar_of(tmp_path / "a.tar.gz", {"good": b"1", name: b"2"})
    with pytest.raises(DataError, match="would lead out of"):
        extract(archive, lambda n: n, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz"]


def test_a_plain_tar_with_a_damaged_header_is_told(tmp_path):
    archive = tar_of(
        tmp_path / "a.tar", {f"f{i}": os.urandom(40_000) for i in range(5)}, "w"
    )
    content = bytearray(archive.read_bytes())
    content[2 * 40_960 + 3 * 512 + 150] ^= 1
    spot = content.index(b"f2\0")
    content[spot + 150] ^= 1
    archive.write_bytes(content)
    with pytest.raises(DataError, match="a.tar is damaged"):
        extract(archive, lambda n: n, tmp_path / "out")


def test_a_folder_that_is_there_is_added_to(tmp_path):
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "old").write_text("1")
    extract(
        tar_of(tmp_path / "x.tar.gz", {"a/new": b"2", "b/c": b"3"}),
        lambda n: n,
        tmp_path / "out",
    )
    assert sorted(
        str(p.relative_to(tmp_path / "out"))
        for p in (tmp_path / "out").rglob("*")
        if p.is_file()
    ) == ["a/new", "a/old", "b/c"]


@pytest.mark.parametrize(
    "link", [(tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "good")]
)
def test_links_are_neither_followed_nor_lost(link, tmp_path):
    archive = tar_of(tmp_path / "a.tar.gz", {"good": b"1", "data": link})
    with pytest.raises(DataError, match="data is a link to .* not followed"):
        extract(archive, lambda n: n, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # one that nobody asks for
    assert extract(archive, {"good": "good"}.get, tmp_path / "out") == 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good"]


def test_a_review_that_is_a_link_is_told(tmp_path):
    files = {f"aclImdb/{kind}/0_1.txt": b"fine" for kind in reviews.KINDS}
    files["aclImdb/train/pos/0_1.txt"] = (tarfile.SYMTYPE, "/etc/passwd")
    archive = tar_of(tmp_path / "aclImdb_v1.tar.gz", files)
    with pytest.raises(DataError, match="train/pos/0_1.txt is a link to /etc/passwd"):
        read_imdb(archive, 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-40],
        lambda b: b[: len(b) // 2],
        lambda b: b[:5000] + bytes(200) + b[5200:],
        lambda b: b"nothing of the kind",
        lambda b: b"",
    ],
)
def test_damaged_archives_leave_nothing(damage, tmp_path):
    archive = tar_of(
        tmp_path / "a.tar.gz", {f"f{i}": os.urandom(4000) for i in range(5)}
    )
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(DataError, match="a.tar.gz is damaged"):
        extract(archive, lambda n: n, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz"]


def official_archive(path, top="lra_release/lra_release"):
    "The official archive in small, with all that is confusing about it."
    made = path.parent / "made"
    write_listops(made, 30, jobs=1, low=20, high=60)
    files = {f"{top}/listops-1000/{f.name}": f.read_bytes() for f in made.iterdir()}
    files |= {
        f"{top}/tsv_data/new_aan_pairs.{part}.tsv": b"1.0\ta\tb\tone "
        b"text\tanother\n0.0\tc\td\tthis\tthat\n"
        for part in ("train", "eval", "test")
    }
    files |= {
        f"{top}/pathfinder32/curv_baseline/imgs/0/sample_172.png": b"",
        f"{top}/listops-1000-old/basic_train.tsv": b"x",
    }
    return tar_of(path, files)


@pytest.mark.parametrize("top", ["lra_release/lra_release", "lra_release", "."])
@pytest.mark.parametrize("name", ["lra_release.gz", "lra_release.tar.gz"])
def test_one_task_is_taken_out_of_the_official_archive(top, name, tmp_path):
    root = tmp_path / "root"
    official_archive(root / name, top)
    assert load_task("listops", root)["train"].source == "official files"
    # and nothing else was unpacked
    assert sorted(p.name for p in root.iterdir() if p.is_dir()) == [
        "listops-1000",
        "made",
    ]
    splits = load_task("retrieval", root)
    assert {p: len(s.labels) for p, s in splits.items()} == dict(
        train=2, valid=2, test=2
    ) and not (root / "pathfinder32").exists()
    assert from_archive(root, "listops-1000") and not from_archive(
        root, "pathfinder128"
    )


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("how", ["archive", "by hand", "inside"])
def test_of_two_copies_the_inner_one_is_taken_alone(tmp_path, order, how):
    """The official archive holds listops-1000 and pathfinder128 twice
    (google-research/long-range-arena, issue 38)."""
    files = {}
    for top, seed, n in ("lra_release", 1, 40), ("lra_release/lra_release", 2, 30):
        made = tmp_path / f"made{seed}"
        write_listops(made, n, seed=seed, jobs=1, low=20, high=60)
        for f in made.glob("*.tsv"):
            files[f"{top}/listops-1000/{f.name}"] = f.read_bytes()
    files["lra_release/listops-1000/more.tsv"] = b"only outside"
    root = tmp_path / "root"
    root.mkdir()
    archive = tar_of(root / "lra_release.gz", dict([*files.items()][::order]))
    if how != "archive":
        with tarfile.open(archive) as tar:
            tar.extractall(root, filter="data")
        archive.unlink()
    splits = load_task("listops", root / "lra_release" if how == "inside" else root)
    assert len(splits["train"].labels) == 30
    if how == "archive":
        assert not (root / "listops-1000" / "more.tsv").exists()
        assert sorted(p.name for p in root.iterdir() if p.is_dir()) == ["listops-1000"]


@pytest.mark.parametrize("first", [".DS_Store", "._basic_val.tsv", "generated.json"])
def test_what_lies_in_the_way_of_an_archive(tmp_path, first):
    "What macOS leaves, or a set that was generated before: the archive is taken."
    official_archive(tmp_path / "lra_release.gz")
    own = tmp_path / "listops-1000"
    own.mkdir()
    if first == "generated.json":
        write_listops(own, 40, jobs=1, low=20, high=60)
    note = json.dumps(dict(source="generated by las_nb", done=True))
    (own / first).write_text(note)
    for _ in range(2):
        splits = load_task("listops", tmp_path)
        assert splits["train"].source == "official files"
        assert len(splits["train"].labels) == 30
    assert (own / first).read_text() == note


def test_where_no_place_is_left_for_an_archive(tmp_path):
    official_archive(tmp_path / "lra_release.gz")
    for top in (".", "lra_release", "lra_release/lra_release"):
        (tmp_path / top / "listops-1000").mkdir(parents=True)
    with pytest.raises(DataError, match="listops-1000 is in the way"):
        from_archive(tmp_path, "listops-1000")


# --- text


def imdb(folder, n=12):
    for kind in reviews.KINDS:
        for i in range(n):
            f = folder / "aclImdb" / kind / f"{i}_{8 if 'pos' in kind else 3}.txt"
            f.parent.mkdir(parents=True, exist_ok=True)
            f.write_bytes(f"{kind} {i} ".encode() * (i * 40 + 1))
            # what macOS leaves beside a file
            (f.parent / f"._{f.name}").write_bytes(b"\0\5\26\7")
    (folder / "aclImdb" / "train" / "unsup").mkdir()
    (folder / "aclImdb" / "train" / "unsup" / "0_0.txt").write_text("no label")
    return folder


def packed(folder, name, mode):
    with tarfile.open(folder / name, mode) as tar:
        tar.add(folder / "aclImdb", "aclImdb")
    __import__("shutil").rmtree(folder / "aclImdb")


def test_folder_and_archives_hold_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(reviews, "REVIEWS", 12)
    found = []
    for i, (name, mode) in enumerate(
        [
            (None, None),
            ("aclImdb_v1.tar.gz", "w:gz"),
            ("aclImdb_labelled.tar.xz", "w:xz"),
        ]
    ):
        root = imdb(tmp_path / str(i) / "IMDB")
        if name:
            packed(root, name, mode)
        found.append(load_task("text", root.parent if i else root))
    a = found[0]
    assert {p: len(s.labels) for p, s in a.items()} == dict(train=22, valid=2, test=24)
    for b in found[1:]:
        for part in a:
            assert torch.equal(a[part].values, b[part].values) and torch.equal(
                a[part].labels, b[part].labels
            )
    assert a["train"].lengths().max() == 4096 and a["train"].values[-1] == 0

    def texts(s):
        return {bytes(s.values[i:j].tolist()) for i, j in zip(s.starts, s.starts[1:])}

    assert (
        not texts(a["train"]) & texts(a["valid"])
        and all(t.startswith(b"train") for t in texts(a["train"]) | texts(a["valid"]))
        and all(t.startswith(b"test") for t in texts(a["test"]))
    )
    for text, label in zip(
        (
            bytes(a["test"].values[i:j].tolist())
            for i, j in zip(a["test"].starts, a["test"].starts[1:])
        ),
        a["test"].labels,
    ):
        assert (b"pos" in text[:9]) == label


def test_damaged_reviews_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(reviews, "REVIEWS", 12)
    root = imdb(tmp_path)
    (root / "aclImdb/test/neg/3_3.txt").write_text(" ")
    with pytest.raises(DataError, match="test/neg/3_3.txt is empty"):
        load_task("text", root)
    (root / "aclImdb/test/neg/3_3.txt").unlink()
    with pytest.raises(DataError, match="11 reviews in test/neg, not 12"):
        load_task("text", root)
    __import__("shutil").rmtree(root / "aclImdb/test/neg")
    with pytest.raises(DataError, match="there are 0 reviews in test/neg"):
        read_imdb(root / "aclImdb", 12)
    packed(root, "aclImdb_v1.tar.gz", "w:gz")
    archive = root / "aclImdb_v1.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-300])
    with pytest.raises(DataError, match="aclImdb_v1.tar.gz is damaged or cut short"):
        load_task("text", root)


def test_a_changed_source_is_encoded_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(reviews, "REVIEWS", 12)
    root = imdb(tmp_path)
    packed(root, "aclImdb_v1.tar.gz", "w:gz")
    before = load_task("text", root)["test"].values.clone()
    monkeypatch.setattr(reviews, "REVIEWS", 13)
    imdb(tmp_path, 13)
    # the folder is used before the archive
    assert len(load_task("text", root)["test"].labels) == 26
    (root / "aclImdb/test/neg/3_3.txt").write_text("edited in place")
    assert b"edited in place" in bytes(load_task("text", root)["test"].values.tolist())
    packed(root, "aclImdb_v1.tar.gz", "w:gz")
    assert len(load_task("text", root)["test"].labels) == 26 and len(before) != len(
        load_task("text", root)["test"].values
    )


# --- retrieval

PAIR = b"1.0\tP1\tP2\tsome text here\tand another\n"


@pytest.mark.parametrize(
    "content, line, says",
    [
        (b"", 1, "no pairs"),
        (PAIR * 2 + PAIR[:-1], 3, "cut short"),
        (PAIR + PAIR[:20] + b"\n", 2, "5 columns"),
        (PAIR + b"2.0" + PAIR[3:], 2, "label should be 0 or 1, not '2.0'"),
        (PAIR + b"\n", 2, "5 columns"),
        (b"label\tid1\tid2\ttext1\ttext2\n" + PAIR, 1, "label should be"),
        (PAIR[:-1] + b"\tmore\n", 1, "not 6"),
    ],
)
def test_damaged_pairs_are_told_by_file_and_line(content, line, says, tmp_path):
    (tmp_path / "pairs.tsv").write_bytes(content)
    with pytest.raises(DataError, match=rf"pairs.tsv, line {line}: .*{says}"):
        list(read_pairs(tmp_path / "pairs.tsv"))


def test_an_empty_text_is_one_space(tmp_path):
    (tmp_path / "pairs.tsv").write_bytes(PAIR + b"0\ta\tb\t\tx\n")
    assert list(read_pairs(tmp_path / "pairs.tsv"))[1] == (0, b" ", b"x")


def test_pairs_are_written_and_read_back(samples):
    splits = load_task("retrieval", samples, sample=True)
    for part, name in retrieval.AAN.items():
        rows = [
            line.split("\t")
            for line in (samples / "sample/tsv_data" / f"new_aan_pairs.{name}.tsv")
            .read_text()
            .splitlines()
        ]
        b = splits[part].rows(slice(None))
        assert b.inputs.shape[:2] == (len(rows), 2) and splits[part].towers == 2
        for x, n, label, row in zip(b.inputs, b.lengths, b.labels, rows, strict=True):
            assert [bytes(t[:m].tolist()).decode() for t, m in zip(x, n)] == row[
                3:
            ] and label == float(row[0])


ENCODE = """
import sys
from las_nb.tasks import load_task
from pathlib import Path
splits = load_task("retrieval", sys.argv[1])
peak = int([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1]) / 1024
print(peak, len(splits["train"].labels), splits["train"].lengths().max().item())
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="reads the peak from /proc"
)
def test_two_gigabytes_of_pairs_are_encoded_in_little_memory(tmp_path):
    folder = tmp_path / "tsv_data"
    folder.mkdir()
    # 98 kB
    line = b"1.0\tA\tB\t" + b"word " * 10_000 + b"\t" + b"other " * 8_000 + b"\n"
    with open(folder / "new_aan_pairs.train.tsv", "wb") as f:
        for _ in range(2 * 2**30 // (len(line) * 100) + 1):
            f.write(line * 100)
        size = f.tell()
    for part in ("eval", "test"):
        (folder / f"new_aan_pairs.{part}.tsv").write_bytes(line * 3)
    assert size >= 2 * 2**30

    def measure(root):
        return [
            float(x)
            for x in subprocess.run(
                [sys.executable, "-c", ENCODE, str(root)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()
        ]

    peak, n, longest = measure(tmp_path)
    assert n == size / len(line) and longest == 4000
    (folder / "new_aan_pairs.train.tsv").write_bytes(line * 3)
    nothing, *_ = measure(tmp_path)
    # MiB; what the program itself takes is most of it
    assert peak < nothing + 100 and peak < 2048


# --- image


def grey(path, n=50, m=20, **changes):
    r = np.random.RandomState(0)
    arrays = dict(
        x_train=r.randint(0, 256, (n, 1024)).astype(np.uint8),
        y_train=(np.arange(n) % 10).astype(np.uint8),
        x_test=r.randint(0, 256, (m, 1024)).astype(np.uint8),
        y_test=(np.arange(m) % 10).astype(np.uint8),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
    return arrays


@pytest.mark.parametrize("place", ["CIFAR10/" + GREY, GREY])
def test_a_grey_file_is_used_as_it_is(place, tmp_path):
    a = grey(tmp_path / place)
    before = (tmp_path / place).read_bytes()
    splits = load_task("image", tmp_path)
    assert {p: len(s.labels) for p, s in splits.items()} == dict(
        train=45, valid=5, test=20
    ) and (tmp_path / place).read_bytes() == before
    rows = {bytes(r): l for r, l in zip(a["x_train"], a["y_train"])}
    for part in ("train", "valid"):
        for i, label in enumerate(splits[part].labels):
            assert (
                rows.pop(bytes(splits[part].values[1024 * i : 1024 * (i + 1)].tolist()))
                == label
            )
    assert not rows
    b = splits["train"].rows(slice(2))
    assert b.lengths is None and b.inputs.shape == (2, 1024, 1)
    torch.testing.assert_close(
        b.inputs[0, :, 0],
        (splits["train"].values[:1024] / 255 - 122.6 / 255) / (61 / 255),
    )


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(y_train=None), "lacks an array"),
        (dict(x_train=np.zeros((50, 1000), np.uint8)), "should be"),
        (dict(x_test=np.zeros((20, 1024), np.float32)), "should be"),
        (dict(y_test=np.zeros(19, np.uint8)), "should be"),
        (dict(y_train=np.full(50, 10, np.uint8)), "should be"),
        (dict(y_train=np.full(50, -1)), "should be"),
        (dict(y_train=np.full(50, 0.5)), "should be"),
        (
            dict(x_train=np.zeros((0, 1024), np.uint8), y_train=np.zeros(0, np.uint8)),
            "should be",
        ),
        ("cut", "is damaged"),
    ],
)
def test_damaged_pictures_are_told(changes, says, tmp_path):
    grey(tmp_path / GREY, **(changes if changes != "cut" else {}))
    if changes == "cut":
        (tmp_path / GREY).write_bytes((tmp_path / GREY).read_bytes()[:-5000])
    with pytest.raises(DataError, match=f"{GREY}.*{says}"):
        load_task("image", tmp_path)


# --- sequences and batches


def some(lengths, towers=1, seed=0, **kw):
    g = torch.Generator().manual_seed(seed)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return Sequences(
        torch.randint(1, 250, (int(starts[-1]),), generator=g, dtype=torch.uint8),
        starts,
        torch.arange(len(lengths) // towers) % 3,
        towers,
        **kw,
    )


def test_rows_are_the_sequences():
    lengths = [5, 70, 1, 64, 200, 33]
    s = some(lengths)
    for i in (torch.tensor([4, 0]), slice(1, 4), slice(None), torch.tensor([2])):
        b = s.rows(i)
        which = torch.arange(6)[i].tolist()
        for x, n, label, w in zip(
            b.inputs,
            b.lengths if b.lengths is not None else [b.inputs.shape[1]] * len(which),
            b.labels,
            which,
            strict=True,
        ):
            assert (
                n == lengths[w]
                and torch.equal(x[:n], s.values[s.starts[w] : s.starts[w + 1]])
                and not x[n:].any()
                and label == s.labels[w]
            )
        assert b.inputs.shape[1] % 64 == 0 or b.lengths is None
    assert len(s.rows(slice(0, 0)).labels) == 0
    assert (
        torch.equal(s.first(3).rows(slice(None)).inputs, s.rows(slice(3)).inputs)
        and len(s.first(99).labels) == 6
    )


def test_reading_order():
    lengths = torch.randint(
        10, 2000, (1003,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    s = some(lengths)
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        order = reading_order(s, 16, seed, epoch)
        assert sorted(order.tolist()) == list(range(1003))
        cut = [
            b.lengths.max() if b.lengths is not None else b.inputs.shape[1]
            for b in batches(s, 16, order)
        ]
        padded = sum(b.inputs.numel() for b in batches(s, 16, order))
        assert (
            padded < 1.12 * sum(lengths)
            and len(cut) == 63
            and torch.equal(order, reading_order(s, 16, seed, epoch))
        )
        # neighbours are not sorted
        assert torch.tensor(cut[:-1]).float().diff().abs().mean() > 300
    assert not torch.equal(reading_order(s, 16, 0, 0), reading_order(s, 16, 0, 1))
    even = some([64] * 40)
    assert torch.equal(
        reading_order(even, 16, 0, 3),
        reading_order(Batch(torch.zeros(40, 1), None, torch.zeros(40)), 16, 0, 3),
    )


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_padding_and_order_change_no_result(norm):
    lengths = torch.randint(
        3, 300, (50,), generator=torch.Generator().manual_seed(2)
    ).tolist()
    s = some(lengths)
    torch.manual_seed(0)
    from las_nb.model import LaSTransformer

    model = LaSTransformer(
        3, 16, 2, 2, vocab=256, norm=norm, positions="sinusoidal"
    ).eval()

    def logits(size, order):
        out = torch.empty(50, 3)
        with torch.no_grad():
            for i, b in zip(order.split(size), batches(s, size, order)):
                out[i] = model(b.inputs, b.lengths)
        return out

    alone = logits(1, torch.arange(50))
    for size in (7, 50):
        torch.testing.assert_close(
            logits(size, reading_order(s, size)), alone, rtol=1e-4, atol=1e-5
        )
    # also the statistics of BatchNorm and the gradients are those of the true steps
    model.train()
    b = s.rows(torch.arange(20))
    wide = torch.nn.functional.pad(b.inputs, (0, 128), value=77)
    grads = []
    for x in (b.inputs, wide):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x, b.lengths), b.labels).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


def test_encoded_once_and_mapped(tmp_path):
    source, calls = tmp_path / "source", []
    source.write_text("one")

    def parts():
        calls.append(1)
        for part, label, text in (
            ("test", 1, b"abc"),
            ("train", 0, b"defgh"),
            ("valid", 0, b"k"),
            ("test", 0, b"i"),
        ):
            yield part, label, text

    for _ in range(2):
        s = encoded([source], parts, "here")
        assert (
            list(s) == ["train", "valid", "test"]
            and bytes(s["test"].values.tolist()) == b"abci"
            and s["test"].labels.tolist() == [1, 0]
            and s["test"].starts.tolist() == [0, 3, 4]
        )
    assert len(calls) == 1
    source.write_text("other")
    encoded([source], parts, "here")
    assert len(calls) == 2

    def broken():
        yield "train", 0, b"x"
        raise DataError("bad line")

    source.write_text("third")
    with pytest.raises(DataError, match="bad line"):
        encoded([source], broken, "here")
    with pytest.raises(DataError, match="nothing is left for valid"):
        encoded([source], lambda: iter([("train", 0, b"x")]), "here")

    def unreadable():
        yield "train", 0, b"x"
        open(tmp_path / "gone")

    with pytest.raises(DataError, match="cannot read .*gone"):
        encoded([source], unreadable, "here")
    with pytest.raises(DataError, match="cannot read .*gone"):
        encoded([tmp_path / "gone"], parts, "here")
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "las_nb" / "encoded"
    encoded([source], parts, "here")
    n = len(calls)
    next(cache.glob("*/test.values")).write_bytes(b"ab")  # cut
    assert (
        bytes(encoded([source], parts, "here")["test"].values.tolist()) == b"abci"
        and len(calls) == n + 1
    )
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 1  # nothing aside


def test_flipped_bytes_of_equal_size_and_date_are_noticed(tmp_path, own_cache):
    source = tmp_path / "data"
    source.write_bytes(b"abcd")
    date = source.stat()

    def parts():
        for part in ("train", "valid", "test"):
            yield part, 0, source.read_bytes()

    assert bytes(encoded([source], parts, "")["test"].values.tolist()) == b"abcd"
    source.write_bytes(b"abxd")
    os.utime(source, ns=(date.st_atime_ns, date.st_mtime_ns))
    assert bytes(encoded([source], parts, "")["test"].values.tolist()) == b"abxd"


def test_flipped_bytes_in_the_cache_are_noticed(tmp_path, own_cache):
    source = tmp_path / "data"
    source.write_bytes(b"abcd")

    def parts():
        for part in ("train", "valid", "test"):
            yield part, 1, source.read_bytes()

    cache = Path(os.environ["XDG_CACHE_HOME"]) / "las_nb" / "encoded"
    for name in ("test.labels", "train.values", "valid.starts"):
        encoded([source], parts, "")
        kept = next(cache.glob(f"*/{name}"))
        good = kept.read_bytes()
        kept.write_bytes(bytes(x ^ 1 for x in good))
        found = encoded([source], parts, "")["test"]
        assert kept.read_bytes() == good and found.labels.tolist() == [1]


def test_generated_files_that_were_cut_are_made_again(tmp_path):
    folder = small_listops(tmp_path)
    for harm in ("cut", "note"):
        path = folder / ("basic_test.tsv" if harm == "cut" else "generated.json")
        whole = path.read_bytes()
        path.write_bytes(
            whole[: len(whole) // 2] if harm == "cut" else b'{"source": 1}'
        )
        if harm == "note":
            with pytest.raises(DataError, match="cannot be read; delete"):
                small_listops(tmp_path)
        else:
            small_listops(tmp_path)
            assert path.read_bytes() == whole


def small_listops(root):
    def write(folder):
        write_listops(folder, 30, 0, jobs=1)

    return made_or_official(root, "listops", write, "ListOps", 30)[0]


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match="name another cache with XDG_CACHE_HOME"):
        encoded([tmp_path / "file"], lambda: iter([("train", 0, b"x")]), "here")


def test_trivial_scores_by_hand():
    train_, test = some([1] * 6), some([1] * 4)
    train_.labels = torch.tensor([0, 0, 0, 1, 1, 2])
    test.labels = torch.tensor([0, 1, 1, 2])
    assert trivial(train_, test) == 25
    # 7 was never seen in training
    seen = {6: torch.tensor([0, 0, 0, 1, 1, 1]), 4: torch.tensor([0, 1, 1, 7])}
    assert trivial(train_, test, lambda s: seen[len(s.labels)]) == 75


# --- the six tasks


@pytest.mark.parametrize("task", ARENA)
def test_smoke_preset_trains_on_a_sample(task, samples, tmp_path):
    began = time.process_time()
    record = train(
        task, tmp_path / "run", preset="smoke", options=QUIET | dict(root=samples)
    )
    assert time.process_time() - began < 60
    assert (
        record["sample"]
        and record["data"].startswith("SAMPLE")
        and record["preset"] == "smoke"
        and 0 <= record["test"] <= 100
    )
    assert set(record["trivial"]) == {"majority class"} | (
        {"root operator", "root and its digits", "root and its level"}
        if task == "listops"
        else set()
    )
    assert (
        record["command"] == f"las train {task} --preset smoke"
        and record["name"] == f"{task}-smoke-las-none-0"
    )


def test_the_command_names_sample_and_floor(samples, tmp_path):
    words = ["listops", "--preset", "smoke", "--cpu", "--root", samples]
    done = forked("las_train", *words, "--out", tmp_path / "r")
    assert (
        done.returncode == 0
        and "(on a SAMPLE)" in done.stdout
        and "majority class alone" in done.stdout
        and "root operator alone" in done.stdout
    )
    done = forked("las_eval", tmp_path / "r", "--root", samples, "--cpu")
    assert (
        done.returncode == 0
        and f"test {json.loads((tmp_path / 'r/results.json').read_text())['test']:.2f} "
        "%"
        in done.stdout
    )


@pytest.mark.parametrize("task", ["listops", "retrieval"])
def test_a_cut_run_on_uneven_sequences_goes_on_bit_for_bit(task, samples, tmp_path):
    kw = dict(preset="smoke", limit=40, epochs=2)
    a = train(task, tmp_path / "a", options=QUIET | dict(root=samples), **kw)
    cuts = 0
    while True:
        try:
            b = train(
                task,
                tmp_path / "b",
                resume=True,
                options=QUIET | dict(root=samples, deadline=time.monotonic()),
                **kw,
            )
            break
        except Stopped:
            cuts += 1
    assert cuts > 10 and b["curve"] == a["curve"] and b["test"] == a["test"]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (
        tmp_path / "b/model.safetensors"
    ).read_bytes()
    total = (
        load_task(task, samples, sample=True, limit=40)["train"].lengths().sum().item()
    )
    # true tokens
    assert a["tokens_per_s"] * a["seconds_per_epoch"] == pytest.approx(total)


def test_paper_presets_are_the_rows_that_are_known():
    keys = "depth dim norm prenorm lr weight_decay n_heads causal dropout".split()
    r = flat(preset("listops", preset="paper"))
    assert [r[k] for k in keys] == [6, 256, "batch", False, 1e-3, 0.01, 8, True, 0]
    r = flat(preset("retrieval", preset="paper"))
    assert [r[k] for k in keys[:6]] == [6, 256, "batch", True, 2e-3, 0]
    r = flat(preset("image", preset="paper"))
    keys = "depth dim lr weight_decay window max_rate".split()
    assert [r[k] for k in keys] == [6, 512, 1e-3, 0.01, 3, 1e-3]


def test_learned_positions_reach_far_enough():
    for task in ARENA:
        model = build(preset(task, preset="smoke", positions="learned"))
        assert (
            len(model.position)
            >= {
                "listops": 2000,
                "text": 4096,
                "retrieval": 4000,
                "image": 1024,
                "pathfinder": 1024,
                "pathx": 16_384,
            }[task]
        )


@pytest.mark.parametrize(
    "args, says",
    [
        (["image", "--size", "50"], "leave --size and --seed out"),
        (["listops", "--size", "0"], "--size must be at least 10"),
        (["listop"], "did you mean listops"),
        (["listops", "--jobs", "0"], "--jobs must be at least 1"),
    ],
)
def test_wrong_requests_for_data(args, says, tmp_path):
    done = forked("las_data", *args, "--root", tmp_path)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


def test_data_command_makes_what_is_asked(tmp_path):
    words = "pathfinder --size 40 --seed 3 --jobs 1 --root".split()
    done = forked("las_data", *words, tmp_path)
    assert (
        done.returncode == 0
        and "| train | 40 |" in done.stdout
        and "generated by las_nb: Pathfinder, 32 pixels, 40 for training, seed 3"
        in done.stdout
    )


# --- results


def test_averages():
    five = dict(listops=50.0, text=60.0, retrieval=70.0, image=40.0, pathfinder=80.0)
    a, b = averages(five | dict(pathx=None)).values()
    assert a == 60 and b == pytest.approx(350 / 6)
    assert list(averages(five | dict(pathx=90.0)).values())[1] == 65
    assert list(averages(dict(listops=1.0)).values()) == [None, None]


def test_table():
    def run(task, model, positions, test, seed=0):
        return dict(
            task=task,
            model=model,
            positions=positions,
            seed=seed,
            test=test,
            trivial={"majority class": 17.0}
            | ({"root operator": 36.0} if task == "listops" else {}),
        )

    runs = [
        run("listops", "las", None, 50.0),
        run("listops", "las", None, 54.0, 1),
        run("image", "plain", "sinusoidal", 44.0),
    ]
    table = arena_table(
        runs,
        {
            "Somebody": dict(
                listops=40.0,
                text=60.0,
                retrieval=60.0,
                image=40.0,
                pathfinder=70.0,
                pathx=None,
            )
        },
    )
    assert (
        "| LaS | 52.00 (50.00 to 54.00) |" in table
        and "| plain + positions |" in table
        and "44.00" in table
    )
    assert (
        "*root operator alone* | 36.00 |" in table
        and "Somebody, published* | 40.00 | 60.00 | 60.00 | 40.00 | 70.00 | fail | "
        "54.00 | 53.33 |"
        in table
    )
    assert len({line.count("|") for line in table.splitlines()}) == 1


@pytest.mark.parametrize("facts", ["[]", "3", "{}", "null", '{"sizes": []}'])
def test_a_cache_whose_facts_are_damaged_is_made_again(facts, samples, own_cache):
    before = load_task("listops", samples, sample=True)["train"]
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "las_nb" / "encoded"
    paths = list(folder.glob("*/facts.json"))
    assert paths
    for path in paths:
        path.write_text(facts)
    after = load_task("listops", samples, sample=True)["train"]
    assert torch.equal(after.values, before.values)


def test_an_empty_folder_is_no_official_copy(tmp_path):
    from las_nb.tasks._files import official

    inner, outer = (tmp_path / p for p in ("lra_release/lra_release", "lra_release"))
    for top in (inner, outer):
        (top / "listops-1000").mkdir(parents=True)
    (inner / "listops-1000" / "._basic_val.tsv").write_bytes(b"")
    assert official(tmp_path, "listops-1000") is None
    (outer / "listops-1000" / "basic_val.tsv").write_text("Source\tTarget\n")
    assert official(tmp_path, "listops-1000") == outer / "listops-1000"
