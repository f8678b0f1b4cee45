"""Shards in a real object store, through a proxy that counts and breaks: the same rows as from local files, few rounds, clear
errors, no secrets.

Rows are compared with the local shard's, which the other tests compare with brute force.
"""
import contextlib
import json
import os
import re
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from conftest import BUILD, blob, build_shard, clustered, connect, plain_environ, tool, use_environ

DIM = 24
SEARCH = "SELECT shard, id, distance FROM shard_union WHERE source = ? AND query = ? AND k = 10 AND nprobe = 12 AND refine = 8"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A database of three shards, one of them flat, with metadata; and queries."""
    folder = tmp_path_factory.mktemp("s3db") / "db"
    folder.mkdir()
    shards = []
    for n, rows in enumerate((9000, 7000, 300)):
        x = clustered(rows, DIM, seed=n)
        ids = ["%s-%05d" % ("abc"[n], i) for i in range(rows)]
        columns = {"year": [1900 + i % 120 for i in range(rows)], "name": ["name %d" % (i % 977) for i in range(rows)]}
        shards.append(build_shard(folder / ("s%d" % n), x, ids, columns))
    return str(folder), shards, clustered(40, DIM, seed=99)


@pytest.fixture
def cloud(s3, proxy, data, monkeypatch):
    """The database published to a fresh bucket; the process speaks to it through the proxy. Returns the database's URI."""
    use_environ(monkeypatch, proxy.env)
    uri = "s3://%s/some/db" % s3.bucket("shards")
    tool("publish", data[0], uri)
    proxy.reset()
    return uri


def fresh(source, queries, sql=SEARCH, env=None, ok=True):
    """The rows that a new process gets, or its error text."""
    code = ("import sys, json, sqlite3; c = sqlite3.connect(':memory:'); c.enable_load_extension(True); c.load_extension(sys.argv[1]);"
            "print(json.dumps([[list(r) for r in c.execute(sys.argv[2], (sys.argv[3], bytes.fromhex(q)))] for q in sys.argv[4:]]))")
    r = subprocess.run([sys.executable, "-c", code, str(BUILD / "vecshard"), sql, source, *[blob(q).hex() for q in queries]],
                       capture_output=True, text=True, timeout=120, env={**os.environ, **(env or {})})
    assert (r.returncode == 0) == ok, r.stderr[-600:]
    return json.loads(r.stdout) if ok else r.stderr


def rows(c, source, q, sql=SEARCH):
    return c.execute(sql, (source, blob(q))).fetchall()


def error_of(source, q, env=None, sql=SEARCH):
    """The message a new process ends with; never a secret in it."""
    text = fresh(source, [q], sql, env, ok=False)
    for secret in (os.environ["AWS_SECRET_ACCESS_KEY"], (env or {}).get("AWS_SECRET_ACCESS_KEY"), (env or {}).get("AWS_SESSION_TOKEN")):
        assert not secret or secret not in text
    return text.strip().splitlines()[-1]


def segments_of(s3, uri):
    bucket, prefix = uri[5:].split("/", 1)
    return [k for k in s3.client.list(bucket, prefix) if k.endswith(".ivf")]


# ---- the same rows ----

def test_same_rows_as_local(cloud, data, db):
    folder, _, queries = data
    for q in queries:
        assert rows(db, cloud, q) == rows(db, folder, q)
    for sql in (SEARCH.replace("= 12", "= 1").replace("= 8", "= 1"), SEARCH + " AND exact = 1",
                "SELECT shard, id, distance FROM shard_union WHERE source = ? AND query = ? AND k = 500",
                "SELECT shard, id, distance, embedding, row FROM shard_union(?, ?, 30)"):
        for q in queries[:5]:
            assert rows(db, cloud, q, sql) == rows(db, folder, q, sql)


