"""A tokenizer small enough to write here."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["<s>", "</s>", "<eos>", "a", "b", "c", "user", "<mask>", ":", "assistant"]
TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
GENERATION = "{% if add_generation_prompt %}assistant :{% endif %}"


def tokenizer_json() -> bytes:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="c"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "<eos>", "<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.enable_truncation(2)
    return bytes(tokenizer.to_str(), "utf-8")
