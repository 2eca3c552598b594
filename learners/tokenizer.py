"""Text to tokens: the tiny policy's own tokenizer, and one way to render a task for any policy.

Invariant: context and completion are tokenized apart, so the boundary between them never moves;
whoever needs the tokens of a task or of a worked solution (rollouts, warm start, probes) calls
`render` and `encode_completion` and nothing else.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster.errors import ConfigError
from cluster.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, EOS = "<|pad|>", "<|end|>"
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Byte-level BPE in which every digit is a token of its own, trained on the task texts.

    The chat template is the plain text of the messages, one per line. Raises `ConfigError` when
    `vocab_size` cannot hold the 256 bytes and two special tokens.
    """
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ConfigError(
            f"policy.vocab_size must be at least {len(alphabet) + 2} "
            f"(all bytes, padding and end of sequence), got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(policy_dir: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a prepared policy directory; it has an end-of-sequence token."""
    from transformers import AutoTokenizer

    tokenizer = cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(policy_dir))
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"policy: the tokenizer in {policy_dir} must have an eos_token")
    return tokenizer


def render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """Context tokens of a conversation, ready for the policy to continue.

    Uses the tokenizer's chat template; a base model without one gets one message per line.
    """
    if tokenizer.chat_template is None:
        text = "".join(f"{message.content}\n" for message in messages)
    else:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        text = cast(
            str, tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        )
    return tokenizer.encode(text, add_special_tokens=False)


def encode_completion(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Tokens of a completion as the policy should write it: the text, then end of sequence."""
    return [*tokenizer.encode(text, add_special_tokens=False), cast(int, tokenizer.eos_token_id)]
