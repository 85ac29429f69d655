"""Files that a command is told to write: what may be named, when it is refused, what is there when something fails."""

import json
import os
import stat
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from finetune import evaluate, generate, train
from finetune.sweep import Cell, save_sweep
from finetune.writing import Written
from kozero import folder, plots
from kozero.errors import UserError
from kozero.folder import new_file, writable_folder, write_text
from pretrain import run
from scripts import plan, study_report
from tests.helpers import refused

LONGEST = 255  # bytes of a name on Linux


def named(length: int, ending: str = ".json") -> str:
    """A name of so many bytes, in Hangul."""
    syllables, rest = divmod(length - len(ending), 3)
    return "한" * syllables + "x" * rest + ending


@pytest.mark.parametrize("kind", ["a pipe", "a device", "the file of standard output", "a loop of links"])
def test_what_is_no_file_of_its_own_is_refused_and_stays_as_it_is(tmp_path, kind):
    path = tmp_path / "out.json"
    before = os.dup(1)
    try:
        if kind == "a pipe":
            os.mkfifo(path)
        elif kind == "a device":
            path.symlink_to("/dev/null")
        elif kind == "a loop of links":
            path.symlink_to(path)
        else:
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), 1)
        old = path.lstat()
        with pytest.raises(UserError, match=r"--output_file .*out.json"):
            new_file("--output_file", path)
    finally:
        os.dup2(before, 1)
    assert path.lstat() == old and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "out.json", tmp_path / "elsewhere" / "real.json"
    link.symlink_to("elsewhere/real.json")
    for text in ("first", "second"):  # of a link to nothing, and of one to a file
        write_text(new_file("--output_file", link), text)
        assert link.is_symlink() and target.read_text() == text
    assert list(target.parent.iterdir()) == [target]


@dataclass
class Reading:
    """As the arguments of a command are."""

    validation_file: str | None = None
    model_name_or_path: str | None = None
    output_file: str | None = None


def test_what_a_command_reads_is_no_place_for_its_results(tmp_path):
    data, model = tmp_path / "data.json", tmp_path / "model"
    model.mkdir()
    for file in (data, model / "config.json"):
        file.write_text("{}")
    (tmp_path / "link.json").symlink_to(data)
    told = Reading(str(data), str(model), str(tmp_path / "new.json"))
    for file in (data, tmp_path / "link.json", model / "config.json", model / "new.json"):
        with pytest.raises(UserError, match=rf"--output_file .*{file.name}: is read by this command"):
            new_file("--output_file", file, reads=[told])
    with pytest.raises(UserError, match=r"--output_file .*data.json: is read by this command"):
        new_file("--output_file", tmp_path / "new.json", data, reads=[told])
    assert new_file("--output_file", tmp_path / "new.json", reads=[told, Reading("hub/name")]).name == "new.json"


@pytest.mark.parametrize("entry", [evaluate, generate])
def test_a_file_of_the_users_outlives_a_command_that_would_write_over_it(monkeypatch, tmp_path, entry):
    file = tmp_path / "file.jsonl"
    file.write_text('{"text": "글"}\n', encoding="utf-8")
    told = ["--validation_file", file, "--task", "essay"] if entry is evaluate else ["--prompts_file", file]
    monkeypatch.setattr(sys, "argv", ["any.py", *map(str, told), "--output_file", str(file)])
    with pytest.raises(UserError, match="is read by this command"):
        entry.main()
    assert file.read_text(encoding="utf-8") == '{"text": "글"}\n'


FILES_OF_ARGUMENTS = {evaluate: {"task": "nsmc"}, generate: {"prompt": "글"}, plan: {"task": "nsmc"}}


@pytest.mark.parametrize("entry", FILES_OF_ARGUMENTS)
def test_a_file_of_arguments_outlives_its_command(monkeypatch, tmp_path, one_rank, entry):
    file = tmp_path / "file.json"
    file.write_text(json.dumps(FILES_OF_ARGUMENTS[entry]))
    monkeypatch.setattr(sys, "argv", ["any.py", str(file), "--output_file", str(file)])
    with refused(f"--output_file {file}: is read by this command", untouched=tmp_path):
        entry.main()


@pytest.mark.parametrize("entry", [evaluate, plan])
def test_a_deepspeed_json_outlives_its_command(monkeypatch, tmp_path, one_rank, entry):
    file = tmp_path / "file.json"
    file.write_text('{"zero_optimization": {"stage": 3}}')
    monkeypatch.setattr(
        sys, "argv", ["any.py", "--task", "nsmc", "--deepspeed_config", str(file), "--output_file", str(file)]
    )
    with refused(f"--output_file {file}: is read by this command", untouched=tmp_path):
        entry.main()


