"""The files in deploy/: right for the program that reads each, as far as that can be told without it."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"

# What may stand where in the objects that are used (Kubernetes 1.31 or newer, Compose specification): a type, a dict
# of fields, or a list with one of them for all entries.
TEXT, NUMBER, ON = str, int, bool
SECURITY = {
    **{"runAsNonRoot": ON, "runAsUser": NUMBER, "fsGroup": NUMBER, "allowPrivilegeEscalation": ON},
    **{"readOnlyRootFilesystem": ON, "capabilities": {"drop": [TEXT], "add": [TEXT]}},
}
CONTAINER = {
    **{"name": TEXT, "image": TEXT, "command": [TEXT], "args": [TEXT], "securityContext": SECURITY},
    "env": [{"name": TEXT, "value": TEXT, "valueFrom": {"fieldRef": {"fieldPath": TEXT}}}],
    "resources": {"limits": dict, "requests": dict},
    "volumeMounts": [{"name": TEXT, "mountPath": TEXT, "readOnly": ON}],
}
POD = {
    **{"subdomain": TEXT, "restartPolicy": TEXT, "terminationGracePeriodSeconds": NUMBER},
    **{"securityContext": SECURITY, "initContainers": [CONTAINER], "containers": [CONTAINER]},
    "volumes": [
        {
            "name": TEXT,
            "persistentVolumeClaim": {"claimName": TEXT},
            "emptyDir": {"medium": TEXT, "sizeLimit": TEXT},
        }
    ],
}
RULE = {
    "action": TEXT,
    "onExitCodes": {"containerName": TEXT, "operator": TEXT, "values": [NUMBER]},
    "onPodConditions": [{"type": TEXT, "status": TEXT}],
}
OBJECT = {"apiVersion": TEXT, "kind": TEXT, "metadata": {"name": TEXT}}
KINDS = {
    "Service": {
        **OBJECT,
        "spec": {
            **{"clusterIP": TEXT, "publishNotReadyAddresses": ON, "selector": dict},
            "ports": [{"name": TEXT, "port": NUMBER}],
        },
    },
    "Job": {
        **OBJECT,
        "spec": {
            **{"completionMode": TEXT, "completions": NUMBER, "parallelism": NUMBER, "backoffLimit": NUMBER},
            **{"podFailurePolicy": {"rules": [RULE]}, "template": {"spec": POD}},
        },
    },
}
SERVICE = {
    **{"image": TEXT, "build": {"context": TEXT, "args": dict}, "command": [TEXT], "user": TEXT, "init": ON},
    **{"read_only": ON, "tmpfs": [TEXT], "shm_size": TEXT, "stop_grace_period": TEXT, "restart": TEXT},
    **{"security_opt": [TEXT], "cap_drop": [TEXT], "network_mode": TEXT, "environment": dict, "volumes": [TEXT]},
    "deploy": {
        "resources": {"reservations": {"devices": [{"driver": TEXT, "count": (TEXT, NUMBER), "capabilities": [TEXT]}]}}
    },
}


def mistakes(value, allowed, place=""):
    """What in a document is not allowed there."""
    if isinstance(allowed, dict):
        if not isinstance(value, dict):
            yield f"{place}: not a mapping"
            return
        yield from (f"{place}.{name}: no such field" for name in value if name not in allowed)
        for name in set(value) & set(allowed):
            yield from mistakes(value[name], allowed[name], f"{place}.{name}")
    elif isinstance(allowed, list):
        if not isinstance(value, list):
            yield f"{place}: not a list"
            return
        for number, entry in enumerate(value):
            yield from mistakes(entry, allowed[0], f"{place}[{number}]")
    elif not isinstance(value, allowed) or (isinstance(value, bool) and allowed is int):
        yield f"{place}: {value!r} is not a {allowed}"


def objects():
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def test_the_check_finds_mistakes():
    job = objects()["Job"]
    job["spec"]["backOffLimit"] = 3
    job["spec"]["completions"] = "2"
    job["spec"]["template"]["spec"]["containers"][0]["args"] = "finetune"
    assert len(list(mistakes(job, KINDS["Job"]))) == 3


def test_kubernetes_knows_every_field():
    for kind, one in objects().items():
        assert not list(mistakes(one, KINDS[kind], kind))


def test_the_parts_of_the_kubernetes_job_fit_together():
    job, service = objects()["Job"], objects()["Service"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,), (check,) = pod["containers"], pod["initContainers"]
    args = container["args"]
    assert spec["completionMode"] == "Indexed"
    assert f"--nnodes={spec['parallelism']}" in args
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in args
    assert f"--master-addr={job['metadata']['name']}-0.{pod['subdomain']}" in args
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert f"--master-port={service['spec']['ports'][0]['port']}" in args
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == check["name"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
    assert "--resume" in args
    assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_torchrun_and_odcft_take_the_arguments_of_the_kubernetes_job():
    from torch.distributed.run import get_args_parser
    from typer.main import get_command

    from odcft.cli import app

    (container,) = objects()["Job"]["spec"]["template"]["spec"]["containers"]
    taken = get_args_parser().parse_args([arg.replace("$(NODE_RANK)", "1") for arg in container["args"]])
    assert (taken.module, taken.training_script, taken.node_rank) == (True, "odcft", 1)
    commands = get_command(app).commands
    for command, *rest in (
        taken.training_script_args,
        objects()["Job"]["spec"]["template"]["spec"]["initContainers"][0]["args"],
        yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["odcft"]["command"],
    ):
        assert commands[command].make_context(command, list(rest)).params


def test_compose_knows_every_field():
    document = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert set(document) == {"services"}
    for name, service in document["services"].items():
        assert not list(mistakes(service, SERVICE, name))
        assert service["read_only"]
        assert "/tmp" in service["tmpfs"]


def test_bash_reads_the_scripts():
    for script in (DEPLOY / "slurm.sbatch", *(ROOT / "tools").glob("*.sh")):
        done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
        assert not done.stderr, done.stderr
    options = [line for line in (DEPLOY / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in options
    assert any(option.startswith("#SBATCH --signal=USR1@") for option in options)


SRUN = """#!/usr/bin/env bash
# Starts the tasks as Slurm does, one after another, and exits with the highest of their codes.
while [[ $1 == --* ]]; do shift; done
code=0
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" || { one=$?; ((one > code)) && code=$one; }
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1" = show ] && printf 'node7\\nnode8\\n' || echo "$@" >> "$CALLS"
"""
ODCFT = """#!/usr/bin/env bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR: $*" >> "$CALLS"
exit "$CODE"
"""


def run_job(tmp_path, code):
    """Run the batch script with stand-ins for Slurm's programs; return its exit code and what was called."""
    bin_folder, calls = tmp_path / "bin", tmp_path / "calls"
    bin_folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("odcft", ODCFT)):
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(stat.S_IRWXU)
    environment = {
        **{"PATH": f"{bin_folder}:{os.environ['PATH']}", "CALLS": str(calls), "CODE": str(code)},
        **{"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"},
        **{"CKPT": "my ckpt.pth", "IMAGES": "images", "OUT": "run", "OPTIONS": "--recipe small"},
    }
    script = shutil.copy(DEPLOY / "slurm.sbatch", tmp_path)
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert not done.stderr
    return done.returncode, calls.read_text().splitlines()


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
@pytest.mark.parametrize(("code", "requeued"), [(0, []), (75, ["requeue 41"]), (2, []), (1, [])])
def test_the_slurm_job_goes_back_into_the_queue_only_when_stopped(tmp_path, code, requeued):
    words = "finetune my ckpt.pth images --out run --resume --recipe small"
    expected = [f"0 0 2 node7: {words}", f"1 1 2 node7: {words}"]
    assert run_job(tmp_path, code) == (code, expected + requeued)
