"""CONTRIBUTING.md as a newcomer follows it: its new layer, task and smoothing are put
into a copy of the project, exported, and used."""

import json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from pages import NBS, ROOT

BIN = Path(sys.executable).parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def block(title):
    "The code below a heading of CONTRIBUTING.md."
    section = TEXT.split(f"### {title}\n")[1].split("\n### ")[0]
    return re.search(r"```python\n(.*?)```", section, re.S)[1]


def as_cells(code):
    "A cell for every line that begins with `#|`."
    for text in re.split(r"(?m)^(?=#\|)", code):
        if text.strip():
            yield dict(
                cell_type="code",
                id=f"new{abs(hash(text)) % 10**8}",
                metadata={},
                execution_count=None,
                outputs=[],
                source=text.rstrip("\n").splitlines(True),
            )


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    work = tmp_path_factory.mktemp("newcomer")
    for name in ("settings.ini", "pyproject.toml", "_quarto.yml", "README.md"):
        shutil.copy(ROOT / name, work)
    shutil.copytree(ROOT / "las_nb", work / "las_nb")
    (work / "nbs").mkdir()
    shutil.copy(ROOT / "_quarto.yml", work / "nbs")
    for path in NBS.glob("*.ipynb"):
        shutil.copy(path, work / "nbs")

    def change(stem, cells=(), **swap):
        path = work / "nbs" / f"{stem}.ipynb"
        empty = dict(cells=[], metadata={}, nbformat=4, nbformat_minor=5)
        nb = json.loads(path.read_text()) if path.exists() else empty
        nb["cells"] += cells
        text = json.dumps(nb)
        for old, new in swap.values():
            assert old in text
            text = text.replace(old, new, 1)
        path.write_text(text)

    change("average", as_cells(block("A new layer")))
    change("parity", as_cells(block("A new task")))
    change("04_smoothing", as_cells(block("A new smoothing")))
    for room, line in (
        ("room_mixers", "from las_nb.mixers import average"),
        ("room_tasks", "from las_nb.tasks import parity"),
    ):
        assert line in TEXT
        change(room, as_cells(f"#| export\n{line}"))
    done = subprocess.run(
        [BIN / "nbdev_export"], cwd=work, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return work


def run(copy, code, *args):
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=copy,
        env=os.environ | dict(PYTHONPATH=str(copy)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("title", ["A new layer", "A new task", "A new smoothing"])
def test_a_recipe_is_short(title):
    assert len(block(title).splitlines()) < 30


def test_a_new_layer_learns_a_new_task(copy):
    code = "import sys; from las_nb.cli import main; main(['train', *sys.argv[1:]])"
    args = "parity --model average --dim 16 --depth 1 --epochs 1 --cpu"
    assert "parity-average-none-0: test" in run(copy, code, *args.split())


def test_a_new_smoothing_goes_every_way(copy):
    code = """
import itertools, torch
from las_nb.fast import las_attention
from las_nb.las import las_dense
from las_nb.smoothing import hat
q, k, v = torch.randn(3, 1, 4, 300, 8, dtype=torch.float64)
rates = torch.tensor([0, 0.02, 0.1, 0.5], dtype=torch.float64)
for causal, pool in itertools.product((True, False), ("scores", "weights")):
    want = las_dense(q, k, v, rates, hat(5), pool, causal)
    assert (want - las_dense(q, k, v, rates, 5, pool, causal)).abs().max() > 1e-3
    for method in ("linear", "auto"):
        got = las_attention(
            q, k, v, rates, hat(5), pool, causal, method=method, tol=1e-9
        )
        assert (got - want).abs().max() < 1e-7, (causal, pool, method)
print("ok")
"""
    assert "ok" in run(copy, code)
