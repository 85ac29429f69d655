"""What is read, written and shown is whole characters, whatever the tokenizer."""

import unicodedata

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finetune.data import EvaluationSet
from finetune.generate import Shown
from finetune.paused import PausedGenerator
from finetune.scoring import spelled
from finetune.writing import Written, last_sentences
from kozero.data.rows import fit
from kozero.data.store import TextRow, open_or_build
from kozero.errors import UserError
from kozero.pause import Pauses, begins_inside, byte_characters
from models.language_model import load_tokenizer
from tests.helpers import sample_tokenizer
from tests.test_placements import byte_tokenizer

TEXT = "눈이 내렸고, 길은 😀 쀍쀍 하얗다.\n\n그는 'a b' . 갔다"


def merged_bytes():
    """Byte-level BPE with tokens from within one character to within the next; transformers is told to tidy up."""
    spell = {byte: char for char, byte in byte_characters().items()}
    merges = [(spell[a], spell[b]) for a, b in [(0xEB, 0x88), (0x20, 0xEA), (0x84, 0xEC)]]
    names = ["</s>", *spell.values(), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({name: k for k, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=True)


def byte_fallback():
    """Llama's decoder: what no token spells is written in bytes, a token each."""
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁눈이내렸고길은하얗다그는갔.,'ab"]
    vocabulary = {name: k for k, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def wordpiece():
    """BERT's: parts of words have a mark, and transformers is told to tidy up."""
    chars = sorted({char for char in TEXT if not char.isspace()})
    names = ["[UNK]", "[SEP]", *chars, *(f"##{char}" for char in chars), "n", "t", "s", "do", "n't"]
    tokenizer = Tokenizer(models.WordPiece({name: k for k, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    roles = {"unk_token": "[UNK]", "eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True, **roles)


def in_letters():
    """A token for each letter of a syllable."""
    names = ["<unk>", "</s>", *sorted(set(unicodedata.normalize("NFD", TEXT)))]
    tokenizer = Tokenizer(models.BPE({name: k for k, name in enumerate(names)}, [], unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFD(), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


KINDS = {kind.__name__: kind for kind in (byte_tokenizer, merged_bytes, byte_fallback, wordpiece, in_letters)}
BYTES = ["byte_tokenizer", "merged_bytes", "byte_fallback"]


@pytest.fixture(scope="module")
def generators(tmp_path_factory):
    """By the name of their tokenizer, which is loaded as that of a model is."""
    found = {"sample": sample_tokenizer()}
    for name, kind in KINDS.items():
        tokenizer = kind()
        if tokenizer.eos_token is None:
            tokenizer.add_special_tokens({"eos_token": "</s>"})
        tokenizer.save_pretrained(folder := tmp_path_factory.mktemp(name))
        found[name] = load_tokenizer(str(folder))
    return {name: PausedGenerator(None, one, Pauses(0, 0, inside=begins_inside(one))) for name, one in found.items()}


def whole(generator, prompt, ids):
    """What is shown without a stream."""
    piece = generator.continuation(prompt, np.array([]), ids)
    return Written(prompt, piece.text.strip(), [piece]).whole


@pytest.mark.parametrize("kind", [*KINDS, "sample"])
def test_a_stream_is_the_text_whatever_is_written(generators, capsys, kind):
    """Random tokens, parts of a text, and both, after prompts of every sort, cut anywhere."""
    generator, rng = generators[kind], np.random.default_rng(0)
    known, size, early = generator.ids(TEXT), len(generator.tokenizer), 0
    for trial in range(30):
        start, num = rng.integers(0, len(known)), rng.integers(0, 12)
        ids = [*known[start : start + num], *rng.integers(1, size, trial % 3 * 2).tolist(), *known[: rng.integers(9)]]
        prompt = ["눈", "눈이 ", " 그는", "길은\n", "쀍"][trial % 5]
        shown = Shown(generator, [prompt])
        shown.put(torch.tensor([generator.ids(prompt)]))
        for one in ids:
            shown.put(torch.tensor([one]))
        at_once = capsys.readouterr().out
        shown.end()
        assert at_once + capsys.readouterr().out == f"{whole(generator, prompt, ids)}\n", (prompt, ids)
        early += len(at_once) > len(prompt)
    assert early > 10, "most is shown before a text ends"


@pytest.mark.parametrize("kind", BYTES)
def test_a_text_that_ends_within_a_character_ends_before_it(generators, kind):
    generator = generators[kind]
    tokenizer, ids = generator.tokenizer, generator.ids(TEXT)
    for cut in range(1, len(ids) + 1):
        for end in ([], [tokenizer.eos_token_id]):
            text = spelled(tokenizer, [*ids[:cut], *end])
            assert TEXT.startswith(text) and (text == TEXT) == (cut == len(ids))
            assert len(text.encode()) > len(tokenizer.decode(ids[:cut]).rstrip("\ufffd").encode()) - 5
    genuine = "모름\ufffd"
    assert spelled(tokenizer, generator.ids(genuine)) == genuine


@pytest.mark.parametrize("kind", [*BYTES, "wordpiece", "sample"])
def test_a_text_and_what_follows_it_are_the_whole(generators, kind):
    """Wherever a text is cut between two words or characters, nothing comes between, and nothing is lost."""
    generator = generators[kind]
    text = "눈이 내렸고 길은 하얗다" if kind in ("wordpiece", "sample") else TEXT
    ids, inside = generator.ids(text), generator.pauses.inside
    cuts = [k for k in range(1, len(ids)) if not inside[ids[k]]]
    for cut in cuts:
        before = generator.tokenizer.decode(ids[:cut])
        if generator.ids(before) == ids[:cut]:
            assert whole(generator, before, ids[cut:]) == text
    assert len(cuts) > 5


@pytest.mark.parametrize("kind", [*KINDS, "sample"])
def test_the_tail_of_a_long_text_begins_with_a_whole_character(generators, kind):
    generator = generators[kind]
    text = unicodedata.normalize("NFD" if kind == "in_letters" else "NFC", "길은 하얗고 눈이 쀍쀍 내렸고 하얗다")
    for tail in range(1, len(generator.ids(text))):
        part = last_sentences(generator, text, tail)
        assert part and text.endswith(part) and "\ufffd" not in part
        assert not "\u1160" <= part[0] <= "\u11ff"
        assert len(generator.ids(part)) <= tail or len(unicodedata.normalize("NFC", part)) == 1


@pytest.mark.parametrize("kind", [*BYTES, "in_letters"])
def test_a_prompt_that_is_cut_begins_with_a_whole_character(generators, kind):
    generator = generators[kind]
    ids = generator.ids("길은 하얗다")
    for most in range(1, len(ids)):
        try:
            prompt = generator.prompt("길은 하얗다", most)
        except UserError as error:
            assert most < 4 and "leave no room for a prompt" in str(error)
            continue
        text = generator.tokenizer.decode(prompt.tolist())
        assert ids[-len(prompt) :] == prompt.tolist() and most - 4 < len(prompt) <= most
        assert unicodedata.normalize("NFC", "길은 하얗다").endswith(unicodedata.normalize("NFC", text))


@pytest.mark.parametrize("kind", [*BYTES, "in_letters"])
@pytest.mark.parametrize("span", [None, (14, 17)])
def test_a_context_that_is_cut_is_whole_characters(generators, tmp_path, kind, span):
    """At its end, and where an answer must stay in it also at its beginning."""
    generator = generators[kind]
    tokenizer, context = (
        generator.tokenizer,
        unicodedata.normalize("NFC", "길은 하얗고 눈이 내렸고 길은 하얗다. 그는 갔다"),
    )
    rows = [TextRow(context, "그는", "갔다", *([span] if span else []))]
    store = open_or_build(tmp_path, "cut", lambda: rows, tokenizer)
    least = store.lengths.sum() - store.lengths[0, 0] + (30 if span else 3)
    for capacity in range(least, store.lengths.sum()):
        fitted = fit(store, capacity, 0, generator.pauses.inside)
        first, last = fitted.cut[0]
        text = unicodedata.normalize("NFC", tokenizer.decode(store.tokens[first:last].tolist()).strip())
        assert text in context and (not span or context[slice(*span)] in text)
        assert capacity - (7 if span else 4) < fitted.length[0] == last - first + store.lengths[0, 1:].sum() <= capacity


@pytest.mark.parametrize("kind", BYTES)
def test_the_head_of_a_text_ends_with_a_whole_character(generators, tmp_path, kind):
    generator = generators[kind]
    store = open_or_build(tmp_path, "heads", lambda: [TextRow("", "", TEXT)], generator.tokenizer)
    for num in range(4, 30):
        heads = EvaluationSet(None, [], store).heads(generator.pauses.inside, num).store.rows[0]
        assert TEXT.startswith(generator.tokenizer.decode(store.tokens[heads[0] : heads[2]].tolist()))
