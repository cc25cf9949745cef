"""A private, real Slurm of several nodes on this machine, for tests.

Each node is a slurmd with a host name and an /etc/hosts of its own (UTS and mount namespaces), so that jobs
see hosts n1..nN that resolve, and nothing outside the cluster's folder changes. All daemons are children of
this process and listen on loopback only. Needs root, and slurmctld, slurmd, the client commands and munge.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "unshare")
NUM_GPUS = 8
_START_TIMEOUT_S = 60.0
_LIVE_STATES = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED")
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
# A requeued job starts after cred_expire plus a second: 121 s by default, and values below 5 are ignored.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/pid/slurmctld
SlurmdPidFile={folder}/pid/%n
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/%n
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
# What can never run is refused when it is submitted.
EnforcePartLimits=ALL
ReturnToService=2
# Seconds until a silent node counts as down and its jobs start elsewhere, and between TERM and KILL.
SlurmdTimeout=10
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# The nodes claim more than this machine has; nothing is enforced.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs=64 RealMemory=64000 Gres=gpu:{num_gpus}
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE State=UP
PartitionName=batch Default=YES
PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Return why no cluster can start here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"no {', '.join(missing)} here: bash .ci/slurm_leg installs Slurm from the distribution"
    if os.geteuid() != 0:
        return "a node with a host name of its own (unshare --uts) needs root"
    return None


class SlurmCluster:
    """The cluster; a context manager that starts and kills it.

    Args:
        folder: everything goes here. Its path is short (a socket's holds 107 bytes), and all may enter it.
        num_nodes: nodes n1, n2, ...
    """

    def __init__(self, folder: Path, num_nodes: int = 4) -> None:
        self.folder = folder
        self.nodes = [f"n{i + 1}" for i in range(num_nodes)]
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Kill every daemon and all that runs on the nodes."""
        for pid in self.processes():
            _kill(pid)
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()
        self._daemons.clear()

    def start_node(self, node: str) -> None:
        """Start a node, or start it again after `kill_node`."""
        setup = f"hostname {node} && mount --bind {self.folder}/hosts /etc/hosts && exec slurmd -D -N {node}"
        self._spawn(node, "unshare", "--mount", "--uts", "sh", "-c", setup)

    def kill_node(self, node: str) -> int:
        """Kill -9 a node's daemon and all its tasks, as a power cut would; return how many there were."""
        host = _uts_namespace(self._daemons[node].pid)
        victims = [pid for pid in self.processes() if _uts_namespace(pid) == host]
        for pid in victims:
            _kill(pid)
        self._daemons.pop(node).wait()
        return len(victims)

    def run(self, *command: str) -> str:
        """Return what a command prints; it must succeed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command} left with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """Return what `scontrol show job` says."""
        line = self.run("scontrol", "show", "job", "-o", job_id).splitlines()[0]
        return dict(field.split("=", 1) for field in line.split() if "=" in field)

    def wait_for_job(self, job_id: str, timeout_s: float = 180.0) -> dict[str, str]:
        """Return a job's fields once it is over. (sbatch --wait polls ever more rarely.)

        A job on its way back into the queue may seem over for a moment, so two looks must agree.
        """

        def is_over() -> bool:
            if self.job(job_id)["JobState"] in _LIVE_STATES:
                return False
            time.sleep(2)
            return self.job(job_id)["JobState"] not in _LIVE_STATES

        wait_until(is_over, timeout_s, f"job {job_id} is not over")
        return self.job(job_id)

    def idle_nodes(self) -> list[str]:
        """Return the nodes that could take a job at once."""
        return self.run("sinfo", "-h", "-N", "-p", "batch", "-t", "idle", "-o", "%N").split()

    def wait_until_idle(self) -> None:
        """Wait until every node could take a job."""
        wait_until(lambda: len(self.idle_nodes()) == len(self.nodes), _START_TIMEOUT_S, "nodes are not idle")

    def processes(self) -> Iterator[int]:
        """Yield everything that runs on the nodes: daemons, step daemons, tasks and their children."""
        own = {_uts_namespace(daemon.pid) for daemon in self._daemons.values()} - {
            _uts_namespace(os.getpid())
        }
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _uts_namespace(int(entry.name)) in own:
                yield int(entry.name)

    def _start(self) -> None:
        for name in ("pid", "log", "state", "spool", "dev", "munge"):
            (self.folder / name).mkdir()
        port = self._configure()
        munge = self.folder / "munge"
        munge.chmod(0o700)
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        self._spawn(
            "munged",
            *("munged", "--foreground", f"--socket={self.folder}/munge.socket", f"--key-file={munge}/key"),
            *(f"--seed-file={munge}/seed", f"--pid-file={munge}/pid", f"--log-file={munge}/log"),
        )
        wait_until((self.folder / "munge.socket").exists, _START_TIMEOUT_S, f"munged: see {munge}/log")
        self._spawn("slurmctld", "slurmctld", "-D", "-i")
        wait_until(lambda: _listens(port), _START_TIMEOUT_S, f"slurmctld: see {self.folder}/log")
        for node in self.nodes:
            self.start_node(node)
        self.wait_until_idle()

    def _configure(self) -> int:
        host = socket.gethostname().split(".")[0]
        port = _adjacent_free_ports(len(self.nodes) + 1)
        nodes = (f"NodeName={n} NodeAddr=127.0.0.1 Port={port + 1 + i}" for i, n in enumerate(self.nodes))
        (self.folder / "slurm.conf").write_text(
            _CONFIGURATION.format(
                folder=self.folder, host=host, port=port, num_gpus=NUM_GPUS, nodes="\n".join(nodes)
            )
        )
        names = ("localhost", host, *self.nodes)
        (self.folder / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in names))
        # Stand-ins for GPUs: slurmd wants character devices, and gives jobs CUDA_VISIBLE_DEVICES for them.
        for i in range(NUM_GPUS):
            os.mknod(self.folder / "dev" / f"nvidia{i}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        gpus = f"Name=gpu File={self.folder}/dev/nvidia[0-{NUM_GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(gpus)
        return port

    def _spawn(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
            )


def wait_until(condition: Callable[[], bool], timeout_s: float, otherwise: str) -> None:
    """Wait for a condition; raises AssertionError after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{otherwise} after {timeout_s:.0f} s"
        time.sleep(0.1)


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _uts_namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/uts")
    except OSError:
        return None


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _adjacent_free_ports(count: int) -> int:
    """Return the first of `count` adjacent free ports, below those that the jobs' training takes."""
    while True:
        first = random.randrange(10000, 19000)
        held: list[socket.socket] = []
        try:
            for port in range(first, first + count):
                held.append(socket.socket())
                held[-1].bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
        finally:
            for listener in held:
                listener.close()
