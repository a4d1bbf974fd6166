"Pathfinder: labels against the drawn contours, the rules of the game, the files."

import json, math, os, shutil
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from las_nb.tasks import DataError, load_task
from las_nb.tasks.pathfinder import (
    SETTINGS,
    ahead,
    folders,
    kit,
    lay,
    read_pathfinder,
    reduced,
    scenes,
    stroke,
    write_pathfinder,
)
from las_nb.tasks.pathfinder import Ground, begin, extend, first_pair


pytestmark = pytest.mark.usefixtures("own_cache")


DRAWN = {}


def drawn(side, margin):
    if (side, margin) not in DRAWN:
        DRAWN[side, margin] = scenes(
            side,
            margin,
            {1: 4000, 2: 500, 3: 4000}[margin],
            np.random.RandomState(side + margin),
        )
    return DRAWN[side, margin]


every = pytest.mark.parametrize(
    "side, margin",
    [(side, margin) for side, s in SETTINGS.items() for margin in s.margins],
)


def alone(k, contour, which):
    "The ink of one contour of one picture."
    canvas = np.zeros((1, *k.empty.shape), np.uint8)
    for kind, y, x in contour.paddles:
        lay(canvas, k.ink, kind[[which]], np.array([0]), y[[which]], x[[which]])
    return canvas[0, k.pad : -k.pad, k.pad : -k.pad]


@every
def test_every_label_follows_from_the_drawn_contours(side, margin):
    s, k = drawn(side, margin), kit(side, margin)
    assert len(s.labels) > 1
    unclear = 0
    for i, label in enumerate(s.labels):
        ink = [alone(k, c, i) for c in s.contours]
        # both contours are in the picture, as bright as they should be beside a dot
        seen = np.maximum(*ink) > 60
        dimmed = k.setting.contrast * np.maximum(*ink)[seen] / s.undotted[i][seen]
        assert (dimmed < 1.02 * max(1, k.setting.distractor_contrast)).all()
        owners = [
            {j for j in range(2) if ink[j][y, x] > 20} for y, x in s.dots[i].tolist()
        ]
        # the second contour may begin on the first, and end on its last paddle
        assert any((a == b) == label for a in owners[0] for b in owners[1])
        unclear += sum(map(len, owners)) > 2
        # and the dots lie on tips: one on a first, one on a last
        for (y, x), tips in zip(s.dots[i], (0, -1)):
            assert any(
                (y, x) == (c.paddles[tips][1][i] - k.pad, c.paddles[tips][2][i] - k.pad)
                for c in s.contours
            )
            assert s.pictures[i, y, x] > 120
        assert s.pictures[i].max() == 255
    assert unclear <= 0.05 * len(s.labels)


@every
def test_contours_keep_the_rules(side, margin):
    s, k = drawn(side, margin), kit(side, margin)
    p = k.setting
    for c in s.contours:
        assert len(c.paddles) == p.contour_length == 14
        tips = [np.stack(q[1:], 1) - k.pad for q in c.paddles]
        # from tip to tip: a paddle and the gap of two margins, rounded to pixels and
        # less in a turn
        for a, b in zip(tips, tips[1:]):
            step = np.hypot(*(b - a).T)
            assert (step <= 2 * (p.length + 2 * margin) + 2).all()
        for t in tips:
            assert (t >= 0).all() and (t < p.side).all()
    first = [np.stack(c.paddles[0][1:], 1) - k.pad for c in s.contours]
    assert (first[0] >= 2 * p.apart).all() and (first[0] < p.side - 2 * p.apart).all()
    assert (np.abs(np.hypot(*(first[0] - first[1]).T) - p.apart) < 1).all()
    # the first paddle, wholly covered, keeps as far from the edges
    assert k.usable[s.contours[0].paddles[0][0]].all()
    assert all(len(rows) <= len(s.labels) for rows, _ in s.distractors) and sum(
        len(r) for r, _ in s.distractors
    ) <= p.distractors * len(s.labels)
    assert all(
        len(c.paddles) == p.distractor_length for _, c in s.distractors if len(c.angle)
    )


@every
def test_grown_paddles_do_not_lie_on_taken_ground(side, margin):
    """Played again, one picture at a time and with another rule book: no paddle wholly
    covers a pixel that an earlier one, but for the last of its contour, wholly
    covers."""
    s, k = drawn(side, margin), kit(side, margin)
    whole = lambda kind: k.ground[kind] == 255
    for i in range(min(len(s.labels), 20)):
        taken = k.empty == 255

        def spot(paddle):
            kind, y, x = (t[i] for t in paddle)
            r = k.ground.shape[1] // 2
            return kind, (slice(y - r, y + r + 1), slice(x - r, x + r + 1))

        for m in range(1, 14):
            for c in s.contours:
                kind, at = spot(c.paddles[m])
                assert not (taken[at] & whole(kind)).any()
                kind, at = spot(c.paddles[m - 1])
                taken[at] |= whole(kind)


