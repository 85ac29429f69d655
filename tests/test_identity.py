"""What a cache is named by, and what a run and its resumption must have alike: each field changed alone changes the
name, or is refused. A field that is added later and in no table here fails."""

import inspect
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune import bm25, frozen, train, train_encoder
from finetune.arguments import ReadingArguments
from finetune.data import cached_store
from finetune.questions import open_questions
from finetune.tasks import ENCODER_TASKS, TASKS, Source
from kozero.data.batches import TrainingRows
from kozero.pause import Pauses
from pretrain import run as pretraining
from pretrain.arguments import CorpusArguments, PretrainingArguments, ShardingArguments
from pretrain.chunks import cut
from pretrain.corpus import HubPiece, Piece, Shard, build_shard, by_line, pieces_of, reading_key
from tests.helpers import ROOT, SAMPLE_DATA, export_paused, numbered_store, sample_tokenizer, word_tokenizer
from tests.test_seal import QUESTIONS

pytestmark = pytest.mark.usefixtures("one_rank")


def reviews(path: Path, word: str = "영화", num: int = 30) -> Path:
    lines = [f"{k}\t좋은 {word} {k}\t{k % 2}" for k in range(num)]
    path.write_text("\n".join(["id\tdocument\tlabel", *lines]), encoding="utf-8")
    return path


def ended_by(token: str) -> Any:
    """The words' tokenizer, whose texts end in a token."""
    tokenizer = word_tokenizer(3)
    tokenizer.eos_token = token
    return tokenizer


def all_differ(names: dict[str, Any]) -> None:
    """Names of caches, by what was changed."""
    same = [(a, b) for a in names for b in names if a < b and names[a] == names[b]]
    assert same == []


# Caches --------------------------------------------------------------------------------------------------------------


def changed_sources(path: Path, hub: Path) -> dict[str, Source]:
    """A source with each field changed alone. `side` decides whether `validation_fraction` counts."""
    base = Source(path, side="train", validation_fraction=0.3)
    found = {
        "path": replace(base, path=reviews(path.with_name("other.txt"), "극장")),
        "hub": Source(hub=(str(hub), None, "train"), side="train", validation_fraction=0.3),
        "skip_bad_rows": replace(base, skip_bad_rows=True),
        "side": replace(base, side="validation"),
        "validation_fraction": replace(base, validation_fraction=0.6),
    }
    assert found.keys() == {field.name for field in fields(Source)}
    return {"nothing": base} | found


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder that stands for a data set of the hub, whose version is what its one file says."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/rows").write_text("영화")

    def rows(name: str, config: str | None, split: str) -> Any:
        word = (Path(name) / "rows").read_text()
        found = [{"id": f"{k}", "document": f"{word} {k}", "label": k % 2} for k in range(30)]
        return type("Rows", (list,), {"_fingerprint": word})(found)

    monkeypatch.setattr("kozero.data.readers.hub_rows", rows)
    monkeypatch.setattr("finetune.data.hub_rows", rows)
    return tmp_path / "hub"


def test_every_field_of_a_token_stores_identity_names_another_store(tmp_path, hub):
    told = {"task": TASKS["nsmc"], "kind": "train", "limit": 0, "tokenizer": word_tokenizer(3), "placement": "append"}
    others = {"task": KIND, "kind": "choices", "limit": 5, "tokenizer": ended_by("w1"), "placement": "before_prefix"}
    known = inspect.signature(cached_store).parameters.keys() - {"source", "cache_dir"}  # where is no part of what
    assert told.keys() == others.keys() == known

    def name(source: Source, **changed: Any) -> str:
        return cached_store(source, cache_dir=str(tmp_path / "cache"), **told | changed).folder.name

    sources = changed_sources(reviews(tmp_path / "a.txt"), hub)
    names = {key: name(source) for key, source in sources.items()}
    names |= {key: name(sources["nothing"], **{key: value}) for key, value in others.items()}
    names["vocabulary"] = name(sources["nothing"], tokenizer=word_tokenizer(4))
    (hub / "rows").write_text("극장")
    names["version of the hub"] = name(sources["hub"])
    all_differ(names)


class Kind(type(TASKS["nsmc"])):
    """A task of the same files."""

    name = "kind"


KIND = Kind()


