"""bench_program.py - the programs that are measured, and how settings are tuned.

A program holds one set and one index, so that its start, reading and warming are outside every time. It answers each line
'command name=value ...' with one line of JSON. `run` leaves the rows it found, and a time per query, in a file.
"""
import fcntl
import json
import subprocess
import tempfile
import time

import numpy as np

from bench_sets import Failure


class Program:
    """A child process that speaks the protocol. `name` is for messages."""

    TIMED = ("run", "trace", "share")

    def __init__(self, name, command, env=None):
        self.name = name
        self.out = tempfile.NamedTemporaryFile(prefix="vecshard-bench-")
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen([str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors, env=env, text=True, bufsize=1)
        self.info = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace").strip().splitlines()
            raise Failure("%s ended with status %d%s" % (self.name, self.process.returncode, ": " + said[-1] if said else ""))
        found = json.loads(line)
        if "error" in found:
            raise Failure("%s: %s" % (self.name, found["error"]))
        return found

    def ask(self, command, **words):
        line = " ".join([command] + ["%s=%s" % w for w in words.items() if w[1] is not None])
        if command in self.TIMED:
            turns.take()
        else:
            turns.give()
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # the program has ended: answer() says why
        return self.answer()

    def run(self, first, n, k, batch=0, **words):
        """(answer, row numbers n x k, nanoseconds per query or None)."""
        found = self.ask("run", first=first, n=n, k=k, batch=batch, out=self.out.name, **words)
        with open(self.out.name, "rb") as f:
            ids = np.fromfile(f, "<i8", n * k).reshape(n, k)
            ns = None if batch else np.fromfile(f, "<u8", n)
        return found, ids, ns

    def close(self):
        turns.give()
        if self.process.poll() is None:
            self.process.stdin.close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind and self.process.poll() is None:
            self.process.kill()
        self.close()


class Turns:
    """Several benchmarks on one machine take turns at a file: what is timed runs while it is locked, for some SHARE seconds at most
    before the others may. Without a path everything runs at once."""

    SHARE = 50.0

    def __init__(self):
        self.path, self.file, self.since = None, None, 0.0

    def take(self):
        if self.file and time.monotonic() - self.since > self.SHARE:
            self.give()
        if self.path and not self.file:
            self.file = open(self.path, "w")
            fcntl.flock(self.file, fcntl.LOCK_EX)
            self.since = time.monotonic()

    def give(self):
        if self.file:
            self.file.close()
            self.file = None


turns = Turns()


def measure(program, data, k, first, n, deep=None, **words):
    """One point: settings, recall and costs."""
    found, ids, ns = program.run(first, n, k, **words)
    point = dict(k=k, recall=data.recall(ids, k, first, deep), cpu_us=1e6 * found["cpu_s"] / n, qps=n / found["wall_s"],
                 qps_cpu=n / max(found["cpu_s"], 1e-9))
    point.update((w, words[w]) for w in ("nprobe", "refine", "threads", "batch", "implem") if w in words)
    point.update((w, found[w]) for w in found if w not in ("wall_s", "cpu_s"))
    if ns is not None:
        point.update(p50_us=float(np.percentile(ns, 50)) / 1e3, p99_us=float(np.percentile(ns, 99)) / 1e3)
    return point


class Search:
    """Looks for the cheapest setting (nprobe, refine) per recall, on the tuning half of the queries. Recall grows with both, and so
    does the cost. For each goal: the smallest nprobe that reaches it at all (with the largest refine), by bisection; from there
    upwards the smallest refine that reaches it; until so many partitions cost more with the smallest refine already. What was
    measured once is known."""

    NOISE = 1.1

    def __init__(self, program, data, k, nprobes, refines, say=None, **words):
        self.program, self.data, self.k = program, data, k
        self.nprobes, self.refines, self.words, self.say = nprobes, refines, words, say
        self.known = {}

    def at(self, i, j):
        """The point of nprobes[i], refines[j]."""
        if (i, j) not in self.known:
            p = measure(self.program, self.data, self.k, 0, self.data.half, nprobe=self.nprobes[i], refine=self.refines[j], **self.words)
            self.known[i, j] = p
            if self.say:
                self.say(p)
        return self.known[i, j]

    def smallest(self, n, good):
        """The first of 0..n-1 that is good, n when none is."""
        low, high = 0, n
        while low < high:
            middle = (low + high) // 2
            if good(middle):
                high = middle
            else:
                low = middle + 1
        return low

    def find(self, goal, bound=float("inf")):
        """The cheapest point that reaches the goal and costs less than the bound, or None."""
        last = len(self.refines) - 1
        best = None
        for i in range(self.smallest(len(self.nprobes), lambda i: self.at(i, last)["recall"] >= goal), len(self.nprobes)):
            j = self.smallest(last + 1, lambda j: self.at(i, j)["recall"] >= goal)
            if j > last:
                continue
            p = self.at(i, j)
            if p["cpu_us"] < (best["cpu_us"] if best else bound):
                best = p
            if self.at(i, 0)["cpu_us"] > self.NOISE * (best["cpu_us"] if best else bound):
                break
        return best

    @property
    def points(self):
        return [self.known[at] for at in sorted(self.known)]


def in_turns(tries, rounds):
    """Per try (a function that gives a point) its cheapest point of so many, all of them measured one after the other in each round:
    the speed of a machine changes from one minute to the next, and a close call must not depend on it."""
    best = [t() for t in tries]
    for _ in range(rounds - 1):
        best = [min(b, t(), key=lambda p: p["cpu_us"]) for b, t in zip(best, tries)]
    return best


def cheapest(points, goal, n=1):
    """The n cheapest that reach the goal."""
    return sorted((p for p in points if p["recall"] >= goal), key=lambda p: p["cpu_us"])[:n]
