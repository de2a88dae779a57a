"""Conversion as an array of tasks: the scripts are run here, without a scheduler, one task after the other."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastssl import cli
from pipelines.beton import BetonReader
from pipelines.convert import convert
from tests.helpers.image_folders import write_image_folder
from tests.helpers.processes import ROOT, environment

SCRIPT = ROOT / "launch/convert.sbatch"
# Kubernetes 1.29, batch/v1: JobSpec, and of its pod failure policy.
JOB = {
    *("activeDeadlineSeconds", "backoffLimit", "backoffLimitPerIndex", "completionMode", "completions"),
    *("manualSelector", "maxFailedIndexes", "parallelism", "podFailurePolicy", "podReplacementPolicy", "selector"),
    *("suspend", "template", "ttlSecondsAfterFinished"),
}
RULE = {"action", "onExitCodes", "onPodConditions"}
# Stands in for the `fastssl` command of the environment: what it was told, each argument on a line.
ECHO = '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n'


def run_task(*arguments: object, task: int | None, **variables: str) -> subprocess.CompletedProcess[str]:
    found = environment() | {"PYTHONPATH": str(ROOT)} | variables
    found.pop("SLURM_ARRAY_TASK_ID", None)
    if task is not None:
        found["SLURM_ARRAY_TASK_ID"] = str(task)
    command = [str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=found, capture_output=True, text=True, timeout=120)


def stored(*paths: Path) -> list[bytes]:
    readers = [BetonReader(path) for path in paths]
    return [reader.image_bytes(k).tobytes() for reader in readers for k in range(reader.num_samples)]


def test_tasks_of_an_array_write_the_shards_and_failed_ones_are_run_again_alone(tmp_path):
    images = write_image_folder(tmp_path / "images", 24)
    out = tmp_path / "new folder" / "x.beton"
    arguments = ("--shards", 3, "--shuffle", 5, "--on-error", "skip", images, out)
    parts = [out.with_name(f"x-{k:05d}-of-00003.beton") for k in range(3)]
    assert run_task(*arguments, task=2).returncode == 0
    # A task that cannot write its file fails, and no other.
    parts[1].with_name(f"{parts[1].name}.partial").mkdir()
    failed = run_task(*arguments, task=1)
    assert failed.returncode == 2
    assert len(failed.stderr.splitlines()) == 1
    assert run_task(*arguments, task=0).returncode == 0
    assert [part.exists() for part in parts] == [True, False, True]
    dates = [parts[k].stat().st_mtime_ns for k in (0, 2)]
    parts[1].with_name(f"{parts[1].name}.partial").rmdir()
    assert run_task(*arguments, task=1).returncode == 0
    again = run_task(*arguments, task=2)
    assert (again.returncode, "finished already" in again.stdout) == (0, True)
    assert [parts[k].stat().st_mtime_ns for k in (0, 2)] == dates
    whole = convert("folder", str(images), tmp_path / "whole.beton", shuffle=5, on_error="skip")
    assert stored(*parts) == stored(whole.out)


@pytest.mark.parametrize(
    ("arguments", "task", "reason"),
    [
        (("--shards", 3, "src", "x.beton"), None, "without --array there is no number of a shard"),
        (("src", "x.beton"), 0, "--shards is the number of all shards"),
        ((), 0, "--shards is the number of all shards"),
    ],
)
def test_a_job_without_numbers_is_refused(arguments, task, reason):
    done = run_task(*arguments, task=task)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch --array=")
    assert reason in done.stderr


def test_a_task_beyond_the_shards_is_one_line(tmp_path):
    images = write_image_folder(tmp_path / "images", 4)
    done = run_task("--shards=3", images, tmp_path / "x.beton", task=3)
    assert done.returncode == 2
    assert done.stderr == "fastssl: error: shard must be 0..2, not 3\n"


def test_options_are_before_the_first_command():
    lines = SCRIPT.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < first_command
    assert "#SBATCH --requeue" in lines
    assert [line for line in lines if "fastssl manifest" in line] == [lines[-1]]
    assert lines[-1].startswith("#")


def test_indexed_job(tmp_path, monkeypatch):
    text = (ROOT / "launch/convert_job.yaml").read_text()
    assert text.splitlines()[-1].startswith("#   fastssl manifest ")
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    assert spec.keys() <= JOB
    assert spec["completionMode"] == "Indexed"
    assert spec["maxFailedIndexes"] <= spec["completions"]
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule.keys() <= RULE
        assert rule["action"] in ("FailIndex", "Ignore")
        assert len(rule) == 2
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # what a pod failure policy asks for
    (container,) = pod["containers"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    program = tmp_path / "fastssl"
    program.write_text(ECHO)
    program.chmod(0o755)
    done = subprocess.run(
        [*container["command"], *container["args"]],
        env={"PATH": f"{tmp_path}:{environment()['PATH']}", "JOB_COMPLETION_INDEX": "7"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    told = done.stdout.splitlines()
    assert told[0] == "convert"
    parsed = []
    monkeypatch.setattr("fastssl.commands.convert._convert", parsed.append)
    assert cli.main(told) == 0
    (args,) = parsed
    assert (args.shards, args.shard, args.resume) == (spec["completions"], 7, True)
    assert str(args.workers) == container["resources"]["limits"]["cpu"]
    mounted = tuple(mount["mountPath"] for mount in container["volumeMounts"])
    assert all(str(path).startswith(mounted) for path in (*args.src, args.out))


def test_the_environment_of_the_tests_is_used():
    """Else the tasks above would run another installation."""
    code = "import fastssl; print(fastssl.__file__)"
    found = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env=found, capture_output=True, text=True)
    assert Path(done.stdout.strip()).is_relative_to(ROOT)
