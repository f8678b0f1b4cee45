"""publish and pull against a real object store: round trips, continuing, races, old stores, damage, hostile names.

Folders are compared byte by byte; what must not be sent twice is counted at the proxy.
"""
import filecmp
import json
import os
import pathlib
import pty
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
    while not any(m.read_bytes().strip(b"\0") for m in (tmp_path / "back").glob(".*.map")) and time.monotonic() < deadline:
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


def test_a_bucket_of_its_own(s3, shard, database, tmp_path):
    for folder in (shard.path, database):
        uri = "s3://" + s3.bucket("own")
        tool("publish", folder, uri, env=s3.env)
        tool("pull", uri + "/", tmp_path / os.path.basename(folder), env=s3.env)
        assert same_folders(folder, tmp_path / os.path.basename(folder))


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


# ---- places that would do harm ----

def edit_manifest(folder, version=None, **changes):
    """Writes a manifest with other values into a shard's folder, as version `version` (else the one that is there)."""
    newest = sorted(pathlib.Path(folder).glob("manifest-*.json"))[0]
    m = {**json.loads(newest.read_text()), **changes}
    if version:
        m["version"] = version
    path = pathlib.Path(folder, "manifest-%020d.json" % (2**64 - 1 - m["version"]))
    path.write_text(json.dumps(m))
    return path


@pytest.fixture
def copy(shard, tmp_path):
    return pathlib.Path(shutil.copytree(shard.path, tmp_path / "copy"))


def refused(*args, env):
    return tool(*args, ok=False, env=env).stderr


def test_a_shard_and_a_database_do_not_mix(s3, shard, database, tmp_path):
    db, one = s3.uri("db"), s3.uri("one")
    tool("publish", database, db, env=s3.env)
    tool("publish", shard.path, one, env=s3.env)
    before = sorted(objects(s3, db)), sorted(objects(s3, one))
    assert "is a database of 3 shards" in refused("publish", shard.path, db, env=s3.env)
    assert "is a shard" in refused("publish", database, one, env=s3.env)
    assert (sorted(objects(s3, db)), sorted(objects(s3, one))) == before
    tool("publish", shard.path, db + "/another", env=s3.env)  # beside the others it may lie
    tool("pull", db, tmp_path / "db", env=s3.env)
    tool("pull", one, tmp_path / "one", env=s3.env)
    assert "is a database of 4 shards" in refused("pull", one, tmp_path / "db", env=s3.env)
    assert "is a shard" in refused("pull", db, tmp_path / "one", env=s3.env)
    assert "holds another shard" in refused("pull", db + "/part 1+&", tmp_path / "one", env=s3.env)
    assert same_folders(shard.path, tmp_path / "one")


def test_versions(s3, proxy, shard, copy, tmp_path):
    uri = s3.uri("one")
    tool("publish", copy, uri, env=s3.env)
    tool("pull", uri, tmp_path / "back", env=s3.env)
    edit_manifest(copy, version=2, extra="what this build does not know")
    proxy.reset()
    tool("publish", copy, uri, env=proxy.env)
    assert [e.key.rsplit("/", 1)[1] for e in proxy.log if e.method == "PUT"] == [sorted(os.listdir(copy))[0], "latest"]
    assert json.loads(tool("info", uri, "--json", env=s3.env).stdout)["shards"][0]["version"] == 2
    assert "version 2 is published" in refused("publish", shard.path, uri, env=s3.env)

    proxy.reset()
    tool("pull", uri, tmp_path / "back", env=proxy.env)  # the segment is there: its folder's older manifest vouches for it
    assert proxy.stats()["bytes_down"] < 20000 and same_folders(copy, tmp_path / "back")
    assert "already published" in tool("publish", tmp_path / "back", uri, env=s3.env).stdout  # the very bytes, unknown keys and all

    edit_manifest(tmp_path / "back", version=3)
    assert "is at version 3, newer than version 2" in refused("pull", uri, tmp_path / "back", env=s3.env)
    edit_manifest(copy, extra="of another writer")
    text = refused("publish", copy, uri, env=s3.env)
    assert "another writer published version 2 first; nothing is lost" in text
    assert "holds another version 2" in refused("pull", uri, copy, env=s3.env)


