"""Train a Korean tokenizer: BPE in KoGPT2's form (spaces as ▁, its special tokens), or WordPiece in BERT's form for
encoders. Both have 100 spare tokens.

python scripts/train_tokenizer.py --files reviews.txt --vocab_size 8192 --output_dir runs/tokenizer
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
from kozero.folder import writable_folder

GPT = ["<s>", "</s>", "<usr>", "<pad>", "<sys>", "<unk>", "<mask>", *(f"<unused{n}>" for n in range(100))]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"[unused{n}]" for n in range(100))]
LONGEST_WORD = 1000  # characters; training takes time with the square of a word's length
LONG_WORD = re.compile(rf"[^ ]{{{LONGEST_WORD}}}(?=[^ ])")
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
    column: int = arg(-1, "tab-separated column to read, counted from 0; -1: the whole line")


def main() -> None:
    """Train, save, and show what came out."""
    (arguments,) = parse_arguments(TokenizerArguments, prog="scripts/train_tokenizer.py", description=__doc__)
    require(bool(arguments.files), "--files: name at least one text file")
    smallest = len(SPECIAL[arguments.kind])
    require(arguments.vocab_size > smallest, f"--vocab_size {arguments.vocab_size}: must be above {smallest}")
    folder = writable_folder("--output_dir", Path(arguments.output_dir))
    require(
        not (folder / "tokenizer.json").exists(),
        f"--output_dir {folder}: holds a tokenizer.json already; choose another folder, or delete the file",
    )
    files = [file for name in arguments.files for file in text_files("--files", Path(name))]
    tokenizer = KINDS[arguments.kind](lines(files, arguments.column), arguments.vocab_size)
    tokenizer.save_pretrained(arguments.output_dir)
    sample = next(lines(files, arguments.column))[:40]
    print(f"{len(tokenizer):,} tokens; {sample!r} -> {' '.join(tokenizer.tokenize(sample))}")
    print(arguments.output_dir)


def lines(files: list[Path], column: int) -> Iterator[str]:
    """Texts of the files that are not empty, in NFC, longer words cut at LONGEST_WORD."""
    found = False
    for name in files:
        for number, line in decode_lines(name):
            if column >= 0:
                fields = line.split("\t")
                require(column < len(fields), f"{name}:{number}: no column {column}; the line has {len(fields)}")
                line = fields[column]
            if line.strip():
                found = True
                yield LONG_WORD.sub(r"\g<0> ", unicodedata.normalize("NFC", line.strip()))
    require(found, f"{', '.join(map(str, files))}: no text")


def train_bpe(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """BPE over NFC-normalised text. A character that was never seen becomes <unk>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=GPT, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
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
