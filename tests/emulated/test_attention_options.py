"""What attention takes besides q, k and v, by the kernels for compute capability 8.0 run on the CPU: bias, table of
relative positions, key mask, packed sequences, dropout, against the reference and its gradients."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit import ops, reference
from fastvit.attention_options import NO_OPTIONS, TENSORS, AttentionOptions
from fastvit.cuda import extension
from fastvit.cuda.attention import attention_backward, attention_forward
from head_dims import HEAD_DIMS
from numerics import assert_as_right_as_eager, assert_same_bits_twice, check_op, leaves_of

pytestmark = pytest.mark.usefixtures("_eager_in_its_own_dtype")

HALF = (torch.float16, torch.bfloat16)
SEED = torch.tensor([0x1234567_89ABCDEF])


def attention(**args: Any) -> tuple[Tensor, Tensor]:
    with fastvit.backend("cuda"):
        return ops.attention(**args, return_lse=True)  # type: ignore[return-value]


def expected(**args: Any) -> tuple[Tensor, Tensor]:
    return reference.attention(**args, return_lse=True)  # type: ignore[return-value]


def check(args: dict[str, Any]) -> None:
    """Output, log-sum-exp and all gradients."""
    check_op(attention, expected, args)


def make(
    queries: int, keys: int, dim: int = 32, dtype: torch.dtype = torch.float16, batch: int = 2, heads: int = 2
) -> dict[str, Any]:
    shapes = {"q": (batch, queries, heads, dim), "k": (batch, keys, heads, dim), "v": (batch, keys, heads, dim)}
    return {name: torch.randn(shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


def random_mask(batch: int, keys: int) -> Tensor:
    """About a third of the keys are not there; every image has its second."""
    mask = torch.rand(batch, keys) < 0.7
    mask[:, min(1, keys - 1)] = True
    return mask


def table_of(window: tuple[int, int], heads: int = 2, own: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """own: entries of the class token, 3 or 0."""
    rows = (2 * window[0] - 1) * (2 * window[1] - 1) + own
    return torch.randn(rows, heads).to(dtype).requires_grad_()


def packed(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


# --- bias --------------------------------------------------------------------------------------------------------

# Of images, heads, queries and keys: full or broadcast.
SHAPES = [(f >> 3 & 1, f >> 2 & 1, f >> 1 & 1, f & 1) for f in range(16)]


@pytest.mark.parametrize("full", SHAPES)
def test_bias_of_every_broadcast_shape(full: tuple[int, ...]) -> None:
    """Several draws, of two dtypes, together: of a gradient of one element the error is a matter of luck.

    Of a bias that all keys share it is so of more: only the log-sum-exp has a gradient in it, all else is rounding.
    """
    runs: list[list[list[Tensor]]] = [[], [], []]
    for draw in range(6 if full[3] else 24):
        queries, keys = (21, 70 - 11 * draw) if full[3] else (9, 12 + draw)
        args = make(queries, keys, heads=3, dtype=HALF[draw % 2])
        shape = [size if own else 1 for own, size in zip(full, (2, 3, queries, keys), strict=True)]
        args["bias"] = torch.randn(shape).requires_grad_()
        upstream = torch.randn(2, queries, 3, 32), torch.randn(2, 3, queries)
        for run, (fn, dtype) in zip(
            runs, ((attention, None), (expected, None), (expected, torch.float64)), strict=True
        ):
            leaves = leaves_of(args, dtype)
            outputs = fn(**leaves)
            gradients = torch.autograd.grad(
                outputs, list(leaves.values()), [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
            )
            run.append([*(o.detach() for o in outputs), *gradients])
    names = ("out", "lse", "dq", "dk", "dv", "dbias")
    joined = [[torch.cat([x.flatten().double() for x in one]) for one in zip(*run, strict=True)] for run in runs]
    assert_as_right_as_eager(*joined, names=names)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_bias_of_every_head_dim(dim: int, dtype: torch.dtype) -> None:
    args = make(19, 91, dim, dtype, batch=1)
    check(args | {"bias": torch.randn(1, 2, 19, 91, dtype=dtype).requires_grad_()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bias_of_any_dtype_and_strides(dtype: torch.dtype) -> None:
    bias = torch.randn(33, 40, 2, 3, dtype=dtype).permute(3, 2, 0, 1)[:2]  # no dimension is contiguous
    check(make(33, 40, dtype=torch.bfloat16) | {"bias": bias.requires_grad_()})


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 130), (65, 17), (129, 64), (16, 200)])
def test_bias_of_odd_tails(queries: int, keys: int) -> None:
    args = make(queries, keys, 40, heads=1, batch=1)
    check(args | {"bias": torch.randn(1, 1, queries, keys).requires_grad_()})


def test_bias_that_decides() -> None:
    """Of hundreds, where scores in other units or 16 bits would lose the digits that choose."""
    bias = 300 * torch.randn(1, 2, 30, 50)
    bias[..., 7] = 900
    check(make(30, 50) | {"bias": bias.requires_grad_(), "scale": -0.5})


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
def test_bias_that_masks(lowest: float) -> None:
    bias = torch.zeros(1, 1, 20, 70)
    bias[..., 5:60] = lowest
    args = make(20, 70)
    out, _ = attention(**args, bias=bias)
    same, _ = attention(**args, key_mask=(bias[0, 0, :1] == 0).expand(2, -1))
    assert torch.equal(out, same)


def test_a_square_of_a_large_bias_for_each_warp() -> None:
    """More squares (5 x 13 for each of two heads) than the 64 below which the warps of a block share one."""
    check(make(70, 200, heads=2) | {"bias": torch.randn(1, 2, 70, 200).requires_grad_()})


# --- table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [0, 3])
@pytest.mark.parametrize("window", [(1, 2), (1, 7), (7, 1), (3, 5), (4, 16), (2, 17), (3, 35)])
def test_tables_of_every_kind_of_window(window: tuple[int, int], own: int) -> None:
    """Lines of less than a square of 16, of one, and of several; with and without a class token."""
    tokens = window[0] * window[1] + own // 3
    check(make(tokens, tokens) | {"rel_pos_table": table_of(window, own=own), "window": window})


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("dim", [64, 72, 80, 128])
def test_tables_of_dtypes_and_head_dims(dim: int, dtype: torch.dtype) -> None:
    args = make(50, 50, dim, torch.bfloat16)
    check(args | {"rel_pos_table": table_of((7, 7), dtype=dtype), "window": (7, 7)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_table_that_shared_memory_has_no_room_for(dtype: torch.dtype) -> None:
    """Two blocks of head dim 128 do not fit the 99 KB of compute capability 8.6 as it is."""
    extension.set_architecture(86)
    try:
        check(make(50, 50, 128) | {"rel_pos_table": table_of((7, 7), dtype=dtype), "window": (7, 7)})
    finally:
        extension.set_architecture(80)


def test_197_tokens_of_beit() -> None:
    args = make(197, 197, 64, torch.bfloat16, batch=1, heads=1)
    check(args | {"rel_pos_table": table_of((14, 14), 1), "window": (14, 14)})


# --- key mask ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("queries", "keys", "dim"), [(1, 2, 32), (50, 50, 64), (37, 91, 72), (70, 200, 128)])
def test_key_mask(queries: int, keys: int, dim: int, dtype: torch.dtype) -> None:
    check(make(queries, keys, dim, dtype) | {"key_mask": random_mask(2, keys)})


def test_a_mask_with_strides() -> None:
    check(make(20, 45) | {"key_mask": random_mask(45, 4).T[::2]})


def test_mask_with_bias_and_with_table() -> None:
    bias = torch.randn(1, 2, 50, 50).requires_grad_()
    check(make(50, 50) | {"key_mask": random_mask(2, 50), "bias": bias})
    check(make(50, 50) | {"key_mask": random_mask(2, 50), "rel_pos_table": table_of((7, 7)), "window": (7, 7)})


@pytest.mark.parametrize("learned", ["bias", "table", None])
def test_rows_without_keys(learned: str | None) -> None:
    """Zeros, -inf, and no gradient; the other image as if it were alone."""
    mask = random_mask(2, 50)
    mask[0] = False
    args = make(50, 50) | {"key_mask": mask}
    wanted = [args["q"], args["k"], args["v"]]
    if learned == "bias":
        args["bias"] = torch.randn(2, 1, 50, 50).requires_grad_()
        wanted.append(args["bias"])
    elif learned == "table":
        args |= {"rel_pos_table": table_of((7, 7)), "window": (7, 7)}
        wanted.append(args["rel_pos_table"])
    out, lse = attention(**args)
    assert (out[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    gradients = torch.autograd.grad((out, lse), wanted, (torch.randn_like(out), torch.randn_like(lse)))
    assert all(g.isfinite().all() for g in gradients)
    images = gradients[:4] if learned == "bias" else gradients[:3]
    assert all((g[0] == 0).all() and (g[1] != 0).any() for g in images)


# --- packed sequences --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", [32, 72, 128])
@pytest.mark.parametrize("lengths", [(5,), (1, 66, 17), (64, 128, 3), (197, 50)])
def test_packed_sequences(lengths: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    total = sum(lengths)
    args = make(total, total, dim, dtype, batch=1)
    check(args | {"cu_seqlens": packed(lengths), "max_seqlen": max(lengths)})


def test_packed_differently() -> None:
    queries, keys = (3, 70, 1), (65, 2, 130)
    args = make(sum(queries), sum(keys), 40, batch=1)
    longest = (max(queries), max(keys) + 100)  # more than there are is allowed
    check(args | {"cu_seqlens": (packed(queries), packed(keys)), "max_seqlen": longest})


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_empty_sequences(dropout: float) -> None:
    """Of no queries, of no keys (zeros, -inf, no gradient) and of neither, among others; each as if it were alone."""
    lengths = (0, 20, 0, 7, 65, 0), (9, 0, 0, 40, 66, 5)
    args = make(sum(lengths[0]), sum(lengths[1]), batch=1)
    args |= {"cu_seqlens": tuple(map(packed, lengths)), "max_seqlen": (65, 66)}
    if dropout:
        args |= {"dropout_p": dropout, "seed": SEED}
    out, lse = attention(**args)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    gradients = torch.autograd.grad((out, lse), [args[n] for n in "qkv"], (dout, dlse))
    assert (out[:, :20] == 0).all() and (lse[:, :, :20] == -torch.inf).all() and (gradients[0][:, :20] == 0).all()
    for g in gradients[1:]:
        assert (g[:, :9] == 0).all() and (g[:, -5:] == 0).all()
    edges = [list(pairwise(c.tolist())) for c in args["cu_seqlens"]]
    for (a, b), (c, d) in zip(*edges, strict=True):
        if dropout or a == b or c == d:
            continue
        alone = [args["q"][:, a:b], args["k"][:, c:d], args["v"][:, c:d]]
        alone = [t.detach().clone().requires_grad_() for t in alone]
        one, its_lse = attention(**dict(zip("qkv", alone, strict=True)), key_mask=torch.ones(1, d - c).bool())
        its = torch.autograd.grad((one, its_lse), alone, (dout[:, a:b], dlse[:, :, a:b].contiguous()))
        assert torch.equal(one, out[:, a:b]) and torch.equal(its_lse, lse[:, :, a:b])
        for mine, part in zip(its, (gradients[0][:, a:b], gradients[1][:, c:d], gradients[2][:, c:d]), strict=True):
            assert torch.equal(mine, part)


@pytest.mark.parametrize(
    "starts", [(-50, 9, 21), (0, 9, 1000), (900, 2000, 3000), (5, -3, 21), (2**31 - 1, -(2**31), 7)]
)
def test_wrong_starts_touch_nothing_outside(starts: tuple[int, ...]) -> None:
    """On a GPU nobody looks at the values beforehand: what they name outside the tensors is left alone."""
    q, k, v, dout = torch.randn(4, 1, 21, 1, 32).half().unbind(0)
    cu = torch.tensor(starts, dtype=torch.int32)
    given = AttentionOptions(cu_q=cu, cu_k=cu, max_q=64, max_k=64)
    out, lse = attention_forward(q, k, v, 0.2, given)
    gradients = [torch.empty_like(q) for _ in range(3)]
    attention_backward(dout, None, q, k, v, out.nan_to_num(), lse.nan_to_num(), 0.2, *gradients, given)


# --- dropout -----------------------------------------------------------------------------------------------------


def pattern(p: float, seed: Tensor, image: int, heads: int, queries: int, keys: int) -> Tensor:
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    return reference.dropout_factor(seed, p, heads, torch.tensor(image), i, j) != 0


@pytest.mark.parametrize("seed", [0, 1, -1, 0x1234567_89ABCDEF, -(2**63)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_dropout_takes_what_the_reference_takes(p: float, seed: int) -> None:
    """Bit for bit, forward and in the values' gradient: even weights, and values (upstream gradients) of one each."""
    batch, heads, tokens, dim = 2, 3, 64, 64
    q = torch.zeros(batch, tokens, heads, dim, dtype=torch.float16)
    eye = torch.eye(tokens).half().view(1, tokens, 1, dim).expand(batch, -1, heads, -1).contiguous()
    given = AttentionOptions(dropout_p=p, seed=torch.tensor([seed]))
    out, lse = attention_forward(q, q, eye, 1.0, given)
    dq, dk, dv = (torch.empty_like(q) for _ in range(3))
    attention_backward(eye, None, q, q, eye, out, lse, 1.0, dq, dk, dv, given)
    for image in range(batch):
        kept = pattern(p, torch.tensor([seed]), image, heads, tokens, tokens)
        assert torch.equal(out[image].transpose(0, 1) != 0, kept)
        assert torch.equal(dv[image].permute(1, 2, 0) != 0, kept)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("queries", "keys", "dim"), [(37, 91, 32), (50, 50, 72), (20, 150, 128)])