READ_BY_A_RUN = {
    None: ("run.json", '{"task": "nsmc"}'),
    "--deepspeed_config": ("scores.json", '{"zero_optimization": {"stage": 0}}'),
    "--config_file": ("predictions.json", "{}"),
    "--train_file": ("metrics.jsonl", "{}"),
    "--corpus_path": ("metrics.jsonl", "글"),
}


@pytest.mark.parametrize("flag", READ_BY_A_RUN)
def test_a_run_writes_nothing_over_what_it_reads(tmp_path, one_rank, monkeypatch, flag):
    name, text = READ_BY_A_RUN[flag]
    file = tmp_path / "run" / name
    file.parent.mkdir()
    file.write_text(text)
    where = (
        ["--output_dir", str(tmp_path), "--model_name", "run"]
        if flag == "--corpus_path"
        else ["--output_dir", str(file.parent)]
    )
    monkeypatch.setattr(sys, "argv", ["train.py", *[flag] * bool(flag), str(file), *where])
    with refused(f"--output_dir {file}: is read by this command", untouched=tmp_path):
        run.main("train") if flag == "--corpus_path" else train.main()


def test_names_are_tried_in_bytes_and_the_longest_can_be_written(tmp_path):
    path = tmp_path / named(LONGEST)
    write_text(new_file("--output_file", path), "가")
    assert path.read_text(encoding="utf-8") == "가" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match=r"--output_file .*: cannot be written .File name too long"):
        new_file("--output_file", tmp_path / named(LONGEST + 1))
    with pytest.raises(UserError, match=r"beside.*: cannot be written .File name too long"):
        new_file("--output_file", tmp_path / "out.json", tmp_path / named(LONGEST + 1, "beside"))


def test_a_folder_whose_path_leaves_no_room_for_the_names_in_it_is_refused(tmp_path):
    """4,096 bytes are the longest path on Linux."""
    deep = tmp_path / "/".join(["x" * 200] * 19)
    deep /= "y" * (4096 - 100 - len(str(deep)))
    with pytest.raises(UserError, match=r"--output_dir .*: cannot be written .File name too long"):
        writable_folder("--output_dir", deep)


NAMES = {
    "evaluate": (evaluate.main, ["--output_file"], LONGEST - len(".predictions.jsonl") + len(".json") + 1),
    "evaluate an encoder": (evaluate.main, ["--task", "mrc", "--output_file"], LONGEST - len(".predictions") + 1),
    "sweep": (evaluate.main, ["--sweep_pauses", "0", "--output_file"], LONGEST + 1),
    "generate": (generate.main, ["--prompt", "가", "--output_file"], LONGEST - len(".incomplete") + 1),
    "generate with metrics": (
        generate.main, ["--prompt", "가", "--metrics", "--output_file"], LONGEST - len(".incomplete") + 1,
    ),
    "plan": (plan.main, ["--output_file"], LONGEST + 1),
}  # fmt: skip


@pytest.mark.parametrize("entry", NAMES)
def test_every_name_that_an_entry_makes_is_tried_before_a_model_is_loaded(monkeypatch, tmp_path, one_rank, entry):
    main, flags, too_long = NAMES[entry]
    flags = [*flags, str(tmp_path / named(too_long))]
    monkeypatch.setattr(sys, "argv", ["entry.py", *flags, "--model_name_or_path", "there/is/no/such/model"])
    with pytest.raises(UserError, match=r"--output_file .*: cannot be written .File name too long"):
        main()
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_without_a_file_name_tries_its_own(monkeypatch, tmp_path, one_rank):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep-nsmc.csv").mkdir()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--sweep_pauses", "0", "--model_name_or_path", "no/such/model"])
    with pytest.raises(UserError, match=r"--output_file sweep-nsmc.csv: is a folder"):
        evaluate.main()


def test_runs_that_try_one_folder_at_the_same_time_do_not_meet(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: writable_folder("--output_dir", tmp_path), range(400)))
    assert found == [tmp_path] * 400 and list(tmp_path.iterdir()) == []


