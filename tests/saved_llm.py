"""A language model small enough for any test."""

from __future__ import annotations

from pathlib import Path

import torch


def save_tiny_llm(folder: Path) -> Path:
    """Write a random Llama of two layers with a tokenizer of single letters into `folder`."""
    import transformers
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    letters = {chr(code): code - 30 for code in range(32, 127)} | {"<s>": 0, "\n": 1}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
