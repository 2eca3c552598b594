"""`hone chat`: a conversation with the policy in a terminal, through the OpenAI client.

Invariant: text of the model cannot move the cursor or hide itself: what is not printable is
escaped. Each answer names the version that gave it.
"""

from typing import Any, TextIO, cast

from cluster.errors import ConfigError, StageError
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
    max_tokens: int | None = None,
    temperature: float = 1.0,
) -> None:
    """Read lines, stream answers; ends with the input. `/new` forgets the conversation.

    A question that is refused (most often the conversation is too long) is told and not kept.
    `max_tokens` None: what the context leaves. Raises `ConfigError` when the endpoint does not know
    the key, `StageError` when it fails.
    """
    from openai import AuthenticationError, BadRequestError, OpenAIError

    options: dict[str, Any] = {"model": model, "temperature": temperature, "stream": True}
    options |= {} if max_tokens is None else {"max_tokens": max_tokens}
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
            text, name = _answer(client, messages, sink, options)
        except BadRequestError as error:
            messages.pop()
            sink.write(f"refused: {escape(_reason(error))} (/new starts over)\n")
            continue
        except AuthenticationError as error:
            raise ConfigError(
                "HONE_API_KEY: the endpoint does not know this key; `hone keys create NAME` makes "
                "one where it runs"
            ) from error
        except OpenAIError as error:
            raise StageError("chat", escape(_reason(error))) from error
        messages.append({"role": "assistant", "content": text})
        sink.write(f"\n[{escape(name)}]\n")


def _reason(error: Exception) -> str:
    """What the server says, without the client's words around it."""
    body: object = getattr(error, "body", None)
    if isinstance(body, dict):
        return str(cast(dict[str, object], body).get("message", error))
    return str(error)


def _answer(
    client: Any, messages: list[dict[str, str]], sink: TextIO, options: dict[str, Any]
) -> tuple[str, str]:
    parts: list[str] = []
    name = str(options["model"])
    for chunk in client.chat.completions.create(messages=messages, **options):
        name = str(chunk.model)
        for choice in chunk.choices:
            parts.append(choice.delta.content or "")
            sink.write("\n".join(escape(part) for part in parts[-1].split("\n")))
            sink.flush()
    return "".join(parts), name
