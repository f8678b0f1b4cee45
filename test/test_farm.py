"""Many shards by many processes: plans, tasks that are run twice or killed, the check of a database against its plan, and the
scripts for GNU parallel and Slurm.

Proves that a plan follows from its files alone; that a bucket which is built is left alone, and one of other files or options is
never taken for it; that of several builds of one bucket one works and the others wait, whatever dies; that the check finds what is
missing, foreign, twice or damaged, and names the buckets to build again; and that on a real Slurm (test/slurm.py) with a build and two
nodes dying the database comes out complete, each row once, and published.
"""
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess

import h5py
import numpy as np
import pytest

import slurm
from conftest import BUILD, ROOT, connect, plain_environ, tool

TOOL = str(BUILD / "vecshard")
SCRIPT_ENV = {**plain_environ(), "VECSHARD": TOOL}


def write_h5(path, first, n, dim=24):
    """Rows with ids r<first> ... and vectors that follow from the ids."""
    x = np.random.default_rng(first).normal(size=(n, dim)).astype("<f4")
    with h5py.File(path, "w") as f:
        f.create_dataset("embedding", data=x)
        f.create_dataset("id", data=["r%d" % i for i in range(first, first + n)], dtype=h5py.string_dtype())
    return str(path)


def files_of(folder, sizes):
    """Files with so many rows each, and the number of all rows."""
    at = list(itertools.accumulate(sizes, initial=0))
    return [write_h5(folder / ("part%02d.h5" % i), at[i], n) for i, n in enumerate(sizes)], at[-1]


def pack(folder, files, bucket_rows, name="plan.json"):
    tool("pack", *files, "--bucket-rows", bucket_rows, "--out", folder / name)
    return folder / name, len(json.loads((folder / name).read_text())["buckets"])


def build_bucket(plan, bucket, db, *options, ok=True):
    return tool("build", "--plan", plan, "--bucket", bucket, "--out", db, *options, ok=ok)


def build_all(plan, n, db, *options):
    for bucket in range(1, n + 1):
        build_bucket(plan, bucket, db, *options)


def missing(db, plan, how="lines"):
    r = subprocess.run([TOOL, "verify", str(db), "--plan", str(plan), "--missing", how], capture_output=True, text=True, env=plain_environ())
    assert r.returncode == (1 if r.stdout else 0), r
    return r.stdout


def all_ids(db):
    """Every id in every shard, in order, with repetitions."""
    c = connect()
    ids = []
    for shard in sorted(os.listdir(db)):
        c.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s/%s')" % (db, shard))
        ids += [i for i, in c.execute("SELECT id FROM t")]
        c.execute("DROP TABLE t")
    c.close()
    return sorted(ids)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(pathlib.Path(folder).rglob("*")) if p.is_file()}


def builds_of(bucket, db):
    """The processes that build this bucket now."""
    want = [b"--bucket", b"%d" % bucket, b"--out", str(db).encode()]
    return slurm.processes(lambda a, e: a[:1] == [TOOL.encode()] and any(a[i:i + 4] == want for i in range(len(a))))


def holder_of_lock(folder):
    """The process that has locked a folder, else None; without touching the lock."""
    try:
        inode = os.stat(folder).st_ino
    except FileNotFoundError:
        return None
    for line in pathlib.Path("/proc/locks").read_text().splitlines():  # 1: FLOCK  ADVISORY  WRITE 4711 00:2e:1234 0 EOF
        words = line.split()
        if words[1:4] == ["FLOCK", "ADVISORY", "WRITE"] and words[5].endswith(":%d" % inode):
            return int(words[4])
    return None


def freeze(bucket, db, seconds=30):
    """Waits for the build that works on the bucket, stops it where it is, and returns its process number."""
    folder = pathlib.Path(db) / ("bucket%d" % bucket)
    pid = slurm.until("a build of bucket %d" % bucket, seconds, lambda: holder_of_lock(folder), 0.005)
    os.kill(pid, signal.SIGSTOP)
    assert not list(folder.glob("manifest-*")), "the build was over too soon"
    return pid


