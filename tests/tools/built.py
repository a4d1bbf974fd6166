"""The site without Quarto: every page processed by nbdev and converted by pandoc; what
the docs checks look at."""

import functools, json, os, re, shutil, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
import yaml
from pages import NBS, ROOT

# Quarto's layout and themes, in short
QUARTO = Path(__file__).parent / "quarto"

PROCESS = """
import nbdev.doclinks
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
refresh_quarto_yml(); nbdev.doclinks._build_modidx(); proc_nbs(n_workers=0, force=True)
"""


class Page(HTMLParser):
    "Ids, links, images, headings and size of one HTML page."

    def __init__(self, path):
        super().__init__()
        self.ids = set()
        self.links = []
        self.images = []
        self.headings = []
        self.name = path.name
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get("id"):
            self.ids.add(a["id"])
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag == "img":
            self.images.append(a)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))


parsed = functools.cache(Page)


def html_name(path):
    """Where a page of `nbs/` ends, below the site; nbdev leaves the number out of the
    address."""
    path = Path(path)
    return (path.parent / (re.sub(r"^\d+_", "", path.stem) + ".html")).as_posix()


def normalise(nb):
    """What pandoc needs and nbdev leaves out; Markdown that a cell prints becomes a
    Markdown cell."""
    cells = []
    for cell in nb["cells"]:
        cell.setdefault("metadata", {})
        # pandoc would fetch remote pictures: their alt text stands in
        if cell["cell_type"] != "code":
            cells.append(
                dict(
                    cell,
                    source=re.sub(
                        r"!\[(.*?)\]\(https?://[^)]*\)", r"\1", "".join(cell["source"])
                    ),
                )
            )
            continue
        cell.setdefault("execution_count", None)
        cell.setdefault("outputs", [])
        asis = re.search(r"^#\| *output: *asis", "".join(cell["source"]), re.M)
        if not asis:
            cells.append(cell)
        for o in cell["outputs"]:
            o.pop("has_sd", None)
            if o["output_type"] == "execute_result" and not isinstance(
                o.get("execution_count"), int
            ):
                o["execution_count"] = 1
            if asis:
                cells.append(
                    dict(
                        cell_type="markdown",
                        metadata={},
                        source=o.get("data", {}).get(
                            "text/markdown", o.get("text", "")
                        ),
                    )
                )
    return dict(nb, cells=cells, nbformat=4, nbformat_minor=5)


def front(nb):
    "The title and the description that nbdev gives a page."
    raw = ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "raw"]
    return {k: v for r in raw for k, v in yaml.safe_load(r.strip("-\n")).items()}


def convert(source, proc, out, head):
    "One page of `proc` to HTML; bad TeX and other warnings fail."
    import pypandoc

    name = html_name(source.relative_to(proc))
    (out / name).parent.mkdir(exist_ok=True)
    (proc / "head.yml").write_text(yaml.safe_dump(head), encoding="utf-8")
    args = [
        *("--standalone", "--mathml", "--toc", "--section-divs", "--fail-if-warnings"),
        f"--template={QUARTO / 'page.html'}",
        f"--lua-filter={QUARTO / 'page.lua'}",
        f"--variable=root:{'../' * name.count('/')}",
        f"--metadata-file={proc / 'head.yml'}",
        f"--metadata=pagetitle:{source.stem}",
        f"--extract-media=media/{source.stem}",
    ]
    kind = "ipynb+link_attributes" if source.suffix == ".ipynb" else "markdown"
    command = [pypandoc.get_pandoc_path(), str(source), "-f", kind, "-t", "html5"]
    subprocess.run([*command, "-o", name, *args], cwd=out, check=True)


def process(work):
    "What nbdev hands to Quarto, of the project in `work`."
    paths = [str(QUARTO.parent), os.environ.get("PYTHONPATH")]
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, paths)))
    subprocess.run(
        [sys.executable, "-c", PROCESS],
        cwd=work,
        env=env,
        check=True,
        capture_output=True,
    )


def build(work):
    "The folder of the site, made in `work`."
    for name in ("settings.ini", "_quarto.yml", "README.md"):
        shutil.copy(ROOT / name, work)
    for name in ("nbs", "las_nb"):
        shutil.copytree(
            ROOT / name,
            work / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    process(work)
    out, proc = work / "site", work / "_proc"
    out.mkdir()
    for css in (NBS / "styles.css", *QUARTO.glob("*.css")):
        shutil.copy(css, out)
    for folder in ("results", "fonts"):
        shutil.copytree(NBS / folder, out / folder)
    for path in sorted(proc.rglob("*.qmd")):
        convert(path, proc, out, {})
    for path in sorted(proc.glob("*.ipynb")):
        nb = normalise(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(nb), encoding="utf-8")
        head = front(nb)
        convert(path, proc, out, head)
        assert path.stem == "index" or head["output-file"] == html_name(path.name), (
            f"nbdev gives {path.stem} another address"
        )
    return out
