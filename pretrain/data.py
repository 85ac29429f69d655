"""From the arguments to rows: the corpus tokenised and cut, its held-out part, the names of what is learned."""

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kozero import distributed
from kozero.config import BatchSizes
from kozero.data.batch import Rows
from kozero.data.order import Order
from kozero.data.readers import text_files
from kozero.data.store import unknown_id, unknown_note
from kozero.errors import require
from kozero.folder import cache_folder
from kozero.pause import Pauses, begins_inside
from models.heads import ROUTER
from pretrain.arguments import CorpusArguments, PretrainingArguments
from pretrain.chunks import Blocks, Numbered, cut_once, held_out_documents, open_cut
from pretrain.corpus import SPLITTERS, HubPiece, Piece, Shard, build_shard, hub_pieces, pieces_of, reading_key
from pretrain.full import FullBlockRows, FullEncoderRows
from pretrain.rows import BlockRows, EncoderRows, Masking, Tokens, num_special

SAMPLE_CORPUS = Path(__file__).parent.parent / "sample_data" / "corpus"
FILES_OF_A_SHARD, OTHER_FILES = 6, 512  # that are open at once
EVAL_ROWS = 32  # of a held-out batch over all ranks
VALIDATION_SEED = 0  # whatever the run's: the held-out scores of two runs are comparable


@dataclass(frozen=True)
class PretrainingData:
    """Rows to train on, rows to validate on (None without), and the objectives' names in the module's order."""

    training: Rows
    validation: Rows | None
    objectives: tuple[str, ...]

    def num_validation(self, limit: int) -> int:
        """Rows that are scored when at most `limit` are wanted (0: all)."""
        num = len(self.validation) if self.validation else 0
        return min(limit or num, num)


def check_corpus(arguments: CorpusArguments) -> None:
    """Refuse a corpus that is not there, or whose first document is no text, before a model is built. Collective."""

    def first() -> bool:
        return any(document for piece in find_pieces(arguments) for document in piece.documents())

    named = "corpus_hub" if arguments.corpus_hub else "corpus_path"
    require(distributed.once_a_machine(first), f"--{named} {getattr(arguments, named)}: no text in it")


def open_shards(arguments: CorpusArguments, tokenizer: Any) -> list[Shard]:
    """The corpus as shards. One rank of each machine tokenises what is not there yet, the others wait."""
    if not (arguments.corpus_path or arguments.corpus_hub):
        used = f"using the sample corpus in {SAMPLE_CORPUS.parent.name}/"
        distributed.say(f"no --corpus_path and no --corpus_hub: {used}")
    cache = cache_folder(arguments.cache_dir)
    names = distributed.once_a_machine(lambda: build_shards(arguments, tokenizer, cache))
    allow_open_files(FILES_OF_A_SHARD * len(names) + OTHER_FILES)
    shards = [Shard.open(cache / name) for name in names]
    counts = np.array([(s.num_documents, len(s.sentences) - 1, s.sentences[-1]) for s in shards]).reshape(-1, 3).sum(0)
    require(counts[2] > 0, "the corpus has no text that the tokenizer knows")
    num_held_out = sum(held_out_documents([s.num_documents for s in shards], arguments.validation_fraction))
    documents = f"{counts[0]:,} documents ({num_held_out:,} held out)"
    distributed.say(f"corpus: {documents}, {counts[1]:,} sentences, {counts[2]:,} tokens")
    num_unk = sum(shard.num_unk for shard in shards)
    for note in unknown_note(num_unk, int(counts[2]), tokenizer, "; there is no loss on them"):
        distributed.say(f"corpus: {note}")
    return shards


