"""--task mrc: an encoder answers a question by pointing at the first and the last token of the answer."""

from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from finetune.arguments import ReadingArguments
from finetune.encoder import EncoderTask, Found
from finetune.questions import QuestionSet, QuestionStore, text_of
from finetune.windows import SPECIAL, WindowRows, Windows, WindowSize
from kozero import distributed
from kozero.config import BatchSizes
from kozero.data.batch import shares
from kozero.data.framing import Framing
from kozero.data.order import Order
from kozero.engines.base import Engine
from kozero.errors import require
from kozero.metrics import question_answering
from models.heads import Float32Linear, router_sums

NUM_SAMPLES = 3  # predictions shown at each evaluation
SPARE = 4  # spans that a window hands on for each answer that is listed: some spell the same text


class SpanReader(nn.Module):
    """An encoder with two logits a position: that the answer begins here, that it ends here."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.span = Float32Linear(encoder.config.hidden_size, 2)
        nn.init.normal_(self.span.weight, std=encoder.config.initializer_range)
        nn.init.zeros_(self.span.bias)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor,
        window: torch.Tensor,
        answer: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Losses, or logits where no answer is given.

        Args:
            input_ids, attention_mask, token_type_ids: (B, T).
            window: (B, 2) positions [begin, end) that an answer may have.
            answer: (B, 2) its first and last position; 0 where it is not in the window.

        Returns: (K,) sums over the rows of the loss in nats, the mean of begin and end, and over tokens of the router
        losses where there are any; or (B, 2, T) fp32 logits, minus infinity outside the window and [CLS].
        """
        types = token_type_ids.clamp(max=self.encoder.config.type_vocab_size - 1)
        out = self.encoder(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=types)
        logits = self.span(out.last_hidden_state).mT  # (B, 2, T)
        places = torch.arange(logits.shape[-1], device=logits.device)
        possible = ((places >= window[:, :1]) & (places < window[:, 1:])) | (places == 0)  # (B, T)
        logits = logits.masked_fill(~possible[:, None], -torch.inf)
        if answer is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1), answer.flatten(), reduction="sum") / 2
        return torch.stack([loss, *router_sums(out, attention_mask)])


