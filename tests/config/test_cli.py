import subprocess
import sys
import types
from pathlib import Path

import pytest

from phsa_megatron import cli
from phsa_megatron.config.compose import dump

ROOT = Path(__file__).resolve().parents[2]
# Numbers that the tests below name, whatever the demo is tuned to.
DEMO = [
    "recipe=phsa_demo_cpu",
    "run.train_steps=400",
    "data.seq_len_tokens=512",
    "optim.global_batch_sequences=8",
    "optim.micro_batch_sequences=4",
    "optim.warmup_steps=40",
    "optim.decay_steps=100",
]


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def trained(monkeypatch):
    """Stands in for `phsa_megatron.train`: records what it was called with and the environment it saw."""
    calls = []
    module = types.ModuleType("phsa_megatron.train")

    def main(config_path: str) -> int:
        import os

        calls.append((config_path, os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS")))
        return 7

    module.main = main
    monkeypatch.setitem(sys.modules, "phsa_megatron.train", module)
    # Set first, so that monkeypatch restores what the command changes.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return calls


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def demo_in(folder: Path) -> list[str]:
    return [*DEMO, f"run.root_dir={folder}"]


def test_training_prepares_the_folder_hides_gpus_and_returns_the_exit_code(capsys, trained, tmp_path):
    code, out, _ = run(capsys, *demo_in(tmp_path), "run.num_threads=3")
    path = tmp_path / "phsa_demo_cpu" / "config.yaml"
    assert code == 7
    assert trained == [(str(path), "", "3")]
    assert "starting from scratch" in out
    assert path.is_file()


def test_a_resolved_file_is_trained_as_it_is(capsys, trained, tmp_path, demo):
    path = tmp_path / "config.yaml"
    path.write_text(dump(demo))
    assert run(capsys, "--config", str(path))[0] == 7
    assert trained == [(str(path), "", "2")]


def test_a_resolved_file_takes_no_overrides(capsys, trained, tmp_path):
    code, _, err = run(capsys, "--config", str(tmp_path / "c.yaml"), "optim.lr=1")
    assert code == 2
    assert "takes no other argument" in err
    assert trained == []


def test_several_processes_are_sent_to_the_launcher(capsys, trained, tmp_path):
    several = ["cluster.processes_per_node=2"]
    code, _, err = run(capsys, *demo_in(tmp_path), *several)
    assert code == 2
    assert "start it with phsa-launch" in err
    assert list(tmp_path.iterdir()) == []


def test_ranks_read_the_resolved_file_and_do_not_compose(capsys, trained, tmp_path, monkeypatch, changed):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, _, err = run(capsys, *demo_in(tmp_path))
    assert code == 2
    assert "composed once" in err
    path = tmp_path / "config.yaml"
    path.write_text(dump(changed({"cluster.processes_per_node": 2, "optim.micro_batch_sequences": 4})))
    assert run(capsys, "--config", str(path))[0] == 7


def test_a_finished_run_exits_without_training(capsys, trained, tmp_path):
    run(capsys, *demo_in(tmp_path))
    folder = tmp_path / "phsa_demo_cpu"
    (folder / "checkpoints" / "step_00000400").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000400" / "COMMITTED.json").write_text("{}")
    (folder / "done").touch()
    code, out, _ = run(capsys, *demo_in(tmp_path))
    assert code == 0
    assert "is finished: step 400 of 400" in out
    assert len(trained) == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["explane"], "unknown command 'explane'. Did you mean explain?"),
        (["preparedata"], "Did you mean prepare-data"),
        (["recipe=nope"], "unknown recipe 'nope'."),
        (["recipe=phsa_demo_cpu", "optim.lrr=1"], "Did you mean optim.lr"),
        (["validate", "recipe=phsa_demo_cpu", "attention.train_topk=0"], "attention.train_topk=0"),
        (["explain", "optim.lrr"], "Did you mean optim.lr"),
    ],
)
def test_errors_are_messages_with_exit_code_two(capsys, argv, words):
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert err.startswith("phsa-train: ")
    assert words in err
    assert "Traceback" not in err + out


def test_validate_prints_the_equations(capsys):
    code, out, _ = run(capsys, "validate", *DEMO)
    assert code == 0
    assert "tokens per step = 8 sequences x 512 tokens = 4,096" in out


