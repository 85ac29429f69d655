"""Score a model by lm-evaluation-harness, an independent judge, with the model's pauses. All arguments are those of
lm_eval; `--include_path` names the tasks of this project unless it is given. Example:

python finetune/harness.py --model_args pretrained=runs/run/model,num_pauses=10,append_eos=True --tasks kozero_nsmc
"""

import json
import sys
from argparse import ArgumentParser
from contextlib import suppress
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


def check_files(argv: list[str]) -> None:
    """Refuse a file of --metadata that a task of this project cannot read, which the harness finds after it has loaded
    the model."""
    from finetune.data import check_rows
    from finetune.tasks import TASKS as OWN
    from finetune.tasks import Source

    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--metadata", default="{}")
    with suppress(ValueError, TypeError):  # the harness says what is wrong with its arguments
        for name, path in dict(json.loads(parser.parse_known_args(argv)[0].metadata)).items():
            if name in OWN:
                check_rows(Source(Path(path)), OWN[name])


def main() -> None:
    """Run the harness."""
    try:
        from lm_eval.__main__ import cli_evaluate

        from finetune import paused_lm  # noqa: F401  it registers the model
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install -r requirements-dev.txt") from None
    sys.argv[1:] = with_defaults(sys.argv[1:])
    check_files(sys.argv[1:])
    cli_evaluate()


if __name__ == "__main__":
    run_main(main)
