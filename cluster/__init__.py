"""Contracts shared by every Hone process: records, config, replay buffer, ledger, metrics. Imports
no torch and no vllm.
"""
