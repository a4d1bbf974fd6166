"""Every page as a reader gets it, without Quarto: processed by nbdev, converted by
pandoc, looked at by Chromium."""

import ast, base64, importlib, json, os, re, shutil, struct, subprocess, sys, zlib
import pytest, yaml
import colab, pages, quarto_themes, reference
from built import html_name, parsed
from pages import NBS, ROOT, notebooks

CHAPTERS = pages.chapters()


def ids(paths):
    return [p.stem for p in paths]


def page(site, path):
    return parsed(site / html_name(path.relative_to(NBS)))


@pytest.mark.parametrize("path", notebooks(), ids=ids(notebooks()))
def test_links_lead_somewhere(site, path):
    s = pages.settings()
    home = f"{s['doc_host']}{s['doc_baseurl']}/"
    here = page(site, path)
    assert here.links
    for link in here.links:
        follow(site, path, link, home)


def follow(site, path, link, home):
    "Fail unless a link of the page at `path` leads to a page, and to an anchor on it."
    base = path.parent
    if link.startswith(home):
        link, base = link[len(home) :], NBS
    elif re.match(r"https?:|mailto:", link):
        return
    target, _, anchor = link.partition("#")
    target = (base / target).resolve() if target else path
    if target.suffix in (".ipynb", ".qmd"):
        assert target.exists(), f"{path.name}: {link} leads nowhere"
        target = target.with_name(html_name(target.name))
    target = site / target.relative_to(NBS).with_name(
        html_name(target.name) if target == path else target.name
    )
    assert target.exists(), f"{path.name}: {link} leads nowhere"
    if anchor:
        assert anchor in parsed(target).ids, (
            f"{path.name}: no #{anchor} on {target.name}"
        )


@pytest.mark.parametrize("path", notebooks(), ids=ids(notebooks()))
def test_code_holds_no_markdown_links(site, path):
    """nbdev links backticked names, in comments of signatures too, where nothing
    renders them."""
    text = (site / html_name(path.name)).read_text(encoding="utf-8")
    for block in re.findall(r"<pre.*?</pre>", text, re.S):
        assert "](http" not in re.sub("<[^>]+>", "", block)


@pytest.mark.parametrize("path", notebooks(), ids=ids(notebooks()))
def test_figures_have_words_and_a_white_ground(site, path):
    for cell in pages.cells(path):
        png = [
            o["data"]["image/png"]
            for o in cell.get("outputs", [])
            if "image/png" in o.get("data", {})
        ]
        if png:
            flags = pages.directives(cell)
            for key in ("label", "fig-cap", "fig-alt"):
                assert flags.get(key), f"{path.name}: a figure lacks #| {key}"
            corner = first_pixel(base64.b64decode("".join(png[0])))
            assert corner[:3] == (255, 255, 255) and corner[3:] in ((), (255,)), (
                f"{path.name}: {flags['label']} is not on white"
            )
    for image in page(site, path).images:
        if not image["src"].startswith(("http", "data:")):
            assert (site / image["src"]).stat().st_size > 500
    for cell in pages.cells(path):
        if cell["cell_type"] == "markdown":
            assert not re.search(r"!\[\]\(", pages.source(cell)), (
                f"{path.name}: an image without alt text"
            )


def first_pixel(png):
    "Top left pixel of a PNG: (r, g, b) or (r, g, b, a)."
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    depth, colour = png[24], png[25]
    assert depth == 8 and colour in (2, 6)
    data, i = b"", 8
    while i < len(png):
        size, kind = struct.unpack(">I4s", png[i : i + 8])
        if kind == b"IDAT":
            data += png[i + 8 : i + 8 + size]
        i += 12 + size
    # the first pixel is the same under every PNG filter
    return tuple(zlib.decompress(data)[1 : 4 + (colour == 6)])


