import pytest

from phsa_launch import cli
from phsa_launch.multirun import MAX_RUNS, expand
from phsa_megatron.config.errors import ConfigError

CLUSTER = ["recipe=phsa_demo_cpu", "cluster=slurm_cpu", "optim.micro_batch_sequences=1"]


def test_values_are_multiplied_out_and_the_last_setting_changes_fastest():
    runs = expand(["recipe=phsa_demo_cpu", "optim.lr=1e-3,2e-3", "run.seed=range(1,3)", "run.dtype=bf16"])
    assert [tuple(run.swept.values()) for run in runs] == [
        ("0.001", "1"),
        ("0.001", "2"),
        ("0.002", "1"),
        ("0.002", "2"),
    ]
    assert runs[1].arguments == ("recipe=phsa_demo_cpu", "optim.lr=0.001", "run.seed=2", "run.dtype=bf16")


def test_glob_chooses_among_the_files_of_a_group():
    runs = expand(["attention=glob(phsa*)"])
    assert [run.swept["attention"] for run in runs] == ["phsa", "phsa_aligned", "phsa_en_zh"]


def test_a_quoted_text_and_a_list_are_one_value():
    (run, _) = expand(["run.sample_prompts=[a,b]", "data.eod_token='a,b'", "run.seed=1,2"])
    assert run.arguments == ("run.sample_prompts=[a,b]", "data.eod_token='a,b'", "run.seed=1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run.seed=1"], "no setting has several values"),
        (["run.name=a,b"], "a sweep names its runs itself"),
        (["optim.lr=interval(0,1)"], "use range"),
        (["attention=glob(nothing*)"], "no file of recipes/attention matches"),
        (["data.name=glob(*)"], "files of a group"),
        (["run.seed"], "cannot be read"),
        ([f"run.seed=range(0,{MAX_RUNS + 1})"], "more than 1000 combinations"),
    ],
)
def test_what_is_no_sweep_is_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        expand(arguments)


def test_a_dry_run_shows_every_run_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    sweep = ["optim.lr=1e-3,2e-3", "model=demo_tiny", f"run.root_dir={tmp_path}"]
    assert cli.main([*CLUSTER, *sweep, "--multirun", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "phsa_demo_cpu-lr_0.001" in out
    assert "phsa_demo_cpu-lr_0.002" in out
    assert out.count("not submitted") == 2
    assert list(tmp_path.iterdir()) == []


def test_one_run_that_breaks_a_rule_stops_all_before_any_starts(tmp_path, capsys):
    sweep = ["attention.train_topk=1,0", f"run.root_dir={tmp_path}"]
    assert cli.main([*CLUSTER, *sweep, "--multirun"]) == 2
    assert "the run with attention.train_topk=0" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_needs_a_scheduler_and_names_that_differ(capsys):
    assert cli.main(["recipe=phsa_demo_cpu", "run.seed=1,2", "--multirun"]) == 2
    assert "cluster.scheduler of cluster=local_cpu is local" in capsys.readouterr().err
    assert cli.main([*CLUSTER, "run.seed=1,1", "--multirun"]) == 2
    assert "two runs would be called phsa_demo_cpu-seed_1" in capsys.readouterr().err


def test_several_values_without_multirun_are_refused(capsys):
    assert cli.main([*CLUSTER, "run.seed=1,2"]) == 2
    assert "this stands for several values" in capsys.readouterr().err
