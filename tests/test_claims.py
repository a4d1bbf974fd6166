"""The table of claims: every verdict is one that stored runs give, and every entry says
where it comes from, what would refute it, and where to read on."""

import json, re, shutil
import pytest
from las_nb.compare import read_toml
from las_nb.results.checks import CHECKS
from pages import NBS, cells, source

TABLE = read_toml(NBS / "claims.toml")
CLAIMS, RESULTS = TABLE["claim"], NBS / "results"
TEXTS = {"id", "kind", "claim", "source", "where", "refuted_by", "page", "next"}
CHECKED = [c for c in CLAIMS if "check" in c]


def ids(claims):
    return [c["id"] for c in claims]


def headings(page):
    "Anchors of the headings of a page, as pandoc names them."
    for cell in cells(NBS / page):
        if cell["cell_type"] == "markdown":
            for text in re.findall(r"^#+ (.*)$", source(cell), re.M):
                plain = re.sub(r"[^\w\s.-]", "", text).lower()
                yield re.sub(r"\s+", "-", plain.strip())


def test_names_are_unique_and_every_kind_is_there():
    assert len(set(ids(CLAIMS))) == len(CLAIMS)
    assert list(dict.fromkeys(c["kind"] for c in CLAIMS)) == TABLE["kinds"]
    assert len(TABLE["kinds"]) == 10
    used = {c["source"] for c in CLAIMS}
    assert used == set(TABLE["sources"])


@pytest.mark.parametrize("claim", CLAIMS, ids=ids(CLAIMS))
def test_an_entry_is_whole(claim):
    assert claim.keys() - {"check"} == TEXTS | {"records", "verdict"}
    for key in TEXTS:
        assert isinstance(claim[key], str) and claim[key].strip(), key
    assert claim["claim"][-1] in ".?"
    for key in TEXTS - {"claim"}:
        assert claim[key][-1] != ".", key
    assert claim["verdict"] in ("holds", "fails", "open")
    if claim["verdict"] != "open":
        assert claim["check"] and claim["records"]
    elif "check" not in claim:
        assert claim["next"] != "nothing" and not claim["records"]
    if claim["records"] != "computed":
        for record in claim["records"]:
            assert (RESULTS / record).exists(), record


@pytest.mark.parametrize("claim", CLAIMS, ids=ids(CLAIMS))
def test_an_entry_leads_somewhere(claim):
    page, _, anchor = claim["page"].partition("#")
    assert (NBS / page).exists()
    assert not anchor or anchor in headings(page)
    for link in re.findall(r"\]\(([^)]*)\)", " ".join(claim[k] for k in TEXTS)):
        assert (NBS / link).exists(), link
    for grid in re.findall(r"nbs/grids/[\w.-]+", claim["next"]):
        assert (NBS.parent / grid).exists(), grid


@pytest.mark.parametrize("claim", CHECKED, ids=ids(CHECKED))
def test_the_check_agrees(claim):
    found = CHECKS[claim["check"]](RESULTS)
    assert found.verdict == claim["verdict"], found.said
    assert found.said and "nan" not in found.said


def test_every_check_is_asked_for_once():
    assert sorted(c["check"] for c in CHECKED) == sorted(CHECKS)


def test_no_result_is_typed_in_the_table():
    "Percent, points and times are computed; settings may be named."
    for claim in CLAIMS:
        text = " ".join(claim[k] for k in TEXTS)
        assert not re.search(r"\d\s*(%|percent|points)|\d\.\d+ times", text), claim[
            "id"
        ]


def test_a_check_follows_its_records(tmp_path):
    "With other scores the verdict is another: it is not typed in the check either."
    stored = json.loads((RESULTS / "digits.json").read_text(encoding="utf-8"))
    swap = {"LaS": "plain + positions", "plain + positions": "LaS"}
    for run in stored["runs"]:
        run["name"] = swap.get(run["name"], run["name"])
    (tmp_path / "digits.json").write_text(json.dumps(stored), encoding="utf-8")
    shutil.copy(RESULTS / "laptop.jsonl", tmp_path)
    other = CHECKS["other_bias"]
    assert (other(RESULTS).verdict, other(tmp_path).verdict) == ("holds", "fails")
