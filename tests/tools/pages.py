"""The site without Quarto: what `make sync` rewrites and what the docs checks read.

Run as a program it joins printed outputs, writes the install cell and the line of links of every page, copies the repository's
owner from settings.ini, writes the reference (reference.py), and makes README.md and its picture from nbs/index.ipynb."""

import base64, json, math, re, sys
import colab
from pathlib import Path
from project import NBS, ROOT, git_url, settings


# with links to the repository
TEXTS = (
    "CONTRIBUTING.md",
    "_quarto.yml",
    "CITATION.cff",
    ".github/SECURITY.md",
    ".github/ISSUE_TEMPLATE/config.yml",
)


def notebooks():
    return sorted(
        p
        for p in NBS.rglob("*.ipynb")
        if not any(s.startswith((".", "_")) for s in p.relative_to(NBS).parts)
    )


def chapters():
    return [p for p in notebooks() if re.match(r"\d\d_", p.name)]


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def directives(cell):
    return dict(re.findall(r"^#\| *([\w-]+):? *(.*)$", source(cell), re.M))


def module(path):
    "The module that a notebook exports to, such as `train.loop`; None for a page without one."
    for cell in cells(path):
        if found := re.search(r"^#\| *default_exp +(\S+)", source(cell), re.M):
            return found[1]
    return None


def reference_stem(name):
    "The name of a module's page of the reference."
    if name == "__init__":
        return "package"
    return (
        name.removesuffix(".__init__").strip("_").replace("._", ".").replace(".", "-")
    )


def badge(path):
    "The line under a title: run it, read its source, its module and its reference."
    name, blob = module(path), f"{git_url()}/blob/{settings()['branch']}"
    links = [
        f"[Kaggle]({colab.kaggle(path)})",
        "[run locally](faq.ipynb#how-do-i-run-a-page-on-my-own-machine)",
        f"[notebook]({blob}/{path.relative_to(ROOT).as_posix()})",
    ]
    if name:
        file = f"las_nb/{name.replace('.', '/')}.py"
        page = f"{'../' * (len(path.relative_to(NBS).parts) - 1)}api/{reference_stem(name)}.qmd"
        links += [f"[module]({blob}/{file})", f"[reference]({page})"]
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab.address(path)}) · "
        + " · ".join(links)
    )


def cost(path):
    """What running a page costs, as measure.py found it: seconds of a processor, rounded
    up, and memory; None for a page that was not measured."""
    record = json.loads(
        Path(__file__).with_name("costs.json").read_text(encoding="utf-8")
    )
    if path.stem not in record:
        return None
    seconds, mib = record[path.stem]["cpu_seconds"], record[path.stem]["peak_mib"]
    if seconds > 90:
        time = f"{math.ceil(seconds / 60)} minutes"
    else:
        time = f"{10 * math.ceil(seconds / 10)} seconds"
    return f"**Time** {time} and {mib / 1024:.1f} GiB to run"


def with_head(path, text):
    """A notebook whose install cells say what `install` says, whose badge says what
    `badge` says, and whose line on time says what `cost` says."""
    told = cost(path)
    nb = json.loads(text)
    for cell in nb["cells"]:
        if "[ -e /content ]" in source(cell):
            cell["source"] = ["#| hide\n", "#| eval: false\n", colab.install()]
        if source(cell).startswith("[![Open in Colab]"):
            cell["source"] = (
                badge(path) + re.sub(r"\A[^\n]*", "", source(cell))
            ).splitlines(keepends=True)
        if told and "**Time** " in source(cell):
            new = re.sub(r"\*\*Time\*\* [^·(,]*?to run", told, source(cell))
            new = re.sub(r"(?<=\d) to read", " minutes to read", new)
            cell["source"] = new.splitlines(keepends=True)
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def with_owner(text):
    "Every link to this repository or its site, with the owner of settings.ini."
    s = settings()
    return re.sub(
        rf"(github\.com/|/github/|https://)[\w-]+(?=(\.github\.io)?/{s['repo']}\b)",
        rf"\g<1>{s['user']}",
        text,
    )


# of the index, for README.md, which holds no pictures itself
def picture(flags):
    return f"results/{flags['label']}.png"


def pictures():
    "The pictures that the index draws: path below `nbs/` -> bytes."
    drawn = [
        (directives(c), o["data"]["image/png"])
        for c in cells(NBS / settings()["readme_nb"])
        for o in c.get("outputs", [])
        if "image/png" in o.get("data", {})
    ]
    return {picture(flags): base64.b64decode("".join(png)) for flags, png in drawn}


def readme():
    "README.md as nbs/index.ipynb says it: prose, code, and the outputs that are Markdown or text."
    out = []
    for cell in cells(NBS / settings()["readme_nb"]):
        flags = directives(cell) if cell["cell_type"] == "code" else {}
        if "hide" in flags:
            continue
        if cell["cell_type"] == "markdown":
            out.append(source(cell))
        elif flags.get("echo") != "false":
            out.append(
                "```python\n"
                + re.sub(r"^#\|.*\n", "", source(cell), flags=re.M)
                + "\n```"
            )
        for o in cell.get("outputs", []):
            data = o.get("data", {})
            if "image/png" in data:
                out.append(f"![{flags['fig-alt'].strip(chr(34))}]({picture(flags)})")
                continue
            if "text/markdown" in data:
                out.append("".join(data["text/markdown"]))
            elif text := data.get("text/plain", o.get("text")):
                out.append("```\n" + "".join(text).rstrip() + "\n```")
    note = "<!-- Made from nbs/index.ipynb by `make sync`: edit the notebook. -->"
    text = "\n\n".join([note, *out]) + "\n"
    text = re.sub(r"(\]\([^)\s]*\))\{\.[\w-]+\}", r"\1", text)  # classes are the site's
    return re.sub(r"\]\((?!https?:|#)", "](nbs/", text)


def joined(text):
    """A notebook in which what a cell printed in pieces is one output, and warnings, which
    tell of the machine, are none."""
    nb = json.loads(text)
    for cell in nb["cells"]:
        outputs = []
        for o in cell.get("outputs", []):
            if o.get("name") == "stderr":
                continue
            last = outputs[-1] if outputs else {}
            if (
                o["output_type"] == last.get("output_type") == "stream"
                and o["name"] == last["name"]
            ):
                last["text"] += o["text"]
            else:
                outputs.append(o)
        if "outputs" in cell:
            cell["outputs"] = outputs
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def main():
    for path in [*notebooks(), *(ROOT / name for name in TEXTS)]:
        old = path.read_text(encoding="utf-8")
        new = with_owner(
            with_head(path, joined(old)) if path.suffix == ".ipynb" else old
        )
        if new != old:
            path.write_text(new, encoding="utf-8")
            print(f"tidied {path.relative_to(ROOT)}")
    import reference

    wanted = {NBS / name: text for name, text in reference.write().items()}
    for path in (NBS / "api").glob("*.qmd"):
        if path not in wanted:
            path.unlink()
            print(f"removed {path.relative_to(ROOT)}")
    for path, text in wanted.items():
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"made {path.relative_to(ROOT)}")
    for name, png in pictures().items():
        if not (NBS / name).exists() or (NBS / name).read_bytes() != png:
            (NBS / name).write_bytes(png)
            print(f"made nbs/{name}")
    target = ROOT / "README.md"
    if (text := readme()) != target.read_text(encoding="utf-8"):
        target.write_text(text, encoding="utf-8")
        print("made README.md")


if __name__ == "__main__":
    sys.exit(main())
