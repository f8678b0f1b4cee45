#!/usr/bin/python3
"""A real object store for the S3 tests: one Ceph monitor, one OSD and one radosgw on 127.0.0.1.

    rgw.py start DIR [--owner PID]    starts it, unless it runs already, and prints its environment as shell lines
    rgw.py env DIR                    prints them again
    rgw.py stop DIR [--remove]        ends it; what was stored stays in DIR and is there after another start

Everything it writes is below DIR; ports are free ones, chosen at the first start. DIR/store.json says where the store is and
as whom to speak to it: two users, the second with no rights on what the first owns. Names of the form BUCKET.s3.localhost in
the Host header are understood. With --owner, a process waits for the end of PID, however it comes, and then ends the store
and removes DIR. Only processes that were started here are ever ended: DIR/run/NAME.pid holds each one's number and the time
of its start, so that a number that the system has given to another process by then is left alone.

Debian 12 packages: radosgw ceph-mon ceph-osd (python3-rados comes with them). Needs no root and no network but loopback.
The store is as small as it gets: no manager, no redundancy, no authentication inside the cluster, BlueStore on a sparse file.
"""
import argparse
import contextlib
import fcntl
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid

PROGRAMS = {"ceph-mon": "ceph-mon", "monmaptool": "ceph-common", "ceph-osd": "ceph-osd", "radosgw": "radosgw", "radosgw-admin": "radosgw"}
DAEMONS = ("rgw", "osd", "mon")  # in the order of stopping
REGION = "us-east-1"
DNS_NAME = "s3.localhost"
USERS = {"main": ("VECSHARDTESTMAIN", "vecshardTestSecretMain"), "other": ("VECSHARDTESTOTHER", "vecshardTestSecretOther")}
DISK_GIB = 16  # the sparse file's nominal size
START_S, STOP_S = 120, 20
MARK = "vecshard-test-store"  # a file in DIR: what it is, so that nothing else is ever removed
MISSING = 3  # exit status: packages are not installed

# Without authentication there is no key to encrypt with, and clients insist on encryption towards a monitor: hence
# ms_mon_client_mode. The monitor collects changes for a second before it proposes them: with nobody to agree with, that is only
# waiting, at each of the pools that radosgw creates. Empty admin_socket: a path below DIR may be too long for one.
CONF = """
[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{mon_port}
mon_initial_members = a
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_msgr1 = false
ms_bind_port_min = {osd_port}
ms_bind_port_max = {osd_port_max}
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
keyring = {dir}/keyring
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 2000
paxos_propose_interval = 0.05
admin_socket =
run_dir = {dir}/run
log_file = {dir}/log/$type.log
crash_dir = {dir}/log
log_max_recent = 100
[mon]
mon_data = {dir}/mon
mon_data_avail_warn = 2
mon_data_avail_crit = 1
mon_cluster_log_file = {dir}/log/cluster.log
[osd]
osd_data = {dir}/osd
osd_objectstore = bluestore
bluestore_block_path = {dir}/osd.block
bluestore_block_size = {disk}
bluestore_block_create = true
bluestore_block_db_create = false
bluestore_block_wal_create = false
bluestore_fsck_on_mount = false
osd_memory_target = 1073741824
[client.rgw.a]
rgw_frontends = beast endpoint=127.0.0.1:{rgw_port} tcp_nodelay=1
rgw_data = {dir}/rgw
rgw_dns_name = {dns_name}
rgw_enable_apis = s3, admin
rgw_thread_pool_size = 64
rgw_run_sync_thread = false
rgw_dynamic_resharding = false
rgw_override_bucket_index_max_shards = 1
rgw_enable_ops_log = false
rgw_enable_usage_log = false
"""


class Trouble(Exception):
    """What the user is told, without a stack trace."""

    def __init__(self, text, status=1):
        super().__init__(text)
        self.status = status


def missing():
    """Names of Debian packages that are not installed."""
    lacks = {package for program, package in PROGRAMS.items() if not shutil.which(program)}
    if importlib.util.find_spec("rados") is None:
        lacks.add("python3-rados")
    return sorted(lacks)


# ---- processes ----

def born(pid):
    """When a process started, in clock ticks since boot; None when there is no such process or only its remains."""
    try:
        with open("/proc/%d/stat" % pid) as f:
            fields = f.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def pid_of(folder, name):
    """The number of a process that was started here and still runs, else None."""
    try:
        with open(os.path.join(folder, "run", name + ".pid")) as f:
            pid, start = map(int, f.read().split())
    except (FileNotFoundError, ValueError):
        return None
    return pid if born(pid) == start else None