def test_a_later_version_of_another_shard(s3, shard, tmp_path):
    uri = s3.uri("one")
    tool("publish", shard.path, uri, env=s3.env)
    other = build_shard(tmp_path / "other", clustered(100, 16, 5))
    edit_manifest(other.path, version=2)
    before = sorted(objects(s3, uri))
    assert "holds another shard" in refused("publish", other.path, uri, env=s3.env)
    assert sorted(objects(s3, uri)) == before


def test_what_is_missing_is_put_back(s3, proxy, shard, copy):
    uri = s3.uri("one")
    tool("publish", shard.path, uri, env=s3.env)
    bucket, whole = uri[5:].split("/")[0], objects(s3, uri)
    segment = next(k for k in whole if k.endswith(".ivf"))
    for gone in ("latest", segment):
        good = s3.client.get(bucket, whole[gone])
        for body in (None, b"stale"):  # as after a run that was killed before its last step
            if body is None:
                s3.client.delete(bucket, whole[gone])
            else:
                s3.client.put(bucket, whole[gone], body)
            proxy.reset()
            tool("publish", shard.path, uri, env=proxy.env)
            assert [e.key for e in proxy.log if e.method == "PUT"] == ["/%s/%s" % (bucket, whole[gone])]
            assert s3.client.get(bucket, whole[gone]) == good
    (copy / segment).unlink()
    tool("pull", uri, copy, env=s3.env)
    assert same_folders(shard.path, copy)


def test_two_at_the_same_shard(s3, proxy, large):
    """The second joins the first's unfinished upload, or finds it done: both succeed, whoever ends first."""
    proxy.faults(bytes_per_s=10e6, methods="PUT")
    for delay in (0, 0.3, 0.9):
        uri = s3.uri("large")
        runs = []
        for n in range(2):
            runs.append(start("publish", large.path, uri, "--part-size", "5M", "--jobs", str(3 - n), env=proxy.env))
            time.sleep(delay)
        texts = [p.communicate(timeout=60) for p in runs]
        assert [p.returncode for p in runs] == [0, 0], texts
        assert "sound" in tool("verify", uri, env=s3.env).stdout


def test_upload_aborted_under_way(s3, proxy, large):
    uri = s3.uri("large")
    proxy.faults(bytes_per_s=10e6, methods="PUT")
    bucket, key = uri[5:].split("/", 1)
    p = start("publish", large.path, uri, "--part-size", "5M", "--jobs", "2", env=proxy.env)
    deadline = time.monotonic() + 30
    while not any("partNumber" in e.query for e in proxy.log) and time.monotonic() < deadline:
        time.sleep(0.02)
    for k, upload in s3.client.uploads(bucket):
        if k.startswith(key):
            s3.client.checked("DELETE", bucket, k, query={"uploadId": upload})
    err = p.communicate(timeout=60)[1]
    assert p.returncode == 1 and "NoSuchUpload" in err and "run the command again" in err
    proxy.reset()
    tool("publish", large.path, uri, "--part-size", "5M", env=proxy.env)


# ---- stores ----

def test_uploads_that_cannot_be_listed(s3, proxy, large):
    """Rights often do not reach that far."""
    proxy.faults(status=403, methods="GET", match="uploads")
    uri = s3.uri("large")
    tool("publish", large.path, uri, "--part-size", "5M", env=proxy.env)
    assert proxy.stats()["injected"]["status"] == 1 and "sound" in tool("verify", uri, env=s3.env).stdout


def test_etags_that_are_no_md5(s3, proxy, shard, large):
    """As of encrypted buckets: then the size is asked for."""
    uri = s3.uri("x")
    proxy.faults(etag="other", methods="PUT", match="ivf$")
    tool("publish", shard.path, uri, env=proxy.env)
    assert proxy.stats()["methods"]["HEAD"] == 1


