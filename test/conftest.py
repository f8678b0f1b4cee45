"""Shared by the SQL tests: `db` (a connection with the extension), connect(path) for more of them, `root`, blob(v).

VECSHARD_BUILD names another build folder, as in test_hdf5_vectors.py. Needs a Python whose sqlite3 loads extensions
(Debian: /usr/bin/python3).
"""
import os
import pathlib
import sqlite3
import struct

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = pathlib.Path(os.environ.get("VECSHARD_BUILD", ROOT / "build"))


def connect(path=":memory:"):
    c = sqlite3.connect(str(path), isolation_level=None, uri=True)
    c.enable_load_extension(True)
    c.load_extension(str(BUILD / "vecshard"))
    c.enable_load_extension(False)
    return c


def blob(v):
    """A sequence of numbers as the float32 BLOB that vecshard takes for a vector."""
    return struct.pack("<%df" % len(v), *v)


@pytest.fixture
def db():
    c = connect()
    yield c
    c.close()


@pytest.fixture(scope="session")
def root():
    return ROOT