def start_build(plan, bucket, db):
    return subprocess.Popen([TOOL, "build", "--plan", str(plan), "--bucket", str(bucket), "--out", str(db)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=plain_environ())


# ---- plans ----

def test_same_files_same_plan(tmp_path):
    files, n_rows = files_of(tmp_path, [50, 30, 50, 20, 30, 90, 50, 30])
    plan, _ = pack(tmp_path, files, 100)
    first = plan.read_bytes()
    for seed in range(5):
        random.Random(seed).shuffle(files)
        pack(tmp_path, [os.path.relpath(f, os.getcwd()) for f in files], 100)
        assert plan.read_bytes() == first, seed
    told = json.loads(first)
    assert (told["bucket_rows"], told["dim"]) == (100, 24)
    assert all(b["files"] == sorted(b["files"]) and b["rows"] <= 100 for b in told["buckets"])
    # best fit decreasing: 90; 50 50; 50 30 20; 30 30
    assert sorted(b["rows"] for b in told["buckets"]) == [60, 90, 100, 100]
    assert sum(b["rows"] for b in told["buckets"]) == n_rows


def test_pack_reports_the_fill(tmp_path):
    files, _ = files_of(tmp_path, [90, 60, 20])
    out = tool("pack", *files, "--bucket-rows", 100, "--out", tmp_path / "p").stdout
    assert "bucket 1: 1 file, 90 rows, 90.0 % full" in out and "bucket 2: 2 files, 80 rows, 80.0 % full" in out
    assert "smallest: bucket 2 with 80 rows, largest: bucket 1 with 90 rows" in out and "170 rows of dimension 24, 85.0 %" in out
    out = json.loads(tool("pack", *files, "--bucket-rows", 100, "--out", tmp_path / "p", "--json").stdout)
    assert out["fill"] == [{"bucket": 1, "files": 1, "rows": 90, "full": .9}, {"bucket": 2, "files": 2, "rows": 80, "full": .8}]
    assert (out["buckets"], out["files"], out["rows"], out["smallest"], out["largest"], out["bucket_rows"]) == (2, 3, 170, 2, 1, 100)


def test_pack_names_every_file_it_cannot_read(tmp_path):
    files, _ = files_of(tmp_path, [5, 6, 7, 8])
    for bad in (1, 3):
        with open(files[bad], "r+b") as f:
            f.truncate(700)
    r = tool("pack", *files, "--bucket-rows", 10, "--out", tmp_path / "p", ok=False)
    assert files[1] in r.stderr and files[3] in r.stderr and "2 of 4 files cannot be read" in r.stderr and files[0] not in r.stderr
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("text, told", [
    ('{"buckets":[{"files":["%s"],"rows":-1}]}', "rows"), ('{"buckets":[{"files":["%s"],"rows":"5"}]}', "rows"),
    ('{"buckets":[{"files":["%s"],"rows":1.5}]}', "rows"), ('{"buckets":[{"files":["%s","%s"]}]}', "in bucket 1 and in bucket 1"),
    ('{"buckets":[{"files":["%s"]},{"files":["%s"]}]}', "in bucket 1 and in bucket 2"), ('{"buckets":[{"files":[]},"%s"]}', "bucket 2"),
    ('{"buckets":[{"files":[]}],"x":"%s"}', "no files"), ('{"dim":0,"buckets":[{"files":["%s"]}]}', "dim"),
    ('{"dim":"24","buckets":[{"files":["%s"]}]}', "dim"), ('["%s"]', "buckets"), ('{"buckets":[{"files":["%s"]}]', "plan.json"),
    ('{"dim":25,"buckets":[{"files":["%s"]}]}', "dimension"), ('{"buckets":[{"files":["%s"],"rows":6}]}', "they changed"),
])
def test_plans_that_cannot_be(tmp_path, text, told):
    files, _ = files_of(tmp_path, [5])
    plan = tmp_path / "plan.json"
    plan.write_text(text.replace("%s", files[0]))
    assert told in build_bucket(plan, 1, tmp_path / "db", ok=False).stderr
    assert not (tmp_path / "db").exists()


def test_plan_written_by_hand(tmp_path):
    files, _ = files_of(tmp_path, [5, 6])
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"buckets": [{"files": [files[1]]}, {"files": [files[0]]}]}))
    build_all(plan, 2, tmp_path / "db")
    assert "complete: 2 shards" in tool("verify", tmp_path / "db", "--plan", plan, "--quick").stdout


