from contextlib import contextmanager

import pytest
import torch

from utils.errors import UserError
from utils.files import replacing


@pytest.mark.parametrize("old", [None, b"", b"old and longer"])
def test_a_block_that_ends_well_leaves_the_new_content_alone_in_the_folder(tmp_path, old):
    path = tmp_path / "a.pt"
    if old is not None:
        path.write_bytes(old)
    with replacing(str(path)) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_until_the_block_ends_readers_see_the_old_content(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def write_half(path, error):
    with replacing(path) as file:
        file.write(b"half")
        raise error


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (KeyError("k"), KeyError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("no matter of files"), RuntimeError),
        (OSError(28, "No space left on device"), UserError),
    ],
    ids=["KeyError", "interrupt", "RuntimeError", "OSError"],
)
def test_an_error_in_the_block_leaves_the_old_file_alone(tmp_path, error, seen):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")
    with pytest.raises(seen):
        write_half(path, error)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@contextmanager
def full_disk():
    """No file of this process can grow beyond 1000 bytes: no fixture, for pytest's log is one."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("write", [torch.save, lambda content, file: file.write(bytes(9999))])
def test_a_full_disk_is_said_and_leaves_the_old_file_alone(tmp_path, write):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")
    refused = pytest.raises(UserError, match=r"a\.pt: cannot write the file")
    with refused, full_disk(), replacing(path) as file:
        write(torch.zeros(9999), file)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_crash_left_is_written_over(tmp_path):
    (tmp_path / ".a.pt.tmp").write_bytes(b"longer than the new content")
    with replacing(tmp_path / "a.pt") as file:
        file.write(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert (tmp_path / "a.pt").read_bytes() == b"new"


@pytest.mark.parametrize(
    "name", ["nowhere/a.pt", "file/a.pt", "folder", "a" * 252], ids=lambda name: name[:12]
)
def test_a_path_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path, name):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(UserError, match=f"{name}: cannot write the file"),
        replacing(tmp_path / name) as file,
    ):
        file.write(b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_bytes() == b"old"
