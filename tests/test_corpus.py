"""The corpus: which documents a file holds, that pieces lose nothing, and the shards that are kept of them."""

import random
import re
import tracemalloc
import unicodedata
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from kozero.data.store import tokenizer_hash
from kozero.errors import UserError
from pretrain import corpus
from pretrain.corpus import (
    SPLITTERS,
    Piece,
    Shard,
    build_shard,
    by_line,
    hub_pieces,
    pieces_of,
    reading_key,
)
from tests.helpers import SAMPLE_DATA, refused, sample_tokenizer, word_tokenizer

TEXT = "눈이 왔다.\n길을 쓸었다.\n\n육수를 낸다.\n\n\n다시마를 건진다.\n끝\n"
DOCUMENTS = [["눈이 왔다.", "길을 쓸었다."], ["육수를 낸다."], ["다시마를 건진다.", "끝"]]
ODD = [
    "가",
    "힣",
    "ㄱ",
    "\u1112\u1161\u11ab",
    "é",
    "e\u0301",
    "𠮷",
    "😀",
    "\u200b",
    "a",
    "\x00",
    "<s>",
    "\x1c",
    "\ufffd",
]
SPACES = [" ", "\t", "\r\n", "\n", "\n", "\n\n", "\n \n", "\u3000", "\x0b", "\x0c", "\x85", "\u2028", "\r"]


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def documents_of(path: Path) -> list[list[str]]:
    """All documents, piece by piece."""
    return [document for piece in pieces_of(path) for document in piece.documents()]


def plainly(text: str) -> list[list[str]]:
    """Documents of a text that is looked at as a whole."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    blocks = re.split(r"\n\s*\n", text)
    return [[line.strip() for line in block.split("\n") if line.strip()] for block in blocks if block.strip()]


def random_text(seed: int, size: int = 120) -> str:
    """Characters of one to four bytes and everything that may stand between lines and documents."""
    rng = random.Random(seed)
    return "".join(rng.choice(rng.choice((ODD, ODD, SPACES))) for _ in range(size))


class Counted:
    """A tokenizer that remembers the batches it was given and may be interrupted before one of them."""

    def __init__(self, tokenizer=None, stop_at: int = -1) -> None:
        self.tokenizer, self.stop_at, self.batches = tokenizer or sample_tokenizer(), stop_at, []
        self.backend, self.backend_tokenizer = self.tokenizer.backend_tokenizer, self

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __getattr__(self, name: str):
        return getattr(self.backend if hasattr(self.backend, name) else self.tokenizer, name)

    def encode_batch_fast(self, batch: list[str], **options):
        if len(self.batches) == self.stop_at:
            raise KeyboardInterrupt
        self.batches.append(batch)
        return self.backend.encode_batch_fast(batch, **options)


def build(path: Path, cache: Path, tokenizer=None, split=by_line, name: str = "line") -> list[Shard]:
    """The shards of a file."""
    tokenizer = tokenizer or sample_tokenizer()
    return [
        Shard.open(build_shard(piece, tokenizer, split, reading_key(tokenizer, name), cache))
        for piece in pieces_of(path)
    ]


def ids_of(shards: list[Shard]) -> list[list[list[int]]]:
    """The ids of each sentence of each document."""
    found = []
    for shard in shards:
        sentences = [shard.tokens[a:b].tolist() for a, b in zip(shard.sentences, shard.sentences[1:], strict=False)]
        found += [sentences[a:b] for a, b in zip(shard.documents, shard.documents[1:], strict=False)]
    return found


def alone(documents: list[list[str]], tokenizer=None) -> list[list[list[int]]]:
    """The same by the tokenizer's plainest call."""
    tokenizer = tokenizer or sample_tokenizer()
    return [[tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines] for lines in documents]


def folders(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.is_dir()}


# Documents -------------------------------------------------------------------------------------------------------


