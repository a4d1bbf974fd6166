"""The options in `_quarto.yml`, in the `nbdev.yml` that nbdev writes and on every page, against those that Quarto publishes.

Quarto itself passes over a misspelt key at most levels. `quarto_keys.py` makes `quarto_keys.json` from Quarto's repository."""

import copy, datetime, difflib, json, shutil
from pathlib import Path
import pytest, yaml
import pages
from pages import NBS, ROOT

KEYS = json.loads(
    (Path(__file__).parent / "tools" / "quarto_keys.json").read_text(encoding="utf-8")
)
CONFIG = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
REPLACE = "make tests/tools/quarto_keys.json again with tests/tools/quarto_keys.py"


def nearest(word, words):
    close = difflib.get_close_matches(str(word), map(str, words), 1, 0.5)
    return (
        f"did you mean {close[0]}?"
        if close
        else f"it may be: {', '.join(map(str, list(words)[:12]))}"
    )


def problems(shape, value, where):
    "Lines that say where `value` leaves the shape, as quarto_keys.py describes shapes."
    if shape == "any":
        return []
    types = dict(
        string=(str, datetime.date), boolean=bool, number=(int, float), null=type(None)
    )
    if isinstance(shape, str):
        good = isinstance(value, types[shape]) and not (
            shape == "number" and isinstance(value, bool)
        )
        return [] if good else [f"{where}: {value!r} should be a {shape}"]
    if "see" in shape:
        return problems(KEYS["shapes"][shape["see"]], value, where)
    if "either" in shape:
        tried = [problems(s, value, where) for s in shape["either"]]
        same = [p for p, s in zip(tried, shape["either"]) if type(value) in kinds(s)]
        return min(same or tried, key=len) if all(tried) else []
    if "one of" in shape:
        return (
            []
            if value in shape["one of"]
            else [
                f"{where}: unknown value {value!r}; {nearest(value, shape['one of'])}"
            ]
        )
    if "list of" in shape:
        if not isinstance(value, list):
            return [f"{where}: {value!r} should be a list"]
        return [
            p
            for i, v in enumerate(value)
            for p in problems(shape["list of"], v, f"{where}[{i}]")
        ]
    if not isinstance(value, dict):
        return [f"{where}: {value!r} should have keys: {nearest('', shape['keys'])}"]
    return [
        p
        for k, v in value.items()
        for p in (
            problems(shape["keys"][k], v, f"{where}.{k}")
            if k in shape["keys"]
            else [f"{where}: unknown key {k!r}; {nearest(k, shape['keys'])}"]
        )
    ]


def kinds(shape):
    "The types of what a shape describes."
    if isinstance(shape, str):
        return {dict(string=str, boolean=bool, number=int, null=type(None)).get(shape)}
    if "see" in shape:
        return kinds(KEYS["shapes"][shape["see"]])
    if "either" in shape:
        return set().union(*map(kinds, shape["either"]))
    return {dict if "keys" in shape else list if "list of" in shape else str}


def document(extra):
    "The keys of a page, and of a project file, which may set them for all pages."
    formats = {
        f: {
            "either": [
                {"one of": ["default"]},
                {
                    "keys": {
                        k: s for k, s in KEYS["document"].items() if k not in without
                    }
                },
            ]
        }
        for f, without in KEYS["without"].items()
    }
    return {
        "keys": dict.fromkeys(KEYS["other"], "any")
        | KEYS["execute"]
        | KEYS["document"]
        | extra
        | dict(
            execute={"keys": KEYS["execute"]},
            format={"either": ["string", {"keys": formats}]},
        )
    }


def config_problems(config, where="_quarto.yml"):
    return problems(document(KEYS["project"]), config, where) + theme_problems(
        config, where
    )


