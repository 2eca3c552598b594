"""A buffer behind TLS: the URL names the authority that the server's certificate must be from.

The server of the tests speaks no TLS, so a relay in front of it does, as stunnel would.
"""

import ssl
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from benchmarks.relay import Relay
from cluster.embedded_redis import EmbeddedRedis
from cluster.errors import ConfigError
from cluster.redis_client import connect


def test_a_certificate_is_required_and_checked(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "1", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with EmbeddedRedis(tmp_path / "redis") as server:
        parts = urlsplit(server.url)
        relay = Relay(parts.port or 0, context)
        url = f"rediss://:{parts.password}@127.0.0.1:{relay.port}/0"
        try:
            connect(f"{url}?ssl_ca_certs={certificate}").set("key", "value")
            assert connect(server.url).get("key") == b"value"
            with pytest.raises(ConfigError, match="CERTIFICATE_VERIFY_FAILED"):
                connect(url, retry_s=0.2)
            with pytest.raises(ConfigError, match="did not"):
                connect(url.replace("rediss", "redis"), retry_s=0.2)
        finally:
            relay.shut()
