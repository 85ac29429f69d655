"""Fine-tuning beside what a user would take instead: transformers' Trainer (rows padded to --length tokens, or to the
longest of their batch, or grouped by length) and TRL's SFTTrainer with packing.

    python benchmarks/finetuning.py --task nsmc --bf16 --output_file finetuning_nsmc.json
    python benchmarks/finetuning.py --task korquad --texts 24 --batch_size 4 --length 384 --row_length 384 --bf16

All begin with the same random weights of --config_file, learn the same texts, each once in a block (ours fills its last
update from the next epoch, and counts that), about --batch_size of them in an update, with AdamW at one rate. Speed is
real tokens (prompt, target and end; no padding) in the time from the beginning of a block's first update to the end of
its last. "Times the first" and "of the limit" are medians over rounds; the limit is what large matrix products reach in
turn with the sides. After the first block every side scores other texts in 32 bit: losses within --tolerance say that
they did the same work.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import limit
import numpy as np
import torch
import torch.nn.functional as F
from contest import Block, Contender, Reported, compete, paired, report, speeds, table
from transformers import TrainerCallback

from finetune.arguments import DataArguments, ModelArguments
from finetune.data import cached_store, sources
from finetune.setup import load_model
from finetune.tasks import TASKS
from kozero import distributed
from kozero.config import BatchSizes, TrainingArguments, arg, at_least, parse_arguments
from kozero.data.ahead import Ahead
from kozero.data.batches import Prefixes, TrainingRows
from kozero.data.rows import fit
from kozero.data.store import TokenStore
from kozero.engines import EngineSettings, build_engine
from kozero.engines.units import compile_layers
from kozero.errors import require, run_main
from kozero.pause import IGNORE, PauseArguments, Pauses
from models.language_model import read_config

HELD_OUT = 16  # texts that show whether two sides have learnt the same
Pairs = list[tuple[list[int], list[int]]]  # ids of a text, and the same with IGNORE where nothing is learnt


@dataclass
class BenchmarkArguments(Reported):
    """What to run. Without --train_file: the sample data."""

    config_file: str = arg("models/kogpt2_config.json", "model JSON")
    tokenizer_name_or_path: str | None = arg(None, "folder; default: the sample tokenizer")
    task: str = arg("nsmc", "what to learn", choices=["nsmc", "korquad"])
    train_file: str | None = arg(None, "published training file of the task")
    texts: int = arg(128, "texts of a block; each side learns each once")
    batch_size: int = arg(32, "texts of an update of the sides that pad")
    length: int = arg(32, "tokens of a text at most: longer reviews are left out, longer passages cut")
    row_length: int = arg(256, "tokens of a packed row")
    pass_rows: int = arg(0, "packed rows of one forward pass of our side, which then adds up; 0: all of an update")
    rounds: int = arg(3, "blocks of each side that count; one more before them warms up")
    learning_rate: float = arg(1e-4, "rate of every update")
    dropout: float = arg(0.0, "the model's dropout rates, below 1; each side draws its own. KoGPT2 has 0.1")
    bf16: bool = arg(False, "compute in bfloat16")
    tolerance: float = arg(0.02, "of the losses after the first block, relative")
    peer_arguments: str = arg("{}", 'JSON of more arguments of the peers\' trainers, such as {"torch_compile": true}')
    peer_attention: str = arg(
        "sdpa", "attention of transformers in the peers; flash_attention_2 needs a GPU and the package flash-attn, and "
        "TRL then packs without a mask", choices=["sdpa", "eager", "flash_attention_2"],
    )  # fmt: skip
    torch_compile: bool = arg(False, "compile the layers of our side, however few updates; see finetune/train.py")
    sides: str = arg("kozero,padded,dynamic,grouped,packed", "which, by comma")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "texts", "batch_size", "length", "row_length", "rounds")
        at_least(0, self, "pass_rows")
        require(self.learning_rate > 0, f"--learning_rate {self.learning_rate:g}: must be above 0")
        require(0 <= self.dropout < 1, f"--dropout {self.dropout:g}: must be in [0, 1)")
        sides = self.sides.split(",")
        unknown = [side for side in sides if side not in SIDES]
        require(len(set(sides)) == len(sides), f"--sides {self.sides}: names one twice")
        try:
            more = json.loads(self.peer_arguments)
        except ValueError:
            more = None
        require(isinstance(more, dict), f"--peer_arguments {self.peer_arguments}: is no JSON object")
        flash, there = self.peer_attention == "flash_attention_2", find_spec("flash_attn") and torch.cuda.is_available()
        require(there or not flash, "--peer_attention flash_attention_2: needs a GPU and the package flash-attn; "
                "install it, or choose sdpa")  # fmt: skip
        require(not unknown, f"--sides {self.sides}: {''.join(unknown[:1])} is none of {', '.join(SIDES)}")


@dataclass(frozen=True)
class Work:
    """What all sides get.

    Args: model: a folder as published; learn, held_out: texts; rows, row_length: of a packed update; pass_rows: of one
    forward pass of ours.
    """

    model: str
    learn: Pairs
    held_out: Pairs
    batch_size: int
    length: int
    rows: int
    row_length: int
    pass_rows: int
    learning_rate: float
    bf16: bool
    torch_compile: bool
    peer_arguments: dict[str, Any]
    peer_attention: str

    @property
    def tokens(self) -> int:
        """Real tokens of a block."""
        return sum(len(ids) for ids, _ in self.learn)

    def flops(self, config: Any) -> float:
        """Operations of a real token."""
        learnt = sum(label != IGNORE for _, labels in self.learn for label in labels)
        return limit.flops_a_token(config, np.array([len(ids) for ids, _ in self.learn]), learnt)


def main() -> None:
    """Measure, check, print a Markdown table."""
    (arguments,) = parse_arguments(BenchmarkArguments, prog="benchmarks/finetuning.py", description=__doc__)
    names = arguments.sides.split(",")
    with tempfile.TemporaryDirectory(prefix="kozero-finetuning-") as folder:
        work = prepare(arguments, Path(folder))
        mean = work.tokens / len(work.learn)
        print(f"{len(work.learn)} texts of {mean:.1f} tokens; packed: {work.rows} rows of {work.row_length} an update")
        sides = [Contender(name, SIDES[name], (work,)) for name in names]
        blocks = compete([*sides, limit.contender(arguments.bf16)], arguments.rounds)
    products = blocks.pop(limit.NAME)
    rows = [figures(name, found) for name, found in blocks.items()]
    limits = limit.shared(rows, products, work.flops(read_config(Path(arguments.config_file))))
    first = rows[0]
    for row in rows:
        row["ratio"] = paired(row["speeds"], first["speeds"])
        row["off"] = abs(row["held_out"] / first["held_out"] - 1)
    print(table(
        ("side", "real tokens/s", "least to most", "times the first", "of the limit", "loss of an update",
         "loss afterwards"),
        [(row["name"], f"{row['speed']:.1f}", "{:.1f} to {:.1f}".format(*row["spread"]),
          f"{row['ratio']:.2f}", f"{row['share']:.0%}", f"{row['losses'][0]:.4f}", f"{row['held_out']:.4f}")
         for row in rows],
    ))  # fmt: skip
    print(f"limit: {limits['limit_speed']:,.0f} real tokens/s at {median(limits['product_flops']) / 1e9:,.0f} GFLOP/s")
    report(arguments, rows, **limits)
    for row in rows:
        told = f"{row['name']}: loss {row['held_out']:.4f} is {row['off']:.1%} from the first's"
        require(row["off"] <= arguments.tolerance, told)


def figures(name: str, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """A side's row; its first block warmed up."""
    told = {key: blocks[0][key] for key in ("losses", "held_out")}
    return {"name": name} | speeds(blocks) | told | {"blocks": blocks}