def theme_problems(config, where):
    "Quarto takes an unknown theme for an empty one."
    theme = (
        (config.get("format") or {}).get("html", {}).get("theme", config.get("theme"))
    )
    named = [
        n
        for t in (theme.values() if isinstance(theme, dict) else [theme])
        for n in (t if isinstance(t, list) else [t])
        if n
    ]
    return [
        f"{where}: no theme {n!r}; {nearest(n, KEYS['themes'])}"
        for n in named
        if n not in KEYS["themes"]
        and not (n.endswith((".scss", ".css")) and (NBS / n).exists())
    ]


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    "What nbdev hands to Quarto."
    from built import process

    work = tmp_path_factory.mktemp("quarto")
    for name in ("settings.ini", "_quarto.yml", "README.md"):
        shutil.copy(ROOT / name, work)
    for name in ("nbs", "las_nb"):
        shutil.copytree(
            ROOT / name,
            work / name,
            symlinks=True,
            ignore=shutil.ignore_patterns(
                "__pycache__", ".ipynb_checkpoints", "nbdev.yml"
            ),
        )
    process(work)
    return work


def test_project_file():
    assert not (found := config_problems(CONFIG)), "\n".join(found)


def test_every_option_is_for_the_pinned_quarto():
    steps = yaml.safe_load(
        (ROOT / ".github/workflows/docs.yml").read_text(encoding="utf-8")
    )["jobs"]["docs"]["steps"]
    pinned = next(
        s["with"]["version"] for s in steps if "quarto-actions" in s.get("uses", "")
    )
    assert str(pinned) == KEYS["quarto"], (
        f"docs.yml pins Quarto {pinned}, the options are those of {KEYS['quarto']}: "
        f"{REPLACE}"
    )


def test_file_that_nbdev_writes(processed):
    written = yaml.safe_load(
        (processed / "nbs" / "nbdev.yml").read_text(encoding="utf-8")
    )
    assert written["website"] and not (
        found := config_problems(written, "nbdev.yml")
    ), "\n".join(found)


def test_front_matter_of_every_page(processed):
    paths = sorted((processed / "_proc").rglob("*.ipynb"))
    assert len(paths) == len(pages.notebooks())
    found = []
    for path in paths:
        raw = [
            pages.source(c).strip()
            for c in pages.cells(path)
            if c["cell_type"] == "raw"
        ]
        front = [yaml.safe_load(r.strip("-\n")) for r in raw if r.startswith("---")]
        assert front and "title" in front[0], (
            f"{path.name} has no front matter: does its first Markdown cell hold `# "
            "Title`?"
        )
        for f in front:
            found += problems(document({}), f, path.name)
    assert not found, "\n".join(found)


def test_resources_exist():
    "Quarto passes over a pattern that fits nothing."
    lists = [
        CONFIG["project"].get("resources", []),
        CONFIG["format"]["html"].get("css", []),
    ]
    for pattern in (p for l in lists for p in ([l] if isinstance(l, str) else l)):
        if not pattern.startswith("!"):
            assert any(NBS.glob(pattern.strip("/"))), (
                f"_quarto.yml: {pattern} fits no file in nbs"
            )