def test_a_blank_line_ends_a_document(tmp_path):
    assert documents_of(write(tmp_path / "a.txt", TEXT)) == DOCUMENTS


@pytest.mark.parametrize(
    "text",
    [
        TEXT.replace("\n", "\r\n"),
        "\ufeff" + TEXT,
        TEXT.rstrip("\n"),
        "\n\n \n" + TEXT + "\n\n\n",
        TEXT.replace("\n\n", "\n \t\u3000\n"),
        TEXT.replace("\n", " \n  "),
        TEXT.replace("육수", "\ufeff육수"),  # files with byte order marks that were put together
    ],
    ids=["crlf", "bom", "no end of line", "blank ends", "blanks of spaces", "spaces around lines", "bom inside"],
)
def test_documents_are_the_same_however_the_file_was_saved(tmp_path, text):
    assert documents_of(write(tmp_path / "a.txt", text)) == DOCUMENTS


@pytest.mark.parametrize("text", ["", "\n", " \r\n\n\t", "\ufeff"])
def test_a_file_without_text_has_no_documents(tmp_path, text):
    assert documents_of(write(tmp_path / "a.txt", text)) == []


def test_characters_stay_as_they_are(tmp_path):
    """Composing them is the tokenizer's business."""
    composed = "한글 é 😀 𠮷\x00\u200b끝"
    lines = [composed, unicodedata.normalize("NFD", composed)]
    assert lines[0] != lines[1]
    assert documents_of(write(tmp_path / "a.txt", "\n".join(lines))) == [lines]


@pytest.mark.parametrize("seed", range(40))
def test_pieces_end_at_documents_and_lose_nothing(tmp_path, monkeypatch, seed):
    text = random_text(seed)
    path = write(tmp_path / "a.txt", text)
    longest = max((len(block.encode()) for block in re.split(r"(?>\r\n|\r|\n)\s*(?>\r\n|\r|\n)", text)), default=0)
    for size in (*range(longest + 1, longest + 40), 10**6):
        monkeypatch.setattr(corpus, "PIECE_BYTES", size)
        assert documents_of(path) == plainly(text)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_the_size_of_pieces_each_line_comes_once(tmp_path, monkeypatch, seed):
    text = random_text(seed)
    path, size = write(tmp_path / "a.txt", text), len(text.encode())
    for piece_bytes in (1, 2, 3, 5, 8, 13, 40, size - 1, size, size + 1):
        monkeypatch.setattr(corpus, "PIECE_BYTES", piece_bytes)
        pieces = list(pieces_of(path))
        assert [piece.start for piece in pieces] + [size] == [0] + [piece.end for piece in pieces]
        lines = [line for document in documents_of(path) for line in document]
        assert lines == [line.strip() for line in re.split("\r\n|\r|\n", text) if line.strip()]


def test_a_file_of_many_documents_is_many_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE_BYTES", 50)
    path = write(tmp_path / "a.txt", "".join(f"{n:03} 문서\n둘째 줄\n\n" for n in range(100)))  # 24 bytes each
    sizes = [piece.end - piece.start for piece in pieces_of(path)]
    assert len(sizes) > 20 and max(sizes) <= 50 + 24


def test_a_piece_ends_with_the_first_blank_line_behind_its_bytes(tmp_path, monkeypatch):
    """By hand: of documents of 4 bytes, each with a blank line behind it."""
    path = write(tmp_path / "a.txt", "가\n\n나\n\n다\n\n")
    for piece_bytes, ends in ((3, [5, 10, 15]), (4, [5, 10, 15]), (5, [10, 15]), (9, [10, 15]), (10, [15])):
        monkeypatch.setattr(corpus, "PIECE_BYTES", piece_bytes)
        assert [piece.end for piece in pieces_of(path)] == ends