def test_build_takes_from_the_plan_what_pack_was_told(tmp_path):
    for name in ("a", "b"):
        np.random.default_rng(0).normal(size=(40, 12)).astype("<f4").tofile(tmp_path / (name + ".f32"))
        with h5py.File(tmp_path / (name + ".h5"), "w") as f:
            f["vectors"] = np.ones((30, 12), "<f4")
            f["names"] = np.arange(30)
    for kind, told in (("f32", ["--dim", 12]), ("h5", ["--embedding-dataset", "vectors", "--id-dataset", "none"])):
        plan, db = tmp_path / (kind + ".json"), tmp_path / (kind + "db")
        tool("pack", tmp_path / ("a." + kind), tmp_path / ("b." + kind), *told, "--bucket-rows", 40, "--out", plan)
        build_all(plan, 2, db)
        assert "sound: 2 shards, as the plan says" in tool("verify", db, "--plan", plan).stdout


# ---- tasks ----

def test_bucket_again(tmp_path):
    files, _ = files_of(tmp_path, [50, 40, 30])
    plan, n = pack(tmp_path, files, 70)
    db = tmp_path / "db"
    assert n == 2
    build_all(plan, n, db)
    before = contents(db)
    for f in files:
        os.rename(f, f + ".away")  # it is not even looked at
    assert "bucket2: built already, 70 rows" in build_bucket(plan, 2, db).stdout
    assert json.loads(build_bucket(plan, 1, db, "--json").stdout)["already"] is True
    for f in files:
        os.rename(f + ".away", f)
    for options in (["--metric", "l2"], ["--store", "f16"], ["--bad-rows", "skip"], ["--seed", 1], ["--id-dataset", "none"], ["--bits", 4]):
        assert "other options" in build_bucket(plan, 1, db, *options, ok=False).stderr
    build_bucket(plan, 1, db, "--threads", 1, "--memory", "64M")  # these make no other shard
    other, _ = pack(tmp_path, files, 90, "other.json")
    assert "other files" in build_bucket(other, 1, db, ok=False).stderr
    tool("build", files[0], "--out", db / "bucket3")
    third = tmp_path / "third.json"
    third.write_text(json.dumps({"buckets": json.loads(plan.read_text())["buckets"] + [{"files": [write_h5(tmp_path / "z.h5", 999, 3)]}]}))
    assert "not built from a plan" in build_bucket(third, 3, db, ok=False).stderr
    shutil.rmtree(db / "bucket3")
    assert contents(db) == before
    segment, = (db / "bucket1").glob("seg-*.ivf")
    os.truncate(segment, 100)
    assert segment.name in build_bucket(plan, 1, db, ok=False).stderr


def test_several_builds_of_one_bucket(tmp_path):
    files, _ = files_of(tmp_path, [9000])
    plan, _ = pack(tmp_path, files, 9000)
    db = tmp_path / "db"
    running = [start_build(plan, 1, db) for _ in range(4)]
    ends = [(p.communicate(timeout=120), p.returncode) for p in running]
    assert [code for _, code in ends] == [0] * 4, ends
    assert sum("built already" in out for (out, _), _ in ends) == 3
    assert sorted(os.listdir(db)) == ["bucket1"] and len(os.listdir(db / "bucket1")) == 2
    assert "sound: 1 shard" in tool("verify", db, "--plan", plan).stdout


