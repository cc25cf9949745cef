"""Checkpoints of several processes: exact on the same layout, readable on another one, failures agreed on."""

from pathlib import Path

import pytest

from tests.training.checkpoint_runs import (
    SCRIPT_PROLOGUE,
    Run,
    fingerprint,
    run_script_in_ranks,
    tiny_config,
    use_nsa,
    write_script,
)

TWO_PROCESSES = (
    SCRIPT_PROLOGUE
    + """
    import hashlib, os, torch

    def config_of(name, **parallel):
        config = t.tiny_config(Path({root!r}), run={{"name": name}}, parallel=parallel)
        config.cluster.processes_per_node = 2
        return config

    def same_on_all(run):
        digests = [None, None]
        content = t.fingerprint(run.parts)
        mine = hashlib.sha256(repr(sorted((k, v) for k, v in content.items() if k[:6] == "weight")).encode())
        torch.distributed.all_gather_object(digests, mine.hexdigest())
        return digests[0] == digests[1]

    def straight_and_resumed():
        for in_background in (False, True):
            config = config_of(f"data_{{in_background}}")
            config.checkpoint.async_save = in_background
            with t.Run(config) as run:
                run.train(2)
                run.save(must_succeed=True)
                run.train(3)
                expected = t.fingerprint(run.parts)
            with t.Run(config) as run:
                assert run.load().step == 2
                run.train(3)
                found = t.fingerprint(run.parts)
                assert same_on_all(run)
            assert found == expected, [key for key in expected if found.get(key) != expected[key]]

    def one_process_cannot_write():
        import resource
        with t.Run(config_of("limited")) as run:
            run.train(1)
            run.save(must_succeed=True)
            run.train(1)
            unlimited = resource.RLIM_INFINITY
            if run.groups.rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited))
            assert run.save() is False, "both processes learn that one of them failed"
            resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
            assert run.checkpointer.latest_committed() == 1
            if run.groups.rank == 0:
                assert "the checkpoint of step 1 is intact" in run.events.text("checkpoint_failed")
            assert run.save(must_succeed=True)

    def damage_is_refused_by_all():
        with t.Run(config_of("damaged")) as run:
            run.train(1)
            run.save()
            run.groups.barrier()
            if run.groups.rank == 1:
                (run.folder.checkpoints_dir / "step_00000001" / "COMMITTED.json").unlink()
            run.groups.barrier()
            try:
                run.load()
            except Exception as error:
                assert "Starting again from step 0" in str(error)
            else:
                raise AssertionError("a damaged checkpoint was loaded")

    def another_layout():
        with t.Run(config_of("one_process", tensor_size=2)) as run:
            assert run.load().step == 3
            if run.groups.rank == 0:
                assert "(world_size 1 -> 2, tensor_size 1 -> 2" in run.events.text("resume")
            run.state.step += 1
            run.save(must_succeed=True)

    def selector_weights_in_another_layout():
        config = config_of("nsa", tensor_size=2, sequence_parallel=True)
        t.use_nsa(config)
        with t.Run(config) as run:
            assert run.load().step == 1
            run.state.step += 1
            run.save(must_succeed=True)

    straight_and_resumed()
    one_process_cannot_write()
    damage_is_refused_by_all()
    another_layout()
    selector_weights_in_another_layout()
    print("done", flush=True)
"""
)


@pytest.mark.slow
def test_two_processes_save_resume_fail_and_reshard_together(tmp_path):
    one = tiny_config(tmp_path / "runs", run={"name": "one_process"})
    with Run(one) as run:
        run.train(3)
        run.save()
        before = fingerprint(run.parts)
    nsa = tiny_config(tmp_path / "runs", run={"name": "nsa"})
    use_nsa(nsa)
    with Run(nsa) as run:
        run.train(1)
        run.save()
        nsa_before = fingerprint(run.parts)
    run_script_in_ranks(write_script(tmp_path, TWO_PROCESSES), 2)
    # Written by one process, read and written by two with split weights, read again by one.
    with Run(one) as run:
        assert run.load().step == 4
        after = fingerprint(run.parts)
    changed = {key for key in before if after.get(key) != before[key]}
    assert changed <= {"rng"}
    with Run(nsa) as run_nsa:
        assert run_nsa.load().step == 2
        nsa_after = fingerprint(run_nsa.parts)
    assert {key for key in nsa_before if nsa_after.get(key) != nsa_before[key]} <= {"rng"}
    assert sum(".core_attention." in key for key in nsa_before) > 0
    assert Path(run.folder.checkpoints_dir / "step_00000004").is_dir()
