"""Prompts, and the order in which they are visited."""
