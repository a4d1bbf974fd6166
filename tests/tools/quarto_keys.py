"""Takes the options of a Quarto release out of its repository, as far as this project uses them:

    python tests/tools/quarto_keys.py CLONE_OF_QUARTO_CLI v1.9.38 > tests/tools/quarto_keys.json

A shape is "string", "number", "boolean", "null" or "any", or {"one of": values}, {"list of": shape}, {"keys": {name: shape}},
{"either": shapes} or {"see": name of a shape under "shapes"}."""

import json, re, subprocess, sys
import yaml

FORMATS = ("html", "commonmark")  # what _quarto.yml makes
UNUSED = re.compile(
    """brand|book|manuscript|listing|about|csl|comments|giscus|crossref-labels|external-engine|epub|logo|cookie|quarto-dev|date|filters|shortcodes"""
)
# keys that the program reads and its schema leaves out: name -> where
UNLISTED = {"google-scholar": "src/format/html/format-html-meta.ts"}


def git(clone, *args):
    return subprocess.run(
        ["git", "-C", clone, *args], check=True, capture_output=True, text=True
    ).stdout


class Quarto:
    def __init__(self, clone, tag):
        self.clone, self.tag, self.shapes = clone, tag, {}
        self.definitions = {d["id"]: d for d in self.read("definitions.yml")}
        self.aliases = self.read("format-aliases.yml")["aliases"]

    def text(self, path):
        return git(self.clone, "show", f"{self.tag}:{path}")

    def read(self, name):
        return yaml.safe_load(self.text(f"src/resources/schema/{name}"))

    def names(self, folder):
        return [
            p.rsplit("/", 1)[-1]
            for p in git(
                self.clone, "ls-tree", "--name-only", self.tag, f"{folder}/"
            ).split()
        ]

    def shape(self, s):
        "A shape from Quarto's own schema language."
        if s is None:
            return "null"
        if not isinstance(s, dict):
            return (
                {"path": "string", "object": "any"}.get(s, s)
                if s in ("string", "path", "number", "boolean", "any", "object")
                else {"one of": [s]}
            )
        if "anyOf" in s:
            return either([self.shape(a) for a in s["anyOf"]])
        if "maybeArrayOf" in s:
            item = self.shape(s["maybeArrayOf"])
            return either([item, {"list of": item}])
        if "arrayOf" in s:
            return {"list of": self.shape(s["arrayOf"])}
        if "enum" in s:
            return {
                "one of": s["enum"]["values"]
                if isinstance(s["enum"], dict)
                else s["enum"]
            }
        if "object" in s:
            return self.keys(s["object"])
        if "record" in s:
            return self.keys(
                dict(properties=s["record"].get("properties", s["record"]))
            )
        if "ref" in s or "resolveRef" in s:
            return self.see(s.get("ref") or s["resolveRef"])
        if "schema" in s:
            return self.shape(s["schema"])
        for plain in ("boolean", "number", "null"):
            if plain in s:
                return plain
        if {"string", "path", "pattern"} & set(s):
            return "string"
        return "any"

    def keys(self, o):
        keys = {}
        if not isinstance(o, dict):
            return "any"
        for parent in (
            o["super"]
            if isinstance(o.get("super"), list)
            else [o["super"]]
            if "super" in o
            else []
        ):
            base = self.shape(self.definitions[parent["resolveRef"]])
            if isinstance(base, dict):
                keys |= base.get("keys", {})
        keys |= {k: self.shape(v) for k, v in o.get("properties", {}).items()}
        return {"keys": keys} if keys else "any"

    def see(self, name):
        if UNUSED.search(name):
            return "any"
        if name not in self.shapes:
            self.shapes[name] = None  # a shape may contain itself
            self.shapes[name] = self.shape(self.definitions[name])
        return {"see": name}

    def formats(self, field):
        "Those of `FORMATS` for which an option is meant."

        def spelled(names):
            return {
                x
                for n in names
                for x in (spelled(self.aliases[n[1:]]) if n.startswith("$") else [n])
            }

        said = field.get("tags", {}).get("formats", [])
        no = spelled(n[1:] for n in said if n.startswith("!"))
        yes = spelled(n for n in said if not n.startswith("!"))
        return [f for f in FORMATS if f not in no and (not yes or f in yes)]

    def fields(self, files):
        """name -> shape; for each of `FORMATS` the names not meant for it; names meant
        for other formats alone."""
        keys, made = {}, {}
        for file in files:
            for field in self.read(file):
                meant = self.formats(field)
                if file.startswith("cell-") and not any(
                    c.startswith("document-")
                    for c in field.get("tags", {}).get("contexts", [])
                ):
                    continue
                for name in filter(None, (field["name"], field.get("alias"))):
                    shape = (
                        "any"
                        if UNUSED.search(name) or not meant
                        else self.shape(field["schema"])
                    )
                    keys[name] = (
                        either([keys[name], shape])
                        if name in keys and keys[name] != shape
                        else shape
                    )
                    made[name] = made.get(name, set()) | set(meant)
        other = sorted(n for n in made if not made[n])
        return (
            {n: s for n, s in keys.items() if n not in other},
            {
                f: sorted(n for n in made if made[n] and f not in made[n])
                for f in FORMATS
            },
            other,
        )


def either(shapes):
    flat = []
    for s in shapes:
        for a in s["either"] if isinstance(s, dict) and "either" in s else [s]:
            if a not in flat:
                flat.append(a)
    return "any" if "any" in flat else flat[0] if len(flat) == 1 else {"either": flat}


def main(clone, tag):
    q = Quarto(clone, tag)
    files = q.names("src/resources/schema")
    document, without, other = q.fields(
        f for f in files if re.match(r"(document|cell)-.*\.yml", f)
    )
    execute, *_ = q.fields(["document-execute.yml"])
    project, *_ = q.fields(["project.yml"])
    project.pop("type")  # refused at this level; it stands under `project`
    project["website"] = q.shape(q.definitions["base-website"])
    project["profile"] = q.shape(q.definitions["project-profile"])
    for name, path in UNLISTED.items():
        if f'"{name}"' not in q.text(path):
            raise SystemExit(
                f"{path} of {tag} knows no {name}: take it out of UNLISTED"
            )
        document[name] = "boolean"
    themes = [
        f[:-5]
        for f in q.names("src/resources/formats/html/bootstrap/themes")
        if f.endswith(".scss")
    ]
    facts = dict(
        quarto=tag.lstrip("v"),
        commit=git(clone, "rev-parse", f"{tag}^{{commit}}").strip(),
        project=project,
        document=document,
        execute=execute,
        without=without,
        other=other,
        themes=sorted([*themes, "brand", "default", "none", "pandoc"]),
        shapes=q.shapes,
    )
    print(
        json.dumps(facts, indent=None, separators=(",", ":"), sort_keys=True).replace(
            '},"', '},\n"'
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
