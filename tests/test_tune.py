"""The table of tiles, and launch/tune.py, which finds and records its entries."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tune
from tune_choice import NOISE, Device, Timing, candidates, choose

from vocab_parallel_fused.kernels import configs
from vocab_parallel_fused.kernels.configs import (
    TILES_PATH,
    TileConfig,
    TokenRange,
    read_tiles,
    tile_config,
    tile_problem,
)

# Most shared memory per block: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (for
# "cuda" that of 8.6, 8.9 and 12.0); the local data share of AMD's CDNA 3 instruction set.
SHARED_MEMORY_BYTES = {
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "cuda": 99 * 1024,
    "hip": 64 * 1024,
    "interpreter": None,
}
DEVICES = [Device("sm_90", 227 * 1024, 32), Device("sm_89", 99 * 1024, 32), Device("gfx942", 64 * 1024, 64)]
TILE = TileConfig(block_t=64, block_v=128, block_h=32, group_t=16, num_warps=4, num_stages=3)
WIDE = TileConfig(block_t=64, block_v=256, block_h=32, group_t=16, num_warps=4, num_stages=2)
TALL = TileConfig(block_t=128, block_v=128, block_h=32, group_t=16, num_warps=8, num_stages=2)
RANGES = [TokenRange(16, TILE), TokenRange(64, WIDE), TokenRange(None, TALL)]


def plain_table() -> dict[str, Any]:
    """As JSON holds it: every backend with the same ranges."""
    ranges = [{"most_tokens": most_tokens, **dataclasses.asdict(tile)} for most_tokens, tile in RANGES]
    entry = {"shared_memory_bytes": 99 * 1024, "tiles_by_itemsize": {"2": ranges, "4": ranges}}
    return json.loads(json.dumps(dict.fromkeys(("cuda", "hip", "interpreter"), entry)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A table to write to."""
    path = tmp_path / "tiles.json"
    path.write_text(tune.to_text(plain_table()))
    return path


@pytest.mark.parametrize("arch", read_tiles(TILES_PATH))
def test_recorded_tiles_are_legal(arch: str) -> None:
    """A tile that needs more memory than there is fails at every launch; a gap leaves some tokens without a tile."""
    entry = read_tiles(TILES_PATH)[arch]
    limit = SHARED_MEMORY_BYTES.get(arch, entry.shared_memory_bytes)
    assert entry.shared_memory_bytes == limit
    for itemsize, ranges in entry.tiles_by_itemsize.items():
        for _, tile in ranges:
            assert limit is None or tile.num_stages * (tile.block_t + tile.block_v) * tile.block_h * itemsize <= limit
            for size in (tile.block_t, tile.block_v, tile.block_h):
                assert size in {16, 32, 64, 128, 256}
            assert tile.num_warps in {1, 2, 4, 8, 16}
        *bounds, last = [most_tokens for most_tokens, _ in ranges]
        assert last is None
        assert bounds == sorted({bound for bound in bounds if bound is not None and bound > 0})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950", "interpreter"])
def test_every_architecture_has_tiles(arch: str, dtype: torch.dtype) -> None:
    for num_tokens in (0, 1, 16, 17, 64, 65, 10**6):
        assert isinstance(tile_config(arch, dtype, num_tokens), TileConfig)


