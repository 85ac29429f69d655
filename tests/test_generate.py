"""finetune/generate.py: decoding settings, long texts, files, metrics."""

import io
import itertools
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from finetune import generate, paused, writing
from finetune.decoding import DecodingArguments
from finetune.paused import Continuation, PausedGenerator
from finetune.writing import last_sentences, whole_sentences, write_long
from kozero import text_metrics
from kozero.errors import UserError
from kozero.text_metrics import distinct, repetition, self_bleu, variety


def call(monkeypatch, model, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", "--model_name_or_path", model, *map(str, flags)])
    generate.main()


def test_settings_reach_transformers(monkeypatch, tmp_path, paused_model):
    """Beams against transformers' own call; what is written is in the file with its settings."""
    out = tmp_path / "out.jsonl"
    beams = ("--temperature", 0, "--num_beams", 3, "--no_repeat_ngram_size", 2, "--max_new_tokens", 12)
    call(monkeypatch, paused_model, "--prompt", "긍정", *beams, "--output_file", out)
    (row,) = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    generator = PausedGenerator.from_pretrained(paused_model)
    ids = torch.from_numpy(generator.prompt("긍정")[None])
    wanted = generator.lm.generate(ids, num_beams=3, no_repeat_ngram_size=2, max_new_tokens=12, do_sample=False)
    assert row["text"] == generator.tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert row["settings"]["num_beams"] == 3 and row["settings"]["pauses"] == {"num": 3, "placement": "append"}
    found = generator.ids(row["text"])
    assert len(found) == len({*itertools.pairwise(found)}) + 1


def test_prompts_come_from_a_file_or_from_standard_input(monkeypatch, tmp_path, paused_model, capsys):
    (tmp_path / "prompts.txt").write_text("긍정\n\n부정\n", encoding="utf-8")
    short = ("--max_new_tokens", 4, "--temperature", 0)
    call(monkeypatch, paused_model, "--prompts_file", tmp_path / "prompts.txt", *short)
    from_file = capsys.readouterr().out
    assert [line[:2] for line in from_file.splitlines()] == ["긍정", "부정"]

    class Input:
        buffer = io.BytesIO("긍정\n\n부정\n".encode())

        @staticmethod
        def isatty():
            return False

    monkeypatch.setattr(sys, "stdin", Input)
    call(monkeypatch, paused_model, *short)
    assert capsys.readouterr().out == from_file


def test_a_stream_is_the_text(monkeypatch, paused_model, capsys):
    flags = ("--prompt", "긍정 ", "--max_new_tokens", 8)
    call(monkeypatch, paused_model, *flags)
    whole = capsys.readouterr().out
    call(monkeypatch, paused_model, *flags, "--stream")
    assert capsys.readouterr().out == whole


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_beams", "2"], "--num_beams 2: beams look for"),
        (["--stream", "--num_samples", "2"], "--stream: shows one text"),
        (["--stream", "--length", "9"], "--stream and --length"),
        (["--prompts_file", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--temperature", "0", "--num_samples", "3"], "--num_samples 3: without chance"),
        (["--prompt", "가", "--output_file", "/tmp"], "--output_file /tmp: is a folder"),
        (["--prompt", "가", "--max_new_tokens", "9999"], "--max_new_tokens 9999: the model has 512 positions"),
        (["--prompt", "가 " * 600], "--prompt: .* tokens; at most"),
    ],
)
def test_a_mistake_is_named(monkeypatch, paused_model, flags, message):
    with pytest.raises(UserError, match=message):
        call(monkeypatch, paused_model, *flags)


# Long texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, whole",
    [
        ("그는 갔다. 그녀도 갔다! 그리고 비가", "그는 갔다. 그녀도 갔다!"),
        ("끝이 없는 문장이", "끝이 없는 문장이"),
        ("“정말?” 그가 물었다.” 그", "“정말?” 그가 물었다.”"),
        ("3.5점이다", "3.5점이다"),
        ("끝났다.", "끝났다."),
    ],
)
def test_a_piece_ends_with_its_last_whole_sentence(text, whole):
    assert whole_sentences(text) == whole


