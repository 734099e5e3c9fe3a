"""The commands of docs/guides/clusters.md and the SLURM script, with two processes on a CPU.

All commands of the page continue one run, which must equal, bit for bit, a run that nothing interrupted.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from flowseg.build import build
from flowseg.checkpoint import list_checkpoints, trained_steps
from flowseg.config import load_config, save_config
from flowseg.runs.parallel import Ranks
from flowseg.training.trainer import Trainer, train

from .support.launching import quick_commands, started
from .support.processes import forked, free_port, wait_until
from .support.runs import assert_same_weights, steps
from .tiny import tiny_config

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/guides/clusters.md").read_text()
FOREVER = 1_000_000


def config(**shape):
    shape = {"steps": FOREVER, "batch_size": 2, "eval_every": FOREVER, "checkpoint_every": FOREVER, **shape}
    return tiny_config(train=shape, optim={"schedule": "constant"}, data={"scenes_val": 2})


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """Import and derive once what each forked process would take seconds for."""
    train(config(steps=1), tmp_path_factory.mktemp("warm") / "run")


@pytest.fixture
def shell(tmp_path, warm):
    """Start a command line in a folder with ``tiny.yaml``; at the end, kill what it left."""
    save_config(config(), tmp_path / "tiny.yaml")
    with quick_commands(tmp_path / "commands") as environment:
        running = []

        def start(line, **variables):
            output = (tmp_path / f"output{len(running)}").open("w+")
            process = subprocess.Popen(
                ["bash", "-c", f"exec env {line}"],
                env=environment | variables,
                cwd=tmp_path,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            process.said = lambda: Path(output.name).read_text()
            running.append(process)
            return process

        yield start
        for process in running:
            if process.poll() is None:
                process.kill()
        for entry in started(tmp_path / "commands"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(entry["process"], signal.SIGKILL)


def finish(*processes, status=0):
    """Wait until all processes have ended with this status; ``None``: with an error."""
    for process in processes:
        code = process.wait(120)
        assert code == status or (status is None and code), f"{code}\n{process.said()}"


def logged(run):
    """The last logged step, or 0."""
    return max(steps(run), default=0) if (run / "metrics.jsonl").exists() else 0


def page_commands():
    """The launchers' commands on the page, at the size of this test; those of several machines have a free port."""
    shell_blocks = re.findall(r"^```\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    launched = re.compile(r"([A-Z_]+=\S+ )*(srun .*)?(torchrun|accelerate) ")
    lines = [line for block in shell_blocks for line in block.splitlines() if launched.match(line)]
    small = {
        r"configs/ade20k_x?l16.yaml": "tiny.yaml",
        r" --root \S+": "",
        r"(/shared/)?runs/ade20k": "run",
        r"--num_processes \d+": "--num_processes 2",
        r"--nproc_per_node 8": "--nproc_per_node 2",
        r"(--nnodes 2 .*)--nproc_per_node 2": r"\1--nproc_per_node 1",
        r"10\.0\.0\.1": "127.0.0.1",
        r" --resume=auto": "",
    }
    for pattern, value in small.items():
        lines = [re.sub(pattern, value, line) for line in lines]
    return lines


def on_two_machines(first, second):
    port = str(free_port())
    return first.replace("29500", port), second.replace("29500", port)


def test_the_commands_of_the_page_continue_one_run_and_equal_an_uninterrupted_one(shell, slurm, tmp_path):
    lines = page_commands()
    one = [line for line in lines if "machine" not in line and "nnodes" not in line]
    several = [line for line in lines if line not in one]
    training = [line for line in one if "flowseg train" in line]
    assert len(training) == 3 and len(several) == 5
    run, step = tmp_path / "run", 0
    # One machine: accelerate, torchrun, and accelerate with sharded checkpoints.
    for line in training:
        step += 1
        finish(shell(f"{line} --resume=auto --steps {step}"))
        assert list_checkpoints(run)[-1].name == f"step-{step:08d}"
        assert (list_checkpoints(run)[-1] / "shards.json").exists() == ("sharded" in line)
    # The sharded checkpoint is the newest.
    scores = []
    for index, line in enumerate(line for line in one if "flowseg evaluate" in line):
        finish(shell(f"{line} --json {index}.json"))
        scores.append(json.loads((tmp_path / f"{index}.json").read_text()))
    assert len(scores) == 3 and scores[0] == scores[1] == scores[2] and scores[0]["images"] == 2
    # Two machines with accelerate.
    step += 1
    finish(*(shell(f"{line} --resume=auto --steps {step}") for line in on_two_machines(*several[:2])))
    # Two machines with torchrun. The second one dies: the first one ends, and what it has not saved is lost.
    machines = [shell(f"{line} --resume=auto") for line in on_two_machines(*several[2:4])]
    wait_until(lambda: logged(run) > step + 2, *machines)
    trainer = [entry for entry in started(tmp_path / "commands") if entry["rank"] == "1"][-1]["process"]
    machines[1].kill()
    os.kill(trainer, signal.SIGKILL)
    finish(machines[0], status=None)
    assert list_checkpoints(run)[-1].name == f"step-{step:08d}"
    # The first machine read, waited or wrote at that moment, and each has an error of its own.
    assert re.search("Connection closed by peer|Connection reset by peer|Broken pipe", machines[0].said())

    # The launchers find each other. A trainer dies and all are started again. Then SIGTERM to the launchers ends the run.
    (line,) = several[4:]
    line = on_two_machines(line, line)[0] + " --resume=auto --set data.workers=1"
    before = len(started(tmp_path / "commands"))
    machines = [shell(line) for _ in range(2)]

    def starts():
        return sum(machine.said().count(f"starts at step {step} of") for machine in machines)

    for start in (1, 2):
        wait_until(lambda start=start: starts() == start and logged(run) > step, *machines)
        trainers = [entry for entry in started(tmp_path / "commands")[before:] if entry["argv"][0] == "python"]
        assert len(trainers) == 2 * start
        if start == 1:
            os.kill(trainers[0]["process"], signal.SIGKILL)
    for machine in machines:
        machine.terminate()
    finish(*machines, status=1)
    last = trained_steps(run)
    assert last > step and f"stopped by signal at step {last}" in "".join(machine.said() for machine in machines)
    # The run without any of this.
    assert forked(lambda rank: train(config(steps=last), tmp_path / "whole"), world=2) == [0, 0]
    assert_same_weights(run, tmp_path / "whole")
    assert steps(run) == list(range(1, last + 1))


SRUN = """#!{python} -SE
import json, os, signal, subprocess, sys
command, options = sys.argv[1:], []
while command[0].startswith("--"):
    options.append(command.pop(0))
with open("srun.json", "w") as file:
    json.dump(options, file)
tasks = [
    subprocess.Popen(command, env={{**os.environ, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}})
    for task in range(int(os.environ.get("SLURM_NTASKS", "1")))
]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = """#!/bin/sh
case $1 in
    show) echo localhost; echo other-node ;;
    requeue) echo "$2" >>requeued ;;
