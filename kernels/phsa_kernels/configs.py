"""Tile sizes by GPU architecture: a safe default, and what was measured better on one architecture.

`tuning/sm_<capability>.json` is written by `benchmarks/tune.py`, an explicit command; nothing is tuned while
a kernel runs.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

TABLES = Path(__file__).parent / "tuning"


@dataclass(frozen=True)
class Launch:
    """One kernel's tile: rows (queries x heads, or queries), keys or blocks a step, warps, stages.

    max_registers: what a thread may use, so that more programs share a multiprocessor; None leaves it open.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def options(self) -> dict[str, int | None]:
        """Return the launch's options as Triton names them."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
        }


@dataclass(frozen=True)
class Configs:
    """A launch for every kernel; `init_chunk_rows`: rows whose init gradients one program sums.

    dQ walks the unions that forward has built, so its rows are forward's.
    """

    normalizer: Launch
    select_columns: Launch
    select_list: Launch
    forward: Launch
    dq: Launch
    chosen_dkdv: Launch
    window_dkdv: Launch
    init_chunk_rows: int = 2048


SAFE = Configs(
    normalizer=Launch(64, 64, 4, 2),
    select_columns=Launch(64, 32, 4, 2),
    select_list=Launch(64, 64, 4, 2),
    forward=Launch(64, 64, 4, 2),
    dq=Launch(64, 64, 4, 2),
    chosen_dkdv=Launch(64, 16, 4, 2),
    window_dkdv=Launch(64, 64, 4, 2),
)

# Products of fp32 operands in full precision have no tensor core: each is unrolled into single
# multiplications, and with the tiles above one kernel takes minutes to compile. See NOTES.md.
FULL_PRECISION = Configs(*7 * (Launch(16, 16, 8, 1),))


def table_path(capability: tuple[int, int]) -> Path:
    """Return where the table of an architecture lies."""
    return TABLES / f"sm_{capability[0]}{capability[1]}.json"


def write_table(table: Configs, path: Path) -> None:
    """Write the table as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(table), indent=1) + "\n")


def read_table(path: Path) -> Configs:
    """Return a table that `write_table` wrote.

    Raises:
        ValueError: an entry is missing or unknown.
    """
    entries = json.loads(path.read_text())
    names = {field.name for field in fields(Configs)}
    if set(entries) != names:
        raise ValueError(f"{path}: expected the entries {sorted(names)}, got {sorted(entries)}")
    chunk = entries.pop("init_chunk_rows")
    return Configs(**{name: Launch(**entry) for name, entry in entries.items()}, init_chunk_rows=chunk)


@functools.cache
def _of_device(index: int) -> Configs:
    path = table_path(torch.cuda.get_device_capability(index))
    return read_table(path) if path.exists() else SAFE


def configs_for(device: torch.device, dtype: torch.dtype) -> Configs:
    """Return the tiles for operands of a dtype on a device.

    On a GPU: small ones for fp32; else the architecture's table, or the safe one if it was never measured.
    The interpreter, which compiles nothing, takes the safe one.
    """
    if device.type != "cuda":
        return SAFE
    if dtype == torch.float32:
        return FULL_PRECISION
    return _of_device(torch.cuda.current_device() if device.index is None else device.index)
