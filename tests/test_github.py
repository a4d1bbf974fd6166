"""Workflows, forms and notes for GitHub: checked against its published schemas, and
against the files that they lean on."""

import os, re, shutil, subprocess
import check_jsonschema, pytest, yaml
from click.testing import CliRunner
from packaging.requirements import Requirement
from packaging.version import Version
import pages
from pages import ROOT, settings

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.y*ml"))
FORMS = sorted(
    p for p in (GITHUB / "ISSUE_TEMPLATE").glob("*.y*ml") if p.stem != "config"
)
CHECKED = (
    [(p, "github-workflows") for p in WORKFLOWS]
    + [(p, "github-issue-forms") for p in FORMS]
    + [(GITHUB / "ISSUE_TEMPLATE" / "config.yml", "github-issue-config")]
    + [(p, "dependabot") for p in GITHUB.glob("dependabot.y*ml")]
)


def load(path):
    "A YAML file as GitHub reads it: `on` is a word."
    return {
        ("on" if k is True else k): v
        for k, v in yaml.safe_load(path.read_text(encoding="utf-8")).items()
    }


def workflow(name):
    return load(GITHUB / "workflows" / f"{name}.yml")


def steps(path):
    return [(job, step) for job, j in load(path)["jobs"].items() for step in j["steps"]]


def check(path, schema):
    words = ["--builtin-schema", f"vendor.{schema}", str(path)]
    return CliRunner().invoke(check_jsonschema.main, words)


def shell(job, name, cwd, workflow_name, **env):
    "Run a step of a workflow as its runner does."
    run = next(
        s["run"]
        for s in workflow(workflow_name)["jobs"][job]["steps"]
        if s.get("name") == name
    )
    env = dict(
        PATH=os.environ["PATH"],
        RUNNER_TEMP=str(cwd),
        GITHUB_ENV=str(cwd / "env"),
        **env,
    )
    return subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", run],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("path, schema", CHECKED, ids=lambda x: getattr(x, "name", ""))
def test_fits_the_published_schema(path, schema):
    done = check(path, schema)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    "path, schema, old, new",
    [
        (GITHUB / "workflows/test.yml", "github-workflows", "runs-on:", "runs-in:"),
        (
            GITHUB / "ISSUE_TEMPLATE/bug.yml",
            "github-issue-forms",
            "type: textarea",
            "type: textaria",
        ),
        (
            GITHUB / "ISSUE_TEMPLATE/config.yml",
            "github-issue-config",
            "about:",
            "abaut:",
        ),
    ],
    ids=["workflow", "form", "config"],
)
def test_a_slip_does_not_fit(path, schema, old, new, tmp_path):
    text = path.read_text(encoding="utf-8")
    assert old in text
    (tmp_path / path.name).write_text(text.replace(old, new), encoding="utf-8")
    assert check(tmp_path / path.name, schema).exit_code != 0


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_workflows_end_and_may_do_little(path):
    w = load(path)
    assert w["permissions"] == {"contents": "read"}, (
        f"{path.name}: give permissions to the job that needs them"
    )
    for name, job in w["jobs"].items():
        assert job.get("timeout-minutes", 999) <= 60, (
            f"{path.name}: job {name} has no timeout-minutes"
        )
    assert "group" in w["concurrency"]
    for _, s in steps(path):
        if "uses" in s:
            assert re.fullmatch(r"[\w-]+/[\w/-]+@(v\d+|release/v\d+)", s["uses"]), (
                f"{path.name}: {s['uses']} should name a major version"
            )


def test_an_action_has_one_version():
    used = {}
    for path in WORKFLOWS:
        for _, s in steps(path):
            if "uses" in s:
                name, _, version = s["uses"].partition("@")
                used.setdefault(name, set()).add(version)
    assert len(used) > 5 and all(len(v) == 1 for v in used.values()), used


def test_steps_call_what_is_there():
    targets = set(
        re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    )
    called = [
        (p.name, word)
        for p in WORKFLOWS
        for _, s in steps(p)
        for word in re.findall(r"\bmake ([\w-]+)", s.get("run", ""))
    ]
    assert called
    for name, target in called:
        assert target in targets, f"{name}: there is no make {target}"
    for p in WORKFLOWS:
        for _, s in steps(p):
            for file in re.findall(r"\btests/\w+\.py\b", s.get("run", "")):
                assert (ROOT / file).exists(), f"{p.name}: there is no {file}"
            for file in s.get("with", {}).get("cache-dependency-path", "").split():
                assert (ROOT / file).exists(), f"{p.name}: there is no {file}"


def runs():
    "Every run of the test matrix: (system, Python, torch)."
    m = workflow("test")["jobs"]["test"]["strategy"]["matrix"]
    return [(o, p, t) for o in m["os"] for p in m["python"] for t in m["torch"]]