def test_two_writers_of_one_file_leave_what_one_of_them_wrote(tmp_path):
    path = tmp_path / "out.json"
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda k: write_text(path, str(k) * 1000), range(200)))
    text = path.read_text()
    assert text == text[: len(text) // 1000] * 1000 and list(tmp_path.iterdir()) == [path]


CELLS = [Cell("none", 0, "accuracy", 0.5, 0.1, 20.0, 0, 0, {"accuracy": 0.5}, [0.5])]


def test_a_dollar_in_a_path_begins_no_formula(tmp_path, capsys):
    """matplotlib reads what stands between two dollars as TeX, and ends where it is none."""
    written = save_sweep(tmp_path / "sweep.json", CELLS, {"title": r"nsmc, runs/$\x{$/model"})
    assert [path.suffix for path in written] == [".json", ".csv", ".png"]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG") and capsys.readouterr().err == ""


def test_a_plot_that_fails_is_told_in_a_line_and_the_numbers_stay(monkeypatch, tmp_path, capsys):
    def no_fonts():
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr(plots, "fonts", no_fonts)
    written = save_sweep(tmp_path / "sweep.json", CELLS, {"title": "t"})
    assert [path.suffix for path in written] == [".json", ".csv"] and all(path.exists() for path in written)
    assert json.loads((tmp_path / "sweep.json").read_text())["cells"][0]["value"] == 0.5
    assert capsys.readouterr().err == f"warning: {tmp_path}/sweep.png: could not be drawn (RuntimeError: no)\n"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_report_is_written_without_the_picture_that_failed(monkeypatch, tmp_path):
    result = study_report.Result(
        "pause", "nsmc", 1, 0, "accuracy", {0: 50.0}, {0: [50.0, 50.0]}, {0: 1.0}, {0: 20.0}, {0: 0}, [0, 1], [],
        None, [], 0.1,
    )  # fmt: skip
    monkeypatch.setattr(study_report, "plot_losses", lambda *_: 1 / 0)
    written = study_report.write_report(tmp_path, "t", [result], "pause", {}, "{}", "command")
    assert {path.name for path in written} == {path.name for path in tmp_path.iterdir()}
    assert "losses.png" not in {path.name for path in written} and (tmp_path / "scores.png") in written
    assert "losses.png" not in (tmp_path / "report.md").read_text()


class Full(OSError):
    """No room."""


def test_scores_are_there_only_when_what_is_beside_them_is(monkeypatch, tmp_path, one_rank, paused_model):
    """Who finds the scores finds the predictions that they were taken from."""
    real = folder.write_bytes

    def without_room_for_predictions(path, content):
        if "predictions" in path.name:
            raise Full
        real(path, content)

    monkeypatch.setattr(folder, "write_bytes", without_room_for_predictions)
    out = tmp_path / "out.json"
    told = ["--max_eval_samples", "2", "--cache_dir", str(tmp_path / "cache"), "--output_file", str(out)]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model_name_or_path", paused_model, *told])
    with pytest.raises(Full):
        evaluate.main()
    assert not out.exists()
    with pytest.raises(Full):
        evaluate.save(out, "mrc", {"scores": {}}, ["{}", "{}"])
    assert not out.exists()


class Stub:
    """A writer without a model, whose third text does not come. `alive`: texts that somebody keeps when one is made."""

    def __init__(self, output_file, fails, **more) -> None:
        self.arguments = generate.GenerationArguments(prompt="p", output_file=str(output_file), **more)
        self.fails, self.alive, self.made = fails, [], []

    def check(self, *_) -> None:
        pass

    def write(self, prompts, **_):
        for k, prompt in enumerate(prompts):
            if self.fails and k == 2:
                raise KeyboardInterrupt
            self.alive.append(sum(text() is not None for text in self.made))
            found = Written(prompt, f"text {k}")
            self.made.append(weakref.ref(found))
            yield found


def test_earlier_texts_stay_until_the_new_ones_are_whole(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("earlier\n")
    prompts = [("--prompt", "p")] * 4
    with pytest.raises(KeyboardInterrupt):
        generate.write_all(Stub(out, fails=True), prompts, {})
    kept = (tmp_path / "out.jsonl.incomplete").read_text().splitlines()
    assert out.read_text() == "earlier\n" and [json.loads(line)["text"] for line in kept] == ["text 0", "text 1"]
    generate.write_all(Stub(out, fails=False), prompts, {})
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == [f"text {k}" for k in range(4)]
    assert list(tmp_path.iterdir()) == [out]


def test_two_runs_do_not_write_one_file_at_the_same_time(tmp_path):
    out = tmp_path / "out.jsonl"
    with folder.growing_file(out) as first:
        first.write("first\n")
        with pytest.raises(UserError, match=r"out.jsonl: another run is writing it"), folder.growing_file(out):
            pass
        with pytest.raises(FileNotFoundError), folder.growing_file(tmp_path / "other.jsonl"):
            raise FileNotFoundError
    assert out.read_text() == "first\n"
    with folder.growing_file(out) as second:
        second.write("second\n")
    assert out.read_text() == "second\n"


def test_texts_that_are_in_a_file_are_not_kept_in_memory(tmp_path):
    stub = Stub(tmp_path / "out.jsonl", fails=False)
    generate.write_all(stub, [("--prompt", "p")] * 50, {})
    assert len(stub.alive) == 50 and max(stub.alive) <= 1


def test_a_picture_has_the_usual_font_and_the_first_that_has_hangul(monkeypatch):
    from matplotlib import font_manager

    for known, wanted in ((["UnDotum", "NanumGothic", "Arial"], ["NanumGothic"]), (["Arial"], [])):
        monkeypatch.setattr(font_manager.fontManager, "ttflist", [SimpleNamespace(name=name) for name in known])
        assert plots.fonts.__wrapped__() == ["DejaVu Sans", *wanted]
