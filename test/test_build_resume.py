"""A build that is killed, interrupted, out of space or cut off from its input: no shard that a reader accepts half, nothing left
behind that is not named, and `--resume` gives the bytes of an undisturbed build.

The kills at random moments are seeded (SEED); `make soak` does fifty of them (campaign `resume`). What each stage leaves is
damaged byte by byte as well: then the build starts over.
"""
import glob
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time

import h5py
import numpy as np
import pytest
from conftest import BUILD, few_directions, plain_environ

TOOL = str(BUILD / "vecshard")
ENV = {k: v for k, v in plain_environ().items() if k != "TMPDIR"}  # working folders lie in the output folder
SEED = 20261128
ROWS, DIM = 30000, 48


def contents(folder):
    return {os.path.basename(f): open(f, "rb").read() for f in glob.glob(str(folder) + "/*")}


def hidden(folder):
    return [f for f in os.listdir(folder) if f.startswith(".")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file with text ids, of which some are long, a filterable and a stored column; and what an undisturbed build makes of it."""
    d = tmp_path_factory.mktemp("resume")
    rng = np.random.default_rng(SEED)
    with h5py.File(d / "x.h5", "w") as f:
        f["embedding"] = few_directions(ROWS, DIM, SEED)  # codes are of directions, which are kept, too
        f.create_dataset("id", data=np.array(["id%d" % i if i % 50 else "long" * 20 + str(i) for i in range(ROWS)], dtype=object),
                         dtype=h5py.string_dtype())
        f["n"] = np.arange(ROWS)
        f.create_dataset("t", data=np.array(["text %d" % (i % 97) for i in range(ROWS)], dtype=object), dtype=h5py.string_dtype())
    build(d, d / "whole")
    dump = subprocess.run([TOOL, "dump", d / "whole"], capture_output=True, text=True).stdout
    assert int(dump.split(" turn ")[1].split()[0]) > 0
    return d, contents(d / "whole")


def arguments(d, out, *more):
    return [TOOL, "build", str(d / "x.h5"), "--metric", "l2", "--column", "n", "--column", "t:stored", "--memory", "16M", "--out", str(out),
            *map(str, more)]


def build(d, out, *more, want=0, **options):
    r = subprocess.run(arguments(d, out, *more), capture_output=True, text=True, errors="replace", timeout=300, env=ENV, **options)
    assert r.returncode == want, (r.returncode, r.stdout, r.stderr)
    return r


def start(d, out, *more):
    return subprocess.Popen(arguments(d, out, *more), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV)


def kill_when(d, out, pattern, *more):
    """Starts a build and ends it with SIGKILL as soon as a file of that name is there; again when the build was faster."""
    end = time.time() + 120
    for _ in range(20):
        p = start(d, out, *more)
        while p.poll() is None and time.time() < end:
            if glob.glob(pattern):
                p.kill()
                p.communicate()
                if p.returncode == -signal.SIGKILL and glob.glob(pattern):
                    return
        if time.time() >= end:
            p.kill()
            pytest.fail("no %s within two minutes: %s" % (pattern, p.communicate()[1]))
        shutil.rmtree(out, ignore_errors=True)
    pytest.fail("the build was always done before the signal")


def verified(out):
    return subprocess.run([TOOL, "verify", str(out)], capture_output=True, text=True, env=ENV).returncode == 0


@pytest.mark.parametrize("state, after", [("model", "training"), ("rows", "encoding")])
def test_goes_on_after_each_stage(data, tmp_path, state, after):
    d, whole = data
    out, tmp = tmp_path / "s", tmp_path / "tmp"
    tmp.mkdir()
    kill_when(d, out, "%s/.vecshard-build-*/%s.state" % (tmp, state), "--tmpdir", tmp, "--resume", "--threads", 1)
    assert not contents(out).keys() & whole.keys(), "no manifest and no segment yet"
    r = build(d, out, "--tmpdir", tmp, "--resume", "--threads", 2)
    assert "going on after " + after in r.stderr
    assert contents(out) == whole and verified(out)
    assert os.listdir(tmp) == [] and hidden(out) == []


def test_goes_on_after_the_segment(data, tmp_path):
    """The moment between a complete segment and its shard is short: a folder of the segment's name holds the build up there."""
    d, whole = data
    out = tmp_path / "s"
    segment = [f for f in whole if f.endswith(".ivf")][0]
    (out / segment / "in the way").mkdir(parents=True)
    assert "the same command goes on from there" in build(d, out, "--resume", want=1).stderr
    assert glob.glob("%s/.vecshard-build-*/segment.state" % out) and not glob.glob(str(out / "manifest-*"))
    shutil.rmtree(out / segment)
    (out / ".seg-build.tmp").write_bytes(whole[segment])  # which a kill leaves there, and an error does not
    with open(out / ".seg-build.tmp", "r+b") as f:
        f.seek(1000)
        byte = f.read(1)
        f.seek(1000), f.write(bytes([byte[0] ^ 1]))
    (out / ".manifest-18446744073709551614.tmp-1-abcdef").write_text("of a commit that was killed")
    kept = str(tmp_path / "kept")
    shutil.copytree(out, kept)
    assert "going on after encoding" in build(d, out, "--resume").stderr, "a damaged segment is written again"
    assert contents(out) == whole
    shutil.rmtree(out), shutil.copytree(kept, out)
    with open(out / ".seg-build.tmp", "r+b") as f:
        f.seek(1000), f.write(byte)
    assert "going on after writing" in build(d, out, "--resume").stderr
    assert contents(out) == whole and hidden(out) == [] and verified(out)


@pytest.mark.plain_only("the moments of its kills are the point")
def test_random_kills(data, tmp_path):
    """Killed several times in a row, at random moments, at changing numbers of threads."""
    d, whole = data
    rng = random.Random(SEED)
    began = time.time()
    build(d, tmp_path / "timed", "--resume")
    length = time.time() - began
    for i in range(4):
        out = tmp_path / ("s%d" % i)
        for _ in range(3):
            p = start(d, out, "--resume", "--threads", rng.choice([1, 2]))
            time.sleep(rng.random() * length)
            p.kill()
            p.communicate()
            if glob.glob(str(out / "manifest-*")):
                break
        if not glob.glob(str(out / "manifest-*")):
            build(d, out, "--resume")
        assert contents(out) == whole, "seed %d round %d" % (SEED, i)
        assert verified(out)


def test_without_resume_what_is_left_goes(data, tmp_path):
    d, whole = data
    out = tmp_path / "s"
    kill_when(d, out, "%s/.vecshard-build-*/model.state" % out)
    left = hidden(out)
    assert len(left) == 1
    p = start(d, out)
    assert left[0] in p.stderr.readline()
    p.send_signal(signal.SIGSTOP)  # it holds the lock
    try:
        assert "another build is at work" in build(d, out, "--resume", want=1).stderr
    finally:
        p.send_signal(signal.SIGCONT)
    assert p.wait() == 0
    assert contents(out) == whole and hidden(out) == []


@pytest.mark.plain_only("many builds of one kind; their code runs in the other tests")
def test_other_options_and_inputs_start_over(data, tmp_path):
    d, whole = data
    out = tmp_path / "s"
    kill_when(d, out, "%s/.vecshard-build-*/model.state" % out, "--resume", "--seed", 7)
    r = build(d, out, "--resume")
    assert "starting over" in r.stderr and "--seed 7" in r.stderr and "--seed 0" in r.stderr and "going on" not in r.stderr
    assert contents(out) == whole
    shutil.rmtree(out)
    shutil.copy(d / "x.h5", tmp_path / "x.h5")
    kill_when(tmp_path, out, "%s/.vecshard-build-*/model.state" % out, "--resume")
    os.utime(tmp_path / "x.h5", (1, 1))
    r = build(tmp_path, out, "--resume")
    assert "starting over" in r.stderr and "input" in r.stderr
    assert contents(out) == whole
    shutil.rmtree(out)
    assert "from the beginning" in build(d, out, "--resume").stderr


def test_damaged_state_starts_over(data, tmp_path):
    d, whole = data
    kept, out = tmp_path / "kept", tmp_path / "s"
    kill_when(d, out, "%s/.vecshard-build-*/rows.state" % out, "--resume")
    rng = random.Random(SEED + 1)
    folder = [f for f in hidden(out) if f.startswith(".vecshard-build-")][0]
    shutil.copytree(out, kept)
    for victim, after in (("rows.state", "training"), ("scan.runs", "training"), ("row.runs", "training"), ("model.state", None), ("key", None)):
        for cut in (False, True) if victim.endswith(".state") else (False,):  # test_runs of test_ivfpq.c cuts the runs
            shutil.rmtree(out), shutil.copytree(kept, out)
            path = out / folder / victim
            b = bytearray(path.read_bytes())
            at = rng.randrange(len(b))
            b[at] ^= 1 << rng.randrange(8)
            path.write_bytes(b[:at] if cut else b)
            r = build(d, out, "--resume")
            assert ("going on after " + after in r.stderr) if after else "going on" not in r.stderr, (victim, cut, at, r.stderr)
            assert contents(out) == whole, (victim, cut, at)
    shutil.rmtree(out), shutil.copytree(kept, out)
    os.chmod(out / folder, 0o777)
    assert "others may write" in build(d, out, "--resume", want=1).stderr


@pytest.mark.parametrize("resume", [False, True])
def test_interrupt(data, tmp_path, resume):
    """Without --resume nothing is left; with it the folder is kept and named."""
    d, whole = data
    out, tmp = tmp_path / "s", tmp_path / "tmp"
    tmp.mkdir()
    p = start(d, out, "--tmpdir", tmp, "--threads", 1, *(["--resume"] if resume else []))
    until = time.time() + 60
    while not glob.glob(str(tmp) + "/.vecshard-build-*/model.state") and p.poll() is None and time.time() < until:
        pass
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=60)[1]
    assert p.returncode == 1 and "interrupted" in err
    assert not out.exists()
    if not resume:
        assert os.listdir(tmp) == []
        return
    assert len(os.listdir(tmp)) == 1 and os.listdir(tmp)[0] in err
    assert "going on after" in build(d, out, "--tmpdir", tmp, "--resume").stderr
    assert contents(out) == whole and os.listdir(tmp) == []


