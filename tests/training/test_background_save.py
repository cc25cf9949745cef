"""A signal to all processes of a job during a save in the background: it is finished, then the run leaves."""

from __future__ import annotations

import json

from phsa_megatron.config.prepare_run import prepare_run_folder
from phsa_megatron.training.commit import CheckpointStore
from tests import forks

# The real training process, whose first writer in the background takes so long that the signal comes first.
# The signal goes to the whole process group, as a batch system sends it: to the writer and its helper, too.
SLOW_WRITER = """
import os, signal, sys, time
from phsa_megatron import train
from phsa_megatron.parallel import cpu_shim

if __name__ == "__main__":
    cpu_shim.install()
    from phsa_megatron.parallel import mcore_checkpointing as shards

    real_start, starts = shards.ShardWriter.start, []

    def start(self, state, folder):
        real_schedule = self._queue.schedule_async_request

        def schedule(request):
            write = request.async_fn

            def write_slowly(*arguments, **options):
                if not starts:
                    os.killpg(0, signal.SIGTERM)
                    time.sleep(2.0)
                return write(*arguments, **options)

            result = real_schedule(request._replace(async_fn=write_slowly))
            starts.append(folder)
            return result

        self._queue.schedule_async_request = schedule
        try:
            return real_start(self, state, folder)
        finally:
            self._queue.schedule_async_request = real_schedule

    shards.ShardWriter.start = start
    sys.exit(train.main(sys.argv[1]))
"""


def test_a_signal_during_a_background_save_finishes_it_and_leaves_saved(tiny_config, tmp_path):
    config = tiny_config(
        **{"checkpoint.save_every_steps": 2, "checkpoint.async_save": True, "run.train_steps": 400}
    )
    folder = prepare_run_folder(config).folder
    script = tmp_path / "slow_writer.py"
    script.write_text(SLOW_WRITER)
    code, stdout, stderr = forks.run(script, folder.config_file)
    assert code == 0, stdout[-2000:] + stderr[-3000:]
    assert "asked to leave by SIGTERM" in stdout
    events = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    seconds = {e["step"]: e["seconds"] for e in events if e.get("event") == "checkpoint_committed"}
    assert seconds[2] >= 2.0, "the signal came while the save was under way"
    left_at = max(seconds)
    store = CheckpointStore(folder.checkpoints_dir, folder.committed_step)
    assert store.recorded_step() == left_at and store.is_committed(left_at) and store.is_committed(2)
    assert f"step {left_at} of 400 is saved" in stdout
    assert not list(folder.checkpoints_dir.glob("*.partial"))
