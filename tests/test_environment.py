"""What a program finds around it, and what importing it leaves around."""

import json
import math
import multiprocessing
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from finetune.arguments import DataArguments
from kozero import cgroups, distributed
from kozero.config import TrainingArguments, parse_arguments
from kozero.errors import SaveFailed, UserError
from kozero.folder import cache_folder, claim_output
from tests.helpers import ROOT
from tests.ranks import START

# What a host program would miss: taken before and after all modules of this project are imported. The libraries that
# they import at their beginning are imported before, since what those change is theirs.
IMPORTS = """
import ast, contextlib, gc, importlib, io, json, locale, logging, os, pathlib, random, resource, signal, sys
import threading, warnings

ROOT = pathlib.Path(sys.argv[1])
NAMES = ("kozero", "models", "finetune", "pretrain", "scripts")
OURS = [path for name in NAMES for path in (ROOT / name).rglob("*.py")]

def imported(path):
    for node in ast.parse(path.read_text()).body:
        for part in node.body if isinstance(node, ast.With) else [node]:
            if isinstance(part, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in part.names] if isinstance(part, ast.Import) else [part.module]
                yield from ((name, ast.unparse(part)) for name in names)

def is_ours(name):
    return name.split(".")[0] in NAMES

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed warns when it has to look for one
for path in OURS:
    for name, statement in imported(path):
        if not is_ours(name):
            with contextlib.suppress(ModuleNotFoundError):
                exec(statement, {})
del os.environ["DS_ACCELERATOR"]

import numpy, torch, tqdm, matplotlib

def state():
    return {
        "hooks": [sys.excepthook, sys.unraisablehook, sys.displayhook, threading.excepthook, warnings.showwarning],
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "environment": dict(os.environ),
        "tqdm's lock": vars(tqdm.tqdm).get("_lock"),
        "filters of warnings": list(warnings.filters),
        "loggers": {n: (l.level, list(l.handlers), l.disabled) for n, l in logging.root.manager.loggerDict.items()
                    if isinstance(l, logging.Logger) and not is_ours(n)},
        "root logger": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "random numbers": (random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist()),
        "torch": (torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(),
                  torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(),
                  torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark, torch.backends.mkldnn.enabled),
        "process": (os.getcwd(), locale.setlocale(locale.LC_ALL), threading.active_count(), gc.get_threshold(),
                    resource.getrlimit(resource.RLIMIT_NOFILE), sys.getrecursionlimit()),
        "streams": [sys.stdin, sys.stdout, sys.stderr],
        "figures": dict(matplotlib.rcParams),
        "numpy": numpy.geterr(),
    }

before, missing = state(), set()
for path in OURS:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert not is_ours(error.name), error
        missing.add(error.name)
after = state()
after["loggers"] = {name: after["loggers"][name] for name in before["loggers"]}  # others are of what came later
changed = [key for key in before if before[key] != after[key]]
assert not changed, {key: (before[key], after[key]) for key in changed}
print(len(OURS), sorted(missing))
"""


