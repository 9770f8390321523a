"""Claims about lib.env.files: files and folders appear whole or not at all."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from lib.env import files
from lib.env.errors import UserError
from lib.env.files import atomic_folder, write_json, write_text


def test_write_text_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    target = tmp_path / "new" / "x.json"
    write_text(target, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(UserError, match="disk is full"):
        write_text(target, "new")
    assert target.read_text() == "old" and os.listdir(target.parent) == ["x.json"]


def test_json_is_a_text_that_people_can_read(tmp_path):
    write_json(tmp_path / "x.json", {"Prélude": [1, 2.5]})
    assert (tmp_path / "x.json").read_bytes() == '{\n "Prélude": [\n  1,\n  2.5\n ]\n}\n'.encode()


def fill(folder, **options):
    """Two files, the second of which is written last."""
    with atomic_folder(folder, **options) as part:
        (part / "a").write_text("new")
        assert not (folder / "b").exists() or (folder / "b").read_text() == "old"
        (part / "b").write_text("new")


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_folder_appears_with_all_of_its_files_or_not_at_all(tmp_path):
    def broken():
        with atomic_folder(tmp_path / "x") as part:
            (part / "a").write_text("half")
            raise ValueError

    with pytest.raises(ValueError):
        broken()
    assert not list(tmp_path.iterdir())
    fill(tmp_path / "x")
    assert content(tmp_path / "x") == {"a": "new", "b": "new"}
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("first_stays", [False, True])
def test_a_folder_that_is_there_gets_the_new_files_or_stays_as_the_first_made_it(
    tmp_path, first_stays
):
    (tmp_path / "x").mkdir()
    for name in ("b", "c"):
        (tmp_path / "x" / name).write_text("old")
    fill(tmp_path / "x", first_stays=first_stays)
    new = {"b": "old", "c": "old"} if first_stays else {"a": "new", "b": "new", "c": "old"}
    assert content(tmp_path / "x") == new
    assert os.listdir(tmp_path) == ["x"]


def test_what_cannot_be_written_is_named_as_the_caller_says(tmp_path):
    (tmp_path / "x").write_text("no folder")
    with pytest.raises(UserError, match="could not write token streams"):
        fill(tmp_path / "x", what="token streams", first_stays=True)


def test_threads_that_write_one_file_leave_one_of_them_whole(tmp_path):
    path = tmp_path / "out.txt"
    texts = [letter * 5_000 for letter in "abc"]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda text: [write_text(path, text) for _ in range(20)], texts))
    assert path.read_text() in texts and list(tmp_path.iterdir()) == [path]