def test_table_with_filters_and_lookups(cloud, data, db):
    folder, shards, queries = data
    for name, path in (("far", cloud + "/s0"), ("near", folder + "/s0")):
        db.execute("CREATE VIRTUAL TABLE %s USING vecshard(path='%s')" % (name, path))
    for where, args in (("year > 1990", ()), ("name = 'name 7'", ()), ("year IN (1950, 1951)", ()), ("name LIKE 'name 9%%'", ()),
                        ("id = 'a-00042'", ())):
        for q in queries[:4]:
            sql = "SELECT id, distance, year, name FROM %%s WHERE embedding MATCH ? AND k = 20 AND %s" % where
            assert db.execute(sql % "far", (blob(q), *args)).fetchall() == db.execute(sql % "near", (blob(q), *args)).fetchall()
    for sql in ("SELECT * FROM %s WHERE id = 'a-01234'", "SELECT id, year FROM %s ORDER BY id LIMIT 50 OFFSET 4000",
                "SELECT count(*), sum(year) FROM %s", "SELECT id FROM %s WHERE embedding MATCH zeroblob(96) ORDER BY distance LIMIT 300"):
        assert db.execute(sql % "far").fetchall() == db.execute(sql % "near").fetchall()


def test_named_sources_and_mixed_places(cloud, data, db):
    folder, _, queries = data
    mixed = json.dumps([cloud + "/s1", folder + "/s0", cloud + "/s2/"])
    local = json.dumps([folder + "/s1", folder + "/s0", folder + "/s2"])
    for q in queries[:5]:
        assert rows(db, mixed, q) == rows(db, local, q)
    assert [r[0] for r in db.execute("SELECT shard FROM shard_list(?)", (cloud,))] == ["s0", "s1", "s2"]
    assert db.execute("SELECT * FROM shard_verify(?)", (cloud,)).fetchall() == []


def test_stored_union_table(cloud, data, tmp_path):
    folder, _, queries = data
    path = tmp_path / "app.db"
    c = connect(path)
    c.execute("CREATE VIRTUAL TABLE u USING shard_union(source='%s')" % cloud)
    sql = "SELECT shard, id, distance, year FROM u WHERE query = ? AND k = 10 AND year > 2000"
    here = c.execute(sql, (blob(queries[0]),)).fetchall()
    c.close()
    c = connect(path)
    assert c.execute(sql, (blob(queries[0]),)).fetchall() == here and len(here) == 10
    c.execute("PRAGMA trusted_schema = OFF")
    c.close()
    c = connect(path)
    c.execute("PRAGMA trusted_schema = OFF")
    with pytest.raises(sqlite3.OperationalError, match="allow"):
        c.execute(sql, (blob(queries[0]),)).fetchall()
    c.execute("SELECT vecshard_config('allow', ?)", (cloud,))
    assert c.execute(sql, (blob(queries[0]),)).fetchall() == here
    c.close()
    text = open(path, "rb").read()
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in text and os.environ["AWS_ACCESS_KEY_ID"].encode() not in text


def test_table_in_a_view_is_direct_only(cloud, data, db):
    db.execute("CREATE VIRTUAL TABLE far USING vecshard(path='%s/s0')" % cloud)
    db.execute("CREATE VIEW v AS SELECT id FROM far LIMIT 1")
    with pytest.raises(sqlite3.OperationalError, match="unsafe use"):
        db.execute("SELECT * FROM v").fetchall()


def test_connecting_needs_no_network(cloud, data, tmp_path, proxy):
    path = tmp_path / "app.db"
    c = connect(path)
    c.execute("CREATE VIRTUAL TABLE far USING vecshard(path='%s/s0')" % cloud)
    c.close()
    proxy.reset()
    c = connect(path)
    assert c.execute("SELECT count(*) FROM pragma_table_info('far')").fetchone()[0] >= 4
    c.execute("DROP TABLE far")
    c.close()
    assert proxy.stats()["requests"] == 0


def test_local_use_starts_no_thread(data):
    code = ("import sys, sqlite3, os; c = sqlite3.connect(':memory:'); c.enable_load_extension(True); c.load_extension(sys.argv[1]);"
            "c.execute(\"SELECT vecshard_config('threads', 1)\"); c.execute(sys.argv[2], (sys.argv[3], bytes(96))).fetchall();"
            "print(len(os.listdir('/proc/self/task')))")
    r = subprocess.run([sys.executable, "-c", code, str(BUILD / "vecshard"), SEARCH, data[0]], capture_output=True, text=True, check=True)
    assert r.stdout.strip() == "1"


# ---- rounds and requests ----

