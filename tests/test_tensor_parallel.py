"""Tensor parallelism: heads and hidden features on two and four gloo processes, and the numbers of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import fastvit
from fastvit.layers import Attention, SwiGLU
from fastvit.models import AxialViT
from numerics import assert_model_as_right_as_eager
from processes import spawn

SIZES: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 5,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "ViT": {"qk_norm": True, "init_values": 0.5, "drop_path_rate": 0.5},
    "checkpointed": {"no_embed_class": True, "reg_tokens": 2, "global_pool": "map"},
    "packed": {"global_pool": "avg", "qkv_bias": False, "proj_bias": False},
    "BEiT": {"use_rel_pos_bias": True, "init_values": 0.5, "pos_embed": "none"},
    "gated, turned": {"rope": 100.0, "mlp_layer": SwiGLU, "pos_embed": "none"},
}
STEPS, SAVED = 6, 3
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def build(kind: str, dtype: torch.dtype = torch.float32) -> fastvit.ViT:
    """A model whose weights all matter, the same in every process."""
    torch.manual_seed(0)
    model = fastvit.ViT(**SIZES, **MODELS[kind])
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.set_grad_checkpointing(kind == "checkpointed")
    return model.to(dtype)


def share(model: fastvit.ViT) -> fastvit.ViT:
    from fastvit.integrations.parallel import plan

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, plan(model))  # type: ignore[return-value]


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step % 2)  # seen again, to be learned
    return torch.randn(8, 3, 32, 32, generator=generator).to(dtype), torch.randint(5, (8,), generator=generator)


def run(kind: str, model: fastvit.ViT, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Logits in training and inference, and the gradient of every parameter."""
    images, labels = batch(0, dtype)
    given: Any = images
    if kind == "packed":
        given = [*images[:5], images[5, :, 8:], images[6, :, :, :16]]
    torch.manual_seed(1)
    logits = model.train()(given)
    nn.functional.cross_entropy(logits, labels[: len(logits)]).backward()
    found = {"logits": logits.detach()}
    with torch.inference_mode():
        found["inference"] = model.eval()(given).clone()
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found


def shared_run(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(:func:`run`, the whole state dict, the shapes of this rank's parameters) of a model that all ranks share."""
    model = share(build(kind))
    parameters: Any = dict(model.named_parameters())
    held = {name: tuple(value.to_local().shape) for name, value in parameters.items()}
    return run(kind, model), get_model_state_dict(model, options=WHOLE), held


def train(folder: Path, begin: int = 0, shape: tuple[int, int] | None = None) -> tuple[list[float], dict[str, Tensor]]:
    """(loss of each step, the whole model's weights) with AdamW; from step ``begin`` on with the checkpoint there.

    Args:
        shape: (images, tensors) among how many processes these are shared: 1 of both without any.
    """
    model: Any = build("ViT")
    model.set_grad_checkpointing()
    for block in model.blocks:  # all ranks drop the same, but not one process with twice the images
        block.drop_path1 = block.drop_path2 = nn.Identity()
    rank, data = 0, 1
    if shape is not None:
        from fastvit.integrations.parallel import plan

        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], plan(model))
        rank, data = mesh.get_local_rank("data"), shape[0]
        if data > 1:
            for block in model.blocks:
                fully_shard(block, mesh=mesh["data"])
            fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if begin:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    losses = []
    for step in range(begin, STEPS):
        images, labels = (t.chunk(data)[rank] for t in batch(step))
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        total = loss.detach().clone()
        if shape is not None:
            dist.all_reduce(total)
        losses.append(float(total / (1 if shape is None else shape[0] * shape[1])))
        if step + 1 == SAVED and not begin and shape is not None:
            states = get_state_dict(model, optimizer)
            dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=folder)
    return losses, get_model_state_dict(model, options=WHOLE)


