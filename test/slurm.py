"""A Slurm cluster of virtual nodes on this machine, for the tests of tool/slurm-build.sh.

    with Slurm(nodes=3) as cluster:
        subprocess.run(["sbatch", ...], env={**os.environ, **cluster.env})
        cluster.node_dies(2); cluster.wait_for_state(2, "down"); cluster.node_returns(2)

Debian packages: slurmctld slurmd slurm-client munge. Needs no root, no systemd, no cgroups and no network but loopback; all it writes
is in a temporary folder, its munge key and socket too, and its ports are free ones. Ready within a second or two.

Daemons run in the foreground as children of this process, which the kernel ends should this process die; what they start
(slurmstepd, the jobs) is found by the SLURM_CONF in its environment, which nobody else has, and ended by stop().
"""
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time

PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
START_S, STOP_S = 30, 10

CONF = """
ClusterName=vecshard
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={dir}/munge.sock,cred_expire=5
CommunicationParameters={listen}DisableIPv6
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd.%n.pid
SlurmctldLogFile={dir}/log/slurmctld
SlurmdLogFile={dir}/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SlurmctldTimeout=30
MessageTimeout=2
TCPTimeout=1
SlurmdTimeout={node_timeout}
ReturnToService=2
JobRequeue=1
KillWait=2
MaxArraySize={max_array}
"""


def missing():
    """Names of Debian packages that are not installed."""
    return sorted({package for program, package in PROGRAMS.items() if not shutil.which(program, path=SEARCH)})


def free_ports(n):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


libc = ctypes.CDLL(None, use_errno=True)


def be_localhost():
    """Gives this process a host name of its own, which root may. Status 0: done."""
    name = b"localhost"
    return libc.unshare(0x04000000) or libc.sethostname(name, len(name))  # CLONE_NEWUTS


def resolves_to_loopback(name):
    with contextlib.suppress(OSError):
        return socket.gethostbyname(name).startswith("127.")
    return False


def host_to_be():
    """(name, whether daemons must take it first). Slurm binds to the address of the host's name, and expects to be that host."""
    if resolves_to_loopback("localhost"):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if be_localhost() == 0 else 1)
        if os.waitpid(pid, 0)[1] == 0:
            return "localhost", True
    return socket.gethostname().split(".")[0], False