def spawn(folder, name, *command):
    """Starts a process in a session of its own (Ctrl-C in the terminal is for whoever uses the store) and records it."""
    with open(os.path.join(folder, "log", name + ".out"), "ab") as log:
        p = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=folder)
    path = os.path.join(folder, "run", name + ".pid")
    with open(path + ".new", "w") as f:
        f.write("%d %d\n" % (p.pid, born(p.pid) or 0))
    os.rename(path + ".new", path)
    return p


def end(folder, name, gently=True):
    """Ends a process that was started here: asks, waits, insists."""
    pid = pid_of(folder, name)
    for sig, wait_s in ((signal.SIGTERM, STOP_S),) * gently + ((signal.SIGKILL, 5),):
        if pid is None:
            break
        try:
            os.kill(pid, sig)
        except ProcessLookupError:
            break
        until = time.monotonic() + wait_s
        while pid_of(folder, name) == pid and time.monotonic() < until:
            time.sleep(0.02)
        pid = pid_of(folder, name)
    try:
        os.unlink(os.path.join(folder, "run", name + ".pid"))
    except FileNotFoundError:
        pass


def run(folder, *command):
    r = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=START_S, cwd=folder)
    if r.returncode:
        raise Trouble("%s failed with %d: %s" % (" ".join(command[:3]), r.returncode, (r.stderr or r.stdout)[-1500:]))
    return r.stdout


# ---- the store ----

def free_ports(n):
    """n ports that nobody listens on, below those that the kernel gives to outgoing connections."""
    found = []
    while len(found) < n:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
                found.append(port)
            except OSError:
                pass
    return found


def configure(folder):
    """Writes ceph.conf once; later starts keep its ports, which data on disk refers to."""
    conf, state = os.path.join(folder, "ceph.conf"), os.path.join(folder, "store.json")
    if not os.path.exists(state):
        mon_port, rgw_port, osd_port = free_ports(3)
        with open(conf, "w") as f:
            f.write(CONF.format(dir=folder, fsid=uuid.uuid4(), mon_port=mon_port, rgw_port=rgw_port, osd_port=osd_port,
                                osd_port_max=osd_port + 100, disk=DISK_GIB << 30, dns_name=DNS_NAME))
        open(os.path.join(folder, "keyring"), "w").close()
        users = {who: {"access_key": a, "secret_key": s} for who, (a, s) in USERS.items()}
        with open(state + ".new", "w") as f:
            json.dump({"endpoint": "http://127.0.0.1:%d" % rgw_port, "region": REGION, "dns_name": DNS_NAME, "mon_port": mon_port, **users}, f)
        os.rename(state + ".new", state)
    return conf, described(folder)


def described(folder):
    try:
        with open(os.path.join(folder, "store.json")) as f:
            return json.load(f)
    except FileNotFoundError:
        raise Trouble("%s holds no store: rgw.py start %s" % (folder, folder)) from None


def wait_for(what, process, folder, ready):
    until = time.monotonic() + START_S
    while not ready():
        if process is not None and process.poll() is not None:
            raise Trouble("%s ended with %d; see %s/log" % (what, process.returncode, folder))
        if time.monotonic() > until:
            raise Trouble("%s was not ready within %d s; see %s/log" % (what, START_S, folder))
        time.sleep(0.03)


def answers(port):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def once(folder, name):
    """True until done(folder, name): a step that was interrupted is taken again from its beginning."""
    return not os.path.exists(os.path.join(folder, "run", name + ".done"))


def done(folder, name):
    open(os.path.join(folder, "run", name + ".done"), "w").close()


def start_mon(folder, conf, store):
    if once(folder, "mon"):
        shutil.rmtree(os.path.join(folder, "mon"), ignore_errors=True)
        os.mkdir(os.path.join(folder, "mon"))
        with open(conf) as f:
            fsid = next(line.split()[2] for line in f if line.startswith("fsid"))
        monmap = os.path.join(folder, "monmap")
        run(folder, "monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", "[v2:127.0.0.1:%d]" % store["mon_port"], monmap)
        run(folder, "ceph-mon", "-c", conf, "-i", "a", "--mkfs", "--monmap", monmap)
        done(folder, "mon")
    if pid_of(folder, "mon") is None:
        p = spawn(folder, "mon", "ceph-mon", "-c", conf, "-i", "a", "-f")
        wait_for("ceph-mon", p, folder, lambda: answers(store["mon_port"]))


