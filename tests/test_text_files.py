"""Files that a flag names: which ones a folder holds, what a line is, and that nothing endless is read."""

import bz2
import gzip
import io
import json
import lzma
import os
import threading
from collections import Counter
from pathlib import Path

import pytest

from finetune import generate
from finetune.tasks import TASKS, Source
from kozero.data import documents as document_files
from kozero.data import readers
from kozero.data.documents import documents
from kozero.data.readers import BadRow, LeftOut, decode_lines, raw_lines, read_jsonl, read_tsv, text_field, text_files
from kozero.errors import UserError
from kozero.json_files import read_json
from pretrain import corpus
from pretrain.corpus import HubPiece, pieces_of
from scripts import train_tokenizer

# Folders ---------------------------------------------------------------------------------------------------------


def found_in(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in text_files("--files", folder)]


def test_a_folder_is_searched_to_the_bottom_in_the_order_of_names(tmp_path):
    for name in ("b.txt", "a/z.dat", "a/b/c.txt", "c.md", "a/d.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("글", encoding="utf-8")
    (tmp_path / "folder.txt").mkdir()
    assert found_in(tmp_path) == ["a/b/c.txt", "a/z.dat", "b.txt"]


def test_the_ending_of_a_name_may_be_in_capitals(tmp_path):
    for name in ("a.TXT", "b.Dat", "c.JSONL"):
        (tmp_path / name).write_text('{"text": "글이다"}\n', encoding="utf-8")
    assert found_in(tmp_path) == ["a.TXT", "b.Dat"]
    assert [row["text"] for _, row in documents(tmp_path / "c.JSONL", "document", Counter())] == ["글이다"]


def test_a_single_file_may_have_any_name(tmp_path):
    (tmp_path / "corpus.md").touch()
    assert text_files("--files", tmp_path / "corpus.md") == [tmp_path / "corpus.md"]


@pytest.mark.parametrize(("name", "message"), [("none", "no such file or folder"), ("empty", "no .* file in it")])
def test_a_path_without_files_is_refused(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"--corpus_path .*{name}: {message}"):
        text_files("--corpus_path", tmp_path / name)


def test_linked_folders_are_searched_once_and_circles_end(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far/a.txt").touch()
    folder = tmp_path / "corpus"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner/b.txt").touch()
    (folder / "near").symlink_to(tmp_path / "far")
    (folder / "again").symlink_to(tmp_path / "far")
    (folder / "inner/up").symlink_to(folder)
    (folder / "c.txt").symlink_to(tmp_path / "far/a.txt")
    assert found_in(folder) == ["again/a.txt", "c.txt", "inner/b.txt"]


def test_a_folder_that_cannot_be_read_is_named_and_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").touch()
    real = os.scandir

    def scandir(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"closed: cannot be read \(Permission denied\)"):
        text_files("--files", tmp_path)


def test_hidden_files_and_folders_are_left_out_unless_they_are_named(tmp_path):
    """As ._a.txt, which macOS puts beside a.txt on other systems' disks."""
    for name in ("a.txt", "._a.txt", ".git/b.txt", "b/.c.txt", ".ipynb_checkpoints/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7\xff")
    assert found_in(tmp_path) == ["a.txt"]
    assert text_files("--files", tmp_path / "._a.txt") == [tmp_path / "._a.txt"]
    assert found_in(tmp_path / ".git") == ["b.txt"]


@pytest.mark.parametrize("kind", ["fifo", "dangling link"])
def test_what_is_no_file_in_a_folder_is_named_and_not_left_out(tmp_path, kind):
    (tmp_path / "a.txt").touch()
    os.mkfifo(tmp_path / "b.txt") if kind == "fifo" else (tmp_path / "b.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"b\.txt: (is a folder, a pipe or a device|no such file)"):
        text_files("--files", tmp_path)


def test_a_file_that_may_not_be_read_is_named_before_any_is_read(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("글", encoding="utf-8")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "b.txt")
    with pytest.raises(UserError, match=r"b\.txt: cannot be read \(Permission denied\)"):
        text_files("--files", tmp_path)


READERS = {
    "--files, --corpus_path": lambda path: text_files("--files", path),
    "lines": lambda path: list(decode_lines(path)),
    "JSON": read_json,
    "documents": lambda path: list(documents(path, "line", Counter())),
    "corpus": lambda path: list(pieces_of(path)),
    "prompts": lambda path: generate.prompts_of(generate.GenerationArguments(prompts_file=str(path))),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_fifo_is_refused_before_it_is_opened(tmp_path, reader):
    os.mkfifo(tmp_path / "pipe.txt")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe.txt").write_text("[]"), daemon=True)
    writer.start()  # a reader that opens it does not wait for ever, and gets what it should not
    with pytest.raises(UserError, match=r"pipe\.txt: is a folder, a pipe or a device; name a regular file"):
        READERS[reader](tmp_path / "pipe.txt")


@pytest.mark.parametrize("reader", [name for name in READERS if name != "documents"])
def test_a_device_is_refused(reader):
    with pytest.raises(UserError, match="/dev/null: is a folder, a pipe or a device"):
        READERS[reader](Path("/dev/null"))


# Lines -----------------------------------------------------------------------------------------------------------


def hub_lines(path: Path) -> list:
    class Rows:
        def select(self, numbers):
            return [{"text": path.read_bytes().decode("utf-8-sig")}]

    return list(HubPiece(Rows(), "text", 0, 1).documents())


def test_a_line_of_a_hub_data_set_is_bounded_too(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LINE_BYTES", 30)
    (tmp_path / "a.txt").write_text("x" * 30 + "\n" + "y" * 30)
    assert len(hub_lines(tmp_path / "a.txt")) == 1
    (tmp_path / "a.txt").write_text("x" * 31 + "\nz")
    with pytest.raises(UserError, match="--text_column text: row 1: a line of over 30 bytes"):
        hub_lines(tmp_path / "a.txt")


def rows_of_task(name: str):
    return lambda path: list(TASKS[name].examples(Source(path), LeftOut()))


def faults_of_json(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_json(path)
    return str(caught.value)


TEXT = "눈이 온다.\n길이 희다.\n\n국을 끓인다.\n"
JSON_LINES = '{"text": "첫 글이다"}\n{"text": "둘째 글이다"}\n'
OF_LINES = {  # name of the file, its content, what reads it
    "documents": ("a.txt", TEXT, lambda path: list(documents(path, "document", Counter()))),
    "documents by line": ("a.txt", TEXT, lambda path: list(documents(path, "line", Counter()))),
    "documents in CP949": ("a.dat", TEXT, lambda path: list(documents(path, "document", Counter()))),
    "table of documents": ("a.txt", "id\tdocument\tlabel\n1\t좋다\t1\n2\t싫다\t0\n", lambda path: list(
        documents(path, "line", Counter())
    )),
    "documents in JSON": ("a.jsonl", JSON_LINES, lambda path: list(documents(path, "line", Counter()))),
    "corpus": ("a.txt", TEXT, lambda path: [one for piece in pieces_of(path) for one in piece.documents()]),
    "hub": ("a.txt", TEXT, hub_lines),
    "tokenizer": ("a.txt", TEXT, lambda path: list(train_tokenizer.lines([path], None))),
    "prompts": ("a.txt", TEXT, READERS["prompts"]),
    "standard input": ("a.txt", TEXT, lambda path: list(generate.lines_of(path.open("rb")))),
    "nsmc": ("a.txt", "id\tdocument\tlabel\n1\t좋다\t1\n2\t싫다\t0\n", rows_of_task("nsmc")),
    "essay": ("a.jsonl", JSON_LINES, rows_of_task("essay")),
    "JSON": ("a.json", '{"a": 1,\n"b": 2,\n"c" 3}\n', faults_of_json),
}  # fmt: skip


@pytest.mark.parametrize("end", ["\r", "\r\n"])
@pytest.mark.parametrize("kind", OF_LINES)
def test_lines_are_the_same_whatever_ends_them(tmp_path, kind, end):
    name, content, reader = OF_LINES[kind]
    path, encoding = tmp_path / name, "cp949" if "CP949" in kind else "utf-8"
    path.write_bytes(content.encode(encoding))
    wanted = reader(path)
    path.write_bytes(content.replace("\n", end).encode(encoding))
    assert reader(path) == wanted and len(wanted) > 0


@pytest.mark.parametrize("block", [1, 2, 3, 7, 2**16])
def test_no_line_end_is_lost_or_doubled_where_blocks_meet(monkeypatch, block):
    monkeypatch.setattr(readers, "BLOCK", block)
    content = "가\r\n나\r\r\n\n다\r라\n\n\r\r\n마".encode()
    lines = list(raw_lines(io.BytesIO(content)))
    assert b"".join(lines) == content and lines == content.splitlines(keepends=True)


def test_a_long_line_is_read_in_time_by_its_length(monkeypatch):
    """Each byte is copied a few times, not once for each block behind it; counted by a type that tells."""
    copied = 0

    class Block(bytes):
        def __radd__(self, before):
            nonlocal copied
            copied += len(before) + len(self)
            return bytes.__add__(before, self)

    class File(io.BytesIO):
        def read1(self, size):
            return Block(super().read1(size))

    monkeypatch.setattr(readers, "BLOCK", 100)
    content = b"x" * 50_000 + b"\n" + b"y" * 50_000
    assert list(raw_lines(File(content))) == content.splitlines(keepends=True)
    assert copied <= 4 * len(content)


def test_a_line_without_an_end_is_not_read_to_its_end():
    file = io.BytesIO(b"a\n" + b"x" * 10**6)
    assert len(list(raw_lines(file, 1000))[-1]) > 1000
    assert file.tell() <= 2 + 1000 + 2 * readers.BLOCK


LONG = {
    "documents": (lambda path: list(documents(path, "document", Counter())), "a.txt"),
    "rows": (lambda path: list(read_tsv(path, ("id",))), "a.txt"),
    "tokenizer": (lambda path: list(train_tokenizer.lines([path], None)), "a.txt"),
    "prompts": (READERS["prompts"], "a.txt"),
    "standard input": (lambda path: list(generate.lines_of(path.open("rb"))), "line 2"),
}


@pytest.mark.parametrize("kind", LONG)
def test_a_line_that_is_no_text_is_named_with_its_place_and_the_bound(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(readers, "LINE_BYTES", 30)
    reader, name = LONG[kind]
    (tmp_path / "a.txt").write_text("id\n" + "x" * 31)
    with pytest.raises(UserError, match=rf"{name}.*2?: a line of over 30 bytes; break it into lines"):
        reader(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("id\n" + "x" * 30 + "\r\n" + "y" * 30)
    reader(tmp_path / "a.txt")


def test_documents_and_texts_of_rows_are_bounded_too(tmp_path, monkeypatch):
    for module in (readers, document_files):
        monkeypatch.setattr(module, "LINE_BYTES", 30)
    (tmp_path / "a.txt").write_text("짧다\n\n" + "가나다라\n" * 9, encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.txt:3: a document of over 30 characters; put blank lines"):
        list(documents(tmp_path / "a.txt", "document", Counter()))
    assert len(list(documents(tmp_path / "a.txt", "line", Counter()))) == 10
    with pytest.raises(BadRow, match="row 7: field 'text' has 31 characters, at most 30"):
        text_field("row 7", {"text": "가" * 31}, "text")


NOT_UTF8 = {
    "UTF-16": ("글\t하나".encode("utf-16"), "if it is UTF-16, convert it: iconv -f utf-16 "),
    "UTF-16 without a mark": ("id\t글\n".encode("utf-16-le"), "if it is UTF-16LE, convert it: iconv -f utf-16le "),
    "UTF-16, big end first": ("id\t글\n".encode("utf-16-be"), "if it is UTF-16BE, convert it: iconv -f utf-16be "),
    "UTF-32": ("id\t글\n".encode("utf-32"), "if it is UTF-32, convert it: iconv -f utf-32 "),
    "UTF-32 without a mark": ("id\t글\n".encode("utf-32-le"), "if it is UTF-32LE, convert it: iconv -f utf-32le "),
    "UTF-32, big end first": ("id\t글\n".encode("utf-32-be"), "if it is UTF-32BE, convert it: iconv -f utf-32be "),
    "gzip": (gzip.compress("id\t글\n".encode()), "compressed; unpack it: gunzip"),
    "zip": (b"PK\3\4" + bytes(9), "compressed; unpack it: unzip"),
    "xz": (lzma.compress(b"id"), "compressed; unpack it: unxz"),
    "bzip2": (bz2.compress(b"id"), "compressed; unpack it: bunzip2"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(9), "compressed; unpack it: unzstd"),
    "CP949": ("id\t글\n".encode("cp949"), "if it is CP949, convert it: iconv -f cp949 "),
}


@pytest.mark.parametrize("reader", [name for name in READERS if "--files" not in name])
@pytest.mark.parametrize("kind", NOT_UTF8)
def test_a_file_that_is_no_utf8_is_told_as_what_it_is(tmp_path, kind, reader):
    content, told = NOT_UTF8[kind]
    (tmp_path / "a.txt").write_bytes(content)
    if kind == "CP949" and reader in (
        "documents",
        "corpus",
    ):  # one reads it, the other decodes a piece when it needs it
        assert READERS[reader](tmp_path / "a.txt")
        return
    with pytest.raises(UserError) as caught:
        READERS[reader](tmp_path / "a.txt")
    assert told in str(caught.value) and f"{tmp_path}/a.txt" in str(caught.value) and "\n" not in str(caught.value)


# Messages and tables of any size ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 10**5])
def test_a_message_holds_a_line_of_a_users_data_at_most(tmp_path, size):
    """Its beginning, which names the place, and its end, which says what to do, stay."""
    (tmp_path / "a.txt").write_text("\t".join(f"c{k}" for k in range(size)) + "\n1\n")
    with pytest.raises(UserError) as caught:
        list(read_tsv(tmp_path / "a.txt", ("document",)))
    assert len(str(caught.value)) <= 1000
    assert str(caught.value).startswith(f"{tmp_path}/a.txt:1: no column 'document'; found c0, c1")
    assert str(caught.value).endswith(f"c{size - 1}")
    for text in ("\x00" * 10**6, "가" * 1001):
        assert len(str(UserError(f"{text}: mend it"))) <= 1000 and str(UserError(f"{text}: mend it")).endswith(
            "mend it"
        )


def test_a_key_that_a_row_names_twice_is_a_bad_row(tmp_path):
    """As in .json; within a row too."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "text": "b"}\n{"text": {"k": 1, "k": 2}}\n{"text": "c"}\n')
    first, second, (where, row) = read_jsonl(path)
    assert isinstance(first, BadRow) and str(first) == f"{path}:1: key 'text' is written twice; remove one"
    assert isinstance(second, BadRow) and str(second) == f"{path}:2: key 'k' is written twice; remove one"
    assert (where, row) == (f"{path}:3", {"text": "c"})


def test_json_of_many_keys_is_read_and_a_key_that_is_there_twice_is_found(tmp_path):
    keys = {f"key {k}": k for k in range(20_000)}
    (tmp_path / "a.json").write_text(json.dumps(keys))
    assert read_json(tmp_path / "a.json") == keys
    (tmp_path / "a.json").write_text(json.dumps(keys)[:-1] + ', "key 7": 1}')
    with pytest.raises(UserError, match="key 'key 7' is written twice"):
        read_json(tmp_path / "a.json")


def test_json_that_would_fill_the_memory_is_refused_unread(tmp_path, monkeypatch):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**31 + 1)  # sparse: takes no room
    with pytest.raises(UserError, match=r"a\.json: 2,049 MiB of JSON, which is read as a whole; at most 2,048"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "text",
    ["가" * 3000, "가나 " * 900 + "다" * 2500 + " 라", "\u1112\u1161\u11ab" * 3000],
    ids=["one word", "words around it", "decomposed"],
)
def test_no_word_that_a_tokenizer_learns_from_makes_training_quadratic(tmp_path, text):
    """Merges are searched in whole words; nothing of the text is lost, and no syllable is cut."""
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (found,) = train_tokenizer.lines([tmp_path / "a.txt"], None)
    assert max(map(len, found.split(" "))) <= train_tokenizer.LONGEST_WORD
    composed = text.replace("\u1112\u1161\u11ab", "한")
    assert found.replace(" ", "") == composed.replace(" ", "")
