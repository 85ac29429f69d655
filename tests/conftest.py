"""What every test shares: no network, few threads."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def one_rank(monkeypatch):
    """A process group of this process alone; what a run does to leave it does nothing."""
    import torch  # here: after the settings above

    from kozero import distributed

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    distributed.setup()
    monkeypatch.setattr(distributed, "shutdown", lambda: None)
    yield
    monkeypatch.undo()
    distributed.shutdown()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def paused_model(tmp_path_factory):
    """An exported model that pauses 3 times."""
    import torch

    from models.language_model import export, load
    from tests.helpers import ROOT, SAMPLE_DATA

    out = tmp_path_factory.mktemp("paused") / "model"
    tokenizer = str(SAMPLE_DATA / "tokenizer")
    model = load(
        None, str(ROOT / "models/tiny_config.json"), tokenizer, pause_token="<unused0>", with_pauses=True, seed=1
    )
    with torch.no_grad():  # a random model that says something else after other prompts
        for parameter in model.module.parameters():
            parameter.mul_(4)
    settings = {"token": "<unused0>", "token_id": model.pause_id, "placement": "append"}
    settings |= {"num_pauses": 3, "num_inference_pauses": 3}
    export(out, model, dict(model.module.named_parameters()), settings, "# card")
    return str(out)