def test_look_up(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """A tile of another architecture, dtype or number of tokens is slow, or needs more memory than there is."""
    other = dataclasses.replace(TILE, group_t=1)
    tune.record(path, DEVICES[0], {4: [TokenRange(None, other)]})
    monkeypatch.setattr(configs, "_TABLE", read_tiles(path))
    expected = {0: TILE, 1: TILE, 16: TILE, 17: WIDE, 64: WIDE, 65: TALL, 10**9: TALL}
    for arch in ("sm_80", "gfx942", "interpreter"):
        assert {T: tile_config(arch, torch.float32, T) for T in expected} == expected
    assert {tile_config("sm_90", torch.float32, T) for T in expected} == {other}
    # An entry of one dtype only: the backend has the other.
    assert {T: tile_config("sm_90", torch.float16, T) for T in expected} == expected


def ranges_of(table: dict[str, Any]) -> list[dict[str, Any]]:
    return table["hip"]["tiles_by_itemsize"]["2"]


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda table: table.pop("cuda"), "cuda must have tiles for 2 bytes per element"),
        (lambda table: table["cuda"]["tiles_by_itemsize"].pop("4"), "cuda must have tiles for 4 bytes per element"),
        (lambda table: table["hip"]["tiles_by_itemsize"].update({"8": []}), r"hip: tiles_by_itemsize must be .*'8'"),
        (lambda table: table["hip"].update(tiles_by_itemsize=[]), r"hip: tiles_by_itemsize must be .* got \[\]"),
        (lambda table: table["hip"].pop("shared_memory_bytes"), "hip: must be an object of shared_memory_bytes, "),
        (lambda table: table["hip"].update(shared_memory_bytes="64k"), "hip: shared_memory_bytes must be .* got '64k'"),
        (lambda table: table["hip"].update(shared_memory_bytes=0), "hip: shared_memory_bytes must be .* got 0"),
        (lambda table: ranges_of(table).clear(), r"hip, 2 bytes: must be a list of tiles, got \[\]"),
        (lambda table: ranges_of(table).insert(1, 3), "hip, 2 bytes, entry 2: must be an object .* got 3"),  # pyright: ignore[reportArgumentType]
        (
            lambda table: ranges_of(table)[1].pop("num_stages"),
            "hip, 2 bytes, entry 2: must be an object of most_tokens",
        ),
        (lambda table: ranges_of(table)[1].update(speed=1), "hip, 2 bytes, entry 2: must be an object of most_tokens"),
        (lambda table: ranges_of(table)[0].update(block_t=48), "entry 1: block_t must be a power of two, got 48"),
        (lambda table: ranges_of(table)[0].update(num_warps=3), "entry 1: num_warps must be a power of two, got 3"),
        (lambda table: ranges_of(table)[0].update(block_h=8), "entry 1: block_h must be at least 16, got 8"),
        (lambda table: ranges_of(table)[0].update(group_t=0), "entry 1: group_t must be a positive int, got 0"),
        (lambda table: ranges_of(table)[0].update(block_v=128.0), "entry 1: block_v must be a positive int, got 128.0"),
        (lambda table: ranges_of(table)[0].update(num_stages=True), "entry 1: num_stages must be a positive int"),
        (lambda table: ranges_of(table)[0].update(num_stages=9), "entry 1: num_stages must fit 101376 bytes .* 110592"),
        (
            lambda table: ranges_of(table)[1].update(most_tokens=16),
            "entry 2: most_tokens must be an int above 16, got 16",
        ),
        (lambda table: ranges_of(table)[0].update(most_tokens=None), "entry 1: most_tokens must be an int above 0"),
        (lambda table: ranges_of(table)[2].update(most_tokens=99), "entry 3: most_tokens must be null in the last"),
    ],
)
def test_malformed_tables(spoil: Callable[[dict[str, Any]], object], problem: str, path: Path) -> None:
    """A slip of the hand that nothing reports is a kernel that fails, or is slow, on a machine we do not have."""
    read_tiles(path)
    table = plain_table()
    spoil(table)
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=rf"tiles\.json: .*{problem}"):
        read_tiles(path)


@pytest.mark.parametrize(("text", "problem"), [("{", "Expecting"), ("[]", "must hold an object, got \\[\\]")])
def test_files_that_are_no_table(text: str, problem: str, path: Path) -> None:
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"tiles\.json: {problem}"):
        read_tiles(path)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 64, 65, 128, 1024, 8192])
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.arch)
def test_candidates(device: Device, num_tokens: int, itemsize: int) -> None:
    """A tile that is fast alone, but of which two do not fit the registers, would slow distillation down many times."""
    pytest.importorskip("triton")
    from vocab_parallel_fused.kernels.divergence import narrowed

    tiles = candidates(num_tokens, itemsize, device)
    assert 10 <= len(tiles) <= 64
    assert len(set(tiles)) == len(tiles)
    for tile in tiles:
        assert tile.block_t < 2 * max(num_tokens, 64)
        for of_heads, heads in ((tile, 1), (narrowed(tile), 2)):
            assert tile_problem(of_heads, itemsize, device.shared_memory_bytes) is None
            # An NVIDIA thread has 255 registers, an AMD thread 512.
            assert heads * of_heads.block_t * of_heads.block_v <= 128 * tile.num_warps * device.warp_size
    smallest = min(tile.block_t for tile in tiles)
    assert smallest == 64 or num_tokens <= smallest < 2 * max(num_tokens, 16)


