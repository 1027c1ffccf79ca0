from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("mmalign", "data_builders", "trainers", "evals")

# Runs in a child: refuses sockets, hides GPUs, then imports every module and prints what changed.
IMPORT_ALL = """
import importlib, json, logging, os, pkgutil, socket, sys
os.environ["CUDA_VISIBLE_DEVICES"] = ""
def refuse(*_, **__): raise AssertionError("a module opened a connection when imported")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
names = []
for package in sys.argv[1:]:
    found = importlib.import_module(package)
    names += [m.name for m in pkgutil.walk_packages(found.__path__, package + ".")]
failed = {}
for name in names:
    if name.endswith("__main__"):
        continue
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed[name] = repr(error)
print(json.dumps({
    "count": len(names), "failed": failed,
    "handlers": [str(h) for h in logging.getLogger("mmalign").handlers],
}))
"""

BUILD_APPLICATION = """
import json, sys
from mmalign.cli import application, verbs
application()
print(json.dumps([sorted(verbs()), sorted({"torch", "transformers"} & set(sys.modules))]))
"""


def child(code: str, *arguments: str) -> object:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_module_imports_without_network_or_cuda():
    found = child(IMPORT_ALL, *PACKAGES)
    assert isinstance(found, dict)
    assert found["failed"] == {}
    assert found["handlers"] == []
    assert found["count"] > 20


def test_building_the_command_line_does_not_import_torch():
    verbs, heavy = child(BUILD_APPLICATION)  # type: ignore[misc]
    assert {"build", "train", "eval", "doctor", "quickstart", "init-model"} <= set(verbs)
    assert heavy == []


@pytest.mark.parametrize("name", PACKAGES)
def test_the_package_is_the_one_in_this_repository(name: str, repo_root: Path):
    # `evals` and `trainers` are common names: another wheel's must not answer for ours.
    package = importlib.import_module(name)
    assert package.__file__ is not None
    assert Path(package.__file__).resolve().parent == repo_root / name
    assert [m.name for m in pkgutil.iter_modules(package.__path__)]