def test_the_tail_is_whole_sentences_that_fit(paused_model):
    generator = PausedGenerator.from_pretrained(paused_model)
    sentences = ["눈이 왔다.", "길을 쓸었다.", "차를 마셨다."]
    sizes = [len(generator.ids(sentence)) for sentence in sentences]
    text = " ".join(sentences)
    assert last_sentences(generator, text, 100) == text
    assert last_sentences(generator, text, sizes[1] + sizes[2]) == "길을 쓸었다. 차를 마셨다."
    assert last_sentences(generator, text, sizes[2]) == "차를 마셨다."
    assert 1 <= len(generator.ids(last_sentences(generator, text, 2))) <= 2


def test_the_tail_costs_as_much_after_a_long_text_as_after_a_short_one(paused_model):
    generator, asked = PausedGenerator.from_pretrained(paused_model), []
    counted = Scripted(generator, [])
    counted.ids = lambda text: asked.append(len(text)) or generator.ids(text)
    for num in (100, 2000):
        text = " ".join(["눈이 왔다."] * num)
        tail = last_sentences(counted, text, 64)
        longer = len(generator.ids(f"눈이 왔다. {tail}"))
        assert text.endswith(tail) and len(generator.ids(tail)) <= 64 < longer
        assert sum(asked) < 10_000  # characters
        asked.clear()


class Scripted:
    """A generator that says what it is told to, and remembers what it was asked."""

    def __init__(self, generator, said):
        self.generator, self.said, self.asked, self.most = generator, said, [], []
        self.ids, self.encode, self.pauses = generator.ids, generator.encode, generator.pauses

    def continue_texts(self, texts, batch_size, **generation):
        self.asked.append(list(texts))
        self.most.append(generation["max_new_tokens"])
        said = self.said[len(self.asked) - 1][: len(texts)]
        return [Continuation(text, *(gap or [" "]), None, [], has_ended) for text, has_ended, *gap in said]


def test_pieces_go_on_from_the_last_sentences_until_the_text_is_long_enough(paused_model):
    said = [
        [(" 눈이 왔다. 나는 밖으로", False), ("끝.", True)],
        [("길을 쓸었다. 그때", False)],
        [("차를 마셨다. 그", False)],
    ]
    scripted = Scripted(PausedGenerator.from_pretrained(paused_model), said)
    num = len(scripted.ids("눈이 왔다. 길을 쓸었다.")) + 1
    first, second = write_long(scripted, ["아침에 보니", "저녁에"], num, 100, 8, max_new_tokens=20)
    assert first.text == "눈이 왔다. 길을 쓸었다. 차를 마셨다." and second.text == "끝."
    assert scripted.asked == [
        ["아침에 보니", "저녁에"], ["아침에 보니 눈이 왔다."], ["아침에 보니 눈이 왔다. 길을 쓸었다."],
    ]  # fmt: skip


def test_a_piece_is_no_longer_than_what_the_shortest_text_still_lacks(paused_model):
    said = [[("눈이 왔다. 길을 쓸었다.", False), ("눈이 왔다.", False)], [("끝.", True), ("끝.", True)]]
    scripted = Scripted(PausedGenerator.from_pretrained(paused_model), said)
    length = len(scripted.ids("눈이 왔다. 길을 쓸었다.")) + 2
    write_long(scripted, ["아침에", "저녁에"], length, 100, 8, max_new_tokens=200)
    assert scripted.most == [length, length - len(scripted.ids("눈이 왔다."))]


def test_a_piece_that_goes_on_within_a_word_leaves_no_space_in_it(paused_model):
    said = [[("눈이 내", False)], [("렸고 길은 하얗", False, "")], [("게 됐다.", True, "")]]
    scripted = Scripted(PausedGenerator.from_pretrained(paused_model), said)
    (found,) = write_long(scripted, ["아침에"], 1000, 100, 8, max_new_tokens=20)
    assert found.whole == "아침에 눈이 내렸고 길은 하얗게 됐다."
    assert scripted.asked[1:] == [["아침에 눈이 내"], ["아침에 눈이 내렸고 길은 하얗"]]


def test_what_stands_between_a_text_and_what_follows_is_told(paused_model):
    """Against the same words in one text."""
    generator = PausedGenerator.from_pretrained(paused_model, num_pauses=0)
    whole, gaps = "눈이 내렸고 길은 미끄러웠다", []
    ids = generator.ids(whole)
    for cut in range(1, len(ids)):
        before = generator.tokenizer.decode(ids[:cut])
        found = generator.continuation(before, np.array(ids[:cut]), ids[cut:])
        gaps.append(found.gap)
        assert f"{before}{found.gap}{found.text.strip()}" == whole
    assert set(gaps) == {"", " "}


