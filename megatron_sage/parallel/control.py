"""Where a rank is, and whether its run goes on: every micro-step of every phase passes here.

A rank must not leave a phase alone: its peers would wait in the next collective for ever. So a stop is agreed on.
In the micro-steps, by the ranks of a pipeline stage (TP x CP), whose forwards hold collectives: they compute the next
one together or skip it together. What is skipped is still sent on, as zeros of the right shape, so the schedule goes
to its end at the speed of its messages. At the end of a phase, by all ranks: then they leave together (`Stopped`).

The agreements are all-reduces of one int32 in host memory, over gloo groups of their own: no GPU is waited for, and
no other collective can get between.
"""

from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from megatron_sage.parallel.groups import Groups

DESCRIPTION = "control"  # of the process groups: `parallel.traffic` counts them apart


class Stopped(Exception):
    """Every rank raises it at the same place: nothing that has been computed since the phase began may be used."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


class Control:
    """A rank's place in the run, written by its main thread, and the stop signal it knows of.

    The attributes are read by the watchdog's thread and `signal` is set by it and by signal handlers, too; each is one
    plain assignment. Without process groups (one process, or a command that nothing stops) no collective runs.
    """

    def __init__(
        self,
        stage: dist.ProcessGroup | None = None,
        world: dist.ProcessGroup | None = None,
        replicas_share_reference: bool = False,
    ) -> None:
        """`replicas_share_reference`: forwards of the reference hold collectives over DP as well: none is skipped."""
        self.stage, self.world, self.replicas_share_reference = stage, world, replicas_share_reference
        self.signal = 0  # number of the stop signal; 0: none
        self.hold = False  # the iteration has updated the weights: it is finished, for there is no state in between
        self.phase, self.iteration, self.step = "load", 0, 0
        self.on_enter: Callable[[str], None] | None = None  # told of every phase that begins, by the main thread
        self.total = 0  # micro-steps and phases begun since the start: a number that grows while there is progress

    def begin(self, iteration: int) -> None:
        """A new iteration, which may be dropped until `hold` is set."""
        self.iteration, self.hold = iteration, False

    def enter(self, phase: str) -> None:
        """What the rank does from now on."""
        self.phase, self.step = phase, 0
        self.total += 1
        if self.on_enter is not None:
            self.on_enter(phase)

    def micro_step(self, reference: bool = False) -> bool:
        """Before each micro-step: whether to compute it. The same answer on all ranks of a stage.

        `reference`: it is a forward of the reference's weights.
        """
        self.step += 1
        self.total += 1
        if self.hold or (reference and self.replicas_share_reference):
            return True
        return not self._agreed(self.stage)

    def end_phase(self) -> None:
        """After each phase, on all ranks. Raises Stopped on all of them if one has got a signal."""
        if not self.hold and (signal := self._agreed(self.world)):
            raise Stopped(signal)

    def _agreed(self, group: dist.ProcessGroup | None) -> int:
        """The signal of any rank of `group`: the largest of their numbers, for most of them are 0."""
        if group is None:
            return self.signal
        flag = torch.tensor([self.signal], dtype=torch.int32, device="cpu")
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
        found = int(flag)
        if found:  # not `self.signal = found`: a signal may have arrived meanwhile, which the others do not know yet
            self.signal = found
        return found

    def close(self) -> None:
        """Give the process groups back."""
        for group in {self.stage, self.world} - {None}:
            dist.destroy_process_group(group)
        self.stage = self.world = None


def build_control(groups: Groups, timeout_seconds: float, replicas_share_reference: bool = False) -> Control:
    """Control over a run's ranks. All ranks call: each makes all groups, in the same order."""
    if groups.world_size == 1:
        return Control()
    timeout = timedelta(seconds=timeout_seconds)
    width = groups.cp_size * groups.tp_size
    mine = None
    # Megatron's order of ranks is tp, cp, dp, pp: the ranks of a stage of a replica follow one another
    for members in np.arange(groups.world_size).reshape(-1, width).tolist() if width > 1 else []:
        group = dist.new_group(members, timeout, backend="gloo", group_desc=DESCRIPTION)
        if groups.rank in members:
            mine = group
    world = dist.new_group(None, timeout, backend="gloo", group_desc=DESCRIPTION)
    return Control(mine, world, replicas_share_reference and groups.dp_size > 1)
