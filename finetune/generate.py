"""Write text with a model; its pauses are put into the prompt and never shown.

python finetune/generate.py --model_name_or_path runs/run/model --prompt 긍정 --num_samples 3
"""

import json
import math
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

from finetune.arguments import ModelArguments
from finetune.decoding import DecodingArguments
from finetune.paused import PausedGenerator
from finetune.setup import inference_pauses, load_model
from finetune.writing import Written, write_long
from kozero import distributed
from kozero.config import arg, at_least, parse_arguments
from kozero.data.readers import decode_lines, numbered_lines
from kozero.errors import UserError, require, run_main
from kozero.folder import growing_file, incomplete, new_file, write_text
from kozero.json_files import has_lone_surrogate
from kozero.pause import InferencePauseArguments
from kozero.text_metrics import variety


@dataclass
class GenerationArguments:
    """What to write."""

    prompt: str | None = arg(None, "text to go on from; without it and --prompts_file: standard input, one a line")
    prompts_file: str | None = arg(None, "text file of prompts, one a line")
    num_samples: int = arg(1, "texts for each prompt, 100,000 at most")
    length: int = arg(0, "tokens of a long text, 100,000 at most, in pieces of --max_new_tokens; 0: one piece")
    tail: int = arg(128, "tokens of the text so far that the next piece of a long one reads at most, whole sentences")
    batch_size: int = arg(8, "texts that are written at once, 1,024 at most")
    stream: bool = arg(False, "show words as they are written; one text at a time")
    output_file: str | None = arg(
        None, "JSON lines of prompt, text and settings; NAME.incomplete has each as soon as it is written"
    )
    metrics: bool = arg(False, "tell how varied the texts are, and their perplexity under the model")

    def __post_init__(self) -> None:
        at_least(1, self, "num_samples", most=100_000)
        at_least(1, self, "batch_size", most=1024)
        at_least(1, self, "tail")
        at_least(0, self, "length", most=100_000)
        require(not (self.prompt and self.prompts_file), "--prompt and --prompts_file: choose one of the two")
        require(not (self.stream and self.length), "--stream and --length: choose one of the two")


ARGUMENTS = (GenerationArguments, DecodingArguments, ModelArguments, InferencePauseArguments)
METRICS = ".metrics.json"  # in the place of the ending of --output_file
REPEATING = ("num_samples", "length", "tail", "batch_size")  # without them no text can be written again
Prompt = tuple[str, str]  # where it stands, and the text


def main() -> None:
    """Load once, then write for every prompt."""
    arguments, decoding, model_arguments, pause_arguments = parse_arguments(
        *ARGUMENTS, prog="finetune/generate.py", description="Write text with a model."
    )
    alone = arguments.num_samples == 1
    message = "--stream: shows one text as it is written; leave out --num_beams and --num_samples"
    require(not arguments.stream or (alone and decoding.num_beams == 1), message)
    message = f"--num_samples {arguments.num_samples}: without chance (--temperature 0) all are the same; leave it out"
    require(alone or decoding.temperature > 0, message)
    distributed.setup()
    if arguments.output_file:
        path = Path(arguments.output_file)
        others = [incomplete(path), *[path.with_suffix(METRICS)] * arguments.metrics]
        new_file("--output_file", path, *others, reads=(arguments, model_arguments))
    prompts = prompts_of(arguments)
    model = load_model(model_arguments, pause_arguments, with_pauses=False, seed=decoding.seed)
    pauses = inference_pauses(model, pause_arguments)
    generator = PausedGenerator(model.module.lm.to(distributed.device()).eval(), model.tokenizer, pauses)
    writer = Writer(generator, arguments, decoding, model.config.n_positions)
    distributed.seed_everything(decoding.seed)
    told = asdict(model_arguments) | {"pauses": {"num": pauses.num, "placement": pauses.placement}}
    told |= asdict(decoding) | {name: getattr(arguments, name) for name in REPEATING}
    write_all(writer, prompts, told)
    distributed.shutdown()


@dataclass
class Writer:
    """Writes after prompts as the arguments say. `positions`: tokens that the model can see at once."""

    generator: PausedGenerator
    arguments: GenerationArguments
    decoding: DecodingArguments
    positions: int

    def __post_init__(self) -> None:
        new, num = self.decoding.max_new_tokens, self.generator.pauses.num
        self.longest = self.positions - num - new
        require(self.longest > 0, f"--max_new_tokens {new}: the model has {self.positions} positions, {num} for pauses")
        if self.arguments.length:
            self.arguments.tail = min(self.arguments.tail, self.longest)

    def check(self, prompt: str, where: str = "--prompt") -> None:
        """Refuse a prompt that is empty, or too long."""
        require(not has_lone_surrogate(prompt), f"{where}: holds half a character (a lone surrogate)")
        num_tokens, limit = len(self.generator.ids(prompt)), self.longest
        require(num_tokens > 0, f"{where}: empty; give at least a word")
        require(num_tokens <= limit, f"{where}: {num_tokens} tokens; at most {limit} leave room for the answer")

    def write(self, prompts: Iterable[str], **more: Any) -> Iterator[Written]:
        """A text after each prompt, --batch_size of them at once. `more`: arguments of transformers' generate that are
        no settings, e.g. streamer."""
        arguments, settings, prompts = self.arguments, self.decoding.settings() | more, iter(prompts)
        while part := list(islice(prompts, arguments.batch_size)):
            if arguments.length:
                yield from write_long(self.generator, part, arguments.length, arguments.tail, len(part), **settings)
            else:
                pieces = self.generator.continue_texts(part, len(part), **settings)
                for prompt, piece in zip(part, pieces, strict=True):
                    yield Written(prompt, piece.text.strip(), [piece])