def test_rounds(cloud, data, proxy):
    """With latency in the way: folders, {manifests, hints}, groups, partitions, rows; then partitions and rows; then nothing."""
    queries = data[2]
    c = connect()
    proxy.reset()
    proxy.faults(latency_ms=60)
    started = time.monotonic()
    rows(c, cloud, queries[0])
    cold = time.monotonic() - started
    assert proxy.rounds() <= 5, proxy.log
    trace = dict((r[0], r) for r in c.execute("SELECT phase, rounds, requests, bytes FROM shard_trace"))
    assert trace["total"][1] == 5 and trace["total"][2] == proxy.stats()["requests"]
    proxy.forget()
    rows(c, cloud, queries[1])
    assert proxy.rounds() <= 2
    proxy.forget()
    rows(c, cloud, queries[1])
    assert proxy.stats()["requests"] == 0
    assert cold < 5 * 0.06 + 1.5


def test_missing_hint_costs_rounds_only(cloud, data, s3, db):
    folder, _, queries = data
    bucket, prefix = cloud[5:].split("/", 1)
    want = [rows(db, folder, q) for q in queries[:3]]
    good = s3.client.get(bucket, prefix + "/s0/latest")
    broken = {"none": None, "empty": b"", "rubbish": b"x" * 5000, "cut": good[:-100], "of another": s3.client.get(bucket, prefix + "/s1/latest"),
              "flipped": good[:200] + bytes([good[200] ^ 1]) + good[201:]}
    for what, body in broken.items():
        if body is None:
            s3.client.delete(bucket, prefix + "/s0/latest")
        else:
            s3.client.put(bucket, prefix + "/s0/latest", body)
        assert [[tuple(r) for r in x] for x in fresh(cloud, queries[:3])] == want, what


def test_a_new_version_is_seen(cloud, data, s3, db, monkeypatch, tmp_path):
    """A shard that appears in the database, and one that goes, without a new connection."""
    monkeypatch.setenv("VECSHARD_REFRESH_MS", "0")
    queries = data[2]
    before = rows(db, cloud, queries[0])
    extra = build_shard(tmp_path / "extra", queries[:5], ["new-%d" % i for i in range(5)], {"year": [1] * 5, "name": ["n"] * 5})
    tool("publish", extra.path, cloud + "/s9")
    after = rows(db, cloud, queries[0])
    assert after[0][:2] == ("s9", "new-0") and after != before
    bucket, prefix = cloud[5:].split("/", 1)
    for key in s3.client.list(bucket, prefix + "/s9/"):
        s3.client.delete(bucket, key)
    assert rows(db, cloud, queries[0]) == before


def test_cache_limit_holds(cloud, data, db):
    queries = data[2]
    try:
        db.execute("SELECT vecshard_config('cache_mb', 0)")
        want = [rows(db, data[0], q) for q in queries[:5]]
        assert [rows(db, cloud, q) for q in queries[:5]] == want
        assert db.execute("SELECT vecshard_config('cache_mb')").fetchone()[0] == 0
    finally:
        db.execute("SELECT vecshard_config('cache_mb', 256)")


def test_max_bytes(cloud, data, db):
    queries = data[2]
    db.execute("SELECT vecshard_config('max_bytes', 100000)")
    with pytest.raises(sqlite3.OperationalError, match="max_bytes"):
        rows(db, cloud, queries[0], SEARCH + " AND exact = 1")
    with pytest.raises(sqlite3.OperationalError, match="max_bytes"):
        rows(db, cloud, queries[0], SEARCH.replace("= 12", "= 1000"))
    db.execute("SELECT vecshard_config('max_bytes', 0)")
    assert rows(db, cloud, queries[0]) == rows(db, data[0], queries[0])


# ---- faults ----

FAULTS = [dict(status=503, p=0.2), dict(status=500, p=0.2), dict(status=503, first=1), dict(status=429, p=0.1, retry_after="0"),
          dict(reset=True, p=0.1), dict(truncate=True, p=0.1), dict(drop=True, p=0.1), dict(redirect="eu-west-9"),
          dict(latency_ms=1, jitter_ms=20)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: "-".join(map(str, f)))
