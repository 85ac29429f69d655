"""scripts/pause_study.py: what a study runs, in which order, and what its report says."""

import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kozero.errors import UserError
from kozero.metrics import bootstrap_interval
from scripts import pause_study
from scripts.pause_study import Step, run_all, steps
from scripts.study import Study
from scripts.study_report import Result, difference_table, pauses_table, score_table, write_report
from tests.helpers import ROOT

SAMPLE = ROOT / "sample_data" / "study.json"


def study_file(folder: Path, **changes) -> Path:
    """The shipped study with other settings; None leaves a key out."""
    values = json.loads(SAMPLE.read_text(encoding="utf-8")) | {"output_dir": str(folder / "study")} | changes
    path = folder / "study.json"
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"seed": [1]}, "'seed'"),
        ({"tasks": {}}, "'tasks': name at least one"),
        ({"tasks": {"nsms": {}}}, "nsms"),
        ({"arms": ["StdPT_PausFT"]}, "StdPT_PausFT"),
        ({"arms": ["StdPT_PauseFT"], "baseline": "StdPT_StdFT"}, "baseline 'StdPT_StdFT'"),
        ({"seeds": [1, 1]}, "seeds [1, 1]"),
        ({"seeds": 3}, "'seeds' must be a list, is 3"),
        ({"finetuning": {"StdFT": {"seed": 3}}}, "finetuning.StdFT: 'seed' is given by the study"),
        ({"finetuning": {"StdFT": {"num_pauses": [1, 2]}}}, "finetuning.StdFT: 'num_pauses' must be one value"),
        ({"finetuning": {"StdFT": {"num_pauses": "3"}}}, "finetuning.StdFT: pauses '3'"),
        ({"finetune": [1]}, "'finetune' must be an object"),
        ({"tasks": {"nsmc": 3}}, "tasks.nsmc: must be an object"),
        ({"pretraining": ["StdPT"]}, "'pretraining' must be an object, is [\"StdPT\"]"),
        ({"finetuning": {"../StdFT": {}}}, "'../StdFT': it names folders"),
        ({"finetuning": {"": {}}}, "'': it names folders"),
        ({"sweep_pauses": [0, "2"]}, "sweep_pauses [0, '2']"),
    ],
)
def test_a_wrong_study_is_refused_by_file_and_key(tmp_path, changes, told):
    path = study_file(tmp_path, **({"baseline": None} if "finetuning" in changes else {}), **changes)
    with pytest.raises(UserError) as refused:
        Study.read(path)
    assert str(path) in str(refused.value) and told in str(refused.value)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"finetuning": {"StdFT": {"num_pausess": 3}}}, "--num_pausess"),
        ({"finetuning": {"StdFT": {"num_pauses": -1}}}, "--num_pauses -1"),
        ({"finetuning": {"StdFT": {"pause_placement": "appendd"}}}, "appendd"),
        ({"pretrain": {"mx_steps": 1}}, "--mx_steps"),
        ({"pretrain": {"max_seq_length": "64"}}, "pretraining.StdPT: max_seq_length '64'"),
        ({"pretrain": {"pause_fraction": 1}}, "pretraining.StdPT: pause_fraction 1"),
        ({"evaluate": {"per_device_eval_batch_size": 0}}, "--per_device_eval_batch_size 0"),
    ],
)
def test_a_wrong_setting_of_any_run_is_refused_before_the_first_begins(tmp_path, changes, told):
    path = study_file(tmp_path, baseline=None, **changes)
    with pytest.raises(UserError) as refused:
        run_all(steps(Study.read(path)), path)
    assert str(path) in str(refused.value) and told in str(refused.value)
    assert not (tmp_path / "study").exists()


def test_a_study_is_every_pair_on_every_task_with_every_seed_after_its_pre_training(tmp_path):
    todo = steps(Study.read(study_file(tmp_path, tasks={"nsmc": {}, "korquad": {}})))
    assert len(todo) == 2 * (2 + 4 * 2 * 2)  # seeds x (pre-trainings + arms x tasks x (train, score))
    done = set()
    for step in todo:
        words = dict(zip(step.words[::2], step.words[1::2], strict=False))
        source = words.get("--model_name_or_path")
        assert source is None or Path(source) in done, "nothing is used before it is made"
        done |= {step.folder / "model", step.folder / step.leaves}
    assert len({step.folder / step.leaves for step in todo}) == len(todo)


