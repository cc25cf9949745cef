import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement as Declared
from rich.console import Console

from phsa_megatron import doctor
from phsa_megatron.doctor import Check, Requirement, Status
from phsa_megatron.doctor_probe import probe

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def fake_packages(tmp_path, monkeypatch):
    """Returns `add(name, {file: source})`, which puts a package on the path of this process and of probes."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(name, files):
        for file, source in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)

    return add


def test_requirements_equal_those_that_pyproject_declares():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["train"]
    declared = {line.name: line.specifier for line in map(Declared, lines)}
    known = {name: Declared(name + known.specifier).specifier for name, known in doctor.REQUIREMENTS.items()}
    assert known == declared


def test_extras_in_the_advice_exist():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    advised = re.findall(
        r"phsa-megatron\[(\w+)\]", " ".join([doctor.TRAIN_EXTRA, doctor.GPU_EXTRA, doctor.TE_EXTRA])
    )
    assert advised == ["train", "gpu", "te"] and set(advised) <= set(extras)


def test_a_missing_distribution_tells_purpose_and_fix():
    check = doctor.check_distribution("phsa-no-such-package", Requirement(">=1", "tests", doctor.TRAIN_EXTRA))
    assert (check.status, check.fix, check.required) == (Status.absent, doctor.TRAIN_EXTRA, True)


@pytest.mark.parametrize(("specifier", "status"), [(">=1", Status.ok), (">=99", Status.wrong)])
def test_a_version_that_does_not_fit_is_wrong(specifier, status):
    check = doctor.check_distribution("pytest", Requirement(specifier, "tests", "pip install pytest"))
    assert check.status == status
    assert (f"but {specifier} is needed" in check.found) == (status == Status.wrong)


def test_the_wrong_apex_is_recognized_and_named(fake_packages):
    fake_packages("apex", {"__init__.py": "name = 'a web framework'\n"})
    check = doctor.check_apex()
    assert check.status == Status.wrong and not check.required
    assert "the wrong apex: no apex.optimizers.FusedAdam" in check.found and "pip uninstall apex" in check.fix


def test_the_right_apex_is_recognized(fake_packages):
    fake_packages("apex", {"__init__.py": "", "optimizers.py": "class FusedAdam: ...\n"})
    assert doctor.check_apex().status == Status.ok


def test_a_half_working_transformer_engine_stops_every_run(fake_packages):
    source = "raise RuntimeError('curand shared object not found.')\n"
    fake_packages("transformer_engine", {"__init__.py": source})
    check = doctor.check_transformer_engine()
    assert check.status == Status.wrong and check.required
    assert "half-working: RuntimeError: curand shared object not found." in check.found
    assert "pip uninstall transformer-engine" in check.fix


def test_a_transformer_engine_without_its_torch_part_is_only_unused(fake_packages):
    fake_packages("transformer_engine", {"__init__.py": ""})
    check = doctor.check_transformer_engine()
    assert check.status == Status.wrong and not check.required and "installed in part" in check.found


def test_a_whole_transformer_engine_is_ok(fake_packages):
    fake_packages("transformer_engine", {"__init__.py": "__version__ = '2.1'", "pytorch/__init__.py": ""})
    assert doctor.check_transformer_engine() == Check(
        "transformer-engine", Status.ok, "2.1", doctor.check_transformer_engine().purpose
    )


def test_a_library_that_kills_the_process_is_a_line_and_not_the_end(fake_packages):
    crash = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    fake_packages("transformer_engine", {"__init__.py": crash})
    check = doctor.check_transformer_engine()
    assert check.status == Status.wrong and "died with code -11" in check.found and check.required


def test_absent_optional_parts_say_what_for_and_how(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    for check in (doctor.check_apex(), doctor.check_transformer_engine(), doctor.check_triton()):
        assert check.status == Status.absent and check.purpose and check.fix and not check.required


@pytest.mark.parametrize(("version", "status"), [("3.4.0", Status.ok), ("2.1.0", Status.wrong)])
def test_triton_is_checked_by_version(fake_packages, version, status):
    fake_packages("triton", {"__init__.py": f"__version__ = '{version}'\n"})
    assert doctor.check_triton().status == status


def test_a_probe_returns_values_errors_and_last_words():
    assert probe("print('noise')\nreturn {'a': 1}").values == {"a": 1}
    failed = probe("raise OSError('libcudnn.so not found')")
    assert (failed.values, failed.error_type, failed.error) == (None, "OSError", "libcudnn.so not found")
    gone = probe("import os, sys\nsys.stderr.write('out of memory')\nsys.stderr.flush()\nos._exit(9)")
    assert gone.error == "the process died with code 9: out of memory"


def test_a_broken_transformer_engine_breaks_the_import_of_megatron(fake_packages):
    fake_packages(
        "transformer_engine", {"__init__.py": "raise RuntimeError('cudnn shared object not found.')\n"}
    )
    check = doctor.check_megatron()
    assert check.status == Status.wrong and check.required and "cudnn shared object" in check.found


@pytest.mark.parametrize(
    ("values", "statuses", "says"),
    [
        ({"cuda": None, "devices": [], "nccl": None, "driver": "none (NVML not found)", "boards": 0},
         ["absent", "absent"], "none; driver none"),
        ({"cuda": "13.0", "devices": ["H100, 78 GiB"] * 2, "nccl": "2.28.3", "driver": "580.1", "boards": 2},
         ["ok", "ok"], "2: H100, 78 GiB; driver 580.1; torch built for CUDA 13.0"),
        ({"cuda": None, "devices": [], "nccl": None, "driver": "580.1", "boards": 8},
         ["wrong", "absent"], "8 with driver 580.1, but torch sees none; torch built for the CPU only"),
    ],
)  # fmt: skip
def test_gpus_that_torch_cannot_use_are_told_from_none(monkeypatch, values, statuses, says):
    monkeypatch.setattr(doctor, "probe", lambda body: doctor_probe_result(values))
    checks = doctor.check_gpus()
    assert [check.status for check in checks] == statuses and says in checks[0].found


def doctor_probe_result(values):
    from phsa_megatron.doctor_probe import Probe

    return Probe(values)


def test_the_answer_on_this_machine(capsys):
    assert doctor.main(["--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in answer["checks"]}
    assert answer["cpu_run_works"] is True
    assert re.fullmatch(
        r"loss \d\.\d+ nats, gradient norm [\d.]+, [\d.]+ s", checks["tiny step on cpu"]["found"]
    )
    assert {
        "python",
        "memory",
        "disk",
        "gpus",
        "nccl",
        "apex",
        "transformer-engine",
        "triton",
    } <= checks.keys()
    assert checks["torch"]["found"] == __import__("torch").__version__


def test_something_required_that_is_wrong_gives_exit_code_1_and_is_named(monkeypatch, capsys):
    checks = [
        Check("psutil", Status.absent, "not installed", "saving", doctor.TRAIN_EXTRA, required=True),
        Check("triton", Status.absent, "not installed", "kernels", doctor.GPU_EXTRA),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    assert doctor.main([]) == 1
    shown = capsys.readouterr().out
    assert "A run on the CPU would not work: psutil." in shown


def test_the_table_shows_purpose_and_fix_of_what_is_missing(capsys):
    check = Check("triton", Status.absent, "not installed", "the fast kernels", doctor.GPU_EXTRA)
    doctor.render([check], Console(width=160, file=sys.stdout))
    shown = capsys.readouterr().out
    assert "the fast kernels" in shown and "→ pip install 'phsa-megatron[gpu]'" in shown
    assert "A run on the CPU works." in shown