def test_same_rows_under_faults(cloud, data, proxy, fault):
    folder, _, queries = data
    want = fresh(folder, queries[:4])
    proxy.reset(seed=7)
    proxy.faults(**fault)
    assert fresh(cloud, queries[:4]) == want
    assert sum(proxy.stats()["injected"].values()) > 0


def test_flipped_bytes_never_give_a_wrong_row(cloud, data, proxy):
    folder, _, queries = data
    want = fresh(folder, queries[:2])
    proxy.faults(corrupt=True, match=r"[.]ivf")
    assert "damaged" in error_of(cloud, queries[0])
    for skip in (0, 3, 20, 60):  # one bad answer is read anew
        proxy.reset()
        rule = proxy.faults(corrupt=True, match=r"[.]ivf", skip=skip, next=1)
        assert fresh(cloud, queries[:2]) == want and rule.hits == 1
    for seed in range(4):
        proxy.reset(seed)
        proxy.faults(corrupt=True, p=0.05, match=r"[.]ivf")
        try:
            assert fresh(cloud, queries[:2]) == want
        except AssertionError as e:
            assert "damaged" in str(e)


def test_object_damaged_in_the_store(cloud, data, s3):
    bucket, _ = cloud[5:].split("/", 1)
    queries = data[2]
    key = [k for k in segments_of(s3, cloud) if "/s0/" in k][0]
    good = s3.client.get(bucket, key)
    bad = bytearray(good)
    bad[5000::997] = bytes(b ^ 0x10 for b in bad[5000::997])
    s3.client.put(bucket, key, bytes(bad))
    text = error_of(cloud, queries[0])
    assert "damaged" in text and key in text
    assert re.search("checksum", tool("verify", cloud, ok=False).stdout)


def test_truncated_object(cloud, data, s3):
    bucket, _ = cloud[5:].split("/", 1)
    key = [k for k in segments_of(s3, cloud) if "/s1/" in k][0]
    s3.client.put(bucket, key, s3.client.get(bucket, key)[:60000])
    text = error_of(cloud, data[2][0])
    assert key in text and re.search("InvalidRange|416|shorter", text)


def test_missing_segment(cloud, data, s3):
    bucket, _ = cloud[5:].split("/", 1)
    key = [k for k in segments_of(s3, cloud) if "/s1/" in k][0]
    s3.client.delete(bucket, key)
    text = error_of(cloud, data[2][0])
    assert key in text and "NoSuchKey" in text


def test_object_overwritten_under_a_reader(cloud, data, s3, db):
    """Another object of the same length under a segment's name: what is read later is refused, never mixed in."""
    bucket, _ = cloud[5:].split("/", 1)
    queries = data[2]
    want = rows(db, data[0], queries[0])
    assert rows(db, cloud, queries[0]) == want
    for key in segments_of(s3, cloud):
        body = bytearray(s3.client.get(bucket, key))
        body[-1] ^= 1
        s3.client.put(bucket, key, bytes(body))
    with pytest.raises(sqlite3.OperationalError, match="changed while it was read"):
        for q in queries[1:]:
            rows(db, cloud, q, SEARCH + " AND exact = 1")


def test_wrong_secret(cloud, data):
    text = error_of(cloud, data[2][0], {"AWS_SECRET_ACCESS_KEY": "notTheSecretAtAll"})
    assert "SignatureDoesNotMatch" in text and cloud[:12] in text


def test_unknown_key(cloud, data):
    text = error_of(cloud, data[2][0], {"AWS_ACCESS_KEY_ID": "NOSUCHKEYID"})
    assert "InvalidAccessKeyId" in text and "NOSUCHKEYID" not in text


def test_no_permission(cloud, data, s3):
    other = {k: v for k, v in s3.other_env.items() if k != "AWS_ENDPOINT_URL"}
    assert "AccessDenied" in error_of(cloud, data[2][0], other)


def test_anonymous(cloud, data, s3):
    assert "AccessDenied" in error_of(cloud, data[2][0], {"AWS_NO_SIGN_REQUEST": "1"})


