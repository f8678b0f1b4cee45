"""Databases on a store through the VFS "s3", and the functions s3_head, s3_get, s3_list: the same rows as from the local file, few
requests, one version of the object or an error, messages with the object and what the store said, an end on Ctrl-C, no secrets.

Contents are drawn with SEED.
"""
import concurrent.futures
import contextlib
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from conftest import BUILD, connect, plain_environ, use_environ

SEED = 11
ROWS = 6000
SLOW = "LD_PRELOAD" in os.environ  # under a sanitizer


def fill(path, rows=ROWS, page_size=4096, wal=False, seed=SEED):
    """A database with a table and an index, about 1.3 kB for each row; returns its bytes."""
    draw = random.Random(seed)
    c = sqlite3.connect(path, isolation_level=None)
    c.execute("PRAGMA page_size=%d" % page_size)
    if wal:
        assert c.execute("PRAGMA journal_mode=wal").fetchone() == ("wal",)
    c.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, name TEXT UNIQUE, body BLOB)")
    c.execute("BEGIN")
    c.executemany("INSERT INTO t VALUES(?,?,?)", ((i, hashlib.md5(b"%d" % i).hexdigest(), draw.randbytes(1200)) for i in range(rows)))
    c.execute("COMMIT")
    c.close()
    with open(path, "rb") as f:
        return f.read()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The path of a database of some 8 MB."""
    path = tmp_path_factory.mktemp("local") / "local.db"
    fill(path)
    return str(path)


class Cloud:
    """A bucket behind the proxy, as whose user this process speaks."""

    def __init__(self, s3, proxy):
        self.s3, self.proxy, self.bucket = s3, proxy, s3.bucket("vfs")

    def put(self, key, body):
        self.s3.client.put(self.bucket, key, body)
        self.proxy.reset()

    def uri(self, key):
        return "s3://%s/%s" % (self.bucket, key)

    def name(self, key):
        """For ATTACH."""
        return "file:%s?vfs=s3" % self.uri(key)

    def attach(self, key, c=None):
        c = c or connect()
        c.execute("ATTACH ? AS cold", (self.name(key),))
        return c


@pytest.fixture
def cloud(s3, proxy, monkeypatch):
    use_environ(monkeypatch, proxy.env)
    return Cloud(s3, proxy)


@pytest.fixture
def cold(cloud, local):
    """The cloud with local.db in it."""
    with open(local, "rb") as f:
        cloud.put("data/local.db", f.read())
    return cloud


def rows_of(path, sql):
    with contextlib.closing(sqlite3.connect(path)) as c:
        return c.execute(sql).fetchall()


EVERYTHING = "SELECT count(*), sum(id), sum(length(body)), max(name), hex(max(body)) FROM t"


def fails(c, sql, *args, code=None):
    with pytest.raises(sqlite3.Error) as e:
        c.execute(sql, args).fetchall()
    assert code is None or e.value.sqlite_errorname == code, (e.value, e.value.sqlite_errorname)
    return str(e.value)


def why(c):
    return c.execute("SELECT s3_last_error()").fetchone()[0]


# ---- reading ----

def test_a_point_query_reads_little(cold, local):
    c = cold.attach("data/local.db")
    assert len(cold.proxy.log) <= 2, "opening brings the first block, which holds the schema"
    name = hashlib.md5(b"4321").hexdigest()
    body = rows_of(local, "SELECT body FROM t WHERE id = 4321")
    assert c.execute("SELECT body FROM cold.t WHERE name = ?", (name,)).fetchall() == body
    log = cold.proxy.log
    assert len(log) <= 6 and sum(e.bytes_down for e in log) <= 7 * 65536
    assert {e.key for e in log} == {"/%s/data/local.db" % cold.bucket} and {e.method for e in log} == {"GET"}
    assert c.execute("SELECT body FROM cold.t WHERE name = ?", (name,)).fetchall() == body
    assert len(cold.proxy.log) == len(log)
    again = cold.attach("data/local.db")  # what was read is known in the whole process; one request asks for the version
    assert again.execute("SELECT body FROM cold.t WHERE name = ?", (name,)).fetchall() == body
    assert len(cold.proxy.log) == len(log) + 1


def test_a_scan_reads_ahead(cold, local):
    cold.proxy.faults(latency_ms=20)
    c = cold.attach("data/local.db")
    assert c.execute("SELECT count(*), sum(id), sum(length(body)), max(name), hex(max(body)) FROM cold.t").fetchall() == rows_of(local, EVERYTHING)
    size = os.path.getsize(local)
    log = cold.proxy.log
    assert sum(e.bytes_down for e in log) <= size + 3 * 65536
    assert cold.proxy.rounds() <= 10 and len(log) <= size / 2**20 + 16, (cold.proxy.rounds(), len(log))


@pytest.mark.parametrize("page_size", [512, 1024, 4096, 65536])
@pytest.mark.parametrize("wal", [False, True])
def test_page_sizes_and_wal(cloud, tmp_path, page_size, wal):
    cloud.put("x.db", fill(tmp_path / "x.db", 1500, page_size, wal))
    c = cloud.attach("x.db")
    assert c.execute(EVERYTHING.replace("FROM t", "FROM cold.t")).fetchall() == rows_of(tmp_path / "x.db", EVERYTHING)
    assert c.execute("PRAGMA cold.integrity_check").fetchall() == [("ok",)]
    assert c.execute("PRAGMA cold.page_size").fetchone() == (page_size,)
    assert {e.key for e in cloud.proxy.log} == {"/%s/x.db" % cloud.bucket}, "nobody asks for a journal, a -wal, a -shm"
    for sql in ("INSERT INTO cold.t VALUES(-1, '', '')", "DELETE FROM cold.t", "CREATE TABLE cold.new(x)", "DROP TABLE cold.t",
                "PRAGMA cold.user_version = 5", "CREATE INDEX cold.i ON t(body)"):
        assert "readonly" in fails(c, sql, code="SQLITE_READONLY")
    assert {e.method for e in cloud.proxy.log} == {"GET"}


def test_as_the_main_database(cold, local, tmp_path):
    connect().close()  # the VFS belongs to the process from now on
    c = sqlite3.connect(cold.name("data/local.db"), uri=True, isolation_level=None)
    assert c.execute(EVERYTHING).fetchall() == rows_of(local, EVERYTHING)
    c.execute("CREATE TEMP TABLE mine AS SELECT * FROM t WHERE id < 100")  # and sorting, which takes temporary files
    c.execute("PRAGMA cache_size = 10")
    assert c.execute("SELECT count(*) FROM (SELECT * FROM t ORDER BY body)").fetchone() == (ROWS,)
    beside = tmp_path / "beside.db"
    c.execute("ATTACH ? AS beside", (str(beside),))
    c.execute("CREATE TABLE beside.copy(id INTEGER PRIMARY KEY, name)")
    c.execute("BEGIN")
    c.execute("INSERT INTO beside.copy SELECT id, name FROM t")
    c.execute("COMMIT")
    c.execute("PRAGMA beside.journal_mode = wal")
    c.execute("DELETE FROM beside.copy WHERE id >= 5000")
    c.close()
    assert rows_of(beside, "SELECT count(*), max(name) FROM copy") == rows_of(local, "SELECT count(*), max(name) FROM t WHERE id < 5000")
    c = sqlite3.connect(cold.name("data/local.db"), uri=True)  # names are limited by the VFS that they go to
    for length in (480, 500, 505, 512, 600, 4000):
        name = str(tmp_path / "deep")
        name += "/" + "n" * (length - len(name) - 1)
        with contextlib.suppress(sqlite3.OperationalError):
            c.execute("ATTACH ? AS deep", (name,))


def test_join_backup_and_vacuum_into(cold, local, tmp_path):
    here = tmp_path / "here.db"
    c = connect(here)
    c.execute("CREATE TABLE wanted AS SELECT value AS id FROM json_each('[5, 77, 5999]')")
    cold.attach("data/local.db", c)
    joined = c.execute("SELECT t.id, t.name FROM wanted JOIN cold.t USING (id) ORDER BY id").fetchall()
    assert joined == rows_of(local, "SELECT id, name FROM t WHERE id IN (5, 77, 5999) ORDER BY id")
    c.execute("VACUUM cold INTO ?", (str(tmp_path / "vacuumed.db"),))
    assert rows_of(tmp_path / "vacuumed.db", EVERYTHING) == rows_of(local, EVERYTHING)
    with contextlib.closing(sqlite3.connect(tmp_path / "copied.db")) as to:
        c.backup(to, name="cold")
    with open(local, "rb") as a, open(tmp_path / "copied.db", "rb") as b:
        assert a.read()[100:] == b.read()[100:]


def test_signed_urls(cold, local, monkeypatch):
    client = cold.proxy.client
    for name in [k for k in os.environ if k.startswith("AWS_")]:
        monkeypatch.delenv(name)

    def attach(url, c=None):
        quoted = url.replace("%", "%25").replace("?", "%3F").replace("&", "%26")
        c = c or connect()
        c.execute("ATTACH ? AS cold", ("file:%s?vfs=s3" % quoted,))
        return c

    url = client.presign("GET", cold.bucket, "data/local.db")
    assert attach(url).execute("SELECT count(*) FROM cold.t").fetchone() == (ROWS,)
    assert attach(client.presign("GET", cold.bucket, "data/local.db", query={"x-padding": "p" * 3000})).execute(
        "SELECT count(*) FROM cold.t").fetchone() == (ROWS,), "session tokens are long"
    c = connect()
    assert json.loads(c.execute("SELECT s3_head(?)", (url,)).fetchone()[0])["size"] == os.path.getsize(local), "a HEAD is not signed for"
    assert "?" not in json.loads(c.execute("SELECT s3_head(?)", (url,)).fetchone()[0])["uri"]
    for bad, code in ((url[:-4] + "0000", "SignatureDoesNotMatch"), (url.partition("?")[0], "AccessDenied")):
        with pytest.raises(sqlite3.OperationalError):
            attach(bad, c)
        text = why(c)
        assert code in text and "local.db" in text and "X-Amz" not in text, text
        text = fails(c, "SELECT s3_get(?)", bad)
        assert code in text and "X-Amz" not in text, text


class Web(http.server.BaseHTTPRequestHandler):
    """A plain web server with one file; what it can do is in the server object."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        s, body, status = self.server, self.server.body, 200
        if "If-Match" in self.headers and (self.headers["If-Match"] != s.etag or s.etag.startswith("W/")):
            body, status = b"", 412
        headers = {"ETag": s.etag} if s.etag else {}
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if status == 200 and span and s.ranges:
            first, last = int(span[1]), min(int(span[2]), len(body) - 1)
            headers["Content-Range"] = "bytes %d-%d/%d" % (first, last, len(body))
            body, status = body[first:last + 1], 206
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)