def test_a_document_longer_than_a_piece_is_cut_at_the_end_of_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE_BYTES", 20)
    path = write(tmp_path / "a.txt", "".join(f"line {n:03}\n" for n in range(30)))  # 9 bytes each
    sizes = [piece.end - piece.start for piece in pieces_of(path)]
    assert sizes == [45] * 6
    assert documents_of(path) == [[f"line {n:03}" for n in range(k, k + 5)] for k in range(0, 30, 5)]


# Files -----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_gone_is_named(tmp_path):
    path = write(tmp_path / "a.txt", TEXT)
    (piece,) = pieces_of(path)
    path.unlink()
    with refused(f"{path}: no such file", untouched=tmp_path):
        build_shard(piece, sample_tokenizer(), by_line, "", tmp_path / "cache")
    with refused(f"{path}: no such file"):
        list(pieces_of(path))


@pytest.mark.parametrize("piece_bytes", [3, 10**6])
@pytest.mark.parametrize(
    ("content", "place", "advice"),
    [
        ("abc\n\n한글\n".encode("cp949"), ":3", "iconv -f cp949 -t utf-8"),
        ("한글\n\n한글\n".encode("utf-16"), "", "iconv -f utf-16 -t utf-8"),
        ("\ufeff한글\n\n\n글\n".encode() + b"\xff\n", ":5", "iconv"),
        ("글\n".encode() * 9 + "글".encode()[:2], ":10", "iconv"),
    ],
    ids=["cp949", "utf-16", "behind a bom", "cut inside a character"],
)
def test_a_file_that_is_not_utf8_is_named_with_its_line_and_the_way_out(
    tmp_path, monkeypatch, piece_bytes, content, place, advice
):
    monkeypatch.setattr(corpus, "PIECE_BYTES", piece_bytes)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.txt{place}: not UTF-8.*{advice}") as caught:
        build(tmp_path / "a.txt", tmp_path / "cache")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("piece_bytes", [1, 7, 20, 10**6])