def test_dropout(queries: int, keys: int, dim: int, dtype: torch.dtype) -> None:
    check(make(queries, keys, dim, dtype) | {"dropout_p": 0.25, "seed": SEED})


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_dropout_with_all_others(p: float) -> None:
    dropout = {"dropout_p": p, "seed": SEED}
    masked = {"key_mask": random_mask(2, 50)} | dropout
    check(make(50, 50) | {"bias": torch.randn(2, 1, 50, 50).requires_grad_()} | masked)
    check(make(50, 50) | {"bias": torch.randn(1, 2, 1, 50).requires_grad_()} | masked)
    check(make(50, 50) | {"rel_pos_table": table_of((7, 7)), "window": (7, 7)} | masked)
    check(make(50, 50, batch=1) | {"cu_seqlens": packed((20, 0, 30)), "max_seqlen": 30} | dropout)


# --- of all ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [40, 64])
def test_packed_qkv(dim: int) -> None:
    """q, k and v as they lie in one tensor, their gradients in another."""
    qkv = torch.randn(2, 50, 3, 2, dim, dtype=torch.float16).requires_grad_()
    args = {"qkv": qkv, "rel_pos_table": table_of((7, 7)), "window": (7, 7), "key_mask": random_mask(2, 50)}

    def kernel(**args: Any) -> Any:
        with fastvit.backend("cuda"):
            return ops.attention_qkvpacked(**args, return_lse=True)

    check_op(kernel, lambda **args: reference.attention_qkvpacked(**args, return_lse=True), args)


