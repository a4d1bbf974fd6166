"""What a type checker says of the library, seen from outside: every public name has a
type, and a user's program is checked against them."""

import json, os, subprocess, sys
from importlib.util import find_spec
from pathlib import Path
import pytest
from pages import ROOT

pytestmark = pytest.mark.skipif(
    not find_spec("basedpyright"),
    reason="basedpyright is missing: pip install basedpyright",
)
PROGRAM = """
import torch
from las_nb import LaSAttention, LaSTransformer, decay_rates, las_attention, register_mixer
from las_nb.tasks import load_task

def make(dim: int, causal: bool = True) -> torch.nn.Module:
    return torch.nn.Linear(dim, dim)

x = torch.randn(2, 16, 32)
rates: torch.Tensor = decay_rates(4, 0.5)
out: torch.Tensor = las_attention(x[:, None], x[:, None], x[:, None], rates, window=3, lengths=torch.tensor([16, 9]))
layer = LaSAttention(32, n_heads=4, score_bound=(2.0, 2.0, 2.0, 2.0))
y: torch.Tensor = layer.forward(x, lengths=None)
speeds: tuple[float, ...] = layer.plain_rates
register_mixer("mine", make)
model = LaSTransformer.from_pretrained("runs/digits").eval()
positions: str | None = model.positions
for split in load_task("digits", limit=10, device="cpu").values():
    some = split.rows(slice(4))
    right = (model.forward(some.inputs, some.lengths).argmax(-1) == some.labels).sum()
"""
WRONG = {
    "decay_rates(4, ": "decay_rates('4', ",
    "rates, window=3": "rates, window=3.5",
    "16, 9])": "16, 9]).tolist()",
    "LaSAttention(32": "LaSAttention([32]",
    'register_mixer("mine", make)': 'register_mixer(make, "mine")',
    '"runs/digits"': "1",
    "limit=10": 'limit="10"',
    "speeds: tuple[float": "speeds: tuple[str",
}


def checked(*args, cwd):
    """The report of the checker; it asks the first `python` on the path where packages
    lie."""
    env = dict(
        os.environ,
        PATH=os.pathsep.join(
            [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        ),
        PYTHONPATH=str(ROOT),
    )
    run = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--outputjson", *args],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )
    try:
        return json.loads(run.stdout)
    except ValueError:
        pytest.fail(
            f"basedpyright gave no report: {run.stdout[-500:]} {run.stderr[-500:]}"
        )


def test_every_public_name_has_a_type(tmp_path):
    report = checked("--verifytypes", "las_nb", "--ignoreexternal", cwd=tmp_path)[
        "typeCompleteness"
    ]
    assert (
        Path(report["packageRootDirectory"]) == ROOT / "las_nb"
        and len(report["symbols"]) > 500
    )
    lacking = [
        f"{s['name']}: "
        f"{'; '.join(' '.join(d['message'].split()) for d in s['diagnostics'])}"
        for s in report["symbols"]
        if s["isExported"]
        and (
            s["isTypeAmbiguous"]
            or not s["isTypeKnown"]
            or any("docstring" in d["message"] for d in s["diagnostics"])
        )
    ]
    assert not lacking, "\n".join(["", *lacking])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    "Errors by program: the one above, and what becomes of it by one wrong argument."
    folder = tmp_path_factory.mktemp("programs")
    (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    programs = {"right": PROGRAM} | {
        f"wrong{i}": PROGRAM.replace(old, new)
        for i, (old, new) in enumerate(WRONG.items())
    }
    for name, text in programs.items():
        (folder / f"{name}.py").write_text(text)
    errors = {name: [] for name in programs}
    for d in checked(cwd=folder)["generalDiagnostics"]:
        errors[Path(d["file"]).stem].append(
            f"line {d['range']['start']['line'] + 1}: {d['message']}"
        )
    return errors


def test_a_right_program_passes_in_strict_mode(found):
    assert not found["right"], "\n".join(found["right"])


@pytest.mark.parametrize("i", range(len(WRONG)), ids=list(WRONG.values()))
def test_a_wrong_argument_is_found(found, i):
    assert PROGRAM.count(list(WRONG)[i]) == 1
    assert len({e.split(":")[0] for e in found[f"wrong{i}"]}) == 1, (
        f"errors in one line wanted; got {found[f'wrong{i}']}"
    )