@pytest.mark.parametrize("size", ["5M", "6M", "17M", "50M"])
def test_parts_of_another_size(s3, proxy, large, size):
    """What was sent in 5M parts serves only a run that cuts the file like that; none leaves unfinished uploads behind."""
    uri = s3.uri("large")
    bucket, key = uri[5:].split("/", 1)
    proxy.faults(status=403, methods="POST", match="uploadId")
    assert "403" in refused("publish", large.path, uri, "--part-size", "5M", env=proxy.env)
    assert [k for k, _ in s3.client.uploads(bucket) if k.startswith(key)]
    proxy.clear()
    result = json.loads(tool("publish", large.path, uri, "--part-size", size, "--json", env=proxy.env).stdout)
    assert (result["bytes_reused"] > 44e6) == (size == "5M") and "sound" in tool("verify", uri, env=s3.env).stdout
    assert size == "50M" or not [k for k, _ in s3.client.uploads(bucket) if k.startswith(key)]


def test_a_slow_line(s3, proxy, large):
    """A part may take longer than the limit of an ordinary request."""
    proxy.faults(bytes_per_s=2.5e6, match="partNumber=[12]&")
    uri = s3.uri("large")
    env = {**proxy.env, "VECSHARD_TIMEOUT_MS": "1000"}
    tool("publish", large.path, uri, "--part-size", "5M", env=env)
    assert proxy.stats()["injected"]["bytes_per_s"] == 2
    assert all(e.status == 200 for e in proxy.log if "partNumber" in e.query)


@pytest.mark.parametrize("command", ["publish", "pull"])
def test_interrupt_while_nothing_comes(s3, proxy, large, tmp_path, command):
    uri = s3.uri("large")
    if command == "pull":
        tool("publish", large.path, uri, env=s3.env)
    proxy.faults(latency_ms=60000, match="ivf")
    p = start(command, *((large.path, uri) if command == "publish" else (uri, tmp_path / "back")), env=proxy.env)
    deadline = time.monotonic() + 30
    while not proxy.stats()["in_flight"] and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    at = time.monotonic()
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=30)[1]
    assert p.returncode == 1 and "interrupted" in err and "run the command again" in err, err
    assert time.monotonic() - at < 2


# ---- many files ----

@pytest.fixture(scope="module")
def mixed(large, tmp_path_factory):
    """A shard of one large and eleven small segments."""
    folder = pathlib.Path(shutil.copytree(large.path, tmp_path_factory.mktemp("publish") / "mixed"))
    segments = json.loads((folder / MANIFEST).read_text())["segments"]
    for n in range(11):
        small = build_shard(folder.parent / "small", clustered(20 + n, 500, n))
        segments[n % 2 * len(segments):0] = json.loads(pathlib.Path(small.path, MANIFEST).read_text())["segments"]
        shutil.move(next(pathlib.Path(small.path).glob("*.ivf")), folder)
        shutil.rmtree(small.path)
    edit_manifest(folder, segments=segments)
    return folder


@pytest.mark.parametrize("jobs", [1, 8])
def test_many_files(s3, proxy, mixed, tmp_path, jobs):
    uri = s3.uri("mixed")
    proxy.faults(status=503, p=0.1)
    assert json.loads(tool("publish", mixed, uri, "--part-size", "5M", "--jobs", jobs, "--json", env=proxy.env).stdout)["files_sent"] == 12
    assert "sound" in tool("verify", uri, env=s3.env).stdout
    tool("pull", uri, tmp_path / "back", "--jobs", jobs, env=proxy.env)
    assert same_folders(mixed, tmp_path / "back")


def test_one_damaged_of_many(s3, mixed, large, tmp_path):
    """Nothing is visible, whether it is large or small, and no parts stay behind."""
    for name in (next(pathlib.Path(large.path).glob("*.ivf")).name, sorted(mixed.glob("*.ivf"))[5].name):
        bad = pathlib.Path(shutil.copytree(mixed, tmp_path / name))
        body = bytearray((bad / name).read_bytes())
        body[-3] ^= 1
        (bad / name).write_bytes(body)
        uri = s3.uri("bad")
        text = refused("publish", bad, uri, "--part-size", "5M", env=s3.env)
        assert name in text and "damaged" in text
        there = objects(s3, uri)
        assert name not in there and not [k for k in there if not k.endswith(".ivf")]
        bucket, key = uri[5:].split("/", 1)
        assert not [k for k, _ in s3.client.uploads(bucket) if k == key + "/" + name]


