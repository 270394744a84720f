"""The files of "Where trials run" that start a cluster, tried as far as one machine without a scheduler can."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import pytest
import yaml
from quick import QUICK

from mpsearch.record import RunFolder

FILES = Path(__file__).parents[2] / "examples" / "cluster"


def test_ray_launcher_takes_the_cluster_of_machines() -> None:
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load((FILES / "ray-cluster.yaml").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster | {"worker_start_ray_commands": 1}, schema)
    assert cluster["max_workers"] == len(cluster["provider"]["worker_ips"])


def test_job_of_kubernetes_runs_a_command_of_ours_and_mounts_the_data_everywhere_and_the_runs_on_its_head() -> None:
    job = yaml.safe_load((FILES / "kuberay.yaml").read_text())["spec"]
    command = shlex.split(job["entrypoint"])
    done = subprocess.run(
        [sys.executable, "-m", "mpsearch", *command[1:2], "--help"], capture_output=True, text=True, check=True
    )
    assert command[0] == "mpsearch"
    assert all(option in done.stdout for option in command if option.startswith("--"))
    head, *workers = [job["rayClusterSpec"]["headGroupSpec"], *job["rayClusterSpec"]["workerGroupSpecs"]]
    for group in (head, *workers):
        pod = group["template"]["spec"]
        mounts = {m["name"]: m["mountPath"] for container in pod["containers"] for m in container["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]} == {"data", *(["runs"] * (group is head))}
        if group is head:
            study, out = command[2], command[command.index("--out") + 1]
            assert Path(study).parent == Path(out).parent == Path(mounts["runs"])


def test_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n", FILES / "slurm.sh"], check=True)


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
[[ " $* " == *" --head "* ]] && exec "$@" --temp-dir="$TEMPORARY"
exec "$@"
"""


@pytest.mark.ray
@pytest.mark.slow
def test_slurm_script_runs_a_study_and_goes_on_with_it(tmp_path: Path) -> None:
    """On two nodes, which stand-ins for Slurm's commands start on this machine."""
    programs = tmp_path / "bin"
    programs.mkdir()
    tools = {"srun": SRUN, "scontrol": "#!/bin/bash\nprintf '127.0.0.1\\nlocalhost\\n'\n"}
    tools["mpsearch"] = f'#!/bin/bash\nexec {sys.executable} -m mpsearch "$@"\n'
    for name, text in tools.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    cold = ("warm_start.method=none", "warm_start.ilp=false", "warm_start.combinations=0", "search.trials=3")
    study = tmp_path / "study.yaml"
    made = "import sys; from mpsearch.study import load_study; print(load_study('digits', sys.argv[1:]).to_yaml())"
    study.write_text(
        subprocess.run([sys.executable, "-c", made, *QUICK, *cold], capture_output=True, text=True, check=True).stdout
    )
    environment = os.environ | {
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SLURM_JOB_NODELIST": "two",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "RAY_PORT": str(port),
        "TEMPORARY": f"/tmp/mps-slurm-{port}",
    }
    for _ in range(2):
        done = subprocess.run(
            ["bash", FILES / "slurm.sh", study, "run"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=(tmp_path / "errors").open("w"),
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, (tmp_path / "errors").read_text()
    assert [record.state for record in RunFolder.open(tmp_path / "run").records()] == ["complete"] * 3
    shutil.rmtree(environment["TEMPORARY"], ignore_errors=True)
