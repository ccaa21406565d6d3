"""What a layout of weights is: a list of renamings between a library's names and ours.

``{i}`` stands for the number of a block, ``{j}`` for another number, ``{p}`` for "weight" or "bias". Names are those
inside the tower: whatever stands before the tower's own ("vit.", "visual.", "module.model.") is taken off first, and
what is not in the tower (a classifier beside it, a text tower) has a "/" in front here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
Config = Mapping[str, Any]


@cache
def _pattern(name: str) -> re.Pattern[str]:
    text = re.escape(name).replace(r"\{p\}", "(?P<p>weight|bias)")
    for number in "ij":
        text = text.replace(rf"\{{{number}\}}", rf"(?P<{number}>\d+)")
    return re.compile(text)


@dataclass(frozen=True)
class Rule:
    """Tensors of theirs, joined along the first dimension, are tensors of ours, cut in as many thirds as ``parts`` say.

    ``shape`` is how theirs differ: "token" (D,) or (1, D) for (1, 1, D), "rows" (N, D) for (1, N, D), "transposed".
    ``gated`` is for MLPs that have a gate, which theirs name apart and ours do not.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    shape: str = ""
    parts: tuple[int, ...] = (1, 2)
    gated: bool = False

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Theirs to ours."""
        x = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        if self.shape == "token":
            x = x.reshape(1, 1, -1)
        elif self.shape == "rows":
            x = x.reshape(1, *x.shape[-2:])
        elif self.shape == "transposed":
            x = x.T.contiguous()
        if len(self.ours) == 1:
            return [x]
        return [part.clone() for part in x.split([len(x) // 3 * count for count in self.parts])]

    def backward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Ours to theirs, in the first of the shapes that theirs may have."""
        x = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        if self.shape == "token":
            x = x.flatten()
        elif self.shape == "rows":
            x = x[0]
        elif self.shape == "transposed":
            x = x.T.contiguous()
        return [x] if len(self.theirs) == 1 else list(x.chunk(len(self.theirs)))


def rename(theirs: str | tuple[str, ...], ours: str | tuple[str, ...], shape: str = "") -> Rule:
    """One rule."""
    return Rule((theirs,) if isinstance(theirs, str) else theirs, (ours,) if isinstance(ours, str) else ours, shape)


def same(*pairs: tuple[str | tuple[str, ...], str]) -> tuple[Rule, ...]:
    """Rules for weights and biases: ".{p}" is added to both names."""
    rules = []
    for theirs, ours in pairs:
        names = (theirs,) if isinstance(theirs, str) else theirs
        rules.append(Rule(tuple(f"{name}.{{p}}" for name in names), (f"{ours}.{{p}}",)))
    return tuple(rules)


def block(theirs: str, **names: str | tuple[str, ...]) -> tuple[Rule, ...]:
    """Rules for what is below ``theirs`` in a block; a keyword's double underscore is a dot of our name."""
    pairs = []
    for ours, name in names.items():
        each = (name,) if isinstance(name, str) else name
        pairs.append((tuple(f"{theirs}.{one}" for one in each), f"blocks.{{i}}.{ours.replace('__', '.')}"))
    return same(*pairs)


def gated(theirs: str, first: tuple[str, ...], out: str) -> tuple[Rule, ...]:
    """Rules for a gated MLP below ``theirs``, whose ``first`` may be two, gate and value; ours is packed so."""
    rules = block(theirs, mlp__fc1=first, mlp__fc2=out)
    return tuple(replace(one, gated=True) for one in rules)