@pytest.fixture
def web():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web) as s:
        s.daemon_threads, s.etag, s.ranges, s.body = True, None, True, b""
        s.name = "file:http://127.0.0.1:%d/%%s?vfs=s3" % s.server_port
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield s
        s.shutdown()


def test_plain_web_servers(web, local, tmp_path):
    with open(local, "rb") as f:
        whole = f.read()
    small = fill(tmp_path / "small.db", 30)
    changed = fill(tmp_path / "changed.db", ROWS + 5)

    def attach(name):
        c = connect()
        c.execute("ATTACH ? AS cold", (web.name % name,))
        return c

    def read(c):
        return c.execute(EVERYTHING.replace("FROM t", "FROM cold.t")).fetchall()

    web.ranges = False
    web.body = small  # as good as a range where it is all there is
    assert read(attach("a.db")) == rows_of(tmp_path / "small.db", EVERYTHING)
    web.body = whole
    c, t = connect(), time.monotonic()
    fails(c, "ATTACH ? AS cold", web.name % "b.db", code="SQLITE_CANTOPEN")
    assert "does not serve ranges" in why(c) and time.monotonic() - t < 5
    web.ranges = True
    for web.etag in (None, '"strong"', 'W/"weak"'):  # a weak one must not be sent as a condition, only be compared
        web.body = whole
        name = "c%s.db" % len(web.etag or "")
        c = attach(name)
        assert read(c) == rows_of(local, EVERYTHING)
        d, web.body, web.etag = attach("d" + name), changed, web.etag and web.etag.replace('g"', 'h"').replace('k"', 'l"')
        fails(d, "SELECT hex(max(body)) FROM cold.t", code="SQLITE_IOERR_READ")
        assert "changed" in why(d)
        assert read(attach("d" + name)) == rows_of(tmp_path / "changed.db", EVERYTHING), "without an ETag, nothing is known from before"