def test_the_fastest_tiles_are_chosen_and_neighbours_merged() -> None:
    timings = {
        1024: {TILE: Timing(4.0, 5.0), TALL: Timing(3.0, 3.0)},
        1: {TILE: Timing(1.0, 1.0), WIDE: Timing(2.0, 2.0)},
        # The sum counts, not one of the two.
        16: {TILE: Timing(1.0, 1.2), WIDE: Timing(0.9, 1.9)},
        64: {TILE: Timing(2.0, 2.0), WIDE: Timing(2.0, 1.0)},
        8192: {TALL: Timing(30.0, 30.0), WIDE: Timing(40.0, 40.0)},
    }
    assert choose(timings) == RANGES
    assert choose({64: timings[64]}) == [TokenRange(None, WIDE)]


def test_differences_within_noise_make_no_range() -> None:
    """Every run of the tuner would record other ranges."""
    fast, hardly_slower, slower = Timing(1.0, 1.0), Timing(1.0, NOISE), Timing(NOISE, 1.001 * NOISE)
    assert choose({16: {TILE: fast}, 64: {TILE: hardly_slower, WIDE: fast}}) == [TokenRange(None, TILE)]
    assert choose({16: {TILE: fast}, 64: {TILE: slower, WIDE: fast}}) == [TokenRange(16, TILE), TokenRange(None, WIDE)]


def test_the_recorded_table_is_formatted_as_the_tuner_writes_it() -> None:
    """Else the first entry that it writes would change all others."""
    text = TILES_PATH.read_text()
    assert tune.to_text(json.loads(text)) == text


@pytest.mark.parametrize("arch", ["sm_89", "gfx950", "zz"])
def test_a_new_entry_leaves_the_others_as_they_are(arch: str, path: Path) -> None:
    path.write_bytes(TILES_PATH.read_bytes())
    before = path.read_text().splitlines()
    tune.record(path, Device(arch, 99 * 1024, 32), {2: RANGES, 4: [TokenRange(None, TILE)]})
    after = path.read_text().splitlines()
    start = after.index(f'  "{arch}": {{')
    stop = start + next(i for i, line in enumerate(after[start:]) if line.startswith("  }")) + 1
    rest = after[:start] + after[stop:]
    # A comma separates the last entry from one after it.
    assert [line.rstrip(",") for line in rest] == [line.rstrip(",") for line in before]
    assert list(read_tiles(path)) == sorted(read_tiles(path))
    entry = read_tiles(path)[arch]
    assert entry.shared_memory_bytes == 99 * 1024
    assert entry.tiles_by_itemsize == {2: tuple(RANGES), 4: (TokenRange(None, TILE),)}