def test_a_long_text_is_longer_than_the_model_sees(monkeypatch, tmp_path, paused_model):
    out = tmp_path / "long.jsonl"
    flags = ("--prompt", "긍정", "--length", 700, "--tail", 40, "--max_new_tokens", 100, "--repetition_penalty", 1.3)
    monkeypatch.setattr(writing, "whole_sentences", str.strip)  # a random model ends no sentence
    call(monkeypatch, paused_model, *flags, "--num_samples", 2, "--output_file", out)
    generator = PausedGenerator.from_pretrained(paused_model)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2 and max(len(generator.ids(row["text"])) for row in rows) > 512


# Metrics ---------------------------------------------------------------------------------------------------------


def test_variety_by_hand():
    texts = ["가 나 가 나", "가 나 다"]
    assert distinct(texts, 1) == pytest.approx(3 / 7) and distinct(texts, 2) == pytest.approx(3 / 5)
    assert distinct([""], 1) == 0
    assert repetition(["가 나 가 나 가 나", "가 나 다 라 마"], 2) == pytest.approx((1 - 2 / 5) / 2)
    assert repetition(["가"], 4) == 0 and repetition(["가 나 가 나 가 나", "가"], 2) == pytest.approx((1 - 2 / 5) / 2)


def test_self_bleu_is_high_where_texts_are_alike():
    import sacrebleu

    texts = ["오늘은 날이 맑다", "오늘은 날이 흐리다", "기차가 역에 닿았다"]
    others = [[texts[1], texts[2]], [texts[0], texts[2]], [texts[0], texts[1]]]
    wanted = [
        sacrebleu.sentence_bleu(text, rest, tokenize="char", use_effective_order=True).score
        for text, rest in zip(texts, others, strict=True)
    ]
    assert self_bleu(texts) == pytest.approx(sum(wanted) / 3)
    assert self_bleu(["같은 글이다"] * 3) == pytest.approx(100) and "self_bleu" not in variety(["하나"])


def test_self_bleu_of_many_texts_is_that_of_evenly_spaced_ones(monkeypatch):
    texts = ["오늘은 날이 맑다", "기차가 역에 닿았다", "오늘은 날이 흐리다", "배가 고프다", "길이 미끄럽다"]
    wanted = self_bleu([texts[0], texts[1], texts[3]])  # of five texts those at 0, 5 / 3 and 10 / 3
    monkeypatch.setattr(text_metrics, "MOST_TEXTS", 3)
    assert self_bleu(texts) == wanted and self_bleu(texts[:3]) != wanted


def test_metrics_go_beside_the_texts(monkeypatch, tmp_path, paused_model, capsys):
    """Perplexity of the very tokens that transformers writes, one by one."""
    out, prompts = tmp_path / "out.jsonl", ["긍정", "부정 영화"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    flags = ("--temperature", 0, "--max_new_tokens", 10, "--metrics", "--output_file", out)
    call(monkeypatch, paused_model, "--prompts_file", tmp_path / "prompts.txt", *flags)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    found = json.loads((tmp_path / "out.metrics.json").read_text(encoding="utf-8"))["metrics"]
    told = variety([row["text"] for row in rows])
    assert {name: found[name] for name in told} == pytest.approx(told)
    generator, total, count = PausedGenerator.from_pretrained(paused_model), 0.0, 0
    for prompt in prompts:
        ids = generator.prompt(prompt).tolist()
        written = generator.lm.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False)[0, len(ids) :]
        for token in written.tolist():
            with torch.no_grad():
                total -= generator.lm(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
            ids.append(token)
            count += 1
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-3)
    assert "perplexity" in capsys.readouterr().out


def test_texts_are_asked_for_as_they_are_written(monkeypatch, paused_model, capsys):
    """100,000 of each of 100,000 prompts are 10 ** 10."""
    prompts = [("file:1", "긍정")] * 100_000
    monkeypatch.setattr(generate, "prompts_of", lambda arguments: prompts)
    monkeypatch.setattr(generate.Writer, "check", lambda *told: None)

    def written(generator, part, *told, **settings):
        assert len(part) == 8
        raise UserError("enough")

    monkeypatch.setattr(PausedGenerator, "continue_texts", written)
    with pytest.raises(UserError, match="enough"):
        call(monkeypatch, paused_model, "--num_samples", 100_000)


