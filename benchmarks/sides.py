"""The two sides of `benchmarks/iteration.py`, and what is counted and timed of them."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.public_loop import Arguments, PublicLoop
from megatron_sage.conditioning.embedding import PromptEmbedding

PHASES = ("rollout", "reference", "train", "optimizer")
LOOP = "public loop"


@dataclass(frozen=True)
class Padding:
    """Text positions of every forward; those of the released model by default."""

    qwen: int = 1000
    byt5: int = 256
    image: int = 729


def pad(text: PromptEmbedding, padding: Padding, image_dim: int, device: torch.device | str = "cpu") -> Arguments:
    """One prompt as diffusers' pipeline hands it over. ValueError where it is longer than the padding."""
    text, found = text.valid(), {}
    for suffix, length in (("", padding.qwen), ("_2", padding.byt5)):
        tokens = getattr(text, f"encoder_hidden_states{suffix}")
        if len(tokens) > length:
            raise ValueError(f"a text has {len(tokens)} tokens, the padding {length}: it would be cut off")
        states = tokens.new_zeros(1, length, tokens.shape[1])
        states[0, : len(tokens)] = tokens
        found[f"encoder_hidden_states{suffix}"] = states.to(device)
        found[f"encoder_attention_mask{suffix}"] = (torch.arange(length) < len(tokens)).long()[None].to(device)
    return found | {"image_embeds": torch.zeros(1, padding.image, image_dim, device=device)}


def longest(texts: Sequence[PromptEmbedding]) -> Padding:
    """The least padding that has room for all of them."""
    valid = [text.valid() for text in texts]
    return Padding(
        max(len(text.encoder_hidden_states) for text in valid),
        max(len(text.encoder_hidden_states_2) for text in valid),
        0,
    )


class Side:
    """Runs an iteration whenever it is called: the first is counted, the others are timed, phase by phase.

    `counts[phase]`: `forwards` of the model, `videos` that went through it, `refiner_runs` of its text refiner,
    `refiner_texts` that went through that, and `flops` (2 for each multiply-add), recomputation and attention's
    backward as they are made.
    """

    def __init__(self, name: str, iterate: Callable[[], dict[str, Any]], models: Sequence[torch.nn.Module]) -> None:
        """`models`: whose forwards count."""
        self.name, self.iterate, self.models = name, iterate, models
        self.counting = True  # False: the first iteration is timed like the others
        self.rows: list[dict[str, Any]] = []
        self.seconds: list[dict[str, float]] = []
        self.counts: dict[str, Counter[str]] = {}
        self._spent: Counter[str] = Counter()
        self._flops: Callable[[], int] | None = None  # while it is counted
        self._phase, self._since, self._flops_since = "", 0.0, 0

    def enter(self, phase: str) -> None:
        """A phase begins, and the one before has ended: the side's own code says so."""
        now = time.perf_counter()
        self._spent[self._phase] += now - self._since
        if self._flops is not None:
            flops = self._flops()
            self._count("flops", flops - self._flops_since)
            self._flops_since = flops
        self._phase, self._since = phase, now

    def __call__(self) -> None:
        """One iteration."""
        counting = self.counting and not self.rows
        self._spent = Counter()
        with ExitStack() as stack:
            if counting:
                self._begin_counting(stack)
            begin = self._since = time.perf_counter()
            self.rows.append(self.iterate())
            self.enter("")
        total = time.perf_counter() - begin
        if counting:
            self._flops = None
            self.counts = {phase: self.counts.get(phase, Counter()) for phase in PHASES}
        else:
            self.seconds.append({phase: self._spent[phase] for phase in PHASES} | {"total": total})
        print(f"  {self.name}, iteration {len(self.rows)}: {total:.2f} s{' (counted)' * counting}", flush=True)

    def _begin_counting(self, stack: ExitStack) -> None:
        def forward(module: torch.nn.Module, inputs: Any, out: Any) -> None:
            self._count("forwards")
            # diffusers' [B, C, T, H, W] in a tuple, ours [S, B, C]
            self._count("videos", out[0].shape[0] if isinstance(out, tuple) else out.shape[1])

        def refined(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self._count("refiner_runs")
            self._count("refiner_texts", max(len(inputs[0]), len(inputs[1])))  # of the text, and of its condition

        for model in self.models:
            stack.callback(model.register_forward_hook(forward).remove)
            # Same name and inputs in both models. Before it runs: a recomputation may end inside.
            refiner = model.get_submodule("context_embedder.token_refiner.refiner_blocks.0")
            stack.callback(refiner.register_forward_pre_hook(refined).remove)
        self._flops = stack.enter_context(flop_counter()).get_total_flops

    def _count(self, what: str, number: int = 1) -> None:
        self.counts.setdefault(self._phase, Counter())[what] += number


def flop_counter() -> Any:
    """torch's, made to see the attention kernel of CPUs as well, by the formulas of the one that it knows."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **named: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *rest, **named: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def stub_reward(group: int, sample: int) -> float:
    """A fixed number for each video of a run."""
    return float(np.random.default_rng([group, sample]).normal())


def our_side(name: str, arguments: list[str], reward: Callable[[int, int], float] = stub_reward) -> tuple[Side, Any]:
    """A run whose videos are not decoded but rewarded by their number; and its Trainer."""
    from megatron_sage.training.trainer import Trainer
    from tests.parallel.iterations import prepare

    class Stubbed(Trainer):
        """Rewards without videos."""

        def _score(self, trajectories: Any) -> Any:
            self.engine.control.enter("reward")
            rewards = [reward(t.group, sample) for t in trajectories for sample in t.samples]
            return np.array(rewards).reshape(-1, self.engine.config.grpo.group_size), {}, False

    trainer = prepare(arguments, 1, Stubbed)
    side = Side(name, lambda: trainer.run_iteration()[0], trainer.engine.chunks)
    trainer.engine.control.on_enter = side.enter
    return side, trainer


def public_side(
    arguments: list[str],
    padding: Padding | None,
    together: int = 1,
    reward: Callable[[int, int], float] = stub_reward,
) -> tuple[Side, PublicLoop]:
    """The loop on the same world; `padding` None: to the longest prompt; `together`: see the loop."""
    from diffusers import HunyuanVideo15Transformer3DModel

    from megatron_sage.conditioning.words import WordEncoder
    from megatron_sage.config import load_config
    from megatron_sage.data.prompts import read_rows
    from megatron_sage.engine import SPATIAL, TEMPORAL

    config = load_config(None, arguments)
    root, video = Path(config.model.pretrained), config.video
    model = HunyuanVideo15Transformer3DModel.from_pretrained(root / "transformer", torch_dtype=torch.float32)
    encoder, width = WordEncoder.from_pretrained(root / "text_encoder"), model.config.image_embed_dim
    texts = [encoder.encode(text) for text in (" ", *(row.text for row in read_rows(config.data.prompts)))]
    negative, *padded = (pad(text, padding or longest(texts), width) for text in texts)
    grid = ((video.frames - 1) // TEMPORAL + 1, video.height // SPATIAL, video.width // SPATIAL)
    loop = PublicLoop(config, model, padded, negative, reward, grid, together)
    side = Side(LOOP, loop.run_iteration, [model] if loop.reference is None else [model, loop.reference])
    loop.on_enter = side.enter
    return side, loop
