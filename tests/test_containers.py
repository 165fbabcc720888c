"""What launch/containers says fits together, and fits the repository. No image is built here."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedhpc
from fedhpc.config import resolve
from tests.ranks import REPOSITORY

FOLDER = REPOSITORY / "launch/containers"


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())}


def test_both_images_are_made_alike() -> None:
    """Of the same base, the same files, which are there and all that is needed, the same step, the same variables."""
    docker = (FOLDER / "Dockerfile").read_text()
    apptainer = (FOLDER / "fedhpc.def").read_text()
    base = re.findall(r"^FROM (\S+)$", docker, re.MULTILINE)
    assert base == re.findall(r"^From: (\S+)$", apptainer, re.MULTILINE) == ["python:3.11-slim"]
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", docker, re.MULTILINE) for word in line.split()]
    files = re.findall(r"^    (\S+) /opt/fedhpc/\1$", apptainer, re.MULTILINE)
    assert sorted(copied) == sorted(files) and all((REPOSITORY / name).exists() for name in copied)
    let_in = re.findall(r"^!(\S+)$", (FOLDER / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert sorted(copied) == sorted(let_in)
    step = r'PIP_NO_CACHE_DIR=1 FEDHPC_TORCH_INDEX="[^"]+" bash launch/install.sh "[^"]+"$'
    for text in (docker, apptainer):
        assert len(re.findall(step, text, re.MULTILINE)) == 1
        assert "PATH=/opt/fedhpc/.venv/bin:$PATH" in text and "OMP_NUM_THREADS=1" in text


def test_the_pods_fit_together(objects: dict[str, Any]) -> None:
    job, service = objects["Job"]["spec"], objects["Service"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    env = {one["name"]: one["value"] for one in container["env"]}
    assert all(isinstance(value, str) for value in env.values())  # Kubernetes refuses numbers
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"] == int(env["NODES"])
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] > 0
    name = objects["Job"]["metadata"]["name"]
    assert env["HEAD"] == f"{name}-0.{service['metadata']['name']}" and pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"] == {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": name}}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == env["RANKS"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes.pop(mount["name"]) for mount in container["volumeMounts"]}
    assert volumes == {} and mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert "persistentVolumeClaim" in mounts[container["workingDir"]]
    assert container["image"].split(":") == ["fedhpc", fedhpc.__version__]
    configuration = objects["ConfigMap"]
    assert mounts["/etc/fedhpc"]["configMap"]["name"] == configuration["metadata"]["name"]
    ((file, text),) = configuration["data"].items()
    assert container["command"][-1] == f"/etc/fedhpc/{file}"
    assert resolve(yaml.safe_load(text)).federation.cohort_size >= 2 * int(env["RANKS"]) - 1 > 0


def test_the_command_of_a_pod(objects: dict[str, Any], tmp_path: Path) -> None:
    """With a stand-in for torchrun: so many ranks, which meet at the first pod."""
    (container,) = objects["Job"]["spec"]["template"]["spec"]["containers"]
    command = [word.replace("/opt/fedhpc", str(tmp_path)) for word in container["command"]]
    (tmp_path / "launch").symlink_to(REPOSITORY / "launch")
    stand_in = tmp_path / ".venv/bin/torchrun"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    env = {one["name"]: one["value"] for one in container["env"]}
    ran = subprocess.run(command, env={"PATH": os.environ["PATH"], **env}, capture_output=True, text=True, check=True)
    words = ran.stdout.split()
    assert {"--nnodes=2", "--nproc_per_node=4", "--rdzv_endpoint=fedhpc-0.fedhpc:29400"} <= set(words)
    assert words[-3:] == ["-m", "fedhpc.main", "/etc/fedhpc/run.yaml"]