@pytest.mark.parametrize(
    "path, value, says",
    [
        (["websit"], {}, "unknown key 'websit'; did you mean website?"),
        (
            ["project", "resorces"],
            [],
            "_quarto.yml.project: unknown key 'resorces'; did you mean resources?",
        ),
        (
            ["website", "back-to-top"],
            True,
            "_quarto.yml.website: unknown key 'back-to-top'; did you mean "
            "back-to-top-navigation?",
        ),
        (["website", "google-scholar"], True, "unknown key 'google-scholar'"),
        (
            ["website", "repo-actions"],
            ["edit", "isue"],
            "_quarto.yml.website.repo-actions[1]: unknown value 'isue'; did you mean "
            "issue?",
        ),
        (
            ["website", "navbar", "serach"],
            True,
            "_quarto.yml.website.navbar: unknown key 'serach'; did you mean search?",
        ),
        (
            ["website", "navbar", "right"],
            [dict(icon="github", hreff="x")],
            "navbar.right[0]: unknown key 'hreff'; did you mean href?",
        ),
        (
            ["website", "sidebar", "styl"],
            "docked",
            "_quarto.yml.website.sidebar: unknown key 'styl'; did you mean style?",
        ),
        (
            ["website", "sidebar", "style"],
            "docket",
            "_quarto.yml.website.sidebar.style: unknown value 'docket'; did you mean "
            "docked?",
        ),
        (
            ["website", "sidebar", "contents"],
            [dict(section="A", contents=[dict(txt="B", href="x.ipynb")])],
            "contents[0].contents[0]: unknown key 'txt'; did you mean text?",
        ),
        (
            ["website", "page-footer"],
            dict(lef="x"),
            "_quarto.yml.website.page-footer: unknown key 'lef'; did you mean left?",
        ),
        (
            ["website", "open-graph"],
            dict(images="x.png"),
            "_quarto.yml.website.open-graph: unknown key 'images'; did you mean image?",
        ),
        (
            ["website", "search"],
            dict(typ="overlay"),
            "_quarto.yml.website.search: unknown key 'typ'; did you mean type?",
        ),
        (
            ["website", "page-navigation"],
            "yes please",
            "page-navigation: 'yes please' should be a boolean",
        ),
        (
            ["format", "htm"],
            "default",
            "_quarto.yml.format: unknown key 'htm'; did you mean html?",
        ),
        (
            ["format", "html", "code-cpy"],
            True,
            "_quarto.yml.format.html: unknown key 'code-cpy'; did you mean code-copy?",
        ),
        (
            ["format", "html", "prefer-html"],
            True,
            "_quarto.yml.format.html: unknown key 'prefer-html'",
        ),
        (
            ["format", "html", "theme"],
            dict(ligth="cosmo"),
            "_quarto.yml.format.html.theme: unknown key 'ligth'; did you mean light?",
        ),
        (
            ["format", "html", "theme"],
            dict(light="cosmo", dark=["darky"]),
            "_quarto.yml: no theme 'darky'; did you mean darkly?",
        ),
        (
            ["format", "html", "axe"],
            dict(output="documnt"),
            "_quarto.yml.format.html.axe.output: unknown value 'documnt'; did you mean "
            "document?",
        ),
        (
            ["citation"],
            dict(titel="x"),
            "_quarto.yml.citation: unknown key 'titel'; did you mean title?",
        ),
        (
            ["execute", "frozen"],
            True,
            "_quarto.yml.execute: unknown key 'frozen'; did you mean freeze?",
        ),
        (["langs"], "en", "_quarto.yml: unknown key 'langs'; did you mean lang?"),
    ],
)
def test_a_slip_is_found_at_every_level(path, value, says):
    config = copy.deepcopy(CONFIG)
    place = config
    for key in path[:-1]:
        place = place.setdefault(key, {})
    place[path[-1]] = value
    assert any(says in p for p in config_problems(config)), config_problems(config)


def test_a_slip_on_a_page_is_found():
    assert problems(document({}), dict(titel="x"), "a.ipynb") == [
        "a.ipynb: unknown key 'titel'; did you mean title?"
    ]


@pytest.mark.parametrize(
    "path, value",
    [
        (["format", "html", "theme"], dict(light=["cosmo"], dark="darkly")),
        (["format", "html", "respect-user-color-scheme"], True),
        (["format", "html", "code-copy"], True),
        (["format", "html", "axe"], True),
        (["format", "html", "google-scholar"], True),
        (["google-scholar"], True),
        (["citation"], {"type": "article", "container-title": "PMLR", "issued": 2024}),
        (["citation"], True),
        (["website", "repo-actions"], ["edit", "issue", "source"]),
        (["website", "back-to-top-navigation"], True),
        (["website", "bread-crumbs"], False),
        (
            ["website", "page-footer"],
            dict(left="a", right=[dict(icon="github", href="b")]),
        ),
        (["website", "search"], dict(location="navbar", type="overlay")),
        (["website", "site-url"], "https://x.y"),
        (["project", "resources"], ["results/*.js"]),
        (["lang"], "en"),
    ],
)
def test_options_as_they_should_be_pass(path, value):
    config = copy.deepcopy(CONFIG)
    place = config
    for key in path[:-1]:
        place = place.setdefault(key, {})
    place[path[-1]] = value
    assert config_problems(config) == []
