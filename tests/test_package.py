"""The wheel as a stranger gets it: built, installed beside torch and fastcore alone,
imported."""

import email, importlib, re, shutil, subprocess, sys, venv, zipfile
from importlib import metadata
from pathlib import Path
import pytest, yaml
from packaging.requirements import Requirement
from las_nb import LaSTransformer, las_attention
from pages import ROOT, settings

try:
    import tomllib
except ImportError:
    import tomli as tomllib  # Python 3.10


def closure(*names):
    "Names of these distributions and of all that they require, extras aside."
    todo, seen = list(names), set()
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in seen:
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        seen.add(name)
        for r in map(Requirement, requires):
            if not r.marker or r.marker.evaluate({"extra": ""}):
                todo.append(r.name)
    return seen


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """A clean environment: the wheel, and links to torch, fastcore and what they
    require."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, with_pip=False)
    site = next(home.glob("lib/python*/site-packages"))
    for name in closure("torch", "fastcore"):
        for f in metadata.files(name) or []:
            top = Path(f.parts[0])
            here = Path(metadata.distribution(name).locate_file(top))
            if ".." not in f.parts and here.exists() and not (site / top).exists():
                (site / top).symlink_to(here)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(site),
            str(wheel),
        ],
        check=True,
    )
    return home / "bin" / "python"


def test_imports_with_torch_and_fastcore_alone(python):
    code = """
import importlib, pkgutil, sys, las_nb
for m in pkgutil.walk_packages(las_nb.__path__, "las_nb."):
    if m.name != "las_nb.fast.fused":  # Triton's, and asked for on a GPU alone
        importlib.import_module(m.name)
extra = {"matplotlib", "sklearn", "IPython", "nbdev", "tqdm", "safetensors", "torchvision", "jupyterlab", "accelerate", "huggingface_hub", "tensorboard"}
for name in extra:
    try: importlib.import_module(name)
    except ImportError: continue
    raise SystemExit(f"{name} should not be here")
assert not extra & set(sys.modules)
import torch
from las_nb.model import LaSTransformer
print(las_nb.__file__, LaSTransformer(3, 16, 1, vocab=5)(torch.zeros(2, 4, dtype=torch.long)).shape)
"""
    done = subprocess.run(
        [python, "-I", "-c", code], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert "site-packages" in done.stdout and "torch.Size([2, 3])" in done.stdout


@pytest.fixture(scope="module")
def meta(wheel):
    with zipfile.ZipFile(wheel) as z:
        return email.message_from_bytes(
            z.read(next(n for n in z.namelist() if n.endswith("/METADATA")))
        )


def test_metadata_comes_from_settings(wheel, meta):
    s = settings()
    assert (
        meta["Version"] == s["version"]
        and meta["Summary"] == s["description"]
        and meta["Author"] == s["author"]
    )
    assert set(meta.get_all("Provides-Extra")) == {
        "train",
        "data",
        "hub",
        "cluster",
        "dev",
    }
    urls = dict(u.split(", ", 1) for u in meta.get_all("Project-URL"))
    assert urls == {
        "Documentation": s["doc_host"] + s["doc_baseurl"],
        "Source": s["git_url"],
        "Issues": f"{s['git_url']}/issues",
        "Changelog": f"{s['git_url']}/blob/{s['branch']}/CHANGELOG.md",
    }
    assert wheel.stat().st_size < 380_000  # code alone: no notebooks, no results
    import las_nb

    assert las_nb.__version__ == s["version"]


def test_an_index_can_file_the_wheel(meta):
    known = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "classifiers"
        ]
    )
    given = meta.get_all("Classifier")
    assert set(given) == known and not any(c.startswith("License") for c in given), (
        "the licence is named by License-Expression alone"
    )
    assert (
        meta["License-Expression"] == "Apache-2.0"
        and meta["Requires-Python"] == f">={settings()['min_python']}"
    )
    oldest = f"Programming Language :: Python :: {settings()['min_python']}"
    assert {
        oldest,
        "Typing :: Typed",
        "Operating System :: OS Independent",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
    } <= set(given)
    assert (
        meta["Description-Content-Type"] == "text/markdown"
        and len(meta.get_payload()) > 1000
    )


def test_types_are_announced(wheel):
    with zipfile.ZipFile(wheel) as z:
        assert "las_nb/py.typed" in z.namelist(), (
            "the wheel lacks las_nb/py.typed: was it deleted?"
        )


def test_citation_file():
    path = ROOT / "CITATION.cff"
    subprocess.run(
        [
            Path(sys.executable).parent / "check-jsonschema",
            "--builtin-schema",
            "vendor.citation-file-format",
            path,
        ],
        check=True,
    )
    cite, s = yaml.safe_load(path.read_text(encoding="utf-8")), settings()
    assert cite["version"] == s["version"], (
        f"CITATION.cff says version {cite['version']}, settings.ini {s['version']}: "
        "make them equal"
    )
    assert (
        cite["repository-code"] == s["git_url"]
        and cite["url"] == s["doc_host"] + s["doc_baseurl"]
        and cite["abstract"] == s["description"]
    )


def test_import_is_light_and_silent(python):
    """After torch's own import: under 2 s for the package, nothing printed, no state of
    torch or of the process changed."""
    code = """
