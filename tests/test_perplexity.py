"""launch/perplexity.py, as a user runs it with a small vocabulary and few steps, and its parts with a tiny model."""

import copy
import io
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

import perplexity
import pytest
import text
import torch
import torch.nn.functional as F
from bootstrap import Context
from demo_model import GPT
from demo_training import new_body
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from perplexity import HELD_OUT, LENGTH, TOLERANCE, Evaluation, LanguageModel, TokenLosses, cut_windows, evaluate
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer
from torch import Tensor
from torch.distributed import ProcessGroup

from vocab_parallel_fused import VocabParallelLinearCrossEntropy
from vocab_parallel_fused.testing import PeakBytes, run_on_ranks

ROOT = Path(__file__).parent.parent
RANKS = 1 if torch.cuda.device_count() == 1 else 2
VOCAB_SIZE = 1025  # uneven on two ranks
# Letters beyond one byte, both line ends, and white space of all lengths.
TEXT = (ROOT / "README.md").read_text(encoding="utf-8") + "\r\n \r\n  naïve — 例文 \t\n\n"
# Mean losses near 6 and 7, computed in fp32 with sums over a few hundred numbers.
ROUNDING = 3e-6
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """With tokens that a careless cut would break: line ends with indentation, and one with "\\x1c", which is white
    space to Python only."""
    source = Path(__file__).read_text(encoding="utf-8")
    return text._train_tokenizer([TEXT, source, "+\x1c\n" * 100], vocab_size=401)


def naive_nats_per_token(body: GPT, weight: Tensor, ids: list[int], length: int, context: int) -> float:
    """In float64, from full logits: each token by the first of the overlapping windows that reaches it."""
    tokens = torch.tensor([[0, *ids]])  # END_OF_TEXT is the trainer's first id
    body, weight = copy.deepcopy(body).double(), weight.double()
    nats: dict[int, float] = {}
    for start in range(0, len(ids), length + 1 - context):
        targets = tokens[0, start + 1 : start + 1 + length]
        logits = body(tokens[:, start : start + len(targets)])[0] @ weight.t()
        for position, value in enumerate(F.cross_entropy(logits, targets, reduction="none").tolist(), start):
            nats.setdefault(position, value)
    return math.fsum(nats.values()) / len(ids)


@UNTIMED
@given(st.data(), st.integers(2, 80), st.integers(1, 12), st.integers(1, 4))
def test_every_token_is_scored_once(data: st.DataObject, num_tokens: int, length: int, batch_size: int) -> None:
    """A failure is a token that is left out, counted twice, predicted from too little, or held too early."""
    context = data.draw(st.integers(1, length), label="context")
    num_read = 0

    def stream() -> Iterator[int]:
        nonlocal num_read
        for num_read in range(1, num_tokens + 1):
            yield num_read - 1

    scored = []
    for windows in cut_windows(stream(), length, context, batch_size):
        assert windows.tokens.shape[0] <= batch_size
        assert windows.tokens.shape[1] <= length + 1
        for window in windows.tokens.tolist():
            assert window == list(range(window[0], window[-1] + 1))
            first_scored = window[-windows.num_scored]
            assert first_scored - window[0] >= min(context, first_scored)
            scored += window[-windows.num_scored :]
        assert num_read - (1 + len(scored)) < length + 1 - context
    assert scored == list(range(1, num_tokens))


# What a pre-tokenizer may treat specially, several of them white space to some and not to others.
SNIPPETS = st.sampled_from(
    [*" \t\n\r\x0b\x1c\x85\u00a0\u2028\u3000a'9é例+", "  ", "\n\n", "\r\n", "word", "'s", "+\x1c", text.END_OF_TEXT]
)


@UNTIMED
@given(st.lists(SNIPPETS).map("".join), st.integers(1, 9))
def test_pieces_have_the_tokens_of_the_whole(tokenizer: Tokenizer, document: str, piece_size: int) -> None:
    pieces = list(text.read_tokens(io.StringIO(document, newline=""), tokenizer, piece_size))
    assert pieces == tokenizer.encode(document).ids