# ---- errors ----

def secrets_in(text, env):
    return env["AWS_SECRET_ACCESS_KEY"] in text or env["AWS_ACCESS_KEY_ID"] in text or "AWS4-HMAC" in text


def test_refusals_name_the_object_and_what_the_store_said(cold, s3, monkeypatch):
    c = connect()

    def refusal(name, uri=None):
        uri = uri or cold.uri(name)
        assert "unable to open" in fails(c, "ATTACH ? AS x", "file:%s?vfs=s3" % uri, code="SQLITE_CANTOPEN")
        text = why(c)
        assert uri in text and not secrets_in(text, s3.env), text
        assert "x" not in [r[1] for r in c.execute("PRAGMA database_list")]
        return text

    assert why(c) is None
    assert "NoSuchKey" in refusal("none.db")
    assert "NoSuchBucket" in refusal("", "s3://no-such-bucket-%s/x.db" % cold.bucket)
    refusal("", "s3://%s" % cold.bucket)
    with monkeypatch.context() as m:
        m.setenv("AWS_SECRET_ACCESS_KEY", "notTheRightOneAtAll")
        text = refusal("data/local.db")
        assert "SignatureDoesNotMatch" in text and "notTheRightOneAtAll" not in text
    with monkeypatch.context() as m:
        use_environ(m, {**s3.other_env, "AWS_ENDPOINT_URL": cold.proxy.endpoint})
        assert "AccessDenied" in refusal("data/local.db")
    with monkeypatch.context() as m:
        m.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        assert "127.0.0.1" in refusal("data/local.db")
    cold.attach("data/local.db", c)
    assert c.execute("SELECT count(*) FROM cold.t").fetchone() == (ROWS,)
    other = connect()
    fails(other, "ATTACH ? AS x", cold.name("another.db"))
    assert "another.db" in why(other) and "another.db" not in why(c), "each connection has its own"


