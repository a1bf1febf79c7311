"""Types of the arguments that scripts share: what cannot work is said before there is work to lose."""

import os
from argparse import ArgumentTypeError
from pathlib import Path


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def seed(text: str) -> int:
    """As NumPy takes it, and what builds on it."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise ArgumentTypeError(f"must be in [0, 2**32), got {number}")
    return number


def output_file(text: str) -> Path:
    """A file that can be made, or replaced."""
    path = Path(text)
    if path.is_dir():
        raise ArgumentTypeError(f"must be a file, got the folder {path}")
    _check_can_hold_files(path.absolute().parent)
    return path


def output_folder(text: str) -> Path:
    """A folder that is there, or can be made."""
    path = Path(text)
    _check_can_hold_files(path.absolute())
    return path


def picture_file(text: str) -> Path:
    """An :func:`output_file` of a kind that matplotlib writes."""
    from matplotlib.backend_bases import FigureCanvasBase  # only scripts that draw need it

    path = output_file(text)
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower()[1:] not in kinds:
        raise ArgumentTypeError(f"must end in one of {', '.join('.' + kind for kind in kinds)}; got {path}")
    return path


def _check_can_hold_files(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise ArgumentTypeError(f"must be in a folder, got {existing}, which is none")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ArgumentTypeError(f"must be in a folder where files may be made, got {existing}")
