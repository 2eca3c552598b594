"""Two replicas behind one TLS port, on real engines: both answer, a version reaches both, and a
promotion made on one of them holds on both and over a restart.
"""

import ssl
import subprocess
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from benchmarks.endpoint_load import free_port
from cluster.config import Config
from cluster.errors import ConfigError
from serve import endpoint, endpoint_settings
from serve.api_keys import KeyStore
from tests.endpoint_cases import make_run, publish

ASKED = {"model": "policy", "prompt": "1 + 2 =", "max_tokens": 4}


def _certificate(folder: Path) -> tuple[str, str]:
    key, certificate = str(folder / "key.pem"), str(folder / "cert.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "1", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, certificate


@pytest.mark.slow  # a row of `make show AREA=serve`
@pytest.mark.timeout(600)
def test_two_replicas_share_a_tls_port_and_a_release(
    tiny_config: Config, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    run = make_run(tiny_config, tiny_policy_dir, tmp_path / "runs")
    publish(run, 1)
    secret = KeyStore(tmp_path / "runs" / "keys.json").create("tester", ["query", "admin"])
    settings = endpoint_settings.resolve(
        str(run.path), runs=tmp_path / "runs", max_engines=1,
        overrides=["limits.requests_per_minute=0"],
    )  # fmt: skip
    key, certificate = _certificate(tmp_path)
    door = endpoint_settings.Door(port=free_port(), tls_key=key, tls_cert=certificate)
    headers = {"Authorization": f"Bearer {secret}"}
    trusted = ssl.create_default_context(cafile=certificate)

    def ask(count: int) -> Counter[str]:
        """Each request on a connection of its own, so that the kernel chooses a replica."""
        answers = [
            httpx.post(
                f"{door.url}/v1/completions", json=ASKED, headers=headers, verify=trusted,
                timeout=60,
            )
            for _ in range(count)
        ]  # fmt: skip
        assert {answer.status_code for answer in answers} == {200}
        return Counter(answer.headers["x-policy-version"] for answer in answers)

    def until_all_answer(version: str) -> None:
        deadline = time.monotonic() + 60
        while ask(10) != {version: 10}:
            assert time.monotonic() < deadline, f"a replica did not get to version {version}"
            time.sleep(0.2)

    with endpoint.running(settings, door, replicas=2):
        with pytest.raises(ConfigError, match="--port"), endpoint.running(settings, door):
            pass
        assert ask(20) == {"1": 20}
        publish(run, 2)
        until_all_answer("2")
        answers = [httpx.get(f"{door.url}/health", verify=trusted) for _ in range(30)]
        assert len({answer.headers["x-replica"] for answer in answers}) == 2
        with pytest.raises(httpx.HTTPError):
            httpx.get(door.url.replace("https", "http") + "/health")

        promotion = httpx.post(
            f"{door.url}/admin/release", json={"action": "promote", "version": 1},
            headers=headers, verify=trusted, timeout=60,
        )  # fmt: skip
        assert promotion.status_code == 200, promotion.text
        until_all_answer("1")
        publish(run, 3)
        time.sleep(2)  # ten looks at the run by each replica
        assert ask(20) == {"1": 20}

    assert not (run.weights / "policy_00000001.safetensors").exists()
    with endpoint.running(settings, door):
        assert ask(5) == {"1": 5}
