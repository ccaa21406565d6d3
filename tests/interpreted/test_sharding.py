"""The kernel ops on DTensors: two gloo processes share the batch, or the heads, and agree with one."""

from __future__ import annotations

import copy
import socket
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import fastvit.integrations.parallel
from fastvit import ops


def _block(x, qkv, proj, fc1, fc2, norm):
    batch, tokens, width = x.shape
    packed = ops.linear(x, qkv, norm=(norm, norm, 1e-6)).view(batch, tokens, 3, 2, width // 2)
    x = ops.linear(ops.attention_qkvpacked(packed).flatten(2), proj, residual=x)
    return ops.mlp(x, fc1, None, fc2, None, norm=(norm, norm, 1e-6), residual=x)


def _worker(rank: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = [torch.randn(4, 5, 16), *(torch.randn(s, 16) * 0.2 for s in (48, 16, 32))]
    whole += [torch.randn(16, 32) * 0.2, torch.randn(16)]
    for t in whole:
        t.requires_grad_()
    with fastvit.backend("triton"):
        expected = _block(*whole)
        expected.square().sum().backward()
        places = [Shard(0), *[Replicate()] * 5]
        parts = [distribute_tensor(t.detach(), mesh, [p]).requires_grad_() for t, p in zip(whole, places, strict=True)]
        out = _block(*parts)
        assert out.placements == (Shard(0),)
        out.square().sum().backward()
        torch.testing.assert_close(out.full_tensor(), expected, atol=1e-5, rtol=1e-5)
        for part, t in zip(parts, whole, strict=True):
            torch.testing.assert_close(part.grad.full_tensor(), t.grad, atol=1e-4, rtol=1e-4)
        qkv = torch.randn(2, 5, 3, 4, 16)
        by_heads = ops.attention_qkvpacked(distribute_tensor(qkv, mesh, [Shard(3)]))
        assert by_heads.placements == (Shard(2),)
        torch.testing.assert_close(by_heads.full_tensor(), ops.attention_qkvpacked(qkv))
        for keys, by_heads in ((torch.randn(9, 16), Replicate()), (torch.randn(4, 9, 16), Shard(0))):
            keys.requires_grad_()
            expected = ops.attention_qkvpacked(qkv, rel_pos_keys=keys)
            expected.square().sum().backward()
            for place, keys_place in ((Shard(0), Replicate()), (Shard(3), by_heads)):
                part = distribute_tensor(keys.detach(), mesh, [keys_place]).requires_grad_()
                out = ops.attention_qkvpacked(distribute_tensor(qkv, mesh, [place]), rel_pos_keys=part)
                assert out.placements == (Shard(min(place.dim, 2)),)
                out.square().sum().backward()
                torch.testing.assert_close(out.full_tensor(), expected)
                torch.testing.assert_close(part.grad.full_tensor(), keys.grad)
        q, k, _ = (t.contiguous() for t in qkv.unbind(2))
        _, lse = ops.attention(q, k, k, return_lse=True)
        angles = torch.randn(2, 2, 4, 16)
        for dim in (0, 2):
            place, lse_place = [Shard(dim)], [Shard(min(dim, 1))]
            parts = [distribute_tensor(t, mesh, place) for t in (q, k)]
            by_image = [distribute_tensor(t, mesh, [Shard(0) if dim == 0 else Replicate()]) for t in angles]
            for turned, whole in zip(ops.rotate(*parts, *by_image), ops.rotate(q, k, *angles), strict=True):
                assert turned.placements == tuple(place)
                torch.testing.assert_close(turned.full_tensor(), whole)
            parts.append(distribute_tensor(lse, mesh, lse_place))
            far = ops.attention_distance(*parts, (2, 2))
            assert far.placements == tuple(lse_place)
            torch.testing.assert_close(far.full_tensor(), ops.attention_distance(q, k, lse, (2, 2)))
            first = ops.attention_rows(*parts, distribute_tensor(torch.tensor([0]), mesh, [Replicate()]))
            assert first.placements == tuple(lse_place)
            torch.testing.assert_close(first.full_tensor(), ops.attention_rows(q, k, lse, (0,)))
        _heads_and_hidden_features(mesh)
    dist.destroy_process_group()


def _heads_and_hidden_features(mesh: DeviceMesh) -> None:
    """A whole model by ``parallel.plan``: each rank's part of a block runs on the same fused ops."""
    alone = fastvit.ViT(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=3, init_values=0.5)
    torch.nn.init.normal_(alone.head.weight)
    model = copy.deepcopy(alone)
    parallelize_module(model, mesh, fastvit.integrations.parallel.plan(model))
    images = torch.randn(2, 3, 16, 16)
    alone(images).square().sum().backward()
    with (
        mock.patch.object(ops, "attention_qkvpacked", wraps=ops.attention_qkvpacked) as attention,
        mock.patch.object(ops, "mlp", wraps=ops.mlp) as mlp,
    ):
        logits = model(images)
    assert attention.call_args.args[0].shape == (2, 5, 3, 1, 16)  # one head of two
    assert mlp.call_args.args[1].shape == (64, 32)
    torch.testing.assert_close(logits, alone(images), atol=1e-5, rtol=1e-5)
    logits.square().sum().backward()
    for part, whole in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(part.grad.full_tensor(), whole.grad, atol=1e-4, rtol=1e-4)


def test_two_processes_agree_with_one() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, args=(port,), nprocs=2)
