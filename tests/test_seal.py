"""What the project writes and later trusts holds what was written: one byte of another value at equal size is found, in
every file of every kind of cache and of a checkpoint; and all of it is on the disk before it has its name."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from finetune import bm25
from finetune.data import cached_store
from finetune.questions import ARRAYS, open_questions
from finetune.tasks import ENCODER_TASKS, TASKS, Source
from kozero import distributed, seal
from kozero.checkpoint import Checkpoints, RunState, content_damage
from kozero.data.hidden import HiddenStore
from kozero.errors import UserError
from pretrain.chunks import cut
from pretrain.corpus import Shard, build_shard, by_line, pieces_of, reading_key
from tests.helpers import sample_tokenizer
from tests.ranks import run_ranks
from tests.test_checkpoint import RUN, Steps, Weights

pytestmark = pytest.mark.usefixtures("one_rank")

QUESTIONS = {"data": [{"paragraphs": [{"context": "솔마루시는 내륙 도시이다.", "qas": [
    {"id": "1", "question": "어떤 도시인가?", "answers": [{"text": "내륙 도시", "answer_start": 6}]},
]}]}]}  # fmt: skip


def flip(path: Path, place: float = 0.5) -> None:
    """Another value of one byte of a file, as far in it as `place` says."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


# Caches --------------------------------------------------------------------------------------------------------------


def tokens(cache: Path) -> tuple[Path, list]:
    path = cache.parent / "reviews.txt"
    path.write_text("id\tdocument\tlabel\n1\t좋은 영화\t1\n2\t나쁜 영화\t0\n", encoding="utf-8")
    store = cached_store(Source(path), TASKS["nsmc"], "train", 0, sample_tokenizer(), str(cache), "before_prefix")
    return store.folder, [store.tokens.tolist(), store.rows.tolist(), store.all_marks.tolist()]


def questions(cache: Path) -> tuple[Path, list]:
    path = cache.parent / "questions.json"
    path.write_text(json.dumps(QUESTIONS), encoding="utf-8")
    store = open_questions(Source(path), ENCODER_TASKS["mrc"], 0, sample_tokenizer(), str(cache))
    return store.folder, [getattr(store, name).tolist() for name in ARRAYS]


def corpus(cache: Path) -> Shard:
    path = cache.parent / "corpus.txt"
    path.write_text("하나 둘.\n셋 넷 다섯.\n\n여섯 일곱.\n", encoding="utf-8")
    (piece,) = pieces_of(path)
    reading = reading_key(sample_tokenizer(), "line")
    return Shard.open(build_shard(piece, sample_tokenizer(), by_line, reading, cache))


def shards(cache: Path) -> tuple[Path, list]:
    shard = corpus(cache)
    return shard.folder, [shard.tokens.tolist(), shard.sentences.tolist(), shard.documents.tolist()]


def chunks(cache: Path) -> tuple[Path, list]:
    shard = corpus(cache)
    found = cut(shard, 9, 1)
    return cache / f"{shard.folder.name}-9", [found.units.tolist(), found.chunks.tolist(), found.num_train]


def frozen(cache: Path) -> tuple[Path, list]:
    store = HiddenStore(cache, np.array([2, 3]), 2, torch.float32)
    for shard in store.missing():
        store.make(shard, lambda numbers: ((n, torch.full((int(n) + 2, 2), float(n))) for n in numbers))
    return cache / "00000", [store.of(n).tolist() for n in range(2)]


def morphemes(cache: Path) -> tuple[Path, list]:
    found = list(bm25.morphemes(["좋은 영화", "나쁜"], cache))
    return next(path for path in cache.iterdir() if path.is_dir()), found


KINDS = {kind.__name__: kind for kind in (tokens, questions, shards, chunks, frozen, morphemes)}


@pytest.fixture
def words_by_kiwi(monkeypatch):
    """kiwipiepy's part takes a second: words are morphemes here."""
    tokenize = lambda texts: ([SimpleNamespace(form=word, tag="NNG") for word in text.split()] for text in texts)  # noqa: E731
    kiwi = SimpleNamespace(Kiwi=lambda num_workers: SimpleNamespace(tokenize=tokenize))
    monkeypatch.setitem(sys.modules, "kiwipiepy", kiwi)
    monkeypatch.setattr(bm25.metadata, "version", lambda name: "1")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_one_changed_byte_in_any_file_of_a_cache_is_told_once_and_mended(tmp_path, words_by_kiwi, capsys, kind):
    folder, wanted = kind(tmp_path / "cache")
    files = sorted(path.name for path in folder.iterdir())
    assert len(files) > 1
    capsys.readouterr()
    for name in files:
        for place in (0.0, 1.0):
            flip(folder / name, place)
            assert kind(tmp_path / "cache") == (folder, wanted)
            warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
            assert len(warnings) == 1 and str(folder) in warnings[0] and name in warnings[0]
    assert kind(tmp_path / "cache") == (folder, wanted)
    assert "warning" not in capsys.readouterr().out


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    made = Checkpoints(tmp_path, 2)
    made.save(Weights(), RunState(step=10, consumed_rows=80), RUN, False)
    return made


