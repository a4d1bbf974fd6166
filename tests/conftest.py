import pytest


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    "A cache of its own in place of the user's."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