def test_explain_takes_key_and_overrides_in_any_order(capsys):
    for argv in (["optim.lr", "recipe=phsa_demo_cpu"], ["recipe=phsa_demo_cpu"]):
        code, out, _ = run(capsys, "explain", *argv)
        assert code == 0
        assert "Peak learning rate" in out or "AdamW" in out


def test_recipes_are_listed(capsys):
    _, out, _ = run(capsys, "recipes")
    assert "phsa_demo_cpu" in out
    assert "qwen3_0p6b" in out


def test_the_overview_names_every_command(capsys):
    for argv in ([], ["--help"]):
        code, out, _ = run(capsys, *argv)
        assert code == 0
        assert all(name in out for name in cli.COMMANDS)


@pytest.mark.parametrize("command", ["explain", "validate", "plan", "recipes"])
def test_commands_of_this_room_have_help(capsys, command):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: phsa-train {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "module", "function"),
    [
        ("prepare-data", "phsa_megatron.data.commands", "prepare_data"),
        ("prepare-demo", "phsa_megatron.data.commands", "prepare_demo"),
        ("prepare-tokenizer", "phsa_megatron.data.commands", "prepare_tokenizer"),
        ("show-batch", "phsa_megatron.data.commands", "show_batch"),
        ("doctor", "phsa_megatron.doctor", "main"),
        ("report", "phsa_megatron.monitoring.report_command", "main"),
        ("punctuation", "phsa_megatron.evaluation.punctuation_density", "main"),
        ("compare", "phsa_megatron.evaluation.compare", "main"),
        ("verify-resume", "phsa_megatron.training.verify_resume", "main"),
    ],
)
def test_other_rooms_commands_get_their_arguments_untouched(monkeypatch, command, module, function):
    seen = []
    called = []

    def fake_import(name: str):
        called.append(name)
        return types.SimpleNamespace(**{function: lambda argv: seen.append(argv) or 3})

    monkeypatch.setattr(cli.importlib, "import_module", fake_import)
    assert cli.main([command, "a", "--b", "c=d"]) == 3
    assert called == [module]
    assert seen == [["a", "--b", "c=d"]]


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("replay", "phsa_megatron.training.replay"),
        ("information-loss", "phsa_megatron.evaluation.information_loss"),
        ("selector-study", "phsa_megatron.evaluation.selector_study"),
    ],
)
def test_commands_that_open_a_model_install_the_cpu_shim_before_megatron(monkeypatch, command, module):
    happened = []

    def fake_import(name: str):
        return types.SimpleNamespace(
            install=lambda: happened.append(f"install {name}"),
            hide_known_notices=lambda: None,
            main=lambda argv: happened.append((name, argv)) or 3,
        )

    monkeypatch.setattr(cli.importlib, "import_module", fake_import)
    assert cli.main([command, "a", "--b"]) == 3
    assert happened == ["install phsa_megatron.parallel.cpu_shim", (module, ["a", "--b"])]


def test_a_missing_package_is_named_with_the_extra_that_brings_it(capsys, monkeypatch):
    def no_torch(name: str):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(cli.importlib, "import_module", no_torch)
    code, _, err = run(capsys, "doctor")
    assert code == 2
    assert "needs the package 'torch'" in err
    assert "phsa-megatron[cpu]" in err


def test_login_node_commands_load_neither_torch_nor_numpy():
    program = """
import importlib, pkgutil, sys
import phsa_megatron.config, phsa_launch
for package in (phsa_megatron.config, phsa_launch):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
from phsa_megatron import cli
assert cli.main(["validate", "recipe=phsa_demo_cpu"]) == 0
assert cli.main(["explain", "optim.lr", "recipe=phsa_demo_cpu"]) == 0
assert cli.main(["plan", "recipe=phsa_8b_pretrain_8gpu_h100_bf16_32k"]) == 0
heavy = {"torch", "numpy", "matplotlib", "megatron", "triton", "phsa_kernels"} & set(sys.modules)
assert not heavy, heavy
assert "phsa_megatron.config.explain" in sys.modules
"""
    path = ":".join(str(ROOT / part) for part in ("", "kernels", "launch"))
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