def python(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own."""
    told = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, *map(str, words)], env=told, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_importing_any_module_changes_nothing_of_the_program_that_imports_it():
    done = python("-c", IMPORTS, ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 90


def test_a_host_program_keeps_its_hook_and_an_entry_tells_an_interrupt_in_a_word(tmp_path):
    shows = "import sys; before = sys.excepthook; import kozero.errors; print(sys.excepthook is before)\n"
    assert python("-c", shows).stdout == "True\n"
    (tmp_path / "host.py").write_text(shows)
    assert python(tmp_path / "host.py").stdout == "True\n"
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")  # in the place of the library
    done = python("scripts/select_topic.py", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.stderr == "interrupted\n" and done.returncode in (1, 130, -2)


# Processors -----------------------------------------------------------------------------------------------------------


def write(folder: Path, **files: str) -> None:
    """A cgroup as the kernel shows it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_the_tightest_quota_of_cgroups_v2_counts(tmp_path):
    write(tmp_path / "a/b", cpu__max="max 100000")
    assert cgroups.cores("0::/a/b\n", tmp_path) == math.inf
    write(tmp_path / "a", cpu__max="150000 100000")
    assert cgroups.cores("0::/a/b\n", tmp_path) == 1.5
    write(tmp_path / "a/b", cpu__max="50000 100000")
    assert cgroups.cores("0::/a/b\n", tmp_path) == 0.5


def test_the_quota_of_cgroups_v1_counts(tmp_path):
    write(tmp_path / "cpu/docker/x", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    write(tmp_path / "cpu/docker", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert cgroups.cores("4:memory:/y\n3:cpuset:/y\n2:cpu,cpuacct:/docker/x\n0::/\n", tmp_path) == 2
    assert cgroups.cores("2:cpuacct,cpu:/docker/x\n", tmp_path) == 2
    assert cgroups.cores("2:cpuacct:/docker/x\n", tmp_path) == cgroups.cores("", tmp_path) == math.inf


def test_the_path_of_a_group_may_hold_colons(tmp_path):
    write(tmp_path / "system.slice/run:1:2.scope", cpu__max="50000 100000")
    assert cgroups.cores("0::/system.slice/run:1:2.scope\n", tmp_path) == 0.5


def test_a_container_that_sees_its_own_group_as_the_root_is_bounded_too(tmp_path):
    write(tmp_path, cpu__max="300000 100000")
    assert cgroups.cores("0::/docker/of/the/host\n", tmp_path) == 3


@pytest.mark.parametrize(("bound", "quota", "usable"), [(8, 1.5, 2), (8, 0.2, 1), (2, 6.0, 2), (3, math.inf, 3)])
def test_usable_cores_are_bound_by_affinity_and_by_quota(monkeypatch, bound, quota, usable):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(bound)))
    monkeypatch.setattr(cgroups, "cores", lambda *_: quota)
    assert distributed.usable_cores() == usable


def test_threads_are_those_that_the_user_set_or_a_share_of_the_cores(monkeypatch):
    """torchrun sets OMP_NUM_THREADS to 1 for its ranks where nobody has."""
    found = []
    monkeypatch.setattr(distributed.torch, "set_num_threads", found.append)
    for name in ("keep_freed_memory", "resolve_kernels"):
        monkeypatch.setattr(distributed, name, lambda: None)
    monkeypatch.setattr(distributed, "usable_cores", lambda: 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    launcher = type("Launcher", (), {"environ": lambda self: told})()
    monkeypatch.setattr(distributed, "launching_command", lambda: launcher)
    for own, told, by_torchrun, set_to in [
        ("5", {}, False, []),
        (None, {}, False, [4]),
        ("1", {}, True, [4]),
        ("1", {"OMP_NUM_THREADS": "1"}, True, []),
        ("2", {}, False, []),  # of the deepspeed launcher, which binds ranks to cores
    ]:
        found.clear()
        monkeypatch.setenv("OMP_NUM_THREADS", own) if own else monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if by_torchrun:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        else:
            monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        distributed.settle_processor()
        assert found == set_to, (own, told, by_torchrun)


# Ranks ----------------------------------------------------------------------------------------------------------------

WHOLE = distributed.described(1, 2, 29500)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": None}, "WORLD_SIZE is set and RANK is not"),
        ({"MASTER_ADDR": None}, "WORLD_SIZE is set and MASTER_ADDR is not"),
        ({"MASTER_PORT": None}, "WORLD_SIZE is set and MASTER_PORT is not"),
        ({"WORLD_SIZE": None, "LOCAL_WORLD_SIZE": None}, "RANK is set and WORLD_SIZE is not"),
        ({"RANK": "2"}, "RANK 2: must be below 2"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK 2: must be below 2"),
        ({"RANK": "one"}, "RANK 'one': must be a whole number"),
        ({"RANK": "-1"}, "RANK '-1': must be a whole number"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK '': must be a whole number"),
        ({"MASTER_PORT": "tcp://10.0.0.1:29500"}, "MASTER_PORT 'tcp://10.0.0.1:29500': must be a whole number"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT 65536: must be below 65536"),
    ],
)
def test_half_a_description_of_ranks_is_refused_by_the_name_of_the_variable(monkeypatch, changed, message):
    for name, value in (WHOLE | changed).items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    distributed.shutdown()  # of what a test before has left
    with pytest.raises(UserError, match=f"^{message}.*(torchrun or deepspeed)"):
        distributed.setup()


def test_a_rank_without_a_gpu_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="LOCAL_RANK 1: there is one rank a GPU, GPUs visible here: 1"):
        distributed.use_device()


def test_what_a_launcher_says_and_what_a_single_process_has_is_right(monkeypatch):
    for described in (WHOLE, {"LOCAL_RANK": "0"}, {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}, {}):
        for name in WHOLE:
            monkeypatch.delenv(name, raising=False)
        for name, value in described.items():
            monkeypatch.setenv(name, value)
        distributed.check_environment()


HOSTS = ("worker-0", "worker-1", "worker-0")


def place(number: int, port: int, answers) -> None:
    """A rank as Kubernetes starts it, on a machine that is told apart by its name alone."""
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        os.environ.pop(name, None)
    told = {"RANK": number, "WORLD_SIZE": len(HOSTS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in told.items()}
    distributed.socket.gethostname = lambda: HOSTS[number]
    distributed.setup(60)
    answers.put((number, distributed.local_rank(), distributed.local_world_size()))
    distributed.shutdown()
    os._exit(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="three ranks, which need as many GPUs")
def test_ranks_without_a_local_rank_are_counted_on_each_machine():
    context = multiprocessing.get_context(START)
    answers, port = context.SimpleQueue(), distributed.free_port()
    ranks = [context.Process(target=place, args=(number, port, answers)) for number in range(len(HOSTS))]
    for rank in ranks:
        rank.start()
    found = sorted(answers.get() for _ in ranks)
    for rank in ranks:
        rank.join(60)
    assert found == [(0, 0, 2), (1, 0, 1), (2, 1, 2)]


def test_ranks_that_do_not_meet_are_told_in_a_line(monkeypatch):
    for name, value in (WHOLE | {"LOCAL_RANK": "0", "MASTER_PORT": str(distributed.free_port())}).items():
        monkeypatch.setenv(name, value)
    distributed.shutdown()  # of what a test before has left
    with pytest.raises(UserError, match=r"MASTER_ADDR 127.0.0.1, MASTER_PORT .*: the ranks did not meet there"):
        distributed.setup(1)


def test_runs_that_mpirun_started_beside_each_other_are_told_what_they_are(monkeypatch, tmp_path, one_rank):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    told = pytest.raises(UserError, match=r"another run is writing there.*OMPI_COMM_WORLD_SIZE is set.*torchrun")
    with claim_output(str(tmp_path)), told, claim_output(str(tmp_path)):
        pass


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), KeyError("another fault")])
def test_an_output_folder_that_is_removed_under_a_run_is_told_and_hides_no_other_fault(tmp_path, one_rank, error):
    told = pytest.raises(SaveFailed if isinstance(error, OSError) else KeyError, match=r"was removed|another fault")
    with told, claim_output(str(tmp_path / "run")) as folder:
        shutil.rmtree(folder)
        raise error
    assert not folder.exists()


