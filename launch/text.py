"""Real text that every machine with Python has, as token ids: the sources of its standard library and their docstrings.

The tokenizer is a byte-level BPE trained on that very text; its vocabulary can have any size up to some ten thousands.
Building takes seconds and is done once: the result is kept in ``.cache/`` of the checkout, under a name that changes
with the text, the size of the vocabulary and the version of the tokenizers library.
"""

import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import tokenizers
import torch
from files import replacing
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"

CACHE = Path(__file__).resolve().parent.parent / ".cache"
"""Where scripts of this folder keep what they make, out of version control."""

STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))

# Tests are not installed everywhere, installed packages belong to others, and encodings are tables rather than text.
_SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "encodings", "idle_test", "site-packages", "test", "tests"}


@dataclass(frozen=True)
class Text:
    """A text and how it was tokenised."""

    tokens: Tensor
    """``[N]`` int32 ids of all files in the order of their paths, each followed by :data:`END_OF_TEXT`."""
    tokenizer: Tokenizer


# A piece of a document may end here. The pre-tokenizer's words hold white space only in front of their text or apart
# from it, so they end where white space follows text, whatever comes next; merges never leave a word.
_LAST_END_OF_A_WORD = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)


def load_text(vocab_size: int, held_out: Path | None = None) -> Text:
    """The standard library in exactly ``vocab_size`` kinds of tokens, from the cache or built now.

    Args:
        vocab_size: tokens of the tokenizer, :data:`END_OF_TEXT` among them.
        held_out: a file under :data:`STANDARD_LIBRARY` that neither the text nor the tokenizer's training includes.

    Raises:
        ValueError: the text on this machine does not yield that many.
    """
    files = _read_sources(held_out)
    key = hashlib.sha256(f"{tokenizers.__version__} {vocab_size}".encode())
    for text in files:
        key.update(hashlib.sha256(text.encode()).digest())
    path = CACHE / f"text-{vocab_size}-{key.hexdigest()[:16]}.pt"
    if not path.exists():
        tokenizer = _train_tokenizer(files, vocab_size)
        end = tokenizer.token_to_id(END_OF_TEXT)
        ids = [token for encoding in tokenizer.encode_batch_fast(files) for token in (*encoding.ids, end)]
        with replacing(path) as unfinished:
            torch.save({"tokenizer": tokenizer.to_str(), "tokens": torch.tensor(ids, dtype=torch.int32)}, unfinished)
    saved = torch.load(path)
    return Text(saved["tokens"], Tokenizer.from_str(saved["tokenizer"]))


def read_tokens(document: TextIO, tokenizer: Tokenizer, piece_size: int = 2**16) -> Iterator[int]:
    """The ids of a document as they are needed, the same as ``tokenizer.encode`` gives for the whole of it.

    Args:
        document: an open text; of one without any space or line break all is held.
        tokenizer: of :func:`load_text`.
        piece_size: characters to read at a time.
    """
    held: list[str] = []  # no word of it has ended
    last = ""
    while block := document.read(piece_size):
        last_end = _LAST_END_OF_A_WORD.match(last + block)  # the last character may end a word too
        if last_end:
            cut = last_end.end() - len(last)
            yield from tokenizer.encode("".join((*held, block[:cut]))).ids
            held.clear()
            block = block[cut:]
        held.append(block)
        last = block[-1]
    yield from tokenizer.encode("".join(held)).ids


def _read_sources(held_out: Path | None) -> list[str]:
    paths = sorted(
        path
        for path in STANDARD_LIBRARY.rglob("*.py")
        if path != held_out and _SKIPPED_FOLDERS.isdisjoint(path.relative_to(STANDARD_LIBRARY).parent.parts)
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
            f"vocab_size {vocab_size} cannot be reached: the {len(files)} files of {STANDARD_LIBRARY} "
            f"({sum(map(len, files)):,} characters) give a vocabulary of {tokenizer.get_vocab_size()} tokens"
        )
    return tokenizer
