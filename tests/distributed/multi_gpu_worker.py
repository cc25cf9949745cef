"""One process of `multi_gpu.py`: takes the cases of a job one after the other, until one fails.

`multi_gpu_worker.py JOB.json`: {"size", "processes", "folder", "cases": [{"name", "kind", "timeout_s"}]}.
Each process leaves FOLDER/NAME.RANK.json, process 0 with the result; a failure leaves the traceback there
and ends the process, for what other processes wait in is not known. A case that takes too long leaves the
stacks of all threads in FOLDER/NAME.RANK.stack, for whoever ends it. Steps are timed
when there is FOLDER/quiet: from then on nothing else runs on the GPUs.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from phsa_megatron.parallel import cpu_shim

JOB = json.loads(Path(sys.argv[1]).read_text()) if __name__ == "__main__" else {}
cpu_shim.install(hide_gpu=JOB.get("size") != "gpu")

import torch  # noqa: E402

from tests.distributed import multi_gpu_layouts, multi_gpu_timing  # noqa: E402
from tests.distributed.multi_gpu_groups import KeptGroups  # noqa: E402


def main(job: dict[str, Any]) -> None:
    """Take the cases of the job."""
    folder, rank = Path(job["folder"]), int(os.environ.get("RANK", "0"))
    size = multi_gpu_layouts.SIZES[job["size"]]
    references, kept = None, KeptGroups()
    compiled: tuple[Any, ...] = ()
    for case in job["cases"]:
        name, began_s = case["name"], time.monotonic()
        stack = (folder / f"{name}.{rank}.stack").open("w")
        faulthandler.dump_traceback_later(max(1.0, case["timeout_s"] - 2), file=stack)
        try:
            if case["kind"] == "timing":
                if compiled != multi_gpu_timing.compiled_shapes(case):
                    compiled = multi_gpu_timing.compiled_shapes(case)
                    torch.compiler.reset()
                found = multi_gpu_timing.run_case(case, job["processes"], kept, folder / "quiet")
            else:
                if references is None and rank == 0:
                    path = folder.parent / "references.pt"
                    references = multi_gpu_layouts.References.kept(size, path, kept)
                found = multi_gpu_layouts.run_case(name, size, job["processes"], references, folder, kept)
        except BaseException:
            _write(folder / f"{name}.{rank}.json", {"error": traceback.format_exc()})
            sys.stdout.flush()
            os._exit(1)  # NCCL's own end may wait for the others
        faulthandler.cancel_dump_traceback_later()
        stack.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _write(folder / f"{name}.{rank}.json", found | {"case_s": round(time.monotonic() - began_s, 2)})
    kept.close()


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write so that a reader sees all or nothing."""
    path.with_suffix(".part").write_text(json.dumps(content))
    path.with_suffix(".part").rename(path)


if __name__ == "__main__":
    main(JOB)