def is_gated(state: Mapping[str, Tensor]) -> bool:
    """Whether the MLPs of weights under our names are."""
    fc1, fc2 = (state.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    return fc1 is not None and fc2 is not None and fc1.shape[0] == 2 * fc2.shape[1]


def blocks(state: Mapping[str, Tensor]) -> Iterator[int]:
    """Yield the numbers of the blocks that ``state``, under our names, has weights of."""
    found = (re.match(r"blocks\.(\d+)\.", name) for name in state)
    yield from sorted({int(match[1]) for match in found if match})


@dataclass(frozen=True)
class HuggingFace:
    """A kind of model in transformers, for folders that its ``from_pretrained`` takes.

    Args:
        model_type: its name in config.json.
        model: its class without a classifier.
        classifier: its class with one; None where it has none that reads what ours does.
        needs: our names of weights that all such models have, besides those of every Transformer.
        config: (weights under our names, arguments of :class:`fastvit.ViT`, name of the source) -> entries of
            config.json that only this kind has.
        unused: tensors that such a model holds in any case and does not read, from the weights under our names.
        gated: whether its MLPs may have a gate.
        no_embed_class: whether positions are for the class token and the patches alone, and registers have none.
        square: whether it takes square images only.
        labels: whether its classifier is described by labels.
        accelerated: whether its attention and MLPs are ones that :func:`fastvit.accelerate` replaces.
    """

    model_type: str
    model: str
    classifier: str | None
    needs: tuple[str, ...]
    config: Callable[[State, Mapping[str, Any], str], dict[str, Any]] = lambda state, options, name: {}
    unused: Callable[[State], State] = lambda state: {}
    gated: bool = False
    no_embed_class: bool = False
    square: bool = False
    labels: bool = True
    accelerated: bool = True


@dataclass(frozen=True)
class Layout:
    """One way to name a Vision Transformer's weights.

    Args:
        name: as users call it; layouts of a library's other models may have the same.
        mark: the tensor that every such file has; what precedes it is the tower's prefix.
        rules: theirs to ours.
        also: a pattern that one more name in the tower matches, where the mark alone does not tell.
        dropped: a pattern of names that are no part of the network that classifies or embeds images.
        tower: the prefix when such a file is written.
        options: arguments of :class:`fastvit.ViT` that shapes don't tell, from the file's configuration.
        finish: what is left to do to our names.
        begin: what is to be done to them before they are written.
        huggingface: (weights under our names) -> the kind of model in transformers; None in other libraries' layouts.
        written: names under which ``fastvit convert`` writes this layout; none: it is only read.
        heads: attention heads by width of the models in this layout, where they are not the plain ViT's.
    """

    name: str
    mark: str
    rules: tuple[Rule, ...]
    also: str = ""
    dropped: str = r"(?!)"
    tower: str = ""
    options: Callable[[Config], dict[str, Any]] = lambda config: {}
    finish: Callable[[State], None] = lambda state: None
    begin: Callable[[State], None] = lambda state: None
    huggingface: Callable[[State], HuggingFace] | None = None
    written: tuple[str, ...] = ()
    heads: Mapping[int, int] = field(default_factory=dict)

    def prefix(self, names: Sequence[str]) -> str | None:
        """What precedes the tower's names; None where these are names of another layout."""
        prefixes = [name.removesuffix(self.mark) for name in names if f".{name}".endswith(f".{self.mark}")]
        for prefix in sorted(prefixes, key=len):
            inside = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
            if not self.also or any(re.fullmatch(self.also, name) for name in inside):
                return prefix
        return None

    def to_ours(self, given: Mapping[str, Tensor]) -> tuple[State, list[str], list[str]]:
        """(weights under our names, names of no use, names that nothing is known about)."""
        prefix = self.prefix(list(given)) or ""
        left = {
            name.removeprefix(prefix) if name.startswith(prefix) else f"/{name}": value for name, value in given.items()
        }
        out: State = {}
        for each in self.rules:
            theirs = each.theirs if prefix else tuple(name.removeprefix("/") for name in each.theirs)
            for name in list(left):
                found = _pattern(theirs[0]).fullmatch(name)
                if found:
                    names = [one.format(**found.groupdict()) for one in theirs]
                    absent = [one for one in names if one not in left]
                    if absent:
                        raise ValueError(f"{prefix}{name} goes with {', '.join(absent)}, which is missing")
                    values = each.forward([left.pop(one) for one in names])
                    out |= zip((one.format(**found.groupdict()) for one in each.ours), values, strict=True)
        self.finish(out)
        useless = [name for name in left if re.fullmatch(self.dropped, name)]
        unknown = [name for name in left if name not in useless]
        return out, [name.removeprefix("/") for name in useless], [name.removeprefix("/") for name in unknown]

    def from_ours(self, state: Mapping[str, Tensor]) -> State:
        """Weights under our names as a file of this layout has them.

        Raises:
            ValueError: some have no name in it; they are listed.
        """
        left, with_gate = dict(state), is_gated(state)
        self.begin(left)
        out: State = {}
        for each in self.rules:
            for name in list(left):
                found = _pattern(each.ours[0]).fullmatch(name)
                if found and (with_gate or not each.gated):
                    names = [one.format(**found.groupdict()) for one in each.ours]
                    if all(one in left for one in names):
                        values = each.backward([left.pop(one) for one in names])
                        theirs = (one.format(**found.groupdict()) for one in each.theirs)
                        out |= zip(map(self._written, theirs), values, strict=True)
        if left:
            raise ValueError(f"the layout {self.name!r} has no names for {', '.join(sorted(left))}")
        return out

    def names(self, state: Mapping[str, Tensor]) -> bool:
        """Whether it has names for all of these weights, which are under ours."""
        patterns = [_pattern(ours) for each in self.rules for ours in each.ours]
        left = dict(state)
        self.begin(left)
        return all(any(pattern.fullmatch(name) for pattern in patterns) for name in left)

    def _written(self, name: str) -> str:
        return name.removeprefix("/") if name.startswith("/") else self.tower + name
