"""`hone chat`: a conversation with the policy in a terminal, through the OpenAI client.

Invariant: text of the model cannot move the cursor or hide itself: what is not printable is
escaped. Each answer names the version that gave it.
"""

from typing import Any, TextIO

from cluster.errors import StageError
from cluster.log import escape


def connect(url: str, key: str) -> Any:
    """The official client for the endpoint at `url`."""
    from openai import OpenAI

    return OpenAI(base_url=f"{url.rstrip('/')}/v1", api_key=key)


def talk(
    client: Any,
    model: str,
    source: TextIO,
    sink: TextIO,
    *,
    system: str = "",
    max_tokens: int = 256,
    temperature: float = 1.0,
) -> None:
    """Read lines, stream answers; ends with the input. `/new` forgets the conversation."""
    from openai import OpenAIError

    start = [{"role": "system", "content": system}] if system else []
    messages = [*start]
    sink.write(f"talking to {model}; an empty line or Ctrl-D ends, /new starts over\n")
    while True:
        sink.write("> ")
        sink.flush()
        line = source.readline().strip()
        if not line:
            sink.write("\n")
            return
        if line == "/new":
            messages = [*start]
            continue
        messages.append({"role": "user", "content": line})
        try:
            text, name = _answer(client, model, messages, sink, max_tokens, temperature)
        except OpenAIError as error:
            raise StageError("chat", escape(str(error))) from error
        messages.append({"role": "assistant", "content": text})
        sink.write(f"\n[{escape(name)}]\n")


def _answer(
    client: Any,
    model: str,
    messages: list[dict[str, str]],
    sink: TextIO,
    max_tokens: int,
    temperature: float,
) -> tuple[str, str]:
    parts: list[str] = []
    name = model
    for chunk in client.chat.completions.create(
        model=model, messages=messages, max_tokens=max_tokens, temperature=temperature, stream=True
    ):
        name = str(chunk.model)
        for choice in chunk.choices:
            parts.append(choice.delta.content or "")
            sink.write("\n".join(escape(part) for part in parts[-1].split("\n")))
            sink.flush()
    return "".join(parts), name