@pytest.mark.skipif(SLOW or not shutil.which("sqlite3"), reason="no sqlite3 shell, or it has no sanitizer runtime")
def test_the_shell(cold, s3):
    def shell(*lines):
        r = subprocess.run(["sqlite3", "-batch", ":memory:"], input="\n".join((".load %s" % (BUILD / "vecshard"),) + lines),
                           capture_output=True, text=True, timeout=60, env=plain_environ(cold.proxy.env))
        return r.stdout + r.stderr
    name = cold.name("data/local.db")
    assert "\n".join((str(ROWS), "5999")) in shell("ATTACH '%s' AS cold;" % name, "SELECT count(*) FROM cold.t;", "SELECT max(id) FROM cold.t;")
    assert str(ROWS) in shell(".open %s" % name, "SELECT count(*) FROM t;")
    out = shell(".log stdout", "ATTACH '%s' AS x;" % cold.name("none.db"), "SELECT 'told: ' || s3_last_error();")
    assert out.count(cold.uri("none.db") + ": HTTP 404 NoSuchKey") == 2 and not secrets_in(out, s3.env), out


def test_an_object_that_changes_while_it_is_open(cold, local, tmp_path):
    c = cold.attach("data/local.db")
    first = c.execute("SELECT body FROM cold.t WHERE id = 10").fetchone()
    changed = fill(tmp_path / "changed.db", seed=SEED + 1)
    assert len(changed) == os.path.getsize(local)
    cold.put("data/local.db", changed)
    assert c.execute("SELECT body FROM cold.t WHERE id = 10").fetchone() == first
    fails(c, "SELECT sum(length(body)) FROM cold.t", code="SQLITE_IOERR_READ")
    assert cold.uri("data/local.db") in why(c) and "changed" in why(c)
    fails(c, "SELECT sum(length(body)) FROM cold.t", code="SQLITE_IOERR_READ")
    c.execute("DETACH cold")
    cold.attach("data/local.db", c)
    assert c.execute(EVERYTHING.replace("FROM t", "FROM cold.t")).fetchall() == rows_of(tmp_path / "changed.db", EVERYTHING)
    c.execute("PRAGMA cold.cache_size = 1")
    cold.s3.client.delete(cold.bucket, "data/local.db")
    assert c.execute("SELECT count(*) FROM cold.t").fetchone() == (ROWS,), "all of it is in memory"