def test_the_perplexity_of_a_long_text_is_that_of_all_its_pieces(monkeypatch, tmp_path, paused_model):
    out, pieces, real = tmp_path / "out.jsonl", [], PausedGenerator.continue_texts

    def remembered(*told, **settings):
        pieces.extend(found := real(*told, **settings))
        return found

    monkeypatch.setattr(PausedGenerator, "continue_texts", remembered)
    monkeypatch.setattr(writing, "whole_sentences", str.strip)  # a random model ends no sentence
    flags = ("--prompt", "긍정", "--length", 24, "--tail", 20, "--max_new_tokens", 8, "--temperature", 0, "--metrics")
    call(monkeypatch, paused_model, *flags, "--output_file", out)
    lm, losses = PausedGenerator.from_pretrained(paused_model).lm, []
    for piece in pieces:
        with torch.no_grad():
            chances = lm(torch.tensor([[*piece.prompt, *piece.ids]])).logits[0].log_softmax(-1)
        losses += [-chances[len(piece.prompt) + k - 1, token].item() for k, token in enumerate(piece.ids)]
    found = json.loads((tmp_path / "out.metrics.json").read_text(encoding="utf-8"))["metrics"]
    assert len(pieces) > 2 and found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)


def test_prompts_of_a_file_are_written_together(monkeypatch, tmp_path, paused_model):
    (tmp_path / "prompts.txt").write_text("긍정\n부정\n" * 3, encoding="utf-8")
    sizes, real = [], paused.write_batch

    def counting(lm, tokenizer, prompts, *rest):
        sizes.append(len(prompts))
        return real(lm, tokenizer, prompts, *rest)

    monkeypatch.setattr(paused, "write_batch", counting)
    flags = ("--prompts_file", tmp_path / "prompts.txt", "--max_new_tokens", 2, "--batch_size", 4)
    call(monkeypatch, paused_model, *flags)
    assert sizes == [4, 2]


def test_a_prompt_that_is_too_long_is_named_before_anything_is_written(monkeypatch, tmp_path, paused_model):
    (tmp_path / "prompts.txt").write_text("긍정\n" + "영화 " * 600, encoding="utf-8")
    out = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match=r"prompts.txt:2: \d+ tokens; at most"):
        call(monkeypatch, paused_model, "--prompts_file", tmp_path / "prompts.txt", "--output_file", out)
    assert not out.exists()


def test_what_was_written_before_a_fault_is_kept(monkeypatch, tmp_path, paused_model):
    class Input:
        buffer = io.BytesIO("긍정\n".encode() + "부정".encode("cp949"))

        @staticmethod
        def isatty():
            return False

    monkeypatch.setattr(sys, "stdin", Input)
    with pytest.raises(UserError, match="standard input, line 2: not UTF-8"):
        call(monkeypatch, paused_model, "--max_new_tokens", 4, "--output_file", tmp_path / "out.jsonl")
    (row,) = (tmp_path / "out.jsonl.incomplete").read_text(encoding="utf-8").splitlines()
    assert json.loads(row)["prompt"] == "긍정"


@pytest.mark.parametrize("typed", [b"", b"\n \n"])
def test_a_standard_input_without_a_prompt_is_told_and_earlier_texts_stay(monkeypatch, tmp_path, paused_model, typed):
    """A service and `ssh -n` give none."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(typed), isatty=lambda: False))
    (tmp_path / "out.jsonl").write_text("earlier")
    with pytest.raises(UserError, match="standard input: no prompt in it; give --prompt or --prompts_file"):
        call(monkeypatch, paused_model, "--metrics", "--output_file", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "earlier"


def test_a_person_may_end_before_the_first_prompt(monkeypatch, paused_model, capsys):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(), isatty=lambda: True))
    call(monkeypatch, paused_model, "--metrics")
    assert "prompt (Ctrl-D ends): " in (shown := capsys.readouterr().out) and "distinct" not in shown


def test_greedy_writing_has_no_settings_of_sampling():
    assert "top_k" not in DecodingArguments(temperature=0).settings()
    low = DecodingArguments(temperature=0.01, top_k=5, top_p=0.5).settings()
    assert (low["temperature"], low["top_k"], low["top_p"], low["do_sample"]) == (0.01, 5, 0.5, True)
    assert DecodingArguments().settings()["do_sample"] is True