def allow_open_files(num: int) -> None:
    """Raise this process's limit of open files: a map holds its file.

    Raises: UserError where the system's own limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = hard == resource.RLIM_INFINITY or num <= hard
    require(enough, f"the corpus needs {num:,} open files and {hard:,} are allowed; join small files into larger ones")
    if soft != resource.RLIM_INFINITY and soft < num:
        resource.setrlimit(resource.RLIMIT_NOFILE, (num, hard))


def find_pieces(arguments: CorpusArguments) -> list[Piece | HubPiece]:
    """The corpus in pieces that are tokenised one by one."""
    if arguments.corpus_hub:
        return hub_pieces(arguments.corpus_hub, arguments.hub_split, arguments.text_column)
    path = Path(arguments.corpus_path or SAMPLE_CORPUS)
    return [piece for file in text_files("--corpus_path", path) for piece in pieces_of(file)]


def build_shards(arguments: CorpusArguments, tokenizer: Any, cache: Path) -> list[str]:
    """The names of the shards of all pieces, with a bar while they are made."""
    pieces, split = find_pieces(arguments), SPLITTERS[arguments.sentences]()
    reading = reading_key(tokenizer, arguments.sentences)
    hidden = not distributed.is_main() or len(pieces) == 1
    bar = tqdm(pieces, desc="tokenising", unit="piece", disable=hidden or None)
    return [build_shard(piece, tokenizer, split, reading, cache).name for piece in bar]


def number_rows(shards: list[Shard], corpus: CorpusArguments, tokenizer: Any) -> tuple[Numbered, Numbered]:
    """The corpus cut into rows: those to train on, those held out."""
    length, documents = corpus.max_seq_length, [shard.num_documents for shard in shards]
    ends = list(zip(shards, held_out_documents(documents, corpus.validation_fraction), strict=True))
    if corpus.task == "clm":
        parts = [Blocks(shard, length - corpus.num_pauses, tokenizer.eos_token_id, num) for shard, num in ends]
    else:
        room = length - num_special(corpus.task)
        folders = distributed.once_a_machine(lambda: [cut_once(shard, room) for shard in shards])
        parts = [open_cut(folder, *end) for folder, end in zip(folders, ends, strict=True)]
    train, held_out = (Numbered(parts, held_out=held) for held in (False, True))
    require(len(train) > 0, "the corpus has no document left to train on; lower --validation_fraction")
    alone = "the corpus is one row, and a passage is told apart from others; give more text, or --task mlm_sop"
    require(corpus.task != "mlm_ict" or len(train) > 1, f"--task mlm_ict: {alone}")
    short = f"no document has two sentences that fit into a row of --max_seq_length {length} tokens"
    by_kiwi = "" if corpus.sentences == "kiwi" else "give --sentences kiwi, "
    advice = f"put one sentence on a line and a blank line between documents, {by_kiwi}or --task mlm"
    second = corpus.task in ("mlm", "clm") or train.num_divisible() > 0
    require(second, f"--task {corpus.task}: {short}; {advice}")
    return train, held_out


def full_rows(shards: list[Shard], corpus: CorpusArguments, tokenizer: Any, router: bool) -> Rows:
    """As many rows as there are to train on, each as long as the longest; see pretrain/full.py."""
    train, _ = number_rows(shards, corpus, tokenizer)
    if corpus.task == "clm":
        return FullBlockRows(len(train), len(tokenizer), corpus.max_seq_length)
    longest = train.longest(corpus.max_seq_length - num_special(corpus.task))
    masking = Masking(Tokens.of(tokenizer), corpus.mask_share, corpus.whole_word_mask)
    return FullEncoderRows(len(train), longest, masking, corpus.task, router, corpus.max_seq_length)


def make_rows(
    shards: list[Shard], corpus: CorpusArguments, training: PretrainingArguments, sizes: BatchSizes, tokenizer: Any,
    router: bool, pause_id: int | None = None,
) -> PretrainingData:  # fmt: skip
    """The rows of a task. `router`: the model has the two losses of a Switch transformer."""
    length = corpus.max_seq_length
    train, held_out = number_rows(shards, corpus, tokenizer)
    if "_" in corpus.task:
        distributed.say(share_of_second(corpus.task, train, held_out))

    pauses = None
    if corpus.num_pauses:
        pauses = Pauses(pause_id, corpus.num_pauses, "random", begins_inside(tokenizer), training.seed)

    def rows(numbered: Numbered, group: int, seed: int, epoch_rows: int) -> Rows:
        order = Order(len(numbered), epoch_rows, group, seed, numbered.lengths)
        if corpus.task == "clm":
            return BlockRows(numbered, order, length, pauses, unknown_id(tokenizer))
        masking = Masking(Tokens.of(tokenizer), corpus.mask_share, corpus.whole_word_mask)
        return EncoderRows(numbered, order, masking, corpus.task, router, length)

    eval_rows = held_out_sizes(training, sizes.world_size).global_batch
    limit = training.max_steps_per_epoch * sizes.global_batch or len(train)
    validation = rows(held_out, eval_rows, VALIDATION_SEED, len(held_out)) if len(held_out) else None
    objectives = (*corpus.task.split("_"), *(ROUTER if router else ()))
    training_rows = rows(train, sizes.global_batch, training.seed, min(limit, len(train)))
    return PretrainingData(training_rows, validation, objectives)


def share_of_second(task: str, train: Numbered, held_out: Numbered) -> str:
    """How many rows carry the second objective, in words."""
    shares = {k: n.num_divisible() / len(n) for k, n in {"training": train, "held-out": held_out}.items() if len(n)}
    told = " and ".join(f"{share:.1%} of the {name} rows" for name, share in shares.items())
    line = f"{task.split('_')[1]}: {told} have the two sentences that it needs"
    return line if all(shares.values()) else f"warning: {line}; it gets no held-out score"


def held_out_sizes(training: PretrainingArguments, world_size: int) -> BatchSizes:
    """How held-out rows are dealt out: EVAL_ROWS in a batch over all ranks unless --eval_batch_size says otherwise. A
    passage is told apart from the others of its batch, so scores are comparable where this is the same."""
    return BatchSizes(training.per_device_eval_batch_size or -(-EVAL_ROWS // world_size), 1, world_size)
