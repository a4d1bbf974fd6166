"""The house: which room may import which, one register of layers and one of tasks, and
cells that a reader can take in at a glance."""

import ast, io, re, subprocess, sys, tokenize
from pathlib import Path
import pytest
from pages import NBS, ROOT, cells, directives, notebooks, source

BIN = Path(sys.executable).parent
LIB = ROOT / "las_nb"


# --- imports point one way


def rooms():
    "Modules in the order of CONTRIBUTING's table: each may import those before it."
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    order = []
    for row in re.findall(r"^\| (`.*?) \|", text, re.M):
        room, _, parts = row.partition(":")
        names = re.findall(r"`([\w.]+)`", parts or room)
        if not parts:
            order += names
            continue
        package = room.strip(" `")
        order += [f"{package}.{n}" for n in names] + [f"{package}.__init__"]
    return order


def module(path):
    return ".".join(path.relative_to(LIB).with_suffix("").parts)


MODULES = {module(p): p for p in LIB.rglob("*.py") if p.name != "_modidx.py"}


def target(name):
    "The module that a dotted name below `las_nb` leads to."
    for candidate in (name, f"{name}.__init__", name.rpartition(".")[0]):
        if candidate.strip(".") in MODULES:
            return candidate.strip(".")
    return f"{name.rpartition('.')[0]}.__init__".strip(".")


def imports(name, path):
    "Every module of the library that a module imports, wherever in it."
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name.split(".")[0] == "las_nb":
                    yield target(a.name.partition(".")[2] or "__init__")
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif (node.module or "").split(".")[0] == "las_nb":
                base = []
            else:
                continue
            inner = (node.module or "").removeprefix("las_nb").strip(".")
            whole = ".".join([*base, *inner.split(".")]).strip(".")
            for a in node.names:
                yield target(f"{whole}.{a.name}".strip("."))
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.endswith("import_module") or called == "__import__":
                said = ast.unparse(node.args[0]) if node.args else ""
                assert "las_nb" not in said, f"{name} imports by a string: {said}"


def test_the_table_names_every_module():
    assert sorted(rooms()) == sorted(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_room_imports_the_rooms_before_it(name):
    order = rooms()
    for used in imports(name, MODULES[name]):
        if used == name:
            continue
        if name == "__main__" or used.rpartition(".")[0] == name.rpartition(".")[0]:
            if name.endswith("__init__"):
                continue  # a package gives what its own files hold
        assert order.index(used) < order.index(name), f"{name} imports {used}"


# --- one register of layers, one of tasks


def in_a_notebook(stem, after):
    "Run what a notebook exports as its reader does, and then a few lines more."
    code = ["import matplotlib", "matplotlib.use('agg')"]
    for cell in cells(NBS / f"{stem}.ipynb"):
        if cell["cell_type"] == "code" and {"export", "exports"} & set(
            directives(cell)
        ):
            code.append(source(cell))
    done = subprocess.run(
        [sys.executable, "-c", "\n\n".join([*code, after])],
        cwd=NBS,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


def test_a_reader_of_the_model_can_name_every_layer():
    said = in_a_notebook(
        "06_model",
        "print(type(LaSTransformer(10, 16, 1, 4, vocab=5, mixer='s4d').blocks[0].mixer))",
    )
    assert "S4D" in said


def test_a_reader_of_the_data_can_name_every_task():
    said = in_a_notebook(
        "17_data",
        "from las_nb.tasks import TASKS, load_task\n"
        "import las_nb.tasks.task as t\n"
        "assert t.TASKS is TASKS\nprint(*TASKS)",
    )
    for name in ("digits", "smnist", "listops", "retrieval", "pathx", "motif"):
        assert name in said.split()


@pytest.mark.parametrize("first", ["las_nb.model", "las_nb.tasks.task", "las_nb.cli"])
def test_registers_are_full_whatever_is_imported_first(first):
    code = (
        f"import {first}\nfrom las_nb.mixers.register import MIXERS\n"
        "from las_nb.tasks.task import TASKS\nprint(len(MIXERS), len(TASKS))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert said.split() == ["17", "23"]


def test_the_list_of_runs_builds_no_model():
    "More than a thousand runs are listed from their files alone."
    code = """
import las_nb.cli, las_nb.model
def refuse(*args, **options): raise AssertionError("a model was built")
las_nb.model.LaSTransformer.__init__ = refuse
las_nb.cli.main(["experiments", "list", "--results", "nbs/results"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]
    lines = done.stdout.splitlines()
    assert len(lines) > 1000 and any("finished" in line for line in lines)


# --- lines and cells


def test_code_is_formatted():
    for command in (
        ["ruff", "format", "--check", "nbs", "las_nb", "tests"],
        ["ruff", "check", "nbs", "las_nb", "tests"],
    ):
        done = subprocess.run(
            [BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:]


INLINE = {"if", "and", "or", "for", "lambda"}


def decisions(code):
    "How many decisions and loops stand inside each line: line number -> number."
    found, first = {}, True
    for t in tokenize.generate_tokens(io.StringIO(code).readline):
        if t.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            first = True
        elif t.type not in (tokenize.NL, tokenize.COMMENT):
            if not first and t.type == tokenize.NAME and t.string in INLINE:
                found[t.start[0]] = found.get(t.start[0], 0) + 1
            first = False
    return found


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_a_cell_is_taken_in_at_a_glance(path):
    for cell in cells(path):
        code = source(cell)
        if cell["cell_type"] != "code" or "[ -e /content ]" in code:
            continue
        lines = code.splitlines()
        assert len(lines) <= 60, f"{path.name}: {len(lines)} lines: {lines[1]}"
        for number, n in decisions(code).items():
            assert n <= 2, f"{path.name}: {lines[number - 1]}"
        # prose in a string, of a cell that is not shown, may be longer
        if directives(cell).get("echo") == "false":
            code = re.sub(r'"""(?:.|\n)*?"""', '""', code)
        for line in code.splitlines():
            assert len(line) <= 88 or line.startswith("#|"), f"{path.name}: {line}"
