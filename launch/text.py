"""Real text that every machine with Python has, as token ids: the sources of its standard library and their docstrings.

The tokenizer is a byte-level BPE trained on that very text; its vocabulary can have any size up to some ten thousands.
Building takes seconds and is done once: the result is kept in ``.cache/`` of the checkout, under a name that changes
with the text, the size of the vocabulary and the version of the tokenizers library.
"""

import hashlib
import os
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"

CACHE = Path(__file__).resolve().parent.parent / ".cache"
"""Where scripts of this folder keep what they make, out of version control."""

# Tests are not installed everywhere, installed packages belong to others, and encodings are tables rather than text.
_SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "encodings", "idle_test", "site-packages", "test", "tests"}


@dataclass(frozen=True)
class Text:
    """A text and how it was tokenised."""

    tokens: Tensor
    """``[N]`` int32 ids of all files in the order of their paths, each followed by :data:`END_OF_TEXT`."""
    tokenizer: Tokenizer


def load_text(vocab_size: int) -> Text:
    """The standard library in exactly ``vocab_size`` kinds of tokens, from the cache or built now.

    Raises:
        ValueError: the text on this machine does not yield that many.
    """
    files = _read_sources()
    key = hashlib.sha256(f"{tokenizers.__version__} {vocab_size}".encode())
    for text in files:
        key.update(hashlib.sha256(text.encode()).digest())
    path = CACHE / f"text-{vocab_size}-{key.hexdigest()[:16]}.pt"
    if not path.exists():
        tokenizer = _train_tokenizer(files, vocab_size)
        end = tokenizer.token_to_id(END_OF_TEXT)
        ids = [token for encoding in tokenizer.encode_batch_fast(files) for token in (*encoding.ids, end)]
        _save({"tokenizer": tokenizer.to_str(), "tokens": torch.tensor(ids, dtype=torch.int32)}, path)
    saved = torch.load(path)
    return Text(saved["tokens"], Tokenizer.from_str(saved["tokenizer"]))


def _read_sources() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(
        path for path in root.rglob("*.py") if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parent.parts)
    )
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def _train_tokenizer(files: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(files, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size} cannot be reached: the {len(files)} files of {sysconfig.get_path('stdlib')} "
            f"({sum(map(len, files)):,} characters) give a vocabulary of {tokenizer.get_vocab_size()} tokens"
        )
    return tokenizer


def _save(value: dict, path: Path) -> None:
    """Write a file that is either whole or not there, even if several processes write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        torch.save(value, unfinished)
        os.replace(unfinished, path)
