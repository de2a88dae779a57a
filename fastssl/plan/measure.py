"""Takes a few steps of a training in a process of its own, and says what a step costs.

    python -m fastssl.plan.measure CONFIG.yaml OUT.json        # also under torchrun

The steps are the run's own: its loader, its model, its optimizer, the metrics at the end of an epoch. Nothing of them
is kept.
"""

import json
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from fastssl.errors import Preempted, UserError
from fastssl.processes.children import launch_command, signals_passed_on
from fastssl.step.cuda_graph import NUM_PLAIN_STEPS
from pipelines.files import read_file

NUM_WARM_UP = NUM_PLAIN_STEPS + 2  # steps: kernels are compiled, caches fill, the step is captured on a GPU
MIN_STEPS = 3
MAX_STEPS = 200
SECONDS = 10.0
_OUT_OF_MEMORY = 77  # exit code
_KILLED = -9  # by the kernel, for lack of memory
_ERROR = re.compile(r"^fastssl: error(?: \(rank \d+\))?: (.*)$", re.MULTILINE)


class OutOfMemoryError(Exception):
    """A step does not fit into the memory."""


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What a step costs.

    Attributes:
        step_s: Seconds per step, the mean over num_steps, with the ends of epochs among them.
        start_s: Seconds from the start of the process to the end of the first step.
        num_steps: Steps that were measured.
        memory_bytes: The largest use of memory: of the GPU, or of the process on a CPU.
    """

    step_s: float
    start_s: float
    num_steps: int
    memory_bytes: int


def measure(config: Path, num_processes: int = 1) -> StepCost:
    """Measure the steps of a configuration.

    Args:
        config: A YAML file; its run.dir is not touched.
        num_processes: Of the training.

    Raises:
        OutOfMemoryError: a step does not fit into the memory.
        UserError: the configuration or the data is wrong, as the training would say.
        Preempted: a signal asked this process to stop.
    """
    with tempfile.TemporaryDirectory(prefix="fastssl-measure-") as folder:
        out = Path(folder) / "cost.json"
        program = ["-m", "fastssl.plan.measure", str(config), str(out)]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with signals_passed_on() as child:
            process = child.start(launch_command(num_processes, program), **pipes)
            _, stderr = process.communicate()
        if out.is_file():
            return StepCost(**json.loads(read_file(out)))
    code = process.returncode
    if code == -signal.SIGINT:
        raise KeyboardInterrupt
    if code == -signal.SIGTERM:
        raise Preempted("asked to stop before the training: the same command continues")
    of_ranks = rf"exitcode *: ({_OUT_OF_MEMORY}|{_KILLED})\b"  # in torchrun's report
    if code in (_OUT_OF_MEMORY, _KILLED) or re.search(of_ranks, stderr):
        raise OutOfMemoryError
    if errors := _ERROR.findall(stderr):
        raise UserError(errors[-1])
    last = (stderr.strip().splitlines() or [f"exit code {code}"])[-1]
    raise UserError(f"measuring some steps failed: {last[:500]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure in this process and write the cost; exit codes are those of a training."""
    config, out = sys.argv[1:] if argv is None else argv
    from fastssl.errors import print_error
    from pipelines.errors import DataError

    try:
        cost = _measure_here(Path(config), Path(out).with_name("run"))
    except (UserError, DataError) as error:
        print_error(str(error))
        return 2
    except Exception as error:
        if _is_out_of_memory(error):
            return _OUT_OF_MEMORY
        raise
    if cost is not None:
        Path(out).write_text(json.dumps(asdict(cost)))
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation has failed, on the host or on a GPU."""
    from fastssl.checkpoint.tensor_file import is_out_of_memory as on_host
    from fastssl.machine.nvidia_gpu import is_out_of_memory as on_gpu

    return on_gpu(error) or on_host(error)


def _measure_here(config: Path, run_dir: Path) -> StepCost | None:
    """The cost, on the first rank; `run_dir` is a folder that all ranks see, and nobody else."""
    started_s = time.monotonic()
    import torch

    from fastssl import collectives
    from fastssl.config import load_config
    from fastssl.trainer import Trainer, start_alone
    from pipelines.batch import Batch

    def batches(trainer: Trainer) -> Iterator[Batch]:
        for epoch in count():
            yield from trainer.loader.epoch(epoch)

    trainer = start_alone(load_config(config, {"run.dir": str(run_dir), "run.resume": "never", "run.trackers": []}))
    on_gpu = trainer.device.type == "cuda"
    trainer.engine.train()
    trainer.epoch_stats.timer.start()
    first_s = begin_s = time.monotonic()
    num_measured = 0
    for num_done, batch in enumerate(batches(trainer)):
        now_s = time.monotonic()
        if num_done == 1:
            first_s = now_s
        if num_done == NUM_WARM_UP:
            begin_s = now_s
        num_measured = num_done - NUM_WARM_UP
        is_long = num_measured >= MIN_STEPS and now_s - begin_s >= SECONDS
        if collectives.broadcast_object(is_long or num_measured >= MAX_STEPS):
            break
        trainer.take_step(batch)
        is_epoch_end = trainer.step % trainer.steps_per_epoch == 0
        trainer.read_reports(keep=0 if is_epoch_end else 1)
        if is_epoch_end:  # with few images on a GPU, it takes longer than the steps
            trainer.epoch_stats.end_epoch(trainer.step, trainer.loader.bad_sample_ids)
    trainer.read_reports(keep=0)
    if on_gpu:
        torch.cuda.synchronize()
    step_s = (time.monotonic() - begin_s) / num_measured
    trainer.loader.close()
    trainer.epoch_stats.close()
    if collectives.rank():
        return None
    used = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return StepCost(step_s=step_s, start_s=first_s - started_s, num_steps=num_measured, memory_bytes=used)


if __name__ == "__main__":
    sys.exit(main())
