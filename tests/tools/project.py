"Where the project lies, and what settings.ini says of it."

from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT / "nbs"


def settings():
    cfg = ConfigParser()
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


def git_url():
    return f"https://github.com/{settings()['user']}/{settings()['repo']}"
