"""The tasks by name."""

from finetune.tasks.base import Example, Source, Task
from finetune.tasks.essay import Essay
from finetune.tasks.klue_nli import KlueNli
from finetune.tasks.korquad import Korquad
from finetune.tasks.mrc import Ict, Mrc
from finetune.tasks.nsmc import Nsmc

# What a language model learns, and what an encoder learns.
TASKS: dict[str, Task] = {task.name: task for task in (Nsmc(), KlueNli(), Korquad(), Essay())}
ENCODER_TASKS: dict[str, Task] = {task.name: task for task in (Mrc(), Ict())}

# Names of scores: of all others a higher one is better.
LOWER_IS_BETTER = {task.best_score for task in TASKS.values() if task.lower_is_better}

__all__ = ["ENCODER_TASKS", "LOWER_IS_BETTER", "TASKS", "Example", "Source", "Task"]