def test_matrix_covers_every_python_that_is_promised():
    promised = set(
        re.findall(
            r'"Programming Language :: Python :: (3\.\d+)"',
            (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
        )
    )
    assert promised and settings()["min_python"] == min(promised, key=Version)
    for system in ("ubuntu", "macos"):
        ran = [(p, t) for o, p, t in runs() if o.startswith(system)]
        assert {p for p, _ in ran} == promised, (
            f"classifiers promise {sorted(promised)}, {system} runs "
            f"{sorted({p for p, _ in ran})}"
        )
        for python in promised:
            assert (
                len(ran_torch := [t for p, t in ran if p == python]) == 2
                and "newest" in ran_torch
            ), f"{system}, Python {python}: an oldest and the newest torch"


@pytest.mark.parametrize("torch", ["oldest", "newest"])
def test_the_oldest_torch_is_the_bound_of_settings(torch, tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    assert shell("test", "Which torch", tmp_path, "test", TORCH=torch).returncode == 0
    pin = (tmp_path / "constraints.txt").read_text().strip()
    bound = next(
        r
        for r in map(Requirement, settings()["requirements"].split())
        if r.name == "torch"
    ).specifier
    lowest = next(s.version for s in bound if s.operator == ">=")
    assert pin == dict(oldest=f"torch=={lowest}", newest="")[torch]
    assert torch == "newest" or Version(pin.partition("==")[2]) in bound
    assert (
        tmp_path / "env"
    ).read_text() == f"PIP_CONSTRAINT={tmp_path}/constraints.txt\n"


def test_no_bound_is_told(tmp_path):
    (tmp_path / "settings.ini").write_text("requirements = torch\n")
    done = shell("test", "Which torch", tmp_path, "test", TORCH="oldest")
    assert done.returncode != 0 and "no lower bound" in done.stdout


@pytest.mark.parametrize("tag, good", [("v{}", True), ("{}", False), ("v{}1", False)])
def test_a_release_needs_the_tag_of_its_version(tag, good, tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    done = shell(
        "build",
        "The tag is the version",
        tmp_path,
        "release",
        GITHUB_REF_NAME=tag.format(settings()["version"]),
    )
    assert (done.returncode == 0) is good and ("the tag is" in done.stdout) is not good


@pytest.mark.parametrize(
    "log, says",
    [
        (
            "# Changelog\n\n## 0.2.0\n\n- not yet\n\n## {} (2026-12-01)\n\n- "
            "this\n\n## 0.0.9\n\n- long ago\n",
            None,
        ),
        ("## {} (unreleased)\n\n- this\n", "marked as unreleased"),
        ("## {}\n\n## 0.0.9\n\n- long ago\n", "nothing under"),
        ("## 0.0.9\n\n- long ago\n", "nothing under"),
    ],
)
def test_notes_are_taken_from_the_changelog(log, says, tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text(log.format(settings()["version"]))
    done = shell("build", "Notes from the changelog", tmp_path, "release")
    if says:
        assert done.returncode != 0 and says in done.stdout
    else:
        assert (
            done.returncode == 0
            and (tmp_path / "notes.md").read_text().strip() == "- this"
        )


def test_the_changelog_has_this_version():
    assert re.search(
        rf"^## {re.escape(settings()['version'])}\b",
        (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        re.M,
    )


def test_only_a_release_publishes_and_only_main_deploys():
    w = workflow("release")
    assert w["on"] == {"push": {"tags": ["v*"]}}
    publish, release = w["jobs"]["publish"], w["jobs"]["release"]
    assert (
        publish["needs"] == "build"
        and publish["permissions"] == {"id-token": "write"}
        and publish["environment"]["name"] == "pypi"
    )
    assert release["needs"] == "publish" and release["permissions"] == {
        "contents": "write"
    }
    assert (
        "refs/heads/main" in workflow("docs")["jobs"]["deploy"]["if"]
        and settings()["branch"] == "main"
    )


@pytest.mark.parametrize("path", FORMS, ids=lambda p: p.name)
def test_forms_ask_for_what_is_needed(path):
    form = load(path)
    assert form["name"] and form["description"]
    required = [f for f in form["body"] if f.get("validations", {}).get("required")]
    assert required and all(
        f["attributes"]["label"] for f in form["body"] if f["type"] != "markdown"
    )
    if path.stem == "bug":
        assert any("python -m las_nb" in f["attributes"]["label"] for f in required)


def test_the_owner_stands_in_settings_alone():
    for path in [*GITHUB.rglob("*.yml"), *GITHUB.rglob("*.md"), ROOT / "CITATION.cff"]:
        text = path.read_text(encoding="utf-8")
        assert pages.with_owner(text) == text, (
            f"{path.name} names another owner than settings.ini: change it there"
        )


def test_security_says_what_the_library_does():
    "`.github/SECURITY.md` promises that nothing is unpickled here."
    for path in (ROOT / "las_nb").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"torch\.load|^\s*(import|from) pickle|allow_pickle=True|\beval\(",
            re.sub(r"\.eval\(", "", text),
            re.M,
        ), f"{path.name} reads what can hold code: SECURITY.md says that nothing does"