def prepare(arguments: BenchmarkArguments, folder: Path) -> Work:
    """Weights as a published model has them, and texts by their ids."""
    distributed.setup()
    told = ModelArguments(
        config_file=arguments.config_file, tokenizer_name_or_path=arguments.tokenizer_name_or_path,
        dropout=arguments.dropout,
    )  # fmt: skip
    model = load_model(told, PauseArguments(), False, seed=0)
    longest, positions = max(arguments.length, arguments.row_length), model.config.n_positions
    require(longest <= positions, f"--length, --row_length {longest}: the model has {positions} positions")
    model.module.lm.config.activation_function = "gelu_new"  # as KoGPT2 and most GPT-2 say
    spare = range(model.config.vocab_size - len(model.tokenizer))  # ours never predicts rows without a token
    model.tokenizer.add_tokens([f"<spare{number}>" for number in spare])
    model.module.lm.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    task = TASKS[arguments.task]
    source, _ = sources(DataArguments(task=arguments.task, train_file=arguments.train_file), task)
    num = arguments.texts + HELD_OUT
    store = cached_store(source, task, "train", 4 * num, model.tokenizer, str(folder))
    fitted = fit(store, arguments.length, 0)
    require(len(fitted.used) >= num, f"{source}: {len(fitted.used)} texts of {arguments.length} tokens; {num} needed")
    prefixes, pairs = Prefixes(store, fitted.cut), []
    for number in fitted.used[:num]:
        text = prefixes.text(int(number), Pauses(0, 0))
        ids = text.ids.tolist()
        pairs.append((ids, [IGNORE] + [int(p) for p in text.predicts[:-1]]))
    learn, held_out = pairs[: arguments.texts], pairs[arguments.texts :]
    longest = max(len(ids) for ids, _ in learn)
    told = f"--row_length {arguments.row_length}"
    require(longest <= arguments.row_length, f"{told}: a text has {longest} tokens; longer rows or a smaller --length")
    packed = TrainingRows(LearnedTexts(learn), Pauses(0, 0), arguments.row_length, "packed", seed=0)
    rows = max(1, round(arguments.batch_size * len(packed) / len(learn)))
    pass_rows = min(arguments.pass_rows or rows, rows)
    rows -= rows % pass_rows  # whole passes
    return Work(
        str(folder / "model"), learn, held_out, arguments.batch_size, arguments.length, rows, arguments.row_length,
        pass_rows, arguments.learning_rate, arguments.bf16, arguments.torch_compile,
        json.loads(arguments.peer_arguments), arguments.peer_attention,
    )  # fmt: skip


