"""Ray actors and the run loop: rollout workers, reward workers, weight sync, controller."""