def loaded(weights: dict[str, Tensor]) -> bool:
    """Whether one process's state dict goes into a model that is shared on the meta device, and comes out again."""
    model = share(fastvit.ViT(**SIZES, **MODELS["gated, turned"], device="meta")).to_empty(device="cpu")
    set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True))
    back = get_model_state_dict(model, options=WHOLE)
    return dist.get_rank() != 0 or all(torch.equal(back[name], value) for name, value in weights.items())


def refused(ranks: int) -> list[str]:
    """Messages of models that so many ranks can't share; that they are as they were is asserted."""
    messages = []
    for options in ({"num_heads": 1}, {"mlp_ratio": 4.016}):
        model = fastvit.ViT(**SIZES | options)
        with pytest.raises(ValueError) as caught:
            share(model)
        messages.append(str(caught.value))
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return messages


def after_an_error() -> bool:
    """Whether a model that raised in a block still has its DTensors, and gives what it gave."""
    model = share(build("packed")).eval()
    images, _ = batch(0)
    with torch.no_grad():
        before = model(images)
        with pytest.raises(ValueError, match="bias"):
            model(images, attn_mask=torch.zeros(1, 3, 17, 17))
        after = model(images)
    return torch.equal(before, after) and all(isinstance(parameter, DTensor) for parameter in model.parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensor_parallel")


@pytest.fixture(scope="module")
def four(folder: Path) -> Any:
    """Four processes; training leaves checkpoints."""
    jobs: dict[str, Any] = {kind: (shared_run, (kind,)) for kind in MODELS}
    jobs["train"] = train, (folder / "of four", 0, (1, 4))
    jobs["both"] = train, (folder / "of both", 0, (2, 2))
    return spawn(4, folder / "four", jobs)


@pytest.fixture(scope="module")
def two(folder: Path, four: Any) -> Any:
    """Two processes, after the checkpoints of four."""
    jobs: dict[str, Any] = {kind: (shared_run, (kind,)) for kind in MODELS}
    jobs["train"] = train, (folder / "of two", 0, (1, 2))
    jobs["resumed"] = train, (folder / "of four", SAVED, (1, 2))
    jobs["of both, resumed"] = train, (folder / "of both", SAVED, (1, 2))
    jobs["loaded"] = loaded, (build("gated, turned").state_dict(),)
    jobs["refused"] = refused, (2,)
    jobs["after an error"] = after_an_error, ()
    return spawn(2, folder / "two", jobs)


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    with fastvit.backend("reference"):
        return train(folder)


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["two", "four"])
@pytest.mark.parametrize("kind", MODELS)
def test_several_processes_compute_what_one_does(kind: str, processes: str, request: pytest.FixtureRequest) -> None:
    """Logits and the gradient of every parameter, as right as plain PyTorch's of one process."""
    found, state, held = request.getfixturevalue(processes)[kind]
    with fastvit.backend("reference"):
        eager, exact = run(kind, build(kind)), run(kind, build(kind, torch.float64), torch.float64)
    assert found.keys() == eager.keys()
    assert_model_as_right_as_eager(*(list(one.values()) for one in (found, eager, exact)))
    whole = build(kind).state_dict()
    assert state.keys() == whole.keys() and all(torch.equal(state[name], value) for name, value in whole.items())
    ranks = {"two": 2, "four": 4}[processes]
    for name in ("qkv.weight", "proj.weight"):
        assert torch.Size(held[f"blocks.1.attn.{name}"]).numel() == whole[f"blocks.1.attn.{name}"].numel() // ranks
    for name in ("fc1.weight", "fc2.weight"):
        assert torch.Size(held[f"blocks.1.mlp.{name}"]).numel() == whole[f"blocks.1.mlp.{name}"].numel() // ranks


def check(found: tuple[list[float], dict[str, Tensor]], expected: tuple[list[float], dict[str, Tensor]]) -> None:
    losses, weights = found
    torch.testing.assert_close(losses, expected[0][-len(losses) :], atol=1e-5, rtol=0)
    assert weights.keys() == expected[1].keys()
    for name, value in weights.items():
        if not name.endswith(("attn.qkv.bias", "attn.k_norm.bias")):  # a key bias's is rounding, which AdamW scales up
            assert (value - expected[1][name]).norm() <= 1e-4 * expected[1][name].norm(), name


