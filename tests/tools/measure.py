"""What running each chapter costs: processor time and peak memory, into tests/tools/costs.json; `make sync` writes them under
the titles.

    python tests/tools/measure.py [NAME...]    # such as 05_las; without a name all of them"""

import json, os, platform, resource, subprocess, sys, tempfile
from pathlib import Path
import pages

FILE = Path(__file__).with_name("costs.json")


def measured(path):
    "Run one page in processes of their own."
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--alone", str(path), folder]
        said = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(said.stdout.splitlines()[-1])


def alone(path, folder):
    "Run a page as Jupyter does, and print what it cost."
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--execute"]
    command += ["--to", "notebook", "--output-dir", folder, path]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(path).parent)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    print(
        json.dumps(
            dict(
                cpu_seconds=round(used.ru_utime + used.ru_stime),
                peak_mib=round(used.ru_maxrss * unit / 2**20),
            )
        )
    )


def main():
    record = json.loads(FILE.read_text()) if FILE.exists() else {}
    names = sys.argv[1:] or [p.stem for p in pages.chapters()]
    for name in names:
        found = measured(pages.NBS / f"{name}.ipynb")
        record[name] = found | dict(
            machine=f"{platform.machine()}, {os.cpu_count()} cores"
        )
        FILE.write_text(json.dumps(dict(sorted(record.items())), indent=1) + "\n")
        print(name, record[name], flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        alone(*sys.argv[2:])
    else:
        main()
