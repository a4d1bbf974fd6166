"""What `make sync` writes from the library: one page of the reference for every module, and their list.

The tables come from the signatures and from the comments beside their arguments (fastcore's docments). What users call
first (first.py) comes first, with an example."""

import functools, importlib, inspect, re, types
from dataclasses import is_dataclass
from fastcore.docments import docments
import pages
from first import FIRST

EMPTY = inspect.Parameter.empty


def modules():
    "Notebooks by the module they export to, rooms in the order of imports."
    found = {}
    for path in pages.notebooks():
        if name := pages.module(path):
            found[name] = path
    return dict(sorted(found.items(), key=lambda pair: pair[0].startswith("_")))


def load(name):
    lib = pages.settings()["lib_name"]
    name = name.removesuffix("__init__").rstrip(".")
    return importlib.import_module(f"{lib}.{name}" if name else lib)


def cell(text):
    return " ".join(str(text or "").split()).replace("|", r"\|")


def kind(anno):
    if anno in (EMPTY, None):
        return ""
    if isinstance(anno, str):
        return anno.replace(" | ", " or ")
    text = (
        anno.__name__
        if isinstance(anno, type) and not hasattr(anno, "__args__")
        else str(anno)
    )
    # a bar would end the cell
    return re.sub(
        r"\b(?:torch|pathlib|typing|collections\.abc|las_nb)\.(?:[\w.]*\.)?(?=\w)",
        "",
        text,
    ).replace(" | ", " or ")


def code(text):
    return f"`{cell(text)}`" if text != "" else ""


def default(value):
    if value is EMPTY:
        return ""
    text = getattr(value, "__name__", None) or repr(value)
    # a register, say, which grows as modules are imported
    return text if len(text) < 60 else "..."


def table(f):
    "The arguments of a function as a table; empty when it has none."
    if f is None:
        return ""
    rows, args = [], docments(f, full=True)
    for name, a in args.items():
        if name in ("self", "cls", "return"):
            continue
        star = {
            inspect.Parameter.VAR_POSITIONAL: "*",
            inspect.Parameter.VAR_KEYWORD: "**",
        }.get(a["kind"], "")
        rows.append(
            f"| {code(star + name)} | {code(kind(a['anno']))} | "
            f"{code(default(a['default']))} | {cell(a['docment'])} |"
        )
    back = args.get("return") or {}
    if back.get("docment") or kind(back.get("anno")):
        rows.append(
            f"| **returns** | {code(kind(back.get('anno')))} |  | "
            f"{cell(back.get('docment'))} |"
        )
    return (
        "\n".join(
            [
                "| argument | type | default | meaning |",
                "|:----|:----|:---|:------------|",
                *rows,
            ]
        )
        if rows
        else ""
    )


def call(name, f):
    "`name(a, b=1)`: how it is called."
    if inspect.isclass(f) and not any(
        {"__init__", "__new__"} & set(vars(c))
        for c in f.__mro__
        if c.__module__.startswith(pages.settings()["lib_name"])
    ):
        # made like its base, which is not ours
        return f"```python\nclass {name}({', '.join(c.__name__ for c in f.__bases__)})\n```"
    out = []
    for p in inspect.signature(f).parameters.values():
        if p.name in ("self", "cls"):
            continue
        text = str(p.replace(annotation=EMPTY, default=EMPTY))
        out.append(text if p.default is EMPTY else f"{text}={default(p.default)}")
    return f"```python\n{name}({', '.join(out)})\n```"


def source(thing):
    "The lines on GitHub that define `thing`."
    thing = inspect.unwrap(thing)
    lines, first = inspect.getsourcelines(thing)
    path = f"{thing.__module__.replace('.', '/')}.py"
    return f"[source]({pages.git_url()}/blob/{pages.settings()['branch']}/{path}#L{first}-L{first + len(lines) - 1})"


def arguments(thing):
    "What holds the arguments of `thing`, if anything does."
    return (
        vars(thing).get("__init__")
        if inspect.isclass(thing) and not is_dataclass(thing)
        else thing
    )


def entry(name, thing, level=2, example=""):
    "One function or class with its methods."
    head = f"{'#' * level} {name} {{#{name}}}"
    own = inspect.getdoc(thing) if thing.__doc__ else ""
    parts = [
        head,
        call(name, thing),
        f"{own}\n" if own else "",
        example,
        table(arguments(thing)),
        source(thing),
    ]
    if inspect.isclass(thing):
        for method, m in vars(thing).items():
            m = getattr(m, "__func__", m)
            if (
                inspect.isfunction(m)
                and not method.startswith("_")
                and (m.__doc__ or table(m))
            ):
                parts.append(entry(f"{name}.{method}", m, level + 1))
    return "\n\n".join(p for p in parts if p)