@pytest.mark.parametrize("kind", ["bias", "column", "table"])
def test_same_bits_twice(kind: str) -> None:
    args = make(50, 50, batch=3) | {"key_mask": random_mask(3, 50), "dropout_p": 0.2, "seed": SEED}
    if kind == "table":
        args |= {"rel_pos_table": table_of((7, 7)), "window": (7, 7)}
    else:
        args["bias"] = torch.randn(1, 2, 50 if kind == "bias" else 1, 50).requires_grad_()
    assert_same_bits_twice(attention, args)


def test_hopper_leaves_modifiers_to_the_family_for_8_0() -> None:
    args = make(50, 50, 64) | {"key_mask": random_mask(2, 50)}
    before = attention(**args)
    extension.set_architecture(90)
    try:
        for a, b in zip(before, attention(**args), strict=True):
            assert torch.equal(a, b)
    finally:
        extension.set_architecture(80)


def test_empty_batch() -> None:
    args = make(50, 50, batch=0) | {"rel_pos_table": table_of((7, 7)), "window": (7, 7)}
    out, _ = attention(**args)
    (gradient,) = torch.autograd.grad(out, args["rel_pos_table"], out)
    assert (gradient == 0).all()


def test_what_the_launchers_do_not_take_is_refused() -> None:
    q = torch.randn(1, 4, 2, 32).half()
    cu = torch.tensor([0, 4], dtype=torch.int32)

    def refused(match: str, **options: Any) -> None:
        with pytest.raises(RuntimeError, match=match):
            attention_forward(q, q, q, 1.0, AttentionOptions(**options))

    refused(r"bias; accepted: \(1, 2, 4, 4\) float32", bias=torch.zeros(1, 2, 4, 3))
    refused(
        r"a table of \(9, 3\) for a window of 2x2; accepted: \(9 or 12, 2\)",
        rel_pos_table=torch.zeros(9, 3),
        window=[2, 2],
    )
    refused("4 queries and 4 keys for a window of 2x2; accepted: 5", rel_pos_table=torch.zeros(12, 2), window=[2, 2])
    refused(r"key_mask; accepted: \(1, 4\) bytes", key_mask=torch.ones(1, 3).bool())
    refused(r"cu_q and cu_k; accepted: \(n \+ 1,\) int32", cu_q=cu, cu_k=cu.long(), max_q=4, max_k=4)
    packed = {"cu_q": cu, "cu_k": cu, "max_q": 4, "max_k": 4}
    refused("no bias, rel_pos_table, rel_pos_keys or key_mask", **packed, key_mask=torch.ones(1, 4).bool())
    refused("dropout_p is 1; accepted: 0 <= p < 1", dropout_p=1.0, seed=SEED)
    refused(r"seed; accepted: \(1,\) int64", dropout_p=0.5)


def test_the_schemas_of_csrc_have_every_option() -> None:
    """The tensors in their order, then the numbers, under the names of fastvit/attention_options.py."""
    numbers = [name for name in NO_OPTIONS._fields if name not in TENSORS and name != "window"]
    expected_names = [*TENSORS, "window_height", "window_width", *numbers]
    ops_of_csrc = [
        "forward", "query_gradient", "key_value_gradient", "bias_gradient", "table_gradient", "rel_pos_keys_gradient",
    ]  # fmt: skip
    for name in ops_of_csrc:
        schema = getattr(extension.library, f"attention_{name}").default._schema
        assert [argument.name for argument in schema.arguments][1 : 1 + len(expected_names)] == expected_names