def test_every_field_of_a_question_stores_identity_names_another_store(tmp_path):
    known = inspect.signature(open_questions).parameters.keys() - {"source", "cache_dir"}
    assert known == {"task", "limit", "tokenizer"}  # tasks differ in what they make of the questions, not in reading

    def name(source: Source, limit: int = 0, tokenizer: Any = sample_tokenizer()) -> str:  # noqa: B008
        return open_questions(source, ENCODER_TASKS["mrc"], limit, tokenizer, str(tmp_path / "cache")).folder.name

    article = QUESTIONS["data"][0] | {"title": "a"}
    paths = [tmp_path / f"{k}.json" for k in range(2)]
    for k, path in enumerate(paths):
        articles = [article | {"title": f"{k}{n}"} for n in range(20)]
        path.write_text(json.dumps({"data": articles}), encoding="utf-8")
    base = Source(paths[0], side="train", validation_fraction=0.3)
    names = {
        "nothing": name(base), "path": name(replace(base, path=paths[1])),
        "side": name(replace(base, side="validation")),
        "skip_bad_rows": name(replace(base, skip_bad_rows=True)), "limit": name(base, limit=2),
        "validation_fraction": name(replace(base, validation_fraction=0.6)),
        "tokenizer": name(base, tokenizer=word_tokenizer(4)),
    }  # fmt: skip
    all_differ(names)


def test_every_field_of_a_corpus_identity_names_another_shard(tmp_path):
    def shard(text: str, tokenizer: Any, sentences: str = "line") -> Path:
        path = tmp_path / "corpus.txt"
        path.write_text(text, encoding="utf-8")
        (piece,) = pieces_of(path)
        return build_shard(piece, tokenizer, by_line, reading_key(tokenizer, sentences), tmp_path / "cache")

    first = shard("w1 w2\n\nw0\n", word_tokenizer(3))
    names = {
        "nothing": first, "text": shard("w1 w1\n\nw0\n", word_tokenizer(3)),
        "tokenizer": shard("w1 w2\n\nw0\n", word_tokenizer(4)),
        "sentences": shard("w1 w2\n\nw0\n", word_tokenizer(3), "other"),
    }  # fmt: skip
    for room in (1, 2):
        cut(Shard.open(first), room, 0)
        names[f"room {room}"] = tmp_path / "cache" / f"{first.name}-{room}"
        assert names[f"room {room}"].is_dir()
    all_differ(names)


def test_every_field_of_a_piece_is_in_its_content(tmp_path):
    rows = SimpleNamespace(_fingerprint="a")
    base, others = HubPiece(rows, "text", 0, 5), {"rows": SimpleNamespace(_fingerprint="b"), "column": "t", "end": 6}
    others |= {"start": 1}
    assert others.keys() == {field.name for field in fields(HubPiece)}
    all_differ({"": base.content()} | {key: replace(base, **{key: value}).content() for key, value in others.items()})
    (tmp_path / "a").write_text("abcdef")
    (tmp_path / "b").write_text("ghijkl")
    piece, others = Piece(tmp_path / "a", 1, 3), {"path": tmp_path / "b", "start": 2, "end": 4}
    assert others.keys() == {field.name for field in fields(Piece)}
    all_differ({"": piece.content()} | {key: replace(piece, **{key: value}).content() for key, value in others.items()})


def test_every_field_of_pauses_names_other_outputs_of_frozen_layers():
    """`seed` is that of random places, which --cache_frozen refuses; `inside` follows from the tokenizer."""
    store = numbered_store(20)
    store.folder = Path("a")
    base, others = Pauses(7, 1), {"token_id": 8, "num": 2, "placement": "prepend"}
    assert others.keys() | {"seed", "inside"} == {field.name for field in fields(Pauses)}
    pauses = {"": base} | {key: replace(base, **{key: value}) for key, value in others.items()}
    all_differ({key: str(frozen.version(TrainingRows(store, p, 16, "grouped", seed=0))) for key, p in pauses.items()})


def test_morphemes_are_named_by_their_texts_and_by_who_finds_them(tmp_path, monkeypatch):
    asked = []

    def folder(cache: Path, key: str, write: Callable) -> Path:
        asked.append(key)
        (tmp_path / bm25.NAME).touch()
        return tmp_path

    monkeypatch.setattr(bm25, "build_once", folder)
    for texts, version, content in ((["a"], "1", ("N",)), (["b"], "1", ("N",)), (["a"], "2", ("N",)), (["a"], "1", ())):
        monkeypatch.setattr(bm25.metadata, "version", lambda name, version=version: version)
        monkeypatch.setattr(bm25, "CONTENT", content)
        list(bm25.morphemes(texts, tmp_path))
    assert len(set(asked)) == len(asked) == 4