def test_turns_are_drawn_by_the_rule():
    """On free ground the turn of a contour has density cos^2 of it, on the pixels of
    the ring."""
    k, n = kit(32, 1), 40_000
    g, row = Ground(k, n), np.arange(n)
    # runs to the right
    c = begin(k, np.full(n, 0), np.full(n, 16 + k.pad), np.full(n, 14 + k.pad))
    found, c = extend(g, c, row, np.random.RandomState(0))
    assert found.all()
    kind = c.paddles[-1][0] - 360
    weight = np.cos(np.minimum(np.abs(k.toward), math.pi / 2)) ** 2
    share = np.bincount(kind, minlength=len(k.ring)) / n
    expected = weight / weight.sum()
    assert np.abs(share - expected).max() < 5 * (0.25 / n) ** 0.5


def test_stamps():
    for side, margin in ((32, 1), (128, 2), (128, 3)):
        k = kit(side, margin)
        p = k.setting
        area = k.ink.sum((1, 2), dtype=int) / 255
        assert (area > 0.5 * p.length * p.thickness).all() and k.ground.max() == 255
        assert (k.ground.sum((1, 2), dtype=int) / 255 > area).all()
        assert k.dot[0].argmax() == k.dot.size // 2 or k.dot[0].max() == 255
    # to the right, two pixels long, one half-pixel wide
    line = stroke(3, ahead(0.0, 4), 1)
    assert np.argwhere(line).tolist() == [[6, x] for x in range(6, 11)]
    assert reduced(np.full((13, 13), 200, np.uint8), 7).tolist() == [[200] * 7] * 7
    # rounded up, whatever the last digits are
    assert ahead(np.radians([0, 60, 120, 180, 240]), 4).tolist() == [
        [0, 4],
        [4, 2],
        [4, -2],
        [0, -4],
        [-3, -2],
    ]


def test_seeds_by_hand():
    """Directions whose seed leaves out the pixel where it begins are not used: where
    it lies outside of a corner, the original finds no free pixel at all."""
    k = kit(32, 1)
    assert 20 < k.usable.sum() < 40 and kit(128, 3).usable.all()
    side, edge, middle = 32, np.zeros((32, 32)), k.seed.shape[1] // 2
    for kind in range(0, 360, 7):
        offsets = np.argwhere(k.seed[kind]) - middle
        left_out = [
            not any(0 <= y + a < side and 0 <= x + b < side for a, b in offsets)
            for y in (0, side - 1)
            for x in (0, side - 1)
        ]
        assert k.usable[kind] == (not any(left_out))
    y, x = np.stack(first_pair(k, 500, np.random.RandomState(0))[0].paddles[0][1:])
    assert ((13 <= y - k.pad) & (y - k.pad <= 18) & (13 <= x - k.pad)).all()


@pytest.mark.parametrize(
    "side, margin, attempts, distractors, contours, others, dots",
    [
        # of the original program, 320 and 30 pictures
        (32, 1, 9000, 1.15, 116.9, 146.5, 239.3),
        (128, 2, 1500, 7.93, 128.7, 129.2, 254.0),
    ],
)
def test_statistics_of_the_original(
    side, margin, attempts, distractors, contours, others, dots
):
    s, k = scenes(side, margin, attempts, np.random.RandomState(4)), kit(side, margin)
    n = len(s.labels)
    assert abs(sum(len(r) for r, _ in s.distractors) / n - distractors) < 0.25
    y, x = np.mgrid[:side, :side]
    grey = [[], [], []]
    for i in range(n):
        lines = k.setting.contrast * np.maximum(*[alone(k, c, i) for c in s.contours])
        extra = np.zeros((side, side))
        for row, c in s.distractors:
            for j in np.flatnonzero(row == i):
                extra = np.maximum(extra, alone(k, c, j))
        extra = k.setting.distractor_contrast * extra
        away = np.min([np.hypot(y - a, x - b) for a, b in s.dots[i]], 0) > 4
        seen = away & (s.pictures[i] > 20)
        grey[0] += s.pictures[i][seen & (lines > 0) & (extra <= lines)].tolist()
        grey[1] += s.pictures[i][seen & (extra > lines)].tolist()
        grey[2] += s.pictures[i][tuple(s.dots[i].T)].tolist()
    found = [np.mean(g) for g in grey]
    assert np.abs(np.subtract(found, (contours, others, dots))).max() < 5


