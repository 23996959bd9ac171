"""Files are whole or absent, and folders that were made for nothing go again."""

from pathlib import Path

import pytest

from optstate.files import check_folder, write_files


def test_a_folder_is_checked_without_a_trace(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    check_folder(tmp_path)
    assert tmp_path.is_dir()


def test_a_folder_below_a_file_is_an_error_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        check_folder(tmp_path / "file" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(PermissionError):
        check_folder(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_all_files_are_written(tmp_path: Path) -> None:
    files = {tmp_path / "new" / "a.json": b"{}", tmp_path / "new" / "a.png": b"PNG"}
    write_files(files)
    assert {path: path.read_bytes() for path in (tmp_path / "new").iterdir()} == files


@pytest.mark.parametrize("stop", [0, 1])
def test_an_interruption_leaves_what_was_there(tmp_path: Path, monkeypatch, stop: int) -> None:
    """Whichever file is being written when it comes, nothing new and nothing torn remains."""
    old, new = tmp_path / "old.json", tmp_path / "deep" / "new.png"
    old.write_bytes(b"old")
    write, calls = Path.write_bytes, []

    def interrupted(path: Path, content: bytes) -> int:
        calls.append(path)
        if len(calls) > stop:
            write(path, content[:1])
            raise KeyboardInterrupt
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_files({old: b"other", new: b"PNG"})
    assert [path.name for path in tmp_path.rglob("*")] == ["old.json"]
    assert old.read_bytes() == b"old"
