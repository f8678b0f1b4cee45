"""vecshard cost: sizes are those of shards that are really built, requests and bytes those of searches in a real store.

Proves for several dimensions and kinds of rows that the predicted segment is within 2 % of the built one, for the flat one and for
text ids and metadata too; that temporary space is enough and not far above what a build takes; that cold and warm searches make hardly
more requests and read hardly more bytes than predicted, and not far less; that speeds and prices can be replaced; and that README shows
what the command prints.
"""
import json
import re
import subprocess

import numpy as np
import pytest

from conftest import BUILD, ROOT, blob, build_shard, clustered, plain_environ, tool, use_environ


def cost(rows, dim, *options):
    return json.loads(tool("cost", "--rows", rows, "--dim", dim, *options, "--json").stdout)


def built(folder, n, dim, *options, ids=None, columns=None):
    """(bytes of the segment, of temporary files) of a shard with such rows."""
    x = clustered(n, dim, dim)
    source = folder / "x"
    if ids is None and not columns:
        np.save(source, x)
        source, kinds = str(source) + ".npy", []
    else:
        import h5py
        kinds = [a for c in columns or {} for a in ("--column", c)]
        with h5py.File(source, "w") as f:
            f["embedding"] = x
            f.create_dataset("id", data=ids if ids is not None else np.arange(n), dtype=h5py.string_dtype() if ids is not None else None)
            for name, values in (columns or {}).items():
                f[name] = values
    out = json.loads(tool("build", source, "--out", folder / "s", *kinds, *options, "--json").stdout)
    segment, = (folder / "s").glob("seg-*.ivf")
    return segment.stat().st_size, out["temp_bytes"]


@pytest.mark.plain_only("sizes are the same in every build")
@pytest.mark.parametrize("n, dim, options", [
    (9000, 16, []), (9000, 100, []), (20000, 128, ["--metric", "l2"]), (6000, 384, ["--store", "f16"]), (5000, 960, []),
    (5000, 960, ["--store", "f16", "--partitions", "200"]), (4100, 1536, ["--metric", "dot"]), (8000, 64, ["--bits", "4"]),
    (8000, 60, ["--subvectors", "7", "--partitions", "sqrt"]), (4095, 300, []), (1, 5, []),
])
def test_size_of_a_built_shard(tmp_path, n, dim, options):
    size, temp = built(tmp_path, n, dim, *options)
    told = cost(n, dim, *options)
    assert abs(told["shard"]["segment_bytes"] - size) <= .02 * size
    assert temp <= told["shard"]["temp_bytes"] <= 1.5 * temp + 4096
    assert told["shards"] == 1 and told["storage"]["bytes"] >= told["shard"]["segment_bytes"]


@pytest.mark.plain_only("sizes are the same in every build")
@pytest.mark.parametrize("length", [3, 20, 100])
def test_size_with_text_ids_and_metadata(tmp_path, length):
    n = 8000
    ids = [("%0*d" % (length, i))[-length:] if length > 3 else "%x" % i for i in range(n)]
    size, _ = built(tmp_path, n, 48, ids=ids, columns={"a": np.arange(n), "b": np.random.default_rng(0).normal(size=n)})
    told = cost(n, 48, "--id-bytes", length, "--columns", 2)
    assert abs(told["shard"]["segment_bytes"] - size) <= .02 * size


