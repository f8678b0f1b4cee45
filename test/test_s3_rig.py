"""The S3 tests' own tools: the store keeps what it promises, every fault of the proxy is seen as such by a plain client, requests
are counted as they were made. Random places are drawn with SEED.
"""
import collections
import concurrent.futures
import hashlib
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
from conftest import ROOT, rgw
from s3.client import S3Error
from s3.fault_proxy import Entry, longest_chain
from s3.rgw import MARK, born

SEED = 5
BODY = random.Random(SEED).randbytes(300_000)
BROKEN = (http.client.HTTPException, OSError)


@pytest.fixture(scope="module")
def bucket(s3):
    name = s3.bucket("rig")
    s3.client.put(name, "data", BODY)
    s3.client.put(name, "small", b"0123456789")
    return name


def refused(status, code, call, *args, **options):
    with pytest.raises(S3Error) as e:
        call(*args, **options)
    assert (e.value.status, e.value.code) == (status, code)
    return e.value.answer


# ---- the store ----

def test_objects(s3, bucket):
    c = s3.client
    assert c.get(bucket, "data") == BODY
    assert c.get(bucket, "data", 1000, 50) == BODY[1000:1050] and c.get(bucket, "data", 299_990) == BODY[299_990:]
    assert c.head(bucket, "data")["etag"] == '"%s"' % hashlib.md5(BODY).hexdigest()
    refused(404, "NoSuchKey", c.get, bucket, "none")
    refused(404, "NoSuchBucket", c.get, "no-such-bucket-here", "none")
    refused(416, "InvalidRange", c.get, bucket, "small", 10, 5)
    refused(412, "PreconditionFailed", c.get, bucket, "small", headers={"If-Match": '"00000000000000000000000000000000"'})
    c.put(bucket, "k" * 1000, b"long")
    assert c.get(bucket, "k" * 1000) == b"long"
    for key in ("a b", "pl+us", "pct%20", "uni-é漢", "eq=1&x?#", "quo'te(1)!*~", "dou//ble"):
        c.put(bucket, "odd/" + key, key.encode())
        assert c.get(bucket, "odd/" + key) == key.encode()
    assert c.list(bucket, "odd/", page=3) == sorted(c.list(bucket, "odd/")) and len(c.list(bucket, "odd/")) == 7
    assert c.list(bucket, "od", delimiter="/") == ["odd/"]
    c.copy(bucket, "odd/a b", "odd/copy é")
    c.delete(bucket, "odd/a b")
    assert "odd/a b" not in c.list(bucket, "odd/") and c.get(bucket, "odd/copy é") == b"a b"


def test_multipart(s3, bucket):
    c, parts = s3.client, [BODY[:5] * (1 << 20), b"tail"]
    begun = c.checked("POST", bucket, "parts", query={"uploads": ""}).xml().findtext("{*}UploadId")
    assert c.uploads(bucket) == [("parts", begun)]
    etags = [c.checked("PUT", bucket, "parts", query={"partNumber": i, "uploadId": begun}, body=b).headers["etag"] for i, b in enumerate(parts, 1)]
    body = "".join("<Part><PartNumber>%d</PartNumber><ETag>%s</ETag></Part>" % p for p in enumerate(etags, 1))
    c.checked("POST", bucket, "parts", query={"uploadId": begun}, body=("<CompleteMultipartUpload>%s</CompleteMultipartUpload>" % body).encode())
    assert c.get(bucket, "parts", len(parts[0]) - 2) == parts[0][-2:] + b"tail" and c.uploads(bucket) == []


def test_exclusive_put_has_one_winner(s3, bucket):
    def put(i):
        try:
            return s3.client.put(bucket, "contended", b"%d" % i, exclusive=True) and i
        except S3Error as e:
            assert e.status in (409, 412)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        won = [i for i in pool.map(put, range(8)) if i is not None]
    assert len(won) == 1 and s3.client.get(bucket, "contended") == b"%d" % won[0]


def test_rights(s3, bucket):
    refused(403, "AccessDenied", s3.other.get, bucket, "small")
    refused(403, "AccessDenied", s3.other.put, bucket, "mine", b"")
    refused(403, "AccessDenied", s3.anonymous.get, bucket, "small")
    assert refused(403, "", s3.other.head, bucket, "small").body == b""
    wrong = s3.client_at(s3.endpoint)
    wrong.secret_key += "x"
    refused(403, "SignatureDoesNotMatch", wrong.get, bucket, "small")
    wrong.access_key = "NOBODY"
    refused(403, "InvalidAccessKeyId", wrong.get, bucket, "small")

    open_to_all, listed = s3.bucket("open"), s3.bucket("listed", acl="public-read")
    s3.client.allow(open_to_all, ["s3:GetObject"])
    s3.client.put(open_to_all, "k", b"for all")
    assert s3.anonymous.get(open_to_all, "k") == s3.other.get(open_to_all, "k") == b"for all"
    refused(403, "AccessDenied", s3.anonymous.list, open_to_all)
    assert s3.anonymous.list(listed) == []


