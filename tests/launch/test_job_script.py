"""The batch script of every cluster example, to the letter; and that bash and shellcheck have no complaint.

After a wanted change: PHSA_WRITE_GOLDEN=1 python -m pytest tests/launch/test_job_script.py; read the diff.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import jinja2
import pytest

from phsa_launch import job_script
from phsa_launch.job_script import job_name, render
from phsa_megatron.config.compose import compose, options
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import Scheduler, TrainConfig
from phsa_megatron.config.validate import validate

GOLDEN = Path(__file__).parent / "golden"
WORKING_DIR = Path("/shared/me")
DEMO = ["recipe=phsa_demo_cpu", "optim.global_batch_sequences=64", "optim.micro_batch_sequences=1"]
# Everything that can be set, at once.
ALL_SET = [
    *("cluster=slurm_h100", "cluster.partition=h100", "cluster.account=me", "cluster.qos=long"),
    *("cluster.constraint='gpu&ib'", "cluster.python=/shared/venv/bin/python", "cluster.gpus_per_node=8"),
    *("cluster.requeue=false", "cluster.chain=4", "cluster.preflight=false", "cluster.stop_lead_s=900"),
    "cluster.time_limit=2-00:00:00",
    "cluster.setup_lines=['module load cuda', 'export CACHE=\"$HOME/cache of $USER\"']",
    r"cluster.environment.NOTE='it\'s #1'",
    *("cluster.sbatch.comment='two words'", "cluster.sbatch.mem=null", "cluster.sbatch.switches=1@00:10:00"),
]
EXAMPLES = [name for name in options()["cluster"] if name.startswith("slurm")]
CASES = {**{name: [f"cluster={name}"] for name in EXAMPLES}, "all_set": ALL_SET}

needs_shellcheck = pytest.mark.skipif(
    shutil.which("shellcheck") is None and "PHSA_REQUIRE_SLURM" not in os.environ,
    reason="shellcheck is not installed: bash .ci/slurm_leg installs it",
)


def config_of(*settings: str) -> TrainConfig:
    config = compose([*DEMO, *settings]).config
    validate(config)
    return config


def rendered(name: str) -> str:
    settings = CASES[name]
    if not any(setting.startswith("cluster.python") for setting in settings) and name != "slurm_h100_pyxis":
        settings = [*settings, "cluster.python=/shared/venv/bin/python"]  # not this machine's
    return render(config_of(*settings), WORKING_DIR)


def test_every_slurm_example_is_here():
    assert {"slurm_cpu", "slurm_h100", "slurm_h100_pyxis"} <= set(EXAMPLES)
    assert all(compose([*DEMO, f"cluster={n}"]).config.cluster.scheduler is Scheduler.slurm for n in EXAMPLES)
    assert {file.stem for file in GOLDEN.glob("*.sbatch")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_script_is_what_it_was(name):
    file = GOLDEN / f"{name}.sbatch"
    if "PHSA_WRITE_GOLDEN" in os.environ:
        file.write_text(rendered(name))
    assert rendered(name) == file.read_text(), "see the head of this file"


@pytest.mark.parametrize("name", CASES)
def test_bash_reads_it(name):
    done = subprocess.run(["bash", "-n"], input=rendered(name), text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


@needs_shellcheck
@pytest.mark.parametrize("name", CASES)
def test_shellcheck_has_no_complaint(name):
    done = subprocess.run(["shellcheck", "-"], input=rendered(name), text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


@needs_shellcheck
def test_shellcheck_would_complain():
    done = subprocess.run(["shellcheck", "-"], input="#!/bin/bash\nrm $1/*\n", text=True, capture_output=True)
    assert "SC2086" in done.stdout


def test_only_what_is_set_is_emitted():
    plain, container = rendered("slurm_h100"), rendered("slurm_h100_pyxis")
    for option in ("--partition", "--account", "--qos", "--constraint", "--container"):
        assert option not in plain
    assert "--container-image=/shared/images/phsa-megatron.sqsh" in container
    assert "--container-mounts=/shared:/shared" in container
    # The options of sbatch are for the batch shell, which stays outside the container.
    assert not any("container" in line for line in container.splitlines() if line.startswith("#SBATCH"))
    assert "#SBATCH --exclusive\n" in plain
    assert "#SBATCH --mem=0\n" in plain
    everything = rendered("all_set")
    assert "--mem" not in everything
    assert '#SBATCH --comment="two words"' in everything
    assert "preflight" not in everything
    assert 'exec "$PYTHON" -m phsa_megatron.preflight "$RUN/config.yaml"' in plain
    assert "#SBATCH --no-requeue" in everything
    assert "MAY_REQUEUE=0" in everything


def test_a_value_reaches_the_process_as_it_was_set():
    script = rendered("all_set")
    (line,) = (text.strip() for text in script.splitlines() if "export NOTE=" in text)
    done = subprocess.run(["bash", "-c", f'{line}; printf %s "$NOTE"'], text=True, capture_output=True)
    assert done.stdout == "it's #1"


def test_a_field_without_a_value_is_an_error(monkeypatch):
    monkeypatch.setattr(job_script, "TEMPLATE", "../../../tests/launch/bad_template.j2")
    with pytest.raises(jinja2.UndefinedError, match="no_such_field"):
        render(config_of("cluster=slurm_cpu"), WORKING_DIR)


def ports_chosen(job_id: int) -> tuple[int, str]:
    """The first port that the rendered script takes for a job on this host, and what it says."""
    script = rendered("slurm_cpu")
    functions = script[script.index("port_is_in_use() {") : script.index("run_job() {")]
    prelude = f'SLURM_JOB_ID={job_id} PHSA_MASTER_ADDR=127.0.0.1; say() {{ echo "$*"; }}; {functions}'
    run = f'{prelude}\nchoose_ports; echo "$PHSA_TRAIN_PORT"'
    out = subprocess.check_output(["bash", "-c", run], text=True)
    *said, port = out.splitlines()
    return int(port), "\n".join(said)


@pytest.mark.parametrize("job_id", [1, 5999, 6000, 123456789])
def test_ports_stay_below_the_systems_own(job_id):
    assert ports_chosen(job_id)[0] in range(1024, 32767)


@pytest.mark.parametrize("held", [0, 1])
def test_a_port_in_use_is_named_and_passed_over(held):
    job_id = next(n for n in range(3000, 4000) if not ports_chosen(n)[1])
    port, _ = ports_chosen(job_id)
    with socket.create_server(("127.0.0.1", port + held)):
        other, said = ports_chosen(job_id)
    assert other > port
    assert f"port {port} or the one after it is in use on 127.0.0.1" in said


def test_two_runs_of_one_name_in_two_places_are_two_jobs():
    names = {job_name(RunFolder(path)) for path in ("/a/mine", "/b/mine")}
    assert len(names) == 2
    assert all(name.startswith("mine-") for name in names)


@pytest.mark.parametrize("root", ["/a b", "/a%j", "/a'b"])
def test_a_path_that_slurm_would_misread_is_refused(root):
    config = config_of("cluster=slurm_cpu")
    config.run.root_dir = root
    with pytest.raises(ConfigError, match=r"run\.root_dir"):
        render(config, WORKING_DIR)
