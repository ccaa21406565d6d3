"""What changes attention's scores, on the Triton kernels in the interpreter: results and every gradient.

New memory is NaN here (conftest.py): whatever a kernel leaves unwritten shows.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit import ops, reference
from fastvit.attention_options import AttentionOptions
from fastvit.triton import launch
from fastvit.triton.attention import attention_forward
from fastvit.triton.attention_backward import attention_backward
from fastvit.tuning import compile_report
from numerics import DTYPES, assert_same_bits_twice, check_op

F32 = torch.float32
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _triton():
    with fastvit.backend("triton"):
        yield


def make(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def qkv(queries: int, keys: int, dtype: torch.dtype = F32, batch: int = 2, dim: int = 16) -> dict[str, Any]:
    return {name: make(batch, queries if name == "q" else keys, 2, dim, dtype=dtype) for name in "qkv"}


def check(op: str = "attention", lse: bool = True, **args: Any) -> None:
    check_op(getattr(ops, op), getattr(reference, op), {**args, "return_lse": lse})


def seed(value: int = -0x123456789ABCDEF) -> Tensor:
    return torch.tensor([value])


def starts(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


# --- a bias ---------------------------------------------------------------------------------------------------

SHAPES = [(2, 2, 17, 37), (1, 2, 17, 37), (2, 1, 17, 37), (1, 1, 17, 37), (2, 2, 1, 37), (1, 2, 17, 1), (1, 1, 1, 37)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_bias_of_every_shape(shape: tuple[int, ...]) -> None:
    """Shared by images, heads, queries or keys: its gradient is the sum over what shares it."""
    check(**qkv(17, 37), bias=make(*shape))


def test_one_bias_for_all() -> None:
    check(**qkv(17, 37), bias=make(1, 1, 1, 1))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("wide", [True, False])
def test_a_bias_of_any_dtype(dtype: torch.dtype, wide: bool) -> None:
    check(**qkv(67, 35, dtype), bias=make(1, 2, 67, 35, dtype=F32 if wide else dtype))


def test_a_bias_of_any_strides() -> None:
    check(**qkv(9, 21), bias=torch.randn(21, 9, 2, 4).permute(3, 2, 1, 0)[::2].requires_grad_())
    check(**qkv(9, 21), bias=torch.randn(1, 2, 9, 1).expand(2, 2, 9, 21).requires_grad_())


def test_a_bias_without_a_gradient_costs_no_launch() -> None:
    q, k, v = torch.empty(3, 2, 50, 4, 64, device="meta", dtype=torch.bfloat16).unbind(0)
    q.requires_grad_()
    counts = []
    for wanted in (False, True):
        bias = torch.empty(1, 4, 50, 50, device="meta", requires_grad=wanted)
        with compile_report.trace(90) as trace:
            out = ops.attention(q, k, v, bias=bias)
            counts.append(len(trace.launches))
            torch.autograd.grad(out, [q, bias] if wanted else [q], torch.empty_like(out))
        counts.append(len(trace.launches))
        assert trace.aten == []
    assert counts == [1, 3, 1, 4]


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_any_scale_with_a_bias(scale: float) -> None:
    check(**qkv(5, 40), bias=make(1, 2, 5, 40), scale=scale)


def test_minus_infinity_in_a_bias_is_no_key() -> None:
    bias = torch.randn(1, 2, 5, 19)
    bias[..., 1, :] = bias[..., 2, 3:] = -math.inf
    args = qkv(5, 19) | {"bias": bias}
    check(**args, lse=False)
    out, lse = ops.attention(**args, return_lse=True)
    assert (out[:, 1] == 0).all() and (lse[..., 1] == -math.inf).all()


# --- BEiT's table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "extra"), [((2, 3), 3), ((3, 2), 0), ((1, 1), 3), ((5, 1), 3), ((4, 4), 3), ((2, 19), 3), ((1, 40), 0)]
)
def test_a_table(window: tuple[int, int], extra: int) -> None:
    """Windows of every form; those wider than a tile (16 in float32) are taken in parts."""
    h, w = window
    table = make((2 * h - 1) * (2 * w - 1) + extra, 2)
    check("attention_qkvpacked", qkv=make(2, h * w + (extra > 0), 3, 2, 16), rel_pos_table=table, window=window)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("arch", [80, 90])
def test_a_table_in_half_precision(dtype: torch.dtype, arch: int) -> None:
    with launch.assume(arch):
        check(
            "attention_qkvpacked",
            qkv=make(1, 34, 3, 2, 24, dtype=dtype),
            rel_pos_table=make(5 * 21 + 3, 2),
            window=(3, 11),
        )


def test_a_table_is_a_bias() -> None:
    """The same as the gathered bias in everything: strides, masks, dropout; and its gradient is what is gathered."""
    h, w = 3, 3
    table, mask = torch.randn(2, 28).T.requires_grad_(), torch.rand(2, 10) > 0.3
    args = qkv(10, 10) | {"key_mask": mask, "dropout_p": 0.3, "seed": seed()}
    bias = reference.table_bias(table, (h, w))
    results = []
    for more in ({"rel_pos_table": table, "window": (h, w)}, {"bias": bias}):
        out = ops.attention(**args, **more)
        results.append((out, *torch.autograd.grad(out.square().sum(), [table, args["q"]], retain_graph=True)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# --- relative position keys ----------------------------------------------------------------------------------------


def rel_pos_keys(tokens: int, dim: int = 16, dtype: torch.dtype = F32, heads: int | None = None) -> Tensor:
    return make(*(() if heads is None else (heads,)), 2 * tokens - 1, dim, dtype=dtype)


@pytest.mark.parametrize("heads", [None, 2], ids=["shared", "each head's"])
@pytest.mark.parametrize("tokens", [1, 5, 50])
def test_rel_pos_keys(tokens: int, heads: int | None) -> None:
    """Fewer tokens than a tile has, and several tiles of queries, of keys and of relative positions."""
    check("attention_qkvpacked", qkv=make(2, tokens, 3, 2, 16), rel_pos_keys=rel_pos_keys(tokens, heads=heads))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", HALF)
def test_rel_pos_keys_in_half_precision(dtype: torch.dtype, arch: int) -> None:
    """Where architectures have tiles of other forms, higher or wider, and with a head dim in pieces."""
    with launch.assume(arch):
        check(**qkv(70, 70, dtype, batch=1, dim=24), rel_pos_keys=rel_pos_keys(70, 24, dtype, heads=2))


def test_rel_pos_keys_for_197_tokens() -> None:
    with launch.assume(90):
        check(**qkv(197, 197, torch.float16, batch=1), rel_pos_keys=rel_pos_keys(197, dtype=torch.float16), lse=False)


@pytest.mark.parametrize("dtype", HALF)
def test_rel_pos_keys_are_rounded_to_the_dtype_of_queries(dtype: torch.dtype) -> None:
    """Wide ones are parameters under autocast; their gradient is wide."""
    args, keys = qkv(21, 21, dtype), rel_pos_keys(21)
    results = []
    for given in (keys, keys.to(dtype)):
        out = ops.attention(**args, rel_pos_keys=given)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), [*args.values(), given])))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.to(b.dtype), b)
    assert results[0][-1].dtype == F32


def test_rel_pos_keys_with_everything() -> None:
    mask = torch.rand(2, 37) > 0.3
    mask[1] = False
    more = {"rel_pos_keys": rel_pos_keys(37, heads=2), "key_mask": mask, "scale": -0.3}
    more |= {"dropout_p": 0.4, "seed": seed()}
    check(**qkv(37, 37), **more, lse=False)


def test_rel_pos_keys_of_any_strides() -> None:
    shared = torch.randn(16, 2 * 19).T[::2].requires_grad_()
    each = torch.randn(19, 2, 2 * 16).transpose(0, 1)[..., ::2].requires_grad_()
    for keys in (shared, each):
        check(**qkv(10, 10), rel_pos_keys=keys)


def test_rel_pos_keys_are_a_bias() -> None:
    """The same as the materialised scores in everything, for every gradient but that of the queries."""
    keys = rel_pos_keys(21, heads=2)
    args = qkv(21, 21) | {"key_mask": torch.rand(2, 21) > 0.3, "dropout_p": 0.3, "seed": seed()}
    bias = reference.relative_bias(args["q"].detach(), keys, None)
    results = []
    for more in ({"rel_pos_keys": keys}, {"bias": bias}):
        out = ops.attention(**args, **more)
        wanted = [keys, args["k"], args["v"]]
        results.append((out, *torch.autograd.grad(out.square().sum(), wanted, retain_graph=True)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# --- absent keys ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_key_mask(dtype: torch.dtype) -> None:
    mask = torch.rand(3, 85) > 0.5
    mask[1], mask[2] = False, True
    mask[2, :64] = False  # a first block without any key
    args = qkv(21, 85, dtype, batch=3)
    check(**args, key_mask=mask, lse=False)
    out, lse = ops.attention(**args, key_mask=mask, return_lse=True)
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all() and lse[::2].isfinite().all()
    gradients = torch.autograd.grad([out, lse], list(args.values()), [torch.ones_like(out), torch.ones_like(lse)])
    for gradient in gradients:
        assert gradient.isfinite().all() and (gradient[1] == 0).all()


def test_a_mask_of_any_strides_with_a_bias() -> None:
    mask = (torch.rand(40, 4) > 0.5).T[::2]
    check(**qkv(5, 40), key_mask=mask, bias=make(2, 1, 5, 40), lse=False)


# --- dropout --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("value", [0, 1, -1, 2**40 + 3])
def test_dropout_drops_what_the_reference_drops(p: float, value: int) -> None:
    """v is the unit matrix, so the output is the weights."""
    q, k, v = torch.randn(2, 9, 2, 16), torch.randn(2, 16, 2, 16), torch.eye(16)[None, :, None].expand(2, -1, 2, -1)
    args = {"q": q, "k": k, "v": v, "dropout_p": p, "seed": seed(value)}
    ours, theirs = ops.attention(**args), reference.attention(**args)
    assert torch.equal(ours == 0, theirs == 0)
    torch.testing.assert_close(ours, theirs)
    assert abs((ours == 0).double().mean() - p) < 0.12


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(dtype: torch.dtype) -> None:
    check(**qkv(33, 70, dtype), dropout_p=0.3, seed=seed())


def test_dropout_with_everything() -> None:
    mask = torch.rand(2, 37) > 0.3
    check(**qkv(17, 37), dropout_p=0.6, seed=seed(), key_mask=mask, bias=make(1, 2, 1, 37))


def test_dropout_of_0_is_none_and_another_seed_another_mask() -> None:
    args = qkv(9, 21)
    plain = ops.attention(**args)
    assert torch.equal(ops.attention(**args, dropout_p=0.0, seed=seed()), plain)
    one, two = (ops.attention(**args, dropout_p=0.5, seed=seed(n)) for n in (1, 2))
    assert not torch.equal(one, two)
    assert torch.equal(one, ops.attention(**args, dropout_p=0.5, seed=seed(1)))


# --- packed sequences -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", [80, 90])
def test_packed_sequences(dtype: torch.dtype, arch: int) -> None:
    """Empty ones, one token, more than a block, and a longest that none has."""
    cu = starts(0, 1, 37, 0, 65, 16)
    with launch.assume(arch):
        check("attention_qkvpacked", qkv=make(1, 119, 3, 2, 16, dtype=dtype), cu_seqlens=cu, max_seqlen=130)


def test_queries_and_keys_packed_differently() -> None:
    """With no key for some queries, and no query for some keys."""
    cu = starts(3, 0, 5, 17), starts(40, 7, 0, 2)
    args = qkv(25, 49, batch=1)
    check(**args, cu_seqlens=cu, max_seqlen=(17, 40), lse=False)
    out, lse = ops.attention(**args, cu_seqlens=cu, max_seqlen=(17, 40), return_lse=True)
    assert (out[:, 3:8] == 0).all() and (lse[..., 3:8] == -math.inf).all()


def test_dropout_of_packed_sequences_is_that_of_images() -> None:
    x = make(3, 19, 3, 2, 16)
    options = {"dropout_p": 0.4, "seed": seed()}
    alone = ops.attention_qkvpacked(x, **options)
    packed = ops.attention_qkvpacked(x.flatten(0, 1)[None], cu_seqlens=starts(19, 19, 19), max_seqlen=19, **options)
    assert torch.equal(alone.flatten(0, 1), packed[0])


def test_packed_with_rope_and_dropout() -> None:
    turn = torch.randn(30, 16)
    angles = turn.cos(), turn.sin()
    check(
        "attention_qkvpacked", qkv=make(1, 30, 3, 2, 16), rope=angles, cu_seqlens=starts(17, 13), max_seqlen=17,
        dropout_p=0.2, seed=seed(),
    )  # fmt: skip


def test_rope_leaves_the_prefix() -> None:
    turn = torch.randn(2, 12, 16)
    angles = turn.cos(), turn.sin()
    check(**qkv(14, 14), rope=angles, bias=make(1, 1, 14, 14))


def test_starts_outside_the_tensors_are_cut_to_them() -> None:
    """On a GPU nobody reads the starts: what they say may be wrong, and memory outside is left alone all the same."""
    total, longest = 19, 40
    cu = torch.tensor([-7, 3, 100, 5, 19], dtype=torch.int32)

    def surrounded(value: float) -> tuple[Tensor, Tensor]:
        buffer = torch.full((1, total + 2 * longest, 2, 16), value)
        return buffer, buffer[:, longest : longest + total]

    inputs = [surrounded(torch.nan)[1].copy_(torch.randn(1, total, 2, 16)) for _ in range(4)]
    buffers, gradients = zip(*(surrounded(7.0) for _ in range(3)), strict=True)
    given = AttentionOptions(cu_q=cu, cu_k=cu, max_q=longest, max_k=longest)
    out, lse = attention_forward(*inputs[:3], 0.25, given)
    attention_backward(inputs[3], None, *inputs[:3], out, lse, 0.25, *gradients, given)
    assert not out.isnan().any()
    for buffer, inside in zip(buffers, gradients, strict=True):
        assert not buffer.isnan().any()
        inside.fill_(7.0)
        assert (buffer == 7.0).all()


# --- all of them ----------------------------------------------------------------------------------------------


def test_gradients_are_deterministic() -> None:
    table = {"rel_pos_table": make(28, 2), "window": (3, 3), "key_mask": torch.rand(2, 10) > 0.3}
    for more in (table, {"bias": make(1, 1, 10, 10)}, {"rel_pos_keys": rel_pos_keys(10)}):
        assert_same_bits_twice(ops.attention, qkv(10, 10) | more | {"dropout_p": 0.3, "seed": seed()})


def _elements(made: launch.Launch) -> list[int]:
    """Sizes of all tensors of a launch, in memory."""
    found: list[int] = []

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value.untyped_storage().nbytes() // value.element_size())
        elif isinstance(value, tuple):
            for one in value:
                visit(one)

    for value in made.args.values():
        visit(value)
    return found


@pytest.mark.parametrize("how", ["plain", "table", "rel_pos_keys", "dropout", "mask", "packed"])
def test_nothing_of_tokens_squared_at_16384(how: str) -> None:
    """Forward and backward on 1024 px in patches of 8: every tensor is of the order of the tokens."""
    tokens, meta = 128 * 128, {"device": "meta"}
    qkv = torch.empty(1, tokens, 3, 2, 64, dtype=torch.bfloat16, requires_grad=True, **meta)
    seed = torch.empty(1, dtype=torch.int64, **meta)
    options: dict[str, Any] = {
        "plain": {},
        "table": {"rel_pos_table": torch.empty(255 * 255, 2, requires_grad=True, **meta), "window": (128, 128)},
        "rel_pos_keys": {"rel_pos_keys": torch.empty(2 * tokens - 1, 64, requires_grad=True, **meta)},
        "dropout": {"dropout_p": 0.1, "seed": seed},
        "mask": {"key_mask": torch.empty(1, tokens, dtype=torch.bool, **meta)},
        "packed": {"cu_seqlens": torch.empty(3, dtype=torch.int32, **meta), "max_seqlen": tokens},
    }[how]
    with compile_report.trace(90) as trace:
        out = ops.attention_qkvpacked(qkv, **options)
        wanted = [qkv, *(t for t in options.values() if isinstance(t, Tensor) and t.requires_grad)]
        torch.autograd.grad(out, wanted, torch.empty_like(out))
    assert trace.aten == []
    assert len(trace.launches) == 3 + (how in ("table", "rel_pos_keys"))
    assert max(n for one in trace.launches for n in _elements(one)) <= qkv.numel()