def test_killed_build_while_another_waits(tmp_path):
    files, n_rows = files_of(tmp_path, [9000])
    plan, _ = pack(tmp_path, files, 9000)
    db, undisturbed = tmp_path / "db", tmp_path / "undisturbed"
    build_bucket(plan, 1, undisturbed)
    first = start_build(plan, 1, db)
    slurm.until("its temporary file", 60, lambda: list((db / "bucket1").glob(".seg-*.tmp")), 0.001)
    assert freeze(1, db) == first.pid
    second = start_build(plan, 1, db)
    assert "waiting for it" in second.stderr.readline()
    assert second.poll() is None and missing(db, plan) == "1\n"
    first.kill()
    first.wait()
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0 and "%d rows" % n_rows in out and "already" not in out, (out, err)
    assert contents(db) == contents(undisturbed)


def test_waiting_build_is_interrupted(tmp_path):
    files, _ = files_of(tmp_path, [9000])
    plan, _ = pack(tmp_path, files, 9000)
    first = start_build(plan, 1, tmp_path / "db")
    assert freeze(1, tmp_path / "db") == first.pid
    second = start_build(plan, 1, tmp_path / "db")
    try:
        assert "waiting for it" in second.stderr.readline()
        second.send_signal(signal.SIGTERM)
        _, err = second.communicate(timeout=20)
        assert second.returncode == 1 and "interrupted" in err
    finally:
        second.kill()
        first.send_signal(signal.SIGCONT)
        out, _ = first.communicate(timeout=120)
    assert first.returncode == 0 and "9000 rows" in out


# ---- the check ----

@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """A plan of six buckets, and its database, complete."""
    folder = tmp_path_factory.mktemp("checked")
    files, n_rows = files_of(folder, [60, 50, 40, 30, 20, 10] * 2)
    plan, n = pack(folder, files, 70)
    assert n == 6
    build_all(plan, n, folder / "db")
    return plan, folder / "db", n_rows


@pytest.fixture
def copy(checked, tmp_path):
    shutil.copytree(checked[1], tmp_path / "db")
    return checked[0], tmp_path / "db"


def check(db, plan, *options, ok=False):
    r = tool("verify", db, "--plan", plan, "--quick", *options, ok=ok)
    full = tool("verify", db, "--plan", plan, *options, ok=ok)
    if "--json" not in options:
        assert not ok or "complete: 6 shards, as the plan says" in r.stdout and "sound: 6 shards, as the plan says" in full.stdout
    return r.stdout


def test_check_of_what_is_complete(checked):
    plan, db, n_rows = checked
    check(db, plan, ok=True)
    assert json.loads(check(db, plan, "--json", ok=True)) == {"faults": [], "sound": True, "shards": 6, "buckets": 6, "build_again": []}
    assert missing(db, plan) == missing(db, plan, "array") == ""
    assert all_ids(db) == sorted("r%d" % i for i in range(n_rows))


def test_check_of_what_is_missing(copy):
    plan, db = copy
    for bucket in (1, 4, 5, 6):
        shutil.rmtree(db / ("bucket%d" % bucket))
    assert missing(db, plan) == "1\n4\n5\n6\n" and missing(db, plan, "array") == "1,4-6\n"
    out = check(db, plan)
    assert "bucket4: is missing" in out and "buckets to build (again): 1,4-6" in out
    assert json.loads(check(db, plan, "--json"))["build_again"] == [1, 4, 5, 6]
    for name in os.listdir(db):
        shutil.rmtree(db / name)
    assert missing(db, plan, "array") == "1-6\n"
    os.rmdir(db)
    assert missing(db, plan, "array") == "1-6\n"


def test_check_of_a_build_that_died(copy):
    plan, db = copy
    manifest, = (db / "bucket2").glob("manifest-*")
    manifest.unlink()  # the last thing that a build writes
    assert missing(db, plan) == "2\n"
    build_bucket(plan, 2, db)
    check(db, plan, ok=True)


