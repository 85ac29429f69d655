"""Token stores: the ids in them, the cache around them."""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFKD
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from finetune.arguments import DataArguments
from finetune.data import cached_store, evaluation_set
from finetune.tasks import TASKS, Source
from kozero import distributed
from kozero.data.readers import LeftOut
from kozero.data.store import (
    TextRow,
    build_once,
    encodings,
    key_of,
    open_or_build,
    seal,
    token_span,
    tokenizer_hash,
)
from kozero.errors import UserError
from kozero.files import file_hash
from kozero.seal import damage
from models.language_model import load_tokenizer
from tests.helpers import SAMPLE_DATA, SAMPLE_TOKENIZER, refused, sample_tokenizer, word_tokenizer

REVIEW = TextRow("", "부정", "아 더빙.. 진짜 짜증나네요 목소리")
QUESTION = TextRow("문맥: 솔마루시는 내륙 도시이다.", "질문: 어떤 도시인가? 정답:", "내륙 도시", span=(10, 15))


def build(cache, rows, tokenizer=None, key="key"):
    return open_or_build(cache, key, lambda: rows, tokenizer or sample_tokenizer())


def parts(store, number: int) -> list[list[int]]:
    """Ids of context, prompt and target of a row."""
    places = store.rows[number, :4].tolist()
    return [store.tokens[a:b].tolist() for a, b in pairwise(places)]


def whole(store, number: int) -> list[int]:
    """All ids of a row."""
    return [token for part in parts(store, number) for token in part]


def test_the_parts_of_a_row_are_context_prompt_and_target_with_its_end(tmp_path):
    tokenizer = sample_tokenizer()
    context, prompt, target = parts(build(tmp_path, [REVIEW, QUESTION]), 1)
    assert tokenizer.decode(context) == QUESTION.context
    assert tokenizer.decode(prompt).strip() == QUESTION.prompt
    assert tokenizer.decode(target[:-1]).strip() == QUESTION.target
    assert target[-1] == tokenizer.eos_token_id


def test_an_empty_part_has_no_tokens(tmp_path):
    context, prompt, target = parts(build(tmp_path, [TextRow("", "부정", "")]), 0)
    assert context == []
    assert sample_tokenizer().convert_ids_to_tokens(prompt) == ["▁부정"]
    assert target == [sample_tokenizer().eos_token_id]


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_pieces_encoded_apart_are_the_ids_of_the_joined_text(tmp_path, task):
    """Over the whole sample file: a model meets the same tokens as in plain text."""
    tokenizer = sample_tokenizer()
    examples = task.examples(Source(SAMPLE_DATA / task.sample_files[0]), LeftOut())
    rows = [TextRow(e.context, *task.training_pair(e)) for e in examples]
    store = build(tmp_path, rows)
    assert len(store) == len(rows) > 100
    for number, row in enumerate(rows):
        joined = " ".join(filter(None, (row.context, row.prompt, row.target)))
        ids = tokenizer(joined, add_special_tokens=False)["input_ids"]
        assert whole(store, number) == [*ids, tokenizer.eos_token_id]