import os, random, sys, threading, time, warnings
import torch
warnings.simplefilter("error")
def state(): return (torch.get_rng_state().tolist(), random.getstate(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), dict(os.environ), threading.active_count(), os.getcwd(), sorted(os.listdir(".")))
before, start = state(), time.perf_counter()
import las_nb
seconds = time.perf_counter() - start
assert state() == before, "importing changed something"
assert seconds < 2, f"import las_nb took {seconds:.1f} s"
print("fine")
"""
    done = subprocess.run(
        [python, "-I", "-c", code], capture_output=True, text=True, cwd="/"
    )
    # torch itself warns when numpy is missing
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_names_at_the_top(python):
    code = "import las_nb; print(all(hasattr(las_nb, n) for n in las_nb.__all__), len(las_nb.__all__), las_nb.las_attention.__module__)"
    assert subprocess.run(
        [python, "-I", "-c", code], capture_output=True, text=True, cwd="/"
    ).stdout.split() == ["True", "10", "las_nb.fast.api"]


def test_health_check_in_a_bare_environment(python):
    "`python -m las_nb`: versions, what is missing, devices, health; exit 0."
    done = subprocess.run(
        [python, "-I", "-m", "las_nb"], capture_output=True, text=True, cwd="/"
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 5, done.stderr
    assert (
        settings()["version"] in lines[0]
        and "torch" in lines[0]
        and "accelerate missing" in lines[1]
        and "cpu" in lines[2]
        and lines[3].startswith("kernel in C for the CPU: ")
        and lines[4].startswith("health: ok; cpu agrees")
    )


def test_health_check_tells_the_ill(monkeypatch, capsys):
    main = importlib.import_module("las_nb.__main__")
    wrong = lambda *a, **k: las_attention(*a, **k) * 1.01
    monkeypatch.setattr(main, "las_attention", wrong)
    assert main.main() == 1 and "NOT WELL; cpu DISAGREES" in capsys.readouterr().out

    def fails(*a, **k):
        raise RuntimeError("no kernel\nmore")

    monkeypatch.setattr(main, "las_attention", fails)
    assert (
        main.main() == 1
        and "cpu fails with RuntimeError: no kernel" in capsys.readouterr().out
    )


def test_shipped_checkpoint_reads_digits():
    "The model in the repository scores what its record says."
    import json
    from las_nb.digits import accuracy
    from las_nb.tasks.digits import digits_data

    folder = ROOT / "nbs" / "results"
    model, data = LaSTransformer.from_pretrained(folder / "digits-las"), digits_data()
    record = next(
        r
        for r in json.loads((folder / "digits.json").read_text())["runs"]
        if r["name"] == "LaS" and r["seed"] == 0
    )
    assert accuracy(model, data["x_test"], data["y_test"]) == pytest.approx(
        record["test"], abs=0.5
    )
    assert sum(f.stat().st_size for f in (folder / "digits-las").iterdir()) < 1_000_000


def test_readme_states_the_lower_bound_of_torch():
    bound = next(
        s.version
        for r in map(Requirement, settings()["requirements"].split())
        if r.name == "torch"
        for s in r.specifier
    )
    assert f"torch ({bound} or newer)" in (ROOT / "README.md").read_text(
        encoding="utf-8"
    )


def test_help_lists_every_target():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True)
    for target in ("train", "test", "lab", "docs"):
        assert f"make {target}" in done.stdout


def test_docs_without_quarto_say_where_to_get_it():
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    if shutil.which("quarto", path=path):
        pytest.skip("Quarto is here")
    done = subprocess.run(
        ["make", "docs"], cwd=ROOT, capture_output=True, text=True, env={"PATH": path}
    )
    assert done.returncode != 0 and "quarto.org" in done.stdout + done.stderr


def test_sdist_holds_what_setup_reads(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(
            ".venv", ".git", "_proc", "runs", "build", "*.egg-info", "nbs"
        ),
        symlinks=True,
    )
    code = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names = subprocess.run(
        ["tar", "tzf", next((source / "dist").glob("*.tar.gz"))],
        capture_output=True,
        text=True,
    ).stdout
    assert "/settings.ini" in names