# A user without a home folder -----------------------------------------------------------------------------------------


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """As in a container that was started with --user 12345: no HOME, and no name in /etc/passwd."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


DEFAULT = "~/.cache/kozero"


def test_caches_of_a_user_without_a_home_folder_are_the_users_alone(homeless, monkeypatch):
    folder = cache_folder(DEFAULT)
    assert folder == homeless / f"kozero-{os.getuid()}" == cache_folder(DEFAULT)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(UserError, match=r"--cache_dir .*: others can write there"):
        cache_folder(DEFAULT)
    folder.rmdir()
    folder.symlink_to(homeless)
    with pytest.raises(UserError, match=r"--cache_dir .*: others can write there"):
        cache_folder(DEFAULT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(homeless / "xdg"))
    assert cache_folder(DEFAULT) == homeless / "xdg" / "kozero"


def test_caches_are_elsewhere_where_the_home_folder_takes_no_files(homeless, monkeypatch):
    monkeypatch.setenv("HOME", "/proc")  # docker says / of a user whom it does not know
    assert cache_folder(DEFAULT) == homeless / f"kozero-{os.getuid()}"
    monkeypatch.setenv("HOME", str(homeless / "home"))
    assert cache_folder(DEFAULT) == homeless / "home/.cache/kozero"
    assert cache_folder(str(homeless / "named")) == homeless / "named"


def test_a_path_in_a_home_folder_that_is_not_there_is_refused_by_its_flag(homeless):
    with pytest.raises(UserError, match="--output_dir ~/runs: this user has no home folder"):
        parse_arguments(TrainingArguments, prog="p", description="", argv=["--output_dir", "~/runs"])
    (data,) = parse_arguments(DataArguments, prog="p", description="", argv=[])
    assert cache_folder(data.cache_dir).is_dir()


def test_a_zero_character_in_a_path_is_refused(tmp_path):
    """A JSON file can hold one, a command line cannot."""
    (tmp_path / "told.json").write_text(json.dumps({"output_dir": "a\0b"}))
    with pytest.raises(UserError, match=r"output_dir a.*: holds a zero character"):
        parse_arguments(TrainingArguments, prog="p", description="", argv=[str(tmp_path / "told.json")])
