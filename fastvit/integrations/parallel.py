"""Across devices, on PyTorch's own DTensor. Importing this teaches DTensor to shard the kernel ops.

:func:`plan` is tensor parallelism as in Megatron-LM (Shoeybi et al., 2019): each rank computes some heads of every
attention and some hidden features of every MLP, and what each adds to a token is summed once after either.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.nn.functional import all_to_all_single
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from fastvit.models import ViT
from fastvit.ops import sharding

__all__ = ["plan", "sharding"]

Reader = Callable[[DTensor], Tensor | None]


def plan(model: ViT) -> dict[str, ParallelStyle]:
    """A plan for ``torch.distributed.tensor.parallel.parallelize_module(model, mesh, plan)``.

    Attention's heads and the MLPs' hidden features are split among the ranks of the mesh, all else is on each. The
    parameters become DTensors of the same names, shapes and values; in forward the ops see this rank's plain tensors.
    All ranks must get the same images, and draw the same random numbers where the model does (drop-path).

    Raises:
        ValueError: a module that can't be split so, by its name; and from ``parallelize_module``, before anything is
            changed, a number of ranks that does not divide the heads or the hidden features.
    """
    if not isinstance(model, ViT):
        raise ValueError(f"a {type(model).__name__} has no plan; accepted: fastvit.ViT")
    if model.windowed and model.rel_pos_bias is not None:
        raise ValueError("rel_pos_bias can't be split by heads: all blocks share it; accepted: use_rel_pos_bias")
    sizes: dict[str, int] = {}
    dense, dropped = ("qkv", "proj"), ("attn_drop", "proj_drop")
    block: Any
    for i, block in enumerate(model.blocks):
        for part in ("attn", "mlp"):
            if not hasattr(block, part):
                raise ValueError(f"blocks.{i} is a {type(block).__name__}, which has no {part} to split")
        _check(f"blocks.{i}.attn", block.attn, "heads", dense, dropped)
        _check(f"blocks.{i}.mlp", block.mlp, "features", ("fc1", "fc2"), ("drop1", "drop2"))
        sizes |= {"num_heads": block.attn.num_heads, "hidden features": block.mlp.fc2.in_features}
    heads, features, rest = Heads(sizes), Features(sizes), Whole()
    return {"blocks.*.attn": heads, "blocks.*.mlp": features, "blocks.*": rest, "": rest}  # inner ones first


def _check(name: str, module: Any, split: str, linears: tuple[str, ...], drops: tuple[str, ...]) -> None:
    """Raise a ValueError that names what in a branch of a block can't be split."""
    kind = type(module)
    if vars(kind).get("tensor_parallel") != split:  # a subclass may compute something else
        raise ValueError(f"{name} is a {kind.__name__}; accepted: a class that declares tensor_parallel = {split!r}")
    for linear in linears:
        if type(getattr(module, linear)) is not nn.Linear:
            raise ValueError(f"{name}.{linear} is a {type(getattr(module, linear)).__name__}; accepted: nn.Linear")
    if not isinstance(module.norm, nn.Identity):
        raise ValueError(f"{name}.norm reads what is split among the ranks; accepted: no norm there")
    for drop in drops:
        if getattr(module, drop).p > 0:
            raise ValueError(
                f"{name}.{drop} has rate {getattr(module, drop).p}: each rank would drop otherwise; accepted: 0"
            )


# --- a parameter, as this rank computes with it ---


def _own(parameter: DTensor) -> Tensor:
    """What this rank holds."""
    return parameter.to_local()


def _shared(parameter: DTensor) -> Tensor:
    """The whole of it, of whose gradient each rank has its heads' part."""
    return parameter.to_local(grad_placements=[Partial()])


def _apart(parameter: DTensor) -> None:
    """Nothing: it is used after the sum over the ranks."""


