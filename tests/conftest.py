import os, shutil, subprocess, sys
from pathlib import Path

# tests run side by side; and a run is repeated to the last bit on as many threads only
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest, torch

# without a GPU, its kernels are run by Triton's interpreter; read when they are made
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from las_nb._util import EXTENSIONS
from las_nb.fast.plan import _CAUSAL, _COSTS, _TWO_SIDED

# what builds pages; the tests look at its work
sys.path.insert(0, str(Path(__file__).parent / "tools"))


# whatever this machine was calibrated to
_COSTS[:] = [_CAUSAL, _TWO_SIDED]


@pytest.fixture(autouse=True)
def own_extensions():
    "What a test imports by --import is not named in the records of the next one."
    yield
    EXTENSIONS.clear()


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    "A cache of its own in place of the user's."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "Folder with `NAME.html` for every page; made once for all processes of the tests."
    pytest.importorskip("pypandoc")
    import built
    from filelock import FileLock

    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    with FileLock(shared / "docs.lock"):
        if not (shared / "docs" / "done").exists():
            (shared / "docs").mkdir()
            built.build(shared / "docs")
            (shared / "docs" / "done").touch()
    return shared / "docs" / "site"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "The wheel, built from a copy of the sources."
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    shutil.copytree(
        Path(__file__).parents[1],
        source,
        ignore=shutil.ignore_patterns(
            ".venv", ".git", "_proc", "runs", "build", "*.egg-info", "nbs"
        ),
        symlinks=True,
    )
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(work),
            str(source),
        ],
        check=True,
    )
    return next(work.glob("*.whl"))


@pytest.fixture(scope="session")
def browser():
    "Chromium without a window."
    api = pytest.importorskip("playwright.sync_api")
    found = next(
        filter(
            None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
        ),
        None,
    )
    if not found:
        pytest.skip("no Chromium")
    with api.sync_playwright() as p:
        b = p.chromium.launch(
            executable_path=found,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        yield b
        b.close()
