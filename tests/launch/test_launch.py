"""The launch examples, as far as a machine without a cluster can try them."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from fastssl.config import load_config
from fastssl.tracking.writers import read_rows
from tests.helpers.processes import ROOT, environment, free_port

LAUNCH = ROOT / "launch"
# Kubeflow training operator, pkg/apis/kubeflow.org/v1: PyTorchJobSpec, RunPolicy, ReplicaSpec.
SPEC = {"runPolicy", "elasticPolicy", "pytorchReplicaSpecs", "nprocPerNode"}
RUN_POLICY = {
    "cleanPodPolicy",
    "ttlSecondsAfterFinished",
    "activeDeadlineSeconds",
    "backoffLimit",
    "schedulingPolicy",
    "suspend",
    "managedBy",
}
REPLICA = {"replicas", "template", "restartPolicy"}

# Stands in for SLURM: starts the command once for every task, with the variables that tasks of srun have.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
done
worst=0
for job in $(jobs -p); do wait "$job" || worst=$?; done
exit "$worst"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$*" >>"$REQUEUED"; fi
"""


def expanded(words: list[str], variables: dict[str, str]) -> list[str]:
    """Put variables in the place of $(NAME), as Kubernetes does."""
    return [re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], word) for word in words]


@pytest.fixture
def slurm(tmp_path):
    """Run the sbatch script as a job of two tasks; .requeued has what was asked of scontrol, .srun is its srun."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    class Slurm:
        requeued = tmp_path / "requeued"
        srun = programs / "srun"

        def run(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
            # The job's number gives the port: a free one is wanted.
            job_id = str(int(free_port()) % 10000)
            found = environment()
            found |= {"PATH": f"{programs}{os.pathsep}{found['PATH']}", "REQUEUED": str(self.requeued)}
            found |= {"SLURM_JOB_ID": job_id, "SLURM_JOB_NODELIST": "node-a", "SLURM_NTASKS": "2"}
            found |= {"SLURM_NTASKS_PER_NODE": "2"} | variables
            script = [str(LAUNCH / "slurm.sbatch"), *map(str, arguments)]
            return subprocess.run(script, cwd=ROOT, env=found, capture_output=True, text=True, timeout=280)

    return Slurm()


@pytest.mark.parametrize("script", ["rank.sh", "slurm.sbatch", "convert.sbatch"])
def test_scripts_parse(script):
    done = subprocess.run(["bash", "-n", LAUNCH / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.access(LAUNCH / script, os.X_OK)
    if shellcheck := shutil.which("shellcheck"):
        checked = subprocess.run([shellcheck, LAUNCH / script], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_sbatch_options():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert "--requeue" in options
    assert "--signal=USR1@600" in options  # without "B:", so that it reaches the processes of srun
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < first_command


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}, "5 16 1 4"),
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
                "SLURM_PROCID": "0",  # mpirun inside of a job
            },
            "3 4 1 2",
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}, "1 2 0 1"),
    ],
    ids=["srun", "open-mpi-in-slurm", "mpich"],
)
def test_ranks(variables, expected):
    show = "echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT"
    command = [LAUNCH / "rank.sh", "bash", "-c", show]
    done = subprocess.run(
        command, env={"PATH": os.environ["PATH"], "MASTER_ADDR": "10.0.0.1"} | variables, capture_output=True, text=True
    )
    assert done.stdout.strip() == f"{expected} 10.0.0.1:29400", done.stderr


def test_a_rank_without_a_launcher_is_refused():
    bare = {"PATH": os.environ["PATH"], "MASTER_ADDR": "10.0.0.1"}
    done = subprocess.run([LAUNCH / "rank.sh", "true"], env=bare, capture_output=True, text=True)
    assert done.returncode == 2
    assert "neither srun nor mpirun" in done.stderr


def test_pytorchjob():
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    assert spec.keys() <= SPEC
    assert spec["runPolicy"].keys() <= RUN_POLICY
    assert isinstance(spec["nprocPerNode"], str)
    assert set(spec["pytorchReplicaSpecs"]) == {"Master", "Worker"}
    assert spec["pytorchReplicaSpecs"]["Master"]["replicas"] == 1
    for replica in spec["pytorchReplicaSpecs"].values():
        assert replica.keys() <= REPLICA
        assert replica["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == spec["nprocPerNode"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        variables = {variable["name"]: variable["value"] for variable in container["env"]}
        _, _, config, _, *overrides = expanded(container["args"], variables)
        cfg = load_config(ROOT / config, overrides)
        assert cfg.run.resume == "auto"
        assert cfg.run.dir == variables["RUN"]
        assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]


@pytest.fixture
def pod(tmp_path):
    """Start a pod's command with a stand-in for torchrun, as the container's process."""
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    (tmp_path / "programs").mkdir()

    def start(torchrun: str) -> subprocess.Popen[str]:
        program = tmp_path / "programs" / "torchrun"
        program.write_text(f"#!/usr/bin/env bash\n{torchrun}\n")
        program.chmod(0o755)
        found = {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "RUN": str(tmp_path / "run")}
        command = expanded([*container["command"], *container["args"]], found)
        return subprocess.Popen(command, env=found, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    (tmp_path / "run").mkdir()
    return start


@pytest.mark.parametrize(
    ("torchrun", "code"),
    [
        ("exit 0", 0),
        ('touch "$RUN/preempted"', 75),
        ('touch "$RUN/preempted"; exit 3', 3),  # of an earlier start
    ],
    ids=["complete", "preempted", "failed"],
)
def test_a_pod_is_started_again_until_the_run_is_complete(pod, tmp_path, torchrun, code):
    process = pod(f'echo "$@"; {torchrun}')
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert out.startswith("fastssl/train.py --cfg ")
    assert f"run.dir={tmp_path / 'run'} " in out
    assert ("not complete" in err) == (code == 75)


def test_a_pod_passes_sigterm_on_and_waits(pod):
    process = pod("trap 'sleep 0.5; echo saved; exit 1' TERM; echo up; while :; do sleep 0.1; done")
    assert process.stdout.readline() == "up\n"
    process.terminate()
    out, _ = process.communicate(timeout=20)
    assert (out, process.returncode) == ("saved\n", 1)


@pytest.mark.dist
@pytest.mark.slow
def test_the_sbatch_script_trains(slurm, tiny_config):
    run = tiny_config.parent / "job"
    done = slurm.run(tiny_config, run, "train.num_epochs=1", "run.device=cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 2 x cpu" in done.stdout
    assert len([row for row in read_rows(run / "metrics.jsonl") if "kind" not in row]) == 10
    assert not slurm.requeued.exists()


@pytest.mark.parametrize(("code", "is_requeued"), [(0, True), (2, False)], ids=["preempted", "failed"])
def test_only_a_run_that_has_saved_is_started_again(slurm, tmp_path, code, is_requeued):
    run = tmp_path / "run"
    run.mkdir()
    (run / "preempted").write_text("")  # of this start, or, where the training failed, of an earlier one
    slurm.srun.write_text(f"#!/usr/bin/env bash\nexit {code}\n")
    done = slurm.run("tiny.yaml", run)
    assert done.returncode == code, done.stderr
    assert slurm.requeued.exists() == is_requeued
    if is_requeued:
        assert slurm.requeued.read_text().startswith("requeue ")


def test_a_run_that_is_complete_is_not_started_again(slurm, tmp_path):
    slurm.srun.write_text("#!/usr/bin/env bash\n")
    assert slurm.run("tiny.yaml", tmp_path).returncode == 0
    assert not slurm.requeued.exists()


def test_srun_is_told_of_the_cores(slurm, tmp_path):
    slurm.srun.write_text('#!/usr/bin/env bash\necho "$@"\n')
    options, _, command = slurm.run("tiny.yaml", tmp_path, SLURM_CPUS_PER_TASK="12").stdout.partition(
        " launch/rank.sh "
    )
    assert options.split() == ["--kill-on-bad-exit=1", "--cpus-per-task=12"]
    assert command.split()[:2] == ["python", "-u"]
    without = slurm.run("tiny.yaml", tmp_path, SLURM_CPUS_PER_TASK="").stdout
    assert without.startswith("--kill-on-bad-exit=1 launch/rank.sh ")


@pytest.mark.slow
def test_the_sbatch_script_passes_an_error_on(slurm, tmp_path):
    done = slurm.run("/no/such.yaml", tmp_path / "run")
    assert done.returncode == 2
    assert "/no/such.yaml" in done.stderr
    assert not slurm.requeued.exists()
    assert slurm.run("only-one").returncode == 2