def test_labels_and_dots_are_balanced():
    s = scenes(32, 1, 60_000, np.random.RandomState(0))
    n = len(s.labels)
    assert abs(s.labels.mean() - 0.5) < 4 * 0.5 / n**0.5
    # no more ink for one answer than for the other
    brightness = s.pictures.reshape(n, -1).mean(1)
    a, b = brightness[s.labels == 1], brightness[s.labels == 0]
    assert (
        abs(a.mean() - b.mean())
        < 4 * brightness.std() * (1 / len(a) + 1 / len(b)) ** 0.5
    )


def test_files_do_not_depend_on_jobs_and_are_resumed(tmp_path):
    write_pathfinder(tmp_path / "a", 32, 1030, jobs=1)
    write_pathfinder(tmp_path / "b", 32, 1030, jobs=2)
    a, b = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()}
        for f in (tmp_path / "a", tmp_path / "b")
    )
    assert a == b and len(a) == 1030 + 2 * 128 + 4
    # cut in the second folder
    (tmp_path / "b" / "metadata" / "1.npy").unlink()
    shutil.rmtree(tmp_path / "b" / "imgs" / "1")
    kept = (tmp_path / "b" / "imgs" / "0" / "sample_0.png").stat().st_mtime_ns
    write_pathfinder(tmp_path / "b", 32, 1030, jobs=1)
    assert {
        p.relative_to(tmp_path / "b"): p.read_bytes()
        for p in (tmp_path / "b").rglob("*")
        if p.is_file()
    } == a
    assert (tmp_path / "b" / "imgs" / "0" / "sample_0.png").stat().st_mtime_ns == kept
    write_pathfinder(tmp_path / "c", 32, 30, seed=1, jobs=1)
    assert (tmp_path / "c" / "imgs" / "0" / "sample_3.png").read_bytes() != a[
        Path("imgs/0/sample_3.png")
    ]


@pytest.mark.parametrize("side, few, more", [(32, 40, 240), (128, 16, 32)])
def test_a_smaller_set_is_a_part_of_a_larger_one(tmp_path, side, few, more):
    write_pathfinder(tmp_path / "few", side, few, jobs=1)
    write_pathfinder(tmp_path / "more", side, more, jobs=1)
    files = [p.relative_to(tmp_path / "few") for p in (tmp_path / "few").rglob("*.png")]
    assert len(files) == few + 2 * (few // 8) and {p.parts[1] for p in files} == {
        "0",
        "160",
        "180",
    }
    for p in files:
        assert (tmp_path / "few" / p).read_bytes() == (
            tmp_path / "more" / p
        ).read_bytes()
    for number in (0, 160, 180):
        lines = [
            (tmp_path / f / "metadata" / f"{number}.npy").read_text()
            for f in ("few", "more")
        ]
        assert lines[1].startswith(lines[0])


def test_the_whole_has_the_official_numbers():
    assert (
        folders(160_000) == [(i, 1000) for i in range(200)]
        and sum(n for _, n in folders(2000)) == 2500
    )
    with pytest.raises(ValueError, match="at most 160,000"):
        folders(160_001)


def test_a_folder_that_was_lost_is_drawn_again(tmp_path):
    before = load_task("pathfinder", tmp_path, limit=1200)
    made = tmp_path / "generated-1200-seed0-edition2"
    top = made / "pathfinder32" / "curv_contour_length_14"
    (top / "metadata" / "1.npy").unlink()
    after = load_task("pathfinder", tmp_path, limit=1200)
    assert (top / "metadata" / "1.npy").exists()
    for part in before:
        assert torch.equal(before[part].values, after[part].values) and torch.equal(
            before[part].labels, after[part].labels
        )


@pytest.mark.parametrize("size", [None, 40])
def test_pictures_of_an_earlier_edition_are_left_alone(tmp_path, size):
    "What a generator without editions made is never taken for what is drawn now."
    base = tmp_path if size is None else tmp_path / "generated-40-seed0"
    old = base / "pathfinder32" / "curv_contour_length_14"
    write_pathfinder(old, 32, 40, seed=5, jobs=1)
    note = dict(source="generated by las_nb: Pathfinder", done=True)
    (old / "generated.json").write_text(json.dumps(note))
    before = {p: p.read_bytes() for p in old.rglob("*") if p.is_file()}
    splits = load_task("pathfinder", tmp_path, limit=40)
    assert splits["train"].source.endswith("seed 0, edition 2")
    theirs = next(read_pathfinder(old, 32))[0]
    assert splits["train"].values[:1024].tolist() != list(theirs)
    assert before == {p: p.read_bytes() for p in old.rglob("*") if p.is_file()}


def test_official_files_with_a_gap_are_refused(tmp_path):
    official = tmp_path / "pathfinder32" / "curv_contour_length_14"
    write_pathfinder(official, 32, 16, jobs=1)
    with pytest.raises(
        DataError, match="metadata/1.npy is missing; complete the official files"
    ):
        load_task("pathfinder", tmp_path)