@pytest.mark.parametrize("context", ["문맥: 도시이다.", ""])
def test_pieces_are_those_of_the_joined_text_without_a_space_of_the_tokenizers_own(tmp_path, context):
    """GPT-2's own tokenizer puts none before a text; generation encodes a prompt plainly, so training must too."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(special_tokens=["</s>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(["부정 긍정 아 더빙.. 진짜 문맥: 도시이다."] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    joined = f"{context} 부정 아 더빙".strip()
    ids = tokenizer(joined, add_special_tokens=False)["input_ids"]
    assert whole(build(tmp_path, [TextRow(context, "부정", "아 더빙")], tokenizer), 0)[:-1] == ids


def test_a_text_that_spells_a_special_token_is_plain_text(tmp_path):
    """Written by a user, `</s>` must not end the text, nor `<unused0>` be a pause, whose loss would be infinite."""
    tokenizer = sample_tokenizer()
    store = build(tmp_path, [TextRow("<s> 문맥", "<pad> 질문", "</s> 좋아요 <unused0>")])
    specials = {tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "<pad>", "</s>", "<unused0>")}
    assert specials.isdisjoint(whole(store, 0)[:-1])


def test_a_tokenizers_own_truncation_and_padding_change_nothing(tmp_path):
    tokenizer = word_tokenizer(9)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding()
    store = build(tmp_path, [TextRow("", "w1 w2 w3", "w4"), TextRow("", "w1", "")], tokenizer)
    assert store.lengths.tolist() == [[0, 3, 2], [0, 1, 1]]


@pytest.mark.parametrize("kind", ["own", "byte-level", "framed"])
def test_ids_and_characters_are_what_transformers_says(kind):
    """With the shipped tokenizer, one that takes letters apart, one that frames a text: special tokens, a text twice,
    an empty one, several bytes a character."""
    tokenizer = load_tokenizer(str(SAMPLE_TOKENIZER))  # changed below
    if kind == "byte-level":
        backend = Tokenizer(BPE())
        backend.pre_tokenizer, backend.normalizer = ByteLevel(), NFKD()
        trainer = BpeTrainer(special_tokens=["</s>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False)
        backend.train_from_iterator(["부정 긍정 아 더빙"] * 3, trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    if kind == "framed":
        end = tokenizer.eos_token
        frame = [(end, tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{end} $A {end}", None, frame)
    texts = ["아 더빙.. 진짜", "", "</s> 좋아요 <unused0>", "뷁 é\u200b\0 🙂", "아 더빙.. 진짜"]
    wanted = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    fast, slow = (encodings(texts, tokenizer, with_offsets) for with_offsets in (False, True))
    assert [one.ids for one in fast] == [one.ids for one in slow] == wanted["input_ids"]
    assert [one.offsets for one in slow] == wanted["offset_mapping"]


def test_rows_keep_their_order_over_several_batches_of_the_tokenizer(tmp_path):
    words = word_tokenizer(5000)
    store = build(tmp_path, [TextRow("", f"w{n}", "") for n in range(5000)], words)
    firsts = [store.tokens[start] for start in store.rows[:, 0]]
    assert firsts == list(range(3, 5003))
    assert store.lengths.tolist() == [[0, 1, 1]] * 5000


def test_the_tokens_of_an_answer_are_found_by_its_characters(tmp_path):
    store = build(tmp_path, [REVIEW, QUESTION])
    start, end = store.rows[1, 4:6]
    context = parts(store, 1)[0]
    assert QUESTION.context[slice(*QUESTION.span)] == "내륙 도시"
    assert "내륙 도시" in sample_tokenizer().decode(context[start:end])
    assert "내륙 도시" not in sample_tokenizer().decode(context[start + 1 : end])
    assert "내륙 도시" not in sample_tokenizer().decode(context[start : end - 1])


def test_a_row_without_answer_has_no_span(tmp_path):
    assert build(tmp_path, [REVIEW]).rows[0, 4:6].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("span", "tokens"),
    [((0, 2), (0, 1)), ((1, 3), (0, 2)), ((2, 5), (1, 2)), ((4, 8), (1, 3)), ((8, 9), (-1, -1)), (None, (-1, -1))],
)
def test_token_spans_by_hand(span, tokens):
    assert token_span([(0, 2), (2, 5), (5, 8)], span) == tokens


@pytest.mark.parametrize(("num_words", "dtype"), [(100, np.uint16), (2**16 - 3, np.uint16), (2**16 - 2, np.uint32)])
def test_ids_take_two_bytes_where_the_vocabulary_allows(tmp_path, num_words, dtype):
    tokenizer = word_tokenizer(num_words)
    store = build(tmp_path, [TextRow("", f"w{num_words - 1}", "")], tokenizer)
    assert store.tokens.dtype == dtype
    assert parts(store, 0)[1] == [len(tokenizer) - 1]


def test_a_store_without_rows_opens(tmp_path):
    assert len(build(tmp_path, [])) == 0


class Counted:
    """Rows that count how often they are read."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> list[TextRow]:
        self.times += 1
        return [REVIEW, QUESTION]


