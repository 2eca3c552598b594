"""The policy as a directory: config, weights and tokenizer that vLLM and transformers both load.

Invariant: a directory that `prepare` returns is complete; it is built beside its place and renamed,
so a crash leaves nothing half made, and a second call finds the first one's result, without a wait
for the libraries that make one. Called by the launcher before any actor starts.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from cluster.config import GgufPolicy, Policy, PretrainedPolicy, TinyPolicy
from cluster.errors import ConfigError
from learners.tokenizer import EOS, PAD, train_tokenizer

CACHE_DIR = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hone"
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def prepare(
    policy: Policy,
    texts: Sequence[str],
    cache_dir: Path,
    out_dir: Path,
    seed: int = 0,
    models: Path | None = None,
) -> Path:
    """The directory of `policy`, made when it is not there yet.

    `texts` train the tiny policy's tokenizer and `seed` draws its weights; both are unused
    otherwise. `cache_dir` outlives runs (a dequantized GGUF model), `out_dir` belongs to this run.
    On a cluster `models`, which all nodes see, takes the place of this machine's caches.
    """
    cache_dir = models or cache_dir
    if isinstance(policy, TinyPolicy):
        return _once(out_dir, lambda target: _write_tiny(policy, texts, target, seed))
    if isinstance(policy, GgufPolicy):
        name = f"{policy.package}-{Path(policy.file).stem}-{policy.dtype}"
        return _once(cache_dir / name, lambda target: _write_dense(policy, target))
    return _pretrained(policy, models)


def _once(place: Path, write: Callable[[Path], None]) -> Path:
    if (place / "config.json").is_file():
        return place
    building = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    write(building)
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()
    building.rename(place)
    return place


def _write_tiny(policy: TinyPolicy, texts: Sequence[str], target: Path, seed: int) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = train_tokenizer(texts, policy.vocab_size)
    tokenizer.save_pretrained(target)
    vocabulary = tokenizer.get_vocab()
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=policy.hidden_size,
        intermediate_size=-(-policy.hidden_size * 8 // 3 // 64) * 64,
        num_hidden_layers=policy.num_layers,
        num_attention_heads=policy.num_heads,
        num_key_value_heads=max(1, policy.num_heads // 2),
        head_dim=64 if policy.hidden_size >= 64 * policy.num_heads else 32,  # sizes vLLM has on CPU
        max_position_embeddings=policy.context_length,
        # Keeps the variance of what passes a layer. The library's 0.02 suits widths of thousands;
        # a narrow decoder begins almost mute with it and learns much more slowly.
        initializer_range=policy.hidden_size**-0.5,
        tie_word_embeddings=True,
        use_cache=True,
        pad_token_id=vocabulary[PAD],
        eos_token_id=vocabulary[EOS],
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.to(getattr(torch, policy.dtype)).save_pretrained(target)


def _write_dense(policy: GgufPolicy, target: Path) -> None:
    spec = find_spec(policy.package)
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise ConfigError(f"policy.package: {policy.package!r} must be an installed package")
    folder = Path(places[0])
    if not (folder / policy.file).is_file():
        known = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "none"
        raise ConfigError(
            f"policy.file: {policy.package!r} has no {policy.file!r} (GGUF files there: {known})"
        )
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    dtype: torch.dtype = getattr(torch, policy.dtype)
    config = AutoConfig.from_pretrained(folder, gguf_file=policy.file)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = load_gguf_checkpoint(
        str(folder / policy.file), return_tensors=True, model_to_load=model, torch_dtype=dtype
    )["tensors"]
    missing = set(model.load_state_dict(weights, strict=False).missing_keys)
    if untied := missing - set(model.all_tied_weights_keys):
        raise ConfigError(f"policy.file: {policy.file!r} must hold all weights, lacks {untied}")
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=policy.file).save_pretrained(target)


def _pretrained(policy: PretrainedPolicy, models: Path | None) -> Path:
    local = Path(policy.model).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ConfigError(f"policy.model: {local} must hold a Hugging Face config.json")
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        return Path(snapshot_download(policy.model, cache_dir=models, allow_patterns=_HUB_FILES))
    except Exception as error:
        raise ConfigError(
            f"policy.model: {policy.model!r} is neither a directory nor a hub model "
            f"that can be fetched: {error}"
        ) from error
