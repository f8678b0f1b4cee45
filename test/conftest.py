"""Shared by the SQL tests: connections with the extension, the tool, and small shards made from numpy arrays.

`db` is a connection, connect(path) makes more; `tool(*args)` runs the command line; `make_shard(...)` builds a shard once per
session and returns what went in, with brute force over it as the truth. VECSHARD_BUILD names another build folder, relative
to the project; tests marked plain_only are left out there. Needs a Python whose sqlite3 loads extensions (Debian: /usr/bin/python3).

`s3` is a real object store on this machine, started when the first test asks for it and ended with the session, or with the
process whose number is in VECSHARD_S3_OWNER; `proxy` stands in front of it and breaks things. VECSHARD_S3_DIR names a folder
whose store is used, started where it does not run, and left running (test/s3/rgw.py stop DIR ends it): saves five seconds.
VECSHARD_TEST_NO_S3=1: without the packages that a store needs, these tests are skipped instead of failing.
"""
import itertools
import json
import os
import pathlib
import sqlite3
import shutil
import struct
import subprocess
import tempfile
import time

import numpy as np
import pytest
from s3.client import Client
from s3.fault_proxy import FaultProxy
from s3.rgw import MISSING, environment

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / os.environ.get("VECSHARD_BUILD", "build")


def connect(path=":memory:"):
    c = sqlite3.connect(str(path), isolation_level=None, uri=True)
    c.enable_load_extension(True)
    c.load_extension(str(BUILD / "vecshard"))
    c.enable_load_extension(False)
    return c


def blob(v):
    """A sequence of numbers as the float32 BLOB that vecshard takes for a vector."""
    return struct.pack("<%df" % len(v), *v)


def plain_environ(env=None):
    """This process's environment for programs with libraries of their own: an address-sanitized one is preloaded into Python only.
    With env, that replaces all settings of S3."""
    kept = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD" and not (env is not None and k.startswith("AWS_"))}
    return {**kept, **(env or {})}


def use_environ(monkeypatch, env):
    """The settings of S3 for the extension in this process, until the test ends: use_environ(monkeypatch, proxy.env)."""
    for name in [k for k in os.environ if k.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)


def tool(*args, ok=True, env=None):
    """Runs the command-line tool; ok=False: its failure is what the test is about. env: the settings of S3, such as s3.env."""
    r = subprocess.run([str(BUILD / "vecshard"), *map(str, args)], capture_output=True, text=True, timeout=300, env=plain_environ(env))
    assert (r.returncode == 0) == ok, (args, r.returncode, r.stdout[-500:], r.stderr[-500:])
    return r


class Shard:
    """A shard and what it was made from. Rows keep their order here; `ids` is what the shard calls them."""

    def __init__(self, path, x, ids, columns, metric):
        self.path, self.x, self.ids, self.columns, self.metric = str(path), x, list(ids), columns, metric
        self.at = {i: n for n, i in enumerate(self.ids)}

    def distances(self, q):
        """From q to every row, in float64."""
        x, q = self.x.astype(np.float64), np.asarray(q, dtype=np.float32).astype(np.float64)
        if self.metric == "l2":
            return np.sqrt(((x - q) ** 2).sum(axis=1))
        if self.metric == "dot":
            return -(x @ q)
        return 1 - (x @ q) / (np.linalg.norm(x, axis=1) * np.linalg.norm(q))

    def nearest(self, q, k, where=None):
        """Ids of the k nearest rows for which where(row number) holds; ties by id."""
        d = self.distances(q)
        rows = [n for n in range(len(self.ids)) if where is None or where(n)]
        return [self.ids[n] for n in sorted(rows, key=lambda n: (d[n], self.ids[n]))[:k]]

    def value(self, column, n):
        """What SQL shows for a column: NaN is NULL."""
        v = self.columns[column][n]
        return None if v != v else v


def write_input(path, x, ids=None, columns=None):
    """Vectors as HDF5 where there are ids or columns, else as .npy; returns the file's path."""
    if ids is None and not columns:
        np.save(str(path) + ".npy", x)
        return str(path) + ".npy"
    import h5py
    text = h5py.string_dtype("utf-8")
    with h5py.File(str(path) + ".h5", "w") as f:
        f.create_dataset("embedding", data=x)
        for name, values in {"id": ids, **(columns or {})}.items():
            if values is None:
                continue
            is_text = len(values) and isinstance(values[0], str)
            f.create_dataset(name, data=np.array(values, dtype=object) if is_text else np.asarray(values), dtype=text if is_text else None)
    return str(path) + ".h5"


