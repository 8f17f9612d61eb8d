"""How far the policy may move: Gaussian KL against a reference, and the weight lambda of that KL."""

import math
from typing import Any

import torch

STRATEGIES = ("none", "fixed", "step", "moving", "dual")
KINDS = ("fixed", "two_stage", "milder")
FEEDBACKS = ("relax", "tighten")


def term_weights(strategy: str, position_weight: float, velocity_weight: float) -> tuple[float, float]:
    """Weights of the KL to the position reference (initial model or anchor) and to the rollout's policy.

    ``fixed`` and ``moving`` have the first term alone, ``step`` the second, ``dual`` both with the given weights.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}: give one of {', '.join(STRATEGIES)}")
    weights = {"none": (0.0, 0.0), "fixed": (1.0, 0.0), "moving": (1.0, 0.0), "step": (0.0, 1.0)}
    return weights.get(strategy, (position_weight, velocity_weight))


def gaussian_kl_from_error(sum_sq_velocity_diff_B: torch.Tensor, count: int, b: float, std: float) -> torch.Tensor:
    """KL per element of the policy's step against a reference's, [B]: b^2/(2 std^2) mean (v - v_ref)^2.

    Exact, because both are Gaussians of one std whose means differ by b (v - v_ref): the reference's velocity is all
    it needs. ``sum_sq_velocity_diff_B`` is summed over the whole sample of ``count`` elements.
    """
    if not std > 0:
        raise ValueError(f"std is {std}: a deterministic step has no KL; use steps with std above 0 only")
    if count < 1:
        raise ValueError(f"count is {count}: a KL needs at least one element")
    return (b / std) ** 2 / (2 * count) * sum_sq_velocity_diff_B


def step_kl_log_prob(log_prob_old: torch.Tensor, log_prob_new: torch.Tensor) -> torch.Tensor:
    """logp_old - logp_new of the rollout's samples, [B]: its mean estimates KL(old || new) (paper, eq. 15).

    One sample's value may be negative, and near the old policy it is noise around a much smaller KL; the closed form
    with the rollout's velocity (gaussian_kl_from_error) has the same expectation and far less variance.
    """
    if log_prob_old.shape != log_prob_new.shape:
        raise ValueError(
            f"log-probabilities have shapes {list(log_prob_old.shape)} and {list(log_prob_new.shape)}: they must agree"
        )
    return log_prob_old.detach() - log_prob_new


class LambdaController:
    """Weight of the KL term, updated once after every optimizer step.

    ``fixed``: always ``lambda_max``. ``milder``: linear warm-up from ``lambda_min`` to ``lambda_max`` over
    ``warmup_steps`` updates, then constant (give it a lower ``lambda_max``). ``two_stage``: the same warm-up, then,
    with e = (mean of the last ``window`` KL values - target) / target,
    lambda <- clip(lambda (1 -+ gain clip(e, -1, 1)), lambda_min, lambda_max). ``feedback="relax"`` (minus; the paper's
    appendix A.6 as written) lowers lambda while the KL is above its target; ``"tighten"`` (plus; PPO's rule) raises it.
    """

    def __init__(
        self,
        kind: str = "two_stage",
        lambda_min: float = 1e-7,
        lambda_max: float = 1e-5,
        warmup_steps: int = 100,
        window: int = 10,
        target: float = 1e-4,
        gain: float = 0.1,
        feedback: str = "relax",
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind of lambda schedule is {kind!r}: give one of {', '.join(KINDS)}")
        if feedback not in FEEDBACKS:
            raise ValueError(f"feedback is {feedback!r}: give one of {', '.join(FEEDBACKS)}")
        if not (0 <= lambda_min <= lambda_max and math.isfinite(lambda_max)):
            raise ValueError(f"lambda_min {lambda_min}, lambda_max {lambda_max}: need 0 <= lambda_min <= lambda_max")
        if warmup_steps < 0 or window < 1:
            raise ValueError(f"warmup_steps {warmup_steps}, window {window}: need warmup_steps >= 0 and window >= 1")
        if not (math.isfinite(target) and target > 0 and 0 < gain <= 1):
            raise ValueError(f"target {target}, gain {gain}: need target > 0 and 0 < gain <= 1")
        if lambda_min == 0 and gain == 1:
            raise ValueError("lambda_min 0, gain 1: lambda could fall to 0 and never rise again; set either otherwise")
        self.kind = kind
        self.lambda_min = lambda_min
        self.lambda_max = lambda_max
        self.warmup_steps = warmup_steps
        self.window = window
        self.target = target
        self.gain = gain if feedback == "relax" else -gain
        self.updates = 0
        self.history: list[float] = []
        self.value = lambda_min if kind != "fixed" and warmup_steps > 0 else lambda_max

    def update(self, kl: float) -> float:
        """Take the KL realised in one optimizer step (the same number on every rank); return the next lambda.

        Raises ValueError for a KL that is not finite and then changes nothing.
        """
        kl = float(kl)
        if not math.isfinite(kl):
            raise ValueError(f"KL of optimizer step {self.updates + 1} is {kl}: the policy or its reference diverged")
        self.updates += 1
        self.history = [*self.history, kl][-self.window :]
        if self.kind != "fixed" and self.updates <= self.warmup_steps:
            self.value = self._warm_up()
        elif self.kind == "two_stage":
            self.value = self._feedback()
        return self.value

    def _warm_up(self) -> float:
        share = self.updates / self.warmup_steps
        return self.lambda_max if share == 1 else self.lambda_min + share * (self.lambda_max - self.lambda_min)

    def _feedback(self) -> float:
        error = (math.fsum(self.history) / len(self.history) - self.target) / self.target
        proposed = self.value * (1 - self.gain * min(max(error, -1.0), 1.0))
        return min(max(proposed, self.lambda_min), self.lambda_max)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes; plain numbers, so JSON keeps it exactly."""
        return {"kind": self.kind, "updates": self.updates, "value": self.value, "history": list(self.history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken; ValueError if it belongs to another kind of schedule."""
        if state["kind"] != self.kind:
            raise ValueError(f"saved lambda schedule is {state['kind']!r}, this run's is {self.kind!r}: resume with it")
        self.updates = int(state["updates"])
        self.value = float(state["value"])
        self.history = [float(kl) for kl in state["history"]][-self.window :]