def test_one_damaged_shard_of_a_database(s3, database, tmp_path):
    bad = pathlib.Path(shutil.copytree(database, tmp_path / "bad"))
    f = next((bad / "part 1+&").glob("*.ivf"))
    f.write_bytes(f.read_bytes()[:-1] + b"!")
    uri = s3.uri("db")
    assert f.name in refused("publish", bad, uri, env=s3.env)
    assert [s["name"] for s in json.loads(tool("info", uri, "--json", env=s3.env).stdout)["shards"]] == ["part 0+&"]
    tool("publish", database, uri, env=s3.env)
    assert "sound: 3 shards" in tool("verify", uri, env=s3.env).stdout


def test_memory(s3, large):
    uri = s3.uri("large")
    assert "choose --jobs 2" in refused("publish", large.path, uri, "--part-size", "5M", "--jobs", "3", "--memory", "11M", env=s3.env)
    assert "choose --memory 16M or more" in refused("publish", large.path, uri, "--part-size", "16M", "--memory", "15M", env=s3.env)
    assert not objects(s3, uri)
    tool("publish", large.path, uri, "--part-size", "5M", "--memory", "11M", env=s3.env)


@pytest.mark.parametrize("size, part", [(768 * 10**9, "77.6 MB"), (5 * 2**40, "550.5 MB")])
def test_parts_of_very_large_files(s3, copy, size, part):
    """10,000 parts suffice, and their size is told before anything is read."""
    segment = next(copy.glob("*.ivf"))
    try:
        os.truncate(segment, size)
    except OSError:
        pytest.skip("files of this size cannot be here")
    edit_manifest(copy, segments=[{**json.loads((copy / MANIFEST).read_text())["segments"][0], "bytes": size}])
    assert "a part of %s needs more" % part in refused("publish", copy, s3.uri("x"), "--memory", "16M", env=s3.env)


# ---- hostile stores ----

def test_names_that_leave_the_folder(s3, shard, tmp_path):
    uri = s3.uri("db")
    tool("publish", shard.path, uri + "/good", env=s3.env)
    bucket, key = uri[5:].split("/", 1)
    for name in ("..", ".", ".hidden", "x" * 300):
        for k, v in objects(s3, uri + "/good").items():
            s3.client.copy(bucket, v, "%s/%s/%s" % (key, name, k))
        before = sorted(p.name for p in tmp_path.iterdir())
        assert "cannot have this name" in refused("pull", uri, tmp_path / "a" / "db", env=s3.env)
        assert sorted(p.name for p in tmp_path.iterdir()) == before
        for k in objects(s3, uri + "/good"):
            s3.client.delete(bucket, "%s/%s/%s" % (key, name, k))
    tool("pull", uri, tmp_path / "a" / "db", env=s3.env)


@pytest.mark.parametrize("change", ["a manifest", "latest", "gone", "size", "no json", "version", "leaves"])
def test_manifests_that_lie(s3, shard, copy, tmp_path, change):
    uri = s3.uri("one")
    tool("publish", shard.path, uri, env=s3.env)
    bucket, key = uri[5:].split("/", 1)
    segment = dict(json.loads((copy / MANIFEST).read_text())["segments"][0])
    if change in ("a manifest", "latest", "leaves"):
        name = {"a manifest": "manifest-%020d.json" % 77, "latest": "latest", "leaves": "../x"}[change]
        s3.client.put(bucket, key + "/" + name.strip("./"), (copy / segment["file"]).read_bytes())
        segment["file"] = name
    elif change == "gone":
        segment["file"] = "seg-none.ivf"
    elif change == "size":
        segment["bytes"] += 1
    body = {"no json": b"nothing", "version": edit_manifest(copy, version=9).read_bytes()}.get(change)
    body = body or edit_manifest(copy, segments=[segment], version=1).read_bytes()
    s3.client.put(bucket, key + "/" + MANIFEST, body)
    if change == "a manifest":
        s3.client.delete(bucket, key + "/manifest-%020d.json" % 77)
    text = refused("pull", uri, tmp_path / "back", env=s3.env)
    assert "damaged" in text or "no such object" in text
    assert not (tmp_path / "back").exists() and uri in text


