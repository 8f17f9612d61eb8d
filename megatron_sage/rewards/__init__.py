"""Rewards: scores of decoded clips."""
