"""Will it fit? The memory of a fine-tuning run before it starts, and the setting that suits a machine.

    python scripts/plan.py finetune/recipes/trinity_t4.json --device_gib 15
    python scripts/plan.py --config_file models/kogpt2_config.json --bf16 --ranks 1,2,4,8 --device_gib 24

Takes the arguments of finetune/train.py, and what the machine is. Needs neither GPU nor weights: activations are found
by a pass over tensors without data, the rest by formula.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import GPT2Config

from finetune.arguments import FinetuningArguments, ModelArguments
from finetune.planned import PlannedModel
from finetune.setup import no_pauses, row_capacity
from finetune.tasks import TASKS
from finetune.train import ARGUMENTS as TRAINING
from finetune.ways import ROOT, Choice, Planner, way, ways
from kozero.config import arg, at_least, batch_sizes, parse_arguments
from kozero.errors import require, run_main
from kozero.folder import new_file, write_text
from kozero.plan import state_bytes
from models.language_model import DROPOUTS, load_config, read_config

SHAPES = {  # of the published models, so that a plan needs no download
    "skt/kogpt2-base-v2": "kogpt2_config.json",
    "skt/ko-gpt-trinity-1.2B-v0.5": "ko_gpt_trinity_config.json",
}
GIB = 2**30
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
HEADER = ("setting", "micro", "accumulation", *PARTS, "peak", "host", "by the paper", "fits")
MOST = 2**20  # rows of a micro batch or an update


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
    output_file: str | None = arg(None, "JSON of the tables and proposals, sizes in bytes")

    def __post_init__(self) -> None:
        at_least(0, self, "reserve_gib", "host_gib", "global_batch")
        require(self.device_gib > self.reserve_gib, f"--device_gib {self.device_gib}: not above --reserve_gib")
        require(0 < self.predicted <= 1, f"--predicted {self.predicted}: must be above 0 and at most 1")
        require(self.global_batch <= MOST, f"--global_batch {self.global_batch}: must be {MOST:,} at most")
        numbers = [number.strip() for number in self.ranks.split(",")]
        right = all(number.isdecimal() and len(number) < 6 and int(number) > 0 for number in numbers)
        require(right, f"--ranks {self.ranks[:40]}: must be whole numbers from 1 to 99999 with commas between them")


ARGUMENTS = (*TRAINING, PlanArguments)


def main() -> None:
    """For each number of ranks what was told, then every way there is, then the one to take."""
    training, model, data, _, pauses, freezing, machine = parse_arguments(
        *ARGUMENTS, prog="scripts/plan.py", description="Predict the memory of a fine-tuning run, propose a setting."
    )
    if machine.output_file:
        new_file("--output_file", Path(machine.output_file), reads=(training, model, data))
    require(data.task in TASKS, f"--task {data.task}: plans are for GPT-2 models: {', '.join(TASKS)}")
    task, rows = TASKS[data.task], batch_sizes(training, 1).global_batch
    no_pauses(task, "--num_pauses", pauses.num_pauses)
    told = f"--per_device_train_batch_size x --gradient_accumulation_steps, {rows}"
    require(rows <= MOST, f"{told}: must be {MOST:,} at most")
    config = shape(model)
    length = row_capacity(data.max_seq_length, task.max_seq_length, config.n_positions)
    planned = PlannedModel(
        config, freezing.freeze, pauses.needs_token, training.dtype, length, machine.predicted,
        machine.device == "gpu", 8 if training.optim == "adamw" else 0,
    )  # fmt: skip
    sizes = f"{planned.counts['total']:,} parameters, {planned.counts['trainable']:,} train"
    print(f"{config.n_layer} layers of {config.n_embd}: {sizes}; {training.dtype}, rows of {length:,} tokens")
    told = [plan(planned, training, machine, int(ranks)) for ranks in machine.ranks.split(",")]
    if machine.output_file:
        write_text(Path(machine.output_file), json.dumps({"machine": asdict(machine), "plans": told}, indent=2))


def shape(arguments: ModelArguments) -> GPT2Config:
    """Sizes of the model; those of the published ones are shipped."""
    name, file = arguments.model_name_or_path, arguments.config_file
    require(bool(name) != bool(file), "give either --model_name_or_path or --config_file")
    file = file or (str(ROOT / "models" / SHAPES[name]) if name in SHAPES else None)
    config = read_config(Path(file)) if file else load_config(name)
    if arguments.dropout is not None:
        config.update(dict.fromkeys(DROPOUTS, arguments.dropout))
    return config


def plan(model: PlannedModel, training: FinetuningArguments, machine: PlanArguments, ranks: int) -> dict[str, Any]:
    """Print a table for a number of ranks, and the proposal."""
    sizes = batch_sizes(training, ranks)
    planner = Planner(
        model, (machine.device_gib - machine.reserve_gib) * GIB, machine.host_gib * GIB or math.inf,
        machine.global_batch or sizes.global_batch,
    )  # fmt: skip
    print(f"\n{ranks} x {machine.device_gib:g} GiB, {machine.reserve_gib:g} of them kept free; updates of "
          f"{planner.global_batch} rows. GiB of a rank, host: of the machine\n")  # fmt: skip
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
    path = training.deepspeed_config or ROOT / "ds_configs/zero0.json"
    own = way(path, training.gradient_checkpointing, training, sizes)
    told = planner.choice(own, sizes.micro, sizes.accumulation)
    rows = [show(planner, told)]
    fitting = [told] if planner.fits(told) else []
    for one in ways(ranks, training, sizes):
        found = planner.largest(one)
        fitting += [found] if found else []
        rows.append(show(planner, found or planner.choice(one, 1)))
    best = min(fitting, key=planner.seconds, default=None)
    verdict = conclusion(planner, told, best)
    print("\n" + verdict)
    return {"ranks": ranks, "rows": rows, "conclusion": verdict}


def show(planner: Planner, choice: Choice) -> dict[str, Any]:
    """Print one row of the table; it with sizes in bytes."""
    counts, way, found = planner.model.counts, choice.way, choice.footprint
    paper = state_bytes(counts["total"], counts["trainable"], way.stage, way.ranks, planner.model.dtype)
    sizes = [*(found.device.get(part, 0.0) for part in PARTS), found.peak, choice.host, paper]
    fits = planner.fits(choice)
    cells = [way.name, str(choice.micro), str(choice.accumulation), *(f"{size / GIB:.2f}" for size in sizes)]
    print(f"| {' | '.join([*cells, 'yes' if fits else 'no'])} |", flush=True)
    return dict(zip(HEADER, [way.name, choice.micro, choice.accumulation, *sizes, fits], strict=True))


def conclusion(planner: Planner, told: Choice, best: Choice | None) -> str:
    """What to do, as flags."""
    first = f"as told ({told.way.name}, {told.micro} x {told.accumulation} rows): "
    lacks = [] if planner.fits(told) else ["the GPU"] * (told.footprint.peak > planner.room)
    lacks += ["the machine"] * (told.host > planner.host)
    first += f"does not fit into {' and '.join(lacks)}" if lacks else "fits"
    if best is None:
        return f"{first}\nno setting fits: {remedies(planner)}"
    if best is told or (not lacks and planner.seconds(told) <= 1.1 * planner.seconds(best)):
        return f"{first}, and nothing is much better"
    path, rows = Path(best.way.path), best.micro * best.accumulation * best.way.ranks
    file = path.relative_to(ROOT) if path.is_relative_to(ROOT) else best.way.path
    flags = f"--deepspeed_config {file} --per_device_train_batch_size {best.micro}"
    flags += f" --gradient_accumulation_steps {best.accumulation}"
    flags += " --gradient_checkpointing" * best.way.checkpointing
    return (
        f"{first}\nproposed: {flags}\n          {best.footprint.peak / GIB:.1f} GiB of each GPU, "
        f"{best.host / GIB:.1f} GiB of the machine's memory, {rows} rows an update"
    )


def remedies(planner: Planner) -> str:
    """What can be changed where nothing fits."""
    model, most = planner.model, planner.model.config.n_layer - 1
    frozen = model.counts["trainable"] < model.counts["total"]
    ways = ["shorter rows (--max_seq_length)", "more GPUs (--ranks)"]
    ways += ["16 bit (--bf16, --fp16)"] * (model.dtype == "fp32")
    ways.append(f"{'more ' * frozen}frozen layers (--freeze, e.g. wte,wpe,h.0-{max(0, most * 3 // 4)})")
    ways += ["more memory of the machine (--host_gib)"] * (planner.host < math.inf)
    return ", ".join(ways)


if __name__ == "__main__":
    run_main(main)
