"""What scripts refuse before they begin, and files that are never left in part."""

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import output_file, output_folder, picture_file, positive, seed
from files import replacing


@pytest.mark.parametrize(
    ("of", "argument", "message"),
    [
        (positive, "0", "must be at least 1, got 0"),
        (positive, "many", "invalid positive value: 'many'"),
        (seed, "-1", "must be in [0, 2**32), got -1"),
        (seed, "4294967296", "must be in [0, 2**32), got 4294967296"),
        (output_file, "folder", "must be a file, got the folder"),
        (output_file, "file/out.json", "must be in a folder, got "),
        (output_folder, "file", "must be in a folder, got "),
        (picture_file, "folder/out", "must end in one of ."),
        (picture_file, "folder/out.xyz", "out.xyz"),
        (picture_file, "file/out.png", "must be in a folder, got "),
    ],
)
def test_bad_arguments(
    of: Callable[[str], Any], argument: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    parser = ArgumentParser()
    parser.add_argument("--argument", type=of)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--argument={argument}"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("of", [output_file, output_folder, picture_file])
def test_paths_whose_folders_are_to_be_made(of: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "out.svg"
    assert of(str(path)) == path
    assert not path.parent.exists()


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """A disk that is full, or a run that is ended, must not take the numbers that were there."""
    path = tmp_path / "folder" / "out.json"
    with replacing(path) as unfinished:
        unfinished.write_text("first")

    def fail() -> None:
        with replacing(path) as unfinished:
            unfinished.write_text("sec")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert path.read_text() == "first"
    assert [*path.parent.iterdir()] == [path]
