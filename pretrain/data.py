"""From the arguments to rows: the corpus tokenised and cut, its held-out part, the names of what is learned."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kozero import distributed
from kozero.config import BatchSizes
from kozero.data.batch import Rows
from kozero.data.order import Order
from kozero.errors import require
from pretrain.arguments import CorpusArguments, PretrainingArguments
from pretrain.chunks import Blocks, Numbered, cut
from pretrain.corpus import (
    SPLITTERS,
    HubPiece,
    Piece,
    Shard,
    build_shard,
    find_files,
    hub_pieces,
    pieces_of,
    reading_key,
)
from pretrain.full import FullBlockRows, FullEncoderRows
from pretrain.rows import BlockRows, EncoderRows, Masking, Tokens, num_special

SAMPLE_CORPUS = Path(__file__).parent.parent / "sample_data" / "corpus"
VALIDATION_SEED = 0  # whatever the run's: the held-out scores of two runs are comparable


@dataclass(frozen=True)
class PretrainingData:
    """Rows to train on, rows to validate on (None without), and the objectives' names in the module's order."""

    training: Rows
    validation: Rows | None
    objectives: tuple[str, ...]


def open_shards(arguments: CorpusArguments, tokenizer: Any) -> list[Shard]:
    """The corpus as shards. One rank of each machine tokenises what is not there yet, the others wait."""
    if not (arguments.corpus_path or arguments.corpus_hub):
        distributed.say(
            f"no --corpus_path and no --corpus_hub: using the sample corpus in {SAMPLE_CORPUS.parent.name}/"
        )
    cache = Path(arguments.cache_dir).expanduser()
    names = distributed.once_a_machine(lambda: build_shards(arguments, tokenizer, cache))
    shards = [Shard.open(cache / name) for name in names]
    counts = [sum(len(part) for part in parts) for parts in zip(*map(sizes_of, shards), strict=True)]
    distributed.say("corpus: {:,} documents, {:,} sentences, {:,} tokens".format(*counts))
    require(counts[2] > 0, f"{arguments.corpus_path or arguments.corpus_hub}: no text in it")
    return shards


def sizes_of(shard: Shard) -> tuple:
    """What is counted of a shard."""
    return range(shard.num_documents), range(len(shard.sentences) - 1), range(int(shard.sentences[-1]))


def find_pieces(arguments: CorpusArguments) -> list[Piece | HubPiece]:
    """The corpus in pieces that are tokenised one by one."""
    if arguments.corpus_hub:
        return hub_pieces(arguments.corpus_hub, arguments.hub_split, arguments.text_column)
    return [piece for path in find_files(Path(arguments.corpus_path or SAMPLE_CORPUS)) for piece in pieces_of(path)]


def build_shards(arguments: CorpusArguments, tokenizer: Any, cache: Path) -> list[str]:
    """The names of the shards of all pieces, with a bar while they are made."""
    pieces, split = find_pieces(arguments), SPLITTERS[arguments.sentences]()
    reading = reading_key(tokenizer, arguments.sentences)
    hidden = not distributed.is_main() or len(pieces) == 1
    bar = tqdm(pieces, desc="tokenising", unit="piece", disable=hidden or None)
    return [build_shard(piece, tokenizer, split, reading, cache).name for piece in bar]


def number_rows(shards: list[Shard], corpus: CorpusArguments, tokenizer: Any) -> tuple[Numbered, Numbered]:
    """The corpus cut into rows: those to train on, those held out."""
    length, fraction = corpus.max_seq_length, corpus.validation_fraction
    if corpus.task == "clm":
        parts = [Blocks(shard, length, tokenizer.eos_token_id, fraction) for shard in shards]
    else:
        room = length - num_special(corpus.task)
        parts = distributed.machine_first(lambda: [cut(shard, room, fraction) for shard in shards])
    train, held_out = (Numbered(parts, held_out=held) for held in (False, True))
    require(len(train) > 0, "the corpus has no document left to train on; lower --validation_fraction")
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
    shards: list[Shard],
    corpus: CorpusArguments,
    training: PretrainingArguments,
    sizes: BatchSizes,
    tokenizer: Any,
    router: bool,
) -> PretrainingData:
    """The rows of a task. `router`: the model has the two losses of a Switch transformer."""
    length = corpus.max_seq_length
    train, held_out = number_rows(shards, corpus, tokenizer)

    def rows(numbered: Numbered, group: int, seed: int, epoch_rows: int) -> Rows:
        order = Order(len(numbered), epoch_rows, group, seed, numbered.lengths)
        if corpus.task == "clm":
            return BlockRows(numbered, order, length)
        masking = Masking(Tokens.of(tokenizer), corpus.mask_share, corpus.whole_word_mask)
        return EncoderRows(numbered, order, masking, corpus.task, router, length)

    limit = training.max_steps_per_epoch * sizes.global_batch or len(train)
    validation = (
        rows(held_out, sizes.micro * sizes.world_size, VALIDATION_SEED, len(held_out)) if len(held_out) else None
    )
    objectives = (*corpus.task.split("_"), *(("balance", "router_z") if router else ()))
    return PretrainingData(
        rows(train, sizes.global_batch, training.seed, min(limit, len(train))), validation, objectives
    )
