"""Write text with a model; its pauses are appended to the prompt and never shown.

python finetune/generate.py --model_name_or_path runs/run/model --prompt 긍정 --num_samples 3
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from finetune.arguments import ModelArguments
from finetune.paused import PausedGenerator
from finetune.setup import inference_pauses, load_model
from kozero import distributed
from kozero.config import arg, at_least, check_seed, parse_arguments
from kozero.errors import UserError, require, run_main
from kozero.json_files import not_utf8
from kozero.pause import InferencePauseArguments


@dataclass
class GenerationArguments:
    """What to write and how."""

    prompt: str | None = arg(None, "text to go on from; without it: read prompts from standard input, one a line")
    num_samples: int = arg(1, "texts for each prompt")
    max_new_tokens: int = arg(64, "tokens to write at most")
    temperature: float = arg(1.0, "above 1 flattens the choice, below 1 sharpens it; 0: always the most likely token")
    top_k: int = arg(30, "choose among so many most likely tokens; 0: all")
    top_p: float = arg(0.95, "choose among the most likely tokens that make up this probability")
    repetition_penalty: float = arg(1.0, "above 1 makes tokens that are already there less likely")
    seed: int = arg(42, "seed of the choices")

    def __post_init__(self) -> None:
        at_least(1, self, "num_samples", "max_new_tokens")
        at_least(0, self, "top_k")
        check_seed(self.seed)
        require(
            self.temperature == 0 or self.temperature >= 0.01,
            f"--temperature {self.temperature}: must be 0, or 0.01 or more",
        )
        require(0 < self.top_p <= 1, f"--top_p {self.top_p}: must be above 0 and at most 1")
        require(self.repetition_penalty > 0, f"--repetition_penalty {self.repetition_penalty}: must be above 0")

    def settings(self) -> dict:
        """The arguments of transformers' generate."""
        shared = {"max_new_tokens": self.max_new_tokens, "repetition_penalty": self.repetition_penalty}
        if self.temperature == 0:
            return shared | {"do_sample": False}
        return shared | {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


def main() -> None:
    """Load once, then write for every prompt."""
    arguments, model_arguments, pause_arguments = parse_arguments(
        GenerationArguments, ModelArguments, InferencePauseArguments,
        prog="finetune/generate.py", description="Write text with a model.",
    )  # fmt: skip
    distributed.setup()
    model = load_model(model_arguments, pause_arguments, with_pauses=False, seed=arguments.seed)
    pauses = inference_pauses(model, pause_arguments)
    generator = PausedGenerator(model.module.lm.to(distributed.device()).eval(), model.tokenizer, pauses)
    distributed.seed_everything(arguments.seed)
    longest = model.config.n_positions - pauses.num - arguments.max_new_tokens
    require(
        longest > 0, f"--max_new_tokens {arguments.max_new_tokens}: the model has {model.config.n_positions} positions"
    )
    for prompt in [arguments.prompt] if arguments.prompt is not None else prompts_of(sys.stdin.buffer):
        num_tokens = len(generator.prompt(prompt)) - pauses.num
        require(num_tokens + pauses.num > 0, "--prompt: empty; give at least a word")
        require(num_tokens <= longest, f"--prompt: {num_tokens} tokens; at most {longest} leave room for the answer")
        for text in generator.generate([prompt] * arguments.num_samples, **arguments.settings()):
            distributed.say(f"{prompt} {text.strip()}")
    distributed.shutdown()


def prompts_of(lines: Iterable[bytes]) -> Iterator[str]:
    """Lines that are not empty."""
    for number, line in enumerate(lines, start=1):
        try:
            prompt = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise UserError(f"standard input, line {number}: {not_utf8(line)}") from None
        if prompt:
            yield prompt


if __name__ == "__main__":
    run_main(main)