def test_shards_of_the_planned_size():
    told = cost(3_500_000_000, 960)
    assert (told["shards"], told["shard"]["rows"]) == (18, -(-3_500_000_000 // 18))
    assert told["shard"]["partitions"] == round(told["shard"]["rows"] ** .5)
    per_row = told["storage"]["bytes"] / 3.5e9
    parts = 4 * 960 + 8 + 4 + 960 + 12 + 62 + 12  # vector, id, check; sketch; code and term; id directory
    assert parts < per_row < 1.01 * parts
    assert told["storage"]["dollars_per_month"] == pytest.approx(told["storage"]["bytes"] / 2**30 * .023)
    one = cost(1000, 960)
    assert one["shard"]["m"] == 0 and one["shards"] == 1
    assert cost(10_000_000, 96, "--bucket-rows", 3_000_000)["shards"] == 4


def test_build_time():
    here = cost(1_000_000, 128, "--metric", "l2")["build"]
    assert (here["measured_dim"], here["measured_partitions"]) == (128, 4000)
    assert here["cpu_hours"] == pytest.approx(1e6 / here["vectors_per_cpu_second"] / 3600)
    table = (ROOT / "tool" / "cost.c").read_text()
    assert here["vectors_per_cpu_second"] == pytest.approx(float(re.search(r"\{128, 4000, (\d+)\}", table)[1]))
    twice = cost(1_000_000, 192, "--metric", "l2")["build"]
    assert twice["vectors_per_cpu_second"] == pytest.approx(here["vectors_per_cpu_second"] * 128 / 192)
    given = cost(7_200_000, 300, "--vectors-per-second", 1000, "--vcpus", 4, "--price-vcpu", 0.5)["build"]
    assert (given["cpu_hours"], given["hours"], given["dollars"]) == (2, .5, 1)


def test_prices():
    a, b = cost(10**9, 768), cost(10**9, 768, "--price-storage", 0.046, "--price-get", 0, "--price-put", 0, "--price-vcpu", 0)
    assert b["storage"]["dollars_per_month"] == pytest.approx(2 * a["storage"]["dollars_per_month"])
    assert b["query"]["cold"]["dollars"] == b["publish"]["dollars"] == b["build"]["dollars"] == 0 < a["query"]["warm"]["dollars"]
    q = a["query"]
    assert q["warm"]["dollars"] == pytest.approx(q["warm"]["requests"] * .0004 / 1000 + q["cpu_dollars"], rel=1e-3)
    month = cost(10**9, 768, "--queries-per-month", 1000)["month"]
    assert month["dollars"] == pytest.approx(a["storage"]["dollars_per_month"] + 1000 * q["warm"]["dollars"])
    cheap = cost(10**9, 768, "--nprobe", 10)["query"]
    assert cheap["warm"]["requests"] < q["warm"]["requests"] and cheap["cold"]["bytes"] < q["cold"]["bytes"] and cheap["nprobe"] == 10


@pytest.mark.parametrize("args, told", [
    (["--dim", 5], "--rows"), (["--rows", 5], "--dim"), (["--rows", 0, "--dim", 5], "--rows"), (["--rows", 5, "--dim", 20000], "--dim"),
    (["--rows", 5, "--dim", 5, "--price-get", "x"], "--price-get"), (["--rows", 5, "--dim", 5, "--price-put", "-1"], "--price-put"),
    (["--rows", 5, "--dim", 5, "--price-vcpu", "inf"], "--price-vcpu"), (["--rows", 5, "--dim", 5, "--partitions", "x"], "--partitions"),
    (["--rows", 5, "--dim", 5, "--bucket-rows", 1 << 32], "--bucket-rows"),
])
def test_wrong_usage(args, told):
    r = subprocess.run([str(BUILD / "vecshard"), "cost", *map(str, args)], capture_output=True, text=True, env=plain_environ())
    assert r.returncode == 2 and told in r.stderr and not r.stdout


def test_what_cannot_be_built():
    assert "--subvectors" in tool("cost", "--rows", 10**6, "--dim", 8, "--subvectors", 9, ok=False).stderr
    assert "--subvectors" in tool("cost", "--rows", 10**6, "--dim", 960, "--subvectors", 300, ok=False).stderr


def test_extreme_plans_have_answers():
    for rows, dim, options in [(1, 1, []), (10**15, 16384, []), (10**15, 1, ["--bucket-rows", (1 << 32) - 1]), (4096, 1, ["--partitions", 4096]),
                               (10**7, 3, ["-k", 10**9, "--refine", 10**9, "--nprobe", 10**9]), (5, 5, ["--columns", 1000, "--id-bytes", 1 << 24])]:
        told = cost(rows, dim, *options)
        assert told["storage"]["bytes"] > rows * dim * 4 and told["query"]["cold"]["requests"] >= told["query"]["warm"]["requests"] > 0
        text = tool("cost", "--rows", rows, "--dim", dim, *options).stdout
        assert "nan" not in text and "inf" not in text


def test_text_says_what_json_says():
    text = tool("cost", "--rows", 3_500_000_000, "--dim", 960, "--queries-per-month", 1_000_000).stdout
    told = cost(3_500_000_000, 960, "--queries-per-month", 1_000_000)
    for number in ("3,500,000,000 rows of dimension 960", "%.1f TB" % (told["storage"]["bytes"] / 1e12), "%.1f hours of 32 vCPUs" % told["build"]["hours"],
                   "{:,} requests".format(told["query"]["cold"]["requests"]), "{:,.0f} a second".format(told["build"]["vectors_per_cpu_second"]),
                   "a month with 1,000,000 warm queries: ${:,.0f}".format(told["month"]["dollars"])):
        assert number in text, number


@pytest.mark.plain_only("requests and bytes are the same in every build")
@pytest.mark.parametrize("partitions, nprobe, centers", [(16, 6, 500), (150, 20, 24)])
def test_requests_and_bytes_of_searches(tmp_path, s3, monkeypatch, partitions, nprobe, centers):
    """Partitions of 43 KB, too far apart to be read together, and small ones, which are; in sets whose partitions are of like size."""
    n, dim, shards = 20000, 64, 3
    for i in range(shards):
        shard = build_shard(tmp_path / "db" / ("s%d" % i), clustered(n, dim, i, centers), metric="l2",
                            options=("--partitions", partitions, "--subvectors", 32))
        queries = shard.x[:20]
    uri = s3.uri("cost")
    tool("publish", tmp_path / "db", uri, env=s3.env)
    told = cost(n * shards, dim, "--bucket-rows", n, "--metric", "l2", "--partitions", partitions, "--subvectors", 32, "--nprobe", nprobe)
    assert told["shards"] == shards and told["shard"]["partitions"] == partitions
    use_environ(monkeypatch, s3.env)
    cold, warm = [], []
    for q in queries:  # a process of its own begins cold; its second query is another one, and warm
        other = queries[(len(cold) + 7) % len(queries)]
        program = ("import sqlite3, sys\nc = sqlite3.connect(':memory:')\nc.enable_load_extension(True)\nc.load_extension(%r)\n"
                   "for q in sys.argv[2:]:\n"
                   "    c.execute('SELECT id FROM shard_union(?, ?, 10) WHERE nprobe = %d', (sys.argv[1], bytes.fromhex(q))).fetchall()\n"
                   "    print(*c.execute(\"SELECT requests, bytes, rounds FROM shard_trace WHERE phase = 'total'\").fetchone())\n"
                   % (str(BUILD / "vecshard"), nprobe))
        r = subprocess.run(["/usr/bin/python3", "-c", program, uri, blob(q).hex(), blob(other).hex()], capture_output=True, text=True)
        assert r.returncode == 0, r.stderr
        for line, to in zip(r.stdout.splitlines(), (cold, warm)):
            to.append([int(v) for v in line.split()])
        if len(cold) == 5:
            break
    for measured, predicted in ((cold, told["query"]["cold"]), (warm, told["query"]["warm"])):
        requests, n_bytes, rounds = (np.array([m[i] for m in measured]) for i in range(3))
        print(predicted, requests, n_bytes, rounds)
        assert rounds.max() <= predicted["rounds"]
        assert .3 * predicted["requests"] <= requests.mean() and requests.max() <= 1.1 * predicted["requests"]
        assert .4 * predicted["bytes"] <= n_bytes.mean() and n_bytes.max() <= 1.3 * predicted["bytes"]


def test_readme_shows_what_the_command_prints():
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"^```console\n\$ build/vecshard (cost [^\n]*)\n(.*?)^```$", readme, re.M | re.S)
    assert shown and tool(*shown[1].split()).stdout == shown[2]
    f32, f16 = (json.loads(tool(*shown[1].split(), "--json", "--store", how).stdout) for how in ("f32", "f16"))
    assert "| 108 hours of a machine with 32 vCPUs | %.1f hours |" % f32["build"]["hours"] in readme and f32["build"]["vcpus"] == 32
    assert "| 12.9 TB | %.1f TB; %.1f TB with `--store f16` |" % (f32["storage"]["bytes"] / 1e12, f16["storage"]["bytes"] / 1e12) in readme
