"""What a `RecommenderLLM` keeps on disk: only what was trained, and what it must be put together with.

config.json                settings, the language model's name and identity, the catalogue's fingerprint
model.safetensors          trained parts (and a frozen random head, which nothing else could bring back)
adapter_config.json        the LoRA updates in peft's own form; absent with `lora_rank=0`
adapter_model.safetensors
"""

from __future__ import annotations

import copy
import hashlib
import json
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hellm._folders import new_folder
from hellm.models.llm.item_tokens import check_item_embeddings
from hellm.models.llm.language_model import has_lora, language_model_identity, load_language_model, token_embedding
from hellm.models.llm.prompt import ids_digest
from hellm.models.llm.settings import SETTINGS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from hellm.models.llm.recommender import RecommenderLLM
    from hellm.models.llm.residual import SequenceModel

__all__ = [
    "base_identity",
    "check_base",
    "load_saved",
    "load_trained",
    "open_saved",
    "renamed",
    "save_trained",
    "trained_tensors",
]

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_LORA = "adapter_model.safetensors"
# What the names of parts that were named otherwise before began with -> what they begin with.
_BEFORE = {
    "query_projector.": "head.projector.",
    "log_scale": "head.log_scale",
    "residual_gate": "residual.gate",
    "items.running_graph.": "context.running_graph.",
}
# Parameters of the language model are under this name.
_LANGUAGE_MODEL = "prompted.language_model."


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that make this model other than a fresh one, by their names in the module; they share its memory."""
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name.startswith("head.")
    }


def load_trained(model: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copy `tensors` into `trained_tensors(model)`. Raises: ValueError, other names or shapes; `what` has them."""
    own, tensors = trained_tensors(model), renamed(tensors)
    for kind, names in (("lacks", own.keys() - tensors.keys()), ("has unknown", tensors.keys() - own.keys())):
        if names:
            raise ValueError(f"{what} {kind} {', '.join(sorted(names)[:3])}: it is of a model with other settings")
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(f"{what} must have {name} {list(parameter.shape)}, got {list(tensors[name].shape)}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that they have now, of those that they were saved by; no parameter is a scalar any more."""
    return {_renamed(name): value if value.dim() else value.reshape(1) for name, value in tensors.items()}


def _renamed(name: str) -> str:
    for before, now in _BEFORE.items():
        if name.startswith(before):
            return now + name.removeprefix(before)
    return name


def base_identity(model: RecommenderLLM) -> dict[str, Any]:
    """Plain values that tell the language model and tokenizer from others, by content."""
    items = model.items
    titles = None if items.title_lengths is None else ids_digest(items.title_ids, items.title_lengths)
    return model.prompted.identity | {"title_tokens": titles}


def catalogue(
    tables: Mapping[str, Tensor],
    titles: Sequence[str | None] | None,
    sequence_model: SequenceModel | None,
    *,
    missing: str | None = "",
) -> dict[str, Any]:
    """Plain values that tell one catalogue from another: sizes, and a hash of all that the model is told of it.

    `missing` stands for a missing title, which may be None or "".
    """
    digest = hashlib.sha256()
    if sequence_model is not None:
        tables = {**tables, "(sequence model)": sequence_model.item_keys()}
    for name, table in tables.items():
        digest.update(f"{name}{list(table.shape)}".encode())
        if not table.is_meta:
            digest.update(table.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    digest.update(json.dumps([title or missing for title in titles or []]).encode())
    return {
        "num_items": len(next(iter(tables.values()))),
        "tables": {name: table.shape[1] for name, table in tables.items()},
        "titles": bool(titles),
        "fingerprint": digest.hexdigest()[:16],
    }


def save_trained(model: RecommenderLLM, folder: str | os.PathLike[str]) -> None:
    """Write `model` into `folder`, whole or not at all, in place of one that is there."""
    from safetensors.torch import save_file

    weight = token_embedding(model.prompted.base).weight
    config = {
        "settings": model.settings,
        "language_model": base_identity(model) | {"dtype": str(weight.dtype).removeprefix("torch.")},
        "catalogue": catalogue(model.items.tables, model.item_titles, model.sequence_model),
        "table_scales": model.items.table_scales,
    }
    tensors = {name: value.cpu().contiguous().clone() for name, value in trained_tensors(model).items()}
    own = {name: value for name, value in tensors.items() if not name.startswith(_LANGUAGE_MODEL)}
    with new_folder(folder, kind="language model", overwrite=True) as new:
        (new / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(own, new / _WEIGHTS, metadata={"format": "pt"})
        if has_lora(model.prompted.language_model):
            _save_lora(model.prompted.language_model, new, config["language_model"])


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Raises: FileNotFoundError or ValueError, naming the file, where `folder` holds no such model."""
    path = Path(folder) / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {folder} holds no saved RecommenderLLM")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict) or not {"settings", "language_model", "catalogue", "table_scales"} <= config.keys():
        raise ValueError(f"{path} is not the config.json of a saved RecommenderLLM")
    unknown = sorted(config["settings"].keys() - set(SETTINGS))
    if unknown:
        raise ValueError(f"{path} must have settings among {', '.join(SETTINGS)}, got {', '.join(unknown)}")
    return config


def open_saved(
    folder: str | os.PathLike[str],
    item_embeddings: Mapping[str, Tensor],
    *,
    language_model: PreTrainedModel | str | os.PathLike[str] | None,
    tokenizer: Any,
    item_titles: Sequence[str | None] | None,
    sequence_model: SequenceModel | None,
) -> tuple[dict[str, Any], PreTrainedModel, Any]:
    """config.json, language model and tokenizer of a saved model, checked against what it was trained with.

    Raises: as `RecommenderLLM.from_pretrained`.
    """
    config = read_config(folder)
    settings, identity = config["settings"], config["language_model"]
    titles = item_titles if settings["titles"] else None
    check_item_embeddings(item_embeddings)
    known = (item_embeddings, titles, sequence_model if settings["sequence_residual"] else None)
    given = catalogue(*known)
    if config["catalogue"] == catalogue(*known, missing=None):
        given = config["catalogue"]
    check_same(f"{folder} was trained with the catalogue", config["catalogue"], given)
    if not isinstance(language_model, nn.Module):
        moved = language_model is not None
        name, revision = (language_model, None) if moved else (identity["name"], identity["revision"])
        try:
            language_model, tokenizer = load_language_model(
                name,
                dtype=_dtype(identity, folder),
                revision=revision,
                num_layers=identity["num_layers"],
                random_seed=identity.get("random_seed"),
            )
        except FileNotFoundError as error:
            raise error if moved else FileNotFoundError(f"{error}; if it was moved, say where it is now") from None
    check_base(folder, identity, language_model_identity(language_model))
    return config, language_model, tokenizer


def check_base(what: Any, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises: ValueError naming both language models, where anything differs that both have, but name and revision."""
    check_same(f"{what} was trained with the language model", saved, given)


def load_saved(model: RecommenderLLM, folder: str | os.PathLike[str]) -> None:
    """The trained tensors of `folder` into a model of the same settings. Raises: FileNotFoundError, ValueError."""
    tensors = _read(Path(folder) / _WEIGHTS)
    if has_lora(model.prompted.language_model):
        # peft leaves the name of the adapter out of its files.
        for name, value in _read(Path(folder) / _LORA).items():
            tensors[_LANGUAGE_MODEL + name.replace(".weight", ".default.weight")] = value
    load_trained(model, tensors, str(folder))


def check_same(what: str, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises: ValueError naming both, where an entry differs that both have; name and revision may."""
    skip = ("name", "revision", "dtype")
    both = [key for key in saved if key in given and key not in skip and None not in (saved[key], given[key])]
    differ = [key for key in both if not (_agree if key == "config" else operator.eq)(saved[key], given[key])]
    if differ:
        raise ValueError(f"{what} {_text(saved, given, differ)}, got {_text(given, saved, differ)}")


def _agree(saved: Any, given: Any) -> bool:
    """Equal in the entries that both have: other versions of transformers know other entries of a configuration."""
    if isinstance(saved, Mapping) and isinstance(given, Mapping):
        return all(_agree(saved[key], given[key]) for key in saved.keys() & given.keys())
    return saved == given


def _text(values: Mapping[str, Any], other: Mapping[str, Any], differ: Sequence[str]) -> str:
    values = dict(values)
    config, others = values.pop("config", {}), other.get("config", {})
    if "config" in differ:
        values |= {key: config[key] for key in config.keys() & others.keys() if not _agree(config[key], others[key])}
    parts = [f"{key} {value}" for key, value in values.items() if key != "name" and value is not None]
    return f"{values['name']} ({', '.join(parts)})" if "name" in values else ", ".join(parts)


def _dtype(identity: Mapping[str, Any], folder: Any) -> torch.dtype:
    dtype = getattr(torch, str(identity.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{Path(folder) / _CONFIG} must name a dtype of torch, got {identity.get('dtype')!r}")
    return dtype


def _save_lora(language_model: PeftModel, folder: Path, identity: Mapping[str, Any]) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    adapter = copy.deepcopy(language_model.peft_config["default"])
    adapter.base_model_name_or_path, adapter.revision = identity["name"], identity["revision"]
    adapter.inference_mode = True
    adapter.save_pretrained(str(folder))
    tensors = get_peft_model_state_dict(language_model, save_embedding_layers=False)
    save_file(
        {name: value.cpu().contiguous().clone() for name, value in tensors.items()},
        folder / _LORA,
        metadata={"format": "pt"},
    )


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not readable: {error}") from None