def test_damaged_and_strange_objects(cloud, local, tmp_path):
    with open(local, "rb") as f:
        whole = f.read()

    def outcome(c, name):
        try:
            c.execute("ATTACH ? AS cut", (name,))
            return c.execute(EVERYTHING.replace("FROM t", "FROM cut.t")).fetchall()
        except sqlite3.DatabaseError as e:
            return e.sqlite_errorname

    cut = tmp_path / "cut.db"
    seen = set()
    for n in (2, 99, 100, 511, 4096, 65536, 65537, len(whole) // 2, len(whole) - 4096, len(whole) - 1):
        cut.write_bytes(whole[:n])
        cloud.put("cut.db", whole[:n])
        seen.add(str(outcome(connect(), cloud.name("cut.db"))))
        assert outcome(connect(), cloud.name("cut.db")) == outcome(connect(), "file:%s?mode=ro" % cut), n
    assert "SQLITE_CORRUPT" in seen
    cloud.put("text.db", b"no database\n" * 9000)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        cloud.attach("text.db").execute("SELECT * FROM cold.sqlite_schema")
    cloud.put("empty.db", b"")
    assert cloud.attach("empty.db").execute("SELECT * FROM cold.sqlite_schema").fetchall() == []
    cloud.put("odd é?#%&+ /../ name.db", whole)
    quoted = cloud.uri("odd é?#%&+ /../ name.db").replace("%", "%25").replace("?", "%3F").replace("#", "%23")
    c = connect()
    c.execute("ATTACH ? AS cold", ("file:%s?vfs=s3" % quoted,))
    assert c.execute("SELECT count(*) FROM cold.t").fetchone() == (ROWS,)


@pytest.mark.parametrize("fault", [{"reset": True, "p": 0.3}, {"truncate": True, "p": 0.3}, {"status": 503, "p": 0.3}, {"drop": True, "p": 0.3},
                                   {"first": 1, "status": 500}, {"stall_ms": 300, "p": 0.3}], ids=lambda f: "-".join(map(str, f)))
def test_faults_on_the_way(cold, local, fault):
    rule = cold.proxy.faults(**fault)
    c = cold.attach("data/local.db")
    assert c.execute(EVERYTHING.replace("FROM t", "FROM cold.t")).fetchall() == rows_of(local, EVERYTHING)
    assert rule.hits


def test_a_store_that_stays_away(cold, local, monkeypatch):
    """The error comes in time, and only that statement fails; local writes of a transaction are SQLite's to undo."""
    monkeypatch.setenv("VECSHARD_TIMEOUT_MS", "700")
    c = cold.attach("data/local.db")
    cold.proxy.faults(status=503)
    t = time.monotonic()
    fails(c, "SELECT sum(length(body)) FROM cold.t", code="SQLITE_IOERR_READ")
    assert time.monotonic() - t < 3
    assert "503" in why(c) and "SlowDown" in why(c)
    cold.proxy.clear()
    assert c.execute(EVERYTHING.replace("FROM t", "FROM cold.t")).fetchall() == rows_of(local, EVERYTHING)


# ---- interrupts and threads ----

def interrupted_after(c, call):
    """Seconds from the interrupt to the error."""
    at = []
    timer = threading.Timer(0.3, lambda: (at.append(time.monotonic()), c.interrupt()))
    timer.start()
    with pytest.raises(sqlite3.OperationalError) as e:
        call()
    late = time.monotonic() - at[0]
    timer.join()
    assert e.value.sqlite_errorname == "SQLITE_INTERRUPT", e.value
    return late


def test_interrupt(cold, local):
    limit = 1.0 if SLOW else 0.2
    others = [connect() for _ in range(3)]
    c = connect()
    stall = {"match": "local.db|list-type", "stall_ms": 2500}
    cold.proxy.faults(**stall)
    assert interrupted_after(c, lambda: cold.attach("data/local.db", c)) < limit
    cold.proxy.reset()
    cold.attach("data/local.db", c)
    cold.proxy.faults(**stall)
    uri = cold.uri("data/local.db")
    for sql in ("SELECT sum(length(body)) FROM cold.t", "SELECT length(s3_get('%s'))" % uri, "SELECT count(*) FROM s3_list('%s')" % uri):
        assert interrupted_after(c, lambda: c.execute(sql).fetchall()) < limit, sql
    cold.proxy.reset()
    assert c.execute("SELECT count(*) FROM cold.t WHERE length(body) = 1200").fetchone() == (ROWS,)
    m = sqlite3.connect(cold.name("data/local.db"), uri=True, check_same_thread=False)
    cold.put("other.db", open(local, "rb").read())
    m.execute("ATTACH ? AS other", (cold.name("other.db"),))  # a connection that never loaded the extension
    cold.proxy.faults(match="other.db", stall_ms=2500)
    assert interrupted_after(m, lambda: m.execute("SELECT sum(length(body)) FROM other.t").fetchall()) < limit
    cold.proxy.reset()
    cold.proxy.faults(latency_ms=60)
    cold.put("third.db", open(local, "rb").read())
    done = threading.Event()

    def pester():
        while not done.wait(0.005):
            for o in others:
                o.interrupt()
    t = threading.Thread(target=pester)
    t.start()
    try:  # an interrupt of others, which do nothing, is none of this one
        assert cold.attach("third.db").execute("SELECT count(*) FROM cold.t").fetchone() == (ROWS,)
    finally:
        done.set()
        t.join()


@pytest.mark.skipif(SLOW or not shutil.which("sqlite3"), reason="no sqlite3 shell, or it has no sanitizer runtime")
@pytest.mark.parametrize("sql", ["ATTACH '%s' AS x;", "ATTACH '%s' AS x; SELECT sum(length(body)) FROM x.t;"], ids=["attach", "scan"])
def test_ctrl_c_in_the_shell(cold, sql):
    cold.proxy.faults(match="local.db", stall_ms=2000, skip=1 if "SELECT" in sql else 0)
    shell = subprocess.Popen(["sqlite3", "-batch", ":memory:"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=plain_environ(cold.proxy.env))
    shell.stdin.write(".load %s\n%s\n" % (BUILD / "vecshard", sql % cold.name("data/local.db")))
    shell.stdin.flush()
    until = time.monotonic() + 10
    while not cold.proxy.stats()["in_flight"] and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.3)
    t = time.monotonic()
    shell.send_signal(signal.SIGINT)
    out, err = shell.communicate(timeout=30)  # it ends with its input
    late = time.monotonic() - t
    assert late < 0.5 and ("interrupt" in err or "unable to open" in err), (late, out, err)


def test_eight_threads(cold, local):
    before = connect().execute("SELECT vecshard_config('cache_mb')").fetchone()[0]
    truth = dict(rows_of(local, "SELECT id, body FROM t"))

    def work(n):
        draw = random.Random(SEED + n)
        c = cold.attach("data/local.db")
        for _ in range(60):
            i = draw.randrange(ROWS)
            assert c.execute("SELECT body FROM cold.t WHERE id = ?", (i,)).fetchone()[0] == truth[i]
        assert c.execute("SELECT count(*), sum(length(body)) FROM cold.t").fetchone() == (ROWS, 1200 * ROWS)
        c.close()
        return True

    try:
        connect().execute("SELECT vecshard_config('cache_mb', 2)")  # less than one scan: blocks come and go
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(8)))
    finally:
        connect().execute("SELECT vecshard_config('cache_mb', ?)", (before,))


