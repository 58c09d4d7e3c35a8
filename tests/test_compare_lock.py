import os
import signal
import subprocess
import sys

import pytest

from lab.lock import folder_lock
from utils.errors import UserError

pytest.importorskip("fcntl", reason="Windows has no lock that children inherit")


def test_a_held_folder_is_refused_and_a_left_one_is_free(tmp_path):
    with folder_lock(tmp_path), pytest.raises(UserError, match="in use"), folder_lock(tmp_path):
        pass
    with folder_lock(tmp_path):
        pass


def test_the_holder_is_named(tmp_path):
    code = (
        "import fcntl, os, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print(os.getpid(), file=file, flush=True); print(flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "comparing.pid")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.readline()
        with pytest.raises(UserError, match=f"in use by process {process.pid}"):
            folder_lock(tmp_path).__enter__()
        process.communicate(b"\n")
    with folder_lock(tmp_path):
        assert (tmp_path / "comparing.pid").read_text() == f"{os.getpid()}\n"


def test_a_child_holds_the_folder_after_its_parent_is_killed(tmp_path):
    """The child inherits the lock and has written nothing yet, as one that is still importing."""
    parent = os.fork()
    if parent == 0:
        try:
            with folder_lock(tmp_path) as held:
                child = subprocess.Popen(["sleep", "60"], pass_fds=held)
                (tmp_path / "child").write_text(str(child.pid))
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(parent, 0)
    child = int((tmp_path / "child").read_text())
    try:
        with pytest.raises(UserError, match=f"process {parent} had started before it was killed"):
            folder_lock(tmp_path).__enter__()
        (tmp_path / "runs" / "bce" / "seed-0").mkdir(parents=True)
        (tmp_path / "runs" / "bce" / "seed-0" / "running.pid").write_text(str(child))
        with pytest.raises(UserError, match=f"kill {child};"):
            folder_lock(tmp_path).__enter__()
    finally:
        os.kill(child, signal.SIGKILL)
    for _ in range(100):
        try:
            with folder_lock(tmp_path):
                return
        except UserError:
            subprocess.run(["sleep", "0.05"], check=True)
    pytest.fail("the folder stays locked after the child's end")