class LearnedTexts(TokenStore):
    """Texts as `TrainingRows` reads a token store."""

    def __init__(self, pairs: Pairs) -> None:
        prompts = [next(k for k, label in enumerate(labels) if label != IGNORE) for _, labels in pairs]
        self.tokens = np.concatenate([np.asarray(ids) for ids, _ in pairs])
        ends = np.cumsum([len(ids) for ids, _ in pairs])
        starts = ends - [len(ids) for ids, _ in pairs]
        nothing, marks = np.full_like(starts, -1), np.zeros_like(starts)
        self.rows = np.stack([starts, starts, starts + prompts, ends, nothing, nothing, marks, marks], axis=1)

    def marks(self, number: int) -> np.ndarray:
        """No places for pauses."""
        return np.zeros(0, dtype=np.int64)


def ours(work: Work) -> Block:
    """This project, as finetune/train.py runs it on one process."""
    distributed.setup()
    model = load_model(ModelArguments(model_name_or_path=work.model), PauseArguments(), False, seed=0)
    rows = TrainingRows(LearnedTexts(work.learn), Pauses(0, 0), work.row_length, "packed", seed=0)
    sizes = BatchSizes(work.pass_rows, work.rows // work.pass_rows, 1)
    training = TrainingArguments(
        per_device_train_batch_size=sizes.micro, bf16=work.bf16, torch_compile=work.torch_compile
    )
    engine = build_engine(model.module, training, EngineSettings())
    if work.torch_compile:
        compile_layers(engine.module)
    ahead, consumed = Ahead(rows, sizes, 0), 0

    def block() -> dict[str, Any]:
        nonlocal consumed
        losses, tokens, begin = [], 0, time.perf_counter()
        for _ in range(-(-len(rows) // sizes.global_batch)):
            batches, number = ahead.step(consumed)
            losses.append(engine.train_step(batches, work.learning_rate).loss)
            tokens += number
            consumed += sizes.global_batch
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "tokens": tokens, "losses": losses, "held_out": score(engine.module.lm, work)}

    return block


def score(lm: torch.nn.Module, work: Work) -> float:
    """Mean loss of the held-out texts, one by one and in 32 bit."""
    lm.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, labels in work.held_out:
            inputs = torch.tensor([ids], device=lm.device)
            logits = type(lm).forward(lm, input_ids=inputs).logits[0, :-1]  # accelerate's own forward is in 16 bit
            wanted = torch.tensor(labels[1:], device=lm.device)
            total += F.cross_entropy(logits, wanted, reduction="sum").item()
            count += sum(label != IGNORE for label in labels[1:])
    lm.train()
    return total / count


class Clock(TrainerCallback):
    """Takes the time of a peer's updates."""

    begin = end = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the time at which the first update begins."""
        self.begin = self.begin or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the time at which the latest update ended."""
        if torch.cuda.is_available():  # which has been told of the update and may not have made it yet
            torch.cuda.synchronize()
        self.end = time.perf_counter()


def settings(work: Work, rows: int, updates: int) -> dict[str, Any]:
    """Arguments of a peer's trainer, as close to ours as they get; the rest are its defaults."""
    from transformers import TrainingArguments as PeerArguments

    known = PeerArguments.__dataclass_fields__
    unknown = [name for name in work.peer_arguments if name not in known]
    require(not unknown, f"--peer_arguments {json.dumps(work.peer_arguments)}: no argument {''.join(unknown[:1])!r}")
    recomputing = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in known)
    return {
        "output_dir": str(Path(work.model).parent / "peer"), "per_device_train_batch_size": rows,
        "max_steps": updates, "learning_rate": work.learning_rate, "lr_scheduler_type": "constant",
        "weight_decay": 0.01, "max_grad_norm": 1.0, "bf16": work.bf16, "use_cpu": not torch.cuda.is_available(),
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 0,
        "remove_unused_columns": False, recomputing: False,
    } | work.peer_arguments  # fmt: skip


def peer_block(trainer: Any, work: Work) -> Block:
    """One call of a peer's `train`, without what it does before its first update and after its last."""

    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)

    def block() -> dict[str, Any]:
        clock = Clock()
        trainer.add_callback(clock)
        trainer.state.log_history = []
        trainer.train()
        trainer.remove_callback(clock)
        losses = [point["loss"] for point in trainer.state.log_history if "loss" in point]
        lm = trainer.accelerator.unwrap_model(trainer.model)
        lm.set_attn_implementation("sdpa")  # flash attention knows no 32 bit
        held_out = score(lm, work)
        lm.set_attn_implementation(work.peer_attention)
        return {"seconds": clock.end - clock.begin, "tokens": work.tokens, "losses": losses, "held_out": held_out}

    return block


