"""Arguments of the fine-tuning entries: how a run trains, which model, which data."""

from dataclasses import dataclass

from finetune.tasks import ENCODER_TASKS, TASKS
from kozero.config import TrainingArguments, arg, at_least
from kozero.errors import require


@dataclass
class FinetuningArguments(TrainingArguments):
    """How a run trains."""

    num_train_epochs: float | None = arg(
        None, "passes over the training rows, rounded up to whole steps; default: 3, mrc 5; see --max_steps"
    )


@dataclass
class ModelArguments:
    """Which model."""

    model_name_or_path: str | None = arg(
        None,
        "hub name (skt/kogpt2-base-v2, skt/ko-gpt-trinity-1.2B-v0.5) or folder of a GPT-2; mrc and ict: of an encoder",
        aliases=["--model"],
    )
    config_file: str | None = arg(
        None, "JSON of a model with random weights, e.g. models/kogpt2_config.json or models/transformer_config.json"
    )
    tokenizer_name_or_path: str | None = arg(
        None, "hub name or folder; default: the model's own, or the sample tokenizer for --config_file"
    )
    dropout: float | None = arg(None, "replaces the model's dropout rates, 0 to 1")

    def __post_init__(self) -> None:
        require(self.dropout is None or 0 <= self.dropout < 1, f"--dropout {self.dropout}: must be in [0, 1)")


@dataclass
class DataArguments:
    """Which data. Without files or --from_hub the sample data of this project are used."""

    task: str | None = arg(
        None,
        "what to learn: nsmc (the default), klue_nli, korquad, essay by a GPT-2; mrc, ict by an encoder",
        choices=[*TASKS, *ENCODER_TASKS],
    )
    train_file: str | None = arg(None, "published training file of the task")
    validation_file: str | None = arg(None, "published validation or test file; without it a part of --train_file")
    validation_fraction: float = arg(
        0.1,
        "share of the groups (articles, premises) of --train_file that validates when no --validation_file is given",
    )
    from_hub: bool = arg(False, "read the task's data set from the hub: e9t/nsmc, klue/nli, KorQuAD/squad_kor_v1")
    bad_rows: str = arg(
        "error", "a row that breaks the file's form: end the run, or count it and go on", choices=["error", "skip"]
    )
    max_train_samples: int = arg(0, "train on this many examples at most; 0: all")
    max_eval_samples: int = arg(0, "evaluate on this many examples at most, evenly spaced; 0: all")
    max_seq_length: int = arg(
        0, "tokens of a row; 0: the task's default (256, korquad and essay 512, mrc and ict 384); at most the positions"
    )
    batching: str = arg(
        "packed",
        "texts side by side in full rows, or one text a row grouped by length (mrc and ict: always grouped)",
        choices=["packed", "grouped"],
    )
    cache_dir: str = arg("~/.cache/kozero", "folder of tokenised data")

    def __post_init__(self) -> None:
        self.task = self.task or "nsmc"
        at_least(0, self, "max_train_samples", "max_eval_samples", "max_seq_length")
        message = f"--validation_fraction {self.validation_fraction}: must be above 0 and below 1"
        require(0 < self.validation_fraction < 1, message)
        message = "--from_hub and files: choose one of the two"
        require(not (self.from_hub and (self.train_file or self.validation_file)), message)


@dataclass
class TrainingDataArguments(DataArguments):
    """Which data, and what for. Without files or --from_hub the sample data of this project are used."""

    train_mode: str = arg(
        "finetune",
        "train, or turn all paragraphs into vectors with a model that is there and search them (--task ict)",
        choices=["finetune", "encoder"],
    )

    def __post_init__(self) -> None:
        encoder = self.train_mode == "encoder"
        self.task = self.task or ("ict" if encoder else None)
        super().__post_init__()
        message = f"--train_mode encoder and --task {self.task}: vectors are those of --task ict; leave --task out"
        require(not encoder or self.task == "ict", message)


@dataclass
class ReadingArguments:
    """How questions and passages become rows of an encoder (mrc, ict)."""

    doc_stride: int = arg(128, "mrc: tokens from the beginning of a window on the passage to that of the next")
    max_query_length: int = arg(64, "tokens of a question; a longer one is cut")
    n_best_size: int = arg(5, "mrc: answers kept for each question, 1,000 at most")
    max_answer_length: int = arg(20, "mrc: tokens of an answer at most")

    def __post_init__(self) -> None:
        at_least(1, self, "doc_stride", "max_query_length", "max_answer_length")
        at_least(1, self, "n_best_size", most=1000)
