from __future__ import annotations

import json
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from mmalign import doctor
from mmalign.cli import run
from mmalign.decoders import why_not
from mmalign.doctor import Check, Diagnosis, attempt, packages, try_checks

DECLARED = [
    "torch<3,>=2.8",
    'wandb>=0.19; extra == "track"',
    'diffusers>=0.36; extra == "diffusion"',
    'xformers>=0.0.33; extra == "cuda"',
    'ruff>=0.12; extra == "dev"',
]


def installed(versions: dict[str, str]):
    def look(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    return look


def diagnosis(versions: dict[str, str], *checks: Check) -> Diagnosis:
    found = packages(DECLARED, installed(versions))
    return Diagnosis(python="3.11", platform="Linux", packages=found, checks=checks)


def test_a_missing_extra_costs_something_and_names_its_line():
    found = diagnosis({"torch": "2.15.0+cu132"})
    assert found.healthy
    text = found.as_text()
    assert "wandb: no run.trackers=[wandb]\n      pip install 'mmalign[track]'" in text
    assert text.endswith("Ready.")


def test_every_package_is_declared_and_every_optional_one_is_explained(repo_root: Path):
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    declared = list(project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        declared += [f'{requirement}; extra == "{extra}"' for requirement in requirements]
    found = {package.name: package for package in packages(declared)}
    assert set(doctor.COSTS) <= set(found)
    assert all(p.required or p.cost for p in found.values())
    listed = ("torch", "transformers", "diffusers", "peft", "accelerate", "open_clip_torch")
    assert {*listed, "decord", "bitsandbytes", "xformers"} <= set(found)


def test_packages_come_from_the_metadata():
    assert {"torch", "decord", "wandb"} <= {package.name for package in packages()}


def test_development_tools_are_not_looked_for():
    assert "ruff" not in {package.name for package in packages(DECLARED, installed({}))}


@pytest.mark.parametrize("versions", [{}, {"torch": "2.7.1"}, {"torch": "3.0"}])
def test_a_required_package_missing_or_of_another_version_is_ill(versions: dict[str, str]):
    found = diagnosis(versions)
    assert not found.healthy
    assert "pip install mmalign" in found.as_text()
    assert "Something required is missing or broken" in found.as_text()


@pytest.mark.parametrize("required", [True, False])
def test_a_failing_check_is_ill_only_when_required(required: bool):
    check = Check(name="x", works=False, detail="no kernel", required=required)
    assert diagnosis({"torch": "2.15.0"}, check).healthy is not required


def test_an_uninstalled_mmalign_is_told_not_raised(monkeypatch: pytest.MonkeyPatch):
    def unknown(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", unknown)
    mmalign = packages(installed=installed({}))[0]
    assert (mmalign.name, mmalign.required, mmalign.good) == ("mmalign", True, False)


def test_a_check_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    def refuse() -> str:
        raise RuntimeError("no operator\n  found")

    monkeypatch.setitem(doctor.CHECKS, "torch", refuse)
    assert attempt("torch") == Check(
        name="torch", works=False, detail="no operator found", required=True
    )


def test_a_missing_module_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    found = attempt("clips: decord")
    assert not found.works
    assert "decord" in found.detail


def test_attention_is_tried_and_a_refusal_has_its_reason():
    assert attempt("attention: flash").works
    assert attempt("attention: flash").detail == "packed rows on cpu, float32, equal to sdpa"
    assert attempt("attention: xformers").detail == "its kernels need CUDA"
    assert attempt("attention: flex").detail == "it has no backward pass on the CPU"


@pytest.mark.parametrize(("check", "backend"), [("av", "pyav"), ("decord", "decord")])
def test_clips_are_really_decoded(check: str, backend: str):
    if why_not(backend) is not None:
        pytest.skip(f"{backend} {why_not(backend)}")
    assert attempt(f"clips: {check}").detail == "decodes 8 frames of a clip"


def test_why_torchcodec_does_not_work_is_one_line(monkeypatch: pytest.MonkeyPatch):
    reason = "finds no shared libraries of FFmpeg: install FFmpeg"
    monkeypatch.setattr("mmalign.decoders.torchcodec._why_it_does_not_load", lambda: reason)
    found = attempt("clips: torchcodec")
    assert not found.works
    assert found.detail in (f"torchcodec {reason}", "torchcodec is not installed")


def test_a_check_that_kills_its_process_does_not_stop_the_others(tmp_path, monkeypatch):
    # The children run this module in the doctor's place: `crash` ends its process.
    (tmp_path / "child.py").write_text(
        "import json, os, sys\n"
        "for name in sys.argv[1:]:\n"
        "    if name == 'crash': os._exit(11)\n"
        "    check = dict(name=name, works=True, detail='', required=False)\n"
        f"    print('noise'); print({doctor.MARK!r} + json.dumps(check), flush=True)\n"
    )
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {tmp_path}/child.py "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    found = try_checks(["before", "crash", "after", "crash"])
    assert [(check.name, check.works) for check in found] == [
        ("before", True),
        ("crash", False),
        ("after", True),
        ("crash", False),
    ]
    assert found[1].detail == "ended its process (exit code 11)"


def test_a_check_that_hangs_is_stopped(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    (found,) = try_checks(["slow"], timeout_seconds=0.5)
    assert not found.works
    assert "did not finish" in found.detail


def test_what_is_required_works_here_and_the_verb_says_so(monkeypatch, capsys):
    monkeypatch.setattr(
        doctor, "CHECKS", {name: doctor.CHECKS[name] for name in doctor.REQUIRED_CHECKS}
    )
    assert run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is True
    assert {check["name"]: check["works"] for check in found["checks"]} == dict.fromkeys(
        doctor.REQUIRED_CHECKS, True
    )
    torch = next(package for package in found["packages"] if package["name"] == "torch")
    assert torch["required"]
    assert torch["good"]


def test_the_verb_fails_when_something_required_is_broken(monkeypatch, capsys):
    broken = diagnosis({})
    monkeypatch.setattr(doctor, "examine", lambda: broken)
    assert run(["doctor"]) == 1
    assert "torch: required" in capsys.readouterr().out