@pytest.mark.parametrize("resume", [False, True])
def test_full_disk(data, tmp_path, resume):
    """A limit on the size of files is met at ever later moments, until the build gets through."""
    d, whole = data
    out, seen = tmp_path / "s", set()
    for kib in (10, 300, 1500, 6100, 7000, 100000):
        options = ["--resume"] if resume else []
        r = subprocess.run(arguments(d, out, *options), capture_output=True, text=True, timeout=300, env=ENV, preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (kib << 10, kib << 10))))
        if r.returncode == 0:
            break
        assert r.returncode == 1 and "write failed" in r.stderr and "File too large" in r.stderr, r.stderr
        seen.add(r.stderr)
        if resume and "vecshard: kept " in r.stderr:
            assert len(hidden(out)) == 1 and hidden(out)[0] in r.stderr and contents(out) == {}
        else:
            assert not out.exists()
    assert len(seen) >= 3 and contents(out) == whole and hidden(out) == []


def test_input_cut_while_it_is_read(tmp_path):
    x = np.random.default_rng(SEED).normal(size=(200000, 64)).astype("<f4")
    x.tofile(tmp_path / "x.f32")
    out = tmp_path / "s"
    p = subprocess.Popen([TOOL, "build", str(tmp_path / "x.f32"), "--dim", "64", "--metric", "l2", "--memory", "16M", "--out", str(out)],
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV)
    until = time.time() + 60
    while not glob.glob(str(out) + "/.vecshard-build-*/model.state") and p.poll() is None and time.time() < until:
        time.sleep(0.001)
    os.truncate(tmp_path / "x.f32", 1000 * 64 * 4)
    err = p.communicate(timeout=100)[1]
    if p.returncode == 0:
        pytest.skip("all rows had been read")
    assert p.returncode == 1 and "x.f32" in err, err
    assert not out.exists()