@pytest.mark.parametrize("length, share", [(64, 0.1), (128, 0.1), (33, 0.25), (100, 0.5)])
def test_both_pre_training_arms_see_the_same_text_in_a_step(tmp_path, length, share):
    pretraining = {"StdPT": {}, "PausePT": {"pause_placement": "random", "pause_fraction": share}}
    pretrain = {"config_file": "models/tiny_config.json", "max_seq_length": length, "max_steps": 1}
    study = Study.read(study_file(tmp_path, pretraining=pretraining, pretrain=pretrain))
    rows = {step.name.split(",")[0]: step.words for step in steps(study) if step.entry == "pretrain/train.py"}
    plain, paused = (int(words[words.index("--max_seq_length") + 1]) for words in rows.values())
    assert plain == length
    assert paused - round(share * paused) == length


def test_a_model_that_never_saw_a_pause_is_scored_without(tmp_path):
    study = Study.read(study_file(tmp_path, sweep_pauses=[1, 9]))
    assert study.numbers("StdPT", "StdFT") == [0]
    assert study.numbers("PausePT", "StdFT") == study.numbers("StdPT", "PauseFT") == [0, 1, 4, 9]


def stub(folder: Path, code: str, name: str = "a run") -> Step:
    (folder / "stub.py").write_text(code)
    return Step(name, str(folder / "stub.py"), [], ["python"], folder / "out", "done")


def test_what_is_done_is_not_run_again_and_a_failure_says_where_to_read_on(monkeypatch, tmp_path, capsys):
    count = "import pathlib\nf = pathlib.Path('out/count'); f.write_text(f.read_text() + 'x' if f.exists() else 'x')\n"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Step, "check", lambda self, path: None)
    failing = stub(tmp_path, count + "print('error: --x 1: too small\\nlast words'); raise SystemExit(2)")
    with pytest.raises(UserError, match=rf"a run: failed, --x 1: too small \(all of it: {tmp_path}/out/done.log\)"):
        run_all([failing], Path("study.json"))
    working = stub(tmp_path, count + "pathlib.Path('out/done').touch()")
    run_all([working], Path("study.json"))
    run_all([working], Path("study.json"))
    assert Path("out/count").read_text() == "xx"
    assert "1 of 1 runs are done" in capsys.readouterr().out


def test_a_changed_setting_is_refused_where_a_run_was_begun(tmp_path):
    path = study_file(tmp_path)
    first = steps(Study.read(path))[0]
    first.folder.mkdir(parents=True)
    (first.folder / "model.command").write_text(first.command)
    first.check(path)
    changed = study_file(tmp_path, pretrain=json.loads(SAMPLE.read_text())["pretrain"] | {"learning_rate": 0.5})
    with pytest.raises(UserError, match=r"begun with other settings \('0.002' then, '0.5' now\)"):
        run_all(steps(Study.read(changed)), changed)


def result(arm: str, seed: int, each: list[float], own: int = 0, task: str = "nsmc", **others) -> Result:
    values = {own: statistics.mean(each), **others.get("values", {})}
    costs = dict.fromkeys(values, 1.0)
    return Result(arm, task, seed, own, "accuracy", values, {own: np.array(each)}, costs, costs, 50.0, [(1, 2.0)], 0.1)


def test_the_score_of_an_arm_is_mean_and_sample_deviation_over_seeds():
    table = score_table([result("A", 1, [0, 100]), result("A", 2, [100, 100]), result("A", 3, [0, 0])])
    assert table[1] == ["nsmc", "A", "0", "accuracy", "50.00 ± 50.00", "3", "50.00"]


def test_a_difference_is_paired_by_example_and_seed():
    """Scores differ much between examples and by 10 on each: unpaired there would be nothing to see."""
    base = np.linspace(0, 100, 40)
    found = [result("A", 1, base), result("A", 2, base), result("B", 2, base + 10, own=4), result("B", 1, base + 12)]
    (row,) = difference_table(found, "A")[1:]
    assert row == ["nsmc", "B", "+11.00", "+11.00 to +11.00", "better", "+10.00, +12.00"]
    (row,) = difference_table(found, "B")[1:]
    assert row[2:5] == ["-11.00", "-11.00 to -11.00", "worse"]


