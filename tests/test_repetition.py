"""What counts as a repetition: words of the prompt and of what was written, but no pause and no padding.

The reference is a text alone, one token at a time: the model reads it with its pauses, and transformers' own processors
are given it without them."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as theirs

from finetune.paused import PausedGenerator
from kozero.pause import Pauses, begins_inside, filler_id
from tests.helpers import sample_tokenizer, toy_gpt2

TEXTS = ["긍정 . 부정", "그는 . 집에 . 갔다 . 새로운 영화 새로운", "영화 영화 영화"]
NEW, END = 6, sample_tokenizer().eos_token_id


@pytest.fixture(scope="module")
def lm():
    """A model that likes to repeat itself and full stops, but never writes the pause."""
    found = toy_gpt2(vocab_size=4096).eval()
    found.generation_config.suppress_tokens = [sample_tokenizer().convert_tokens_to_ids("<unused0>")]
    return found


def generator_of(lm, placement: str, num: int) -> PausedGenerator:
    tokenizer = sample_tokenizer()
    token = filler_id(tokenizer) if placement == "filler" else tokenizer.convert_tokens_to_ids("<unused0>")
    return PausedGenerator(lm, tokenizer, Pauses(token, num, placement, begins_inside(tokenizer)))


def processors(settings: dict, words: list[int]) -> list:
    """Transformers' own, in its order."""
    prompt = torch.tensor([words])
    made = {
        "encoder_repetition_penalty": lambda v: theirs.EncoderRepetitionPenaltyLogitsProcessor(v, prompt),
        "repetition_penalty": theirs.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": theirs.NoRepeatNGramLogitsProcessor,
        "encoder_no_repeat_ngram_size": lambda v: theirs.EncoderNoRepeatNGramLogitsProcessor(v, prompt),
    }
    return [make(settings[name]) for name, make in made.items() if name in settings]


class OnWords(LogitsProcessor):
    """Transformers' processors, given one text without the pauses of its prompt."""

    def __init__(self, settings, words, length):
        self.each, self.words, self.length = processors(settings, words), torch.tensor([words]), length

    def __call__(self, input_ids, scores):
        found = torch.cat([self.words.expand(len(input_ids), -1), input_ids[:, self.length :]], 1)
        for one in self.each:
            scores = one(found, scores)
        return scores


SETTINGS = [
    {"repetition_penalty": 2.0},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2, "repetition_penalty": 0.5},
    {"encoder_no_repeat_ngram_size": 1, "encoder_repetition_penalty": 0.7},
]


class Recorder(LogitsProcessor):
    """Keeps the scores of each step, which come to it last."""

    def __init__(self):
        self.scores = []

    def __call__(self, input_ids, scores):
        self.scores.append(scores.clone())
        return scores


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: " ".join(settings))
@pytest.mark.parametrize("placement", ["filler", "append", "random", "prepend"])
def test_no_pause_and_no_padding_is_a_repetition(lm, placement, settings):
    """Logits of every step, in a batch and alone."""
    generator, ours = generator_of(lm, placement, 3), Recorder()
    asked = {"max_new_tokens": NEW, "do_sample": False}
    found = generator.continue_texts(TEXTS, 3, **asked, **settings, logits_processor=[ours])
    for k, text in enumerate(TEXTS):
        prompt, alone = generator.prompt(text), Recorder()
        both = LogitsProcessorList([OnWords(settings, generator.ids(text), len(prompt)), alone])
        wanted = lm.generate(torch.from_numpy(prompt[None]), logits_processor=both, eos_token_id=END, **asked)
        assert found[k].ids == wanted[0, len(prompt) :].tolist()
        for step, scores in enumerate(alone.scores):
            torch.testing.assert_close(ours.scores[step][k], scores[0], rtol=1e-4, atol=1e-4)


def test_nor_for_beams(lm):
    settings, asked = SETTINGS[2], {"max_new_tokens": NEW, "do_sample": False, "num_beams": 2}
    for placement in ("filler", "random"):
        generator = generator_of(lm, placement, 3)
        for text, found in zip(TEXTS, generator.continue_texts(TEXTS, 3, **asked, **settings), strict=True):
            prompt = generator.prompt(text)
            alone = LogitsProcessorList([OnWords(settings, generator.ids(text), len(prompt))])
            wanted = lm.generate(torch.from_numpy(prompt[None]), logits_processor=alone, eos_token_id=END, **asked)
            assert found.ids == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("real", [False, True])
def test_a_full_stop_is_a_repetition_where_it_is_one(lm, real):
    """The logit of "." after three fillers, as it is and halved."""
    generator = generator_of(lm, "filler", 3)
    stop = generator.pauses.token_id
    text = "긍정 . 부정" if real else "긍정 부정"
    assert (stop in generator.ids(text)) is real

    recorder = Recorder()
    shared = {"max_new_tokens": 1, "do_sample": False, "logits_processor": [recorder]}
    for penalty in (1.0, 2.0):
        generator.continue_texts([text], **shared, repetition_penalty=penalty)
    plain, penalised = (scores[0, stop].item() for scores in recorder.scores)
    assert penalised == pytest.approx((plain / 2 if plain > 0 else plain * 2) if real else plain)


def test_settings_of_the_folder_count_as_well(lm):
    """A hub model's generation_config.json may ask for a penalty."""
    generator = generator_of(lm, "filler", 3)
    asked = {"max_new_tokens": NEW, "do_sample": False}
    wanted = generator.continue_texts(TEXTS, **asked, no_repeat_ngram_size=1)
    lm.generation_config.no_repeat_ngram_size = 1
    try:
        found = generator.continue_texts(TEXTS, **asked)
    finally:
        lm.generation_config.no_repeat_ngram_size = 0
    assert [one.ids for one in found] == [one.ids for one in wanted]
