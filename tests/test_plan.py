"""Groups and blocks of the backward: which sizes the plan takes, and where it lays sums."""

from itertools import product

import pytest

from vocab_parallel_fused.kernels.plan import Group, Walk, plan_groups

MIB = 2**20


def plan(
    T: int, H: int, V: int, *, main_grad: bool, workspace_bytes: int = 128 * MIB, first_token: int = 0
) -> tuple[Group, ...]:
    """Of bf16 gradients on 132 processors, as for an H200."""
    return plan_groups(
        Walk(
            T=T,
            H=H,
            V=V,
            bytes_per_logit=2,
            dhidden_sum_bytes=4,
            dweight_sum_bytes=0 if main_grad else 4,
            dhidden_takes_product=V % 8 == 0,
            dweight_takes_product=not main_grad,
            several_groups=main_grad,
            workspace_bytes=workspace_bytes,
            tile=(128, 256),
            largest=(T, V),
            processors=132,
            first_token=first_token,
        )
    )


def num_tokens(group: Group) -> int:
    return group.tokens.stop - group.tokens.start


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("V", [1000, 16032, 16033, 128256])
def test_blocks_fit_the_workspace(main_grad: bool, V: int) -> None:
    """With an fp32 main_grad a sum of dhidden that lies elsewhere than there is in it too, so that memory stops growing
    with tokens."""
    for T, H in product((1, 1000, 8192, 131072), (2304, 8192)):
        for group in plan(T, H, V, main_grad=main_grad):
            needed = 2 * min(group.block_t, T) * group.block_v
            takes_product = group.block_v >= V and V % 8 == 0
            if main_grad and group.lent is None and not takes_product:
                needed += 4 * H * num_tokens(group)
            if not main_grad and group.block_t < T:
                needed += 4 * H * min(group.block_v, V)
            assert needed <= 128 * MIB, (T, H, V, group)
            assert group.block_t % 128 == group.block_v % 256 == 0
            assert group.block_t < num_tokens(group) + 128


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(("T", "H", "V"), [(8192, 4096, 16032), (8192, 8192, 16032), (4096, 8192, 32064)])
def test_no_rank_has_more_groups(T: int, H: int, V: int, ranks: int) -> None:
    """Each begins with tokens of its own, and all wait for the slowest: none may be left with a fragment at the end."""
    plans = [plan(T, H, V, main_grad=True, first_token=rank * T // ranks) for rank in range(ranks)]
    assert {len(groups) for groups in plans} == {2}


@pytest.mark.parametrize("first_token", [0, 1000, 4096, 7000, 16383])
@pytest.mark.parametrize(("T", "V"), [(16384, 38016), (8191, 16033), (16384, 3000), (131072, 128256), (100, 500)])
def test_sums_lie_over_rows_that_nobody_has_written(T: int, V: int, first_token: int) -> None:
    """Those of later groups, or the group's own, if it begins where they do: then it is rounded from there upwards."""
    groups = plan(T, 4096, V, main_grad=True, first_token=first_token)
    written: set[int] = set()
    for group in groups:
        own = range(group.tokens.start, group.tokens.stop)
        if group.lent is not None:
            lent = range(group.lent.start, group.lent.stop)
            assert 0 <= lent.start < lent.stop <= T
            assert len(lent) == 2 * len(own)
            assert written.isdisjoint(lent)
            assert lent.start == own.start or not set(own) & set(lent)
        assert written.isdisjoint(own)
        written.update(own)
    assert written == set(range(T))
    assert groups[0].tokens.start <= min(first_token, T - 1) < groups[0].tokens.stop


def test_groups_that_lend_are_larger() -> None:
    """All of the workspace is theirs for blocks: the traffic of main_grad is that of 3 groups, and not of 4 of 4096."""
    groups = plan(16384, 3584, 38016, main_grad=True)
    assert [(num_tokens(group), group.lent is not None) for group in groups] == [
        (8192, True),
        (4096, True),
        (4096, False),
    ]
    assert len(plan(131072, 4096, 128256, main_grad=True)) == 17


def test_many_tokens_are_taken_in_blocks() -> None:
    """Blocks of all 65536 have 1024 rows, so that dhidden's sum would be read and written 125 times."""
    (group,) = plan(65536, 4096, 128256, main_grad=False)
    assert group[1:3] == (8192, 4096)
    (group,) = plan(16384, 4096, 128256, main_grad=False)
    assert group.block_t == 16384


def test_blocks_fill_waves() -> None:
    """22 tiles of rows are 10.7 waves for 64 blocks of tokens, 31 tiles 15.03: the plan must not leave a wave empty."""
    for T, V in ((8192, 256000), (16384, 38016), (4096, 128256)):
        (group,) = plan(T, 2304, V, main_grad=False)
        tiles = -(-group.block_t // 128) * (group.block_v // 256)
        assert tiles / 132 / -(-tiles // 132) > 0.95, (T, V, group)


def test_products_fill_waves() -> None:
    """At H = 3584 a product for 4096 rows of dweight is 3.4 waves of tiles, or 4.6 of narrower ones, one for 3584 rows
    2.97. At H = 2304 one for 8192 rows is 4.4 or 5.8: nothing to gain."""
    assert plan(16384, 3584, 38016, main_grad=False)[0].block_v == 3584
    assert plan(8192, 2304, 256000, main_grad=False)[0].block_v == 8192


@pytest.mark.parametrize("main_grad", [False, True])
def test_a_workspace_too_small_for_anything(main_grad: bool) -> None:
    """A tile at a time, and the smallest sums where there may be groups."""
    groups = plan(100_000, 4096, 5000, main_grad=main_grad, workspace_bytes=1)
    assert {group[1:3] for group in groups} == {(128, 256)}
    assert max(num_tokens(group) for group in groups if group.lent is None) < (256 if main_grad else 100_001)