@pytest.mark.parametrize("piece_size", [1, 7, 100, 10**6])
def test_pieces_of_real_text(tokenizer: Tokenizer, piece_size: int) -> None:
    pieces = list(text.read_tokens(io.StringIO(TEXT, newline=""), tokenizer, piece_size))
    assert pieces == tokenizer.encode(TEXT).ids


def test_text_without_spaces_is_searched_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it is held, but time that grows with the square of its length is another matter."""
    pattern = Mock(wraps=text._LAST_END_OF_A_WORD)
    monkeypatch.setattr(text, "_LAST_END_OF_A_WORD", pattern)
    document = "x" * 1000 + " y"
    pieces = list(text.read_tokens(io.StringIO(document), tokenizer, piece_size=10))
    assert pieces == tokenizer.encode(document).ids
    assert max(len(call.args[0]) for call in pattern.match.call_args_list) == 11


def test_tokens_are_read_as_they_are_needed(tokenizer: Tokenizer) -> None:
    document = io.StringIO(TEXT, newline="")
    next(text.read_tokens(document, tokenizer, piece_size=100))
    assert document.tell() == 100


def tiny_model(tokenizer: Tokenizer, group: ProcessGroup | None = None, vocab_size: int | None = None) -> LanguageModel:
    """With as many classes as the tokenizer has tokens, or more."""
    torch.manual_seed(0)
    vocab_size = vocab_size or tokenizer.get_vocab_size()
    body = GPT(vocab_size, hidden_size=16, num_layers=1, num_heads=2, max_length=12)
    return LanguageModel(tokenizer, body, VocabParallelLinearCrossEntropy(16, vocab_size, group=group))


def evaluate_quietly(
    model: LanguageModel, document: Path, context: int, token_losses: TokenLosses | None = None
) -> Evaluation:
    token_losses = token_losses or partial(perplexity.sharded_losses, model.head)
    with Progress(console=Console(quiet=True)) as progress:
        return evaluate(model, "", token_losses, document, context, progress)


CASES = [
    (2, 5),  # characters of the document, context; here less than a window
    (60, 1),
    (60, 12),
    (1000, 5),  # more than a batch, and a tail
]


def evaluations_on_rank(group: ProcessGroup, tokenizer: str, documents: list[Path]) -> tuple[list[Evaluation], Tensor]:
    model = tiny_model(Tokenizer.from_str(tokenizer), group)
    evaluations = [
        evaluate_quietly(model, document, context) for document, (_, context) in zip(documents, CASES, strict=True)
    ]
    return evaluations, perplexity.gather_weight(model.head)


@pytest.mark.parametrize("world_size", [1, 2])
def test_against_full_logits(tokenizer: Tokenizer, tmp_path: Path, world_size: int) -> None:
    documents = [tmp_path / f"{num_characters}-{context}.txt" for num_characters, context in CASES]
    contents = [TEXT[-num_characters:] for num_characters, _ in CASES]
    for document, content in zip(documents, contents, strict=True):
        document.write_text(content, encoding="utf-8", newline="")
    model = tiny_model(tokenizer)
    by_rank = run_on_ranks(evaluations_on_rank, world_size, tokenizer.to_str(), documents)
    for evaluations, weight in by_rank:
        assert torch.equal(weight, model.head.weight), "the gathered matrix is not that of one rank"
        for evaluation, content, (_, context) in zip(evaluations, contents, CASES, strict=True):
            ids = tokenizer.encode(content).ids
            assert evaluation.num_tokens == len(ids)
            assert evaluation.num_bytes == len(content.encode())
            expected = naive_nats_per_token(model.body, weight, ids, 12, context)
            assert evaluation.nats_per_token == pytest.approx(expected, abs=ROUNDING)
            assert evaluation.perplexity == pytest.approx(math.exp(expected), rel=ROUNDING)
            bits = expected * len(ids) / math.log(2)
            assert evaluation.bits_per_byte == pytest.approx(bits / len(content.encode()), rel=ROUNDING)
    assert len({tuple(e.nats for e in evaluations) for evaluations, _ in by_rank}) == 1, "ranks differ"


def test_memory_does_not_grow(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A failure means that hidden states or losses of all the document are kept, or logits of all the vocabulary."""
    document = tmp_path / "document.txt"
    peaks = []
    for copies, vocab_size in ((1, 2048), (2, 2048), (2, 20480)):
        model = tiny_model(tokenizer, vocab_size=vocab_size)
        document.write_text(copies * TEXT[:2000], encoding="utf-8", newline="")
        with PeakBytes() as peak:
            evaluation = evaluate_quietly(model, document, context=6)
        peaks.append((peak.bytes, evaluation.peak_bytes))
    assert len(set(peaks)) == 1