def write_all(writer: Writer, prompts: Iterable[Prompt], settings: dict[str, Any]) -> None:
    """Write, show, keep, measure. Of prompts that come one by one each is answered before the next is asked for."""
    arguments = writer.arguments
    known = prompts if isinstance(prompts, list) else None
    for where, prompt in known or ():
        writer.check(prompt, where)
    groups = [[prompt for _, prompt in known]] if known else one_by_one(writer, prompts)
    texts: list[str] = []
    losses: list[torch.Tensor] = []
    path = Path(arguments.output_file) if arguments.output_file and distributed.is_main() else None
    with growing_file(path) if path else nullcontext() as file:
        for group in groups:
            asked = (prompt for prompt in group for _ in range(arguments.num_samples))
            for found in writer.write(asked, **shown(writer, group)):
                if arguments.metrics:
                    texts.append(found.text)
                    losses += [writer.generator.losses(piece) for piece in found.pieces if piece.ids]
                if not arguments.stream:
                    distributed.say(found.whole)
                if file:
                    row = {"prompt": found.prompt, "text": found.text, "settings": settings}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
    if texts:
        tell_metrics(arguments.output_file, texts, losses, settings)


def one_by_one(writer: Writer, prompts: Iterable[Prompt]) -> Iterator[list[str]]:
    """Prompts that are answered as they come. Where a person types, a mistake is told and the next one asked for."""
    for where, prompt in prompts:
        try:
            writer.check(prompt, where)
        except UserError as error:
            if not sys.stdin.isatty():
                raise
            print(f"error: {error}", file=sys.stderr)
            continue
        yield [prompt]


def shown(writer: Writer, prompts: Sequence[str]) -> dict[str, Any]:
    """What shows a text while it is written, if it is to be shown."""
    if not (writer.arguments.stream and distributed.is_main()):
        return {}
    writer.arguments.batch_size = 1
    return {"streamer": Shown(writer.generator, prompts)}


class Shown(BaseStreamer):
    """Prints each prompt and what follows it, as far as no token to come can change it."""

    def __init__(self, generator: PausedGenerator, prompts: Sequence[str]) -> None:
        self.generator, self.prompts = generator, iter(prompts)
        self.prompt: str | None = None  # before a text begins

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then a token at a time."""
        if self.prompt is None:
            self.prompt, self.ids, self.printed = next(self.prompts), [], 0
        else:
            self.ids += value.tolist()
        settled = len(self.ids)  # bytes of byte fallback are decoded together, all of them or none
        while settled and self.generator.tokenizer.convert_ids_to_tokens(self.ids[settled - 1]).startswith("<0x"):
            settled -= 1
        self.show(settled)

    def end(self) -> None:
        """The rest of a text, and of its line."""
        self.show(len(self.ids), end="\n")
        self.prompt = None

    def show(self, num: int, end: str = "") -> None:
        """What is new with the first `num` tokens."""
        piece = self.generator.continuation(self.prompt, np.array([]), self.ids[:num])
        text = Written(self.prompt, piece.text.strip(), [piece]).whole
        print(text[self.printed :], end=end, flush=True)
        self.printed = max(self.printed, len(text))


def tell_metrics(
    output_file: str | None, texts: Sequence[str], losses: Sequence[torch.Tensor], settings: dict[str, Any]
) -> None:
    """How varied the texts are and how likely the model finds what it wrote, the end of a text too; `losses` are (T,)
    nats of the tokens of each piece."""
    found: dict[str, float] = variety(texts)
    found["perplexity"] = math.exp(min(torch.cat(list(losses)).double().mean().item(), 700.0))
    found["empty"] = sum(not text for text in texts)
    for name, value in found.items():
        distributed.say(f"{name:>16} {value:.4f}" if isinstance(value, float) else f"{name:>16} {value}")
    if output_file and distributed.is_main():
        path = Path(output_file).with_suffix(METRICS)
        write_text(path, json.dumps({"metrics": found, "settings": settings}, indent=2, ensure_ascii=False))


def prompts_of(arguments: GenerationArguments) -> Iterable[Prompt]:
    """The prompts, those of standard input as they come."""
    if arguments.prompt is not None:
        return [("--prompt", composed(arguments.prompt))]
    if arguments.prompts_file:
        path = arguments.prompts_file
        lines = decode_lines(Path(path))
        found = [(f"{path}:{number}", composed(line)) for number, line in lines if line.strip()]
        require(bool(found), f"--prompts_file {path}: no prompt in it")
        return found
    return lines_of(sys.stdin.buffer)


def composed(prompt: str) -> str:
    """A prompt in NFC, as people type and as models have learned, without the space around it; file names and copied
    text may be decomposed."""
    return unicodedata.normalize("NFC", prompt).strip()


def lines_of(file: BinaryIO) -> Iterator[Prompt]:
    """Lines of standard input that are not empty; a person is asked for each."""
    found = sys.stdin.isatty()
    ask()
    for number, line in numbered_lines(file, "standard input, line "):
        if line.strip():
            found = True
            yield f"standard input, line {number}", composed(line)
        ask()
    require(found, "standard input: no prompt in it; give --prompt or --prompts_file")


def ask() -> None:
    """Where a person types."""
    if sys.stdin.isatty():
        print("prompt (Ctrl-D ends): ", end="", flush=True)


if __name__ == "__main__":
    run_main(main)
