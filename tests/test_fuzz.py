"""Readers of what users and disks bring, on inputs that are damaged at random: only the documented errors come out.

KOZERO_FUZZ=2000 tries as many of each kind.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from finetune import train
from finetune.data import read
from finetune.tasks import ENCODER_TASKS, TASKS, Source
from kozero.checkpoint import Checkpoints, RunState, damage
from kozero.config import BatchSizes, TrainingArguments, parse_arguments
from kozero.data.documents import documents
from kozero.data.readers import LeftOut
from kozero.ds_config import resolve
from kozero.engines.plain import PlainEngine
from kozero.errors import UserError
from models.encoders import read_encoder_config
from models.language_model import load_config, read_config
from models.loading import load_any_config
from pretrain.corpus import pieces_of
from scripts.select_topic import SelectionArguments, topics
from scripts.study import Study
from tests.helpers import ROOT, SAMPLE_DATA, sample_tokenizer
from tests.toys import arguments, toy

TRIES = int(os.environ.get("KOZERO_FUZZ", 20))
FUZZ = settings(
    max_examples=TRIES, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@st.composite
def cut_and_flipped(draw: Callable, valid: bytes) -> bytes:
    """Bytes with some in the middle replaced by others, then cut short, perhaps; or no likeness at all."""
    start = draw(st.integers(0, len(valid)))
    end = draw(st.integers(start, min(len(valid), start + 40)))
    changed = valid[:start] + draw(st.binary(max_size=20)) + valid[end:]
    return changed[: draw(st.integers(0, len(changed)))] if draw(st.booleans()) else changed


@st.composite
def other_values(draw: Callable, valid: Any) -> bytes:
    """JSON of the same form with a value, or a key, somewhere in it replaced."""
    value = json.loads(json.dumps(valid))
    at = value
    while isinstance(at, dict | list) and at:
        key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], dict | list) or not at[key] or draw(st.integers(0, 3)) == 0:
            if isinstance(at, dict) and draw(st.integers(0, 4)) == 0:
                at[draw(st.text(max_size=8))] = at.pop(key)
            else:
                at[key] = draw(ANY_JSON)
            break
        at = at[key]
    return json.dumps(value).encode()


def damaged(valid: bytes) -> SearchStrategy[bytes]:
    """Damaged copies of the content of a file, JSON or other."""
    try:
        structured = other_values(json.loads(valid))
    except ValueError:
        structured = cut_and_flipped(valid)
    return st.one_of(structured, cut_and_flipped(valid), st.binary(max_size=200))


def try_all(path: Path, valid: bytes, reader: Callable[[], Any]) -> None:
    """The reader on damaged copies; what it reads, or a UserError of one line, are fine."""

    @FUZZ
    @given(damaged(valid))
    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        try:
            reader()
        except UserError as error:
            assert str(error).strip()

    attempt()


def small_json(path: Path, num: int = 3) -> bytes:
    """The first rows of a JSON file of the sample data."""
    value = json.loads(path.read_text())
    if isinstance(value, dict):
        value["data"] = value["data"][:1]
        value["data"][0]["paragraphs"] = value["data"][0]["paragraphs"][:1]
        return json.dumps(value).encode()
    return json.dumps(value[:num]).encode()


def first_lines(path: Path, num: int = 4) -> bytes:
    return b"".join(path.read_bytes().splitlines(keepends=True)[:num])


TASK_FILES = {
    "nsmc": (SAMPLE_DATA / "nsmc/ratings_train.txt", first_lines),
    "klue_nli": (SAMPLE_DATA / "klue_nli/klue-nli-v1.1_dev.json", small_json),
    "korquad": (SAMPLE_DATA / "korquad/KorQuAD_v1.0_dev.json", small_json),
    "essay": (SAMPLE_DATA / "essay/train.jsonl", first_lines),
}


@pytest.mark.parametrize("name", [*TASKS, *ENCODER_TASKS])
@pytest.mark.parametrize("skip", [False, True])
def test_task_files(tmp_path, name, skip):
    task = (TASKS | ENCODER_TASKS)[name]
    source, shorten = TASK_FILES.get(name, TASK_FILES["korquad"])
    path = tmp_path / source.name
    try_all(path, shorten(source), lambda: list(read(Source(path, skip_bad_rows=skip), task, LeftOut())))


@pytest.mark.parametrize(
    "source",
    [SAMPLE_DATA / "corpus/corpus.txt", *(path for path, _ in TASK_FILES.values())],
    ids=lambda path: path.name,
)
def test_files_that_topics_are_selected_from(tmp_path, source):
    path = tmp_path / source.name
    valid = small_json(source) if source.suffix == ".json" else first_lines(source)
    try_all(path, valid, lambda: list(documents(path, "document", Counter())))


def test_corpora(tmp_path):
    path = tmp_path / "corpus.txt"
    valid = first_lines(SAMPLE_DATA / "corpus/corpus.txt", 9)
    try_all(path, valid, lambda: [list(piece.documents()) for piece in pieces_of(path)])


CONFIGS = {
    "arguments": (ROOT / "finetune/recipes/quickstart.json", lambda path: parse(path)),
    "model": (ROOT / "models/tiny_config.json", read_config),
    "transformer": (
        ROOT / "models/transformer_tiny_config.json",
        lambda path: read_encoder_config(path, "transformer", sample_tokenizer()),
    ),
    "mix_lm": (
        ROOT / "models/mix_lm_tiny_config.json",
        lambda path: read_encoder_config(path, "mix_lm", sample_tokenizer()),
    ),
    "folder of a model": (ROOT / "models/tiny_config.json", lambda path: load_config(str(path.parent))),
    "folder of an encoder": (
        ROOT / "models/mix_lm_config.json",
        lambda path: load_any_config(str(path.parent), "--model"),
    ),
    "deepspeed": (ROOT / "ds_configs/zero3_offload.json", lambda path: resolved(path)),
    "study": (SAMPLE_DATA / "study.json", Study.read),
    "topics": (
        SAMPLE_DATA / "topics.json",
        lambda path: topics(SelectionArguments(files=["x"], topics_file=str(path))),
    ),
}


def topics_of(path: Path) -> None:
    topics(SelectionArguments(files=["x"], topics_file=str(path)))


def parse(path: Path) -> None:
    parse_arguments(*train.ARGUMENTS, prog="train.py", description="", argv=[str(path)])


def resolved(path: Path) -> None:
    said = replace(TrainingArguments(), deepspeed_config=str(path))
    resolve(said, BatchSizes(8, 1, 1))


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(tmp_path, name, monkeypatch):
    source, reader = CONFIGS[name]
    path = tmp_path / "config.json"
    monkeypatch.chdir(ROOT)
    try_all(path, source.read_bytes(), lambda: reader(path))


def test_deepspeed_itself_is_asked_in_vain(tmp_path, one_rank):
    from kozero.engines.deepspeed import check_config

    path = tmp_path / "config.json"

    def ask() -> None:
        said = replace(TrainingArguments(), deepspeed_config=str(path))
        check_config(resolve(said, BatchSizes(8, 1, 1)), str(path))

    try_all(path, (ROOT / "ds_configs/zero3_offload.json").read_bytes(), ask)


@pytest.fixture
def checkpoint(tmp_path, one_rank):
    """A checkpoint after one step, and the engine that it is of."""
    engine = PlainEngine(toy(), arguments("plain", optim="adamw"))
    checkpoints = Checkpoints(tmp_path / "run", 2)
    checkpoints.save(engine, RunState(step=1), {"seed": 1}, best=False)
    return checkpoints, engine


@pytest.mark.parametrize("name", ["rank0.safetensors", "loss_scale.json", "rng-rank0.json"])
def test_files_of_checkpoints(checkpoint, name, tmp_path):
    """Whose hash is right, as if someone had made them."""
    checkpoints, engine = checkpoint
    folder = checkpoints.newest()
    valid = (folder / name).read_bytes()
    try_all(folder / name, valid, lambda: checkpoints.load(folder, engine, {"seed": 1}))


def test_states_of_checkpoints(checkpoint):
    checkpoints, engine = checkpoint
    folder = checkpoints.newest()

    def look() -> None:
        found = damage(folder)
        assert found is None or found
        if checkpoints.to_resume("auto"):
            checkpoints.load(folder, engine, {"seed": 1})

    try_all(folder / "state.json", (folder / "state.json").read_bytes(), look)


@pytest.mark.parametrize("name", ["latest", "best"])
def test_pointers(checkpoint, name):
    checkpoints, _ = checkpoint
    outside = checkpoints.folder.parent / "step-000001"
    shutil.copytree(checkpoints.newest(), outside)
    path = checkpoints.folder / name

    def look() -> None:
        found = checkpoints.named(name)
        assert found is None or found.parent == checkpoints.folder

    try_all(path, b"../step-000001", look)


def test_what_a_name_in_a_file_holds_neither_breaks_the_line_nor_commands_a_terminal():
    assert str(UserError("no field 'a\n\x1b[2J\u2028\udc80가'")) == "no field 'a\\n\\x1b[2J\\u2028\\udc80가'"
