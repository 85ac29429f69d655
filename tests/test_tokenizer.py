"""Tokenizers of every kind: which files they are read from, and that no text becomes one of their special tokens."""

import json
import os
import shutil
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import (
    BertWordPieceTokenizer,
    ByteLevelBPETokenizer,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kozero.data.store import encodings
from kozero.errors import UserError
from models.language_model import load, load_tokenizer
from scripts import train_tokenizer
from tests.helpers import ROOT, SAMPLE_TOKENIZER

DATA = Path(os.environ.get("KOZERO_DATA", ROOT.parent / "shared" / "data"))
NAMES = ["<unk>", "<s>", "</s>", "<pad>", "<unused0>"]
CORPUS = ["<s>영화</s>", "<pad><pad> 영화 <unused0>", "좋은 영화 a</s>b", "</s>", "<unk> 영화<s>"] * 20
FULL_WIDTH = str.maketrans({chr(code): chr(code + 0xFEE0) for code in range(0x21, 0x7F)})
BESIDE = ("", " ", "영화", "<", "뷁")
TEXTS = [f"{a}{name}{b}" for name in NAMES for a in BESIDE for b in BESIDE]
TEXTS += [text.translate(FULL_WIDTH) for text in TEXTS] + ["".join(NAMES), "</S>", "<\u200b/s>"]


def trained(model: str, **parts) -> Tokenizer:
    """A tokenizer of the tokenizers library that has learned to spell its special tokens."""
    kinds = {
        "bpe": (models.BPE(unk_token="<unk>"), trainers.BpeTrainer),
        "unigram": (models.Unigram(), trainers.UnigramTrainer),
        "wordpiece": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer),
        "wordlevel": (models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer),
    }
    kind, trainer = kinds[model]
    backend = Tokenizer(kind)
    for name, part in parts.items():
        setattr(backend, name, part)
    others = {"unk_token": "<unk>"} if model == "unigram" else {}
    backend.train_from_iterator(CORPUS, trainer(vocab_size=150, special_tokens=NAMES, show_progress=False, **others))
    return without_gaps(backend)


def without_gaps(backend: Tokenizer) -> Tokenizer:
    """The trainer of whole words leaves out the ids of special tokens that it has met in text."""
    state = json.loads(backend.to_str())
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, dict):
        state["model"]["vocab"] = {word: k for k, word in enumerate(sorted(vocabulary, key=vocabulary.get))}
    return Tokenizer.from_str(json.dumps(state))


def added(backend: Tokenizer, **other) -> Tokenizer:
    """Without its special tokens and with other ones, which a file may hold as well."""
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token | other for token in state["added_tokens"]]
    return Tokenizer.from_str(json.dumps(state))


def whole_words(backend: Tokenizer) -> Tokenizer:
    """Words that the vocabulary holds are taken as they are, as Llama 3 does."""
    state = json.loads(backend.to_str())
    state["model"] |= {"ignore_merges": True, "merges": []}
    return Tokenizer.from_str(json.dumps(state))


