"""Characters that a tokenizer lacks: their share is told, nothing is learned of the token that stands for them, and no
score that it would improve compares tokenizers."""

import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from finetune import evaluate
from finetune.arguments import DataArguments, ModelArguments
from finetune.data import cached_store, evaluation_set
from finetune.setup import load_model
from finetune.tasks import TASKS, Source
from kozero import distributed
from kozero.data.batches import TrainingRows, collate
from kozero.data.framing import Framing
from kozero.data.order import Order
from kozero.data.store import TextRow, encodings, open_or_build, unknown_id
from kozero.metrics import exact_match
from kozero.pause import IGNORE, InferencePauseArguments, Pauses
from models.language_model import export, load
from pretrain.arguments import CorpusArguments
from pretrain.chunks import Blocks, Numbered
from pretrain.data import open_shards
from pretrain.rows import BlockRows, EncoderRows, Masking, Tokens
from tests.helpers import ROOT, SAMPLE_DATA, SAMPLE_TOKENIZER, sample_tokenizer

DATA = Path(os.environ.get("KOZERO_DATA", ROOT.parent / "shared" / "data"))
TEXTS = ["영화 뷁 좋아요 좋은 영화", "뷁", "재미있는 영화뷁", "뷁뷁 긍정"]  # the sample tokenizer has no 뷁
UNK = 5