def test_progress_lines(data, tmp_path):
    d, _ = data
    r = build(d, tmp_path / "s", "--json")
    lines = [json.loads(line) for line in r.stderr.splitlines()]
    assert "plan" in lines[0] and "temporary" in lines[0]["plan"]
    stages = [line["stage"] for line in lines[1:]]
    assert [s for i, s in enumerate(stages) if i == 0 or s != stages[i - 1]] == \
        ["sample", "train centroids", "train code words", "encode", "write codes", "write rows", "calibrate"]
    last = {line["stage"]: line for line in lines[1:]}
    for s in ("encode", "write codes", "write rows"):
        assert last[s]["done"] == last[s]["total"] == ROWS and last[s]["rows_per_second"] > 0 and last[s]["mb_per_second"] > 0
    result = json.loads(r.stdout)
    assert result["rows"] == ROWS and result["peak_bytes"] > 1 << 20 and result["temp_bytes"] > ROWS * DIM * 4


def test_too_little_memory_is_refused_with_the_least(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(SEED).normal(size=(6000, 256)).astype("<f4"))
    args = [TOOL, "build", str(tmp_path / "x.npy"), "--out", str(tmp_path / "s"), "--partitions", "5000"]
    r = subprocess.run([*args, "--memory", "16M"], capture_output=True, text=True, env=ENV)
    assert r.returncode == 1 and "need --memory 21M at least" in r.stderr and os.listdir(tmp_path) == ["x.npy"], r.stderr