def test_two_copies_of_the_library(cold, tmp_path):
    copy = tmp_path / "vecshard.so"
    shutil.copy(BUILD / "vecshard.so", copy)
    code = """
import sqlite3, sys
def load(path):
    c = sqlite3.connect(':memory:', uri=True)
    c.enable_load_extension(True)
    c.load_extension(path)
    return c
a = load(sys.argv[1])
b = load(sys.argv[2])
a.load_extension(sys.argv[1])  # and once more
for c in (a, b, a):
    c.execute('ATTACH ? AS cold', (sys.argv[3],))
    print(c.execute('SELECT count(*) FROM cold.t').fetchone()[0])
    c.execute('DETACH cold')
"""
    r = subprocess.run([sys.executable, "-c", code, str(BUILD / "vecshard"), str(copy), cold.name("data/local.db")], capture_output=True, text=True,
                       timeout=120, env=os.environ)
    assert r.stdout.split() == [str(ROWS)] * 3, r.stdout + r.stderr


# ---- functions ----

def test_head_and_get(cold, local, db):
    with open(local, "rb") as f:
        whole = f.read()
    uri = cold.uri("data/local.db")
    head = json.loads(db.execute("SELECT s3_head(?)", (uri,)).fetchone()[0])
    assert head["uri"] == uri and head["size"] == len(whole) and head["etag"] == hashlib.md5(whole).hexdigest()
    assert db.execute("SELECT abs(julianday('now') - julianday(?)) < 0.1", (head["modified"],)).fetchone() == (1,)
    got = db.execute("SELECT s3_get(?), typeof(s3_get(?))", (uri, uri)).fetchone()
    assert got == (whole, "blob")
    cold.put('odd "key" é', b"")
    assert json.loads(db.execute("SELECT s3_head(?)", (cold.uri('odd "key" é'),)).fetchone()[0])["uri"] == cold.uri('odd "key" é')
    assert db.execute("SELECT s3_get(?), typeof(s3_get(?))", (cold.uri('odd "key" é'),) * 2).fetchone() == (b"", "blob")
    assert db.execute("SELECT s3_get(NULL), s3_head(NULL)").fetchone() == (None, None)
    assert "NoSuchKey" in fails(db, "SELECT s3_get(?)", cold.uri("none")) and "none" in fails(db, "SELECT s3_head(?)", cold.uri("none"))
    for bad in ("", "x", "ftp://host/x", "s3://", "s3://" + cold.bucket, "/etc/passwd", 5):
        fails(db, "SELECT s3_get(?)", bad)
        fails(db, "SELECT s3_head(?)", bad)
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000)
    assert "1000000" in fails(db, "SELECT s3_get(?)", uri)
    for sql in ("CREATE VIEW v AS SELECT s3_get('%s')" % uri, "CREATE VIEW v AS SELECT s3_head('%s')" % uri,
                "CREATE VIEW v AS SELECT * FROM s3_list('%s')" % uri, "CREATE VIEW v AS SELECT s3_last_error()"):
        db.execute("PRAGMA trusted_schema = 0")
        db.execute(sql)
        assert "unsafe use" in fails(db, "SELECT * FROM v"), sql
        db.execute("DROP VIEW v")