def test_one_changed_byte_in_any_file_of_a_checkpoint_names_the_file(checkpoints):
    folder = checkpoints.newest()
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["more.json", "rng-rank0.json", "state.json", "weights.safetensors"]
    for name in names:
        whole = (folder / name).read_bytes()
        for place in np.linspace(0, 1, 12):
            flip(folder / name, place)
            assert f"{name} is damaged" in content_damage(folder)
            (folder / name).write_bytes(whole)
    assert content_damage(folder) is None


STATES = {
    "of another step": ({"step": 20}, "step is 20"),
    "of a negative count": ({"consumed_rows": -1}, "consumed_rows is -1"),
    "of a best step to come": ({"best_step": 11}, "best_step 11"),
    "of an evaluation to come": ({"evaluated_step": 12}, "evaluated_step 12"),
    "of a count that is a truth": ({"skipped_steps": True}, "skipped_steps is True"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_state_that_no_run_writes_is_refused_even_where_its_hash_is_right(checkpoints, case):
    values, message = STATES[case]
    path = checkpoints.newest() / "state.json"
    saved = seal.read_sealed(path)
    seal.write_seal(path, saved | {"state": saved["state"] | values})
    with pytest.raises(UserError, match=message):
        checkpoints.to_resume(str(path.parent))


def test_a_pointer_that_is_damaged_does_not_cost_the_best_checkpoint(checkpoints):
    state = RunState(step=20, best_step=10)
    (checkpoints.folder / "best").write_text("step-000011")
    for state.step in (20, 30, 40):
        checkpoints.save(Weights(), state, RUN, False)
    assert [path.name for path in checkpoints.all()] == ["step-000010", "step-000030", "step-000040"]


def two_ranks(folder: Path) -> tuple[int, list[str | None]]:
    """How many files of a store that is there a rank reads to trust it, and what each rank hears of a checkpoint of
    which rank 1 alone sees one file damaged, file by file."""
    read, whole = [], seal.file_hash
    seal.file_hash = lambda path: read.append(path) or whole(path)
    tokens(folder / "cache")
    saved = Checkpoints(folder, 2)
    saved.save(Steps(), RunState(step=10), RUN, False)
    step, heard = saved.newest(), []
    for name in sorted(seal.read_sealed(step / "state.json")["files"]):
        seal.file_hash = lambda path, bad=name: "0" if path.name == bad and distributed.rank() == 1 else whole(path)
        heard.append(content_damage(step))
    return len(read), heard


def test_ranks_share_the_reading_and_what_one_sees_is_told_on_all(tmp_path):
    tokens(tmp_path / "cache")
    (first, heard), (other, heard_too) = run_ranks(two_ranks, tmp_path)
    assert (first, other) == (3, 0)
    assert heard == heard_too == [None, "rng-rank1.json is damaged: its SHA-256 is not that of what was written", None]


# On the disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch) -> list[tuple[str, str]]:
    """What is synced and renamed from now on, in its order."""
    done: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def synced(number: int) -> None:
        done.append(("sync", os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    def moved(how: Callable) -> Callable:
        def move(path: Path, target: Path) -> Path:
            done.extend([("sync", str(target))] if ("sync", str(path)) in done and path.is_file() else [])
            done.append(("name", str(target)))
            return how(path, target)

        return move

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", moved(rename))
    monkeypatch.setattr(Path, "replace", moved(replace))
    return done


def assert_on_disk(done: list[tuple[str, str]], final: Path, staging: Path) -> None:
    """Every file and folder was synced under its temporary name, then renamed, then the parent synced."""
    named = done.index(("name", str(final)))
    before = {path for what, path in done[:named] if what == "sync"}
    for path in (final, *final.rglob("*")):
        place = staging / path.relative_to(final)
        assert str(place) in before, place
    assert ("sync", str(final.parent)) in done[named:]


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, disk):
    made = Checkpoints(tmp_path / "run", 2)
    made.save(Weights(), RunState(step=10), RUN, False)
    assert_on_disk(disk, made.of(10), made.folder / "step-000010.incomplete")
    assert ("sync", str(tmp_path / "run")) in disk  # where its folder's name is


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_all_of_a_cache_is_on_the_disk_before_it_has_its_name(tmp_path, words_by_kiwi, disk, kind):
    folder, _ = kind(tmp_path / "cache")
    assert_on_disk(disk, folder, folder.with_name(f"{folder.name}.incomplete"))