def test_a_line_that_is_no_text_is_named(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(corpus, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(corpus, "LINE_BYTES", 30)
    assert documents_of(write(tmp_path / "a.txt", f"가\n\n{'x' * 30}\n\n나")) == [["가"], ["x" * 30], ["나"]]
    path = write(tmp_path / "a.txt", f"가\n\n{'x' * 91}\n\n나")
    with pytest.raises(UserError, match=r"a\.txt:3: a line of over .* bytes; break it into lines"):
        documents_of(path)
    if piece_bytes < 91:  # it is not read into a piece first
        with pytest.raises(UserError, match=r"a\.txt:3: a line of over"):
            list(pieces_of(path))


def test_a_line_may_have_a_mebibyte(tmp_path):
    path = write(tmp_path / "a.txt", "x" * 2**20)
    assert [len(line) for (line,) in documents_of(path)] == [2**20]
    with pytest.raises(UserError, match=r"a\.txt:1: a line of over 1,048,576 bytes"):
        documents_of(write(tmp_path / "a.txt", "x" * (2**20 + 1)))


# Shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece_bytes", [100, 10**6])
def test_ids_are_those_of_each_sentence_alone(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(corpus, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(corpus, "ENCODE_SENTENCES", 7)
    text = (SAMPLE_DATA / "corpus" / "corpus.txt").read_text(encoding="utf-8")[:3000]
    text += "\n\n" + unicodedata.normalize("NFD", text[:300])
    shards = build(write(tmp_path / "a.txt", text), tmp_path / "cache")
    assert (len(shards) > 9) == (piece_bytes == 100)
    flat = [sentence for document in ids_of(shards) for sentence in document]
    assert flat == [sentence for document in alone(plainly(text)) for sentence in document]
    if piece_bytes > 100:
        assert ids_of(shards) == alone(plainly(text))


def test_a_sentence_has_no_frame_of_the_tokenizers_own(tmp_path):
    tokenizer = word_tokenizer(5)
    frame = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", "$A $B", frame)
    assert tokenizer("w0")["input_ids"] == [1, 3, 2]
    assert ids_of(build(write(tmp_path / "a.txt", "w0 w1\nw2"), tmp_path / "cache", tokenizer)) == [[[3, 4], [5]]]


def test_a_text_that_spells_a_special_token_is_text(tmp_path):
    tokenizer = sample_tokenizer()
    names = ["<s>", "</s>", "<pad>", "<mask>", "<unused0>"]
    (shard,) = build(write(tmp_path / "a.txt", "\n".join(f"{name} 글" for name in names)), tmp_path / "cache")
    assert set(tokenizer.convert_tokens_to_ids(names)).isdisjoint(shard.tokens.tolist())
    assert len(shard.sentences) == len(names) + 1


def test_sentences_and_documents_without_tokens_are_none(tmp_path):
    """A tokenizer may have nothing for a text: no row must come of it."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"a": 0, "b": 1}, [])))
    path = write(tmp_path / "a.txt", "가\n\na\n나\nba\n\n다\n라\n\nb\n\n마\n")
    assert ids_of(build(path, tmp_path / "cache", tokenizer)) == [[[0], [1, 0]], [[1]]]
    (shard,) = build(write(tmp_path / "b.txt", "가\n\n나\n"), tmp_path / "cache", tokenizer)
    assert (shard.num_documents, shard.sentences.tolist()) == (0, [0])


def test_blank_files_make_shards_without_documents(tmp_path):
    assert build(write(tmp_path / "a.txt", ""), tmp_path / "cache") == []
    (shard,) = build(write(tmp_path / "a.txt", "\n \n"), tmp_path / "cache")
    assert (shard.num_documents, shard.sentences.tolist(), shard.documents.tolist()) == (0, [0], [0])


@pytest.mark.parametrize(("num_words", "dtype"), [(2**16 - 3, np.uint16), (2**16 - 2, np.uint32)])
def test_ids_take_two_bytes_where_the_vocabulary_allows(tmp_path, num_words, dtype):
    tokenizer = word_tokenizer(num_words)
    (shard,) = build(write(tmp_path / "a.txt", f"w0 w{num_words - 1}"), tmp_path / "cache", tokenizer)
    assert shard.tokens.dtype == dtype
    assert shard.tokens.tolist() == [3, len(tokenizer) - 1]


def lines_of(batches: list[list[str]]) -> list[str]:
    return [line for batch in batches for line in batch]


@pytest.fixture
def three_pieces(tmp_path, monkeypatch):
    """A file of three documents, each a piece."""
    monkeypatch.setattr(corpus, "PIECE_BYTES", 18)  # bytes of the second
    path = write(tmp_path / "a.txt", TEXT.replace("\n\n\n", "\n\n"))
    assert [list(piece.documents()) for piece in pieces_of(path)] == [[document] for document in DOCUMENTS]
    return path


def test_a_corpus_is_tokenised_once(three_pieces, tmp_path):
    first, again = Counted(), Counted()
    shards = build(three_pieces, tmp_path / "cache", first)
    assert lines_of(first.batches) == [line for document in DOCUMENTS for line in document]
    assert ids_of(build(three_pieces, tmp_path / "cache", again)) == ids_of(shards) == alone(DOCUMENTS)
    assert again.batches == []


def test_an_interrupted_build_goes_on_where_it_stopped(three_pieces, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(three_pieces, tmp_path / "cache", Counted(stop_at=2))
    assert len(folders(tmp_path / "cache")) == 2
    rest = Counted()
    assert ids_of(build(three_pieces, tmp_path / "cache", rest)) == alone(DOCUMENTS)
    assert lines_of(rest.batches) == DOCUMENTS[2]


@pytest.mark.parametrize("name", ["tokens.bin", "sentences.npy", "documents.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_shard_is_built_anew(three_pieces, tmp_path, name, damage):
    path = build(three_pieces, tmp_path / "cache")[1].folder / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    mending = Counted()
    assert ids_of(build(three_pieces, tmp_path / "cache", mending)) == alone(DOCUMENTS)
    assert lines_of(mending.batches) == DOCUMENTS[1]


def test_only_what_changed_is_tokenised_again(three_pieces, tmp_path):
    build(three_pieces, tmp_path / "cache")
    write(three_pieces, three_pieces.read_text(encoding="utf-8").replace("육수", "국물"))
    counted = Counted()
    build(three_pieces, tmp_path / "cache", counted)
    assert lines_of(counted.batches) == ["국물를 낸다."]


def test_text_tokenizer_and_splitter_each_make_another_shard(tmp_path):
    path, cache = write(tmp_path / "a.txt", TEXT), tmp_path / "cache"
    build(path, cache)
    build(write(tmp_path / "b.txt", TEXT + "더"), cache)
    build(path, cache, word_tokenizer(3))
    build(path, cache, split=lambda document: [" ".join(document)], name="joined")
    assert len(folders(cache)) == 4
    build(write(tmp_path / "c.txt", TEXT), cache)  # a copy
    assert len(folders(cache)) == 4


def test_a_tokenizer_keeps_its_shards_when_it_was_saved_with_truncation(tmp_path, three_pieces):
    """Its first call takes the truncation out of its state; a name made of that would change in the middle."""
    names = []
    for _run in range(2):
        tokenizer = word_tokenizer(3)
        tokenizer.backend_tokenizer.enable_truncation(2)
        tokenizer.backend_tokenizer.enable_padding()
        names.append([shard.folder.name for shard in build(three_pieces, tmp_path / "cache", tokenizer)])
    assert names[0] == names[1]
    assert tokenizer_hash(tokenizer) == tokenizer_hash(word_tokenizer(3))


def test_tokenizers_that_treat_the_same_words_otherwise_are_told_apart():
    def tokenizer(normalizer) -> PreTrainedTokenizerFast:
        backend = Tokenizer(WordLevel({"<unk>": 0, "w0": 1}, unk_token="<unk>"))
        backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    assert tokenizer_hash(tokenizer(normalizers.NFC())) != tokenizer_hash(tokenizer(normalizers.NFD()))


def test_an_error_in_a_later_batch_leaves_no_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "ENCODE_SENTENCES", 1)
    (tmp_path / "a.txt").write_bytes("가\n나\n\n다\n".encode() + b"\xff\n")
    with pytest.raises(UserError, match=r"a\.txt:5"):
        build(tmp_path / "a.txt", tmp_path / "cache")
    assert folders(tmp_path / "cache") == set()


@contextmanager
def peak_below(limit: int):
    """Python and numpy take less than so many bytes inside."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


class Forgetful(Counted):
    """Keeps the sizes of the batches alone."""

    def encode_batch_fast(self, batch: list[str], **options):
        self.batches.append(len(batch))
        return self.backend.encode_batch_fast(batch, **options)


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    """Pieces of 16 kB of a file of 900 kB, whose lines alone would take over 2 MB."""
    monkeypatch.setattr(corpus, "PIECE_BYTES", 2**14)
    monkeypatch.setattr(corpus, "ENCODE_SENTENCES", 64)
    path, tokenizer = tmp_path / "a.txt", Forgetful(word_tokenizer(9))
    with path.open("w") as file:
        file.writelines(f"{n:05} w1 w2 w3 w4 w5 w6 w7 w8 w9\n{chr(10) * (n % 10 == 0)}" for n in range(24_000))
    with peak_below(400_000):
        for piece in pieces_of(path):
            build_shard(piece, tokenizer, by_line, "", tmp_path / "cache")
    assert max(tokenizer.batches) == 64 and sum(tokenizer.batches) == 24_000


def test_naming_a_line_does_not_read_the_file_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE_BYTES", 2**14)
    path = tmp_path / "a.txt"
    path.write_bytes((b"x" * 999 + b"\n\n") * 8000 + b"\xff\n")
    last = list(pieces_of(path))[-1]
    with peak_below(3 * 2**20), pytest.raises(UserError, match=r"a\.txt:16001: not UTF-8"):
        list(last.documents())


# The hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Writes a folder that `datasets` loads by its path."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub_cache")

    def make(name: str, texts: list) -> str:
        (tmp_path / name).mkdir()
        rows = {"text": texts, "number": list(range(len(texts)))}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / name / "train.parquet")
        return str(tmp_path / name)

    return make


def test_rows_of_the_hub_are_documents_in_pieces_that_are_tokenised_once(hub, tmp_path):
    texts = ["\n".join(lines) + "\r\n \n" for lines in DOCUMENTS[:2]] + [None, " \n", "", "\n".join(DOCUMENTS[2])]
    names = {"a": hub("a", texts), "b": hub("b", [*texts[:5], "딴 글"])}
    for run, num_read, documents in (("a", 5, DOCUMENTS), ("a", 0, DOCUMENTS), ("b", 4, [*DOCUMENTS[:2], ["딴 글"]])):
        tokenizer, pieces = Counted(), hub_pieces(names[run], "train", "text", rows=2)
        assert [(piece.start, piece.end) for piece in pieces] == [(0, 2), (2, 4), (4, 6)]
        shards = [Shard.open(build_shard(p, tokenizer, by_line, "", tmp_path / "cache")) for p in pieces]
        assert ids_of(shards) == alone(documents)
        assert len(lines_of(tokenizer.batches)) == num_read


def test_a_column_that_is_missing_or_holds_no_text_is_refused(hub):
    name = hub("a", ["글"])
    with pytest.raises(UserError, match=r"--text_column document: .* has the columns text, number"):
        hub_pieces(name, "train", "document")
    with pytest.raises(UserError, match=r"--text_column number: .* no text there but int64"):
        hub_pieces(name, "train", "number")


def test_a_data_set_that_cannot_be_reached_is_one_line_with_the_way_out():
    with pytest.raises(UserError, match=r"--corpus_hub klue: cannot be loaded.*--corpus_path") as caught:
        hub_pieces("klue", "train", "text")
    assert "\n" not in str(caught.value)


# Sentences -------------------------------------------------------------------------------------------------------


def test_kiwi_finds_sentences_without_punctuation_and_loses_only_spaces():
    split = SPLITTERS["kiwi"]()
    lines = [
        "오늘은 날씨가 참 좋다 그래서 산책을 나갔다 강가에는 사람이 많았다",
        "3.14는 π다!?\u3000할게욬ㅋㅋ <s> 😀",
        "끝",
    ]
    sentences = list(split(lines))
    assert sentences[:3] == ["오늘은 날씨가 참 좋다", "그래서 산책을 나갔다", "강가에는 사람이 많았다"]
    assert "".join("".join(sentences).split()) == "".join("".join(lines).split())
    assert all(sentence == sentence.strip() != "" for sentence in sentences)
    assert sentences[-1] == "끝"  # no sentence crosses lines
    assert list(split([])) == []


def test_a_splitter_makes_sentences_of_a_documents_lines(tmp_path):
    def at_dots(document: list[str]) -> list[str]:
        return [part.strip() for line in document for part in line.split(".") if part.strip()]

    path = write(tmp_path / "a.txt", "하나. 둘.\n셋\n\n넷. 다섯\n")
    found = ids_of(build(path, tmp_path / "cache", split=at_dots, name="dots"))
    assert found == alone([["하나", "둘", "셋"], ["넷", "다섯"]])


def test_a_piece_names_its_file_and_bytes(tmp_path):
    path = write(tmp_path / "a.txt", "가\n\n나\n")
    assert Piece(path, 5, 9).content() == "나\n".encode()
    assert list(Piece(path, 5, 9).documents()) == [["나"]]
