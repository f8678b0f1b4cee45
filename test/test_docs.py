"""README.md and sql/ do what they say: the scripts run, the commands and statements of README run in its order against a small
demo, names and options exist, and the answer it prints is the one that the full demo gives (where build/demo holds it)."""
import os
import pathlib
import re
import shutil
import sqlite3
import subprocess

import pytest

from conftest import BUILD, ROOT, connect, tool, use_environ

README = (ROOT / "README.md").read_text()
SCRIPTS = sorted((ROOT / "sql").glob("*.sql"))
DEMO_ROWS = 59969  # of demo_data.py without options


def blocks(language):
    return re.findall(r"^```%s\n(.*?)^```$" % language, README, re.M | re.S)


def run(command, cwd):
    # libraries preloaded for Python stay: a sanitized extension needs them in the sqlite3 shell too
    r = subprocess.run(command, shell=True, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0 and not r.stderr, (command, r.returncode, r.stdout[-500:], r.stderr[-500:])
    return r.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder that looks like the project's after `make demo`, with a demo of 2,000 rows."""
    folder = tmp_path_factory.mktemp("docs")
    demo = folder / "build" / "demo"
    demo.mkdir(parents=True)
    for name in ("vecshard", "vecshard.so", "vecshard_hdf5.so"):
        (folder / "build" / name).symlink_to(BUILD / name)
    (folder / "sql").symlink_to(ROOT / "sql")
    subprocess.run(["/usr/bin/python3", str(ROOT / "tool" / "demo_data.py"), str(demo), "--rows", "2000", "--dim", "32"], check=True)
    parts = sorted(demo.glob("part*.h5"))
    assert len(parts) == 6
    tool("pack", *parts, "--bucket-rows", "667", "--out", demo / "plan.json")
    for bucket in (1, 2, 3):
        tool("build", "--plan", demo / "plan.json", "--bucket", bucket, "--out", demo / "db")
    c = connect(demo / "queries.db")
    c.enable_load_extension(True)
    c.load_extension(str(BUILD / "vecshard_hdf5"))
    c.execute("CREATE TABLE queries AS SELECT id AS name, embedding, NULL AS shard, NULL AS id FROM hdf5_vectors(?)",
              (str(demo / "queries.h5"),))
    c.close()
    return folder


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_scripts_run(home, script):
    assert "sqlite3 < sql/" + script.name in script.read_text(), "says how it is run"
    out = run("sqlite3 -bail < sql/" + script.name, home)
    assert "bucket" in out


def test_first_query_is_right(home):
    import h5py
    import numpy as np
    demo = home / "build" / "demo"
    ids, x = [], []
    for part in sorted(demo.glob("part*.h5")):
        with h5py.File(part) as f:
            ids += [i.decode() for i in f["id"][:]]
            x.append(f["embedding"][:].astype(np.float64))
    x = np.concatenate(x)
    with h5py.File(demo / "queries.h5") as f:
        q = f["embedding"][0].astype(np.float64)
    d = 1 - x @ q / (np.linalg.norm(x, axis=1) * np.linalg.norm(q))
    want = [ids[i] for i in np.argsort(d)[:10]]
    assert re.findall(r"A0A\d{7}", run("sqlite3 -bail < sql/first_query.sql", home)) == want


def test_readme_shows_what_the_demo_prints():
    demo = ROOT / "build" / "demo"
    c = connect()
    try:
        rows = c.execute("SELECT sum(rows) FROM shard_list(?)", (str(demo / "db"),)).fetchone()[0] if (demo / "queries.db").exists() else 0
    except sqlite3.Error:
        rows = 0
    if rows != DEMO_ROWS:
        pytest.skip("build/demo does not hold the whole demo: run make demo")
    printed = re.findall(r"bucket\d.*(A0A\d{7}).*(0\.\d+)", run("sqlite3 -bail < sql/first_query.sql", ROOT))
    assert len(printed) == 10
    shown = re.findall(r"^│ bucket\d │ (A0A\d{7}) │ (0\.\d+) +│$", README, re.M)
    assert [i for i, _ in shown] == [i for i, _ in printed]
    for (_, a), (_, b) in zip(shown, printed):
        assert abs(float(a) - float(b)) <= 1.01e-4


def test_readme_in_order(home):
    """Its shell commands, then its Python, then its SQL: later ones use what earlier ones made."""
    for block in blocks("sh"):
        for line in block.splitlines():
            command = line.split("#")[0].strip()
            if not command.startswith("make "):
                run(command.replace("--bucket-rows 20000", "--bucket-rows 667"), home)
    assert len((home / "build" / "hits.csv").read_text().splitlines()) == 1 + 50 * 10

    for block in blocks("python"):
        (home / "block.py").write_text(block)
        assert len(run("/usr/bin/python3 block.py", home).splitlines()) == 10

    first, reference = [b for b in blocks("sql") if "ATTACH" not in b]
    assert first.strip().removeprefix(".load build/vecshard\n") in (ROOT / "sql" / "first_query.sql").read_text()
    c = connect(home / "build" / "app.db")
    q = c.execute("SELECT embedding FROM shard_union(?, ?, 1)", (str(home / "build" / "db" / "all"), "[" + ",".join(["1"] * 32) + "]")).fetchone()[0]
    statement, empty = "", []
    before = os.getcwd()
    os.chdir(home)
    try:
        for line in reference.splitlines():
            statement += line + "\n"
            if sqlite3.complete_statement(statement):
                rows = c.execute(statement, {"q": q} if ":q" in statement else {}).fetchall()
                if not rows and "CREATE" not in statement and "id = " not in statement:
                    empty.append(statement)
                statement = ""
    finally:
        os.chdir(before)
        c.close()
    assert not statement.strip() and not empty


def test_readme_on_s3(home, s3, monkeypatch):
    """The commands and statements about S3, against a real store."""
    use_environ(monkeypatch, s3.env)
    bucket = s3.bucket("readme")
    for bucket_no in (1, 2, 3):
        tool("build", "--plan", home / "build" / "demo" / "plan.json", "--bucket", bucket_no, "--out", home / "s3" / "all", "--column", "length")
    for line in "".join(blocks("sh s3")).splitlines():
        run(line.replace("my-bucket", bucket).replace("build/db/all", "s3/all"), home)
    assert len((home / "build" / "hits_s3.csv").read_text().splitlines()) == 1 + 50 * 10
    c = connect(home / "s3.db")
    q = "[" + ",".join(["1"] * 32) + "]"
    for statement in re.sub("--.*", "", "".join(blocks("sql s3"))).replace("my-bucket", bucket).split(";"):
        if statement.strip():
            assert c.execute(statement, {"q": q} if ":q" in statement else {}).fetchall() or "CREATE" in statement, statement
    sqlite3.connect(home / "names.db").execute("CREATE TABLE names(id)").connection.close()
    s3.client.put(bucket, "names.db", (home / "names.db").read_bytes())
    attach = [b for b in blocks("sql") if "ATTACH" in b][0].splitlines()[0]
    c.execute(attach.replace("my-bucket", bucket))
    assert c.execute("SELECT count(*) FROM cold.names").fetchone() == (0,)
    c.close()


def test_names_of_readme_exist():
    c = connect()
    c.enable_load_extension(True)
    c.load_extension(str(BUILD / "vecshard_hdf5"))
    known = {r[0] for r in c.execute("SELECT name FROM pragma_function_list UNION SELECT name FROM pragma_module_list")}
    told, missing = README.split("## Not there")
    # "vecshard build" is the tool, "vecshard.so" a file
    names = set(re.findall(r"`(vec_\w+|shard_\w+|hdf5_vectors|vecshard_(?!hdf5)\w+)\b", told))
    assert len(names) > 15 and not names - known
    ours = {n for n in known if n.startswith(("vec_", "vecshard", "shard_", "hdf5_"))}
    assert not {n for n in ours if n not in told}
    assert not set(re.findall(r"`(shard_\w+)", missing)) & known


def test_tool_of_readme_exists():
    told, missing = README.split("## Not there")
    commands = set(re.findall(r"^\| `vecshard (\w+)`", told, re.M))
    assert commands == set(re.findall(r"^  (\w+)  ", tool("--help").stdout, re.M))
    helps = "".join(tool(c, "--help").stdout for c in commands)
    for program in ("tool/slurm-build.sh", "tool/parallel-build.sh", "bench/bench.py"):
        helps += subprocess.run([ROOT / program, "--help"], capture_output=True, text=True, check=True).stdout
    for option in re.findall(r"(--[a-z][a-z0-9-]+)", README):
        assert option in helps, option
    for command in re.findall(r"`(\w+)`", missing.split("the tool's")[1].split("\n")[0]):
        assert command not in commands


def test_files_and_targets_of_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for target in set(re.findall(r"\bmake (\w+)", text)) - {"alone"}:
            assert re.search(r"^%s:" % target, makefile, re.M), target
        for name in re.findall(r"\b((?:sql|test|tool|ext|bench)/[\w/]+\.(?:sql|py|sh|h|c))\b", text):
            assert (ROOT / name).exists(), name
        for name in re.findall(r"\]\((\w[\w./]+)\)", text):
            assert (ROOT / name).exists(), name
    assert "make demo" in README and "make test" in README
    for script in SCRIPTS:
        assert "sql/" + script.name in README, script.name


def test_limits_of_readme():
    header = (ROOT / "ext" / "ivfpq" / "ivfpq_format.h").read_text()

    def limit(name):
        return eval(re.search(r"%s = ([\d <]+)" % name, header)[1])

    for name, text in [("IVFPQ_MAX_DIM", "1 to {:,}"), ("IVFPQ_MAX_M", "up to {:,};"), ("IVFPQ_MAX_NLIST", "up to {:,};"),
                       ("IVFPQ_MAX_COLUMNS", "up to {:,}"), ("IVFPQ_FLAT_ROWS", "below {:,} rows")]:
        assert text.format(limit(name)) in README, name
    assert limit("IVFPQ_MAX_TEXT") == 16 << 20 and "up to 16 MiB" in README


def test_what_is_not_there_says_so(home):
    c = connect()
    c.execute("CREATE VIRTUAL TABLE p USING vecshard(path='%s')" % (home / "build" / "demo" / "db" / "bucket1"))
    for sql, says in [("INSERT INTO p(id) VALUES('x')", "may not be modified")]:
        with pytest.raises(sqlite3.Error, match=says):
            c.execute(sql).fetchall()
    c.close()
