"""`phsa-train report`: the page of a run, or of several runs compared."""

from __future__ import annotations

import argparse
from pathlib import Path

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.monitoring.comparison import write_comparison
from phsa_megatron.monitoring.report import write_report

_DESCRIPTION = """\
Write a page that opens anywhere, from runs that are finished, stopped or still running.

  phsa-train report RUN            RUN/report.html
  phsa-train report RUN RUN ...    comparison.html: curves, selection by layer and time, speed, restarts,
                                   alerts, and the settings that differ
"""


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: The arguments after `report`.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: A folder's configuration is missing or damaged, or an option makes no sense.
        DataError: A folder's metrics are missing or damaged.
    """
    parser = argparse.ArgumentParser(
        prog="phsa-train report",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run folder, for example runs/phsa_demo_cpu")
    parser.add_argument("--output", type=Path, default=Path("comparison.html"), help="of a comparison")
    parser.add_argument(
        "--smoothing", type=float, default=0.9, help="weight of the past in running means, 0 to below 1"
    )
    parser.add_argument("--axis", choices=("step", "tokens"), default="step", help="of a comparison's curves")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.smoothing < 1:
        raise ConfigError(f"--smoothing={arguments.smoothing:g}: it must be at least 0 and less than 1")
    folders = [RunFolder(run) for run in arguments.runs]
    if len(folders) == 1:
        print(write_report(folders[0]))
    else:
        page = write_comparison(folders, arguments.output, smoothing=arguments.smoothing, axis=arguments.axis)
        print(page)
    return 0
