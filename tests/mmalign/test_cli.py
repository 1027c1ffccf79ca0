from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer

from mmalign import __version__, cli
from mmalign.errors import ConfigError, DataError
from mmalign.quickstart import Step, load_steps, run_steps

STEPS = """
steps:
  - {say: First, run: [build, a.yaml, "output=out/a b"]}
  - {say: Second, run: [train, b.yaml]}
  - {say: Third, run: [report, out]}
"""


@pytest.fixture
def core_verbs(monkeypatch: pytest.MonkeyPatch):
    """The verbs of mmalign.commands alone, and one that fails as it is told."""
    points = {
        name: EntryPoint(name, f"mmalign.commands:{attribute}", cli.GROUP)
        for name, attribute in (("init-model", "init_model"), ("quickstart", "quickstart"))
    }
    monkeypatch.setattr(cli, "verbs", lambda: points)
    return points


def verb(monkeypatch: pytest.MonkeyPatch, body) -> None:
    """Make `mmalign try` run `body`."""
    app = typer.Typer(add_completion=False)
    app.command()(body)

    class Point:
        def load(self) -> typer.Typer:
            return app

    monkeypatch.setattr(cli, "verbs", lambda: {"try": Point()})


def test_the_version_is_printed(core_verbs, capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_the_help_names_the_verbs(core_verbs, capsys):
    assert cli.run(["--help"]) == 0
    assert "quickstart" in capsys.readouterr().out


def test_our_errors_are_sentences_and_exit_with_2(monkeypatch, capsys):
    def body() -> None:
        raise DataError("is empty", where="data/x", fix="build it first")

    verb(monkeypatch, body)
    assert cli.run(["try"]) == 2
    assert capsys.readouterr().err == "error: data/x: is empty. Build it first.\n"


def test_an_interrupt_exits_with_130(monkeypatch, capsys):
    def body() -> None:
        raise KeyboardInterrupt

    verb(monkeypatch, body)
    assert cli.run(["try"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_of_ours_is_not_hidden(monkeypatch):
    def body() -> None:
        raise ZeroDivisionError

    verb(monkeypatch, body)
    with pytest.raises(ZeroDivisionError):
        cli.run(["try"])


def test_a_verbs_exit_code_is_returned(monkeypatch):
    def body() -> None:
        raise typer.Exit(7)

    verb(monkeypatch, body)
    assert cli.run(["try"]) == 7


def test_an_unknown_verb_is_a_usage_error(core_verbs, capsys):
    assert cli.run(["quickstrat"]) == 2
    assert "quickstrat" in capsys.readouterr().err


def broken_verb(monkeypatch: pytest.MonkeyPatch, core_verbs: dict[str, EntryPoint]) -> None:
    point = EntryPoint("broken", "mmalign.no_such_module:app", cli.GROUP)
    monkeypatch.setitem(core_verbs, "broken", point)


def test_the_help_lists_a_verb_that_does_not_load_and_goes_on(core_verbs, monkeypatch, capsys):
    broken_verb(monkeypatch, core_verbs)
    assert cli.run(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "cannot be loaded: No module named" in " ".join(printed.split())
    assert "quickstart" in printed


@pytest.mark.parametrize("arguments", [[], ["a.yaml", "--limit", "3"], ["--help"]])
def test_a_verb_that_does_not_load_says_so_when_called(core_verbs, monkeypatch, capsys, arguments):
    broken_verb(monkeypatch, core_verbs)
    assert cli.run(["broken", *arguments]) == 2
    assert capsys.readouterr().err == (
        "error: mmalign broken: cannot be loaded: No module named 'mmalign.no_such_module'. "
        "Repair or reinstall the package that it comes from.\n"
    )


def test_init_model_names_a_missing_config(core_verbs, capsys, tmp_path: Path):
    assert cli.run(["init-model", str(tmp_path / "absent.yaml")]) == 2
    assert "no such config file" in capsys.readouterr().err


def steps(folder: Path) -> tuple[Step, ...]:
    (folder / "steps.yaml").write_text(STEPS)
    return load_steps(folder / "steps.yaml")


def test_a_step_reads_as_the_line_to_type(tmp_path: Path):
    first, _, third = steps(tmp_path)
    assert first.run == ("build", "a.yaml", "output=out/a b")
    assert first.command == "mmalign build a.yaml 'output=out/a b'"
    assert third.run == ("report", "out")


def test_quickstart_prints_each_command_before_it_runs(tmp_path: Path, capsys):
    printed: list[str] = []

    def run(arguments: list[str]) -> int:
        printed.append(capsys.readouterr().out)
        return 0

    run_steps(steps(tmp_path), run=run)
    assert "[1/3] First\n$ mmalign build a.yaml 'output=out/a b'\n" in printed[0]
    assert "[3/3] Third\n$ mmalign report out\n" in printed[2]
    assert "Done in" in capsys.readouterr().out


def test_quickstart_stops_at_a_failing_step_with_its_code(tmp_path: Path, capsys):
    ran: list[list[str]] = []

    def run(arguments: list[str]) -> int:
        ran.append(arguments)
        return 3 if arguments[0] == "train" else 0

    with pytest.raises(typer.Exit) as stopped:
        run_steps(steps(tmp_path), run=run)
    assert stopped.value.exit_code == 3
    assert [arguments[0] for arguments in ran] == ["build", "train"]
    assert "step 2 of 3 failed with exit code 3" in capsys.readouterr().err


def test_quickstart_runs_one_step_alone(tmp_path: Path):
    ran: list[list[str]] = []

    def run(arguments: list[str]) -> int:
        ran.append(arguments)
        return 0

    run_steps(steps(tmp_path), only=2, run=run)
    assert ran == [["train", "b.yaml"]]
    with pytest.raises(ConfigError, match="1 to 3"):
        run_steps(steps(tmp_path), only=4, run=run)


def test_quickstart_outside_the_repository_says_where_to_run_it(
    core_verbs, capsys, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["quickstart"]) == 2
    assert "run `mmalign quickstart` from its top folder" in capsys.readouterr().err


def test_quickstart_lists_its_steps_and_runs_none(core_verbs, capsys, monkeypatch, repo_root: Path):
    monkeypatch.chdir(repo_root)
    before = set(repo_root.glob("runs/*"))
    assert cli.run(["quickstart", "--list"]) == 0
    assert "mmalign train configs/quickstart/dpo.yaml" in capsys.readouterr().out
    assert set(repo_root.glob("runs/*")) == before
