#!/usr/bin/python3
"""An HTTP/1.1 proxy in front of an object store that delays, breaks and counts. Standard library only.

    fault_proxy.py --upstream 127.0.0.1:9000 [--port 0] [--seed 1] [--fault 'status=503&p=0.1&match=manifest'] ...
    curl '127.0.0.1:PORT/__proxy/faults?latency_ms=50'      adds a fault; likewise /__proxy/stats, log, rounds, reset

    with FaultProxy("127.0.0.1:9000") as proxy:             in a thread of its own
        proxy.faults(status=503, first=2, methods="GET")    each call adds a rule, see Fault; proxy.clear() drops them
        ...                                                 requests to proxy.endpoint
        proxy.stats()["requests"], proxy.rounds(), proxy.log

What the client sends arrives as it was sent, its Host header included, so that signatures stay valid. Connections are kept
alive on both sides; the store's are a pool. Without faults bytes pass as they come. What differs from the wire: `Expect:
100-continue` is answered here, answers without a length or in chunks are collected and sent with a length, and a request body
in chunks is refused with 501, as Amazon's S3 does. Requests on one connection are handled one after the other.

A request counts as ended when its last byte is handed to the system, and is in the log before that: who has read a whole
answer finds it there.
"""
import argparse
import asyncio
import collections
import dataclasses
import http
import itertools
import json
import random
import re
import socket
import struct
import sys
import threading
import time
import traceback
import typing
import urllib.parse
import xml.sax.saxutils

HEAD_MAX = 64 << 10
BUFFERED_MAX = 512 << 10  # a connection is not read from while it has this much waiting
IDLE_S = 20               # kept connections to the store: radosgw closes its own after 65 s
LOG_MAX = 200000
ADMIN = "/__proxy/"
OTHER_ETAG = '"0123456789abcdef0123456789abcdef"'
CODES = {301: "PermanentRedirect", 400: "BadRequest", 403: "AccessDenied", 404: "NoSuchKey", 409: "OperationAborted", 412: "PreconditionFailed",
         429: "TooManyRequests", 500: "InternalError", 501: "NotImplemented", 502: "BadGateway", 503: "SlowDown", 504: "GatewayTimeout"}


@dataclasses.dataclass
class Fault:
    """Which requests, and what happens to them. All that are not given apply to every request and do nothing."""
    match: str = ""          # a regular expression, searched in the decoded path with its query
    methods: str = ""        # "GET,HEAD"
    p: float = 1.0           # with this probability
    skip: int = 0            # not the first so many that match
    next: int = 0            # then only so many
    first: int = 0           # the first so many of each (method, path with query, range)
    # before the store is asked
    latency_ms: float = 0
    jitter_ms: float = 0     # the mean of what is added to latency_ms, exponentially distributed
    drop: bool = False       # reset; nothing is sent, the store is not asked
    status: int = 0          # this answer, with an S3 error body, instead of asking the store
    code: str = ""           # its <Code>; by default what goes with the status
    retry_after: str = ""    # its Retry-After
    redirect: str = ""       # 301 to this region, unless the request is signed for it
    no_conditions: bool = False  # 501 to a PUT or POST with If-None-Match or If-Match, as old stores answer
    # after the store has done what was asked
    lose: bool = False       # reset instead of the answer
    rewrite: int = 0         # this status and an error body instead of the answer
    etag: str = ""           # the answer's ETag; "other" is one that no object has
    bytes_per_s: float = 0   # the pace of bodies, up and down
    # amid the answer's body, where it has at least two bytes
    at: int = 0              # after so many bytes of it, at most all but one; 0: anywhere
    reset: bool = False
    truncate: bool = False   # the connection is closed in order, too early
    stall_ms: float = 0      # nothing for so long, then the rest
    corrupt: bool = False    # one byte is another

    def __post_init__(self):
        self.hits = 0        # requests it took
        self.seen = 0        # requests it matched
        self.per_request = collections.Counter()

    def takes(self, request, rng):
        if self.methods and request.method not in self.methods.split(","):
            return False
        if self.match and not re.search(self.match, request.target):
            return False
        self.seen += 1
        if self.seen <= self.skip or (self.next and self.hits >= self.next):
            return False
        if self.first:
            self.per_request[request.same] += 1
            if self.per_request[request.same] > self.first:
                return False
        if self.p < 1 and rng.random() >= self.p:
            return False
        self.hits += 1
        return True