def test_list(cloud, db):
    n = 1100  # more than a page
    keys = ["many/%04d/%s" % (i, "ab"[i % 2]) for i in range(n)] + ["many/top", "many/0500", "other/é &<>+%20 x"]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: cloud.s3.client.put(cloud.bucket, k, k.encode()), keys))
    cloud.proxy.reset()
    root = "s3://" + cloud.bucket

    def listed(*args, sql="SELECT key FROM s3_list"):
        return [r[0] for r in db.execute(sql + "(%s)" % ",".join("?" * len(args)), args)]

    assert listed(root) == listed(root + "/") == sorted(keys)
    assert listed(root + "/many/") == sorted(k for k in keys if k.startswith("many/"))
    assert listed(root + "/many/05") == sorted(k for k in keys if k.startswith("many/05")), "a prefix is no folder"
    assert listed(root, 0) == ["many/", "other/"]
    assert listed(root + "/many/", 0) == sorted(["many/%04d/" % i for i in range(n)] + ["many/top", "many/0500"])
    assert listed(root + "/none/") == listed(None) == []
    assert listed(root, None) == sorted(keys)
    cloud.proxy.reset()
    db.execute("SELECT * FROM s3_list(?) LIMIT 10", (root,)).fetchall()
    assert len(cloud.proxy.log) == 1
    row = db.execute("SELECT uri, key, size, etag, modified, source, recursive FROM s3_list(?) WHERE key LIKE 'other%'", (root,)).fetchone()
    key = keys[-1]
    assert row[:4] == (cloud.uri(key), key, len(key.encode()), hashlib.md5(key.encode()).hexdigest())
    assert db.execute("SELECT ? BETWEEN datetime('now', '-1 hour') AND datetime('now', '+1 minute')", (row[4],)).fetchone() == (1,)
    assert db.execute("SELECT s3_get(?)", (row[0],)).fetchone() == (key.encode(),)
    assert db.execute("SELECT size, etag, modified FROM s3_list(?, 0)", (root + "/many",)).fetchone() == (None, None, None)
    assert "USE TEMP B-TREE" not in str(db.execute("EXPLAIN QUERY PLAN SELECT key FROM s3_list('x') ORDER BY key").fetchall())
    assert listed(root, sql="SELECT key FROM s3_list(?1) ORDER BY key DESC --") == sorted(keys, reverse=True)
    db.execute("CREATE TEMP TABLE roots AS SELECT ? AS r UNION ALL SELECT ?", (root + "/many/000", root + "/other"))
    assert db.execute("SELECT count(*) FROM roots, s3_list(roots.r)").fetchone() == (11,)
    assert "NoSuchBucket" in fails(db, "SELECT * FROM s3_list('s3://no-such-%s/')" % cloud.bucket)
    for bad in ("x", "https://host/x", ""):
        fails(db, "SELECT * FROM s3_list(?)", bad)
    fails(db, "SELECT * FROM s3_list")
