"""What training, evaluation and generation do first: the model by its arguments, and how long its rows may be."""

import models.encoders  # noqa: F401  makes an encoder known to AutoConfig, so that one in a wrong place is named
from finetune.arguments import ModelArguments
from finetune.data import SAMPLE_TOKENIZER
from kozero import distributed
from kozero.errors import require
from kozero.pause import PauseArguments, Pauses
from models import language_model
from models.language_model import LanguageModel


def load_model(arguments: ModelArguments, pauses: PauseArguments, with_pauses: bool, seed: int) -> LanguageModel:
    """The model of a run. Each machine's first rank loads first, so that a hub download happens once a machine."""
    tokenizer = arguments.tokenizer_name_or_path
    if arguments.config_file and not tokenizer:
        tokenizer = str(SAMPLE_TOKENIZER)
        distributed.say("no --tokenizer_name_or_path: using the sample tokenizer (4,096 tokens)")
    return distributed.machine_first(
        lambda: language_model.load(
            arguments.model_name_or_path,
            arguments.config_file,
            tokenizer,
            pause_token=pauses.pause_token,
            with_pauses=with_pauses,
            seed=seed,
            dropout=arguments.dropout,
        )
    )


def row_capacity(max_seq_length: int, default: int, positions: int) -> int:
    """Tokens of a row: what was asked for, or the task's default, never more than the model has positions."""
    require(
        max_seq_length <= positions,
        f"--max_seq_length {max_seq_length}: the model has {positions} positions; choose at most that",
    )
    return max_seq_length or min(default, positions)


def inference_pauses(model: LanguageModel, arguments: PauseArguments) -> Pauses:
    """--num_inference_pauses of them; -1 takes the number that the model was trained for."""
    require(arguments.num_pauses == 0, "--num_pauses is for training; here it is --num_inference_pauses")
    num = arguments.num_inference_pauses
    if num < 0:
        num = model.pause_settings.get("num_inference_pauses", 0)
    require(
        num == 0 or model.pause_id is not None,
        f"--num_inference_pauses {num}: the model's vocabulary has no pause token; use 0, or train it with pauses",
    )
    return Pauses(model.pause_id or 0, num)
