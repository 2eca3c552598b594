"""What a run keeps of a trajectory's tokens equals what transformers and numpy say of them."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.config import Config
from learners.token_view import token_texts
from tests.learner_cases import make_config, make_groups, make_policy, open_learner, train_step


def _config() -> Config:
    siren = {"use": "siren", "settings": {"nucleus_mass": 1.0, "peak_quantile": 0.7}}
    losses = {"losses": {"policy": {"use": "policy_gradient"}, "siren": siren}}
    return Config.model_validate(make_config().model_dump() | {"objective": losses})


def test_columns_are_the_policys_and_training_goes_on(tmp_path: Path) -> None:
    policy_dir = make_policy(tmp_path)
    group = make_groups(0)[1]
    model = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32)
    with open_learner(_config(), policy_dir) as learner:
        views = learner.view([(group, 0), (group, 1)])
        train_step(learner, 0)
    for trajectory, view in zip(group.trajectories[:2], views, strict=True):
        context = trajectory.train_context_tokens
        given = trajectory.context_tokens if context is None else context
        tokens = torch.tensor(np.concatenate([given, trajectory.token_ids]))[None].long()
        with torch.no_grad():
            logits = model(tokens).logits[0, len(given) - 1 : -1] / trajectory.temperature
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1).numpy()
        mask = trajectory.loss_mask
        found = np.array([np.nan if e is None else e for e in view.entropies])
        assert np.isnan(found[~mask]).all()
        assert np.abs(found[mask] - entropy[mask]).max() < 2e-4
        expected = np.zeros(len(mask), dtype=bool)
        expected[mask] = entropy[mask] > np.quantile(entropy[mask], 0.7)
        assert view.is_peak == expected.tolist()
        assert view.policy_versions == [0] * len(mask)
    rewards = np.array(group.rewards, dtype=float)
    credit = (rewards - rewards.mean()) / rewards.std(ddof=1)
    for trajectory, view, advantage in zip(group.trajectories[:2], views, credit[:2], strict=True):
        assert np.allclose(view.advantages, advantage * trajectory.loss_mask, atol=1e-3)


def test_token_texts_join_to_the_text(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_policy(tmp_path))
    text = "1 plus 2\n is drei: \u20ac \U0001f600!"
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
