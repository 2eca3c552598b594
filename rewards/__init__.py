"""Verifiers and tasksets: the pure checking side. Imports no torch, vllm or ray at module level."""