def test_a_second_opening_reads_no_rows(tmp_path):
    rows = Counted()
    first = open_or_build(tmp_path, "key", rows, sample_tokenizer())
    again = open_or_build(tmp_path, "key", rows, sample_tokenizer())
    assert rows.times == 1
    assert (first.tokens == again.tokens).all()
    assert (first.rows == again.rows).all()


@pytest.mark.parametrize("name", ["tokens.bin", "rows.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_store_is_built_anew(tmp_path, name, damage):
    rows = Counted()
    before = open_or_build(tmp_path, "key", rows, sample_tokenizer()).tokens.tolist()
    path = tmp_path / "key" / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])
    assert open_or_build(tmp_path, "key", rows, sample_tokenizer()).tokens.tolist() == before
    assert rows.times == 2


def test_what_an_interrupted_build_left_is_not_taken_for_a_store(tmp_path):
    rows = Counted()
    open_or_build(tmp_path, "whole", rows, sample_tokenizer())
    (tmp_path / "key").mkdir()
    shutil.copy(tmp_path / "whole" / "tokens.bin", tmp_path / "key")
    assert len(open_or_build(tmp_path, "key", rows, sample_tokenizer())) == 2


def test_a_builder_that_raises_leaves_nothing_behind(tmp_path):
    def rows():
        yield from [REVIEW] * 3000  # more than one batch of the tokenizer: some are written already
        raise UserError("data.txt:3001: broken")

    with pytest.raises(UserError, match=r"data\.txt:3001"):
        open_or_build(tmp_path, "key", rows, sample_tokenizer())
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert len(build(tmp_path, [REVIEW])) == 1