@pytest.mark.parametrize("path", CHAPTERS, ids=ids(CHAPTERS))
def test_a_chapter_has_its_parts(site, path):
    cells = pages.cells(path)
    text = "\n".join(pages.source(c) for c in cells if c["cell_type"] == "markdown")
    title = next(pages.source(c) for c in cells if c["cell_type"] == "markdown")
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+", title.strip()), (
        "the title cell holds a title and a promise, nothing else"
    )
    for part in (
        "**Needs**",
        "**Gives**",
        "**Time**",
        "**GPU**",
        "## Where we differ from the paper, and why",
        "## Exercises",
        "## References",
        "1. **Check.**",
        "2. **Break.**",
        "3. **Extend.**",
    ):
        assert part in text, f"{path.name} lacks {part}"
    code = [c for c in cells if c["cell_type"] == "code"]
    first = next(
        i
        for i, c in enumerate(code)
        if any("image/png" in o.get("data", {}) for o in c["outputs"])
    )
    assert first < 14, "the first picture comes early"
    assert (
        "#| hide" in pages.source(cells[0])
        and "#| eval: false" in pages.source(cells[0])
        and "pip install" in pages.source(cells[0])
    )
    headings = page(site, path).headings
    assert all(b <= a + 1 for a, b in zip(headings, headings[1:])), "headings in order"


@pytest.mark.parametrize(
    "path", [p for p in notebooks() if p.stem != "index"], ids=lambda p: p.stem
)
def test_badge_opens_this_notebook(path):
    text = "\n".join(map(pages.source, pages.cells(path)))
    assert re.findall(
        r"\]\((https://colab\.research\.google\.com/github/[^)]*)\)", text
    ) == [colab.address(path)]


def test_solutions_answer_every_exercise():
    text = "\n".join(
        pages.source(c)
        for c in pages.cells(NBS / "solutions.ipynb")
        if c["cell_type"] == "markdown"
    )
    asking = [p for p in notebooks() if "## Exercises" in p.read_text(encoding="utf-8")]
    assert set(CHAPTERS) < set(asking)
    for kind in ("**1. Check.**", "**2. Break.**", "**3. Extend.**"):
        assert text.count(kind) == len(asking)


