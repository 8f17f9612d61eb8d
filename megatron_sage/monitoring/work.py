"""Operations and tokens of what an iteration really did on this rank: its prompts' own texts, its stage, its tokens.

The counts of one forward are the planner's (`planning.flops`), which tests compare with torch's FlopCounterMode.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from megatron_sage.engine import Engine
from megatron_sage.model.conditions import TextCondition
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

    def times(self, count: int) -> "Done":
        """So many of it."""
        return Done(self.model * count, self.hardware * count, self.tokens * count)


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
        during = config.kl.phase != "rollout"
        found["rollout"] += self._pass(rollout, flown, config.sampler.num_steps)
        # an update's pairs share what they embed with each other, not with another update's
        parts = config.grpo.updates_per_rollout if during else 1
        found["train" if during else "reference"] += self._pass(training, flown, trained_steps, parts).times(references)
        for prompt in flown:
            found["train"] += self._forwards(training, prompt, trained_steps, backward=True)
        return found

    def _pass(self, network: Network, flown: Sequence[Prompt], steps: int, parts: int = 1) -> Done:
        """Without gradient: what is embedded of a text is embedded once a step, for all micro-batches that share it.

        In `parts` passes that divide the micro-batches and steps by chance: at most so often in each of them.
        """
        total, uses = Done(), Counter[int]()
        embedding: dict[int, float] = {}
        for prompt in flown:
            total += self._forwards(network, prompt, steps)
            for branch in range(network.branches):
                condition = network.text(prompt, branch)
                uses[id(condition)] += 1
                embedding[id(condition)] = self._of(_lengths(condition))[1].embedding.total
        again = sum(steps * (count - min(count, parts)) * embedding[text] for text, count in uses.items())
        return total + Done(hardware=-again)

    def _forwards(self, network: Network, prompt: Prompt, count: int, backward: bool = False) -> Done:
        total = Done()
        for branch in range(network.branches):
            text = _lengths(network.text(prompt, branch))
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


def _lengths(condition: TextCondition) -> Text:
    return Text(*(x.shape[1] for x in (condition.qwen_BLD, condition.byt5_BLD, condition.image_BLD)))
