"""What training, evaluation and generation do first: the model by its arguments, and how long its rows may be."""

import models.encoders  # noqa: F401  makes an encoder known to AutoConfig, so that one in a wrong place is named
from finetune.arguments import ModelArguments
from finetune.data import SAMPLE_TOKENIZER
from finetune.tasks import Task
from kozero import distributed
from kozero.errors import require
from kozero.pause import PLACEMENTS, InferencePauseArguments, Pauses, begins_inside, filler_id
from models import language_model
from models.language_model import SPARE_ROWS, LanguageModel


def load_model(
    arguments: ModelArguments, pauses: InferencePauseArguments, with_pauses: bool, seed: int
) -> LanguageModel:
    """The model of a run. Each machine's first rank loads first, so that a hub download happens once a machine."""
    tokenizer = arguments.tokenizer_name_or_path
    if arguments.config_file and not tokenizer:
        tokenizer = str(SAMPLE_TOKENIZER)
        distributed.say("no --tokenizer_name_or_path: using the sample tokenizer (4,096 tokens)")
    model = distributed.machine_first(
        lambda: language_model.load(
            arguments.model_name_or_path, arguments.config_file, tokenizer, pause_token=pauses.pause_token,
            with_pauses=with_pauses, seed=seed, dropout=arguments.dropout,
        )
    )  # fmt: skip
    num_tokens, num_rows = len(model.tokenizer), model.config.vocab_size
    if num_rows - num_tokens >= SPARE_ROWS:
        unused = f"{num_rows - num_tokens:,} of {num_rows:,} rows are never used; vocab_size sets them in a config file"
        distributed.say(f"the tokenizer has {num_tokens:,} tokens, fewer than the model: {unused}")
    return model


def row_capacity(max_seq_length: int, default: int, positions: int) -> int:
    """Tokens of a row: what was asked for, or the task's default, never more than the model has positions."""
    message = f"--max_seq_length {max_seq_length}: the model has {positions} positions; choose at most that"
    require(max_seq_length <= positions, message)
    return max_seq_length or min(default, positions)


def inference_pauses(model: LanguageModel, arguments: InferencePauseArguments) -> Pauses:
    """Those that were asked for; by default the number and the placement that the model was trained for."""
    num, settings = arguments.num_inference_pauses, model.pause_settings
    num = settings.get("num_inference_pauses", 0) if num < 0 else num
    return make_pauses(model, num, arguments.pause_placement or inference_placement(settings))


def no_pauses(task: Task, flag: str, num: int) -> None:
    """Refuse pauses where there is no prompt to put them in."""
    message = f"{flag} {num}: --task {task.name} has no prompts to put them in"
    advice = "pauses in whole texts are those of pretrain/train.py --pause_fraction"
    require(num <= 0 or not task.whole_texts, f"{message}; {advice}")


def inference_placement(settings: dict) -> str:
    """Where pauses go by what config.json says; a model that met them in pre-training alone has them appended."""
    found = "append" if "fraction" in settings else settings.get("placement", "append")
    told = f"config.json: 'placement' of 'pause' is {found!r}; must be one of {', '.join(PLACEMENTS)}"
    require(found in PLACEMENTS, told)
    return found


def make_pauses(model: LanguageModel, num: int, placement: str, seed: int = 0) -> Pauses:
    """Pauses of a model's own token, or of full stops.

    Raises: UserError when its vocabulary has no such token.
    """
    token_id = filler_id(model.tokenizer) if placement == "filler" else model.pause_id
    message = f"{num} pauses: the model's vocabulary has no pause token; use 0, or train it with pauses"
    require(num == 0 or token_id is not None, message)
    return Pauses(token_id or 0, num, placement, begins_inside(model.tokenizer), seed)