@pytest.mark.slow
def test_losses_change(alone: Any) -> None:
    """Or they could tell nothing apart."""
    assert max(alone[0]) - min(alone[0]) > 0.5


@pytest.mark.slow
def test_training_has_one_processs_losses(two: Any, four: Any, alone: Any) -> None:
    """AdamW, clipped gradients, checkpointed activations."""
    check(two["train"], alone)
    check(four["train"], alone)


@pytest.mark.slow
def test_with_fsdp_on_a_mesh_of_two_dimensions(four: Any, alone: Any) -> None:
    """Two pairs of processes; each pair shares heads, the two share images and shards."""
    check(four["both"], alone)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["resumed", "of both, resumed"])
def test_a_checkpoint_of_four_goes_on_with_two(run: str, two: Any, alone: Any) -> None:
    """Weights and AdamW's moments, from tensor parallelism alone and from both."""
    assert len(two[run][0]) == STEPS - SAVED
    check(two[run], alone)


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_one(folder: Path, four: Any, alone: Any) -> None:
    """Which reads the parameters under the same names and in the same order of rows."""
    with fastvit.backend("reference"):
        check(train(folder / "of four", SAVED), alone)


@pytest.mark.slow
def test_whole_state_dicts_go_in(two: Any) -> None:
    assert two["loaded"]


@pytest.mark.slow
def test_ranks_must_divide_what_is_shared(two: Any) -> None:
    assert two["refused"] == [
        "2 ranks can't share num_heads=1; accepted: 1",
        "2 ranks can't share hidden features=257; accepted: 1, 257",
    ]


@pytest.mark.slow
def test_an_error_leaves_the_model_as_it_was(two: Any) -> None:
    assert two["after an error"]


class Other(Attention):
    """Not known to be split by heads."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_layer": Other}, r"blocks.0.attn is a Other; accepted: a class that declares tensor_parallel = 'heads'"),
        ({"attn_drop_rate": 0.1}, r"blocks.0.attn.attn_drop has rate 0.1.*accepted: 0"),
        ({"proj_drop_rate": 0.1}, r"blocks.0.attn.proj_drop has rate 0.1.*accepted: 0"),
        ({"scale_attn_norm": True}, r"blocks.0.attn.norm reads what is split"),
        ({"scale_mlp_norm": True}, r"blocks.0.mlp.norm reads what is split"),
        ({"use_shared_rel_pos_bias": True, "pos_embed": "none"}, r"rel_pos_bias can't be split by heads"),
    ],
)
def test_what_has_no_plan_is_named(options: dict[str, Any], message: str) -> None:
    from fastvit.integrations.parallel import plan

    with pytest.raises(ValueError, match=message):
        plan(fastvit.ViT(**SIZES | options))


def test_an_accelerated_model_of_timm_has_a_plan() -> None:
    from fastvit.integrations.parallel import plan

    model = fastvit.accelerate(timm.models.vision_transformer.VisionTransformer(**SIZES))
    assert plan(model).keys() == plan(fastvit.ViT(**SIZES)).keys()


def test_wrapped_layers_and_other_models_have_no_plan() -> None:
    from fastvit.integrations.parallel import plan

    model = fastvit.ViT(**SIZES)
    model.blocks[1].mlp.fc2 = nn.Sequential(model.blocks[1].mlp.fc2)
    model.blocks[1].mlp.fc2.in_features = 256
    with pytest.raises(ValueError, match=r"blocks.1.mlp.fc2 is a Sequential; accepted: nn.Linear"):
        plan(model)
    with pytest.raises(ValueError, match=r"blocks.0 is a AxialBlock, which has no attn to split"):
        plan(AxialViT(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2))
    with pytest.raises(ValueError, match=r"a Linear has no plan; accepted: fastvit.ViT"):
        plan(nn.Linear(2, 2))  # type: ignore[arg-type]