def test_seeds_that_only_one_of_two_arms_has_finished_are_left_out():
    found = [result("A", 1, [0, 0]), result("B", 1, [50, 50]), result("B", 2, [100, 100])]
    assert difference_table(found, "A")[1][2] == "+50.00"
    assert len(difference_table(found[::2], "A")) == 1, "no common seed, no row"


def test_arms_scored_on_other_examples_are_not_compared():
    with pytest.raises(UserError, match="other examples"):
        difference_table([result("A", 1, [0, 0]), result("B", 1, [0, 0, 0])], "A")


def test_the_best_number_of_pauses_is_that_of_the_highest_mean():
    found = [result("A", seed, [value], own=4, values={0: 10.0, 9: 30.0}) for seed, value in ((1, 0.0), (2, 50.0))]
    assert pauses_table(found)[1] == ["nsmc", "A", "10.00", "25.00", "30.00", "9"]


def test_the_bootstrap_interval_is_the_normal_one_for_many_values():
    """By the central limit theorem: mean -+ 1.96 standard errors."""
    values = np.random.default_rng(3).normal(2.0, 5.0, size=4000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half)
    assert bootstrap_interval([7.0] * 5) == pytest.approx((7.0, 7.0))


def test_the_report_is_one_page_that_loads_nothing(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "train/loss": 3.0}\n{"step": 2, "train/loss": 2.0}\n{"step": 3, "tra')
    found = [result(arm, seed, [0, 100, 100]) for arm in ("<A>", "B") for seed in (1, 2)]
    files = write_report(tmp_path, "Pauses <1>", found, "B", {"StdPT": [log, tmp_path / "none"]}, "{}", "python x")
    assert all(path.stat().st_size for path in files)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;A&gt;" in page and "<A>" not in page and "<h1>Pauses &lt;1&gt;</h1>" in page
    assert re.findall(r"""(?:src|href)=["']([^:]*):""", page) == ["data"] * 3
    assert "66.67 ± 0.00" in page and "66.67 ± 0.00" in (tmp_path / "report.md").read_text(encoding="utf-8")
    for name in re.findall(r"\]\((.*\.png)\)", (tmp_path / "report.md").read_text(encoding="utf-8")):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + len(found)


@pytest.mark.slow
def test_the_shipped_study_goes_on_after_it_was_killed(monkeypatch, tmp_path):
    """Killed as the third run begins; what was finished stays as it was, and a cell is what its command gives alone."""
    values = json.loads(SAMPLE.read_text(encoding="utf-8"))
    short = {kind: values[kind] | {"max_steps": 2, "logging_steps": 1} for kind in ("pretrain", "finetune")}
    short["finetune"] |= {"eval_steps": 2, "max_eval_samples": 4}
    path = study_file(tmp_path, seeds=[1], sweep_pauses=[0, 4], **short)
    command = [sys.executable, str(ROOT / "scripts/pause_study.py"), str(path)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for line in first.stdout:
        if line.startswith("[3/10]"):
            break
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    kept = tmp_path / "study/pretraining/StdPT-seed1/model/model.safetensors"
    before = kept.stat().st_mtime_ns
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "2 of 10 runs are done" in second.stdout and kept.stat().st_mtime_ns == before
    assert (tmp_path / "study/report.html").stat().st_size > 10_000
    step = steps(Study.read(path))[2]
    alone = [word.replace(str(tmp_path / "study/StdPT"), str(tmp_path / "alone")) for word in step.words]
    subprocess.run([sys.executable, step.entry, *alone], cwd=ROOT, check=True, capture_output=True)
    (folder,) = tmp_path.glob("alone*")
    scores = json.loads((folder / "nsmc/seed1/scores.json").read_text())
    assert scores == json.loads((step.folder / "scores.json").read_text())
    monkeypatch.setattr(sys, "argv", ["pause_study.py", str(path), "--report_only"])
    monkeypatch.setattr(subprocess, "Popen", None)
    pause_study.main()
    assert shlex.split(step.command)[1] == "finetune/train.py"