def test_the_peak_is_that_of_the_largest_batch(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of full logits, where it is known: the first batch is a single window, so less than any other."""
    document = tmp_path / "document.txt"
    document.write_text(TEXT[:2000], encoding="utf-8", newline="")
    model = tiny_model(tokenizer)
    weight = perplexity.gather_weight(model.head)
    evaluation = evaluate_quietly(model, document, 6, partial(perplexity.full_losses, weight))
    logits_bytes = perplexity.WINDOWS_PER_BATCH * (12 + 1 - 6) * len(weight) * 4
    assert 2 * logits_bytes <= evaluation.peak_bytes < 2.1 * logits_bytes  # and their log-softmax


class Script(NamedTuple):
    run: subprocess.CompletedProcess[str]
    checkpoint: Path
    document: Path


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    """The script on two ranks, which trains a model and saves it."""
    folder = tmp_path_factory.mktemp("perplexity")
    checkpoint, document = folder / "folder" / "model.pt", folder / "document.txt"
    document.write_text(TEXT[:1200], encoding="utf-8", newline="")
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"),
            *(ROOT / "launch" / "perplexity.py", "--check", "--steps=3", f"--vocab-size={VOCAB_SIZE}"),
            *(f"--document={document}", f"--checkpoint={checkpoint}"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return Script(run, checkpoint, document)


def table_of(output: str) -> dict[str, list[str]]:
    rows = ([cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines())
    return {cells[0]: cells[1:] for cells in rows if len(cells) > 1}


def number(cell: str, unit: str) -> float:
    assert cell.endswith(" " + unit)
    return float(cell.removesuffix(unit).replace(",", ""))


def test_runs_on_ranks(script: Script) -> None:
    assert script.run.returncode == 0, script.run.stdout + script.run.stderr
    rows = table_of(script.run.stdout)
    saved = torch.load(script.checkpoint, map_location="cpu")
    tokenizer = Tokenizer.from_str(saved["tokenizer"])
    ids = tokenizer.encode(TEXT[:1200]).ids
    assert len(ids) > LENGTH  # more than one window
    assert rows["document"] == 2 * [f"{len(TEXT[:1200].encode()):,} bytes"]
    assert rows["scored, once each"] == 2 * [f"{len(ids):,} tokens"]
    body = new_body(VOCAB_SIZE)
    body.load_state_dict(saved["body"])
    expected = naive_nats_per_token(body, saved["head"]["weight"], ids, LENGTH, LENGTH // 2)
    for cell in rows["mean loss"]:
        assert number(cell, "nats/token") == pytest.approx(expected, abs=TOLERANCE)
    for cell in rows["perplexity"]:
        assert number(cell, "per token") == pytest.approx(math.exp(expected), abs=0.02)
    bits = expected * len(ids) / math.log(2) / len(TEXT[:1200].encode())
    for cell in rows["information"]:
        assert number(cell, "bits/byte") == pytest.approx(bits, abs=2e-4)
    assert all(number(cell, "tokens/s") > 0 for cell in rows["speed"])
    full, sharded = (number(cell, "MiB") for cell in rows["peak memory of head"])
    assert sharded < full
    assert number(rows["difference"][1], "nats/token") <= TOLERANCE


def test_a_checkpoint_serves_any_number_of_ranks(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    """One rank loads what two have saved. Other arguments for training show whether it trains instead."""
    perplexity.main(
        [f"--document={script.document}", f"--checkpoint={script.checkpoint}", "--vocab-size=300", "--seed=1"]
    )
    alone, together = table_of(capsys.readouterr().out), table_of(script.run.stdout)
    assert number(alone["mean loss"][0], "nats/token") == pytest.approx(
        number(together["mean loss"][1], "nats/token"), abs=ROUNDING
    )


def test_fails_if_the_sharded_head_is_wrong(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = perplexity.linear_cross_entropy
    monkeypatch.setattr(perplexity, "linear_cross_entropy", lambda *args, **kwargs: right(*args, **kwargs) + 3e-5)
    with pytest.raises(SystemExit, match=r"The mean losses part: by [23]\.\de-05 nats per token"):
        perplexity.main([f"--document={script.document}", f"--checkpoint={script.checkpoint}", "--check"])
    assert "difference" in table_of(capsys.readouterr().out)


@pytest.mark.parametrize(("nats", "full_nats"), [(math.nan, 6.0), (6.0, math.nan), (6.0, 6.0 + 2 * TOLERANCE)])
def test_verdict(nats: float, full_nats: float) -> None:
    sharded, full = (Evaluation("", 1, 1, value, seconds=1.0, peak_bytes=0) for value in (nats, full_nats))
    with pytest.raises(SystemExit):
        perplexity.report("", sharded, full, Console(quiet=True))


def test_the_document_is_held_out_of_the_training_text() -> None:
    everything, training = text._read_sources(None), text._read_sources(HELD_OUT)
    document = HELD_OUT.read_text(encoding="utf-8")
    assert document not in training
    assert sorted([*training, document]) == sorted(everything)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--document=missing.txt"], "--document must be a file with text in it, got missing.txt"),
        (["--document=/dev/null"], "--document must be a file with text in it, got /dev/null"),
        (["--context=0"], f"--context must be 1 to {LENGTH}"),
        ([f"--context={LENGTH + 1}"], f"got {LENGTH + 1}"),
        (["--steps=1"], "--steps must be at least 2"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        perplexity.main(arguments)
    assert message in capsys.readouterr().err


def looked_for_the_checkpoint(group: ProcessGroup, folder: Path) -> None:
    context = Context(group.rank(), group.size(), group.rank(), torch.device("cpu"), group)
    mine = folder / f"{group.rank()}.pt"
    assert not perplexity.is_on_all_ranks(mine, context)
    if group.rank() != 1:
        mine.touch()
    with pytest.raises(ValueError, match=r"--checkpoint must be there .* missing on ranks \[1\]"):
        perplexity.is_on_all_ranks(mine, context)
    mine.touch()
    assert perplexity.is_on_all_ranks(mine, context)


def test_a_checkpoint_that_some_ranks_do_not_have(tmp_path: Path) -> None:
    """Machines without a shared folder: those that load must not wait for those that train."""
    run_on_ranks(looked_for_the_checkpoint, 3, tmp_path)


def test_a_document_of_another_encoding(script: Script, tmp_path: Path) -> None:
    document = tmp_path / "latin1.txt"
    document.write_bytes("äöü".encode("latin-1"))
    with pytest.raises(ValueError, match=r"--document must be a UTF-8 text, got .*latin1\.txt"):
        perplexity.main([f"--document={document}", f"--checkpoint={script.checkpoint}"])


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=r"--checkpoint must be a file that this script saved.*got one of \['weight'\]"
    ):
        perplexity.main([f"--checkpoint={tmp_path / 'model.pt'}"])