# Runs ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """An entry point: `main`, the module that makes its Trainer, its arguments, a run of it; what must be the same in
    its resumption, each with a change of it; and what may change, of which a resumed run tells."""

    main: Callable[[], None]
    module: Any
    arguments: tuple[type, ...]
    base: str
    same: dict[str, str]
    free: str


OF_ANY_RUN = (
    "output_dir deepspeed_config per_device_eval_batch_size num_train_epochs max_steps learning_rate "
    "scheduler_num_steps lr_scheduler_type warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
    "gradient_checkpointing torch_compile logging_steps eval_steps save_steps save_total_limit async_save nonfinite "
    "max_nonfinite spike_sigmas early_stopping_patience resume timeout_seconds local_rank dropout cache_dir "
    "max_eval_samples "
)
SHARED = {
    "seed": "--seed 1", "optim": "--optim sgd", "bf16": "--bf16", "fp16": "--fp16",
    "per_device_train_batch_size": "--train_batch_size 4", "gradient_accumulation_steps":
    "--gradient_accumulation_steps 2", "max_seq_length": "--max_seq_length 112",
}  # fmt: skip
DATA = {
    "train_file": "--train_file {}/other", "bad_rows": "--bad_rows skip", "max_train_samples": "--max_train_samples 9",
    "validation_fraction": "--validation_fraction 0.5",
    "tokenizer_name_or_path": "--tokenizer_name_or_path {}/tokenizer",
}  # fmt: skip
READING = [field.name for field in fields(ReadingArguments)]

ENTRIES = {
    "a language model": Entry(
        train.main, train, train.ARGUMENTS,
        "--task nsmc --train_file {}/reviews.txt --num_pauses 1 --config_file {}/gpt2.json --output_dir {}/run "
        "--freeze wte,wpe,h.0,pause",
        {
            **SHARED, **DATA, "train_file": "--train_file {}/other.txt",
            "task": "--task essay --train_file {}/essay.jsonl --num_pauses 0 --freeze wte",
            "batching": "--batching grouped", "freeze": "--freeze wte,wpe,pause", "num_pauses": "--num_pauses 2",
            "pause_placement": "--pause_placement prepend", "pause_schedule": "--pause_schedule sampled",
            "pause_token": "--pause_token <unused1>", "cache_frozen": "--cache_frozen",
            "config_file": "--config_file {}/gpt2-heads.json",
        },
        # A checkpoint has the weights, and frozen ones are compared. from_hub: see the stores.
        OF_ANY_RUN + "validation_file num_inference_pauses train_mode model_name_or_path from_hub " + " ".join(READING),
    ),
    "an encoder": Entry(
        train.main, train_encoder, train.ARGUMENTS,
        "--task mrc --train_file {}/questions.json --config_file {}/transformer.json --output_dir {}/run "
        "--validation_fraction 0.3",
        {
            **SHARED, **DATA, "train_file": "--train_file {}/other.json", "task": "--task ict",
            "doc_stride": "--doc_stride 16", "max_query_length": "--max_query_length 16",
            "config_file": "--config_file {}/transformer-heads.json",
        },
        OF_ANY_RUN + "validation_file train_mode model_name_or_path from_hub batching n_best_size max_answer_length "
        "num_inference_pauses pause_token num_pauses pause_placement pause_schedule freeze cache_frozen",
    ),
    "a language model that ranks the places of its pauses": Entry(
        train.main, train, (),
        "--task nsmc --train_file {}/reviews.txt --num_pauses 1 --model_name_or_path {}/model --output_dir {}/run "
        "--pause_placement least_confident",
        {"model_name_or_path": "--model_name_or_path {}/again"},
        "",
    ),
    "pre-training": Entry(
        lambda: pretraining.main("train"), pretraining, (PretrainingArguments, CorpusArguments, ShardingArguments),
        "--model_name run --output_dir {} --train_batch_size 2 --config_file {}/transformer.json "
        "--corpus_path {}/c.txt --validation_fraction 0.2 --num_steps 1 --task mlm",
        {
            **SHARED, "task": "--task mlm_ict", "max_steps_per_epoch": "--max_steps_per_epoch 7",
            "whole_word_mask": "--whole_word_mask", "mask_share": "--mask_share 0.2",
            "validation_fraction": "--validation_fraction 0.4", "corpus_path": "--corpus_path {}/d.txt",
            "tokenizer_name_or_path": "--tokenizer_name_or_path {}/tokenizer", "sentences": "--sentences kiwi",
            "config_file": "--config_file {}/transformer-heads.json",
            "model": "--model mix_lm --config_file models/mix_lm_tiny_config.json",
        },
        # Those with pauses: see below. How train_zero_two.py shards, a run may change; a hub's names: see the pieces.
        OF_ANY_RUN + "model_name checkpoint nproc corpus_hub text_column hub_split pause_fraction pause_placement "
        "pause_token zero3 auto_wrap sharding",
    ),
    "pre-training with pauses": Entry(
        lambda: pretraining.main("train"), pretraining, (),
        "--model_name run --output_dir {} --train_batch_size 2 --config_file {}/gpt2.json --corpus_path {}/c.txt "
        "--num_steps 1 --model causal_lm --pause_fraction 0.1",
        {"pause_fraction": "--pause_fraction 0.2", "pause_token": "--pause_token <unused1>"},
        "",  # pause_placement has one choice
    ),
}  # fmt: skip


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES.values() if entry.arguments], ids=lambda e: e.base[:20])
def test_every_argument_is_the_same_in_a_resumed_run_or_may_change(entry):
    free, names = entry.free.split(), {field.name for kind in entry.arguments for field in fields(kind)}
    assert not set(free) & entry.same.keys()
    assert names - set(free) - entry.same.keys() == set(), "say of each whether a resumed run may change it"
    assert set(free) | entry.same.keys() <= names


class Resumed(Exception):
    """What must be the same."""


def key_of_run(monkeypatch, entry: Entry, folder: Path, changed: str = "") -> dict[str, Any]:
    """The resume key of a run that goes no further."""

    def stop(engine, rows, training, sizes, evaluate, best_score, same, *more, **named):
        raise Resumed(same)

    words = f"{entry.base} --cache_dir {{}}/cache {changed}".replace("{}", str(folder)).split()
    monkeypatch.setattr(sys, "argv", ["prog", *words])
    monkeypatch.setattr(entry.module, "Trainer", stop)
    monkeypatch.setattr(entry.module, "rehearse", lambda *told: None)
    with pytest.raises(Resumed) as stopped:
        entry.main()
    return stopped.value.args[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """What the runs read."""
    folder = tmp_path_factory.mktemp("files")
    reviews(folder / "reviews.txt")
    reviews(folder / "other.txt", "극장")
    (folder / "essay.jsonl").write_bytes((SAMPLE_DATA / "essay/train.jsonl").read_bytes())
    for name, word in (("questions", "가"), ("other", "나")):
        article = json.dumps(QUESTIONS["data"][0])
        articles = [json.loads(article.replace('"id": "', f'"id": "{n}-')) | {"title": f"{word}{n}"} for n in range(20)]
        (folder / f"{name}.json").write_text(json.dumps({"data": articles}), encoding="utf-8")
    for name, word in (("c", "영화"), ("d", "극장")):
        text = "".join(f"좋은 {word} {k}.\n나쁜 {word} {k}.\n\n" for k in range(60))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    export_paused(folder / "model", ROOT / "models/tiny_config.json")
    shutil.copytree(folder / "model", folder / "again")
    small = {"hidden_size": 32, "ff_dim": 32, "num_hidden_layers": 1, "num_heads": 2, "max_position_embeddings": 512}
    for name, shipped, sizes, heads in (
        ("gpt2", "tiny", {"n_embd": 32, "n_inner": 32}, {"n_head": 4}),
        ("transformer", "transformer_tiny", small, {"num_heads": 4}),
    ):
        values = json.loads((ROOT / f"models/{shipped}_config.json").read_text()) | sizes
        (folder / f"{name}.json").write_text(json.dumps(values))
        (folder / f"{name}-heads.json").write_text(json.dumps(values | heads))
    tokenizer = sample_tokenizer()
    before = tokenizer.eos_token
    tokenizer.save_pretrained(folder / "tokenizer")
    path = folder / "tokenizer/tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}
    path.write_text(json.dumps(values), encoding="utf-8")
    assert tokenizer.eos_token == before
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ENTRIES)
def test_each_argument_that_must_be_the_same_is_known_to_a_resumed_run(monkeypatch, files, name):
    entry = ENTRIES[name]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("pretrain.corpus.by_kiwi", lambda: by_line)
    first = key_of_run(monkeypatch, entry, files)
    assert key_of_run(monkeypatch, entry, files) == first
    unseen = [key for key, flags in entry.same.items() if key_of_run(monkeypatch, entry, files, flags) == first]
    assert unseen == []