def open_all(folder: Path, write: Callable[[Path], None], num: int = 10) -> list[int]:
    """So many processes that open one cache at the same moment; their exit codes, 0 for a whole store."""
    context = multiprocessing.get_context("fork")
    together = context.Barrier(num)

    def work() -> None:
        together.wait()
        path = build_once(folder, "key", write)
        os._exit(0 if damage(path, "meta.json") is None and (path / "data").read_text() == "whole" else 1)

    processes = [context.Process(target=work) for _ in range(num)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def written(folder: Path, cache: Path) -> None:
    """Write slowly, and leave a line that somebody did."""
    with (cache / "log").open("a") as log:
        log.write("built\n")
    (folder / "data").write_text("who")
    time.sleep(0.1)
    (folder / "data").write_text("whole")
    seal(folder)


def test_ten_processes_that_open_a_cache_at_once_build_it_once(tmp_path):
    assert open_all(tmp_path, lambda folder: written(folder, tmp_path)) == [0] * 10
    assert (tmp_path / "log").read_text() == "built\n"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["key"]


def test_a_builder_that_is_killed_leaves_it_to_the_next_one(tmp_path):
    def killed_at_first(folder: Path) -> None:
        if not (tmp_path / "log").exists():
            (tmp_path / "log").touch()
            (folder / "data").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        written(folder, tmp_path)

    assert sorted(open_all(tmp_path, killed_at_first)) == [-signal.SIGKILL] + [0] * 9
    assert (tmp_path / "log").read_text() == "built\n"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["key"]


def test_a_cache_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with refused(f"--cache_dir {tmp_path}/file/cache: cannot be written (Not a directory)", untouched=tmp_path):
        build(tmp_path / "file" / "cache", [REVIEW])


def test_keys_differ_by_every_part_and_its_place():
    keys = {key_of("nsmc", 0, "a"), key_of("nsmc", 0, "b"), key_of("nsmc", 1, "a"), key_of("a", 0, "nsmc")}
    assert len(keys) == 4
    assert key_of("nsmc", 0) == key_of("nsmc", 0)


def test_tokenizers_are_told_apart_by_vocabulary_and_added_tokens():
    plain, larger, added = word_tokenizer(5), word_tokenizer(6), word_tokenizer(5)
    added.add_tokens(["<pause>"], special_tokens=True)
    assert len({tokenizer_hash(t) for t in (plain, larger, added)}) == 3
    assert tokenizer_hash(plain) == tokenizer_hash(word_tokenizer(5))


def test_files_are_told_apart_by_content_not_by_name(tmp_path):
    for name, text in (("a", "긍정"), ("b", "긍정"), ("c", "부정")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert file_hash(tmp_path / "a") == file_hash(tmp_path / "b") != file_hash(tmp_path / "c")


@pytest.fixture(scope="module")
def process_group():
    threads = torch.get_num_threads()
    distributed.setup()
    yield
    distributed.shutdown()
    torch.set_num_threads(threads)


def write_reviews(path, num: int):
    lines = [f"{n}\t좋은 영화 {n}\t{n % 2}" for n in range(num)]
    path.write_text("\n".join(["id\tdocument\tlabel", *lines]), encoding="utf-8")
    return Source(path)


def test_the_cache_of_a_task_follows_content_kind_limit_side_and_tokenizer(tmp_path, process_group):
    task, tokenizer = TASKS["nsmc"], sample_tokenizer()
    source, changed = write_reviews(tmp_path / "a.txt", 6), write_reviews(tmp_path / "b.txt", 7)
    side = Source(source.path, side="train", validation_fraction=0.5)
    other = word_tokenizer(3)
    wanted = [
        (source, "train", 0, tokenizer),
        (changed, "train", 0, tokenizer),
        (source, "choices", 0, tokenizer),
        (source, "train", 3, tokenizer),
        (side, "train", 0, tokenizer),
        (source, "train", 0, other),
    ]
    stores = [cached_store(s, task, kind, limit, t, str(tmp_path / "cache")) for s, kind, limit, t in wanted]
    assert len({store.folder for store in stores}) == len(wanted)
    assert [len(store) for store in stores[:4]] == [6, 7, 12, 3]


def test_a_renamed_file_meets_its_old_store(tmp_path, process_group):
    cache, tokenizer = str(tmp_path / "cache"), sample_tokenizer()
    first = cached_store(write_reviews(tmp_path / "a.txt", 4), TASKS["nsmc"], "train", 0, tokenizer, cache)
    again = cached_store(write_reviews(tmp_path / "b.txt", 4), TASKS["nsmc"], "train", 0, tokenizer, cache)
    assert first.folder == again.folder


def test_evenly_spaced_evaluation_examples_keep_their_rows(tmp_path, process_group):
    arguments = DataArguments(max_eval_samples=3, cache_dir=str(tmp_path / "cache"))
    data = evaluation_set(write_reviews(tmp_path / "a.txt", 9), TASKS["nsmc"], arguments, sample_tokenizer())
    assert [example.id for example in data.examples] == ["0", "3", "6"]
    assert len(data.store) == 6  # two choices an example
    texts = [sample_tokenizer().decode(whole(data.store, n)[:-1]) for n in range(6)]
    assert texts == [f"{word} 좋은 영화 {n}" for n in (0, 3, 6) for word in ("부정", "긍정")]


def test_what_was_left_out_is_told_by_every_run_that_uses_the_store(tmp_path, process_group, capsys):
    path = tmp_path / "a.txt"
    path.write_text("id\tdocument\tlabel\n1\t\t1\n2\t좋다\t1\n", encoding="utf-8")
    for _run in range(2):
        cached_store(Source(path), TASKS["nsmc"], "train", 0, sample_tokenizer(), str(tmp_path / "cache"))
        assert capsys.readouterr().out == f"{path}: left out 1 rows: empty text (first: {path}:2)\n"


def test_a_file_with_a_bad_row_leaves_no_store(tmp_path, process_group):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("id\tdocument\tlabel\n1\t좋다\t1\n2\t나쁘다\t7\n", encoding="utf-8")
    for _run in range(2):
        with pytest.raises(UserError, match=r"a\.txt:3: label '7'"):
            cached_store(Source(path), TASKS["nsmc"], "train", 0, sample_tokenizer(), str(cache))
    assert [entry for entry in cache.iterdir() if entry.is_dir()] == []