esac
"""


@pytest.fixture
def slurm(shell, tmp_path):
    """Start the script as SLURM does, with commands that stand for ``srun`` and ``scontrol``."""
    # The script adds 20000 to the number of the job: the result is the port.
    job = free_port(random.Random().sample(range(20000, 40000), 100)) - 20000
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tmp_path / "commands" / name).write_text(text)
        (tmp_path / "commands" / name).chmod(0o755)
    return lambda: shell(
        f"bash {ROOT}/configs/slurm/train.sbatch --config tiny.yaml --out run",
        SLURM_JOB_ID=str(job),
        SLURM_JOB_NODELIST="node[1-2]",
        SLURM_NTASKS="2",
        SLURM_NTASKS_PER_NODE="2",
        SLURM_CPUS_PER_TASK="3",
    ), str(job)


def test_the_slurm_script_saves_requeues_and_continues_to_the_weights_of_an_uninterrupted_run(slurm, tmp_path):
    start, job = slurm
    run, requeued = tmp_path / "run", tmp_path / "requeued"
    first = start()
    wait_until(lambda: logged(run) >= 2, first)
    first.send_signal(signal.SIGUSR1)
    finish(first, status=128 + signal.SIGUSR1)
    saved = trained_steps(run)
    assert requeued.read_text().split() == [job] and f"job {job} goes back to the queue" in first.said()
    # The same job again. It ends by itself and stays out of the queue.
    save_config(config(steps=saved + 2), tmp_path / "tiny.yaml")
    finish(start())
    assert requeued.read_text().split() == [job]
    assert forked(lambda rank: train(config(steps=saved + 2), tmp_path / "whole"), world=2) == [0, 0]
    assert_same_weights(run, tmp_path / "whole")
    assert steps(run) == list(range(1, saved + 3))


def test_the_slurm_script_gives_the_tasks_their_cores(slurm, tmp_path):
    start, _ = slurm
    save_config(config(steps=1), tmp_path / "tiny.yaml")
    finish(start())
    # srun of SLURM 22.05 and later gives a task one core if it does not get the number itself.
    assert {"--cpus-per-task=3", "--cpu-bind=none"} <= set(json.loads((tmp_path / "srun.json").read_text()))
    # Loaders divide the cores and the shared memory of the node by this number.
    assert [entry["local_world_size"] for entry in started(tmp_path / "commands")] == ["2", "2"]


def test_the_slurm_script_does_not_requeue_a_job_that_fails(slurm, tmp_path):
    start, _ = slurm
    (tmp_path / "tiny.yaml").write_text("train: {stepz: 3}\n")
    failed = start()
    finish(failed, status=2)
    assert "unknown setting 'train.stepz'" in failed.said() and not (tmp_path / "requeued").exists()


def test_the_bytes_per_parameter_on_the_page_are_those_of_the_trainer(tmp_path):
    (tmp_path / "run").mkdir()
    trainer = Trainer(config(mixed_precision="bf16"), tmp_path / "run", Accelerator(cpu=True), Ranks(1))
    parameters = list(trainer.bare_model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer.state.step = 1
    trainer._score(trainer.config.sample, trainer.config.train)
    shared = {parameter.data_ptr() for parameter in trainer.scored_model.parameters()}
    sampled = [p for p in trainer.segmenter._network._copy.parameters() if p.data_ptr() not in shared]
    moments = [state[name] for state in trainer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    kinds = (
        parameters,
        [p.grad for p in parameters],
        moments,
        trainer.ema.tensors.values(),
        trainer.scored_model.parameters(),
        sampled,
    )
    count = sum(parameter.numel() for parameter in parameters)
    held = [sum(tensor.nbytes for tensor in kind) / count for kind in kinds]
    stated = re.findall(r"^\| (?:parameter|gradient|AdamW|averaged|copy|bf16 copy)[^|]* \| (\d) \|", PAGE, re.MULTILINE)
    # Vectors stay in float32, so this tiny network has a bit less than two bytes of bf16 per parameter.
    assert 1.8 < held[-1] < 2 == int(stated[-1])
    assert held[:-1] == [int(value) for value in stated[:-1]]


def test_the_memory_on_the_page_is_that_of_the_networks():
    for size, count in re.findall(r"^\| (X?L/16) \| (\d+) M \|", PAGE, re.MULTILINE):
        with torch.device("meta"):
            network, _ = build(load_config(pairs=[f"model.size={size}", "codes.channels=3"]), 150, align_dim=768)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| {size} |"))
        billions = parameters / 1e9
        shares = (26, 30, 20 / 8 + 6, 20 / 32 + 6)
        assert f"{parameters / 1e6:.0f}" == count
        assert re.findall(r"([\d.]+) GB", row) == [f"{share * billions:.1f}" for share in shares]