class Entry(typing.NamedTuple):
    """A request that has ended, in the log."""
    method: str
    key: str         # the decoded path: "/bucket/key"
    query: str
    range: str       # "bytes=0-9", "" without
    status: int      # 0: there was no answer
    bytes_up: int    # of bodies
    bytes_down: int
    injected: str    # "status", "latency_ms+reset", ...; "left": the client went away; "no store": the store did
    began: float     # time.monotonic()
    ended: float


def longest_chain(entries, match="", methods=""):
    n, end = 0, -1.0
    for e in sorted(entries, key=lambda e: e.ended):  # taking what ends first leaves the most room for what follows
        if (match and not re.search(match, e.key)) or (methods and e.method not in methods.split(",")):
            continue
        if e.began >= end:
            n, end = n + 1, e.ended
    return n


class Gone(Exception):
    """The other side has closed the connection."""


class Wire(asyncio.Protocol):
    """One connection as a queue of the pieces that arrived; none is copied."""

    def __init__(self, accepted=None):
        self.accepted, self.task = accepted, None
        self.pieces, self.n_bytes, self.over, self.paused = collections.deque(), 0, False, False
        self.reader = self.writer = None  # futures of whoever waits
        self.full, self.used = False, time.monotonic()

    def connection_made(self, transport):
        self.transport = transport
        transport.set_write_buffer_limits(high=BUFFERED_MAX)
        if self.accepted:
            self.task = asyncio.get_running_loop().create_task(self.accepted(self))

    def data_received(self, data):
        self.pieces.append(data)
        self.n_bytes += len(data)
        if self.n_bytes > BUFFERED_MAX and not self.paused:
            self.paused = True
            self.transport.pause_reading()
        self.wake("reader")

    def eof_received(self):
        self.over = True
        self.wake("reader")
        return False

    def connection_lost(self, exc):
        self.over = True
        self.wake("reader")
        self.wake("writer")
        if self.task:
            self.task.cancel()

    def pause_writing(self):
        self.full = True

    def resume_writing(self):
        self.full = False
        self.wake("writer")

    def wake(self, who):
        waiting = getattr(self, who)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    async def some(self, most=1 << 62):
        """The next bytes, at least one, at most so many."""
        while not self.pieces:
            if self.over:
                raise Gone
            self.reader = asyncio.get_running_loop().create_future()
            await self.reader
        piece = self.pieces.popleft()
        if len(piece) > most:
            self.pieces.appendleft(memoryview(piece)[most:])
            piece = memoryview(piece)[:most]
        self.n_bytes -= len(piece)
        if self.paused and self.n_bytes <= BUFFERED_MAX // 2:
            self.paused = False
            self.transport.resume_reading()
        return piece

    async def until(self, mark):
        """The bytes up to and with a mark."""
        data = bytes(await self.some())
        while mark not in data:
            if len(data) > HEAD_MAX:
                raise Gone
            data += await self.some()
        data, mark, rest = data.partition(mark)
        if rest:
            self.pieces.appendleft(rest)
            self.n_bytes += len(rest)
        return data + mark

    async def exactly(self, n):
        parts = []
        while n:
            parts.append(await self.some(n))
            n -= len(parts[-1])
        return b"".join(parts)

    async def room(self):
        """Waits until what was written is on its way, so far that more may follow."""
        while self.full and not self.transport.is_closing():
            self.writer = asyncio.get_running_loop().create_future()
            await self.writer

    def write(self, data):
        self.transport.write(data)

    def close(self):
        """In order: what was written is still sent."""
        self.transport.close()

    def reset(self):
        s = self.transport.get_extra_info("socket")
        if s is not None and not self.transport.is_closing():
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


class Head:
    """The first line and the headers of a message, as they came."""

    def __init__(self, raw):
        self.raw = raw
        lines = raw.decode("latin-1").split("\r\n")
        self.line = lines[0].split(" ", 2)
        self.fields = {}
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            if colon:
                self.fields[name.lower()] = value.strip()

    def get(self, name, default=""):
        return self.fields.get(name, default)

    def has(self, name, value):
        return value in self.fields.get(name, "").lower()

    def changed(self, without, added=b""):
        """The bytes without some headers, with others."""
        lines = self.raw[:-4].split(b"\r\n")
        kept = [line for line in lines[1:] if line.partition(b":")[0].lower() not in without]
        return b"\r\n".join([lines[0], *kept]) + b"\r\n" + added + b"\r\n"