def best_spans(logits: torch.Tensor, num: int, max_length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `num` spans of at most `max_length` tokens with the highest scores, out of all there are.

    The score of a span is the sum of its two logits less that of [CLS], which stands for "not in this window": so
    spans of different windows compare, although the loss leaves every window's logits a constant of its own.

    Args: logits: (B, 2, T) as SpanReader returns them.

    Returns: (B, num) scores, minus infinity where there are fewer spans; (B, num) first and last positions.
    """
    begin, end = logits.clone().unbind(1)
    nowhere = begin[:, 0] + end[:, 0]
    begin[:, 0] = -torch.inf
    ends = F.pad(end, (0, max_length - 1), value=-torch.inf).unfold(1, max_length, 1)  # (B, T, L): end at begin + l
    scores = (begin[:, :, None] + ends - nowhere[:, None, None]).flatten(1)  # (B, T * L)
    found, places = scores.topk(min(num, scores.shape[1]), dim=1)
    missing = num - found.shape[1]
    found, places = F.pad(found, (0, missing), value=-torch.inf), F.pad(places, (0, missing))
    first = places // max_length
    return found, first, first + places % max_length


class Reading(EncoderTask):
    """Machine reading comprehension on windows.

    Raises: UserError when a row has no room for a question and an answer.
    """

    head = SpanReader
    objective = "span"
    row_arguments = ("doc_stride", "max_query_length")
    score_arguments = ("n_best_size", "max_answer_length")
    files = ("predictions", "nbest")

    def __init__(self, arguments: ReadingArguments, framing: Framing, capacity: int) -> None:
        room = capacity - arguments.max_query_length - SPECIAL
        require(
            room >= arguments.max_answer_length,
            f"--max_seq_length {capacity}: beside a question of --max_query_length {arguments.max_query_length} it "
            f"leaves {max(room, 0)} tokens for the passage, less than --max_answer_length "
            f"{arguments.max_answer_length}; raise the first or lower the others",
        )
        if arguments.doc_stride > room:
            distributed.say(f"--doc_stride {arguments.doc_stride}: taken as {room}, what fits beside a long question")
        self.arguments, self.framing, self.capacity = arguments, framing, capacity
        self.size = WindowSize(capacity, min(arguments.doc_stride, room), arguments.max_query_length)

    def rows(self, store: QuestionStore, sizes: BatchSizes, seed: int, routes: bool) -> WindowRows:
        """Every window of every question; those without the answer point at [CLS]."""
        windows = Windows(store, self.size, np.arange(store.num_questions))
        group = sizes.global_batch
        order = Order(len(windows), len(windows), group, seed, lambda numbers: windows.lengths[numbers])
        with_answer = np.unique(windows.question[windows.targets[:, 0] > 0])
        distributed.say(
            f"{store.num_questions:,} questions in {len(windows):,} windows of {self.capacity} tokens at most; "
            f"{store.num_questions - len(with_answer):,} have their answer whole in none; "
            f"{int((store.question_lengths > self.size.max_query_length).sum()):,} questions are cut; "
            f"whole tokens match {store.spelled:.1%} of the answers exactly"
        )
        return WindowRows(windows, self.framing, order, routes)

    def score(self, engine: Engine, questions: QuestionSet, micro: int) -> Found:
        """KorQuAD's exact match and character F1; predictions.json as the official script reads it, nbest.json."""
        windows = Windows(questions.store, self.size, questions.numbers)
        spans = self.window_spans(engine, windows, micro)
        nbest = self.nbest(windows, spans, questions)
        predictions = [answers[0]["text"] if answers else "" for answers in nbest]
        examples = questions.examples
        names = [example.id for example in examples]
        kinds = zip(self.files, (predictions, nbest), strict=True)
        values = question_answering(predictions, [example.targets for example in examples])
        shown = zip(examples[:NUM_SAMPLES], predictions, strict=False)
        return Found(
            values,
            notes=[f"whole tokens match {questions.store.spelled:.1%} of the answers exactly; more cannot be reached"],
            files={kind: dict(zip(names, found, strict=True)) for kind, found in kinds},
            sample=" | ".join(f"{example.prompt} → {prediction}" for example, prediction in shown),
        )

    def window_spans(self, engine: Engine, windows: Windows, micro: int) -> np.ndarray:
        """(W, N, 3) score, first token and last token in the passage, of the best spans of each window. Collective: all
        ranks make the same number of forward passes."""
        num = SPARE * self.arguments.n_best_size
        device = distributed.device()
        total = torch.zeros(len(windows), num, 3, dtype=torch.float64)
        with engine.evaluating() as module:
            for mine, numbers in shares(windows.lengths, micro):
                inputs = windows.inputs(numbers, self.framing)
                logits = module(**{name: tensor.to(device) for name, tensor in inputs.items()})
                found = torch.stack(best_spans(logits, num, self.arguments.max_answer_length), dim=-1).double().cpu()
                found[..., 1:] += torch.from_numpy(windows.first[numbers] - windows.begins[numbers])[:, None, None]
                total[mine] = found[: len(mine)]
        return distributed.all_reduce(total.to(device)).cpu().numpy()

    def nbest(self, windows: Windows, spans: np.ndarray, questions: QuestionSet) -> list[list[dict]]:
        """For each question its best answers, the first one first, no text twice. Scores become probabilities among
        those that are listed."""
        place = {number: k for k, number in enumerate(questions.numbers.tolist())}
        candidates = defaultdict(list)
        for question, found in zip(windows.question.tolist(), spans, strict=True):
            candidates[place[question]] += found[np.isfinite(found[:, 0])].tolist()
        return [self.best_texts(candidates[k], k, questions) for k in range(len(questions.examples))]

    def best_texts(self, candidates: list[list[float]], k: int, questions: QuestionSet) -> list[dict]:
        """The best different texts of one question."""
        offsets = questions.store.offsets_of(int(questions.store.answers[questions.numbers[k], 0]))
        kept: dict[str, float] = {}
        for score, first, last in sorted(candidates, key=lambda candidate: -candidate[0]):
            text = text_of(questions.examples[k].context, offsets, int(first), int(last) + 1)
            if text and len(kept) < self.arguments.n_best_size:
                kept.setdefault(text, score)
        weights = torch.tensor(list(kept.values()), dtype=torch.float64).softmax(0).tolist()
        return [
            {"text": text, "probability": round(weight, 6), "score": round(score, 4)}
            for weight, (text, score) in zip(weights, kept.items(), strict=True)
        ]
