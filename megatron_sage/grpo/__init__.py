"""The method as pure mathematics on tensors: no model, no process group, nothing of ours imported.

Schedule -> (a, b, std) per step -> log-probability, clipped ratio loss, gradient equalizer and trust region, after
SAGE-GRPO (arXiv 2603.21872) and the samplers it is compared with. Errors are one-line ValueErrors.
"""
