"""Write text with a model; its pauses are put into the prompt and never shown.

python finetune/generate.py --model_name_or_path runs/run/model --prompt 긍정 --num_samples 3
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from finetune.arguments import ModelArguments
from finetune.decoding import DecodingArguments
from finetune.paused import PausedGenerator
from finetune.setup import inference_pauses, load_model
from finetune.writing import write_long
from kozero import distributed
from kozero.config import arg, at_least, parse_arguments
from kozero.data.readers import decode_lines
from kozero.errors import UserError, require, run_main
from kozero.folder import new_file, write_text
from kozero.json_files import not_utf8
from kozero.pause import InferencePauseArguments
from kozero.text_metrics import variety


@dataclass
class GenerationArguments:
    """What to write."""

    prompt: str | None = arg(None, "text to go on from; without it and --prompts_file: standard input, one a line")
    prompts_file: str | None = arg(None, "text file of prompts, one a line")
    num_samples: int = arg(1, "texts for each prompt")
    length: int = arg(0, "tokens of a long text, written in pieces of --max_new_tokens; 0: one piece")
    tail: int = arg(128, "tokens of the text so far that the next piece of a long one reads at most, whole sentences")
    batch_size: int = arg(8, "texts that are written at once")
    stream: bool = arg(False, "show words as they are written; one text at a time")
    output_file: str | None = arg(None, "JSON lines of prompt, text and settings")
    metrics: bool = arg(False, "tell how varied the texts are, and their perplexity under the model")

    def __post_init__(self) -> None:
        at_least(1, self, "num_samples", "tail", "batch_size")
        at_least(0, self, "length")
        require(not (self.prompt and self.prompts_file), "--prompt and --prompts_file: choose one of the two")
        require(not (self.stream and self.length), "--stream and --length: choose one of the two")


ARGUMENTS = (GenerationArguments, DecodingArguments, ModelArguments, InferencePauseArguments)


def main() -> None:
    """Load once, then write for every prompt."""
    arguments, decoding, model_arguments, pause_arguments = parse_arguments(
        *ARGUMENTS, prog="finetune/generate.py", description="Write text with a model."
    )
    require(
        not (arguments.stream and (decoding.num_beams > 1 or arguments.num_samples > 1)),
        "--stream: shows one text as it is written; leave out --num_beams and --num_samples",
    )
    distributed.setup()
    if arguments.output_file:
        new_file("--output_file", Path(arguments.output_file))
    prompts = prompts_of(arguments)
    model = load_model(model_arguments, pause_arguments, with_pauses=False, seed=decoding.seed)
    pauses = inference_pauses(model, pause_arguments)
    generator = PausedGenerator(model.module.lm.to(distributed.device()).eval(), model.tokenizer, pauses)
    writer = Writer(generator, arguments, decoding, model.config.n_positions)
    distributed.seed_everything(decoding.seed)
    written = []
    for prompt in prompts:
        texts = writer.write(prompt)
        written += [(prompt, text) for text in texts]
        if not arguments.stream:
            for text in texts:
                distributed.say(f"{prompt} {text}")
    told = {"model": model_arguments.model_name_or_path, "pauses": {"num": pauses.num, "placement": pauses.placement}}
    settings = told | asdict(decoding) | {"length": arguments.length, "tail": arguments.tail}
    finish(arguments, written, settings, generator)
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

    def check(self, prompt: str) -> None:
        """Refuse a prompt that is empty, or too long."""
        num_tokens, limit = len(self.generator.ids(prompt)), self.longest
        require(num_tokens > 0, "--prompt: empty; give at least a word")
        require(num_tokens <= limit, f"--prompt: {num_tokens} tokens; at most {limit} leave room for the answer")

    def write(self, prompt: str, **more: Any) -> list[str]:
        """The texts after a prompt. `more`: arguments of transformers' generate that are no settings, e.g. streamer."""
        self.check(prompt)
        prompts, settings = [prompt] * self.arguments.num_samples, self.decoding.settings() | more
        if self.arguments.length:
            length, tail = self.arguments.length, self.arguments.tail
            return write_long(self.generator, prompts, length, tail, self.arguments.batch_size, **settings)
        if self.arguments.stream:
            print(prompt, end=" ", flush=True)
            settings["streamer"] = TextStreamer(self.generator.tokenizer, skip_prompt=True, skip_special_tokens=True)
        return [text.strip() for text in self.generator.generate(prompts, self.arguments.batch_size, **settings)]


def finish(
    arguments: GenerationArguments, written: list[tuple[str, str]], settings: dict[str, Any], generator: PausedGenerator
) -> None:
    """The file and the metrics that were asked for."""
    if arguments.output_file and distributed.is_main():
        rows = ({"prompt": prompt, "text": text, "settings": settings} for prompt, text in written)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(Path(arguments.output_file), lines)
    if arguments.metrics:
        found = variety([text for _, text in written]) | {"perplexity": perplexity(generator, written)}
        for name, value in found.items():
            distributed.say(f"{name:>16} {value:.4f}")
        if arguments.output_file and distributed.is_main():
            path = Path(arguments.output_file).with_suffix(".metrics.json")
            write_text(path, json.dumps({"metrics": found, "settings": settings}, indent=2, ensure_ascii=False))


@torch.no_grad()
def perplexity(generator: PausedGenerator, written: Sequence[tuple[str, str]]) -> float:
    """Of all texts given their prompts with pauses, by the model that wrote them; of a long text what it sees last."""
    total, count = 0.0, 0
    for prompt, text in written:
        ids = [*generator.prompt(prompt).tolist(), *generator.ids(f" {text}")]
        first = len(ids) - len(generator.ids(f" {text}"))
        cut = max(0, len(ids) - generator.lm.config.n_positions)
        part = torch.tensor([ids[cut:]], device=generator.lm.device)
        losses = torch.nn.functional.cross_entropy(
            generator.lm(part).logits[0, :-1].float(), part[0, 1:], reduction="none"
        )
        told = losses[max(0, first - cut - 1) :]
        total, count = total + told.double().sum().item(), count + len(told)
    return math.exp(min(total / max(1, count), 700.0))


def prompts_of(arguments: GenerationArguments) -> Iterable[str]:
    """The prompts, those of standard input as they come."""
    if arguments.prompt is not None:
        return [arguments.prompt]
    if arguments.prompts_file:
        found = [line.strip() for _, line in decode_lines(Path(arguments.prompts_file)) if line.strip()]
        require(bool(found), f"--prompts_file {arguments.prompts_file}: no prompt in it")
        return found
    return lines_of(sys.stdin.buffer)


def lines_of(lines: Iterable[bytes]) -> Iterator[str]:
    """Lines of standard input that are not empty; a person is asked for each."""
    ask()
    for number, line in enumerate(lines, start=1):
        try:
            prompt = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise UserError(f"standard input, line {number}: {not_utf8(line)}") from None
        if prompt:
            yield prompt
        ask()


def ask() -> None:
    """Where a person types."""
    if sys.stdin.isatty():
        print("prompt (Ctrl-D ends): ", end="", flush=True)


if __name__ == "__main__":
    run_main(main)
