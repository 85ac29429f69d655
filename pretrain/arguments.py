"""Arguments of the pre-training entries. Names and defaults are those that users of fairscale pre-training know; where
transformers' TrainingArguments has another name for the same thing, both are taken."""

from dataclasses import dataclass
from typing import ClassVar

from kozero.config import TrainingArguments, arg, at_least
from kozero.errors import require
from pretrain.corpus import SPLITTERS

MODELS = ("transformer", "mix_lm", "causal_lm")
TASKS = ("mlm_sop", "mlm_ict", "mlm", "clm")
SCHEDULE_STEPS = 500_000  # of a run that is no longer


@dataclass
class PretrainingArguments(TrainingArguments):
    """How a run trains."""

    model_name: str | None = arg(None, "name of the run: its folder below --output_dir (required)")
    output_dir: str = arg("runs", "folder of runs")
    per_device_train_batch_size: int = arg(
        0, "rows of one forward pass on one rank (micro batch); 0: as many as fit into its memory, found by some steps",
        aliases=["--train_batch_size"],
    )  # fmt: skip
    learning_rate: float = arg(2e-4, "peak learning rate")
    num_train_epochs: float | None = arg(None, "not for pre-training, which counts updates: see --num_steps")
    max_steps: int = arg(400_000, "optimizer updates in all", aliases=["--num_steps"])
    scheduler_num_steps: int | None = arg(
        None,
        "updates after which the rate is 0; more than --num_steps: it never gets there; 0: as many; default: 500,000, "
        "or --num_steps where that is more",
    )
    max_steps_per_epoch: int = arg(1000, "updates after which rows are drawn anew from the whole corpus; 0: no limit")
    warmup_steps: float = arg(10_000, "optimizer updates of linear warm-up; below 1: that share of the schedule")
    logging_steps: int = arg(50, "optimizer updates between two points of the curves")
    save_steps: int = arg(50_000, "optimizer updates between two checkpoints; 0: at every evaluation")
    checkpoint: str | None = arg(None, "folder of an exported model to start from, weights only (see also --resume)")
    nproc: int = arg(
        0, "ranks to start on this machine; 0: one for each GPU, or one; not under torchrun or deepspeed",
        aliases=["--nproc_per_node"],
    )  # fmt: skip
    least_batch: ClassVar[int] = 0

    def __post_init__(self) -> None:
        epochs = self.num_train_epochs
        require(epochs is None, f"--num_train_epochs {epochs}: pre-training counts updates; give --num_steps instead")
        if self.scheduler_num_steps is None:
            self.scheduler_num_steps = max(SCHEDULE_STEPS, self.max_steps)
        super().__post_init__()
        at_least(0, self, "max_steps_per_epoch", "nproc")
        at_least(1, self, "max_steps")
        require(bool(self.model_name), "--model_name: give the run a name")
        require("/" not in self.model_name and self.model_name not in (".", ".."), "--model_name: a name, not a path")


@dataclass
class ZeroArguments(PretrainingArguments):
    """How a run of the entries that shard without DeepSpeed trains."""

    deepspeed_config: str | None = arg(
        None, "not for this entry, which shards without DeepSpeed: see pretrain/train.py"
    )


@dataclass
class CorpusArguments:
    """Which text, which model, what to learn."""

    model: str = arg("transformer", "architecture", choices=list(MODELS))
    task: str | None = arg(None, "what to learn; default: mlm_sop for encoders, clm for causal_lm", choices=[*TASKS])
    config_file: str | None = arg(
        None,
        "model JSON; default: models/<model>_config.json (causal_lm: kogpt2_config); not with --checkpoint, which has "
        "its own",
    )
    tokenizer_name_or_path: str | None = arg(
        None, "hub name or folder, see scripts/train_tokenizer.py; default: the sample tokenizer (4,096 tokens)"
    )
    corpus_path: str | None = arg(
        None, "text file, or folder of .dat and .txt files; a blank line ends a document. Default: the sample corpus"
    )
    corpus_hub: str | None = arg(None, "hub data set instead of files: a row is a document")
    text_column: str = arg("text", "column of --corpus_hub that holds the text")
    hub_split: str = arg("train", "split of --corpus_hub")
    sentences: str = arg(
        "line", "what a sentence is: a line, or what kiwipiepy finds in it (0.1 MB/s a core)", choices=list(SPLITTERS)
    )
    dropout: float | None = arg(None, "replaces the model's dropout rates, 0 to 1")
    max_seq_length: int = arg(128, "tokens of a row")
    pause_fraction: float = arg(0.0, "clm: share of a row's tokens that are pauses (see --pause_placement); 0: none")
    pause_placement: str = arg("random", "clm: where pauses go", choices=["random"])
    pause_token: str = arg("<unused0>", "token that pauses; a tokenizer that lacks it gets <pause> as a new token")
    whole_word_mask: bool = arg(
        False,
        "hide whole words instead of single tokens: eojeol; with a WordPiece tokenizer a word also ends at a "
        "punctuation mark",
    )
    mask_share: float = arg(0.15, "share of the tokens that are hidden, of a short row at least one (word)")
    validation_fraction: float | None = arg(
        None,
        "share of the documents that validates, at the end of each piece; 0: none; default: 0.01, of a small corpus as "
        "much as 16 documents are, 0.1 at most",
    )
    max_eval_samples: int = arg(1000, "rows to evaluate on at most; 0: all")
    cache_dir: str = arg("~/.cache/kozero", "folder of tokenised data")

    def __post_init__(self) -> None:
        at_least(8, self, "max_seq_length")
        at_least(0, self, "max_eval_samples")
        for name in ("validation_fraction", "dropout", "pause_fraction"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, f"--{name} {value}: must be in [0, 1)")
        require(0 < self.mask_share < 1, f"--mask_share {self.mask_share}: must be above 0 and below 1")
        require(not (self.corpus_path and self.corpus_hub), "--corpus_path and --corpus_hub: choose one of the two")
        self.task = self.task or ("clm" if self.model == "causal_lm" else "mlm_sop")
        both = f"--model {self.model} and --task {self.task}: causal_lm learns clm, the encoders learn the others"
        require((self.model == "causal_lm") == (self.task == "clm"), both)
        if not self.pause_fraction:
            return
        named, room = f"--pause_fraction {self.pause_fraction}", self.max_seq_length - 2
        told = f"{self.num_pauses} pauses in --max_seq_length {self.max_seq_length} tokens; must be 1 to {room}"
        require(1 <= self.num_pauses <= room, f"{named}: {told}")
        require(self.task == "clm", f"{named}: --task {self.task} has no pauses; give --model causal_lm")

    @property
    def num_pauses(self) -> int:
        """Pauses of a full row."""
        return round(self.pause_fraction * self.max_seq_length)


@dataclass
class ShardingArguments:
    """How train_zero_two.py shards."""

    zero3: bool = arg(
        False,
        "ZeRO-3: parameters are sharded too, and gathered for each use; without --auto_wrap all of them at once, "
        "which takes as much memory as ZeRO-2",
    )
    auto_wrap: bool = arg(False, "shard layer by layer: less memory (layers that share parameters stay together)")
    sharding: str = arg(
        "torch", "library: torch's fully_shard, or fairscale's FullyShardedDataParallel (needs a GPU)",
        choices=["torch", "fairscale"],
    )  # fmt: skip
