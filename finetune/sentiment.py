"""Does a model write what it was asked to? Reviews after 긍정 and 부정, judged by a classifier that was trained apart.

python finetune/sentiment.py --model_name_or_path runs/writer/model --classifier runs/judge/model --num_samples 200

The classifier is a model of --task nsmc, best of another seed: it says after which of the two words a review is more
likely. Beside its agreement with what was written stands that with real reviews, which is how far it can be trusted.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from finetune.arguments import DataArguments, ModelArguments
from finetune.data import EvaluationSet, evaluation_set, sources
from finetune.decoding import DecodingArguments
from finetune.paused import PausedGenerator
from finetune.scoring import score
from finetune.setup import inference_pauses, load_model, row_capacity
from finetune.tasks import TASKS, Source
from finetune.tasks.nsmc import POLARITIES
from kozero import distributed
from kozero.config import TrainingArguments, arg, at_least, batch_sizes, parse_arguments
from kozero.engines import build_engine, prepare_engine
from kozero.engines.base import Engine
from kozero.errors import require, run_main
from kozero.folder import claim_output, new_file, write_text
from kozero.pause import InferencePauseArguments, Pauses
from kozero.text_metrics import variety
from models.language_model import LanguageModel, load_config

TASK = TASKS["nsmc"]


@dataclass
class SentimentArguments:
    """Who writes, who judges."""

    model_name_or_path: str | None = arg(None, "folder of the model that writes, trained with --task nsmc")
    classifier: str | None = arg(None, "folder of the model that judges, trained apart with --task nsmc")
    num_samples: int = arg(100, "reviews of each polarity, 100,000 at most")
    validation_file: str | None = arg(None, "real reviews in NSMC's form; default: the sample data")
    max_eval_samples: int = arg(0, "real reviews to judge at most, evenly spaced; 0: all")
    batch_size: int = arg(16, "reviews that are written or judged at once, 1,024 at most")
    output_dir: str = arg("runs/sentiment", "folder for generated.txt in NSMC's form and sentiment.json")

    def __post_init__(self) -> None:
        writer, judge = self.model_name_or_path, self.classifier
        require(bool(writer and judge), "--model_name_or_path and --classifier: give both")
        same = Path(writer).exists() and Path(judge).exists() and Path(writer).samefile(judge)
        require(not same, f"--classifier {judge}: is the model that writes; name one that was trained apart")
        at_least(1, self, "num_samples", most=100_000)
        at_least(1, self, "batch_size", most=1024)
        at_least(0, self, "max_eval_samples")


ARGUMENTS = (SentimentArguments, DecodingArguments)


def main() -> None:
    """Generate reviews, judge them, and report the agreement."""
    arguments, decoding = parse_arguments(*ARGUMENTS, prog="finetune/sentiment.py", description=__doc__)
    message = f"--temperature 0: writes the same review {arguments.num_samples} times; give a temperature above 0"
    require(arguments.num_samples == 1 or decoding.temperature > 0, message)
    distributed.setup()
    data = DataArguments("nsmc", validation_file=arguments.validation_file, max_eval_samples=arguments.max_eval_samples)
    source = sources(data, TASK)[1]
    load_config(arguments.classifier, "--classifier")
    load_config(arguments.model_name_or_path, "--model_name_or_path")
    with claim_output(arguments.output_dir) as folder:
        new_file("--output_dir", folder / "generated.txt", folder / "sentiment.json", reads=[arguments])
        judge = Judge.of(arguments.classifier, arguments.batch_size)
        real = judge.questions(source, data)
        written = write(arguments, decoding)
        (folder / "sentiment.json").unlink(missing_ok=True)  # that of earlier reviews
        empty = save_reviews(folder / "generated.txt", written)
        judged = [judge.score(judge.questions(Source(folder / "generated.txt"), DataArguments())), judge.score(real)]
        judge.engine.close()
        texts = [text for found in written.values() for text in found]
        found = {
            "agreement_with_generated": judged[0]["accuracy"],
            "agreement_with_real": judged[1]["accuracy"],
            "generated": len(texts),
            "empty": empty,
            **{f"generated_{name}": value for name, value in variety(texts).items()},
        }
        told = {"scores": found, "generated": judged[0], "real": judged[1]}
        told |= {"settings": asdict(arguments) | asdict(decoding)}
        write_text(folder / "sentiment.json", json.dumps(told, indent=2, ensure_ascii=False))
        for name, value in found.items():
            distributed.say(f"{name:>26} {value:.4f}" if isinstance(value, float) else f"{name:>26} {value}")
        distributed.say(str(folder / "sentiment.json"))
    distributed.shutdown()


def write(arguments: SentimentArguments, decoding: DecodingArguments) -> dict[str, list[str]]:
    """Reviews by the word that asks for their polarity."""
    pauses = InferencePauseArguments()
    model = load_model(ModelArguments(arguments.model_name_or_path), pauses, with_pauses=False, seed=0)
    lm = model.module.lm.to(distributed.device()).eval()
    generator = PausedGenerator(lm, model.tokenizer, inference_pauses(model, pauses))
    distributed.seed_everything(decoding.seed)
    return {
        word: generator.generate([word] * arguments.num_samples, arguments.batch_size, **decoding.settings())
        for word in POLARITIES
    }


@dataclass
class Judge:
    """A classifier: a model of --task nsmc, which says after which word a review is more likely."""

    engine: Engine
    model: LanguageModel
    pauses: Pauses
    batch_size: int

    @classmethod
    def of(cls, folder: str, batch_size: int) -> "Judge":
        """The model of a folder, with the pauses that it was trained with."""
        pauses = InferencePauseArguments()
        model = load_model(ModelArguments(model_name_or_path=folder), pauses, with_pauses=False, seed=0)
        training = TrainingArguments(per_device_train_batch_size=batch_size)
        settings = prepare_engine(training, batch_sizes(training, distributed.world_size()))
        engine = build_engine(model.module, training, settings)
        return cls(engine, model, inference_pauses(model, pauses), batch_size)

    def questions(self, source: Source, data: DataArguments) -> EvaluationSet:
        """The reviews of a source."""
        return evaluation_set(source, TASK, data, self.model.tokenizer, self.pauses.placement)

    def score(self, questions: EvaluationSet) -> dict[str, float]:
        """Accuracy, macro F1, and what it says how often."""
        capacity = row_capacity(0, TASK.max_seq_length, self.model.config.n_positions)
        return score(self.engine, questions, self.pauses, capacity, self.batch_size, self.model.tokenizer).values


def save_reviews(path: Path, written: dict[str, list[str]]) -> int:
    """Write reviews as NSMC's file, their words in the place of the label. Returns how many were empty, which NSMC's
    form has no row for."""
    rows, empty = ["id\tdocument\tlabel"], 0
    for label, word in enumerate(POLARITIES):
        for number, text in enumerate(written[word]):
            review = " ".join(text.split())
            empty += not review
            rows += [f"{word}-{number}\t{review}\t{label}"] if review else []
    require(len(rows) > 1, "the model wrote nothing but ends of texts; raise --temperature, or train it longer")
    write_text(path, "\n".join(rows) + "\n")
    return empty


if __name__ == "__main__":
    run_main(main)
