"""Kill a run before and after what it does to files, and at every step; each time let it go on, and compare the weights.

A program of its own, so that processes can be forked from a parent that has loaded everything and run nothing.
Argument: a folder to work in. Prints one line per death; exits 1 when one of them made a difference."""

import os, shutil, signal, sys
from pathlib import Path

# loaded once, for all children
import accelerate, matplotlib.figure, safetensors.torch, torch, torchvision.datasets, tqdm
import tiny_mnist
from las_nb import train

work = Path(sys.argv[1])
root = tiny_mnist.real()
if not root:
    root = work / "data"
    torchvision.datasets.MNIST.resources = tiny_mnist.files(root / "MNIST" / "raw")
# two steps per epoch
small = dict(dim=8, depth=1, n_heads=2, epochs=2, batch_size=3, limit=5, dropout=0.2)


def watched(function, label, seen, die):
    def call(*args, **kw):
        for when in ("before", "after"):
            if when == "after":
                result = function(*args, **kw)
            seen.append(f"{when} {label}")
            if len(seen) == die:
                os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


def watch(seen, die):
    for owner, name in (
        (os, "replace"),
        (os, "fsync"),
        (shutil, "rmtree"),
        (Path, "mkdir"),
        (Path, "unlink"),
        (train.Trainer, "learn"),
        (train.Trainer, "evaluate"),
    ):
        setattr(owner, name, watched(getattr(owner, name), name, seen, die))


def child(out, die=None, log=None):
    "Run in a process of its own; how it ended."
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        torch.set_num_threads(1)
        seen = []
        if die is not None:
            watch(seen, die)
        train.train(
            "smnist",
            out,
            resume=True,
            options=dict(root=root, cpu=True, progress=False, save_minutes=0),
            **small,
        )
        if log:
            log.write_text("\n".join(seen))
        os._exit(0)
    except BaseException as e:
        print(type(e).__name__, e, flush=True)
        os._exit(1)


assert child(work / "whole") == 0
# nobody dies: how much is there to die at?
assert child(work / "counted", die=-1, log=work / "log") == 0
points = (work / "log").read_text().split("\n")
weights = (work / "whole" / "model.safetensors").read_bytes()
steps = [i for i, p in enumerate(points) if p == "after learn"]
test = max(i for i, p in enumerate(points) if p == "after evaluate")
chosen = {
    *range(steps[1], steps[2], 5),
    *range(test, len(points), 4),
    *(i for i, p in enumerate(points) if p.endswith(("learn", "evaluate"))),
}
failed = 0
for n in sorted(chosen):
    out = work / f"die-{n}"
    died, resumed = child(out, die=n + 1), child(out)
    same = resumed == 0 and (out / "model.safetensors").read_bytes() == weights
    left = [
        p.name
        for p in out.iterdir()
        if p.name.startswith(".")
        and p.name != ".lock"
        or p.name.startswith("checkpoint")
    ]
    good = died == -signal.SIGKILL and same and not left
    print(
        f"{n:4d} {points[n]:18s} "
        f"{'same' if good else f'DIFFERENT: died {died}, resumed {resumed}, left {left}'}",
        flush=True,
    )
    failed += not good
    shutil.rmtree(out)
print(f"{len(chosen)} deaths of {len(points)} possible, {failed} made a difference")
sys.exit(failed > 0)
