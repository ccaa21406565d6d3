"""Tensors out of files, and into them: no code in a file is ever run, and what is cut short is named."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

log = logging.getLogger("fastvit")

HUB = "hf-hub:"
# Where training scripts put the weights: a teacher goes before its student, an average before its model.
_NESTED = ("model_ema", "ema", "state_dict_ema", "teacher", "state_dict", "model", "module", "params", "student")
RUN = "checkpoint.pt"  # of a run of `fastvit train` that is not done
_WEIGHTS = (
    "model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin", RUN,
)  # fmt: skip
_CONFIGS = ("config.json", "open_clip_config.json")


@dataclass
class Raw:
    """What a file holds.

    Args:
        name: of the file, for messages.
        tensors: by their names there; of an .npz numpy's arrays.
        config: the configuration that lies beside them, {} without one.
    """

    name: str
    tensors: dict[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def npz(self) -> bool:
        """Whether these are arrays of an .npz."""
        return any(isinstance(value, np.ndarray) for value in self.tensors.values())


def read(source: str | os.PathLike[str] | Mapping[str, Any] | Raw) -> Raw:
    """The tensors of a file, of a folder as Hugging Face has it, of ``hf-hub:<model>``, or of a state_dict; or those
    read before.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is damaged, holds other things than tensors, or has no weights.
    """
    if isinstance(source, Raw):
        return source
    if isinstance(source, Mapping):
        return Raw("the state_dict", _tensors(source, "the state_dict"))
    if str(source).startswith(HUB):
        return _folder(_download(str(source).removeprefix(HUB)))
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    return _file(path)


def _download(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(f"{HUB}{model}: pip install huggingface_hub, which fetches it") from error
    return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.bin", "*.json"]))


def _folder(folder: Path) -> Raw:
    config = next((folder / name for name in _CONFIGS if (folder / name).is_file()), None)
    given = {} if config is None else _json(config)
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return Raw(str(folder / name), _file(folder / name).tensors, given)
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = sorted(set(_json(index)["weight_map"].values()))
            if any(Path(part).name != part for part in parts):
                raise ValueError(f"{index} names files outside of its folder: {parts}")
            tensors = {name: value for part in parts for name, value in _file(folder / part).tensors.items()}
            return Raw(str(index), tensors, given)
    raise ValueError(f"{folder} has no weights; accepted: {', '.join(_WEIGHTS)}, or an index of their parts")


Pixels = tuple[float, ...]


def pixel_statistics(
    source: Any, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, channels: int | None = None
) -> tuple[Pixels, Pixels]:
    """(mean, std) of the pixels, 0 to 1, for weights: what is given, else what they were trained with, as timm's
    config.json or transformers' preprocessor_config.json says beside them, else 0.5 as in the paper's code.

    Raises:
        ValueError: neither one number nor one of each channel, or a std that is not positive.
    """
    given = mean is not None and std is not None
    told = None if given or not isinstance(source, str | os.PathLike) else _pixels_told(source)
    if told is not None:
        log.info("%s: pixels were normalised by mean %s and std %s", source, *told)
    default = told or ((0.5,), (0.5,))
    found = tuple(default[0] if mean is None else mean), tuple(default[1] if std is None else std)
    for name, values in zip(("mean", "std"), found, strict=True):
        if channels is not None and len(values) not in (1, channels):
            raise ValueError(f"{name}: {len(values)} numbers; accepted: 1, or {channels} as the images have channels")
        if not all(math.isfinite(value) and (value > 0 or name == "mean") for value in values):
            raise ValueError(f"{name}: {list(values)}; accepted: finite numbers{', above 0' if name == 'std' else ''}")
    return found


def _pixels_told(source: str | os.PathLike[str]) -> tuple[Pixels, Pixels] | None:
    folder = _download(str(source).removeprefix(HUB)) if str(source).startswith(HUB) else Path(source)
    for name, keys in (("config.json", ("mean", "std")), ("preprocessor_config.json", ("image_mean", "image_std"))):
        if (folder / name).is_file():
            told = _json(folder / name)
            told = {**told, **(told.get("pretrained_cfg") or {})}
            if all(isinstance(told.get(key), list) for key in keys):
                mean, std = (tuple(map(float, told[key])) for key in keys)
                return mean, std
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object")
    return found


def _file(path: Path) -> Raw:
    if path.suffix == ".npz":
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is no .npz file (a zip of arrays), or it is cut short")
        try:
            with np.load(path, allow_pickle=False) as file:
                return Raw(str(path), {name: file[name] for name in file.files})
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} can't be read: {error}") from error
    if path.suffix == ".safetensors":
        try:
            return Raw(str(path), load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is no .safetensors file, or it is cut short: {error}") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no file of tensors alone, and nothing else is unpickled; "
            "save model.state_dict() instead of the model"
        ) from error
    except (RuntimeError, EOFError, KeyError, OSError) as error:
        raise ValueError(f"{path} is no file of torch.save, or it is cut short: {error}") from error
    return Raw(str(path), _tensors(found, str(path)))


def _tensors(found: Any, name: str) -> dict[str, Tensor]:
    """The weights among what a training script saved."""
    if isinstance(found, Mapping) and {"objective", "average", "chance"} <= set(found):
        found = _of_a_run(found)
    while isinstance(found, Mapping):
        inner = next((key for key in _NESTED if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        if others := [key for key in _NESTED if key != inner and isinstance(found.get(key), Mapping)]:
            log.info("%s: the weights are those of %r, not of %s", name, inner, ", ".join(map(repr, others)))
        found = found[inner]
    if not isinstance(found, Mapping):
        raise ValueError(f"{name} holds a {type(found).__name__}, not a state_dict")
    tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{name} has no tensors; its keys are {sorted(map(str, found))[:8]}")
    return tensors


def _of_a_run(state: Mapping[str, Any]) -> dict[str, Any]:
    """The model's weights in a checkpoint of fastvit.training, the averaged ones where there are any."""
    found = state["objective"] if state["average"] is None else state["average"]
    names = {name: name.removeprefix("module.") for name in found}
    return {own.removeprefix("model."): found[name] for name, own in names.items() if own.startswith("model.")}


def write(path: str | os.PathLike[str], tensors: Mapping[str, Any]) -> None:
    """Write tensors as .safetensors, .npz or .pth, by the suffix; the file is there as a whole or not at all."""
    path = Path(path)
    with _whole(path) as part:
        if path.suffix == ".safetensors":
            save_file({name: value.contiguous() for name, value in tensors.items()}, part, {"format": "pt"})
        elif path.suffix == ".npz":
            with part.open("wb") as file:
                np.savez(file, **tensors)
        else:
            torch.save(dict(tensors), part)


def write_folder(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write tensors and their configuration as Hugging Face has them, each as a whole or not at all."""
    path.mkdir(parents=True, exist_ok=True)
    write(path / _WEIGHTS[0], tensors)
    with _whole(path / _CONFIGS[0]) as part:
        part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``path`` when all is written."""
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
