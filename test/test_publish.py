"""publish and pull against a real object store: round trips, continuing, races, old stores, damage."""
import filecmp
import json
import os
import pathlib
import shutil
import signal
import subprocess
import threading
import time

import numpy as np
import pytest

from conftest import BUILD, build_shard, clustered, connect, plain_environ, tool

MANIFEST = "manifest-18446744073709551614.json"  # of version 1


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return build_shard(tmp_path_factory.mktemp("publish") / "one", clustered(6000, 16, 1), ["id-%d" % i for i in range(6000)])


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """45 MB: several parts."""
    return build_shard(tmp_path_factory.mktemp("publish") / "large", clustered(22000, 500, 2), options=("--partitions", "64"))


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publish") / "db"
    folder.mkdir()
    for n in range(3):
        build_shard(folder / ("part %d+&" % n), clustered(500 + 300 * n, 8, n))
    return folder


def objects(s3, uri):
    bucket, prefix = uri[5:].split("/", 1)
    return {k[len(prefix) + 1:]: k for k in s3.client.list(bucket, prefix + "/")}


def same_folders(a, b):
    names = sorted(os.listdir(a))
    return names == sorted(os.listdir(b)) and all(
        same_folders(pathlib.Path(a, n), pathlib.Path(b, n)) if os.path.isdir(pathlib.Path(a, n)) else filecmp.cmp(pathlib.Path(a, n), pathlib.Path(b, n), False)
        for n in names)


def test_shard_there_and_back(s3, shard, tmp_path):
    uri = s3.uri("one")
    assert "published" in tool("publish", shard.path, uri, env=s3.env).stdout
    assert sorted(objects(s3, uri)) == sorted([*os.listdir(shard.path), "latest"])
    tool("pull", uri, tmp_path / "back", env=s3.env)
    assert same_folders(shard.path, tmp_path / "back")
    assert "sound" in tool("verify", tmp_path / "back").stdout


def test_database_there_and_back(s3, database, tmp_path):
    uri = s3.uri("my db")
    result = json.loads(tool("publish", database, uri + "/", "--json", env=s3.env).stdout)
    assert result["shards"] == 3 and result["files_sent"] == 3
    assert json.loads(tool("pull", uri, tmp_path / "back", "--json", env=s3.env).stdout)["shards"] == 3
    assert same_folders(database, tmp_path / "back")


def test_again_is_harmless_and_cheap(s3, proxy, database, tmp_path):
    uri = s3.uri("db")
    tool("publish", database, uri, env=proxy.env)
    before = {k: s3.client.head(uri[5:].split("/")[0], v)["etag"] for k, v in objects(s3, uri).items()}
    proxy.reset()
    assert "already published" in tool("publish", database, uri, env=proxy.env).stdout
    assert proxy.stats()["requests"] <= 3 * 2 and not proxy.stats()["methods"].get("PUT")
    assert {k: s3.client.head(uri[5:].split("/")[0], v)["etag"] for k, v in objects(s3, uri).items()} == before
    tool("pull", uri, tmp_path / "back", env=proxy.env)
    assert "already there" in tool("pull", uri, tmp_path / "back", env=proxy.env).stdout


def test_parts(s3, large, tmp_path):
    uri = s3.uri("large")
    tool("publish", large.path, uri, "--part-size", "5M", "--jobs", "3", env=s3.env)
    assert json.loads(tool("info", uri, "--json", env=s3.env).stdout)["rows"] == 22000
    tool("pull", uri, tmp_path / "back", env=s3.env)
    assert same_folders(large.path, tmp_path / "back")


@pytest.mark.parametrize("fault", [dict(status=503, p=0.3), dict(reset=True, p=0.2), dict(drop=True, p=0.2), dict(lose=True, p=0.2)],
                         ids=lambda f: next(iter(f)))