def test_presigned_and_virtual_host(s3, bucket, proxy):
    for c in (s3.client, proxy.client):
        with urllib.request.urlopen(c.presign("GET", bucket, "small")) as r:
            assert r.read() == b"0123456789"
        c.virtual_host = s3.dns_name
        try:
            assert c.get(bucket, "small") == b"0123456789" and "data" in c.list(bucket)
        finally:
            c.virtual_host = None


def test_uri_is_nobody_elses(s3):
    a, b = s3.uri("x"), s3.uri()
    assert a != b and a.startswith("s3://shared-") and a.endswith("/x")


# ---- the proxy: bytes and counters ----

def test_bytes_pass_unchanged_and_are_counted(proxy, bucket):
    c = proxy.client
    assert c.get(bucket, "data") == BODY and c.get(bucket, "data", 7, 9) == BODY[7:16]
    big = BODY * 20
    c.put(bucket, "big", big)
    assert c.get(bucket, "big") == big
    assert c.head(bucket, "data")["content-length"] == str(len(BODY))
    assert "big" in c.list(bucket)  # which radosgw sends in chunks
    c.delete(bucket, "big")
    refused(404, "NoSuchKey", c.get, bucket, "big")
    s = proxy.stats()
    assert s["requests"] == 8 and s["connections"] == s["open"] == 1 and s["peak_in_flight"] == 1 and s["in_flight"] == 0
    assert s["methods"] == {"GET": 5, "PUT": 1, "HEAD": 1, "DELETE": 1} and s["status"] == {200: 5, 206: 1, 204: 1, 404: 1}
    assert s["bytes_up"] == len(big) and s["injected"] == {}
    key = s["keys"]["/%s/data" % bucket]
    assert key == {"requests": 3, "bytes_down": len(BODY) + 9, "ranges": [None, (7, 15), None]}
    assert [(e.method, e.status, e.range) for e in proxy.log][:3] == [("GET", 200, ""), ("GET", 206, "bytes=7-15"), ("PUT", 200, "")]
    proxy.reset()
    assert proxy.stats()["requests"] == 0 and proxy.log == [] and proxy.rounds() == 0


def test_rounds(proxy, bucket):
    proxy.faults(latency_ms=150)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for n in (1, 8, 3):  # each waits for the one before
            list(pool.map(lambda i: proxy.client.get(bucket, "data", i, 10), range(n)))
    assert proxy.rounds() == 3 and proxy.stats()["peak_in_flight"] == 8 and proxy.stats()["requests"] == 12
    assert proxy.rounds(match="/none") == 0 and proxy.rounds(methods="HEAD,PUT") == 0

    def entry(began, ended):
        return Entry("GET", "/b/k", "", "", 200, 0, 0, "", began, ended)
    assert longest_chain([entry(0, 10), entry(1, 2), entry(2, 3), entry(2.5, 4), entry(4, 5), entry(9, 11)]) == 4


def test_hundreds_of_connections(proxy, bucket):
    """Far more at once than the store has threads."""
    url = urllib.parse.urlsplit(proxy.client.presign("GET", bucket, "small"))
    request = ("GET %s?%s HTTP/1.1\r\nHost: %s\r\n\r\n" % (url.path, url.query, url.netloc)).encode()
    proxy.faults(latency_ms=600)
    sockets = [socket.create_connection(("127.0.0.1", proxy.port)) for _ in range(300)]
    for s in sockets:
        s.sendall(request)
    for s in sockets:
        got = b""
        while not got.endswith(b"0123456789"):
            got += s.recv(4096) or pytest.fail("closed early: %r" % got)
        s.close()
    assert proxy.stats()["peak_in_flight"] == 300 and proxy.rounds() <= 2


# ---- the proxy: faults ----

def test_status(proxy, bucket):
    c = proxy.client
    rule = proxy.faults(status=503, next=2, retry_after="7")
    answer = refused(503, "SlowDown", c.get, bucket, "small")
    assert answer.headers["retry-after"] == "7" and b"injected" in answer.body
    refused(503, "SlowDown", c.put, bucket, "unwritten", BODY)
    assert c.get(bucket, "small") == b"0123456789" and rule.hits == 2
    refused(404, "NoSuchKey", c.get, bucket, "unwritten")
    assert proxy.stats()["injected"] == {"status": 2} and proxy.stats()["connections"] == 1

    proxy.clear()
    proxy.faults(status=500, first=1, methods="GET")
    for off in (0, 5):
        refused(500, "InternalError", c.get, bucket, "small", off, 2)
        assert c.get(bucket, "small", off, 2) == b"0123456789"[off:off + 2]
    c.head(bucket, "small")

    proxy.clear()
    proxy.faults(status=429, skip=1, next=1, match="/small$")
    assert c.get(bucket, "small") and c.get(bucket, "data")
    refused(429, "TooManyRequests", c.get, bucket, "small")
    assert c.get(bucket, "small")

    proxy.clear()
    proxy.faults(status=412)
    refused(412, "PreconditionFailed", c.get, bucket, "small")
    refused(412, "", c.head, bucket, "small")


def test_probability_repeats_with_the_seed(proxy, bucket):
    def outcome():
        proxy.reset(seed=SEED)
        proxy.faults(status=503, p=0.3)
        return [proxy.client.request("HEAD", bucket, "small").status for _ in range(60)]
    first = outcome()
    assert first == outcome() and 5 < first.count(503) < 32
    assert proxy.stats()["status"] == collections.Counter(first)


def test_latency_and_pace(proxy, bucket):
    def took(*args):
        start = time.monotonic()
        assert proxy.client.get(bucket, "data") == BODY
        return time.monotonic() - start
    proxy.faults(latency_ms=150)
    assert 0.15 <= took() < 3
    proxy.clear()
    proxy.faults(bytes_per_s=1e6)
    assert 0.28 <= took() < 3
    start = time.monotonic()
    proxy.client.put(bucket, "paced", BODY)
    assert 0.28 <= time.monotonic() - start < 3


def test_broken_connections(proxy, bucket):
    c = proxy.client
    for what, error in (("reset", ConnectionResetError), ("truncate", http.client.IncompleteRead)):
        proxy.reset()
        proxy.faults(next=1, at=1000, **{what: True})
        with pytest.raises(error) as e:
            c.get(bucket, "data")
        if what == "truncate":
            assert e.value.partial == BODY[:1000]
        assert c.get(bucket, "data") == BODY
        assert [(x.injected, x.status, x.bytes_down) for x in proxy.log] == [(what, 200, 1000), ("", 200, len(BODY))]

    proxy.reset()
    proxy.faults(drop=True, next=1)
    with pytest.raises(BROKEN):
        c.put(bucket, "dropped", b"x")
    refused(404, "NoSuchKey", c.get, bucket, "dropped")
    proxy.faults(lose=True, methods="PUT")
    with pytest.raises(BROKEN):
        c.put(bucket, "lost", b"x")
    assert c.get(bucket, "lost") == b"x"
    assert [x.injected for x in proxy.log] == ["drop", "", "lose", ""]


def test_stall(proxy, bucket):
    proxy.faults(stall_ms=300, next=1)
    start = time.monotonic()
    assert proxy.client.get(bucket, "data") == BODY and time.monotonic() - start >= 0.3
    proxy.clear()
    proxy.faults(stall_ms=60_000)
    impatient = proxy.client
    impatient.timeout_s = 0.1
    impatient.close()
    with pytest.raises(TimeoutError):
        impatient.get(bucket, "data")
    until = time.monotonic() + 10
    while len(proxy.log) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert proxy.log[1].injected == "stall_ms+left" and proxy.stats()["in_flight"] == 0


def test_wrong_content(proxy, bucket):
    c = proxy.client
    proxy.faults(corrupt=True, match="/data$")
    for _ in range(3):
        got = c.get(bucket, "data")
        assert len(got) == len(BODY) and sum(a != b for a, b in zip(got, BODY)) == 1
    proxy.clear()
    proxy.faults(corrupt=True, at=9)
    assert c.get(bucket, "small") == bytes([*b"012345678", ord("9") ^ 0x55])
    proxy.clear()
    proxy.faults(etag="other")
    assert c.head(bucket, "small")["etag"] == '"0123456789abcdef0123456789abcdef"'


def test_old_store_redirect_and_rewrite(proxy, bucket):
    c = proxy.client
    proxy.faults(no_conditions=True)
    refused(501, "NotImplemented", c.put, bucket, "new", b"x", exclusive=True)
    c.put(bucket, "new", b"x")
    assert c.get(bucket, "new", headers={"If-None-Match": '"other"'}) == b"x"

    proxy.reset()
    proxy.faults(redirect="eu-west-9")
    assert refused(301, "PermanentRedirect", c.get, bucket, "small").headers["x-amz-bucket-region"] == "eu-west-9"
    assert refused(301, "", c.head, bucket, "small").headers["x-amz-bucket-region"] == "eu-west-9"
    c.region = "eu-west-9"
    assert c.get(bucket, "small") == b"0123456789"

    proxy.reset()
    proxy.faults(rewrite=412, methods="PUT", next=1)  # what a second try sees when the answer to the first was lost
    refused(412, "PreconditionFailed", c.put, bucket, "written", b"y", exclusive=True)
    assert c.get(bucket, "written") == b"y"


def test_expect_and_chunks(proxy, bucket):
    """A client that waits for 100 Continue, as curl does; one that does not say how much it sends."""
    url = urllib.parse.urlsplit(proxy.client.presign("PUT", bucket, "waited"))
    head = "PUT %s?%s HTTP/1.1\r\nHost: %s\r\n" % (url.path, url.query, url.netloc)
    with socket.create_connection(("127.0.0.1", proxy.port)) as s:
        s.sendall((head + "Content-Length: 5\r\nExpect: 100-continue\r\n\r\n").encode())
        assert s.recv(4096).startswith(b"HTTP/1.1 100 ")
        s.sendall(b"hello")
        assert s.recv(4096).startswith(b"HTTP/1.1 200 ")
    assert proxy.client.get(bucket, "waited") == b"hello"
    proxy.faults(status=503, methods="PUT")
    for extra, status in (("Content-Length: 5\r\nExpect: 100-continue\r\n", b"503"), ("Transfer-Encoding: chunked\r\n", b"501")):
        proxy.forget()
        with socket.create_connection(("127.0.0.1", proxy.port)) as s:
            s.sendall((head + extra + "\r\n").encode())
            assert s.makefile("rb").read().startswith(b"HTTP/1.1 " + status)


def test_as_a_command(s3, bucket):
    p = subprocess.Popen([sys.executable, str(ROOT / "test/s3/fault_proxy.py"), "--upstream", s3.endpoint, "--fault", "status=503&next=1"],
                         stdout=subprocess.PIPE, text=True)
    try:
        endpoint = p.stdout.readline().strip()
        c = s3.client_at(endpoint)
        refused(503, "SlowDown", c.get, bucket, "small")
        assert c.get(bucket, "small") == b"0123456789"
        for page, says in (("faults?drop=1&methods=HEAD", '"drop": true'), ("stats", '"requests": 2'), ("log", '"status"'), ("rounds", '"rounds": 2')):
            with urllib.request.urlopen("%s/__proxy/%s" % (endpoint, page)) as r:
                assert says in r.read().decode()
        with pytest.raises(BROKEN):
            c.head(bucket, "small")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(endpoint + "/__proxy/faults?no_such=1")
    finally:
        p.send_signal(signal.SIGINT)
        assert p.wait(10) == 0
        p.stdout.close()


def test_without_a_store(proxy, bucket):
    proxy.upstream = ("127.0.0.1", 1)
    refused(502, "BadGateway", proxy.client.get, bucket, "small")


# ---- the script that starts the store ----

def test_only_its_own_is_ended_and_removed(tmp_path):
    """Not a process whose number was recorded for another before, nor a folder that holds no store."""
    assert rgw("env", tmp_path).returncode == 1
    os.makedirs(tmp_path / "run")
    assert rgw("start", tmp_path).returncode == 1  # not in a folder of somebody's
    assert rgw("stop", tmp_path, "--remove").returncode == 0 and tmp_path.exists()
    (tmp_path / MARK).touch()
    other = subprocess.Popen(["sleep", "60"])
    try:
        (tmp_path / "run/rgw.pid").write_text("%d %d\n" % (other.pid, born(other.pid) - 1))
        assert rgw("stop", tmp_path, "--remove").returncode == 0
        assert other.poll() is None and not tmp_path.exists()
    finally:
        other.kill()
        other.wait()


def test_packages_are_named(tmp_path):
    r = subprocess.run(["/usr/bin/python3", str(ROOT / "test/s3/rgw.py"), "start", str(tmp_path / "s")], capture_output=True, text=True,
                       env={"PATH": str(tmp_path)})
    assert r.returncode == 3 and "ceph-mon, ceph-osd, radosgw is not installed" in r.stderr.replace("ceph-common, ", "") and "install-deps" in r.stderr