def start_osd(folder, conf):
    import rados
    with rados.Rados(conffile=conf, conf={"log_file": ""}) as cluster:
        def ask(prefix, **args):
            rc, out, said = cluster.mon_command(json.dumps({"prefix": prefix, "format": "json", **args}), b"", timeout=START_S)
            if rc:
                raise Trouble("ceph %s: %s (%d)" % (prefix, said, rc))
            return json.loads(out) if out else None

        if once(folder, "osd"):
            shutil.rmtree(os.path.join(folder, "osd"), ignore_errors=True)
            os.mkdir(os.path.join(folder, "osd"))
            name = str(uuid.uuid5(uuid.NAMESPACE_OID, folder))  # the same at a second try: then the monitor knows it already
            ask("osd new", uuid=name)
            run(folder, "ceph-osd", "-c", conf, "-i", "0", "--mkfs", "--osd-uuid", name)
            done(folder, "osd")
        # after a crash the monitor takes the OSD for up until its new process reports: wait for that report, not for the flag
        before = next((o["up_from"] for o in ask("osd dump")["osds"] if o["osd"] == 0), 0)
        if pid_of(folder, "osd") is None:
            p = spawn(folder, "osd", "ceph-osd", "-c", conf, "-i", "0", "-f")
            wait_for("ceph-osd", p, folder, lambda: any(o["up"] and o["up_from"] > before for o in ask("osd dump")["osds"]))


def start_rgw(folder, conf, store):
    if once(folder, "users"):
        for who, uid in (("main", "vecshard"), ("other", "stranger")):
            keys = store[who]
            run(folder, "radosgw-admin", "-c", conf, "-n", "client.rgw.a", "user", "create", "--uid=" + uid, "--display-name=" + uid,
                "--access-key=" + keys["access_key"], "--secret=" + keys["secret_key"])
        done(folder, "users")
    if pid_of(folder, "rgw") is None:
        p = spawn(folder, "rgw", "radosgw", "-c", conf, "-n", "client.rgw.a", "-f")
        wait_for("radosgw", p, folder, lambda: answers(int(store["endpoint"].rpartition(":")[2])))


def start(folder, owner=None):
    """Returns what store.json holds, when the store answers."""
    lacks = missing()
    if lacks:
        raise Trouble("%s is not installed: run tool/install-deps test" % ", ".join(lacks), MISSING)
    for name in ("CEPH_ARGS", "CEPH_CONF", "CEPH_KEYRING", "LD_PRELOAD"):  # LD_PRELOAD: a sanitizer's library is meant for Python
        os.environ.pop(name, None)
    os.makedirs(folder, exist_ok=True)
    if not is_store(folder):
        if os.listdir(folder):
            raise Trouble("%s holds something else: name an empty or new folder" % folder)
        open(os.path.join(folder, MARK), "w").close()
    for name in ("log", "rgw"):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
    with locked(folder):
        if owner and pid_of(folder, "keeper") is None:
            spawn(folder, "keeper", sys.executable, os.path.abspath(__file__), "keep", folder, "--owner", str(owner))
        conf, store = configure(folder)
        try:
            start_mon(folder, conf, store)
            start_osd(folder, conf)
            start_rgw(folder, conf, store)
        except BaseException:
            end_all(folder)
            raise
    return store


def end_all(folder, gently=True):
    for name in DAEMONS:
        end(folder, name, gently)


def is_store(folder):
    return os.path.exists(os.path.join(folder, MARK))


def stop(folder, remove=False):
    if not is_store(folder):
        return
    with locked(folder):
        end(folder, "keeper")
        end_all(folder, gently=not remove)
        if remove:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(folder):
    """Of two that start or stop the same store, the second waits."""
    os.makedirs(os.path.join(folder, "run"), exist_ok=True)
    with open(os.path.join(folder, "run", "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def keep(folder, owner):
    """Waits until the owner is gone, then cleans up."""
    since = born(owner)
    while since is not None and born(owner) == since:
        time.sleep(0.3)
    os.unlink(os.path.join(folder, "run", "keeper.pid"))  # or stop() would end this process
    stop(folder, remove=True)


def environment(store, who="main"):
    """AWS_* for a client of the store; no file of the user's account is looked at."""
    return {"AWS_ENDPOINT_URL": store["endpoint"], "AWS_ACCESS_KEY_ID": store[who]["access_key"], "AWS_SECRET_ACCESS_KEY": store[who]["secret_key"],
            "AWS_REGION": store["region"], "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true"}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", choices=("start", "stop", "env", "keep"))
    p.add_argument("dir")
    p.add_argument("--owner", type=int, metavar="PID", help="end the store and remove DIR when this process has ended")
    p.add_argument("--remove", action="store_true", help="stop: remove DIR as well")
    a = p.parse_args()
    a.dir = os.path.realpath(a.dir)
    if a.command == "keep":
        keep(a.dir, a.owner)
    elif a.command == "stop":
        stop(a.dir, a.remove)
    else:
        store = start(a.dir, a.owner) if a.command == "start" else described(a.dir)
        for name, value in environment(store).items():
            print("export %s=%s" % (name, value))


if __name__ == "__main__":
    try:
        main()
    except Trouble as e:
        print("rgw.py: %s" % e, file=sys.stderr)
        sys.exit(e.status)
