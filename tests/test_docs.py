"""Every page as a reader gets it, without Quarto: processed by nbdev, converted by pandoc, looked at by Chromium."""
import base64, os, re, shutil, struct, subprocess, zlib
import pytest, yaml
import pages
from built import html_name, parsed
from pages import NBS, ROOT, notebooks

CHAPTERS = [p for p in notebooks() if re.match(r"\d\d_", p.name)]


def ids(paths): return [p.stem for p in paths]


def page(site, path): return parsed(site / html_name(path.relative_to(NBS)))


@pytest.mark.parametrize("path", notebooks(), ids=ids(notebooks()))
def test_links_lead_somewhere(site, path):
    s = pages.settings()
    home = f"{s['doc_host']}{s['doc_baseurl']}/"
    here = page(site, path)
    assert here.links
    for link in here.links: follow(site, path, link, home)


def follow(site, path, link, home):
    "Fail unless a link of the page at `path` leads to a page, and to an anchor on it."
    base = path.parent
    if link.startswith(home): link, base = link[len(home):], NBS
    elif re.match(r"https?:|mailto:", link): return
    target, _, anchor = link.partition("#")
    target = (base / target).resolve() if target else path
    if target.suffix in (".ipynb", ".qmd"):
        assert target.exists(), f"{path.name}: {link} leads nowhere"
        target = target.with_name(html_name(target.name))
    target = site / target.relative_to(NBS).with_name(html_name(target.name) if target == path else target.name)
    assert target.exists(), f"{path.name}: {link} leads nowhere"
    if anchor: assert anchor in parsed(target).ids, f"{path.name}: no #{anchor} on {target.name}"


@pytest.mark.parametrize("path", notebooks(), ids=ids(notebooks()))
def test_code_holds_no_markdown_links(site, path):
    "nbdev links backticked names, in comments of signatures too, where nothing renders them."
    text = (site / html_name(path.name)).read_text(encoding="utf-8")
    for block in re.findall(r"<pre.*?</pre>", text, re.S): assert "](http" not in re.sub("<[^>]+>", "", block)


@pytest.mark.parametrize("path", notebooks(), ids=ids(notebooks()))
def test_figures_have_words_and_a_white_ground(site, path):
    for cell in pages.cells(path):
        png = [o["data"]["image/png"] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        if png:
            flags = pages.directives(cell)
            for key in ("label", "fig-cap", "fig-alt"): assert flags.get(key), f"{path.name}: a figure lacks #| {key}"
            corner = first_pixel(base64.b64decode("".join(png[0])))
            assert corner[:3] == (255, 255, 255) and corner[3:] in ((), (255,)), f"{path.name}: {flags['label']} is not on white"
    for image in page(site, path).images:
        if not image["src"].startswith("http"): assert (site / image["src"]).stat().st_size > 500
    for cell in pages.cells(path):
        if cell["cell_type"] == "markdown": assert not re.search(r"!\[\]\(", pages.source(cell)), f"{path.name}: an image without alt text"


def first_pixel(png):
    "Top left pixel of a PNG: (r, g, b) or (r, g, b, a)."
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    depth, colour = png[24], png[25]
    assert depth == 8 and colour in (2, 6)
    data, i = b"", 8
    while i < len(png):
        size, kind = struct.unpack(">I4s", png[i:i + 8])
        if kind == b"IDAT": data += png[i + 8:i + 8 + size]
        i += 12 + size
    return tuple(zlib.decompress(data)[1:4 + (colour == 6)])  # the first pixel is the same under every PNG filter


@pytest.mark.parametrize("path", CHAPTERS, ids=ids(CHAPTERS))
def test_a_chapter_has_its_parts(site, path):
    cells = pages.cells(path)
    text = "\n".join(pages.source(c) for c in cells if c["cell_type"] == "markdown")
    title = next(pages.source(c) for c in cells if c["cell_type"] == "markdown")
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+", title.strip()), "the title cell holds a title and a promise, nothing else"
    for part in ("**Needs**", "**Gives**", "**Time**", "**GPU**", "## Where we differ from the paper, and why", "## Exercises", "## References",
                 "1. **Check.**", "2. **Break.**", "3. **Extend.**"):
        assert part in text, f"{path.name} lacks {part}"
    code = [c for c in cells if c["cell_type"] == "code"]
    first = next(i for i, c in enumerate(code) if any("image/png" in o.get("data", {}) for o in c["outputs"]))
    assert first < 14, "the first picture comes early"
    assert "#| hide" in pages.source(cells[0]) and "#| eval: false" in pages.source(cells[0]) and "pip install" in pages.source(cells[0])
    assert (ROOT / "las_nb" / f"{path.stem[3:]}.py").exists(), "one chapter is one module of that name"
    headings = page(site, path).headings
    assert all(b <= a + 1 for a, b in zip(headings, headings[1:])), "headings in order"


@pytest.mark.parametrize("path", [p for p in notebooks() if p.stem != "index"], ids=lambda p: p.stem)
def test_badge_opens_this_notebook(path):
    text = "\n".join(map(pages.source, pages.cells(path)))
    assert re.findall(r"\]\((https://colab\.research\.google\.com/github/[^)]*)\)", text) == [pages.colab(path)]


def test_solutions_answer_every_exercise():
    text = "\n".join(pages.source(c) for c in pages.cells(NBS / "solutions.ipynb") if c["cell_type"] == "markdown")
    for kind in ("**1. Check.**", "**2. Break.**", "**3. Extend.**"): assert text.count(kind) == len(CHAPTERS)


def test_the_owner_stands_in_settings_alone():
    for path in [*notebooks(), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        text = path.read_text(encoding="utf-8")
        assert pages.with_owner(text) == text, f"{path.name} names another owner: run `make sync`"
    other = pages.with_owner("https://github.com/someone/las_nb https://someone.github.io/las_nb/x.html c/github/someone/las_nb/blob")
    assert "someone" not in other


def test_readme_is_the_index():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == pages.readme(), "README.md differs from nbs/index.ipynb: run `make sync`"


def test_readme_paths_exist():
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", pages.readme()): assert (ROOT / target).exists(), target


def test_quarto_config_is_one_file_and_lists_every_page():
    assert (NBS / "_quarto.yml").read_text() == (ROOT / "_quarto.yml").read_text(), "nbs/_quarto.yml must be a symlink to ../_quarto.yml (git config core.symlinks true)"
    cfg = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    def hrefs(items):
        for i in items:
            if "href" in i: yield i["href"]
            yield from hrefs(i.get("contents", []))
    assert sorted(hrefs(cfg["website"]["sidebar"]["contents"])) == sorted(p.relative_to(NBS).as_posix() for p in [*notebooks(), *NBS.glob("api/*.qmd")])
    assert cfg["format"]["html"]["keep-md"] is True


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium")
def test_pages_look_like_pages(site, tmp_path):
    "Render every page headless; a blank page or one that runs off to the right fails."
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}", "--hide-scrollbars", "--window-size=1000,1400"]
    for path in notebooks():
        shot = tmp_path / f"{path.stem}.png"
        subprocess.run(["chromium", *flags, f"--screenshot={shot}", (site / html_name(path.name)).as_uri()], check=True, capture_output=True, timeout=120)
        assert shot.stat().st_size > 20_000, f"{path.stem}: the page is all but empty"
    if keep := os.environ.get("LAS_NB_SHOTS"): shutil.copytree(tmp_path, keep, dirs_exist_ok=True, ignore=lambda d, n: [x for x in n if not x.endswith(".png")])
