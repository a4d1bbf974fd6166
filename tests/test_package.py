"The wheel as a stranger gets it: built, installed beside torch and fastcore alone, imported."
import email, re, shutil, subprocess, sys, venv, zipfile
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path
import pytest, yaml
from packaging.requirements import Requirement
from pages import ROOT, settings

try: import tomllib
except ImportError: import tomli as tomllib  # Python 3.10


def closure(*names):
    "Names of these distributions and of all that they require, extras aside."
    todo, seen = list(names), set()
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in seen: continue
        try: requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError: continue
        seen.add(name)
        for r in map(Requirement, requires):
            if not r.marker or r.marker.evaluate({"extra": ""}): todo.append(r.name)
    return seen


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".venv", ".git", "_proc", "runs", "build", "*.egg-info", "nbs"), symlinks=True)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(work), str(source)], check=True)
    return next(work.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    "A clean environment: the wheel, and links to torch, fastcore and what they require."
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, with_pip=False)
    site = next(home.glob("lib/python*/site-packages"))
    for name in closure("torch", "fastcore"):
        for f in metadata.files(name) or []:
            top = Path(f.parts[0])
            here = Path(metadata.distribution(name).locate_file(top))
            if ".." not in f.parts and here.exists() and not (site / top).exists(): (site / top).symlink_to(here)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True)
    return home / "bin" / "python"


def test_imports_with_torch_and_fastcore_alone(python):
    code = """
import importlib, pkgutil, sys, las_nb
for m in pkgutil.iter_modules(las_nb.__path__): importlib.import_module(f"las_nb.{m.name}")
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
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "site-packages" in done.stdout and "torch.Size([2, 3])" in done.stdout


@pytest.fixture(scope="module")
def meta(wheel):
    with zipfile.ZipFile(wheel) as z: return email.message_from_bytes(z.read(next(n for n in z.namelist() if n.endswith("/METADATA"))))


def test_metadata_comes_from_settings(wheel, meta):
    s = settings()
    assert meta["Version"] == s["version"] and meta["Summary"] == s["description"] and meta["Author"] == s["author"]
    assert set(meta.get_all("Provides-Extra")) == {"train", "hub", "dev"}
    urls = dict(u.split(", ", 1) for u in meta.get_all("Project-URL"))
    assert urls == {"Documentation": s["doc_host"] + s["doc_baseurl"], "Source": s["git_url"], "Issues": f"{s['git_url']}/issues",
                    "Changelog": f"{s['git_url']}/blob/{s['branch']}/CHANGELOG.md"}
    assert wheel.stat().st_size < 150_000  # code alone: no notebooks, no results
    import las_nb
    assert las_nb.__version__ == s["version"]


def test_an_index_can_file_the_wheel(meta):
    known, given = set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["classifiers"]), meta.get_all("Classifier")
    assert set(given) == known and not any(c.startswith("License") for c in given), "the licence is named by License-Expression alone"
    assert meta["License-Expression"] == "Apache-2.0" and meta["Requires-Python"] == f">={settings()['min_python']}"
    oldest = f"Programming Language :: Python :: {settings()['min_python']}"
    assert {oldest, "Typing :: Typed", "Operating System :: OS Independent", "Intended Audience :: Developers", "Intended Audience :: Science/Research"} <= set(given)
    assert meta["Description-Content-Type"] == "text/markdown" and len(meta.get_payload()) > 1000


def test_types_are_announced(wheel):
    with zipfile.ZipFile(wheel) as z: assert "las_nb/py.typed" in z.namelist(), "the wheel lacks las_nb/py.typed: was it deleted?"


def test_citation_file():
    path = ROOT / "CITATION.cff"
    subprocess.run([Path(sys.executable).parent / "check-jsonschema", "--builtin-schema", "vendor.citation-file-format", path], check=True)
    cite, s = yaml.safe_load(path.read_text(encoding="utf-8")), settings()
    assert cite["version"] == s["version"], f"CITATION.cff says version {cite['version']}, settings.ini {s['version']}: make them equal"
    assert cite["repository-code"] == s["git_url"] and cite["url"] == s["doc_host"] + s["doc_baseurl"] and cite["abstract"] == s["description"]


def test_help_lists_every_target():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True)
    for target in ("train", "test", "lab", "docs"): assert f"make {target}" in done.stdout


def test_docs_without_quarto_say_where_to_get_it():
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    if shutil.which("quarto", path=path): pytest.skip("Quarto is here")
    done = subprocess.run(["make", "docs"], cwd=ROOT, capture_output=True, text=True, env={"PATH": path})
    assert done.returncode != 0 and "quarto.org" in done.stdout + done.stderr


def test_sdist_holds_what_setup_reads(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".venv", ".git", "_proc", "runs", "build", "*.egg-info", "nbs"), symlinks=True)
    code = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = subprocess.run(["tar", "tzf", next((source / "dist").glob("*.tar.gz"))], capture_output=True, text=True).stdout
    assert "/settings.ini" in names