def test_an_entry_is_replaced_for_the_dtypes_that_were_tuned(path: Path) -> None:
    tune.record(path, DEVICES[0], {2: RANGES, 4: RANGES})
    both = path.read_bytes()
    tune.record(path, DEVICES[0], {4: RANGES[2:]})
    assert read_tiles(path)["sm_90"].tiles_by_itemsize == {2: tuple(RANGES), 4: (RANGES[2],)}
    tune.record(path, DEVICES[0], {4: RANGES})
    assert path.read_bytes() == both


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_needs_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--tokens", "16"])
    assert "needs a CUDA or ROCm device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--tokens", "0"], "must be at least 1, got 0"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
        (["--write", "no/such/file"], "No such file"),
    ],
)
def test_bad_arguments(
    arguments: list[str], problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake that shows only after the tuning costs it all."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="2"):
        tune.main(arguments)
    assert problem in capsys.readouterr().err


def test_what_is_timed_is_the_op(device: torch.device) -> None:
    """Kernels that are given other arguments than in the op could be timed for something else than it does."""
    tune_timing = pytest.importorskip("tune_timing")
    tile = TileConfig(block_t=16, block_v=32, block_h=16, group_t=2, num_warps=4, num_stages=1)
    weight = torch.randn(100, 48, device=device)
    problem = tune_timing.make_problem(20, weight)
    stats, dlogits = tune_timing.launches(problem, tile)
    stats.run()
    dlogits.run()
    z = problem.head.hidden.double() @ weight.double().t()
    maximum, sum_exp = problem.partial_max[:4].double(), problem.partial_sum_exp[:4].double()
    # fp32 sums of 48 products of numbers near 1
    torch.testing.assert_close(maximum.amax(0), z.amax(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((maximum + sum_exp.log()).logsumexp(0), z.logsumexp(1), rtol=1e-5, atol=1e-5)
    expected = (z - problem.max_logit[:, None].double()).exp() * problem.level[:, None]
    torch.testing.assert_close(problem.dlogits.double(), expected, rtol=1e-4, atol=1e-9)


def test_tiles_far_from_the_fastest_are_not_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a tile that fails the end of the tuning; and without the recorded tile nothing says what is gained."""
    tune_timing = pytest.importorskip("tune_timing")
    milliseconds = {16: 1.0, 32: 1.2, 64: 2.0, 128: 9.0}  # by block_v; wider tiles fail
    tiles = [dataclasses.replace(TILE, block_v=block_v) for block_v in (16, 32, 64, 128, 256)]
    recorded = tiles[3]
    calls = []

    def captured(run: Callable[[], object]) -> int | None:
        """In place of a graph, block_v; of torch's product, None."""
        launch = getattr(run, "__self__", None)
        if launch is None:
            return None
        if launch.arguments["BLOCK_V"] not in milliseconds:
            raise RuntimeError("out of resource: shared memory\nand so on")
        return launch.arguments["BLOCK_V"]

    def fabricated_ms(methods: dict[int, int | None], rounds: int) -> dict[int, float]:
        calls.append((list(methods.values()), rounds))
        return {key: 0.5 if method is None else milliseconds[method] for key, method in methods.items()}

    monkeypatch.setattr(tune_timing, "captured", captured)
    monkeypatch.setattr(tune_timing, "interleaved_ms", fabricated_ms)
    monkeypatch.setattr(tune_timing.forward, "_target_logits", lambda *_: None)
    problem = tune_timing.make_problem(4, torch.randn(8, 16))
    measured = tune_timing.time_tiles(problem, tiles, recorded, rounds=7)
    assert calls[-1] == ([None, 16, 16, 32, 32, 128, 128], 7)
    assert measured.timings == {tile: Timing(*2 * [milliseconds[tile.block_v]]) for tile in (*tiles[:2], recorded)}
    assert measured.failures == {tiles[4]: "RuntimeError: out of resource: shared memory"}
    assert measured.product_ms == 0.5
    assert tune.report(measured, tiles[0])[1:] == ["1.000", "1.000", "0.111", "2.000"]
    with pytest.raises(RuntimeError, match=r"no tile runs with 4 tokens: .*out of resource"):
        tune_timing.time_tiles(problem, tiles[4:], tiles[4], rounds=7)


@pytest.mark.gpu
def test_on_a_device(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_bytes(TILES_PATH.read_bytes())
    sizes = ["--tokens", "16", "256", "--hidden-size", "256", "--classes", "1024", "--rounds", "3"]
    tune.main(["--dtype", "bfloat16", *sizes, "--write", str(path)])
    assert f"Recorded in {path}" in capsys.readouterr().out
    tune_timing = pytest.importorskip("tune_timing")
    assert 2 in read_tiles(path)[tune_timing.current_device().arch].tiles_by_itemsize