def test_no_credentials(cloud, data, tmp_path, monkeypatch):
    for k in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(k, raising=False)
    secret = os.environ.pop("AWS_SECRET_ACCESS_KEY")
    try:
        r = subprocess.run([str(BUILD / "vecshard"), "info", cloud], capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path)})
    finally:
        os.environ["AWS_SECRET_ACCESS_KEY"] = secret
    assert r.returncode == 1 and "AWS_ACCESS_KEY_ID" in r.stderr


def test_missing_bucket_and_shard(cloud, data, db):
    q = data[2][0]
    assert "NoSuchBucket" in error_of("s3://no-such-bucket-here/db", q)
    with pytest.raises(sqlite3.OperationalError, match="holds no shard"):
        rows(db, cloud + "/nothing/there", q)
    with pytest.raises(sqlite3.OperationalError, match="is not a shard"):
        db.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s/nothing')" % cloud)
    with pytest.raises(sqlite3.OperationalError, match="no version 7"):
        db.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s/s0', version=7)" % cloud)
    db.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s/s0', version=1)" % cloud)
    assert db.execute("SELECT count(*) FROM t").fetchone() == (9000,)


class TlsFront(threading.Thread):
    """Takes TLS off and passes the bytes on to the store."""

    def __init__(self, folder, upstream):
        super().__init__(daemon=True)
        self.cert = str(folder / "cert.pem")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=store", "-addext",
                        "subjectAltName=IP:127.0.0.1", "-keyout", str(folder / "key.pem"), "-out", self.cert], check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, str(folder / "key.pem"))
        self.upstream = upstream
        self.listener = context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True, do_handshake_on_connect=False)
        self.endpoint = "https://127.0.0.1:%d" % self.listener.getsockname()[1]
        self.start()

    def run(self):
        while True:
            threading.Thread(target=self.serve, args=(self.listener.accept()[0],), daemon=True).start()

    def serve(self, client):
        try:
            client.do_handshake()
            up = socket.create_connection(self.upstream)
            threading.Thread(target=self.pump, args=(up, client), daemon=True).start()
            self.pump(client, up)
        except OSError:
            client.close()

    @staticmethod
    def pump(source, sink):
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for s in (source, sink):
                with contextlib.suppress(OSError):
                    s.shutdown(socket.SHUT_RDWR)


def test_tls(cloud, data, s3, tmp_path):
    host, port = s3.endpoint.split("//")[1].split(":")
    front = TlsFront(tmp_path, (host, int(port)))
    there = {"AWS_ENDPOINT_URL": front.endpoint, "AWS_CA_BUNDLE": front.cert}
    assert fresh(cloud, data[2][:2], env=there) == fresh(data[0], data[2][:2])
    del there["AWS_CA_BUNDLE"]
    assert "certificate" in error_of(cloud, data[2][0], there)


