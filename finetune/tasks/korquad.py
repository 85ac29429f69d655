"""KorQuAD 1.0: questions on a passage, answered by writing the answer."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from finetune.tasks.base import Example, Task, filled
from kozero.data.readers import BadRow, Located, text_field
from kozero.errors import require
from kozero.json_files import read_json_object

CONTEXT_MARK = "문맥: "


def read_korquad(path: Path) -> Iterator[Located | BadRow]:
    """The published nested JSON, one row a question, in the flat form of the hub."""
    whole = read_json_object(path)
    require(isinstance(whole.get("data"), list), f"{path}: no list 'data'; is this a KorQuAD 1.0 file?")
    for article in members(str(path), whole, "data", "article"):
        yield from [article] if isinstance(article, BadRow) else questions_of(path, *article)


class Korquad(Task):
    """Context: the passage. Prompt: the question. Target: the answer."""

    name = "korquad"
    hub = ("KorQuAD/squad_kor_v1", None, "train", "validation")
    sample_files = ("korquad/KorQuAD_v1.0_train.json", "korquad/KorQuAD_v1.0_dev.json")
    readers: ClassVar = {".json": read_korquad}
    max_seq_length = 512
    max_new_tokens = 32
    best_score = "f1"

    def examples_of_row(self, where: str, row: dict) -> Iterator[Example]:
        """One question with its answers; the first is the one that is trained on."""
        example = read_question(where, row)
        span = tuple(place + len(CONTEXT_MARK) for place in example.answer_span)
        prompt = f"질문: {example.prompt} 정답:"
        yield replace(example, context=CONTEXT_MARK + example.context, prompt=prompt, answer_span=span)


def read_question(where: str, row: dict) -> Example:
    """A question as it is written: the passage is the context, the question the prompt, its answers the targets."""
    context = text_field(where, row, "context")
    shift = len(row["context"].lstrip()) - len(row["context"])  # strip moved the answer
    question = filled(where, text_field(where, row, "question"))
    answers = list(answers_of_row(where, row))
    for text, start in answers:
        if row["context"][start : start + len(text)] != text:
            raise BadRow(f"{where}: answer {text!r} does not stand at {start} in the context")
    text, start = answers[0]
    span = (start + shift, start + shift + len(text))
    targets = tuple(dict.fromkeys(text for text, _ in answers))
    return Example(str(row.get("id", where)), str(row.get("title", "")), context, question, targets, 0, span)


def members(where: str, parent: dict, name: str, kind: str) -> Iterator[Located | BadRow]:
    """The objects of the list `name` in `parent`, each with its place; what is not in that form is a BadRow."""
    if not isinstance(parent.get(name), list):
        yield BadRow(f"{where}: no list {name!r}")
        return
    for number, member in enumerate(parent[name], start=1):
        place = f"{where} {kind} {number}"
        yield (place, member) if isinstance(member, dict) else BadRow(f"{place}: not a JSON object")


def questions_of(path: Path, where: str, article: dict) -> Iterator[Located | BadRow]:
    """The questions of all paragraphs of an article, each with its title and its paragraph's text."""
    for paragraph in members(where, article, "paragraphs", "paragraph"):
        if isinstance(paragraph, BadRow):
            yield paragraph
            continue
        place, content = paragraph
        shared = {"title": article.get("title", where)} | {k: v for k, v in content.items() if k == "context"}
        for question in members(place, content, "qas", "question"):
            if isinstance(question, BadRow):
                yield question
            else:
                number, row = question
                yield f"{path} question {row['id']}" if "id" in row else number, row | shared


def answers_of_row(where: str, row: dict) -> Iterator[tuple[str, int]]:
    """(text, start) of each answer, from the file's list of objects or the hub's object of lists."""
    answers = row.get("answers")
    try:
        if isinstance(answers, dict):
            pairs = list(zip(answers["text"], answers["answer_start"], strict=True))
        else:
            pairs = [(answer["text"], answer["answer_start"]) for answer in answers]
    except (TypeError, KeyError, ValueError):
        raise BadRow(f"{where}: 'answers' must be a list of objects with text and answer_start") from None
    if not pairs:
        raise BadRow(f"{where}: no answer")
    for text, start in pairs:
        if not isinstance(text, str) or not text.strip() or not isinstance(start, int) or start < 0:
            raise BadRow(f"{where}: answer {text!r} at {start!r} is not a text and its place in the context")
        yield text, start