def peer_model(work: Work) -> torch.nn.Module:
    """The weights that all begin with, in 32 bit, as transformers loads them."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        work.model, dtype=torch.float32, attn_implementation=work.peer_attention
    )


def padded_rows(rows: list[dict[str, list[int]]], length: int) -> dict[str, torch.Tensor]:
    """A batch of `length` tokens a row, or if that is 0 as many as the longest has."""
    longest = length or max(len(row["input_ids"]) for row in rows)

    def filled(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
    mask = (torch.arange(longest) < lengths).long()
    return {"input_ids": filled("input_ids", 0), "attention_mask": mask, "labels": filled("labels", IGNORE)}


def hf_trainer(work: Work, rule: str) -> Block:
    """transformers' Trainer with one of its rules for batches."""
    from transformers import Trainer
    from transformers import TrainingArguments as PeerArguments

    torch.set_num_threads(distributed.usable_cores())
    lm = peer_model(work)
    data = [{"input_ids": ids, "labels": labels} for ids, labels in work.learn]
    sampling = "group_by_length" if rule == "grouped" else "random"
    updates = -(-len(data) // work.batch_size)
    arguments = PeerArguments(**settings(work, work.batch_size, updates), train_sampling_strategy=sampling)
    collate = partial(padded_rows, length=work.length if rule == "padded" else 0)
    return peer_block(Trainer(lm, arguments, data_collator=collate, train_dataset=data), work)


def padded(work: Work) -> Block:
    """Every row as long as --length."""
    return hf_trainer(work, "padded")


def dynamic(work: Work) -> Block:
    """Every row as long as the longest of its batch."""
    return hf_trainer(work, "dynamic")


def grouped(work: Work) -> Block:
    """The same with texts of similar lengths together."""
    return hf_trainer(work, "grouped")


def packed(work: Work) -> Block:
    """TRL's SFTTrainer with packing."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(distributed.usable_cores())
    lm = peer_model(work)
    data = Dataset.from_list(
        [{"input_ids": ids, "completion_mask": [int(t != IGNORE) for t in labels]} for ids, labels in work.learn]
    )
    arguments = SFTConfig(
        **settings(work, work.rows, 1), packing=True, max_length=work.row_length, completion_only_loss=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    trainer = SFTTrainer(lm, arguments, train_dataset=data, processing_class=tokenizer)
    trainer.args.max_steps = -(-len(trainer.train_dataset) // work.rows)  # all rows, which are known only now
    return peer_block(trainer, work)


SIDES = {"kozero": ours, "padded": padded, "dynamic": dynamic, "grouped": grouped, "packed": packed}

if __name__ == "__main__":
    run_main(main)
