"""Claims about safetensors files: opened under any name, refused for the true reason,
never waited for.
"""

import os
from pathlib import Path

import pytest
import torch

from lib.env.errors import Damaged, UserError
from lib.env.tensors import load_tensors, open_tensors, save_tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}
UNIX = pytest.mark.skipif(
    not hasattr(os, "mkfifo"), reason="pipes with a name and links are POSIX's"
)


@pytest.mark.parametrize("name", [b"plain", b"M\xfcller", "❄ $x$".encode(), b"\xff\xfe"], ids=repr)
def test_what_was_written_is_read_whatever_the_folder_is_called(tmp_path, name):
    folder = tmp_path / os.fsdecode(name)
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system wants names in UTF-8")
    save_tensors(TENSORS, folder / "x.safetensors", {"made": "here"})
    with open_tensors(folder / "x.safetensors", do="go away") as file:
        assert file.metadata() == {"format": "pt", "made": "here"}
        later = file.get_tensor("a")
    found = load_tensors(folder / "x.safetensors", do="go away")
    assert found.keys() == TENSORS.keys() and torch.equal(later, TENSORS["a"])
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert [path.name for path in folder.iterdir()] == ["x.safetensors"]


def refused(path) -> UserError:
    with pytest.raises(UserError) as error:
        load_tensors(path, do="fetch it again")
    assert "\n" not in str(error.value)
    return error.value


@pytest.mark.parametrize(
    "content", [b"", b"\1" * 7, b"\1" * 300, b"\0" * 300, b"\2\0\0\0\0\0\0\0{}more"], ids=repr
)
def test_content_that_is_none_is_damaged(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    error = refused(tmp_path / "x")
    assert (
        isinstance(error, Damaged)
        and "is damaged" in str(error)
        and str(error).endswith("fetch it again")
    )


def test_a_shape_beyond_all_counting_is_damaged(tmp_path):
    header = b'{"a":{"dtype":"U8","shape":[9223372036854775808,0],"data_offsets":[0,0]}}'
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    assert isinstance(refused(tmp_path / "x"), Damaged)


@UNIX
@pytest.mark.parametrize(
    "what, words",
    [
        ("pipe", "is a pipe"),
        ("folder", "is a folder"),
        ("loop", "symbolic links"),
        ("lost", "No such file"),
        ("nothing", "No such file"),
        ("behind a file", "Not a directory"),
    ],
)
def test_what_cannot_be_read_is_not_called_damaged(tmp_path, what, words):
    path = tmp_path / "x"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what in ("loop", "lost"):
        path.symlink_to("x" if what == "loop" else "elsewhere")
    elif what == "behind a file":
        Path(tmp_path / "file").write_text("")
        path = tmp_path / "file" / "x"
    error = refused(path)
    assert words in str(error) and not isinstance(error, Damaged) and "again" not in str(error)