SPACES = {"normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])}
WORDS = {"pre_tokenizer": pre_tokenizers.Metaspace()}
KINDS = {
    "bpe": lambda: trained("bpe", **WORDS),
    "bpe with normalised spaces": lambda: trained("bpe", **SPACES),
    "bpe of whole words": lambda: whole_words(trained("bpe", **WORDS)),
    "bpe after nfkc": lambda: trained("bpe", normalizer=normalizers.NFKC(), **WORDS),
    "bpe after lower case": lambda: trained("bpe", normalizer=normalizers.Lowercase(), **WORDS),
    "bpe without its spelling before nfkc": lambda: trained(
        "bpe", normalizer=normalizers.Sequence([normalizers.Replace("</s>", ""), normalizers.NFKC()]), **WORDS
    ),
    "bytes": lambda: trained("bpe", pre_tokenizer=pre_tokenizers.ByteLevel(use_regex=False)),
    "unigram": lambda: trained("unigram", **WORDS),
    "unigram after nfkc": lambda: trained("unigram", normalizer=normalizers.NFKC(), **WORDS),
    "wordpiece": lambda: trained("wordpiece", pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
    "wordlevel": lambda: trained("wordlevel", pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
    "added tokens that are not special": lambda: added(trained("bpe", **WORDS), special=False),
    "added tokens of normalised text": lambda: added(
        trained("unigram", normalizer=normalizers.NFKC(), **WORDS), special=False, normalized=True
    ),
}


def saved(folder: Path, backend: Tokenizer, **roles) -> str:
    roles = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"} | roles
    PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_becomes_a_special_or_spare_token(tmp_path, kind):
    """By ids alone: beside any other text, in full width, and in any tokenizer's own words."""
    backend = KINDS[kind]()
    tokenizer = load_tokenizer(saved(tmp_path, backend))
    reserved = {backend.token_to_id(name) for name in NAMES if name != "<unk>"}
    assert None not in reserved
    by_store = [one.ids for one in encodings(TEXTS, tokenizer)]
    assert by_store == tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    assert reserved.isdisjoint(number for ids in by_store for number in ids)
    assert reserved.isdisjoint(tokenizer.convert_tokens_to_ids(tokenizer.tokenize("".join(TEXTS))))


@pytest.mark.parametrize("kind", KINDS)
def test_other_text_keeps_its_ids_and_the_export_loads_alike(tmp_path, kind):
    """What keeps special tokens out touches nothing else, in this process and after the tokenizer was written."""
    backend = KINDS[kind]()
    tokenizer = load_tokenizer(saved(tmp_path / "first", backend))
    plain = ["좋은 영화", "a 영화 b", "< s > / 영화", "영화>", "뷁", "unused0 pad"]
    wanted = [one.ids for one in backend.encode_batch(plain, add_special_tokens=False)]
    assert [one.ids for one in encodings(plain, tokenizer)] == wanted
    tokenizer.save_pretrained(tmp_path / "second")
    again = load_tokenizer(str(tmp_path / "second"))
    assert [one.ids for one in encodings(TEXTS, again)] == [one.ids for one in encodings(TEXTS, tokenizer)]
    assert again.get_vocab() == tokenizer.get_vocab()


def test_text_that_spells_a_token_is_still_all_there(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path, trained("bpe", **WORDS)))
    (found,) = encodings(["영화</s>영화 <s>"], tokenizer)
    assert "".join(tokenizer.convert_ids_to_tokens(found.ids)).replace("▁", " ").strip() == "영화</s>영화 <s>"


@pytest.mark.parametrize("kind", ["bpe", "bytes", "unigram"])
def test_the_token_for_unknown_characters_is_no_text_where_its_letters_are_known(tmp_path, kind):
    backend = KINDS[kind]()
    tokenizer = load_tokenizer(saved(tmp_path, backend))
    for text in ("<unk>", "영화<unk> 영화"):
        (found,) = encodings([text], tokenizer)
        assert backend.token_to_id("<unk>") not in found.ids


def test_a_tokenizer_without_such_words_stays_as_it_is():
    backend = Tokenizer.from_file(str(SAMPLE_TOKENIZER / "tokenizer.json"))
    assert load_tokenizer(str(SAMPLE_TOKENIZER)).backend_tokenizer.to_str() == backend.to_str()


@pytest.mark.parametrize("roles", [{"eos_token": "<unk>"}, {"eos_token": "a"}, {"pad_token": "영"}])
def test_a_tokenizer_that_cannot_keep_a_role_out_of_text_is_refused(tmp_path, roles):
    """Its unknown characters would end a text, or a letter of every text has a role."""
    (token,) = roles.values()
    folder = saved(tmp_path, trained("bpe", **WORDS), **roles)
    with pytest.raises(UserError, match=f"tokenizer {folder}: text becomes its token '{token}', which no text may"):
        load_tokenizer(folder)


def test_a_role_that_only_a_form_of_full_width_becomes_is_refused_too(tmp_path):
    """The letter itself is taken out of every text, and NFKC makes it of another one."""
    backend = trained("bpe", **WORDS)
    backend.normalizer = normalizers.Sequence([normalizers.Replace("a", ""), normalizers.NFKC()])
    folder = saved(tmp_path, backend, eos_token="a")
    with pytest.raises(UserError, match=f"tokenizer {folder}: text becomes its token 'a', which no text may"):
        load_tokenizer(folder)


def test_the_pause_is_no_text_even_where_it_is_a_word_of_the_vocabulary(tmp_path):
    """`<wait>` has no role, is no added token, and the merges spell it."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=NAMES[:4], show_progress=False)
    backend.train_from_iterator(["a<wait>b <wait>"] * 20, trainer)
    folder, config = saved(tmp_path / "tokenizer", backend), tmp_path / "config.json"
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 1, "n_positions": 8, "vocab_size": backend.get_vocab_size()}
    config.write_text(json.dumps({"model_type": "gpt2"} | sizes))
    assert backend.token_to_id("<wait>") in backend.encode("뷁<wait>뷁").ids
    model = load(None, str(config), folder, pause_token="<wait>", with_pauses=True, seed=0)
    assert model.pause_id == backend.token_to_id("<wait>")
    assert all(
        model.pause_id not in one.ids for one in encodings(["뷁<wait>뷁", "<wait>", "<wait> <wait>"], model.tokenizer)
    )


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_corpus_with_markup_teaches_no_special_token(tmp_path, monkeypatch, kind):
    """Read by the tokenizers library alone: the file itself is right, not only what is made of it here."""
    corpus = tmp_path / "corpus.txt"
    names = train_tokenizer.SPECIAL[kind]
    corpus.write_text("\n".join([*CORPUS, *(f"a{name}b {name}" for name in names)] * 9), encoding="utf-8")
    run(monkeypatch, corpus, tmp_path, "--kind", kind, "--vocab_size", "400")
    backend = Tokenizer.from_file(str(tmp_path / "made" / "tokenizer.json"))
    backend.encode_special_tokens = True
    found = [
        number for one in backend.encode_batch([*TEXTS, "".join(names)], add_special_tokens=False) for number in one.ids
    ]
    assert set(found) & set(range(len(names))) <= {backend.token_to_id(name) for name in ("<unk>", "[UNK]")}


def run(monkeypatch, file: Path, folder: Path, *flags: str) -> None:
    """scripts/train_tokenizer.py."""
    flags = ["--files", str(file), "--output_dir", str(folder / "made"), *flags]
    monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", *flags])
    train_tokenizer.main()


# Files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reviews() -> list[str]:
    """1,000 real ones, or those of the sample data."""
    real = DATA / "nsmc" / "ratings_test.txt"
    path = real if real.exists() else ROOT / "sample_data" / "nsmc" / "ratings_train.txt"
    with path.open(encoding="utf-8") as file:
        return [line.split("\t")[1] for line in islice(file, 1, 1001)]


def gpt2_files(folder: Path, texts: list[str]) -> None:
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(texts, 500, special_tokens=["<|endoftext|>"], show_progress=False)
    backend.save_model(str(folder))


def bert_files(folder: Path, texts: list[str]) -> None:
    backend = BertWordPieceTokenizer(lowercase=False)
    backend.train_from_iterator(texts, 500, show_progress=False)
    backend.save_model(str(folder))


def json_file(folder: Path, texts: list[str]) -> None:
    shutil.copytree(SAMPLE_TOKENIZER, folder, dirs_exist_ok=True)


def sentencepiece_file(folder: Path, texts: list[str], name: str, kind: str, **ids: int) -> None:
    trainer = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed").SentencePieceTrainer
    with (folder / name).open("wb") as file:
        trainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=1500, model_type=kind,
            byte_fallback=kind == "bpe", character_coverage=0.98, minloglevel=2, hard_vocab_limit=False, **ids,
        )  # fmt: skip


T5 = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
FILES = {
    "GPT2Tokenizer": gpt2_files,
    "BertTokenizer": bert_files,
    "TokenizersBackend": json_file,
    "LlamaTokenizer": partial(sentencepiece_file, name="tokenizer.model", kind="bpe"),
    "T5Tokenizer": partial(sentencepiece_file, name="spiece.model", kind="unigram", **T5),
    "XLMRobertaTokenizer": partial(sentencepiece_file, name="sentencepiece.bpe.model", kind="unigram"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_form_of_files_has_autotokenizers_ids(tmp_path, reviews, name):
    FILES[name](tmp_path, reviews)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "do_lower_case": False}))
    wanted = AutoTokenizer.from_pretrained(tmp_path)
    found = load_tokenizer(str(tmp_path), writes=False)
    for tokenizer in (found, reloaded(found, tmp_path / "exported")):
        assert [one.ids for one in encodings(reviews, tokenizer)] == wanted(reviews, add_special_tokens=False)[
            "input_ids"
        ]
    reserved = set(found.all_special_ids) - {found.unk_token_id}
    assert reserved.isdisjoint(number for one in encodings(TEXTS, found) for number in one.ids)


def reloaded(tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedTokenizerFast:
    tokenizer.save_pretrained(folder)
    return load_tokenizer(str(folder), writes=False)


def test_a_tokenizer_json_is_read_as_it_is_whatever_the_models_type(tmp_path, reviews):
    """KoGPT2's folder names no class. AutoTokenizer makes of its type a byte-level tokenizer, which finds no Korean."""
    shutil.copy(SAMPLE_TOKENIZER / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    wanted = [one.ids for one in backend.encode_batch(reviews, add_special_tokens=False)]
    assert [one.ids for one in encodings(reviews, load_tokenizer(str(tmp_path)))] == wanted


@pytest.mark.parametrize(
    ("files", "kind", "said"),
    [
        (["vocab.json"], "GPT2Tokenizer", "vocab.json without merges.txt"),
        (["merges.txt"], "GPT2Tokenizer", "merges.txt without vocab.json"),
        (["vocab.json", "merges.txt"], None, "no tokenizer.json, and nothing that tells how its other files are read"),
        (["vocab.txt"], None, "add a tokenizer_config.json with their tokenizer_class"),
        (["vocab.txt"], "GPT2Tokenizer", "no tokenizer.json, and no vocab.json, which GPT2Tokenizer needs"),
        ([], "GPT2Tokenizer", "no tokenizer.json, and no vocab.json, which GPT2Tokenizer needs"),
        ([], "BertTokenizer", "no tokenizer.json, and no vocab.txt, which BertTokenizer needs"),
        ([], None, "no tokenizer.json, and nothing that tells how its other files are read"),
    ],
)
def test_files_that_are_missing_are_named(tmp_path, files, kind, said):
    gpt2_files(tmp_path, CORPUS)
    bert_files(tmp_path, CORPUS)
    for name in {"vocab.json", "merges.txt", "vocab.txt"} - set(files):
        (tmp_path / name).unlink()
    if kind:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(tmp_path), writes=False)
    assert str(caught.value).startswith(f"tokenizer {tmp_path}: ") and said in str(caught.value)


@pytest.mark.parametrize("installed", [True, False])
def test_a_model_file_that_cannot_be_read_is_told(tmp_path, monkeypatch, installed):
    """In one line, and not as transformers does, by a package that would not help."""
    monkeypatch.setattr("models.tokenizer.is_sentencepiece_available", lambda: installed)
    (tmp_path / "tokenizer.model").write_bytes(b"no sentencepiece model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    said = "is no sentencepiece model" if installed else "needs: pip install sentencepiece"
    with pytest.raises(UserError, match=f"^tokenizer {tmp_path}: its .model file {said}$"):
        load_tokenizer(str(tmp_path))


def test_of_a_model_file_without_a_class_no_tokenizer_is_made_that_loses_spaces(tmp_path, reviews):
    sentencepiece_file(tmp_path, reviews, "tokenizer.model", "unigram")
    with pytest.raises(
        UserError, match=r"nothing that tells how its other files are read; add a tokenizer_config.json"
    ):
        load_tokenizer(str(tmp_path))


# What is learned --------------------------------------------------------------------------------------------------

REVIEWS = "id\tdocument\tlabel\n9977\t재미있는 영화\t1\n9988\t지루한 영화\t0\n"


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (REVIEWS, []),
        (REVIEWS, ["--column", "document"]),
        ("document\n재미있는 영화\n지루한 영화\n", []),
        (REVIEWS.replace("document", "review"), ["--column", "review"]),
        ("재미있는 영화\t1\n지루한 영화\t0\n", ["--column", "0"]),
    ],
)
def test_of_a_file_with_columns_the_texts_alone_are_learned(tmp_path, monkeypatch, text, flags):
    (tmp_path / "ratings.txt").write_text(text, encoding="utf-8")
    run(monkeypatch, tmp_path / "ratings.txt", tmp_path, "--vocab_size", "150", *flags)
    vocabulary = Tokenizer.from_file(str(tmp_path / "made" / "tokenizer.json")).get_vocab()
    letters = {letter for token, number in vocabulary.items() if number > 106 for letter in token}
    assert letters == set("▁재미있는영화지루한")


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        (REVIEWS.replace("document", "review"), [], ":1: 3 tab-separated columns; name the one to read with --column"),
        (REVIEWS, ["--column", "text"], ":1: no column 'text'; found id, document, label"),
        (REVIEWS, ["--column", "7"], ":1: no column 7; the line has 3"),
    ],
)
def test_columns_that_nobody_chose_are_not_learned(tmp_path, monkeypatch, text, flags, said):
    (tmp_path / "ratings.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        run(monkeypatch, tmp_path / "ratings.txt", tmp_path, "--vocab_size", "150", *flags)
    assert f"{tmp_path}/ratings.txt{said}" in str(caught.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["KorQuAD.json", "essays.jsonl", "reviews.csv"])
def test_the_syntax_of_a_data_file_is_not_learned(tmp_path, monkeypatch, name):
    (tmp_path / name).write_text('{"text": "영화"}', encoding="utf-8")
    with pytest.raises(UserError, match=f"{name}: holds rows, not texts"):
        run(monkeypatch, tmp_path / name, tmp_path)


def test_the_sample_line_is_tokenised_as_models_read_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("<s>영화</s> 영화\n" * 20, encoding="utf-8")
    run(monkeypatch, tmp_path / "a.txt", tmp_path, "--vocab_size", "150")
    shown = capsys.readouterr().out.split(" -> ")[1].splitlines()[0].split()
    read = load_tokenizer(str(tmp_path / "made")).tokenize("<s>영화</s> 영화")
    assert shown == read and not {"<s>", "</s>"} & {*shown}


def test_a_vocabulary_that_the_text_does_not_fill_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "one.txt").write_text("영화\n")
    run(monkeypatch, tmp_path / "one.txt", tmp_path, "--vocab_size", "300")
    assert "--vocab_size 300: the text gives no more than 112 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_vocabulary_that_the_characters_alone_exceed_is_told(monkeypatch, tmp_path, capsys, kind):
    (tmp_path / "one.txt").write_text("".join(map(chr, range(0xAC00, 0xAC00 + 60))), encoding="utf-8")
    run(monkeypatch, tmp_path / "one.txt", tmp_path, "--kind", kind, "--vocab_size", "120")
    assert "warning: --vocab_size 120: the characters of the text alone take " in capsys.readouterr().out


def test_a_size_that_would_fill_the_memory_is_refused(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"--vocab_size 999999999999: must be .* at most 1,048,576"):
        run(monkeypatch, tmp_path / "no.txt", tmp_path, "--vocab_size", "999999999999")