def _rows_of_each(parameter: DTensor, parts: int) -> Tensor:
    """This rank's share of each of so many equal parts (q, k and v) of a matrix (parts * N, K) or bias (parts * N,).

    A DTensor holds consecutive rows, so that checkpoints are true on any number of ranks: rows go to those of their
    heads here, and their gradients back.
    """
    mesh, held = parameter.device_mesh, parameter.to_local()
    ranks, rank = mesh.size(), mesh.get_local_rank()
    pieces = [[(parts * source + i) % ranks for i in range(parts)] for source in range(ranks)]  # whose they are
    order = sorted(range(parts), key=pieces[rank].__getitem__)
    sent = held.unflatten(0, (parts, -1))[order].flatten(0, 1)
    size = held.shape[0] // parts
    return all_to_all_single(
        torch.empty_like(held),
        sent,
        output_split_sizes=[size * owners.count(rank) for owners in pieces],
        input_split_sizes=[size * pieces[rank].count(target) for target in range(ranks)],
        group=mesh.get_group(),
    )


# --- modules whose parameters are DTensors, and plain tensors while they run ---


class Whole(ParallelStyle):
    """Every rank holds all of the parameters that are no DTensors yet, and computes the same with them."""

    def _place(self, name: str, module: Any) -> tuple[Placement, Reader]:
        """How a parameter lies on the ranks, and how it is read."""
        return Replicate(), _own

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        readers: dict[str, Reader] = {}
        for name, parameter in list(module.named_parameters()):
            if not isinstance(parameter, DTensor):
                placement, readers[name] = self._place(name, module)
                spread = distribute_tensor(parameter, device_mesh, [placement], src_data_rank=self.src_data_rank)
                owner, _, leaf = name.rpartition(".")
                new = nn.Parameter(spread, requires_grad=parameter.requires_grad)
                module.get_submodule(owner).register_parameter(leaf, new)
        held: list[tuple[nn.Module, str, Any]] = []

        def enter(module: nn.Module, args: Any) -> None:
            for name, read in readers.items():
                path, _, leaf = name.rpartition(".")
                owner = module.get_submodule(path)
                parameter: Any = owner._parameters[leaf]
                held.append((owner, leaf, parameter))
                owner._parameters[leaf] = read(parameter)  # type: ignore[assignment]

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            while held:
                owner, leaf, parameter = held.pop()
                owner._parameters[leaf] = parameter

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)
        return module


class _Split(Whole):
    """A branch of a block between whose two matrices, ``first`` and ``last``, each rank has a part of the features."""

    first: str
    last: str

    def __init__(self, sizes: dict[str, int]) -> None:
        """Of a model whose ``sizes`` (name -> number) the ranks must divide."""
        super().__init__()
        self.sizes = sizes

    def _place(self, name: str, module: Any) -> tuple[Placement, Reader]:
        if name == f"{self.last}.weight":
            return Shard(1), _own
        if name == f"{self.last}.bias":
            return Replicate(), _apart
        return Shard(0), _own

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        ranks = device_mesh.size()
        for name, size in self.sizes.items():
            if size % ranks:
                fits = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
                raise ValueError(f"{ranks} ranks can't share {name}={size}; accepted: {fits}")

        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *others = args
            whole = DTensor.from_local(x, device_mesh, [Replicate()], run_check=False)
            return whole.to_local(grad_placements=[Partial()]), *others

        def leave(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            parts = DTensor.from_local(y, device_mesh, [Partial()], run_check=False)
            y = parts.redistribute(placements=[Replicate()]).to_local()
            bias: Any = getattr(module, self.last).bias
            return y if bias is None else y + bias.to_local()

        module.register_forward_pre_hook(enter)
        super()._apply(module, device_mesh)
        module.register_forward_hook(leave)  # the last: parameters are DTensors again
        return module


class Heads(_Split):
    """Attention of which each rank computes as many heads."""

    first, last = "qkv", "proj"

    def _place(self, name: str, module: Any) -> tuple[Placement, Reader]:
        if name.startswith("qkv."):
            return Shard(0), partial(_rows_of_each, parts=3)
        if name.startswith(("q_norm.", "k_norm.")):
            return Replicate(), _shared
        if name == "relative_position_bias_table":
            return Shard(1), _own
        return super()._place(name, module)

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        super()._apply(module, device_mesh)
        module.num_heads //= device_mesh.size()
        module.attn_dim //= device_mesh.size()
        return module


class Features(_Split):
    """An MLP of which each rank computes as many hidden features; of a gated one, gates and values alike."""

    first, last = "fc1", "fc2"

    def _place(self, name: str, module: Any) -> tuple[Placement, Reader]:
        if name.startswith("fc1.") and module.gating > 1:
            return Shard(0), partial(_rows_of_each, parts=module.gating)
        return super()._place(name, module)