# ---- local folders ----

def test_two_pulls_into_one_folder(s3, proxy, large, tmp_path):
    uri = s3.uri("large")
    tool("publish", large.path, uri, env=s3.env)
    proxy.faults(bytes_per_s=20e6, match="ivf")
    runs = [start("pull", uri, tmp_path / "back", "--jobs", "2", env=proxy.env) for _ in range(2)]
    texts = [p.communicate(timeout=60)[1] for p in runs]
    assert 0 in [p.returncode for p in runs], texts
    assert all(p.returncode == 0 or "another process" in text for p, text in zip(runs, texts))
    assert same_folders(large.path, tmp_path / "back")


def test_pull_leaves_nothing_of_earlier_tries(s3, proxy, large, copy, tmp_path):
    """Parts of a file that the newest version does not need any more go when that is there."""
    uri = s3.uri("one")
    tool("publish", large.path, uri, env=s3.env)
    proxy.faults(status=403, match="ivf", skip=2)
    refused("pull", uri, tmp_path / "back", "--jobs", "1", env=proxy.env)
    assert [n for n in os.listdir(tmp_path / "back") if n.endswith(".part")]
    bucket = uri[5:].split("/")[0]
    for k in objects(s3, uri).values():
        s3.client.delete(bucket, k)
    tool("publish", copy, uri, env=s3.env)
    tool("pull", uri, tmp_path / "back", env=s3.env)
    assert same_folders(copy, tmp_path / "back")


def test_finished_files_are_kept(s3, proxy, mixed, tmp_path):
    """Of a pull that ended early: whole files with the right checksum are not fetched again, others are."""
    uri = s3.uri("mixed")
    tool("publish", mixed, uri, env=s3.env)
    back = pathlib.Path(shutil.copytree(mixed, tmp_path / "back"))
    (back / MANIFEST).unlink()
    small = sorted(back.glob("*.ivf"), key=os.path.getsize)
    small[0].write_bytes(small[0].read_bytes()[:-1] + b"!")
    small[1].unlink()
    tool("pull", uri, back, env=proxy.env)
    assert {e.key.rsplit("/", 1)[1] for e in proxy.log if e.key.endswith("ivf")} == {p.name for p in small[:2]}
    assert same_folders(mixed, back)


def test_progress_on_a_terminal(s3, proxy, large, tmp_path):
    uri = s3.uri("large")
    proxy.faults(bytes_per_s=20e6, match="ivf")
    for command in (["publish", large.path, uri, "--part-size", "5M", "--jobs", "1"], ["pull", uri, tmp_path / "back", "--jobs", "1"]):
        try:
            master, slave = pty.openpty()
        except OSError:
            pytest.skip("no pseudo-terminals here")
        p = subprocess.Popen([str(BUILD / "vecshard"), *map(str, command)], stdout=subprocess.PIPE, stderr=slave, env=plain_environ(proxy.env))
        os.close(slave)
        shown = b""
        try:
            while piece := os.read(master, 4096):
                shown += piece
        except OSError:  # how a terminal's other end says that nobody holds it any more
            pass
        os.close(master)
        p.communicate(timeout=30)
        assert p.returncode == 0 and command[0].encode() in shown and b"MB/s" in shown and b"left" in shown


def test_secrets_stay_secret(s3, proxy, shard, tmp_path):
    wrong = {**proxy.env, "AWS_SECRET_ACCESS_KEY": "wrongSecretOfMine", "AWS_SESSION_TOKEN": "tokenOfMine"}
    for env in (wrong, {**proxy.env, "AWS_ACCESS_KEY_ID": "keyOfMine"}):
        for args in (("publish", shard.path, s3.uri("x")), ("pull", s3.uri("x"), tmp_path / "back")):
            text = refused(*args, env=env)
            assert "s3://" in text
            for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
                assert env.get(name, "nothing") not in text
