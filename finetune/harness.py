"""Score a model by lm-evaluation-harness, an independent judge, with the model's pauses. All arguments are those of
lm_eval; `--include_path` names the tasks of this project unless it is given. Example:

python finetune/harness.py --model_args pretrained=runs/run/model,num_pauses=10,append_eos=True --tasks kozero_nsmc
"""

import sys
from pathlib import Path

from kozero.errors import UserError, run_main

TASKS = Path(__file__).parent / "lm_eval_tasks"


def with_defaults(argv: list[str]) -> list[str]:
    """The command line of lm_eval with this project's model and tasks where it names no others."""
    given = {word.split("=")[0] for word in argv}
    if given & {"-h", "--help", "ls", "validate"}:
        return argv
    model = [] if given & {"--model", "-M"} else ["--model", "kozero_pause"]
    return [*argv, *model, *([] if "--include_path" in given else ["--include_path", str(TASKS)])]


def main() -> None:
    """Run the harness."""
    try:
        from lm_eval.__main__ import cli_evaluate

        from finetune import paused_lm  # noqa: F401  it registers the model
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install -r requirements-dev.txt") from None
    sys.argv[1:] = with_defaults(sys.argv[1:])
    cli_evaluate()


if __name__ == "__main__":
    run_main(main)