def test_faults(s3, proxy, large, tmp_path, fault):
    """lose: the store did it, but its answer never came; what is repeated then must not harm."""
    uri = s3.uri("large")
    proxy.reset(seed=3)
    proxy.faults(**fault)
    tool("publish", large.path, uri, "--part-size", "5M", env=proxy.env)
    tool("pull", uri, tmp_path / "back", env=proxy.env)
    assert same_folders(large.path, tmp_path / "back")
    assert sum(proxy.stats()["injected"].values()) > 0


def start(*args, env):
    return subprocess.Popen([str(BUILD / "vecshard"), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=plain_environ(env))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_publish_is_continued(s3, proxy, large, how):
    uri = s3.uri("large")
    proxy.faults(bytes_per_s=12e6, methods="PUT")
    p = start("publish", large.path, uri, "--part-size", "5M", "--jobs", "2", env=proxy.env)
    deadline = time.monotonic() + 30
    while sum("partNumber" in e.query and e.status == 200 for e in proxy.log) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    p.send_signal(how)
    err = p.communicate(timeout=30)[1]
    assert p.returncode != 0 and (how == signal.SIGKILL or "run the command again" in err)
    assert not [k for k in objects(s3, uri) if k.startswith("manifest")]  # nothing that a reader takes for a shard
    proxy.reset()
    result = json.loads(tool("publish", large.path, uri, "--part-size", "5M", "--json", env=proxy.env).stdout)
    assert result["bytes_reused"] >= 3 * 5 * 2**20
    assert sum("partNumber" in e.query for e in proxy.log) * 5 * 2**20 < os.path.getsize(next(pathlib.Path(large.path).glob("*.ivf")))
    assert "sound" in tool("verify", uri, env=s3.env).stdout


def test_an_interrupted_pull_is_continued(s3, proxy, large, tmp_path):
    uri = s3.uri("large")
    tool("publish", large.path, uri, env=s3.env)
    proxy.faults(bytes_per_s=15e6, match="ivf")
    p = start("pull", uri, tmp_path / "back", "--jobs", "2", env=proxy.env)
    deadline = time.monotonic() + 30
    while sum(bool(e.range) and e.status == 206 for e in proxy.log) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    p.kill()
    p.communicate(timeout=30)
    assert not list((tmp_path / "back").glob("manifest*"))
    proxy.reset()
    tool("pull", uri, tmp_path / "back", env=proxy.env)
    size = os.path.getsize(next(pathlib.Path(large.path).glob("*.ivf")))
    assert proxy.stats()["bytes_down"] < size * 0.9
    assert same_folders(large.path, tmp_path / "back")


def test_of_two_writers_one_wins(s3, tmp_path):
    """Two different shards at one place: exactly one is published, the other is told, and readers see the winner whole."""
    for n in range(2):
        build_shard(tmp_path / ("w%d" % n), clustered(300, 8, n))
    for round_ in range(4):
        uri, results = s3.uri("race"), [None, None]

        def write(n):
            results[n] = start("publish", tmp_path / ("w%d" % n), uri, env=s3.env)
            results[n] = (results[n].communicate(timeout=60)[1], results[n].returncode)

        threads = [threading.Thread(target=write, args=(n,)) for n in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert sorted(r[1] for r in results) == [0, 1], results
        loser = [r for r in results if r[1]][0][0]
        assert "another" in loser and uri in loser
        assert "sound" in tool("verify", uri, env=s3.env).stdout


def test_store_without_conditions(s3, proxy, shard):
    uri = s3.uri("old")
    proxy.faults(no_conditions=True)
    text = tool("publish", shard.path, uri, ok=False, env=proxy.env).stderr
    assert "--only-writer" in text and "501" in text
    assert not [k for k in objects(s3, uri) if k.startswith("manifest")]
    tool("publish", shard.path, uri, "--only-writer", env=proxy.env)
    assert json.loads(tool("info", uri, "--json", env=proxy.env).stdout)["rows"] == 6000


def test_another_shard_or_version_is_there(s3, shard, tmp_path):
    uri = s3.uri("one")
    tool("publish", shard.path, uri, env=s3.env)
    other = build_shard(tmp_path / "other", clustered(100, 16, 5))
    assert "another shard" in tool("publish", other.path, uri, ok=False, env=s3.env).stderr
    tool("pull", uri, tmp_path / "other", ok=False, env=s3.env)
    bucket, key = uri[5:].split("/", 1)
    s3.client.put(bucket, key + "/manifest-18446744073709551610.json", b"{}")
    assert "version 5" in tool("publish", shard.path, uri, ok=False, env=s3.env).stderr


def test_damaged_local_files_are_not_published(s3, shard, tmp_path):
    for damage in ("flip", "cut", "gone"):
        bad = tmp_path / damage
        shutil.copytree(shard.path, bad)
        f = next(bad.glob("*.ivf"))
        body = bytearray(f.read_bytes())
        body[len(body) // 2] ^= 4
        if damage == "gone":
            f.unlink()
        else:
            f.write_bytes(body if damage == "flip" else body[:-100])
        uri = s3.uri(damage)
        assert f.name in tool("publish", bad, uri, ok=False, env=s3.env).stderr
        assert not objects(s3, uri)


def test_damaged_objects_are_not_pulled(s3, shard, tmp_path):
    uri = s3.uri("one")
    tool("publish", shard.path, uri, env=s3.env)
    bucket = uri[5:].split("/")[0]
    key = [v for k, v in objects(s3, uri).items() if k.endswith(".ivf")][0]
    body = bytearray(s3.client.get(bucket, key))
    body[1000] ^= 1
    s3.client.put(bucket, key, bytes(body))
    assert "damaged" in tool("pull", uri, tmp_path / "back", ok=False, env=s3.env).stderr
    assert not list((tmp_path / "back").glob("manifest*")) and not list((tmp_path / "back").glob("*.ivf"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_pull_to_a_full_disk(s3, large, tmp_path):
    uri = s3.uri("large")
    tool("publish", large.path, uri, env=s3.env)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("no mount here")
    try:
        text = tool("pull", uri, disk / "back", ok=False, env=s3.env).stderr
        assert "has 8.4 MB free" in text
        assert not (disk / "back").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_errors(s3, shard, tmp_path):
    assert "SignatureDoesNotMatch" in tool("publish", shard.path, s3.uri("x"), ok=False, env={**s3.env, "AWS_SECRET_ACCESS_KEY": "no"}).stderr
    assert "NoSuchBucket" in tool("publish", shard.path, "s3://no-such-bucket-at-all/x", ok=False, env=s3.env).stderr
    assert "AccessDenied" in tool("publish", shard.path, s3.uri("x"), ok=False, env=s3.other_env).stderr
    assert "is not a shard" in tool("pull", s3.uri("nothing"), tmp_path / "back", ok=False, env=s3.env).stderr
    assert not (tmp_path / "back").exists()
    for wrong in (("publish", shard.path), ("publish", shard.path, str(tmp_path)), ("pull", str(tmp_path), "x"), ("publish", shard.path, "s3://b/x", "--jobs", "0")):
        r = subprocess.run([str(BUILD / "vecshard"), *wrong], capture_output=True, text=True, env=plain_environ(s3.env))
        assert r.returncode == 2, wrong


def test_an_empty_shard(s3, tmp_path):
    empty = build_shard(tmp_path / "empty", np.zeros((0, 4), dtype="<f4"))
    uri = s3.uri("empty")
    tool("publish", empty.path, uri, env=s3.env)
    tool("pull", uri, tmp_path / "back", env=s3.env)
    assert same_folders(empty.path, tmp_path / "back")


def test_a_pulled_shard_answers(s3, shard, tmp_path):
    uri = s3.uri("one")
    tool("publish", shard.path, uri, env=s3.env)
    tool("pull", uri, tmp_path / "back", env=s3.env)
    c = connect()
    c.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % (tmp_path / "back"))
    assert [r[0] for r in c.execute("SELECT id FROM t WHERE embedding MATCH ? AND k = 3 AND exact = 1", (shard.x[7].tobytes(),))][0] == "id-7"
    c.close()
