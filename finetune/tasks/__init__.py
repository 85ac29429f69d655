"""The tasks by name."""

from finetune.tasks.base import Example, Source, Task
from finetune.tasks.klue_nli import KlueNli
from finetune.tasks.korquad import Korquad
from finetune.tasks.mrc import Ict, Mrc
from finetune.tasks.nsmc import Nsmc

TASKS: dict[str, Task] = {task.name: task for task in (Nsmc(), KlueNli(), Korquad())}  # a language model learns them
ENCODER_TASKS: dict[str, Task] = {task.name: task for task in (Mrc(), Ict())}

__all__ = ["ENCODER_TASKS", "TASKS", "Example", "Source", "Task"]
