"""The folder of `examples`, made once, and a copy of it for each test that asks, which runs in it."""
import shutil

import examples
import pytest


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    examples.make(folder)
    return folder


@pytest.fixture
def there(made, tmp_path, monkeypatch):
    """A copy of its own to work in: the current folder."""
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder
