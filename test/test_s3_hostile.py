"""Servers that no store is: small ones of our own that answer wrongly, endlessly, too early or not at all. What comes back is an
error that names the object and never a secret, soon; never a crash, a hang or a wrong row."""
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from conftest import BUILD, build_shard, clustered, connect, plain_environ, use_environ

KEY, SECRET, TOKEN = "AKIAOFTHETEST", "secretOfTheTest" * 3, "tokenOfTheTest" * 40


class Server:
    """answer(request) gives the bytes to send, None to break off, or a generator of pieces; requests are "METHOD target" with headers."""

    def __init__(self, answer):
        self.answer, self.requests = answer, []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.endpoint = "http://127.0.0.1:%d" % self.listener.getsockname()[1]
        self.env = {"AWS_ENDPOINT_URL": self.endpoint, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": TOKEN,
                    "AWS_REGION": "us-east-1", "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            threading.Thread(target=self.serve, args=(self.listener.accept()[0],), daemon=True).start()

    def serve(self, c):
        try:
            f = c.makefile("rb")
            while line := f.readline():
                head = [line.decode()]
                while (line := f.readline()).strip():
                    head.append(line.decode())
                n = [int(h.split(":")[1]) for h in head if h.lower().startswith("content-length")]
                if n:
                    f.read(n[0])
                request = "".join(head)
                self.requests.append(request)
                pieces = self.answer(request)
                if pieces is None:
                    break
                for piece in [pieces] if isinstance(pieces, bytes) else pieces:
                    c.sendall(piece)
        except OSError:
            pass
        c.close()


def http(status, body=b"", **headers):
    lines = "".join("%s: %s\r\n" % (k.replace("_", "-"), v) for k, v in headers.items())
    return ("HTTP/1.1 %s\r\nContent-Length: %d\r\n%s\r\n" % (status, len(body), lines)).encode() + body


def error(status, code, message="no", **headers):
    return http(status, ("<Error><Code>%s</Code><Message>%s</Message></Error>" % (code, message)).encode(), **headers)


class Shop:
    """A good store with one shard at s3://bucket/x, whose answers a test may change: change(request, answer) -> answer."""

    def __init__(self, folder, change=lambda request, answer: answer):
        self.files = {name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)}
        self.change = change

    def __call__(self, request):
        return self.change(request, self.good(request))

    def good(self, request):
        target = request.split()[1]
        if "list-type=2" in target:
            keys = "".join("<Contents><Key>x/%s</Key><Size>%d</Size><ETag>&quot;%s&quot;</ETag></Contents>" % (n, len(b), n[:8])
                           for n, b in sorted(self.files.items()) if n.startswith("manifest"))
            return http("200 OK", ("<ListBucketResult><IsTruncated>false</IsTruncated>%s</ListBucketResult>" % keys).encode())
        name = target.split("?")[0].rsplit("/", 1)[1]
        if name not in self.files:
            return error("404 Not Found", "NoSuchKey")
        body, etag = self.files[name], '"%s"' % name[:8]
        if r := re.search(r"Range: bytes=(\d+)-(\d+)", request):
            a, b = int(r[1]), min(int(r[2]), len(body) - 1)
            return http("206 Partial Content", body[a:b + 1], ETag=etag, Content_Range="bytes %d-%d/%d" % (a, b, len(body)))
        return http("200 OK", body, ETag=etag)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return build_shard(tmp_path_factory.mktemp("hostile") / "x", clustered(9000, 8, 1), ["id%d" % i for i in range(9000)])


def ask(env, sql="SELECT id FROM shard_union('s3://bucket/x', '[1,2,3,4,5,6,7,8]', 5)", timeout_ms=4000, **more):
    """What a new process gets: rows, or an error text in which no secret is."""
    code = ("import sys, json, sqlite3; c = sqlite3.connect(':memory:'); c.enable_load_extension(True); c.load_extension(sys.argv[1])\n"
            "try: print(json.dumps(c.execute(sys.argv[2]).fetchall()))\nexcept sqlite3.Error as e: print(json.dumps(str(e)))")
    r = subprocess.run([sys.executable, "-c", code, str(BUILD / "vecshard"), sql], capture_output=True, text=True, timeout=60,
                       env={**os.environ, **env, "VECSHARD_TIMEOUT_MS": str(timeout_ms), **more})
    assert r.returncode == 0, r.stderr
    for secret in (KEY, SECRET, TOKEN, TOKEN[:40]):
        assert secret not in r.stdout + r.stderr
    return json.loads(r.stdout)


def test_the_good_one(shard):
    want = [list(r) for r in connect().execute("SELECT id FROM shard_union(?, '[1,2,3,4,5,6,7,8]', 5)", (shard.path,))]
    assert ask(Server(Shop(shard.path)).env) == want


WRONG = {
    "whole object for a range": lambda q, a: Shop.good(shop_of[0], re.sub("Range: .*", "", q)) if "Range: bytes=1" in q else a,
    "another range": lambda q, a: a.replace(b"Content-Range: bytes ", b"Content-Range: bytes 7"),
    "more than asked for": lambda q, a: http("206 Partial Content", b"x" * 2000000, ETag='"seg-"', Content_Range="bytes 0-1999999/2000000") if "Range" in q else a,
    "another size": lambda q, a: re.sub(rb"(Content-Range: .*/)(\d+)", rb"\g<1>99999999", a),
    "changing ETags": lambda q, a: a.replace(b"ETag: ", b'ETag: "%d' % time.monotonic_ns()) if "Range" in q else a,
    "no XML": lambda q, a: http("200 OK", b"<html><body>Welcome</body>") if "list-type" in q else a,
    "deep XML": lambda q, a: http("200 OK", b"<a>" * 100000) if "list-type" in q else a,
    "entities": lambda q, a: http("200 OK", b'<!DOCTYPE x [<!ENTITY a "aaaa">]><ListBucketResult>&a;</ListBucketResult>') if "list-type" in q else a,
    "huge key": lambda q, a: http("200 OK", b"<ListBucketResult><Contents><Key>" + b"k" * 100000 + b"</Key></Contents></ListBucketResult>") if "list-type" in q else a,
    "bad escape": lambda q, a: http("200 OK", b"<ListBucketResult><Contents><Key>x/%zz%00</Key></Contents></ListBucketResult>") if "list-type" in q else a,
    "endless listing": lambda q, a: http("200 OK", b"<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>"
                                         b"<CommonPrefixes><Prefix>x/a/</Prefix></CommonPrefixes></ListBucketResult>") if "list-type" in q else a,
    "up and out": lambda q, a: http("200 OK", b"<ListBucketResult><CommonPrefixes><Prefix>x/../</Prefix></CommonPrefixes></ListBucketResult>") if "list-type" in q else a,
    "redirect loop": lambda q, a: http("301 Moved Permanently", Location="/elsewhere", x_amz_bucket_region="eu-west-%d" % (time.monotonic_ns() % 9)),
    "echoed token": lambda q, a: error("403 Forbidden", "AccessDenied", "your token " + TOKEN + " and key " + KEY),
    "a year to wait": lambda q, a: error("503 Slow Down", "SlowDown", Retry_After="99999999999999999999"),
    "rubbish": lambda q, a: b"\x00\xff" * 5000,
    "nothing": lambda q, a: None,
}
shop_of = []


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers(shard, name):
    shop = Shop(shard.path, WRONG[name])
    shop_of[:] = [shop]
    started = time.monotonic()
    text = ask(Server(shop).env, timeout_ms=1500)
    assert isinstance(text, str) and ("s3://bucket" in text or "max_bytes" in text), text
    assert time.monotonic() - started < 15


def test_refusals_are_not_repeated(shard):
    """Not even when their body breaks off or never ends."""
    for status in ("403 Forbidden", "404 Not Found", "412 Precondition Failed"):
        for body in (b"<Error><Co", b"x" * 200000):
            server = Server(lambda q: ("HTTP/1.1 %s\r\nContent-Length: 999999\r\n\r\n" % status).encode() + body)
            text = ask(server.env, timeout_ms=3000)
            assert status[:3] in text or "changed" in text
            assert len(server.requests) <= 3, (status, len(server.requests))


def test_a_head_that_breaks_off_is_read_again(shard):
    broken = []

    def change(q, a):
        if "Range" in q and len(broken) < 2:
            broken.append(q)
            return cut()
        return a

    def cut():
        yield b'HTTP/1.1 206 Partial Content\r\nETag: "se'
        raise OSError

    want = ask(Server(Shop(shard.path)).env)
    assert ask(Server(Shop(shard.path, change)).env) == want and len(broken) == 2


@pytest.mark.parametrize("what", ["region", "clock"])
def test_what_one_request_puts_right_serves_all(shard, what):
    """All requests of the first round are refused for the same reason."""

    def change(q, a):
        if what == "region" and "/eu-west-3/s3/" not in q:
            return error("400 Bad Request", "AuthorizationHeaderMalformed", "wrong region", x_amz_bucket_region="eu-west-3")
        if what == "clock" and "x-amz-date: 2030" not in q:
            return error("403 Forbidden", "RequestTimeTooSkewed", Date="Tue, 01 Jan 2030 00:00:00 GMT")
        return a
    assert ask(Server(Shop(shard.path, change)).env) == ask(Server(Shop(shard.path)).env)


def test_urls_with_a_signature_are_not_shown():
    for sql in ("SELECT * FROM shard_info('%s')", "SELECT * FROM shard_verify('%s')", "SELECT * FROM shard_union('%s', '[1]', 1)", "SELECT s3_head('%s')"):
        text = ask({}, sql % "http://127.0.0.1:9/b/x?X-Amz-Signature=c0ffee")
        assert isinstance(text, str) and "c0ffee" not in text


def test_an_upload_answered_early(shard, tmp_path):
    """A 200 with a body while the file is still being sent: nothing but the file may leave."""
    big = build_shard(tmp_path / "big", clustered(9000, 250, 1))
    seen = bytearray()

    class Early(Server):
        def serve(self, c):
            head = b""
            while b"\r\n\r\n" not in head:
                piece = c.recv(4096)
                if not piece:
                    return
                head += piece
            if head.startswith(b"PUT") and b".ivf" in head:
                c.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                seen.extend(head.split(b"\r\n\r\n", 1)[1])
                while len(seen) < 200000:
                    seen.extend(c.recv(65536))
                c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n" + b"y" * 3000000)
                size = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
                while len(seen) < size and (piece := c.recv(65536)):
                    seen.extend(piece)
            else:
                c.sendall(error("404 Not Found", "NoSuchKey") if b"GET" in head[:4] and b"list-type" not in head else
                          http("200 OK", b"<ListBucketResult></ListBucketResult>"))
            c.close()

    server = Early(None)
    r = subprocess.run([str(BUILD / "vecshard"), "publish", str(big.path), "s3://bucket/x"], capture_output=True, text=True, timeout=60,
                       env={**plain_environ(server.env), "VECSHARD_TIMEOUT_MS": "2000"})
    assert r.returncode == 1, r.stderr
    body = open([os.path.join(big.path, n) for n in os.listdir(big.path) if n.endswith(".ivf")][0], "rb").read()
    n = min(len(seen), len(body))
    assert n >= 200000 and bytes(seen[:n]) == body[:n]


def test_queries_from_exit_handlers(shard):
    """After the engine has ended a query fails at once, and a thread that waits for one is let go."""
    server = Server(Shop(shard.path, lambda q, a: (time.sleep(30), a)[1] if "Range" in q else a))
    code = ("import sys, sqlite3, atexit, ctypes, threading, time\n"
            "c = sqlite3.connect(':memory:', check_same_thread=False); c.enable_load_extension(True); c.load_extension(sys.argv[1])\n"
            "def ask():\n"
            "  try: c.execute(\"SELECT id FROM shard_union('s3://bucket/x', '[1,2,3,4,5,6,7,8]', 5)\").fetchall()\n"
            "  except sqlite3.Error as e: print(e)\n"
            "threading.Thread(target=ask, daemon=True).start(); time.sleep(0.7)\n")
    started = time.monotonic()
    r = subprocess.run([sys.executable, "-c", code, str(BUILD / "vecshard")], capture_output=True, text=True, timeout=30, env={**os.environ, **server.env})
    assert r.returncode == 0 and time.monotonic() - started < 6


def test_interrupt_while_retrying(shard, monkeypatch):
    server = Server(Shop(shard.path, lambda q, a: error("503 Slow Down", "SlowDown")))
    use_environ(monkeypatch, server.env)
    db = connect()
    at = []
    threading.Timer(0.6, lambda: (at.append(time.monotonic()), db.interrupt())).start()
    with pytest.raises(sqlite3.OperationalError, match="interrupt"):
        db.execute("SELECT id FROM shard_union('s3://bucket/x', '[1,2,3,4,5,6,7,8]', 5)").fetchall()
    assert time.monotonic() - at[0] < 0.3
    db.close()
