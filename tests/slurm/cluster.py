"""A Slurm cluster on this machine, in a directory of its own: munged, slurmctld and a slurmd for each node.

The nodes have GPUs that are only counted, so that `--gpus-per-node` means what it does elsewhere. Nothing of /etc is
used, ports are free ones, and any user can be its administrator.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
GPUS = 2  # of each node

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5  # the pause before a requeued job starts; 120 by default
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=5
MessageTimeout=5  # a node that is gone is noticed after 15 s, after 28 s with the default of 10
KillWait=10
MinJobAge=3600  # what became of a job is asked long after its end
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
StateSaveLocation={root}/state
SlurmdPidFile={root}/slurmd.%n.pid
SlurmdLogFile={root}/slurmd.%n.log
SlurmdSpoolDir={root}/spool.%n
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Programs that are not installed; Debian has the daemons in /usr/sbin, which not everybody's PATH names."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return os.environ["PATH"] + os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for it, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.1)


class Cluster:
    """`with Cluster(directory, nodes) as cluster:` jobs are submitted from the repository's root."""

    def __init__(self, root: Path, nodes: int) -> None:
        self.root, self.names = root, [f"n{number}" for number in range(1, nodes + 1)]
        self.environment = {"PATH": _path(), "HOME": str(Path.home()), "PYTHON": sys.executable}
        self.environment["SLURM_CONF"] = str(root / "slurm.conf")

    def __enter__(self) -> "Cluster":
        (self.root / "munge").mkdir(parents=True)
        (self.root / "state").mkdir()
        self._configure()
        try:
            self._start_munge()
            self.run("slurmctld")
            for name in self.names:
                self.start_node(name)
            until(lambda: self.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(self.names), 60, "nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _configure(self) -> None:
        with contextlib.ExitStack() as stack:  # all at once, so that they differ
            sockets = [stack.enter_context(socket.socket()) for _ in range(len(self.names) + 1)]
            for one in sockets:
                one.bind(("127.0.0.1", 0))
            ports = [one.getsockname()[1] for one in sockets]
        host = socket.gethostname().split(".")[0]
        text = _CONF.format(host=host, port=ports[0], user=getpass.getuser(), root=self.root)
        for name, port in zip(self.names, ports[1:], strict=True):
            text += f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 Gres=gpu:{GPUS}\n"
        (self.root / "slurm.conf").write_text(text)
        for number in range(GPUS):
            (self.root / f"gpu{number}").touch()
        devices = f"NodeName={','.join(self.names)} Name=gpu File={self.root}/gpu[0-{GPUS - 1}]\n"
        (self.root / "gres.conf").write_text(devices)

    def _start_munge(self) -> None:
        folder = self.root / "munge"
        key = folder / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        places = {"key-file": "key", "socket": "socket", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        # --force: the directories above may be writable for a group
        self.run("munged", "--force", *(f"--{option}={folder / name}" for option, name in places.items()))

    def start_node(self, name: str) -> None:
        """Its slurmd."""
        (self.root / f"spool.{name}").mkdir(exist_ok=True)
        self.run("slurmd", "-N", name)

    def run(self, *command: str, **variables: str) -> str:
        """Output of a command with the cluster's environment; anything but success is an error."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment | variables, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def submit(self, *arguments: str, **variables: str) -> str:
        """sbatch; the job's number."""
        return self.run("sbatch", "--parsable", f"--output={self.root}/%x-%j.out", *arguments, **variables).strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, number: str, seconds: float = 150.0) -> dict[str, str]:
        """The job, once Slurm has done with it."""
        running = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"}

        until(lambda: self.job(number)["JobState"] not in running, seconds, f"the end of job {number}")
        return self.job(number)

    def log(self, number: str) -> str:
        """Output of the job, all starts; empty before the first."""
        return "".join(path.read_text(errors="replace") for path in self.root.glob(f"*-{number}.out"))

    def fail_node(self, name: str) -> None:
        """What a power cut is: slurmd, the steps' slurmstepd and all their processes are gone at once."""
        tasks = self.processes(f"SLURMD_NODENAME={name}")
        steps = {parent for parent in map(_parent, tasks) if _name(parent) == "slurmstepd"}
        for pid in [int((self.root / f"slurmd.{name}.pid").read_text()), *steps, *tasks]:
            _kill(pid, signal.SIGKILL)

    def processes(self, *variables: str) -> list[int]:
        """Processes of this cluster's jobs whose environment has these variables."""
        wanted = {f"SLURM_CONF={self.root}/slurm.conf".encode(), *(text.encode() for text in variables)}
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if wanted <= set((path / "environ").read_bytes().split(b"\0")):
                    found.append(int(path.name))
        return found

    def __exit__(self, *exception: object) -> None:
        """Ends everything that was started here: jobs, their slurmstepd, daemons."""
        found = self.processes()
        steps = {parent for parent in map(_parent, found) if _name(parent) == "slurmstepd"}
        for path in self.root.glob("**/*pid"):
            found += [int(path.read_text())] if path.is_file() else []
        for pid in {*found, *steps} - {os.getpid()}:
            _kill(pid, signal.SIGKILL)


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
