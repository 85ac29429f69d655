"""Small models, stores and tokenizers that several tests use."""

import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from kozero.data.store import TokenStore
from kozero.errors import UserError
from models.language_model import export, load, load_tokenizer

ROOT = Path(__file__).parents[1]
SAMPLE_DATA = ROOT / "sample_data"
SAMPLE_TOKENIZER = SAMPLE_DATA / "tokenizer"


def interruptible() -> None:
    """For a new process: what a shell does for a job in the foreground; this one may be in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, by its path there, but the lock of a run."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@contextmanager
def refused(*words: object, untouched: Path | None = None, kind: type[Exception] = UserError) -> Iterator[None]:
    """What is done inside is refused in one line with all of these words, and a folder is left as it was."""
    before = contents(untouched) if untouched else {}
    with pytest.raises(kind) as caught:
        yield
    missing = [word for word in map(str, words) if word not in str(caught.value)]
    assert not missing and "\n" not in str(caught.value), str(caught.value)
    assert not untouched or contents(untouched) == before


def gpt2_configs() -> list[Path]:
    """The shipped configs of language models."""
    paths = sorted((ROOT / "models").glob("*_config.json"))
    return [path for path in paths if json.loads(path.read_text())["model_type"] == "gpt2"]


class MemoryStore(TokenStore):
    """A TokenStore of given ids: rows of (context, prompt, target) or (context, prompt, target, span), and the marks
    of each row."""

    def __init__(self, rows: Sequence[tuple], marks: Sequence[Sequence[int]] = ()) -> None:
        marks = marks or [[]] * len(rows)
        places, tokens = [], []
        for context, prompt, target, *span in rows:
            start = len(tokens)
            tokens += [*context, *prompt, *target]
            ends = np.cumsum([start, len(context), len(prompt), len(target)]).tolist()
            marks_end = sum(map(len, marks[: len(places) + 1]))
            span = list(span[0] if span else (-1, -1))
            places.append([*ends, *span, marks_end - len(marks[len(places)]), marks_end])
        self.rows = np.asarray(places, dtype=np.int64).reshape(-1, 8)
        self.all_marks = np.array([place for row in marks for place in row], dtype=np.int32)
        self.tokens = np.asarray(tokens, dtype=np.uint16)


def numbered_store(num: int, shortest: int = 2, longest: int = 9, vocab: int = 60, seed: int = 0) -> MemoryStore:
    """Examples of random lengths and ids: a prompt of one token and a target."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest, num, endpoint=True)
    return MemoryStore([([], rng.integers(1, vocab, 1), rng.integers(1, vocab, n - 1)) for n in lengths])


def toy_gpt2(num_layers: int = 2, vocab_size: int = 64, hidden: int = 32, positions: int = 64) -> GPT2LMHeadModel:
    """A small GPT-2 without dropout, its weights large enough that every token changes what follows."""
    config = GPT2Config(
        n_layer=num_layers, n_embd=hidden, n_head=2, vocab_size=vocab_size, n_positions=positions,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config)


def export_paused(folder: Path, config: Path) -> str:
    """Export a model with random weights and the sample tokenizer that pauses 3 times."""
    model = load(None, str(config), str(SAMPLE_TOKENIZER), pause_token="<unused0>", with_pauses=True, seed=1)
    with torch.no_grad():  # it says something else after other prompts
        for parameter in model.module.parameters():
            parameter.mul_(4)
    settings = {"token": "<unused0>", "token_id": model.pause_id, "placement": "append"}
    settings |= {"num_pauses": 3, "num_inference_pauses": 3}
    export(folder, model, dict(model.module.named_parameters()), settings, "# card")
    return str(folder)


@cache
def sample_tokenizer() -> PreTrainedTokenizerFast:
    """The shipped tokenizer; not to be changed by a test."""
    return load_tokenizer(str(SAMPLE_TOKENIZER))


def word_tokenizer(num_words: int, specials: Sequence[str] = ("<unk>", "</s>", "<pad>")) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words w0, w1, ... without spare tokens."""
    vocabulary = {word: k for k, word in enumerate([*specials, *(f"w{n}" for n in range(num_words))])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    roles = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    known = {role: token for role, token in roles.items() if token in vocabulary}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **known)
