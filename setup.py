"Hands setuptools what `settings.ini` says: the one place where the project's metadata is written."

from configparser import ConfigParser
from setuptools import find_packages, setup

cfg = ConfigParser()
cfg.read("settings.ini", encoding="utf-8")
s = cfg["DEFAULT"]
train = s["train_requirements"].split()
setup(
    version=s["version"],
    description=s["description"],
    keywords=s["keywords"].split(),
    author=s["author"],
    author_email=s["author_email"],
    packages=find_packages(include=[s["lib_name"], s["lib_name"] + ".*"]),
    project_urls={
        "Documentation": s["doc_host"] + s["doc_baseurl"],
        "Source": s["git_url"],
        "Issues": s["git_url"] + "/issues",
        "Changelog": f"{s['git_url']}/blob/{s['branch']}/CHANGELOG.md",
    },
    install_requires=s["requirements"].split(),
    extras_require={
        "train": train,
        "data": train + s["data_requirements"].split(),
        "hub": s["hub_requirements"].split(),
        "cluster": train + s["cluster_requirements"].split(),
        "dev": train + s["dev_requirements"].split(),
    },
    entry_points={
        "console_scripts": s["console_scripts"].split(),
        "nbdev": [f"{s['lib_name']}={s['lib_name']}._modidx:d"],
    },
)
