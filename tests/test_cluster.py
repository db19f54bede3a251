"""cluster.yaml and rayjob.yaml, as far as they can be checked without a cloud; and that every check can fail."""

import copy
import json
import os
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import ray
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
MEMORY = re.compile(r"\d+(Mi|Gi)")
Document = dict[str, Any]


@pytest.fixture
def cluster() -> Document:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def job() -> Document:
    return yaml.safe_load((ROOT / "rayjob.yaml").read_text())


@pytest.fixture(scope="module")
def ec2() -> Any:
    """The shapes of EC2's requests, as botocore ships them."""
    return botocore.session.Session().get_service_model("ec2")


def check_launcher(cluster: Document) -> None:
    """Ray's schema, and what its launcher checks before it starts anything."""
    schema = Path(ray.__file__).parent / "autoscaler/ray-schema.json"
    jsonschema.validate(cluster, json.loads(schema.read_text()))
    validate_config(prepare_config(copy.deepcopy(cluster)))


def check_nodes(cluster: Document, ec2: Any) -> None:
    """Every node is a request that EC2 would understand, and counts are in order."""
    request = ec2.operation_model("RunInstances").input_shape
    sizes = set(ec2.shape_for("InstanceType").enum)
    for name, node in cluster["available_node_types"].items():
        wanted = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(wanted, request)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        assert wanted["InstanceType"] in sizes, f"{name}: unknown instance type {wanted['InstanceType']}"
        assert 0 <= node["min_workers"] <= node["max_workers"] <= cluster["max_workers"], f"{name}: min or max"


def check_policy(cluster: Document) -> None:
    """What rented GPUs call for: a head without work, two kinds of spot nodes, a way out, from zero, with a token."""
    nodes = dict(cluster["available_node_types"])
    head = nodes.pop(cluster["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    spot = {n["node_config"]["InstanceType"] for n in nodes.values() if "InstanceMarketOptions" in n["node_config"]}
    rest = [n for n in nodes.values() if "InstanceMarketOptions" not in n["node_config"]]
    assert len(spot) >= 2
    assert rest
    assert min(n["priority"] for n in nodes.values()) == max(n["priority"] for n in rest), "on demand comes last"
    assert all(node["min_workers"] == 0 and node["resources"]["GPU"] >= 1 for node in nodes.values())
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert any("--num-cpus=0" in line for line in starts)


def check_versions(cluster: Document) -> None:
    """One version of Ray everywhere: this one."""
    text = json.dumps([cluster["docker"], cluster["setup_commands"]])
    assert set(re.findall(r"(?:ray:|==)(\d+\.\d+\.\d+)", text)) == {version("ray")}


def check_kuberay(job: Document) -> None:
    """The shape of ray.io/v1 RayJob, in the fields that are used here."""
    jsonschema.validate(job, json.loads((ROOT / "tests/resources/rayjob.schema.json").read_text()))
    spec = job["spec"]["rayClusterSpec"]
    assert spec["rayVersion"] == version("ray")
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], group["groupName"]
        assert any(
            container["resources"]["limits"].get("nvidia.com/gpu") == 1
            for container in group["template"]["spec"]["containers"]
        )
    for template in [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]:
        volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
        for container in template["spec"]["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
            assert version("ray") in container["image"]
            assert MEMORY.fullmatch(container["resources"]["limits"]["memory"])


def check(document: Document, ec2: Any) -> None:
    if document.get("kind") == "RayJob":
        check_kuberay(document)
        return
    check_launcher(document)
    check_nodes(document, ec2)
    check_policy(document)
    check_versions(document)


def test_the_cluster_is_what_ray_and_aws_accept(cluster: Document, ec2: Any) -> None:
    check(cluster, ec2)


def test_the_job_is_what_kuberay_accepts(job: Document, ec2: Any) -> None:
    check(job, ec2)


def _node(cluster: Document) -> Document:
    return cluster["available_node_types"]["gpu.g5.spot"]


CLUSTER_MISTAKES: dict[str, Callable[[Document], Any]] = {
    "a top-level key of old": lambda c: c.update(min_workers=1),
    "a typo in a node type": lambda c: _node(c).update(max_worker=3),
    "a fractional GPU": lambda c: _node(c)["resources"].update(GPU=0.5),
    "a label that is no text": lambda c: _node(c).update(labels={"a": 1}),
    "no such head": lambda c: c.update(head_node_type="nope"),
    "more nodes at least than at most": lambda c: _node(c).update(min_workers=9),
    "a typo in what EC2 is asked for": lambda c: _node(c)["node_config"].update(InstanceTyp="g5.2xlarge"),
    "an instance that there is not": lambda c: _node(c)["node_config"].update(InstanceType="g5.3xlarge"),
    "a head that works": lambda c: c["available_node_types"]["head.cpu"]["resources"].update(CPU=8),
    "no token": lambda c: c.update(worker_start_ray_commands=["ray start --address=$RAY_HEAD_IP:6379"]),
    "another Ray": lambda c: c["docker"].update(worker_image="rayproject/ray:2.59.0-py311-gpu"),
    "one kind of spot nodes": lambda c: c["available_node_types"].pop("gpu.g5.spot"),
}
JOB_MISTAKES: dict[str, Callable[[Document], Any]] = {
    "a typo": lambda j: j["spec"].update(entrypont="x"),
    "another mode": lambda j: j["spec"].update(submissionMode="Job"),
    "a number in the start parameters": lambda j: _head(j).update(rayStartParams={"num-cpus": 0}),
    "replicas out of order": lambda j: _group(j).update(minReplicas=13),
    "no GPU": lambda j: _group(j)["template"]["spec"]["containers"][0]["resources"]["limits"].pop("nvidia.com/gpu"),
    "a mount without a volume": lambda j: _group(j)["template"]["spec"].update(volumes=[]),
    "another Ray": lambda j: j["spec"]["rayClusterSpec"].update(rayVersion="2.59.0"),
}


def _head(job: Document) -> Document:
    return job["spec"]["rayClusterSpec"]["headGroupSpec"]


def _group(job: Document) -> Document:
    return job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]


@pytest.mark.parametrize("mistake", [*CLUSTER_MISTAKES, *(f"job: {name}" for name in JOB_MISTAKES)])
def test_every_mistake_is_caught(cluster: Document, job: Document, ec2: Any, mistake: str) -> None:
    of_job = mistake.startswith("job: ")
    # YAML's aliases are one object in memory; a mistake is to hit one place.
    document = json.loads(json.dumps(job if of_job else cluster))
    make = JOB_MISTAKES[mistake.removeprefix("job: ")] if of_job else CLUSTER_MISTAKES[mistake]
    make(document)
    with pytest.raises((AssertionError, jsonschema.ValidationError, ValueError, RuntimeError)):
        check(document, ec2)


def test_every_job_file_is_named_by_its_step() -> None:
    assert os.access(ROOT / "jobs/pipeline.py", os.R_OK)
    assert "jobs/pipeline.py" in (ROOT / "README.md").read_text()
