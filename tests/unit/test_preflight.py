"""What every node of a cluster has to see, and what is said of one that does not."""

from pathlib import Path

from actors import preflight
from cluster import config_file
from cluster.config import Config
from tests.conftest import TINY


def test_a_model_directory_of_the_users_has_to_be_on_every_node(tmp_path: Path) -> None:
    def with_model(model: str) -> Config:
        policy = {"type": "pretrained", "model": model, "context_length": 128}
        return config_file.parse({**TINY, "policy": policy}, "test")

    own, of_a_hub = with_model(str(tmp_path)), with_model("someone/a-model")
    assert preflight.model_place(own) == str(tmp_path)
    assert preflight.model_place(of_a_hub) == ""
    assert preflight.model_place(config_file.parse(TINY, "test")) == ""
    mark = tmp_path / "mark"
    mark.write_text("token")
    seen, missing, packages = preflight._look(str(mark), str(tmp_path))
    assert (seen, missing) == ("token", "")
    assert packages
    gone = str(tmp_path / "gone")
    assert preflight._look(gone, gone)[:2] == ("", gone)
