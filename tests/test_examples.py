"""The example files for SkyPilot and Kubernetes, by the rules of their documentation; no cluster is asked.

SkyPilot's YAML specification and KubeRay's reference of RayJob name the fields. Their commands are parsed by blipfit.
"""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from typer.main import get_command

from blipfit import cli_sweep
from blipfit.cli import app

EXAMPLES = Path(__file__).parents[1] / "examples"
TASK_FIELDS = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run", "config"}
RESOURCE_FIELDS = {"infra", "accelerators", "cpus", "memory", "instance_type", "use_spot", "disk_size", "disk_tier"}
RESOURCE_FIELDS |= {"image_id", "ports", "labels", "autostop", "any_of", "ordered", "job_recovery", "network_tier"}
JOB_FIELDS = {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
JOB_FIELDS |= {"activeDeadlineSeconds", "runtimeEnvYAML", "submissionMode", "suspend", "submitterPodTemplate"}
GROUP_FIELDS = {"rayStartParams", "template", "groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts"}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))


def sweep_arguments(text: str) -> list[str]:
    """The arguments of the command `blipfit sweep` in a script."""
    commands = [shlex.split(line, comments=True) for line in text.splitlines()]
    (command,) = [words for words in commands if words[:2] == ["blipfit", "sweep"]]
    return command[1:]


@pytest.mark.parametrize("name", ["skypilot.yaml", "rayjob.yaml"])
def test_the_command_is_one_of_blipfit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = load(name)["run"] if name == "skypilot.yaml" else load(name)["spec"]["entrypoint"]
    started: list[Any] = []
    monkeypatch.setattr(cli_sweep, "_start_ray", lambda *arguments: started.append(arguments))
    ended = CliRunner().invoke(get_command(app), sweep_arguments(text))
    assert ended.exit_code == 0, (ended.output, ended.exception)
    (recipes, folders, *_), _, _ = started[0]
    assert len(recipes) == 64
    assert folders == {"scienceqa": Path("/blipfit/data/scienceqa")}


def test_the_skypilot_task() -> None:
    task = load("skypilot.yaml")
    assert set(task) <= TASK_FIELDS
    assert set(task["resources"]) <= RESOURCE_FIELDS
    assert all(set(choice) <= RESOURCE_FIELDS for choice in task["resources"]["any_of"])
    kind, _, count = task["resources"]["accelerators"].partition(":")
    assert kind
    assert int(count) > 0
    for mount in task["file_mounts"].values():
        assert set(mount) <= {"name", "source", "store", "mode", "persistent"}
        assert mount["mode"] in ("MOUNT", "COPY", "MOUNT_CACHED")


def test_the_ray_job() -> None:
    job = load("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job["spec"]) <= JOB_FIELDS
    cluster = job["spec"]["rayClusterSpec"]
    assert {"rayVersion", "headGroupSpec", "workerGroupSpecs"} == set(cluster)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert set(group) <= GROUP_FIELDS
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["requests"] == container["resources"]["limits"]
    # Ray finds a worker's GPU in its pod; each unit takes one.
    workers = cluster["workerGroupSpecs"][0]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_versions_of_ray_are_the_tested_ones() -> None:
    constraints = (EXAMPLES.parent / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ray=={load('rayjob.yaml')['spec']['rayClusterSpec']['rayVersion']}" in constraints
