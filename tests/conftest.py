"""What every test shares: no network, few threads."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """A file's tests stay in one process, which makes their fixtures once; slow ones go wherever there is time."""
    for item in items:
        if not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.xdist_group(item.path.name))


RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def environment():
    """What a test, a fixture of its file or what they call leaves in the environment is not there for the next one, nor
    for what that starts: a run in this process sets LOCAL_RANK, by which transformers' Trainer looks for more ranks."""
    for name in RANKS:
        os.environ.pop(name, None)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def one_rank(monkeypatch):
    """A process group of this process alone; what a run does to leave it does nothing."""
    import torch  # here: after the settings above

    from kozero import distributed

    threads = torch.get_num_threads()
    distributed.shutdown()  # of a run that ended with a mistake
    distributed.setup()
    monkeypatch.setattr(distributed, "shutdown", lambda: None)
    yield
    monkeypatch.undo()
    distributed.shutdown()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def paused_model(tmp_path_factory):
    """An exported model that pauses 3 times."""
    from tests.helpers import ROOT, export_paused

    return export_paused(tmp_path_factory.mktemp("paused") / "model", ROOT / "models/tiny_config.json")