def test_check_of_what_is_twice_or_foreign(copy, tmp_path):
    plan, db = copy
    shutil.rmtree(db / "bucket2")
    shutil.copytree(db / "bucket3", db / "bucket2")
    shutil.copytree(db / "bucket1", db / "bucket7")
    shutil.copytree(db / "bucket1", db / "bucket01")
    os.mkdir(db / "notes")
    out = check(db, plan)
    assert "bucket2: was built from other files" in out and "buckets to build (again): 2\n" in out
    assert "bucket7: is no bucket" in out and "bucket01: is no bucket" in out and "notes" not in out
    assert missing(db, plan) == "2\n"
    assert "is a shard" in tool("verify", db / "bucket1", "--plan", plan, ok=False).stderr
    x = np.random.default_rng(1).normal(size=(70, 24)).astype("<f4")
    np.save(tmp_path / "x.npy", x)
    shutil.rmtree(db / "bucket2")
    tool("build", tmp_path / "x.npy", "--out", db / "bucket2")  # as many rows
    assert "bucket2: was not built from a plan" in check(db, plan)


def test_check_of_what_is_damaged(copy):
    plan, db = copy
    segment, = (db / "bucket5").glob("seg-*.ivf")
    segment.unlink()
    assert segment.name in check(db, plan) and missing(db, plan) == "5\n"
    shutil.copy(next((db / "bucket6").glob("seg-*.ivf")), segment)
    assert missing(db, plan) == ""  # of the right size: only reading tells
    r = tool("verify", db, "--plan", plan, ok=False)
    assert "checksum" in r.stdout and "buckets to build (again): 5" in r.stdout
    shutil.rmtree(db / "bucket5")
    build_bucket(plan, 5, db)
    with open(segment, "r+b") as f:  # only reading finds it
        f.seek(500)
        byte = f.read(1)
        f.seek(500)
        f.write(bytes([byte[0] ^ 1]))
    assert missing(db, plan) == ""
    r = tool("verify", db, "--plan", plan, ok=False)
    assert "checksum" in r.stdout and "buckets to build (again): 5" in r.stdout
    manifest, = (db / "bucket4").glob("manifest-*")
    text = manifest.read_text()
    manifest.write_text(text.replace('"built":{"rows":70,"skipped":0', '"built":{"rows":70,"skipped":1'))
    assert manifest.read_text() != text and "bucket4: holds 70 rows; its input had 70, of which 1 were bad" in check_output(db, plan)
    manifest.write_text("{")
    assert "bucket4" in check_output(db, plan) and missing(db, plan, "array") == "4\n"


def check_output(db, plan):
    return tool("verify", db, "--plan", plan, "--quick", ok=False).stdout


def test_check_of_what_cannot_be_searched_together(copy):
    plan, db = copy
    shutil.rmtree(db / "bucket3")
    build_bucket(plan, 3, db, "--metric", "l2")
    assert "bucket3: has metric l2 and" in check_output(db, plan)


def test_rows_that_a_build_leaves_out_are_not_missing(tmp_path):
    files, n_rows = files_of(tmp_path, [40, 30])
    with h5py.File(files[0], "r+") as f:
        x = f["embedding"][:]
        x[3, 1], x[17, 0] = np.nan, np.inf
        f["embedding"][:] = x
        ids = f["id"][:]
        ids[9] = ids[8]
        f["id"][:] = ids
    plan, _ = pack(tmp_path, files, 70)
    build_bucket(plan, 1, tmp_path / "db", "--bad-rows", "skip", "--duplicates", "first")
    assert len(all_ids(tmp_path / "db")) == n_rows - 3
    assert "sound: 1 shard" in tool("verify", tmp_path / "db", "--plan", plan).stdout
    assert json.loads(tool("info", tmp_path / "db", "--json").stdout)["shards"][0]["built"] == {"rows": 70, "skipped": 2, "duplicates": 1}
    assert "built already, 67 rows" in build_bucket(plan, 1, tmp_path / "db", "--bad-rows", "skip", "--duplicates", "first").stdout


@pytest.mark.parametrize("args, told", [(["--quick"], "--quick needs --plan"), (["--missing", "lines"], "--missing needs --plan"),
                                        (["--plan", "p", "--missing", "array", "--json"], "not both"), (["--plan", "p", "--missing"], "--missing")])
def test_verify_is_used_wrongly(tmp_path, args, told):
    r = subprocess.run([TOOL, "verify", str(tmp_path), *args], capture_output=True, text=True, env=plain_environ())
    assert r.returncode == 2 and told in r.stderr