def build_shard(path, x, ids=None, columns=None, metric="l2", kinds=None, options=()):
    """Builds a shard in the folder `path`. columns: name -> one value per row; kinds: name -> filter (default), index, stored."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.ascontiguousarray(x, dtype="<f4")
    source = write_input(path.parent / (path.name + "-input"), x, ids, columns)
    wanted = [a for name in columns or {} for a in ("--column", name + ":" + (kinds or {}).get(name, "filter"))]
    how = ("--id-dataset", "none") if ids is None and columns else ()
    tool("build", source, "--out", path, "--metric", metric, *wanted, *how, *options)
    os.unlink(source)
    return Shard(path, x, range(len(x)) if ids is None else ids, columns or {}, metric)


def clustered(n, dim, seed, centers=24):
    rng = np.random.default_rng(seed)
    c = rng.normal(size=(centers, dim)) * 2
    return (c[rng.integers(0, centers, n)] + rng.normal(size=(n, dim))).astype("<f4")


def few_directions(n, dim, seed, directions=8):
    """Rows whose residuals codes can be of principal directions of."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, directions)) @ rng.normal(size=(directions, dim))
    return (x + .02 * rng.normal(size=(n, dim))).astype("<f4")


def pytest_configure(config):
    config.addinivalue_line("markers", "plain_only(why): left out where VECSHARD_BUILD names a sanitized build, because it proves nothing more there")


def pytest_collection_modifyitems(items):
    for item in items:
        mark = item.get_closest_marker("plain_only")
        if mark and BUILD.name != "build":
            item.add_marker(pytest.mark.skip(reason="without sanitizers only: " + mark.args[0]))


@pytest.fixture
def db():
    c = connect()
    yield c
    c.close()


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def build():
    return BUILD


@pytest.fixture(scope="session")
def make_shard(tmp_path_factory):
    """make_shard("name", x, ...) as build_shard, in a folder of the session; a name is built once."""
    folder, made = tmp_path_factory.mktemp("shards"), {}

    def make(name, *args, **options):
        if name not in made:
            made[name] = build_shard(folder / name, *args, **options)
        return made[name]

    return make


class Store:
    """The object store and who speaks to it."""

    def __init__(self, described):
        self.endpoint, self.dns_name, self.region = described["endpoint"], described["dns_name"], described["region"]
        self.env, self.other_env = environment(described, "main"), environment(described, "other")
        self.client = self.client_at(self.endpoint)
        self.other = Client(self.endpoint, *described["other"].values())  # has no rights on what `client` owns
        self.anonymous = Client(self.endpoint, anonymous=True)
        self.run, self.numbers, self.shared = "%x" % time.time_ns(), itertools.count(1), None  # a kept store has buckets of earlier runs

    def client_at(self, endpoint):
        return Client(endpoint, self.env["AWS_ACCESS_KEY_ID"], self.env["AWS_SECRET_ACCESS_KEY"])

    def bucket(self, name="test", **options):
        """Makes a new bucket and returns its name, which begins with the one given."""
        bucket = "%s-%s-%d" % (name, self.run, next(self.numbers))
        self.client.create_bucket(bucket, **options)
        return bucket

    def uri(self, prefix=""):
        """s3:// of a place in a bucket that all tests of the session share, below a name that nobody else gets."""
        if self.shared is None:
            self.shared = self.bucket("shared")
        return "s3://%s/%d%s" % (self.shared, next(self.numbers), "/" + prefix if prefix else "")


def rgw(*args):
    return subprocess.run(["/usr/bin/python3", str(ROOT / "test/s3/rgw.py"), *map(str, args)], capture_output=True, text=True, timeout=600,
                          env=plain_environ())


@pytest.fixture(scope="session")
def s3():
    kept = os.environ.get("VECSHARD_S3_DIR")
    folder = kept or tempfile.mkdtemp(prefix="vecshard-s3-")
    owner = os.environ.get("VECSHARD_S3_OWNER") if kept else os.getpid()
    try:
        r = rgw("start", folder, *(["--owner", owner] if owner else []))
        if r.returncode == MISSING and os.environ.get("VECSHARD_TEST_NO_S3") == "1":
            pytest.skip(r.stderr.strip())
        if r.returncode:
            pytest.fail("%s\n(VECSHARD_TEST_NO_S3=1 skips the tests that need an object store)" % r.stderr.strip() if r.returncode == MISSING
                        else r.stdout + r.stderr, pytrace=False)
        with open(os.path.join(folder, "store.json")) as f:
            yield Store(json.load(f))
    finally:
        if not kept:
            rgw("stop", folder, "--remove")
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def proxy(s3):
    """A FaultProxy without faults in front of the store: proxy.endpoint, .env and .client are s3's, through it."""
    with FaultProxy(s3.endpoint) as p:
        p.env = {**s3.env, "AWS_ENDPOINT_URL": p.endpoint}
        p.client = s3.client_at(p.endpoint)
        yield p
        p.client.close()
