import pytest

from utils.errors import UserError, run_script
from utils.version import __version__


def raising(error):
    def main():
        raise error

    return main


def test_a_user_error_is_its_message_alone_and_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        run_script(raising(UserError("lr is -1; give 0 or more.")))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: lr is -1; give 0 or more.\n"


def test_any_other_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(raising(ZeroDivisionError()))


def test_an_interrupted_script_has_status_130(capsys):
    with pytest.raises(SystemExit) as stop:
        run_script(raising(KeyboardInterrupt()))
    assert stop.value.code == 130


def test_every_script_prints_its_version(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--version"])
    run_script(raising(AssertionError("main ran")))
    assert capsys.readouterr().out == f"{__version__}\n"
