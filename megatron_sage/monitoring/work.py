"""Operations and tokens of what an iteration really did on this rank: its prompts' own texts, its stage, its tokens.

The counts of one forward are the planner's (`planning.flops`), which tests compare with torch's FlopCounterMode.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from megatron_sage.engine import Engine
from megatron_sage.model.lora_targets import AdapterSettings
from megatron_sage.planning.flops import StageFlops, Text, model_forward, stage_flops
from megatron_sage.planning.traffic import Place
from megatron_sage.rollout.policy import Network, Prompt

COUNTED = ("rollout", "reference", "train")  # phases that run the DiT; the VAE and rewards are not counted


@dataclass(frozen=True)
class Done:
    """Of one phase on one rank."""

    model: float = 0.0
    """Model FLOPs: this rank's share of what the method asks for, nothing padded, repeated or computed twice (MFU)."""
    hardware: float = 0.0
    """What this rank executed: padding, parts that every TP or CP rank repeats, recomputation (HFU)."""
    tokens: float = 0.0
    """Tokens through the DiT, video and text of each branch of each forward, this rank's share."""

    def __add__(self, other: "Done") -> "Done":
        return Done(self.model + other.model, self.hardware + other.hardware, self.tokens + other.tokens)


@dataclass
class WorkCount:
    """Counts for one run. The layout's own part is computed once for every text length."""

    engine: Engine
    _known: dict[Text, tuple[float, StageFlops]] = field(default_factory=dict)

    def phases(self, flown: Sequence[Prompt], trained_steps: int, references: int) -> dict[str, Done]:
        """Of an iteration that sent `flown` (each micro-batch's prompt) and trained on `trained_steps` of each.

        Reference passes count as a phase of their own with kl.phase=rollout, else as part of training.
        """
        engine, config = self.engine, self.engine.config
        rollout, training = engine.rollout_network(), engine.training_network()
        found = dict.fromkeys(COUNTED, Done())
        passes = "reference" if config.kl.phase == "rollout" else "train"
        for prompt in flown:
            found["rollout"] += self._forwards(rollout, prompt, config.sampler.num_steps)
            found[passes] += self._forwards(training, prompt, trained_steps * references)
            found["train"] += self._forwards(training, prompt, trained_steps, backward=True)
        return found

    def _forwards(self, network: Network, prompt: Prompt, count: int, backward: bool = False) -> Done:
        total = Done()
        for branch in range(network.branches):
            condition = network.text(prompt, branch)
            text = Text(*(x.shape[1] for x in (condition.qwen_BLD, condition.byt5_BLD, condition.image_BLD)))
            whole, stage = self._of(text)
            # frozen weights need no gradient of their own: one GEMM backward instead of two
            factor = 1 + backward * (1 if self._adapters else 2)
            executed = stage.forward.total + backward * (stage.backward.total + stage.again.total)
            share = self.engine.config.sampler.micro_batch / self.engine.groups.replica.size()
            tokens = self.engine.shape.shard.num_tokens + text.total
            total += Done(count * whole * factor * share, count * executed, count * tokens * share)
        return total

    @property
    def _adapters(self) -> bool:
        return self.engine.config.lora.rank is not None

    @cached_property
    def _place(self) -> Place:
        engine, config = self.engine, self.engine.config
        lora = None
        if config.lora.rank is not None:
            lora = AdapterSettings(config.lora.rank, 1.0, tuple(config.lora.targets))
        tokens = engine.shape.shard.num_tokens
        return Place(engine.model_config, engine.groups.pp_rank, tokens, config.sampler.micro_batch, lora=lora)

    def _of(self, text: Text) -> tuple[float, StageFlops]:
        """(one forward of one video through the whole model, one micro-batch through this rank's stage)."""
        if text not in self._known:
            whole = model_forward(self.engine.model_config, self._place.video_tokens, text).total
            stage = stage_flops(self._place, text, self.engine.groups.cp_rank, self._adapters)
            self._known[text] = whole, stage
        return self._known[text]
