"""The notebooks as files: exported, clean, with outputs stored. (`make test` runs their
cells with nbdev_test.)"""

import ast, filecmp, json, shutil, subprocess, sys
from pathlib import Path
import pytest
import pages
from pages import NBS, ROOT, cells, directives, notebooks, source

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    "A copy of the project, exported and cleaned anew."
    work = tmp_path_factory.mktemp("fresh")
    for name in ("settings.ini", "_quarto.yml", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, work)
    shutil.copytree(NBS, work / "nbs", symlinks=True)
    (work / "las_nb").mkdir()
    for command in (
        "ruff format nbs",
        "nbdev_export",
        "ruff format las_nb",
        "nbdev_clean",
    ):
        tool, *args = command.split()
        subprocess.run([BIN / tool, *args], cwd=work, check=True, capture_output=True)
    return work


def test_library_is_what_the_notebooks_export(fresh):
    def modules(root):
        return {str(p.relative_to(root)) for p in root.rglob("*.py")}

    names = modules(fresh / "las_nb")
    assert names == modules(ROOT / "las_nb")
    different = filecmp.cmpfiles(
        fresh / "las_nb", ROOT / "las_nb", names, shallow=False
    )[1]
    assert not different, (
        f"las_nb/ differs from the notebooks in {different}: run `make sync`"
    )


def test_notebooks_are_clean(fresh):
    for path in notebooks():
        assert path.read_text(encoding="utf-8") == pages.joined(
            path.read_text(encoding="utf-8")
        ), f"{path.name} prints in pieces: run `make sync`"
        assert path.read_bytes() == (fresh / path.relative_to(ROOT)).read_bytes(), (
            f"{path.name} is not clean: run `make sync`"
        )


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_outputs_are_stored_and_hold_no_error(path):
    code = [c for c in cells(path) if c["cell_type"] == "code"]
    assert any(c["outputs"] for c in code)
    for c in code:
        for o in c["outputs"]:
            assert o["output_type"] != "error", f"{path.name}: {o.get('evalue')}"
            assert "widget" not in json.dumps(list(o.get("data", {}))), (
                f"{path.name}: widgets do not show on GitHub"
            )


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_import_cells_hold_imports_only(path):
    "A cell that mixes imports with other code is run while the docs are made."
    for c in cells(path):
        if (
            c["cell_type"] != "code"
            or directives(c).get("eval") == "false"
            or source(c).lstrip().startswith(("!", "%"))
        ):
            continue
        kinds = [
            isinstance(n, (ast.Import, ast.ImportFrom))
            for n in ast.parse(source(c)).body
        ]
        assert all(kinds) or not any(kinds), f"{path.name}: {source(c)[:60]!r}"


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_outputs_do_not_tell_of_the_machine(path):
    for cell in cells(path):
        for o in cell.get("outputs", []):
            assert o.get("name") != "stderr"
            assert "site-packages" not in json.dumps(o.get("text", ""))


def written(node):
    "Pieces of a text that stand in it whatever is computed."
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from written(node.left)
        yield from written(node.right)
    elif isinstance(node, ast.JoinedStr):
        for part in node.values:
            if isinstance(part, ast.Constant):
                yield part.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def text_of(cell):
    "What a cell hands to `Markdown` at its end, as a syntax tree."
    last = [None, *ast.parse(source(cell)).body][-1]
    match last:
        case ast.Expr(ast.Call(ast.Name("Markdown"), [text])):
            return text


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_stored_sentences_are_those_of_their_cells(path):
    "A sentence that was changed and not computed again would show the old one."
    for cell in cells(path):
        data = [o["data"] for o in cell.get("outputs", []) if "data" in o]
        shown = ["".join(d["text/markdown"]) for d in data if "text/markdown" in d]
        if cell["cell_type"] != "code" or not shown or not (text := text_of(cell)):
            continue
        for piece in written(text):
            assert piece.strip() in shown[-1], f"{path.name} is to be executed again"