@pytest.fixture
def process_group():
    threads = torch.get_num_threads()
    distributed.setup()
    yield
    distributed.shutdown()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with random weights that has met no pauses."""
    folder = tmp_path_factory.mktemp("unknown") / "model"
    config = str(ROOT / "models" / "tiny_config.json")
    model = load(None, config, str(SAMPLE_TOKENIZER), pause_token="<unused0>", with_pauses=False, seed=1)
    export(folder, model, dict(model.module.named_parameters()), {}, "# card")
    return folder


def known_losses(lm, prefix: list[int], target: list[int]) -> torch.Tensor:
    """(K,) nats of each token of a target but unknown ones, by plain transformers."""
    ids = torch.tensor([prefix + target])
    labels = torch.tensor([IGNORE] * len(prefix) + [IGNORE if number == UNK else number for number in target])
    with torch.no_grad():
        logits = lm(ids).logits[0, :-1].double()
    losses = F.cross_entropy(logits, labels[1:], reduction="none")
    return losses[labels[1:] != IGNORE]


@pytest.mark.parametrize("num_pauses", [0, 2])
def test_there_is_no_loss_on_an_unknown_token(tmp_path, folder, num_pauses):
    """The loss of a step is the sum over the other tokens of the targets, divided by their number."""
    tokenizer, lm = sample_tokenizer(), AutoModelForCausalLM.from_pretrained(folder).eval()
    pauses = Pauses(tokenizer.convert_tokens_to_ids("<unused0>"), num_pauses)
    store = open_or_build(tmp_path, "rows", lambda: [TextRow("", "긍정", text) for text in TEXTS], tokenizer)
    rows = TrainingRows(store, pauses, 64, "packed", 0)
    batch = collate([rows.texts(number) for number in range(len(rows))])
    model = load(str(folder), None, None, pause_token="<unused0>", with_pauses=False, seed=1)
    with torch.no_grad():
        found = model.module.eval()(**batch.inputs).item()
    prefix = tokenizer("긍정")["input_ids"] + [pauses.token_id] * num_pauses
    targets = [tokenizer(f" {text}")["input_ids"] + [tokenizer.eos_token_id] for text in TEXTS]
    wanted = torch.cat([known_losses(lm, prefix, target) for target in targets])
    assert any(UNK in target for target in targets) and UNK not in batch.inputs["target_ids"]
    assert UNK in batch.inputs["input_ids"]  # it is still read
    assert batch.num_targets == (len(wanted),)
    assert found == pytest.approx(wanted.sum().item(), rel=1e-5)


def test_perplexity_is_of_the_known_tokens_and_no_score_compares_tokenizers(tmp_path, folder, monkeypatch, capsys):
    file, out = tmp_path / "texts.jsonl", tmp_path / "scores.json"
    file.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    shared = ["--task", "essay", "--model_name_or_path", str(folder), "--cache_dir", str(tmp_path / "cache")]
    argv = ["evaluate.py", *shared, "--validation_file", str(file), "--output_file", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    evaluate.main()
    tokenizer, lm = sample_tokenizer(), AutoModelForCausalLM.from_pretrained(folder).eval()
    end = [tokenizer.eos_token_id]
    ids = [tokenizer(text)["input_ids"] + end for text in TEXTS]
    parts = [(ids[0][:1], ids[0][1:]), *((end, one) for one in ids[1:])]
    losses = torch.cat([known_losses(lm, *part) for part in parts])
    scores = json.loads(out.read_text())["scores"]
    assert scores == pytest.approx({"loss": losses.mean().item(), "perplexity": math.exp(losses.mean())}, rel=1e-4)
    assert "so there is no nats_per_character" in capsys.readouterr().out


def test_a_language_model_is_pretrained_on_all_tokens_but_unknown_ones(process_group, tmp_path, capsys):
    tokenizer = sample_tokenizer()
    (tmp_path / "corpus.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    arguments = CorpusArguments(corpus_path=str(tmp_path / "corpus.txt"), cache_dir=str(tmp_path / "cache"))
    (shard,) = open_shards(arguments, tokenizer)
    blocks = Numbered([Blocks(shard, 6, tokenizer.eos_token_id, 0)], held_out=False)
    order = Order(len(blocks), len(blocks), 1, 0, blocks.lengths)
    rows = BlockRows(blocks, order, 6, unk_id=unknown_id(tokenizer))
    predicts = np.concatenate([text.predicts for row in range(len(blocks)) for text in rows.texts(row)])
    backend = Tokenizer.from_file(str(SAMPLE_TOKENIZER / "tokenizer.json"))
    ids = [number for text in TEXTS for number in backend.encode(text).ids]
    wanted = Counter(number for number in ids if number != UNK) + Counter({tokenizer.eos_token_id: len(TEXTS)})
    assert Counter(predicts[predicts != IGNORE].tolist()) == wanted
    share = f"{ids.count(UNK) / len(ids):.2%} of the tokens are <unk>, which stands for characters that the tokenizer"
    assert f"corpus: {share} lacks; there is no loss on them" in capsys.readouterr().out


def test_an_encoder_predicts_every_hidden_token_but_unknown_ones():
    special = np.arange(60) < 10
    unit, unk = np.array([4, 11, 4, 13, 14, 4, 4, 17]), 4

    class One:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, number: int) -> list[np.ndarray]:
            return [unit]

        def lengths(self, numbers: np.ndarray) -> np.ndarray:
            return np.full(len(numbers), len(unit))

    def sample(tokens: Tokens, place: int):
        masking = Masking(tokens, share=0.5)
        return EncoderRows(One(), Order(1, 1, 1, 3, One().lengths), masking, "mlm", False, 16).sample(place)

    words = np.zeros(60, dtype=bool)
    for place in range(20):
        all_hidden = sample(Tokens(Framing(1, 2), 3, 60, special, words), place)
        found = sample(Tokens(Framing(1, 2), 3, 60, special, words, unk), place)
        assert np.array_equal(found.ids, all_hidden.ids)
        assert np.array_equal(found.predicts, np.where(all_hidden.predicts == unk, IGNORE, all_hidden.predicts))


def test_the_end_of_a_text_is_learned_where_it_stands_for_unknown_characters_too():
    """GPT-2's tokenizer names one token for both; its text has neither."""
    backend = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    both = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<end>", eos_token="<end>")
    assert unknown_id(both) == -1
    assert unknown_id(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")) == -1
    assert unknown_id(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>")) == 2


# What is told -----------------------------------------------------------------------------------------------------


def korquad(path: Path) -> tuple[Source, list[tuple[str, ...]]]:
    """A file, and the answers of each of its questions."""
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    questions = [question for article in articles for part in article["paragraphs"] for question in part["qas"]]
    return Source(path), [tuple(answer["text"] for answer in question["answers"]) for question in questions]


def test_the_share_of_unknown_tokens_and_of_targets_with_one_is_told(process_group, tmp_path, capsys):
    source, answers = korquad(SAMPLE_DATA / "korquad" / "KorQuAD_v1.0_dev.json")
    store = cached_store(source, TASKS["korquad"], "train", 0, sample_tokenizer(), str(tmp_path))
    backend = Tokenizer.from_file(str(SAMPLE_TOKENIZER / "tokenizer.json"))
    lossy = sum(UNK in backend.encode(f" {texts[0]}").ids for texts in answers)
    share = f"{np.mean(np.asarray(store.tokens) == UNK):.2%} of the tokens are <unk>, which stands for characters that"
    assert lossy and (
        f"{source}: {share} the tokenizer lacks; {lossy / len(answers):.2%} of the targets hold one, without loss on it"
        in capsys.readouterr().out
    )


def test_nothing_is_told_of_a_set_that_is_spelled_whole(process_group, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("id\tdocument\tlabel\n1\t좋은 영화\t1\n", encoding="utf-8")
    cached_store(Source(tmp_path / "a.txt"), TASKS["nsmc"], "train", 0, sample_tokenizer(), str(tmp_path))
    assert "<unk>" not in capsys.readouterr().out


@pytest.mark.parametrize("data", ["sample", pytest.param("real", marks=pytest.mark.slow)])
def test_answers_that_cannot_be_written_are_told_with_the_best_score_there_is(process_group, tmp_path, capsys, data):
    """By writing each answer's own tokens. Of KorQuAD's dev set: 1,087 of 5,774, an exact match of 82.2 at most."""
    folder = SAMPLE_DATA / "korquad" if data == "sample" else DATA / "korquad"
    if not folder.exists():
        pytest.skip(f"{folder} is not there")
    source, answers = korquad(folder / "KorQuAD_v1.0_dev.json")
    tokenizer, task = sample_tokenizer(), TASKS["korquad"]
    arguments = DataArguments(task="korquad", cache_dir=str(tmp_path))
    evaluation_set(source, task, arguments, tokenizer)
    ids = [one.ids for one in encodings([f" {texts[0]}" for texts in answers], tokenizer)]
    lost = sum(UNK in one for one in ids)
    best = np.mean(
        [
            exact_match(tokenizer.decode(one, skip_special_tokens=True), texts[0])
            for one, texts in zip(ids, answers, strict=True)
        ]
    )
    told = f"{source}: {lost:,} of {len(answers):,} answers cannot be written as they are; exact_match is "
    assert f"{told}{100 * best:.1f} at most" in capsys.readouterr().out
    if data == "real":
        assert (lost, len(answers), round(100 * best, 1)) == (1087, 5774, 82.2)


def test_rows_of_a_model_that_no_token_has_are_told(process_group, tmp_path, capsys):
    tiny = json.loads((ROOT / "models" / "tiny_config.json").read_text(encoding="utf-8"))
    sizes = {"n_layer": 1, "n_embd": 16, "n_inner": 16}
    for vocab_size, said in ((4096, False), (4200, False), (5000, True)):
        config = tmp_path / "config.json"
        config.write_text(json.dumps(tiny | sizes | {"vocab_size": vocab_size}))
        load_model(ModelArguments(config_file=str(config)), InferencePauseArguments(), with_pauses=False, seed=0)
        told = "the tokenizer has 4,096 tokens, fewer than the model: 904 of 5,000 rows are never used"
        assert (told in capsys.readouterr().out) == said
