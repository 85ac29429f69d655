"""Will it fit? The memory of a fine-tuning run before it starts, and the setting that suits a machine.

    python scripts/plan.py finetune/recipes/trinity_t4.json --device_gib 15
    python scripts/plan.py --config_file models/kogpt2_config.json --bf16 --ranks 1,2,4,8 --device_gib 24

Takes the arguments of finetune/train.py, and what the machine is. Needs neither GPU nor weights: activations are found
by a pass over tensors without data, the rest by formula.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import GPT2Config

from finetune.arguments import DataArguments, FinetuningArguments, ModelArguments
from finetune.planned import PlannedModel
from finetune.setup import row_capacity
from finetune.tasks import TASKS
from finetune.train import FreezeArguments
from kozero.config import arg, at_least, parse_arguments
from kozero.errors import require, run_main
from kozero.folder import write_text
from kozero.footprint import Footprint, ZeroSizes
from kozero.json_files import read_json_object
from kozero.pause import PauseArguments
from kozero.plan import state_bytes
from models.language_model import DROPOUTS, load_config, read_config

ROOT = Path(__file__).parent.parent
SHAPES = {  # of the published models, so that a plan needs no download
    "skt/kogpt2-base-v2": "kogpt2_config.json",
    "skt/ko-gpt-trinity-1.2B-v0.5": "ko_gpt_trinity_config.json",
}
SHARDED, OFFLOADED = ("zero0", "zero1", "zero2", "zero3"), ("zero2_offload", "zero3_offload")  # in ds_configs/
WAYS = [  # the fastest first: traffic costs less than computing twice, and that less than the way to the CPU and back
    *((name, False) for name in SHARDED), *((name, True) for name in SHARDED),
    *((name, checkpointing) for name in OFFLOADED for checkpointing in (False, True)),
]  # fmt: skip
ENOUGH_TOKENS = 1024  # of a micro batch: with fewer a GPU waits for launches rather than computes
GIB = 2**30
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")


@dataclass
class PlanArguments:
    """What the machine is."""

    ranks: str = arg("1", "processes, one for each GPU; several numbers with commas: a table for each")
    device_gib: float = arg(16.0, "memory of a GPU in GiB; with --device cpu: a rank's share of the machine's")
    reserve_gib: float = arg(1.0, "GiB of it that stay free for CUDA's context, libraries and fragments")
    host_gib: float = arg(0.0, "memory of the machine in GiB, where offloaded states lie; 0: whatever it takes")
    global_batch: int = arg(0, "rows of one optimizer update over all ranks; 0: as many as the arguments make up")
    predicted: float = arg(1.0, "share of the tokens that are predicted: 1 for essays, that of the answers else")
    device: str = arg("gpu", "what computes", choices=["gpu", "cpu"])
    output_file: str | None = arg(None, "JSON of all that is printed")

    def __post_init__(self) -> None:
        at_least(0, self, "reserve_gib", "host_gib", "global_batch")
        require(self.device_gib > self.reserve_gib, f"--device_gib {self.device_gib}: not above --reserve_gib")
        require(0 < self.predicted <= 1, f"--predicted {self.predicted}: must be above 0 and at most 1")
        numbers = self.ranks.split(",")
        right = all(number.strip().isdecimal() and 0 < int(number) <= 65536 for number in numbers)
        require(right, f"--ranks {self.ranks}: must be whole numbers above 0 with commas between them")

    @property
    def room(self) -> float:
        """Bytes that a run may take."""
        return (self.device_gib - self.reserve_gib) * GIB


ARGUMENTS = (FinetuningArguments, ModelArguments, DataArguments, PauseArguments, FreezeArguments, PlanArguments)


@dataclass(frozen=True)
class Candidate:
    """A way to spread a run: its DeepSpeed JSON, the number of ranks, and whether activations are made anew."""

    path: str
    ranks: int
    checkpointing: bool

    @property
    def name(self) -> str:
        """For a table."""
        return Path(self.path).stem + (" + checkpointing" if self.checkpointing else "")

    def zero(self) -> tuple[int, ZeroSizes | None]:
        """Stage and sizes of its JSON."""
        section = read_json_object(self.path).get("zero_optimization", {})
        stage = section.get("stage", 0)
        if stage == 0:
            return 0, None
        from kozero.engines.deepspeed import check_sections, zero_sizes

        check_sections({"zero_optimization": section}, self.path)
        return stage, zero_sizes({name: value for name, value in section.items() if value != "auto"})


@dataclass
class Planner:
    """Footprints of one model on one machine. `global_batch`: rows of an update."""

    model: PlannedModel
    machine: PlanArguments
    global_batch: int

    def footprint(self, candidate: Candidate, micro: int, accumulation: int) -> Footprint:
        """Bytes of a rank."""
        stage, zero = candidate.zero()
        return self.model.footprint(micro, accumulation, candidate.ranks, stage, zero, candidate.checkpointing)

    def accumulation(self, micro: int, ranks: int) -> int:
        """Micro batches that make up the rows of an update, or a few more."""
        return math.ceil(self.global_batch / (micro * ranks))

    def fits(self, candidate: Candidate, micro: int, accumulation: int) -> bool:
        """Whether there is room on the device and, all ranks together, in the machine."""
        found = self.footprint(candidate, micro, accumulation)
        host = self.machine.host_gib * GIB or math.inf
        return found.peak <= self.machine.room and in_machine(found, candidate) <= host

    def largest(self, candidate: Candidate) -> int:
        """Rows of the largest micro batch that fits and that an update can fill; a power of two, 0 for none."""
        most = max(1, self.global_batch // candidate.ranks)
        sizes = [2**k for k in range(most.bit_length())]
        low, high = 0, len(sizes)  # sizes[:low] fit, sizes[high:] do not
        while low < high:
            middle = (low + high) // 2
            if self.fits(candidate, sizes[middle], self.accumulation(sizes[middle], candidate.ranks)):
                low = middle + 1
            else:
                high = middle
        return sizes[low - 1] if low else 0


def main() -> None:
    """What was told, then every way there is, then the one to take."""
    training, model, data, pauses, freezing, machine = parse_arguments(
        *ARGUMENTS, prog="scripts/plan.py", description="Predict the memory of a fine-tuning run, propose a setting."
    )
    require(data.task in TASKS, f"--task {data.task}: plans are for GPT-2 models: {', '.join(TASKS)}")
    config = shape(model)
    length = row_capacity(data.max_seq_length, TASKS[data.task].max_seq_length, config.n_positions)
    planned = PlannedModel(
        config, freezing.freeze, pauses.needs_token, training.dtype, length, machine.predicted, machine.device == "gpu"
    )
    counts = planned.counts
    print(
        f"{config.n_layer} layers of {config.n_embd}: {counts['total']:,} parameters, {counts['trainable']:,} train; "
        f"{training.dtype}, rows of {length:,} tokens"
    )
    told = []
    for ranks in map(int, machine.ranks.split(",")):
        rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * ranks
        told += list(plan(Planner(planned, machine, machine.global_batch or rows), training, ranks))
    if machine.output_file:
        write_text(Path(machine.output_file), json.dumps({"machine": asdict(machine), "rows": told}, indent=2))


def shape(arguments: ModelArguments) -> GPT2Config:
    """Sizes of the model; those of the published ones are shipped."""
    file = arguments.config_file
    if not file and arguments.model_name_or_path in SHAPES:
        file = str(ROOT / "models" / SHAPES[arguments.model_name_or_path])
    require(bool(file or arguments.model_name_or_path), "give --model_name_or_path or --config_file")
    config = read_config(Path(file)) if file else load_config(arguments.model_name_or_path)
    if arguments.dropout is not None:
        config.update(dict.fromkeys(DROPOUTS, arguments.dropout))
    return config


def plan(planner: Planner, training: FinetuningArguments, ranks: int) -> Iterator[dict]:
    """Print a table for a number of ranks; its rows for a file."""
    machine, micro = planner.machine, training.per_device_train_batch_size
    print(f"\n{ranks} x {machine.device_gib:g} GiB, {machine.reserve_gib:g} of them kept free. GiB of a rank:\n")
    header = ("setting", "micro", *PARTS, "peak", "host", "by the paper", "largest micro")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    ways = [Candidate(str(ROOT / f"ds_configs/{name}.json"), ranks, again) for name, again in WAYS]
    path = str(Path(training.deepspeed_config or ROOT / "ds_configs/zero0.json").resolve())
    told = Candidate(path, ranks, training.gradient_checkpointing)
    fits = planner.fits(told, micro, training.gradient_accumulation_steps)
    if told not in ways:
        ways.insert(0, told)
    largest = {}
    for way in dict.fromkeys((told, *ways)):
        largest[way] = planner.largest(way)
        rows = micro if way == told else max(1, largest[way])
        steps = training.gradient_accumulation_steps if way == told else planner.accumulation(rows, ranks)
        row = line(planner, way, rows, planner.footprint(way, rows, steps), largest[way])
        print(f"| {' | '.join(row)} |", flush=True)
        yield dict(zip(header, row, strict=True)) | {"ranks": ranks}
    print(f"\nas told ({told.name}): {'fits' if fits else 'does not fit'}")
    print(proposal(planner, best(ways, largest, planner.model.length)))


def line(planner: Planner, candidate: Candidate, micro: int, found: Footprint, largest: int) -> list[str]:
    """One row of the table."""
    counts, (stage, _) = planner.model.counts, candidate.zero()
    states = state_bytes(counts["total"], counts["trainable"], stage, candidate.ranks, planner.model.dtype)
    sizes = [*(found.device.get(part, 0.0) for part in PARTS), found.peak, in_machine(found, candidate), states]
    return [candidate.name, str(micro), *(f"{size / GIB:.2f}" for size in sizes), str(largest) if largest else "none"]


def best(ways: list[Candidate], largest: dict[Candidate, int], length: int) -> tuple[Candidate, int] | None:
    """The first way whose micro batch keeps a GPU busy, else the one with the largest; with its rows."""
    fitting = [(way, largest[way]) for way in ways if largest[way]]
    busy = [found for found in fitting if found[1] * length >= ENOUGH_TOKENS]
    return busy[0] if busy else max(fitting, key=lambda found: found[1], default=None)


def in_machine(found: Footprint, candidate: Candidate) -> float:
    """Bytes of the machine's memory, all ranks on one."""
    return found.host * candidate.ranks + found.kept


def proposal(planner: Planner, chosen: tuple[Candidate, int] | None) -> str:
    """What to do, as flags."""
    if chosen is None:
        return (
            "no setting fits: shorter rows (--max_seq_length), more frozen layers (--freeze wte,wpe,h.0-"
            f"{planner.model.config.n_layer * 3 // 4}), 16 bit (--bf16, --fp16) or more GPUs"
        )
    way, micro = chosen
    steps = planner.accumulation(micro, way.ranks)
    found = planner.footprint(way, micro, steps)
    flags = f"--deepspeed_config {short(way.path)} --per_device_train_batch_size {micro}"
    flags += f" --gradient_accumulation_steps {steps}" + " --gradient_checkpointing" * way.checkpointing
    host = in_machine(found, way) / GIB
    beside = f", and {host:.1f} GiB of the machine's memory" if host else ""
    return f"proposed: {flags}\n          {found.peak / GIB:.1f} GiB of each GPU{beside}"


def short(path: str) -> str:
    """A shipped file by its name in the project."""
    return str(Path(path).relative_to(ROOT)) if Path(path).is_relative_to(ROOT) else path


if __name__ == "__main__":
    run_main(main)