def left_out(thing):
    "Is it another name for a type or a module, which says nothing by itself?"
    return isinstance(thing, types.ModuleType) or hasattr(thing, "__origin__")


def uncached(thing):
    "The function itself of one that keeps its answers."
    return inspect.unwrap(thing) if hasattr(thing, "cache_info") else thing


def example(name, public):
    code = FIRST.get((name, public))
    return f"```python\n{code.strip()}\n```" if code else ""


def page(name, chapter):
    "The reference of one module."
    module = load(name)
    out = [
        f'---\ntitle: "{module.__name__}"\ndescription: "{promise(chapter)}"\n'
        "search: false\n---",  # its names would come before the pages that explain them
        f"Derived and tested in [{title(chapter)}](../{chapter.name}). Written by "
        "`make sync` from the library.",
    ]
    constants = []
    for public in sorted(module.__all__, key=lambda n: (name, n) not in FIRST):
        thing = uncached(getattr(module, public))
        if inspect.isfunction(thing) or inspect.isclass(thing):
            if thing.__module__ == module.__name__:
                out.append(entry(public, thing, example=example(name, public)))
            else:
                lib = pages.settings()["lib_name"]
                home = stem(thing.__module__.removeprefix(f"{lib}."))
                constants.append(f"- [{public}]({home}.qmd#{public})")
        elif not left_out(thing):
            constants.append(f"- `{public}`: {constant(thing)}")
    if constants:
        out.insert(2, "\n".join(constants))
    return "\n\n".join(out) + "\n"


def constant(thing):
    "A short form of a value."
    # what it holds may grow as modules are imported
    if isinstance(thing, dict):
        return "a dict"
    text = (
        repr(thing)
        if not isinstance(thing, (set, frozenset))
        else ", ".join(sorted(map(str, thing)))
    )
    return (
        f"`{text}`"
        if len(text) < 90 and " at 0x" not in text
        else f"a {type(thing).__name__}"
    )


def head(path):
    return re.match(
        r"# (.+)\n\n> (.+)",
        next(
            pages.source(c) for c in pages.cells(path) if c["cell_type"] == "markdown"
        ),
    )


def title(path):
    return head(path).group(1)


def promise(path):
    return head(path).group(2).replace('"', "'")


# the rooms of the list of modules, by the beginning of their names
GROUPS = {
    "LaS, fast": ("fast",),
    "Layers": ("mixers",),
    "Tasks": ("tasks",),
    "Training": ("train", "settings"),
    "Results": ("results",),
    "Commands, measurements, plumbing": (
        *("cli", "_command", "_util", "__main__", "bench", "cluster", "compare"),
        *("digits", "experiments", "lengths", "race", "streaming"),
    ),
}
DERIVED = "The derivation, the model, other people's models"


@functools.cache
def group(name):
    "The heading under which a module is listed."
    top = name.split(".")[0]
    return next((g for g, tops in GROUPS.items() if top in tops), DERIVED)


def opening(public, name):
    "One of the functions that are called first: what it does, and an example."
    thing = getattr(load(name), public)
    told = inspect.getdoc(thing).split("\n\n")[0].replace("\n", " ")
    link = f"[all arguments]({stem(name)}.qmd#{public})"
    head = f"### {public} {{#{public}}}"
    return f"{head}\n\n{told} ({link})\n\n{example(name, public)}"


def listing(names):
    "What is called first, then the list of all modules."
    out = [
        '---\ntitle: "Reference"\ndescription: "Every public function and class, with '
        'its arguments, shapes and units."\n---',
        "## What is called first",
        *(opening(public, name) for name, public in FIRST),
        "## All modules",
    ]
    for heading in (DERIVED, *GROUPS):
        rows = [
            f"- [{load(n).__name__}]({stem(n)}.qmd): {promise(c)} "
            f"([{title(c)}](../{c.name}))"
            for n, c in names.items()
            if group(n) == heading
        ]
        out += [f"### {heading}", "\n".join(rows)]
    return "\n\n".join(out) + "\n"


def stem(name):
    return pages.reference_stem(name)


def write():
    "Every page of the reference: path below `nbs/` -> text."
    names = modules()
    return {f"api/{stem(n)}.qmd": page(n, c) for n, c in names.items()} | {
        "api/index.qmd": listing(names)
    }