def test_the_owner_stands_in_settings_alone():
    for path in [*notebooks(), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        text = path.read_text(encoding="utf-8")
        assert pages.with_owner(text) == text, (
            f"{path.name} names another owner: run `make sync`"
        )
    other = pages.with_owner(
        "https://github.com/someone/las_nb https://someone.github.io/las_nb/x.html "
        "c/github/someone/las_nb/blob"
    )
    assert "someone" not in other


def test_readme_is_the_index():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == pages.readme(), (
        "README.md differs from nbs/index.ipynb: run `make sync`"
    )


def test_readme_paths_exist():
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", pages.readme()):
        assert (ROOT / target).exists(), target


def test_quarto_config_is_one_file_and_lists_every_page():
    assert (NBS / "_quarto.yml").read_text() == (ROOT / "_quarto.yml").read_text(), (
        "nbs/_quarto.yml must be a symlink to ../_quarto.yml (git config core.symlinks "
        "true)"
    )
    cfg = yaml.safe_load((ROOT / "_quarto.yml").read_text())

    def hrefs(items):
        for i in items:
            if "href" in i:
                yield i["href"]
            yield from hrefs(i.get("contents", []))

    assert sorted(hrefs(cfg["website"]["sidebar"]["contents"])) == sorted(
        p.relative_to(NBS).as_posix() for p in [*notebooks(), *NBS.glob("api/*.qmd")]
    )
    assert cfg["format"]["html"]["keep-md"] is True


def test_the_reference_is_the_library():
    "Every page of it as `make sync` writes it; every public name on it."
    wanted = reference.write()
    assert {p.relative_to(NBS).as_posix() for p in NBS.glob("api/*")} == set(wanted), (
        "pages of the reference are missing or left over: run `make sync`"
    )
    for name, text in wanted.items():
        assert (NBS / name).read_text(encoding="utf-8") == text, (
            f"{name} differs from the library: run `make sync`"
        )
    for module in reference.modules():
        text = wanted[f"api/{reference.stem(module)}.qmd"]
        for public in reference.load(module).__all__:
            if reference.left_out(getattr(reference.load(module), public)):
                continue
            assert (
                f"{{#{public}}}" in text
                or f"`{public}`" in text
                or f"[{public}]" in text
            ), f"{module}.{public}"


def test_reference_begins_with_what_is_called_first(tmp_path):
    "Every example of it runs as it stands, and stands on the page of its module too."
    wanted = reference.write()
    index = wanted["api/index.qmd"]
    for name, public in reference.FIRST:
        code = reference.example(name, public)
        assert index.index(code) < index.index("## All modules")
        own = wanted[f"api/{reference.stem(name)}.qmd"]
        assert own.split("## ")[1].startswith(public) and code in own
    codes = [code for code in reference.FIRST.values()]
    if not importlib.util.find_spec("transformers"):
        codes = [code for code in codes if "transformers" not in code]
    said = f"for code in {codes!r}: exec(code, {{}})"
    env = os.environ | dict(PYTHONPATH=str(ROOT), LAS_NB_DATA=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", said],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_reference_tables_survive_types_with_bars():
    from las_nb.mixers import LaSAttention

    rows = reference.table(LaSAttention.__init__).splitlines()
    assert all(len(re.split(r"(?<!\\)\|", r)) == 6 for r in rows) and any(
        "`float or None`" in r for r in rows
    )


@pytest.mark.parametrize("name", sorted(reference.write()))
def test_reference_links_and_headings(site, name):
    page = parsed(site / html_name(name))
    for link in page.links:
        follow(site, NBS / name, link, "https://none/")
    front = yaml.safe_load((NBS / name).read_text(encoding="utf-8").split("---")[1])
    assert front.pop("search", True) == (name == "api/index.qmd")
    assert set(front) == {"title", "description"} and all(front.values())
    assert page.headings[0] == 1 and all(
        b <= a + 1 for a, b in zip(page.headings, page.headings[1:])
    )


@pytest.mark.parametrize("path", notebooks(), ids=ids(notebooks()))
def test_headings_are_in_order(site, path):
    "Below the title, which nbdev's entries (of the third level) may follow at once."
    first, *headings = page(site, path).headings
    assert first == 1
    assert all(b <= a + 1 for a, b in zip(headings, headings[1:]))


@pytest.mark.parametrize("path", notebooks(), ids=ids(notebooks()))
def test_pages_are_light(site, path):
    "Text and pictures of a page stay under 2 MB."
    file = site / html_name(path.name)
    size = file.stat().st_size + sum(
        (site / i["src"]).stat().st_size
        for i in page(site, path).images
        if not i["src"].startswith(("http", "data:"))
    )
    assert size < 2e6, f"{path.name} takes {size / 1e6:.1f} MB"


def test_title_cells_and_descriptions():
    for path in notebooks():
        assert reference.head(path), (
            f"{path.name}: the first Markdown cell is '# title', an empty line, '> "
            "promise'"
        )


def test_spelling():
    "No word that codespell knows to be wrong, on any page."
    files = [
        *notebooks(),
        *ROOT.glob("*.md"),
        *ROOT.glob(".github/**/*.*"),
        *(NBS / "interactive").iterdir(),
    ]
    # right words and names in code
    words = "docment,docments,fro,trough,las,hist,nd,ot,ans,te"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "codespell_lib",
            f"--ignore-words-list={words}",
            "--ignore-regex=[A-Za-z0-9+/]{60,}|\\[[A-Z]+ [^\\]]*\\]",
            *map(str, files),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    bad = subprocess.run(
        [sys.executable, "-m", "codespell_lib", "-"],
        input="recieve\n",
        capture_output=True,
        text=True,
    )
    assert bad.returncode != 0  # it can fail


COMMANDS = re.compile(
    r"^!?(?:[A-Z_]+=\S+ )*(?:(?:accelerate launch|torchrun) .*\$\(which las\)|las)"
    r" (?P<name>\w+)(?P<rest>[^#\n]*)",
    re.M,
)


def commands():
    "Every command line of this library on a page that shows some."
    return sorted(
        {
            (m["name"], m["rest"].strip())
            for p in notebooks()
            for c in pages.cells(p)
            if c["cell_type"] == "markdown"
            for block in re.findall(r"```console\n(.*?)```", pages.source(c), re.S)
            for m in COMMANDS.finditer(block)
        }
    )


def test_commands_on_pages_exist():
    "Commands, options, tasks, presets and files named on pages are real."
    from las_nb._command import options_of
    from las_nb.cli import _COMMANDS
    from las_nb.tasks import TASKS
    from las_nb.train import presets

    found = commands()
    assert len(found) > 30
    for name, rest in found:
        known = options_of(_COMMANDS[name][0])
        long = [long for long, _ in known.values()]
        words = rest.split()
        for w in words:
            option = w[2:].partition("=")[0].replace("-", "_")
            if w.startswith("--") and not option.startswith(
                ("mixer.", "import", "help")
            ):
                assert option in known or option in long, f"{name} has no option {w}"
            if w.endswith(".toml"):
                assert (ROOT / w).exists(), f"{name} {rest}: there is no {w}"
        if (
            name in ("train", "data")
            and words
            and words[0].islower()
            and words[0].isalpha()
        ):
            assert words[0] in [*TASKS, "mnist"], (
                f"{name} {rest}: there is no such task"
            )
        if "--preset" in words:
            assert words[words.index("--preset") + 1] in presets(words[0]), (
                f"{name} {rest}: there is no such preset"
            )


def test_colab_cell_takes_pypi_else_the_repository(tmp_path):
    """Run with stand-ins for pip and git: outside Colab nothing happens, inside the
    library and the stored results arrive."""
    (tmp_path / "bin").mkdir()
    log = tmp_path / "log"
    for tool, body in (
        ("pip", 'case "$*" in *==*) exit "$PYPI";; esac'),
        ("git", "mkdir -p book/nbs/results book/nbs/grids"),
    ):
        script = tmp_path / "bin" / tool
        script.write_text(f'#!/bin/sh\necho {tool} "$@" >> {log}\n{body}\n')
        script.chmod(0o755)
    content, s = tmp_path / "content", pages.settings()

    def run(pypi):
        log.write_text("")
        subprocess.run(
            ["sh", "-c", colab.install()[1:].replace("/content", str(content))],
            env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "PYPI": pypi},
            cwd=content if content.exists() else tmp_path,
        )
        return log.read_text()

    assert run("0") == ""
    content.mkdir()
    first = run("0")
    assert (
        f"las_nb[train]=={s['version']}" in first
        and "git+" not in first
        and (content / "results").exists()
        and (content / "grids").exists()
    )
    assert f"git+{pages.git_url()}@{s['branch']}" in run("1")


OPENINGS = """
import ast, json, sys
for path in json.loads(sys.argv[1]):
    place = {}
    for cell in json.load(open(path))["cells"][1:]:
        code = "".join(cell["source"])
        if cell["cell_type"] != "code" or not (body := ast.parse(code).body):
            continue
        exec(compile(code, path, "exec"), place)
        if not all(isinstance(x, (ast.Import, ast.ImportFrom)) for x in body):
            break
import las_nb
print(las_nb.__file__)
"""


def test_every_chapter_begins_from_an_empty_folder(wheel, tmp_path):
    """Its first cell is run as in Colab, with the wheel for what PyPI has and the
    notebooks alone for the repository; then its imports, and the first cell after."""
    content, site = tmp_path / "content", tmp_path / "site"
    (tmp_path / "bin").mkdir()
    content.mkdir()
    pip = f"{sys.executable} -m pip install -q --no-deps --no-index --target {site}"
    scripts = dict(pip=f"exec {pip} {wheel}", git=f"mkdir book && cp -r {NBS} book/nbs")
    for tool, body in scripts.items():
        (tmp_path / "bin" / tool).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / tool).chmod(0o755)
    firsts = {pages.source(pages.cells(path)[0]) for path in CHAPTERS}
    (first,) = firsts  # all the same
    assert first.endswith(colab.install())
    subprocess.run(
        ["sh", "-c", colab.install()[1:].replace("/content", str(content))],
        env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"},
        cwd=content,
        check=True,
    )
    env = os.environ | dict(PYTHONPATH=str(site), MPLBACKEND="Agg")
    done = subprocess.run(
        [sys.executable, "-c", OPENINGS, json.dumps([p.name for p in CHAPTERS])],
        cwd=content,
        env=env | dict(LAS_NB_DATA=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith(str(site))


def test_chapters_say_what_they_cost():
    "Time and memory under a title are those that were measured."
    for path in CHAPTERS:
        text = "\n".join(map(pages.source, pages.cells(path)))
        told = pages.cost(path)
        assert told, f"{path.stem}: run tests/tools/measure.py {path.stem}"
        assert told in text, f"{path.name}: run `make sync`"


@pytest.mark.parametrize("path", CHAPTERS, ids=ids(CHAPTERS))
def test_gpu_chapters_say_how_to_get_one(path):
    line = re.search(
        r"\*\*GPU\*\* ([^\n]*)", "\n".join(map(pages.source, pages.cells(path)))
    ).group(1)
    assert line == "no" or "Change runtime type" in line, f"{path.name}: {line}"


def test_pages_are_accessible(site, browser):
    """axe-core finds no violation of WCAG A and AA in what pages bring (colours of
    themes are not here; those of the figures are)."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    p = browser.new_page()
    for path in notebooks():
        p.goto((site / html_name(path.name)).as_uri())
        rules = {
            "color-contrast": {"enabled": path.stem == "play"},
            "scrollable-region-focusable": {"enabled": False},
        }
        found = axe.run(
            p,
            # code is many words and no controls
            context=".play" if path.stem == "play" else {"exclude": [["pre"]]},
            options={
                "runOnly": ["wcag2a", "wcag2aa"],
                "rules": rules,
                "resultTypes": ["violations"],
            },
        )
        assert found.violations_count == 0, (
            f"{path.name}: {found.generate_report()[:1500]}"
        )
    p.close()


def test_own_colours_have_contrast():
    """Text colours of styles.css against the ground of its theme: 4.5 to 1 or more; the
    figures' against both: 3 to 1 or more."""
    css = (NBS / "styles.css").read_text()
    grounds = {"light": "#ffffff", "dark": "#222222"}
    rules = re.findall(r"quarto-(light|dark)[^{}]*\{ color: (#\w{6})", css)
    assert len(rules) >= 4
    for theme, colour in rules:
        assert contrast(colour, grounds[theme]) >= 4.5, f"{colour} on {theme}"
    drawn = re.findall(r'= "(#\w{6})"', (NBS / "interactive" / "play.js").read_text())
    assert len(drawn) == 4
    for colour in drawn:
        for ground in grounds.values():
            assert contrast(colour, ground) >= 3, f"{colour} on {ground}"
    nav = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["navbar"]
    assert (
        contrast(nav["background"], nav["foreground"]) >= 4.5
        and contrast("#777777", "#888888") < 3
    )


def contrast(a, b):
    "Contrast of two colours by WCAG 2."

    def luminance(c):
        r, g, b = (int(c[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return sum(
            w * (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4)
            for w, v in ((0.2126, r), (0.7152, g), (0.0722, b))
        )

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


LOOK = (quarto_themes.OUT / "look.js").read_text(encoding="utf-8")


def test_pages_fit_and_can_be_read(site, browser, tmp_path):
    """Every page, laid out as Quarto does: not blank; on a laptop and on a phone nothing
    makes it scroll sideways; in both modes all text has a contrast of 4.5 or more."""
    p, faults = browser.new_page(), []
    p.on("request", lambda r: faults.append(r.url) if "file:" != r.url[:5] else None)
    for file in sorted(site.rglob("*.html")):
        name = file.relative_to(site).as_posix()
        p.goto(file.as_uri())
        p.add_script_tag(content=LOOK)
        for width in (1280, 390):
            p.set_viewport_size(dict(width=width, height=900))
            whole, over = p.evaluate("[document.documentElement.scrollWidth, wide()]")
            if whole > width or over:
                faults.append(f"{name}: {whole} px wide at {width}: {over[:3]}")
            if cut := p.evaluate("broken()"):
                faults.append(f"{name}: broken in a table at {width}: {cut[:3]}")
            if tall := p.evaluate("towers()"):
                faults.append(f"{name}: narrow in a table at {width}: {tall[:3]}")
            shot = tmp_path / f"{name.replace('/', '-')}-{width}.png"
            p.screenshot(path=shot)
            if shot.stat().st_size < 8_000:
                faults.append(f"{name}: all but empty at {width}")
        for mode in ("dark", "light"):
            faint = p.evaluate("m => { dress(m); return faint(4.5); }", mode)
            faults += [f"{name}, {mode}: {text}" for text in faint]
    p.close()
    if keep := os.environ.get("LAS_NB_SHOTS"):
        shutil.copytree(tmp_path, keep, dirs_exist_ok=True)
    assert not faults, "\n".join(faults)


def test_the_look_sees_what_is_wrong(site, browser):
    "A wide box and a faint word are found."
    p = browser.new_page(viewport=dict(width=390, height=900))
    p.goto((site / "index.html").as_uri())
    p.add_script_tag(content=LOOK)
    assert p.evaluate("[wide(), faint(4.5)]") == [[], []]
    bad = "<p style='width: 900px; color: #999'>faint and wide</p>"
    p.evaluate("bad => document.querySelector('main').innerHTML += bad", bad)
    cell = f"<td style='word-break: break-all; width: 40px'>{'unbroken ' * 40}</td>"
    table = (
        f"<table style='table-layout: fixed; display: table'><tr>{cell}</tr></table>"
    )
    p.evaluate("bad => document.querySelector('main').innerHTML += bad", table)
    assert p.evaluate("[broken()[0], towers()[0].slice(0, 8)]") == ["unbroken"] * 2
    wide, faint = p.evaluate("[wide(), faint(4.5)]")
    assert "faint and wide" in wide[0] and faint[0].startswith("153,153,153 on 255")
    p.close()


def test_first_screen(site, browser):
    """Title, problem, idea, formula and code stand on the first screen of a laptop; what
    to click too, on a phone as well."""
    p = browser.new_page(viewport=dict(width=1280, height=900))
    p.goto((site / "index.html").as_uri())

    def bottom(selector):
        return p.locator(selector).first.bounding_box()["y"]

    assert bottom("main h1") < 200 and bottom("main a.button") < 350
    assert bottom("main math") < 600 and bottom("main div.sourceCode") < 800
    assert p.locator("main a.button").count() == 3
    p.set_viewport_size(dict(width=390, height=844))
    assert bottom("main a.button") < 500
    p.close()


def test_results_come_first(site, browser):
    """The speed, arena, digits, sMNIST and comparison pages open with what they found:
    on the first screen of a laptop, and no code above it; the interactive page has none.
    """
    p = browser.new_page()
    first = """() => [...document.querySelectorAll('main figure, main table')]
      .find(e => e.checkVisibility()).getBoundingClientRect().y"""
    code = """() => [...document.querySelectorAll('main div.sourceCode')]
      .filter(e => e.checkVisibility()).map(e => e.getBoundingClientRect().y)"""
    for name in ("bench", "lra", "digits", "smnist", "compare"):
        p.goto((site / f"{name}.html").as_uri())
        for width, most in ((1280, 800), (390, 1300)):
            p.set_viewport_size(dict(width=width, height=900))
            y = p.evaluate(first)
            assert y < most, f"{name}: the first result is {y:.0f} px down at {width}"
            assert min(p.evaluate(code)) > y, f"{name}: code comes before the result"
    p.goto((site / "play.html").as_uri())
    assert p.evaluate(code) == []
    p.close()


@pytest.mark.parametrize("path", notebooks(), ids=ids(notebooks()))
def test_a_function_is_shown_once(site, path):
    "With its source or as a signature, not as both; either can be linked to."
    text = (site / html_name(path.name)).read_text(encoding="utf-8")
    for cell in pages.cells(path):
        flags = pages.directives(cell)
        if not {"export", "exports"} & set(flags) or "hide" in flags:
            continue
        for x in ast.parse(re.sub(r"^[!%].*", "", pages.source(cell), flags=re.M)).body:
            name = getattr(x, "name", "_")
            if name[0] == "_" or getattr(x, "decorator_list", []):
                continue
            # a signature has a heading, and so a section
            tag = "section" if "export" in flags else "span"
            assert f'<{tag} id="{name.lower()}"' in text, f"{path.name}: {name}"


def test_markdown_that_a_cell_makes_is_shown_as_such():
    for path in notebooks():
        for cell in pages.cells(path):
            made = [o.get("data", {}) for o in cell.get("outputs", [])]
            if any("text/markdown" in data for data in made):
                assert pages.directives(cell).get("output") == "asis", path.name


def test_formulas_have_the_font_of_the_site(site, browser):
    """Every letter of every formula is drawn with it, in both modes: none is missing
    from the file, none comes from the reader's machine; none stands over a brace, which
    a browser without it puts in the wrong place."""
    p, faults = browser.new_page(), set()
    tools = p.context.new_cdp_session(p)
    tools.send("DOM.enable")
    tools.send("CSS.enable")
    for file in sorted(site.rglob("*.html")):
        text = file.read_text(encoding="utf-8")
        assert "\u23df" not in text and "\u23de" not in text, f"{file.name}: a brace"
        if "<math" not in text:
            continue
        p.goto(file.as_uri())
        p.evaluate("document.fonts.ready")
        root = tools.send("DOM.getDocument")["root"]["nodeId"]
        query = dict(nodeId=root, selector="math :is(mi, mo, mn, mtext)")
        for node in tools.send("DOM.querySelectorAll", query)["nodeIds"]:
            used = tools.send("CSS.getPlatformFontsForNode", dict(nodeId=node))["fonts"]
            faults |= {
                f"{file.name}: {f['familyName']}" for f in used if not f["isCustomFont"]
            }
    p.close()
    assert not faults, "\n".join(sorted(faults))
    fonts = NBS / "fonts"
    assert (fonts / "stix-two-math.woff2").stat().st_size < 150_000
    assert "SIL OPEN FONT LICENSE" in (fonts / "OFL.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def search(site, browser):
    "What the site's search answers to words: pages, the best first."
    p, docs = browser.new_page(), []
    left_out = {
        html_name(p.relative_to(NBS))
        for p in NBS.glob("api/*.qmd")
        if "\nsearch: false\n" in p.read_text(encoding="utf-8")
    }
    for file in sorted(site.rglob("*.html")):
        name = file.relative_to(site).as_posix()
        p.goto(file.as_uri())
        p.add_script_tag(path=quarto_themes.OUT / "search.js")
        docs += [] if name in left_out else p.evaluate("indexed", name)
    p.add_script_tag(path=quarto_themes.OUT / "fuse.min.js")
    yield lambda words: p.evaluate(
        "([docs, words]) => found(docs, words)", [docs, words]
    )
    p.close()


@pytest.mark.parametrize(
    "words, page",
    [
        ("install", "faq.html#install"),
        ("ELD", "locality.html#eld-the-decayed-scores"),
        ("locality", "locality.html"),
        ("mask", "attention.html"),
        ("las_attention", "function.html"),
        ("register_las", "adapt.html"),
        ("interactive", "play.html"),
        ("smoothing", "smoothing.html"),
        ("window", "smoothing.html"),
        ("padding", "padding.html"),
        ("decay rate", "locality.html#decay-rates"),
        ("rates", "locality.html#decay-rates"),
        ("causal", "attention.html#a-causal-mask"),
        ("rotary", "positions.html"),
        ("benchmark", "bench.html"),
        ("my own data", "faq.html#data"),
        ("forecast", "forecast.html"),
        ("checkpoint", "checkpoint.html"),
        ("resume", "train.html#cut-off-and-resumed"),
        ("streaming", "streaming.html"),
        ("KV cache", "streaming.html"),
        ("export", "function.html#compiled-and-exported"),
        ("learning rate", "optim.html"),
        ("Hugging Face", "adapt.html"),
        ("ALiBi", "layers.html#alibi"),
        ("sliding window", "layers.html#local-a-sliding-window"),
    ],
)
def test_search_finds_the_page_that_explains(search, words, page):
    assert search(words)[0].startswith(page), search(words)[:4]


def test_numbers_of_chapters_are_the_same_everywhere():
    "In the sidebar, in the text and in the names of files."
    sidebar = (ROOT / "_quarto.yml").read_text(encoding="utf-8")
    for path in CHAPTERS:
        number = int(path.stem[:2])
        assert f"text: {number} " in sidebar.split(f"href: {path.name}")[0][-60:]
    for path in notebooks():
        text = "\n".join(map(pages.source, pages.cells(path)))
        for said, number in re.findall(r"[Cc]hapter (\d+)\]\((\d\d)_", text):
            assert int(said) == int(number), f"{path.name}: chapter {said}"
    order = re.findall(r"href: (\S+)", sidebar)
    assert min(i for i, name in enumerate(order) if "api/" in name) > max(
        order.index(path.name) for path in CHAPTERS
    )


def test_themes_are_those_of_the_site():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    for mode in ("light", "dark"):
        text = (quarto_themes.OUT / f"{mode}.css").read_text(encoding="utf-8")
        assert text.startswith(quarto_themes.made_for(config)), (
            "the checks know another theme or grid: run tests/tools/quarto_themes.py"
        )


def test_preview_and_icon():
    "The picture that a shared link shows has an address of its own on every page."
    website = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]
    s = pages.settings()
    home = f"{s['doc_host']}{s['doc_baseurl']}/"
    for card in ("open-graph", "twitter-card"):
        address, words = website[card]["image"], website[card]["image-alt"]
        assert address.startswith(home) and len(words) > 30
        picture = NBS / address.removeprefix(home)
        assert 5_000 < picture.stat().st_size < 300_000  # what services take
    assert (NBS / website["favicon"]).stat().st_size < 2_000
    assert (NBS / "styles.css").stat().st_size < 8_000


def test_every_rule_of_the_style_has_a_reason():
    css = (NBS / "styles.css").read_text(encoding="utf-8")
    for block in css.strip().split("\n\n"):
        assert block.startswith("/* "), f"styles.css: why {block[:60]}"
