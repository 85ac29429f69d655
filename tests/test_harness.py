"""lm-evaluation-harness with pauses, beside this project's own evaluation."""

import json
import sys

import numpy as np
import pytest

from finetune import evaluate
from finetune.harness import TASKS, with_defaults
from finetune.paused import PausedGenerator
from kozero.errors import UserError
from tests.helpers import SAMPLE_DATA
from tests.test_commands import commands, shell

OF_SCORE = {"accuracy": ("acc", 1), "exact_match": ("exact_match", 1), "f1": ("f1", 1)}


@pytest.fixture(scope="module")
def harness():
    """lm_eval, which takes some seconds to import."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from finetune import paused_lm  # noqa: F401

    def run(tasks: list[str], metadata: dict | None = None, **arguments) -> dict:
        found = lm_eval.simple_evaluate(
            model="kozero_pause", model_args=arguments, tasks=tasks, batch_size=7, device="cpu",
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata or {}),
            bootstrap_iters=0,
        )  # fmt: skip
        return found["results"]

    return run


def ours(monkeypatch, folder, *told: str) -> dict[str, float]:
    argv = ["evaluate.py", *told, "--output_file", str(folder / "scores.json"), "--cache_dir", str(folder / "cache")]
    monkeypatch.setattr(sys, "argv", argv)
    evaluate.main()
    return json.loads((folder / "scores.json").read_text())["scores"]


@pytest.mark.parametrize(
    "placement, num, tasks",
    [
        pytest.param("append", 3, ["nsmc", "klue_nli", "korquad"], marks=pytest.mark.slow), ("prepend", 2, ["nsmc"]),
        ("sentence", 2, ["klue_nli"]), ("append", 0, ["klue_nli"]),
    ],
)  # fmt: skip
def test_both_judges_give_the_same_scores(monkeypatch, tmp_path, harness, paused_model, placement, num, tasks):
    told = {"pretrained": paused_model, "num_pauses": num, "placement": placement, "append_eos": True}
    theirs = harness([f"kozero_{task}" for task in tasks], **told)
    pauses = ["--num_inference_pauses", str(num), "--pause_placement", placement]
    for task in tasks:
        scores = ours(monkeypatch, tmp_path, "--model_name_or_path", paused_model, "--task", task, *pauses)
        for name, (metric, scale) in OF_SCORE.items():
            if name in scores:
                assert theirs[f"kozero_{task}"][f"{metric},none"] * scale == pytest.approx(scores[name]), (task, name)


def test_other_files_than_the_sample_data_are_named_by_metadata(tmp_path, harness, paused_model):
    lines = (SAMPLE_DATA / "nsmc/ratings_test.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "part.txt").write_text("".join(lines[:3]) + "9\t  \t1\n9\t\t1\n", encoding="utf-8")
    found = harness(["kozero_nsmc"], {"nsmc": str(tmp_path / "part.txt")}, pretrained=paused_model)
    assert found["kozero_nsmc"]["sample_len"] == 2, "rows without text are left out"


def test_a_prompt_has_its_pauses_and_the_continuation_its_space_and_end(harness, paused_model):
    """Token by token: text, M_inf pauses, then what is scored (arXiv 2310.02226, algorithm 2)."""
    from finetune.paused_lm import PausedLM

    paused = PausedGenerator.from_pretrained(paused_model)
    text = paused.tokenizer("전제: 비가 온다.", add_special_tokens=False)["input_ids"]
    answer = paused.tokenizer(" 함의", add_special_tokens=False)["input_ids"]
    lm = PausedLM(paused_model, device="cuda:0", append_eos=True)  # the harness names a GPU where there may be none
    prompt, scored = lm._encode_pair("전제: 비가 온다.", " 함의")
    assert prompt == [*text, *[paused.pauses.token_id] * 3]
    assert scored == [*answer, paused.tokenizer.eos_token_id]
    lm = PausedLM(paused_model)
    assert lm._encode_pair("전제: 비가 온다. ", "함의") == (prompt, answer)
    prompt, scored = lm._encode_pair("전제: 비가 온다. " * 200, "함의")
    assert scored == answer and len(prompt) == lm.max_length - len(answer)
    assert prompt[-3:] == [paused.pauses.token_id] * 3
    lm.tok_encode = lambda text, **told: [text]
    assert lm._encode_pair("비가 온다.  ", "그래서")[1] == lm._encode_pair("비가 온다.", "  그래서")[1] == ["  그래서"]
    lm = PausedLM(paused_model)
    prompt, scored = lm._encode_pair("전제: </s>", " </s><unused0>")
    assert not {paused.tokenizer.eos_token_id, paused.pauses.token_id} & {*prompt[:-3], *scored}


def test_a_prompt_that_is_too_long_loses_its_beginning_and_no_pause(paused_model):
    paused = PausedGenerator.from_pretrained(paused_model, num_pauses=4)
    whole = paused.prompt("가 나 다 라 마 바 사 아 자 차")
    assert np.array_equal(paused.prompt("가 나 다 라 마 바 사 아 자 차", len(whole)), whole)
    assert np.array_equal(paused.prompt("가 나 다 라 마 바 사 아 자 차", 9), whole[-9:])
    assert (whole[-4:] == paused.pauses.token_id).all()


def test_a_task_that_scores_whole_texts_is_refused(harness, paused_model):
    from finetune.paused_lm import PausedLM

    with pytest.raises(UserError, match=r"^num_pauses: .* has no prompt for pauses; use num_pauses=0$"):
        PausedLM(paused_model, num_pauses=1).loglikelihood_rolling([])


@pytest.mark.slow
def test_the_readme_command_and_that_of_lm_eval_itself_run(paused_model):
    (command,) = [c for c in commands("README.md") if "harness.py" in c]
    command = command.replace("runs/run/model", paused_model) + " --limit 2"
    done = shell(command)
    assert done.returncode == 0 and "|kozero_nsmc " in done.stdout, done.stdout + done.stderr
    theirs = (
        f"lm_eval --model kozero_pause --model_args pretrained={paused_model} --tasks finetune/lm_eval_tasks --limit 2"
    )
    done = shell(theirs)
    assert done.returncode == 0 and "|kozero_korquad" in done.stdout, done.stdout + done.stderr


def test_the_model_and_the_tasks_of_this_project_are_the_defaults():
    assert with_defaults(["--tasks", "x"]) == [
        "--tasks", "x", "--model", "kozero_pause", "--include_path", str(TASKS),
    ]  # fmt: skip
    own = ["--model=hf", "--include_path", "mine"]
    assert with_defaults(own) == own and with_defaults(["--help"]) == ["--help"]