@pytest.mark.parametrize("dated", [False, True])
def test_a_picture_that_is_drawn_over_is_noticed(tmp_path, dated):
    "Its size stays, and its date if it is `dated`; so does the text file that lists it."
    top = tmp_path / "pathfinder32" / "curv_contour_length_14"
    write_pathfinder(top, 32, 40, jobs=1)
    only_first(top)
    path = top / "imgs" / "0" / "sample_0.png"
    for shade in (50, 200):
        Image.fromarray(np.full((32, 32), shade, np.uint8)).save(path)
        if dated:
            os.utime(path, ns=(0, 0))
        values = load_task("pathfinder", tmp_path)["train"].values
        assert values[:1024].unique().tolist() == [shade]


def only_first(top):
    for number in (160, 180):
        (top / "metadata" / f"{number}.npy").unlink()


@pytest.mark.parametrize("side", [32, 128])
def test_official_layout_is_written_and_read_back(tmp_path, side):
    write_pathfinder(tmp_path, side, 12, jobs=1)
    only_first(tmp_path)
    words = [
        line.split(" ")
        for line in (tmp_path / "metadata" / "0.npy").read_text().splitlines()
    ]
    assert [w[:3] for w in words[:2]] == [
        ["imgs/0", "sample_0.png", "0"],
        ["imgs/0", "sample_1.png", "1"],
    ]
    for (pixels, label), w in zip(read_pathfinder(tmp_path, side), words, strict=True):
        with Image.open(tmp_path / w[0] / w[1]) as picture:
            assert (
                picture.mode == "L"
                and picture.tobytes() == pixels
                and len(pixels) == side * side
            )
        assert label == int(w[3]) and int(w[9]) in SETTINGS[side].margins


@pytest.mark.parametrize(
    "damage, says",
    [
        (
            lambda d: (d / "imgs/0/sample_2.png").write_bytes(b""),
            "line 3: .*sample_2.png is damaged",
        ),
        (
            lambda d: (d / "imgs/0/sample_2.png").write_bytes(
                (d / "imgs/0/sample_2.png").read_bytes()[:-150]
            ),
            "line 3: .*sample_2.png is damaged",
        ),
        (
            lambda d: (d / "imgs/0/sample_2.png").unlink(),
            "line 3: .*sample_2.png is missing",
        ),
        (
            lambda d: Image.new("L", (31, 32)).save(d / "imgs/0/sample_2.png"),
            "line 3: .*31 x 32 pixels",
        ),
        (
            lambda d: (d / "metadata/0.npy").write_bytes(b""),
            "0.npy, line 1: it lists no pictures",
        ),
        (
            lambda d: (d / "metadata/0.npy").write_bytes(
                (d / "metadata/0.npy").read_bytes()[:-9]
            ),
            "0.npy, line 6: cut short",
        ),
        (
            lambda d: (d / "metadata/0.npy").write_text(
                (d / "metadata/0.npy")
                .read_text()
                .replace("sample_1.png 1 0 ", "sample_1.png 1 2 ")
                .replace("sample_1.png 1 1 ", "sample_1.png 1 2 ")
            ),
            "0.npy, line 2: .*label of 0 or 1",
        ),
        (
            lambda d: (d / "metadata/0.npy").write_bytes(b"\x93NUMPY\x01\x00\n"),
            "0.npy, line 1: ",
        ),
        (lambda d: (d / "metadata/0.npy").unlink(), "has no .npy files"),
    ],
)
def test_damaged_files_are_told_by_file_and_line(tmp_path, damage, says):
    write_pathfinder(tmp_path, 32, 6, jobs=1)
    only_first(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=says):
        list(read_pathfinder(tmp_path, 32))


def test_tasks(tmp_path):
    splits = load_task("pathfinder", tmp_path, limit=80)
    # validation is cut to a ninth
    assert [len(splits[p].labels) for p in ("train", "valid", "test")] == [
        80,
        8,
        10,
    ] and "generated" in splits["test"].source
    b = splits["train"].rows(slice(3))
    assert (
        b.inputs.shape == (3, 1024, 1)
        and b.lengths is None
        and -1 <= b.inputs.min() < -0.9
        and b.inputs.max() == 1
    )
    official = tmp_path / "lra_release" / "pathfinder32" / "curv_contour_length_14"
    write_pathfinder(official, 32, 50, seed=8, jobs=1)
    only_first(official)
    splits = load_task("pathfinder", tmp_path)
    assert splits["train"].source == "official files" and [
        len(splits[p].labels) for p in ("train", "valid", "test")
    ] == [40, 5, 5]
    assert (
        splits["train"].labels
        == torch.tensor([label for _, label in read_pathfinder(official, 32)][:40])
    ).all()