class Request:
    def __init__(self, raw):
        self.head = Head(raw)
        self.method, path, _ = self.head.line
        self.path, _, self.query = path.partition("?")
        self.target, self.key = urllib.parse.unquote(path), urllib.parse.unquote(self.path)
        self.range = self.head.get("range")
        # dates and signatures in a presigned query change from one try to the next
        self.same = (self.method, self.path, re.sub("X-Amz-[^&]*&?", "", self.query), self.range)
        self.n_bytes = int(self.head.get("content-length", "0"))
        self.began, self.ended = time.monotonic(), None
        self.status = self.bytes_up = self.bytes_down = 0
        self.injected = []


class FaultProxy:
    """See the top of the file. All methods may be called from any thread; `port` is known once start() has returned."""

    def __init__(self, upstream, port=0, host="127.0.0.1", seed=1):
        upstream = upstream.partition("://")[2] or upstream
        self.upstream = (upstream.rpartition(":")[0], int(upstream.rpartition(":")[2]))
        self.host, self.port, self.seed = host, port, seed
        self.loop = asyncio.new_event_loop()
        self.thread = None
        self.rules, self.wires, self.pool, self.entries = [], set(), [], collections.deque(maxlen=LOG_MAX)
        self.in_flight = 0
        self.zero()

    # ---- for tests ----

    @property
    def endpoint(self):
        return "http://%s:%d" % (self.host, self.port)

    def start(self):
        up = threading.Event()
        self.thread = threading.Thread(target=self.work, args=(up,), name="fault proxy", daemon=True)
        self.thread.start()
        up.wait()
        if self.failure:
            raise self.failure
        return self

    def stop(self):
        if self.thread and self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.stopping.set)
            self.thread.join()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def faults(self, **what):
        """Adds a rule (fields of Fault) and returns it; its .hits counts the requests that it took."""
        rule = Fault(**what)
        return self.call(lambda: self.rules.append((rule, random.Random("%s %d" % (self.seed, len(self.rules))))) or rule)

    def clear(self):
        """No faults any more; counters and log stay."""
        self.call(self.rules.clear)

    def reset(self, seed=None):
        """No faults, counters at zero, log empty. Connections stay."""
        if seed is not None:
            self.seed = seed
        self.call(lambda: (self.rules.clear(), self.zero()))

    def forget(self):
        """Counters at zero and log empty; faults stay."""
        self.call(self.zero)

    def stats(self):
        """Counters since the start or reset(): see zero(); open, in_flight: now."""
        return self.call(lambda: {**self.counts, **{k: collections.Counter(self.counts[k]) for k in ("status", "methods", "injected")},
                                  "open": len(self.wires), "in_flight": self.in_flight,
                                  "keys": {k: {**v, "ranges": list(v["ranges"])} for k, v in self.counts["keys"].items()}})

    @property
    def log(self):
        """Requests that have ended, in that order."""
        return self.call(lambda: list(self.entries))

    def rounds(self, match="", methods=""):
        """The longest chain of logged requests each of which began after the one before had ended."""
        return longest_chain(self.log, match, methods)

    # ---- the thread ----

    def call(self, f):
        """f() on the proxy's thread, where all state lives; here when that does not run."""
        if self.thread is None or not self.thread.is_alive():
            return f()

        async def run():
            return f()
        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(30)

    def zero(self):
        self.counts = {"requests": 0, "bytes_up": 0, "bytes_down": 0, "connections": 0, "peak_in_flight": self.in_flight,
                       "status": collections.Counter(), "methods": collections.Counter(), "injected": collections.Counter(),
                       "keys": {}}  # "/bucket/key" -> {"requests", "bytes_down", "ranges": [(first, last) or None for all]}
        self.entries.clear()

    def work(self, up):
        self.failure = None
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self.serve(up))
        except OSError as e:
            self.failure = e
            up.set()
        finally:
            self.loop.close()

    async def serve(self, up):
        self.stopping = asyncio.Event()
        server = await self.loop.create_server(lambda: Wire(self.converse), self.host, self.port, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        up.set()
        await self.stopping.wait()
        server.close()
        tasks = [w.task for w in self.wires]
        for w in [*self.wires, *self.pool]:
            w.transport.abort()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the transports' own ends

    async def converse(self, wire):
        """All requests of a connection."""
        self.wires.add(wire)
        self.counts["connections"] += 1
        try:
            keep = True
            while keep:
                raw = await wire.until(b"\r\n\r\n")
                request = Request(raw)
                if request.path.startswith(ADMIN):
                    keep = self.admin(wire, request)
                    continue
                keep = await self.one(wire, request)
            wire.close()
        except (Gone, ValueError):  # ValueError: not HTTP
            wire.close()
        except asyncio.CancelledError:
            pass
        except Exception:  # an error in here: loud, and no test hangs for it
            traceback.print_exc()
            wire.reset()
        finally:
            self.wires.discard(wire)

    async def one(self, wire, request):
        """A request from its head to the end of its answer; whether the connection goes on."""
        c = self.counts
        self.in_flight += 1
        c["requests"] += 1
        c["methods"][request.method] += 1
        c["peak_in_flight"] = max(c["peak_in_flight"], self.in_flight)
        k = c["keys"].setdefault(request.key, {"requests": 0, "bytes_down": 0, "ranges": []})
        k["requests"] += 1
        m = re.fullmatch(r"bytes=(\d*)-(\d*)", request.range)
        k["ranges"].append(m and (int(m[1]) if m[1] else None, int(m[2]) if m[2] else None))
        try:
            return await self.handle(wire, request)
        finally:
            self.ended(request, "left" if wire.over else "no store")  # unless it has ended already

    def ended(self, request, how=None):
        """Into the log, once: before the last byte is written, or when the connection is broken."""
        if request.ended is not None:
            return
        r, c = request, self.counts
        r.ended = time.monotonic()
        self.in_flight -= 1
        if how:
            r.injected.append(how)
        for name in r.injected:
            c["injected"][name] += 1
        c["status"][r.status] += 1
        c["bytes_up"] += r.bytes_up
        c["bytes_down"] += r.bytes_down
        if r.key in c["keys"]:
            c["keys"][r.key]["bytes_down"] += r.bytes_down
        self.entries.append(Entry(r.method, r.key, r.query, r.range, r.status, r.bytes_up, r.bytes_down, "+".join(r.injected), r.began, r.ended))

    async def handle(self, wire, request):
        head = request.head
        hits = [(rule, rng) for rule, rng in self.rules if rule.takes(request, rng)]

        def want(name):
            return next((rule for rule, _ in hits if getattr(rule, name)), None)

        # ---- before the store is asked
        wait_ms = sum(rule.latency_ms + (rng.expovariate(1 / rule.jitter_ms) if rule.jitter_ms else 0) for rule, rng in hits)
        if wait_ms:
            request.injected.append("latency_ms")
            await asyncio.sleep(wait_ms / 1000)
        if want("drop"):
            self.ended(request, "drop")
            wire.reset()
            return False
        if head.has("transfer-encoding", "chunked"):
            return await self.answer(wire, request, "chunked", 501)
        rule = want("redirect")
        if rule and "/%s/s3/" % rule.redirect not in head.get("authorization") + urllib.parse.unquote(request.query):
            return await self.answer(wire, request, "redirect", 301, "", ["x-amz-bucket-region: " + rule.redirect])
        if want("no_conditions") and request.method in ("PUT", "POST") and (head.get("if-none-match") or head.get("if-match")):
            return await self.answer(wire, request, "no_conditions", 501)
        rule = want("status")
        if rule:
            return await self.answer(wire, request, "status", rule.status, rule.code, ["Retry-After: " + rule.retry_after] * bool(rule.retry_after))

        # ---- asking it
        pace = want("bytes_per_s")
        if pace:
            request.injected.append("bytes_per_s")
        rate = pace.bytes_per_s if pace else 0
        if head.has("expect", "100-continue"):
            wire.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        up = None
        try:
            try:
                up = await self.connected()
                up.write(head.changed((b"expect", b"connection")) if "expect" in head.fields or "connection" in head.fields else head.raw)
            except OSError:
                return await self.answer(wire, request, "no store", 502)
            await self.pass_on(wire, up, request.n_bytes, rate, request, "bytes_up")
            try:
                answer = Head(await up.until(b"\r\n\r\n"))
            except Gone:
                return await self.answer(wire, request, "no store", 502, read=True)
            keep = await self.forward(wire, up, request, answer, hits, want, rate)
            if up.over or up.pieces or answer.has("connection", "close"):
                up.close()
            else:
                up.used = time.monotonic()
                self.pool.append(up)
            up = None
            return keep and not head.has("connection", "close")
        finally:
            if up is not None:
                up.transport.abort()

    async def forward(self, wire, up, request, answer, hits, want, rate):
        """The store's answer to the client, with what is wrong with it."""
        request.status = int(answer.line[1])
        bodiless = request.method == "HEAD" or request.status in (204, 304)
        raw, body, n = answer.raw, None, 0
        if bodiless:
            pass
        elif "content-length" in answer.fields:
            n = int(answer.get("content-length"))
        else:
            body = await self.collected(up, answer)
            n = len(body)
            raw = answer.changed((b"transfer-encoding", b"connection"), b"Content-Length: %d\r\n" % n)
            answer = Head(raw)

        lost, rewrite, etag = want("lose"), want("rewrite"), want("etag")
        if lost or rewrite:
            if body is None:
                await up.exactly(n)
            if lost:
                self.ended(request, "lose")
                wire.reset()
                return False
            return await self.answer(wire, request, "rewrite", rewrite.rewrite, rewrite.code, read=True)
        if etag and "etag" in answer.fields:
            request.injected.append("etag")
            raw = answer.changed((b"etag",), b"ETag: %s\r\n" % (OTHER_ETAG if etag.etag == "other" else etag.etag).encode())

        broken = None
        if n >= 2:
            broken = next(((name, rule, rng) for name in ("reset", "truncate", "stall_ms", "corrupt") for rule, rng in hits if getattr(rule, name)), None)
        if n == 0:
            self.ended(request)
        wire.write(raw)
        if body is not None:
            up = Wire()
            up.data_received(body)
        if broken:
            name, rule, rng = broken
            cut = min(rule.at, n - 1) if rule.at else rng.randrange(1, n)
            request.injected.append(name)
            await self.pass_on(up, wire, cut, rate, request, "bytes_down", more=True)
            if name == "stall_ms":
                await asyncio.sleep(rule.stall_ms / 1000)
            elif name == "corrupt":
                byte = bytes(await up.some(1))[0] ^ 0x55
                request.bytes_down += 1
                cut += 1
                if cut == n:
                    self.ended(request)
                wire.write(bytes([byte]))
            else:
                while wire.transport.get_write_buffer_size():
                    await asyncio.sleep(0.002)
                if name == "reset":
                    await asyncio.sleep(0.005)  # so that the client has read what came before
                self.ended(request)
                wire.reset() if name == "reset" else wire.close()
                raise Gone
            n -= cut
        await self.pass_on(up, wire, n, rate, request, "bytes_down")
        return not answer.has("connection", "close")

    async def pass_on(self, source, sink, n, rate, request, counter, more=False):
        """n bytes of a body. more: it does not end here."""
        began, left = time.monotonic(), n
        while left:
            piece = await source.some(min(left, max(1024, int(rate / 50))) if rate else left)  # paced in pieces of 20 ms
            left -= len(piece)
            setattr(request, counter, getattr(request, counter) + len(piece))
            if rate:
                await asyncio.sleep(began + (n - left) / rate - time.monotonic())
            if not left and counter == "bytes_down" and not more:
                self.ended(request)
            sink.write(piece)
            if sink.full:
                await sink.room()

    async def collected(self, up, answer):
        """The body of an answer in chunks, or of one that ends with the connection."""
        parts = []
        if answer.has("transfer-encoding", "chunked"):
            while True:
                n = int((await up.until(b"\r\n")).split(b";")[0], 16)
                if n == 0:
                    while await up.until(b"\r\n") != b"\r\n":  # trailers
                        pass
                    return b"".join(parts)
                parts.append(await up.exactly(n))
                await up.exactly(2)
        try:
            while True:
                parts.append(await up.some())
        except Gone:
            return b"".join(parts)

    async def connected(self):
        """A connection to the store that nobody uses."""
        while self.pool:
            up = self.pool.pop()
            if not up.over and time.monotonic() - up.used < IDLE_S:
                return up
            up.close()
        return (await self.loop.create_connection(Wire, *self.upstream))[1]

    async def answer(self, wire, request, why, status, code="", headers=(), read=False):
        """An answer of the proxy's own, with S3's error body, after the rest of the request is read. read: it is."""
        waits = request.head.has("expect", "100-continue") and not read
        unknown = request.head.has("transfer-encoding", "chunked")
        if not waits and not read and not unknown:
            while request.bytes_up < request.n_bytes:
                request.bytes_up += len(await wire.some(request.n_bytes - request.bytes_up))
        code = code or CODES.get(status, "Error%d" % status)
        body = ('<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>injected by the fault proxy</Message><Resource>%s</Resource>'
                "<RequestId>fault-proxy</RequestId></Error>" % (code, xml.sax.saxutils.escape(request.key))).encode()
        close = waits or unknown or request.head.has("connection", "close")  # the client may or may not send its body now
        request.status = status
        sent = b"" if request.method == "HEAD" else body
        request.bytes_down += len(sent)
        self.ended(request, why)
        self.own(wire, status, body, ["Content-Type: application/xml", "x-amz-request-id: fault-proxy", *headers], close, sent)
        return not close

    def own(self, wire, status, body, headers, close, sent=None):
        try:
            phrase = http.HTTPStatus(status).phrase
        except ValueError:
            phrase = "Status"
        lines = ["HTTP/1.1 %d %s" % (status, phrase), "Content-Length: %d" % len(body), *headers, "Connection: " + ("close" if close else "keep-alive")]
        wire.write("\r\n".join([*lines, "", ""]).encode() + (body if sent is None else sent))

    # ---- by HTTP ----

    def admin(self, wire, request):
        """GET /__proxy/faults?name=value...: adds one (without a query: none); reset, clear, stats, log?n=, rounds?match="""
        query = dict(urllib.parse.parse_qsl(request.query, keep_blank_values=True))
        what, status = request.path[len(ADMIN):], 200
        try:
            if what == "faults":
                if query:
                    rule = typed_fault(query)
                    self.rules.append((rule, random.Random("%s %d" % (self.seed, len(self.rules)))))
                out = [{**dataclasses.asdict(rule), "hits": rule.hits} for rule, _ in self.rules]
            elif what in ("reset", "clear"):
                self.rules.clear()
                if what == "reset":
                    self.zero()
                out = {}
            elif what == "stats":
                out = {**self.counts, "open": len(self.wires), "in_flight": self.in_flight}
            elif what == "log":
                n = int(query.get("n", 100))
                out = [e._asdict() for e in itertools.islice(self.entries, max(0, len(self.entries) - n), None)]
            elif what == "rounds":
                out = {"rounds": longest_chain(self.entries, **query)}
            else:
                raise ValueError("no such page: " + what)
        except (ValueError, TypeError) as e:
            status, out = 400, {"error": str(e)}
        self.own(wire, status, (json.dumps(out, indent=1) + "\n").encode(), ["Content-Type: application/json"], False)
        return True


def typed_fault(texts):
    """A Fault from its fields as text: "status=503&p=0.1" taken apart."""
    kinds = {f.name: type(f.default) for f in dataclasses.fields(Fault)}
    for name in texts:
        if name not in kinds:
            raise ValueError("no such fault: %s (there are %s)" % (name, ", ".join(kinds)))
    return Fault(**{k: v not in ("", "0", "false") if kinds[k] is bool else kinds[k](v) for k, v in texts.items()})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--upstream", required=True, metavar="HOST:PORT")
    p.add_argument("--port", type=int, default=0, help="where to listen; 0: a free one, printed")
    p.add_argument("--seed", default="1")
    p.add_argument("--fault", action="append", default=[], metavar="NAME=VALUE&...", help="fields of Fault; may be repeated")
    a = p.parse_args()
    try:
        faults = [typed_fault(dict(urllib.parse.parse_qsl(f))) for f in a.fault]
    except ValueError as e:
        sys.exit("fault_proxy.py: %s" % e)
    with FaultProxy(a.upstream, a.port, seed=a.seed) as proxy:
        for f in faults:
            proxy.faults(**dataclasses.asdict(f))
        print(proxy.endpoint, flush=True)
        try:
            proxy.thread.join()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