def test_check_with_a_plan_that_is_none(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    r = subprocess.run([TOOL, "verify", str(tmp_path), "--plan", str(tmp_path / "plan.json"), "--missing", "lines"],
                       capture_output=True, text=True, env=plain_environ())
    assert (r.returncode, r.stdout) == (1, "") and "plan.json" in r.stderr


# ---- GNU parallel ----

only_once = pytest.mark.plain_only("a test of scripts, which are the same in every build")

def script(name, *args, ok=True, env=None):
    r = subprocess.run([str(ROOT / "tool" / name), *map(str, args)], capture_output=True, text=True, timeout=300, env={**SCRIPT_ENV, **(env or {})})
    assert (r.returncode == 0) == ok, (args, r.returncode, r.stdout[-2000:], r.stderr[-2000:])
    return r


@only_once
@pytest.mark.skipif(not shutil.which("parallel"), reason="GNU parallel is not installed")
def test_parallel(tmp_path):
    folder = tmp_path / "with space"
    folder.mkdir()
    files, n_rows = files_of(folder, [60, 50, 40, 30, 20, 10])
    plan, n = pack(folder, files, 70)
    db = folder / "my db"
    os.rename(files[0], files[0] + ".away")
    r = script("parallel-build.sh", "--plan", plan, "--out", db, "--tries", 2, "--", "--metric", "l2", ok=False)
    assert "part00.h5" in r.stdout and "not complete" in r.stderr and len(missing(db, plan).split()) == 1
    os.rename(files[0] + ".away", files[0])
    before = contents(db)
    r = script("parallel-build.sh", "--plan", plan, "--out", db, "--", "--metric", "l2")
    assert "complete: %d shards, as the plan says" % n in r.stdout and r.stdout.count(" rows, ") == 1
    assert before.items() <= contents(db).items() and all_ids(db) == sorted("r%d" % i for i in range(n_rows))
    assert '"metric":"l2"' in tool("info", db, "--json").stdout
    assert "complete" in script("parallel-build.sh", "--plan", plan, "--out", db).stdout
    for args in (["--plan", plan], ["--plan", plan, "--out", db, "--jobs", 0], ["--plan", plan, "--out", db, "--bogus", 1], ["--tries"]):
        script("parallel-build.sh", *args, ok=False)


@only_once
@pytest.mark.skipif(not shutil.which("parallel"), reason="GNU parallel is not installed")
def test_readme_with_parallel(tmp_path, s3):
    block, = re.findall(r"^```sh farm\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    os.mkdir(tmp_path / "parts")
    files, n_rows = files_of(tmp_path / "parts", [60, 50, 40])
    os.symlink(BUILD, tmp_path / "build")
    uri = s3.uri("db")
    block = block.replace("--bucket-rows 10000000", "--bucket-rows 90").replace("s3://my-bucket/db", uri)
    r = subprocess.run(["bash", "-ec", block], cwd=tmp_path, capture_output=True, text=True, timeout=300, env=plain_environ(s3.env))
    assert r.returncode == 0 and "complete: 2 shards" in r.stdout, r
    assert json.loads(tool("info", uri, "--json", env=s3.env).stdout)["rows"] == n_rows


# ---- Slurm ----

needs_slurm = pytest.mark.skipif(bool(slurm.missing()), reason="%s is not installed (tool/install-deps test)" % ", ".join(slurm.missing()))


def test_scripts_explain_themselves():
    for name in ("slurm-build.sh", "parallel-build.sh"):
        assert "usage: " + name in script(name, "--help").stdout


@only_once
@needs_slurm
def test_slurm(tmp_path, s3):
    """Seven buckets on three nodes. A build is killed; a node dies with its jobs; another is cut off while its job goes on, which Slurm
    then starts a second time elsewhere; a finished one is started again. The indices of an array end at 3 here: the array is cut in three."""
    files, n_rows = files_of(tmp_path, [6000, 3000] * 7)
    plan, n = pack(tmp_path, files, 9000)
    assert n == 7
    db, logs, uri = tmp_path / "db", tmp_path / "db.logs", s3.uri("farm")
    with slurm.Slurm(nodes=3, max_array=4) as cluster:
        env = {**s3.env, **cluster.env}
        run = ["--plan", plan, "--out", db, "--mem", "512M", "--pause", 1, "--publish", uri]  # --publish last
        try:
            told = script("slurm-build.sh", *run, "--", "--metric", "l2", env=env).stdout
            assert "7 buckets to build" in told
            job = told.split("jobs ")[1].split()[0]
            killed, dying, cut_off = freeze(1, db), freeze(2, db), freeze(3, db)
            node = {bucket: int(builds_of(bucket, db)[0][2][b"SLURMD_NODENAME"][1:]) for bucket in (1, 2, 3)}
            assert len(set(node.values())) == 3

            cluster.node_dies(node[2])
            cluster.node_dies(node[3], with_jobs=False)
            os.kill(killed, signal.SIGKILL)  # its script tries again, in the same job
            slurm.until("the second try", 30, lambda: "try 2" in (logs / "bucket1.log").read_text())
            assert not slurm.is_alive(dying) and slurm.is_alive(cut_off)
            for bucket in (2, 3):
                cluster.wait_for_state(node[bucket], "down")
            # as after a crash of the controller, which forgets what ended last: a task that was done runs again
            slurm.until("the end of bucket 1", 30, lambda: (logs / "bucket1.log").read_text().endswith("done\n"))
            cluster.run("scontrol", "requeue", job + "_1")
            slurm.until("bucket 3 to be started elsewhere", 60, lambda: len(builds_of(3, db)) == 2)
            cluster.node_returns(node[2])
            os.kill(cut_off, signal.SIGCONT)
            slurm.until("the end of the build that was cut off", 60, lambda: not slurm.is_alive(cut_off))
            cluster.node_returns(node[3])
            slurm.until("the end of all jobs", 120, lambda: not cluster.run("squeue", "-h").stdout.strip(), 0.3)
        except BaseException:
            print(cluster.run("squeue", check=False).stdout, cluster.logs())
            for log in sorted(logs.glob("*")):
                print("====", log.name, log.read_text()[-3000:], sep="\n")
            raise
        told = (logs / "bucket3.log").read_text()
        for text in ("started again by Slurm", "waiting for it", "built already"):
            assert text in told
        assert "built already" in (logs / "bucket1.log").read_text()
        assert "started again by Slurm" in (logs / "bucket2.log").read_text()
        assert "complete: 7 shards, as the plan says" in (logs / "check.log").read_text()
        # once more: nothing to build, and what is published is not sent again
        script("slurm-build.sh", *run, "--wait", env=env)
        assert (logs / "publish.log").read_text().count("try 1") == 2
        # a database that cannot be completed: the check says so, and nothing is published
        os.rename(db / "bucket4", tmp_path / "kept")
        lost = json.loads(plan.read_text())["buckets"][3]["files"][0]
        os.rename(lost, lost + ".away")
        r = script("slurm-build.sh", *run[:-1], uri + "-not", "--tries", 2, "--pause", 0, "--wait", ok=False, env=env)
        assert "CANCELLED" in r.stderr and "try 2" in (logs / "bucket4.log").read_text() and not (db / "bucket4").exists()
        assert "bucket4: is missing" in (logs / "check.log").read_text()
        os.rename(lost + ".away", lost), os.rename(tmp_path / "kept", db / "bucket4")
    assert sorted(os.listdir(db)) == ["bucket%d" % (i + 1) for i in range(n)]
    assert all_ids(db) == sorted("r%d" % i for i in range(n_rows))
    tool("verify", db, "--plan", plan)
    tool("verify", uri, "--plan", plan, env=s3.env)
    assert subprocess.run([TOOL, "info", uri + "-not"], capture_output=True, env=plain_environ(s3.env)).returncode == 1
    assert json.loads(tool("info", uri, "--json", env=s3.env).stdout)["rows"] == n_rows
