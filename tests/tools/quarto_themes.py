"""Writes `quarto/light.css` and `quarto/dark.css`, the themes of `_quarto.yml` as Quarto
compiles them, less what no page uses: for the checks of width and contrast.

    python tests/tools/quarto_themes.py QUARTO SITE

QUARTO is a clone of quarto-dev/quarto-cli at the version that docs.yml pins, SITE the
folder that built.py makes. Needs node, and `npm install sass purgecss` in the folder
from which it runs. To be run again when the themes, the grid or Quarto change."""

import json, re, subprocess, sys, tempfile
from pathlib import Path
import yaml
from project import NBS, ROOT

OUT = Path(__file__).parent / "quarto"
PARTS = ("uses", "functions", "defaults", "mixins", "rules")
# pandoc's short names of what a style colours
TOKENS = dict(
    Keyword="kw", DataType="dt", DecVal="dv", BaseN="bn", Float="fl", Char="ch",
    String="st", Comment="co", Other="ot", Alert="al", Function="fu", Error="er",
    Constant="cn", SpecialChar="sc", VerbatimString="vs", SpecialString="ss",
    Import="im", Documentation="do", Annotation="an", CommentVar="cv", Variable="va",
    ControlFlow="cf", Operator="op", BuiltIn="bu", Extension="ex", Preprocessor="pp",
    Attribute="at", RegionMarker="re", Information="in", Warning="wa",
)  # fmt: skip
PURGE = """
import { PurgeCSS } from "purgecss"; import fs from "fs";
const [css, site] = process.argv.slice(2);
const safelist = { standard: ["quarto-light", "quarto-dark"], greedy: [/breadcrumb/, /callout/] };
const [made] = await new PurgeCSS().purge({ content: [`${site}/**/*.html`], css: [css], safelist });
fs.writeFileSync(css, made.css.replace(/^\ufeff/, "").replaceAll("}", "}\\n"));
"""


def layers(text):
    "The parts of a SCSS file of Quarto's, by name."
    parts, at = dict.fromkeys(PARTS, ""), "defaults"
    for line in text.splitlines():
        if found := re.match(r"/\*--\s*scss:\s*(\w+)\s*--\*/$", line):
            at = found[1]
        else:
            parts[at] += line + "\n"
    return parts


def code_colours(resources, style):
    "Variables and rules of a highlighting style."
    file = resources / "pandoc" / "highlight-styles" / f"{style}.theme"
    theme = json.loads(file.read_text(encoding="utf-8"))
    colours = {k: v.get("text-color") for k, v in theme["text-styles"].items()}
    variables = {
        "code-block-bg": theme["background-color"],
        "code-block-color": theme["text-color"],
        "btn-code-copy-color": colours["Comment"],
        "btn-code-copy-color-active": colours["Function"],
    }
    rules = [
        f"code span.{TOKENS[k]} {{ color: {c}; }}"
        for k, c in colours.items()
        if c and k in TOKENS
    ]
    if theme["text-color"]:
        rules.append(f"pre > code.sourceCode {{ color: {theme['text-color']}; }}")
    lines = [f"${k}: {v} !default;" for k, v in variables.items() if v]
    return "\n".join(lines), "\n".join(rules)


def scss(resources, config, mode):
    "The SCSS of one mode, its layers in the order of Quarto's `compileSass`."
    html, website = config["format"]["html"], config["website"]
    base = resources / "formats" / "html"

    def read(*names):
        texts = [(base / n).read_text(encoding="utf-8") for n in names]
        return "\n".join(texts)

    theme, own = html["theme"][mode]
    theme, own = read(f"bootstrap/themes/{theme}.scss"), (NBS / own).read_text()
    user = [
        layers(t) for t in (theme, read("bootstrap/_bootstrap-customize.scss"), own)
    ]
    variables, rules = code_colours(resources, f"{html['highlight-style']}-{mode}")
    bar = website["navbar"]
    site = f"""$navbar-bg: {bar["background"]} !default;
$navbar-fg: {bar["foreground"]} !default;
$sidebar-bg: if(variable-exists(body-bg), $body-bg, #fff) !default;
$sidebar-border: false !default;
$footer-border: true !default;
$code-copy-selector: "" !default;
$code-white-space: pre !default;
$tbl-cap-location: top !default;"""
    grid = "".join(f"$grid-{k}: {v};\n" for k, v in html["grid"].items())
    scss = base / "bootstrap" / "dist" / "scss"
    return "\n\n".join(
        [
            read("_quarto-uses.scss"),
            read("bootstrap/dist/scss/_functions.scss"),
            read("bootstrap/dist/sass-utils/color-contrast.scss"),
            read("_quarto-functions.scss", "bootstrap/_bootstrap-functions.scss"),
            *(u["functions"] for u in user),
            variables,
            *(u["defaults"] for u in reversed(user)),
            site,
            read("bootstrap/_bootstrap-variables.scss"),
            read("_quarto-variables-copy-code.scss"),
            (scss / "_variables.scss").read_text(encoding="utf-8"),
            grid,
            (scss / "_mixins.scss").read_text(encoding="utf-8"),
            read("bootstrap/_bootstrap-mixins.scss"),
            (scss / "bootstrap.scss").read_text(encoding="utf-8"),
            read("_quarto-rules.scss", "_quarto-rules-copy-code.scss"),
            read("bootstrap/_bootstrap-rules.scss"),
            read("../../projects/website/navigation/quarto-nav.scss"),
            read("templates/title-block.scss"),
            *(u["rules"] for u in user),
            rules,
        ]
    )


def made_for(config):
    "The line that says what the themes were made for."
    html, bar = config["format"]["html"], config["website"]["navbar"]
    kept = {k: html[k] for k in ("theme", "grid", "highlight-style")}
    colours = {k: bar[k] for k in ("background", "foreground")}
    own = (NBS / "theme.scss").read_text(encoding="utf-8").splitlines()[2:]
    return f"/* {json.dumps([kept, colours, own])} */\n"


def main(quarto, site):
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    resources = Path(quarto) / "src" / "resources"
    paths = f"--load-path={resources}/formats/html/bootstrap/dist/scss"
    for mode in ("light", "dark"):
        css = OUT / f"{mode}.css"
        with tempfile.TemporaryDirectory(dir=".") as work:
            source, purge = Path(work) / "theme.scss", Path(work) / "purge.mjs"
            source.write_text(scss(resources, config, mode), encoding="utf-8")
            purge.write_text(PURGE, encoding="utf-8")
            options = ("--quiet", "--no-source-map", "--style=compressed", paths)
            command = ["npx", "sass", *options, str(source), str(css)]
            subprocess.run(command, check=True)
            subprocess.run(["node", str(purge), str(css), site], check=True)
        text = made_for(config) + css.read_text(encoding="utf-8")
        css.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
