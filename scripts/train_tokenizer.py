"""Train a Korean tokenizer: BPE in KoGPT2's form (spaces as ▁, its special tokens), or WordPiece in BERT's form for
encoders. Both have 100 spare tokens.

python scripts/train_tokenizer.py --files sample_data/corpus --vocab_size 2000 --output_dir runs/tokenizer
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kozero.config import arg, parse_arguments
from kozero.data.readers import decode_lines, text_files
from kozero.errors import require, run_main
from kozero.seal import new_folder
from models.tokenizer import cut_within, keep_out_of_text

GPT = ["<s>", "</s>", "<usr>", "<pad>", "<sys>", "<unk>", "<mask>", *(f"<unused{n}>" for n in range(100))]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"[unused{n}]" for n in range(100))]
MOST_TOKENS = 2**20  # the library sets memory aside for all of them before it reads a text
LONGEST_WORD = 1000  # characters; training takes time with the square of a word's length
LONG_WORD = re.compile(rf"[^ ]{{{LONGEST_WORD}}}(?=[^ ])")
TEXT_COLUMNS = ("document", "text")
SPECIAL = {"bpe": GPT, "wordpiece": BERT}  # ids from 0 on, as in KoGPT2 and in BERT


@dataclass
class TokenizerArguments:
    """What to train on, how large."""

    files: list[str] = field(
        default_factory=list, metadata={"help": "UTF-8 text files, one text a line, or folders of .txt and .dat files"}
    )
    kind: str = arg("bpe", "bpe: for models that write; wordpiece: for encoders", choices=list(SPECIAL))
    vocab_size: int = arg(8192, "tokens in all, the special and spare ones (bpe 107, wordpiece 105) among them")
    output_dir: str = arg("runs/tokenizer", "folder for tokenizer.json and tokenizer_config.json")
    column: str | None = arg(
        None,
        "tab-separated column to read: its name in the first line, or where that line is no header its number from 0; "
        f"-1: whole lines; default: whole lines, of a file with columns {' or '.join(TEXT_COLUMNS)}",
    )


def main() -> None:
    """Train, save, and show what came out."""
    (arguments,) = parse_arguments(TokenizerArguments, prog="scripts/train_tokenizer.py", description=__doc__)
    require(bool(arguments.files), "--files: name at least one text file")
    smallest = len(SPECIAL[arguments.kind])
    right = smallest < arguments.vocab_size <= MOST_TOKENS
    require(right, f"--vocab_size {arguments.vocab_size}: must be above {smallest} and at most {MOST_TOKENS:,}")
    files = [file for name in arguments.files for file in text_files("--files", Path(name))]
    for file in files:
        rows = file.suffix.lower() in (".json", ".jsonl", ".csv")
        require(not rows, f"--files {file}: holds rows, not texts; write its texts into a .txt file, one a line")
    with new_folder("--output_dir", Path(arguments.output_dir)) as folder:
        tokenizer = KINDS[arguments.kind](lines(files, arguments.column), arguments.vocab_size)
        tokenizer.save_pretrained(folder)
        keep_out_of_text(tokenizer)  # as models read it
    sample = next(lines(files, arguments.column))[:40]
    if len(tokenizer) < arguments.vocab_size:
        print(f"--vocab_size {arguments.vocab_size:,}: the text gives no more than {len(tokenizer):,} tokens")
    if len(tokenizer) > arguments.vocab_size:
        told = f"the characters of the text alone take {len(tokenizer):,} tokens, so that none is longer"
        print(f"warning: --vocab_size {arguments.vocab_size:,}: {told}; give more")
    print(f"{len(tokenizer):,} tokens; {sample!r} -> {' '.join(tokenizer.tokenize(sample))}")
    print(arguments.output_dir)


def lines(files: list[Path], column: str | None) -> Iterator[str]:
    """Texts of the files that are not empty, in NFC, longer words cut at LONGEST_WORD."""
    found = False
    for name in files:
        place, begin = 0, 1
        for number, line in decode_lines(name):
            fields = line.split("\t")
            if number == 1:
                place, begin = column_of(f"{name}:1", fields, column)
            if number >= begin and place >= 0:
                require(place < len(fields), f"{name}:{number}: no column {place}; the line has {len(fields)}")
                line = fields[place]
            if number >= begin and line.strip():
                found = True
                yield LONG_WORD.sub(r"\g<0> ", unicodedata.normalize("NFC", line.strip()))
    require(found, f"{', '.join(map(str, files))}: no text")


def column_of(where: str, fields: list[str], column: str | None) -> tuple[int, int]:
    """The place of the column to read in a file, -1 for whole lines, and the line that its texts begin in.

    Args: fields: of the first line.

    Raises: UserError for a file with columns of which none is chosen.
    """
    if column is None:
        column = next((name for name in TEXT_COLUMNS if name in fields), None)
        more = "name the one to read with --column, or give --column -1 for whole lines"
        require(column is not None or len(fields) == 1, f"{where}: {len(fields)} tab-separated columns; {more}")
    if column is None or column.removeprefix("-").isdecimal():
        return int(column or -1), 1
    require(column in fields, f"{where}: no column {column!r}; found {', '.join(fields)[:200]}")
    return fields.index(column), 2


def train_bpe(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """BPE over NFC-normalised text. A character that was never seen becomes <unk>. No merges spell a special token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, cut_within(GPT)])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=GPT, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = words
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="<mask>", **names)


def train_wordpiece(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """WordPiece over NFC-normalised text, case kept, punctuation apart. A word with a character that was never seen
    becomes [UNK]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.BertNormalizer(lowercase=False)])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=BERT, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names)


KINDS = {"bpe": train_bpe, "wordpiece": train_wordpiece}

if __name__ == "__main__":
    run_main(main)
