"The first cell: how a page installs the library where it is opened by a click, in Colab or Kaggle."

from project import ROOT, git_url, settings


def address(path):
    "Where a notebook opens in Colab."
    s = settings()
    return f"https://colab.research.google.com/github/{s['user']}/{s['repo']}/blob/{s['branch']}/{path.relative_to(ROOT).as_posix()}"


def kaggle(path):
    "Where a notebook opens in Kaggle."
    file = (
        f"{git_url()}/blob/{settings()['branch']}/{path.relative_to(ROOT).as_posix()}"
    )
    return f"https://kaggle.com/kernels/welcome?src={file}"


def install():
    """What the hidden first cell runs in Colab and Kaggle, and nowhere else: this
    version from PyPI, else the repository; and the results beside it."""
    s = settings()
    package, url, tag = f"{s['lib_name']}[train]", git_url(), s["branch"]
    return (
        f'! ([ -e /content ] || [ -e /kaggle ]) && (pip install -Uqq "{package}=={s["version"]}" 2>/dev/null || pip install -Uqq "{package} @ git+{url}@{tag}") '
        f"&& git clone -q --depth 1 -b {tag} {url} book && ln -sfn book/nbs/* ."
    )
