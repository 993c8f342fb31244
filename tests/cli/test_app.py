from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastlm._version import __version__
from fastlm.cli import app as application
from fastlm.errors import DataError
from tests.cli.interrupts import heed_interrupts

HELP_CODE = """
import sys, time
start = time.perf_counter()
from fastlm.cli import app
try:
    app.app(sys.argv[1:], standalone_mode=False)
finally:
    print("seconds", time.perf_counter() - start)
    heavy = ("torch", "triton", "transformers", "matplotlib", "fastlm._native")
    print("loaded", [name for name in heavy if name in sys.modules])
"""


@pytest.mark.parametrize("command", [None, *application.COMMANDS])
def test_help_is_quick_loads_nothing_heavy_and_shows_an_example(command: str | None) -> None:
    arguments = [command, "--help"] if command else ["--help"]
    run = subprocess.run([sys.executable, "-c", HELP_CODE, *arguments], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", run.stdout).split())
    assert re.search(rf"Examples?: fastlm {command or 'demo'}\b", text), run.stdout
    assert "loaded []" in text
    seconds = re.search(r"^seconds ([\d.]+)", run.stdout, re.MULTILINE)
    assert seconds
    assert float(seconds[1]) < 2


def test_every_command_file_is_registered() -> None:
    files = {path.stem for path in Path(application.__file__).parent.glob("*.py")} - {"__init__", "app", "output"}
    commands = {name.replace("-", "_") for name in application.COMMANDS}
    assert commands <= files
    not_registered = {name for name in files - commands if "def command(" in _source(name)}
    assert not not_registered


def _source(name: str) -> str:
    return (Path(application.__file__).parent / f"{name}.py").read_text(encoding="utf-8")


def test_version_is_printed() -> None:
    result = CliRunner().invoke(application.app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"fastlm {__version__}\n")


def test_unknown_command_and_option_exit_with_2() -> None:
    assert CliRunner().invoke(application.app, ["nonsense"]).exit_code == 2
    assert CliRunner().invoke(application.app, ["doctor", "--nonsense"]).exit_code == 2


def test_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastlm.cli.doctor.machine", interrupted)
    assert CliRunner().invoke(application.app, ["doctor"]).exit_code == 130


IMPORTING = """
import sys
from fastlm.cli import main
class Interrupted:  # found first by every import that comes now
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            {action}
sys.meta_path.insert(0, Interrupted())
sys.argv = ["fastlm", "doctor"]
main()
"""


@pytest.mark.parametrize("module", ["fastlm.cli.app", "fastlm.cli.doctor", "fastlm._native"])
def test_ctrl_c_during_imports_is_one_line_and_130(module: str) -> None:
    """Also while the native core loads, which pybind11 reports as a failed import."""
    fails = "raise ImportError('initialization failed') from KeyboardInterrupt()"
    script = IMPORTING.format(module=module, action=fails if module == "fastlm._native" else "raise KeyboardInterrupt")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (130, "interrupted\n")


def test_ctrl_c_that_python_drops_in_a_callback_comes_again() -> None:
    """As it does when it falls into the clean-up of an import."""
    action = """
            class Dropping:
                def __del__(self):
                    raise KeyboardInterrupt
            Dropping()
            import time
            for _ in range(500):
                time.sleep(0.01)
"""
    script = IMPORTING.format(module="fastlm.cli.app", action=action)
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=heed_interrupts,
    )
    assert (run.returncode, run.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("a.txt: the file is empty"), "error: a.txt: the file is empty"),
        (
            MemoryError("std::bad_alloc"),
            "error: there is not enough memory for this; give less at once, or use a machine with more",
        ),
        (OSError(28, "No space left on device", "out/[x].bin"), "error: No space left on device: out/[x].bin"),
    ],
)
def test_expected_errors_become_one_line_and_exit_1(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing() -> None:
        raise error

    monkeypatch.setattr(application, "app", failing)
    with pytest.raises(SystemExit) as exit_info:
        application.run()
    assert exit_info.value.code == 1
    assert capsys.readouterr().err.strip() == line