def test_endpoint_down(cloud, data):
    started = time.monotonic()
    text = error_of(cloud, data[2][0], {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    assert cloud[:12] in text and "connect" in text and time.monotonic() - started < 10


def test_stalled_answers_end_at_the_deadline(cloud, data, proxy):
    proxy.faults(stall_ms=60000)
    started = time.monotonic()
    text = error_of(cloud, data[2][0], {"VECSHARD_TIMEOUT_MS": "1500"})
    assert cloud[:12] in text and time.monotonic() - started < 8


# ---- hosts ----

def test_interrupt_during_a_stall(cloud, data, proxy, db):
    proxy.faults(stall_ms=60000)
    timer, at = None, []

    def interrupt():
        at.append(time.monotonic())
        db.interrupt()

    timer = threading.Timer(0.7, interrupt)
    timer.start()
    with pytest.raises(sqlite3.OperationalError, match="interrupt"):
        rows(db, cloud, data[2][0])
    assert time.monotonic() - at[0] < 0.3
    proxy.reset()
    started = time.monotonic()
    assert rows(db, cloud, data[2][0]) == rows(db, data[0], data[2][0])
    assert time.monotonic() - started < 3  # it does not wait for what stalls still


def test_exit_with_requests_in_flight(cloud, data, proxy):
    """sys.exit while a thread waits for the store: neither a hang nor a crash."""
    proxy.faults(stall_ms=60000)
    code = ("import sys, sqlite3, threading, time, os\n"
            "def work():\n"
            "  c = sqlite3.connect(':memory:'); c.enable_load_extension(True); c.load_extension(sys.argv[1])\n"
            "  c.execute(sys.argv[2], (sys.argv[3], bytes(96))).fetchall()\n"
            "threading.Thread(target=work, daemon=True).start(); time.sleep(0.8); sys.exit(0)\n")
    started = time.monotonic()
    r = subprocess.run([sys.executable, "-c", code, str(BUILD / "vecshard"), SEARCH, cloud], capture_output=True, text=True, timeout=60)
    assert r.returncode == 0, r.stderr
    assert time.monotonic() - started < 5


@pytest.mark.skipif(bool(os.environ.get("LD_PRELOAD")), reason="fork beside threads hangs in a sanitizer's allocator")
def test_fork_after_a_query(cloud, data, db):
    folder, _, queries = data
    want = [rows(db, folder, q) for q in queries[:6]]
    assert [rows(db, cloud, q) for q in queries[:3]] == want[:3]
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            c = connect()
            good = [rows(c, cloud, q) for q in queries[:6]] == want
            os.write(write, b"good" if good else b"bad!")
        finally:
            os._exit(0)
    os.close(write)
    assert [rows(db, cloud, q) for q in queries[:6]] == want
    assert os.read(read, 4) == b"good"
    os.close(read)
    os.waitpid(child, 0)


def test_eight_threads(cloud, data):
    """8 threads with a connection each on one process: right rows, no descriptor and no memory lost."""
    folder, _, queries = data
    each = int(os.environ.get("VECSHARD_TEST_QUERIES", "60"))
    here = connect()
    want = {n: rows(here, folder, q) for n, q in enumerate(queries)}
    wrong = []

    def work(seed):
        c = connect()
        rng = np.random.default_rng(seed)
        for n in rng.integers(0, len(queries), each):
            got = rows(c, cloud, queries[n])
            if got != want[n]:
                wrong.append((seed, n))
        c.close()

    def run():
        threads = [threading.Thread(target=work, args=(s,)) for s in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()

    def resident():
        return int(re.search(r"VmRSS:\s+(\d+)", open("/proc/self/status").read()).group(1))

    run()
    fds, memory = len(os.listdir("/proc/self/fd")), resident()
    run()
    assert not wrong
    assert len(os.listdir("/proc/self/fd")) <= fds + 8  # connections to the store are kept and used again
    if not os.environ.get("LD_PRELOAD"):
        assert resident() < memory + 8192
    here.close()


@pytest.mark.skipif("VECSHARD_THREADS_PROGRAM" not in os.environ, reason="test/run.sh asks for it, with a thread sanitizer")
def test_eight_threads_watched(cloud, data):
    """test/s3_threads.c, built with the thread sanitizer."""
    each = os.environ.get("VECSHARD_TEST_QUERIES", "25")
    command = [*os.environ["VECSHARD_THREADS_PROGRAM"].split(), cloud, data[0], str(DIM), "8", each]
    r = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert r.returncode == 0 and r.stdout.startswith("ok"), (r.stdout[-1000:], r.stderr[-3000:])
    print(r.stdout)


def test_shell(cloud, data):
    q = data[2][0]
    sql = "SELECT shard, id FROM shard_union('%s', x'%s', 3);" % (cloud, blob(q).hex())
    shell = subprocess.run(["sqlite3", ":memory:", ".load %s" % (BUILD / "vecshard"), sql], capture_output=True, text=True,
                           env=plain_environ())
    if not os.environ.get("LD_PRELOAD"):
        assert shell.stdout.splitlines() == ["%s|%s" % r[:2] for r in rows(connect(), data[0], q)[:3]], shell.stderr


def test_tool_on_a_store(cloud, data, tmp_path):
    folder, _, queries = data
    np.save(tmp_path / "q.npy", queries[:5])
    args = ("--queries", tmp_path / "q.npy", "-k", "5", "--nprobe", "12", "--refine", "8")
    assert tool("query", cloud, *args).stdout == tool("query", folder, *args).stdout
    assert json.loads(tool("info", cloud, "--json").stdout)["rows"] == 16300
    assert "sound: 3 shards" in tool("verify", cloud).stdout
    assert "sub_dim" in tool("dump", cloud + "/s0").stdout