def until(what, seconds, condition, every=0.05):
    """Waits for the condition's first true value and returns it."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError("waited %g s for %s" % (seconds, what))
        time.sleep(every)


def processes(wanted):
    """[(pid, arguments, environment)] of the processes for whose arguments and environment (bytes) wanted(...) is true."""
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and int(name) != os.getpid():
                with open("/proc/%s/cmdline" % name, "rb") as f:
                    arguments = f.read().split(b"\0")[:-1]
                with open("/proc/%s/environ" % name, "rb") as f:
                    environment = dict(e.split(b"=", 1) for e in f.read().split(b"\0") if b"=" in e)
                if wanted(arguments, environment):
                    found.append((int(name), arguments, environment))
    return found


def is_alive(pid):
    """Not ended, whether or not anybody asked for its status."""
    with contextlib.suppress(OSError):
        with open("/proc/%d/stat" % pid) as f:
            return f.read().rpartition(")")[2].split()[0] not in "ZX"
    return False


class Slurm:
    def __init__(self, nodes=3, cpus=1, memory_mb=1024, node_timeout=4, max_array=1001):
        self.dir = tempfile.mkdtemp(prefix="vecshard-slurm-")  # short: the path of a socket has at most 107 bytes
        self.children, self.count = {}, nodes
        self.conf = os.path.join(self.dir, "slurm.conf")
        self.env = {"SLURM_CONF": self.conf}
        ports = free_ports(1 + nodes)
        host, self.renamed = host_to_be()
        # without a name for the loopback address: on all addresses, as Slurm does by itself
        listen = "NoCtldInAddrAny,NoInAddrAny," if resolves_to_loopback(host) else ""
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("log", "state", "spool", *("spool/n%d" % (i + 1) for i in range(nodes))):
            os.mkdir(os.path.join(self.dir, name), 0o755)
        with open(self.conf, "w") as f:
            f.write(CONF.format(host=host, listen=listen, port=ports[0], user=user, dir=self.dir, node_timeout=node_timeout, max_array=max_array))
            for i in range(nodes):
                f.write("NodeName=n%d NodeHostname=%s NodeAddr=127.0.0.1 Port=%d CPUs=%d RealMemory=%d State=UNKNOWN\n"
                        % (i + 1, host, ports[i + 1], cpus, memory_mb))
            f.write("PartitionName=all Nodes=n[1-%d] Default=YES MaxTime=INFINITE State=UP\n" % nodes)
        with open(os.path.join(self.dir, "cgroup.conf"), "w") as f:
            f.write("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nCgroupMountpoint=%s/cgroup\n" % self.dir)  # else it looks for a real one
        with open(os.open(os.path.join(self.dir, "munge.key"), os.O_WRONLY | os.O_CREAT, 0o600), "wb") as f:
            f.write(os.urandom(128))

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            print(self.logs())
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    # ---- daemons ----

    def before_start(self):
        """In the new process: it ends with this one."""
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if self.renamed:
            be_localhost()

    def spawn(self, name, *command):
        with open(os.path.join(self.dir, "log", name + ".out"), "ab") as log:
            # LD_PRELOAD: a sanitizer's runtime is for Python and what it loads
            environment = {**{k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}, **self.env}
            self.children[name] = subprocess.Popen([shutil.which(command[0], path=SEARCH), *command[1:]], stdin=subprocess.DEVNULL,
                                                   stdout=log, stderr=log, cwd=self.dir, env=environment, preexec_fn=self.before_start)

    def start(self):
        socket_path = os.path.join(self.dir, "munge.sock")
        self.spawn("munged", "munged", "--foreground", "--force", "--key-file", self.dir + "/munge.key", "--socket", socket_path,
                   "--pid-file", self.dir + "/munged.pid", "--seed-file", self.dir + "/munge.seed", "--log-file", self.dir + "/log/munged",
                   "--num-threads", "2")
        until("munged", START_S, lambda: os.path.exists(socket_path))
        self.spawn("slurmctld", "slurmctld", "-D", "-i")
        for i in range(self.count):
            self.node_returns(i + 1)
        for i in range(self.count):
            self.wait_for_state(i + 1, "idle", START_S)

    def node_returns(self, i):
        self.spawn("n%d" % i, "slurmd", "-D", "-N", "n%d" % i)

    def node_dies(self, i, with_jobs=True):
        """As by a power cut; without the jobs: cut off, and its jobs go on."""
        child = self.children.pop("n%d" % i)
        child.kill()
        child.wait()
        jobs = self.mine(lambda a, e: e.get(b"SLURMD_NODENAME") == b"n%d" % i)
        if with_jobs:  # who watches over a job dies first, else it would report the job's end
            steps = [b"slurmstepd: [%s." % e[b"SLURM_JOB_ID"] for _, _, e in jobs if b"SLURM_JOB_ID" in e]
            for pid, _, _ in self.mine(lambda a, e: any(x.startswith(s) for x in a[:1] for s in steps)) + jobs:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def state(self, i):
        r = self.run("sinfo", "-h", "-n", "n%d" % i, "-o", "%T", check=False)
        return r.stdout.strip().rstrip("*#~!%$@+^-")

    def wait_for_state(self, i, state, seconds=60):
        until("node n%d to be %s" % (i, state), seconds, lambda: self.state(i) == state, 0.2)

    # ---- processes of jobs ----

    def run(self, *command, check=True):
        environment = {**{k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}, **self.env}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=check)

    def mine(self, wanted=lambda arguments, environment: True):
        conf = self.conf.encode()
        return processes(lambda a, e: e.get(b"SLURM_CONF") == conf and wanted(a, e))

    def logs(self):
        """The end of every log, for a test that failed."""
        text = ""
        for name in sorted(os.listdir(os.path.join(self.dir, "log"))):
            with open(os.path.join(self.dir, "log", name), errors="replace") as f:
                text += "==== %s\n%s\n" % (name, f.read()[-3000:])
        return text

    def stop(self):
        own = {c.pid for c in self.children.values()}
        for name in [n for n in self.children if n.startswith("n") or n == "slurmctld"] + ["munged"]:
            child = self.children.pop(name, None)
            if child:
                child.terminate()
                try:
                    child.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
        for _ in range(100):  # jobs, their slurmstepd, and what they start meanwhile
            left = [p for p in self.mine() if p[0] not in own]
            if not left:
                break
            for pid, _, _ in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        shutil.rmtree(self.dir, ignore_errors=True)
        if left:
            raise AssertionError("these processes do not end: %s" % left)
