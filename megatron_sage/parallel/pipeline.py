"""Forward passes through a pipeline that feeds itself: the slots of a rollout, planned once and executed by every rank.

Megatron's schedules know a forward and its backward. A rollout has no backward but a loop: the input of a sample's next
step is what its last one gave. So its stages stay busy by having many samples on the way: each step of a sample enters
the first stage as soon as the one before has left the last one.

The plan is a table of slots by stages, the same on every rank, made before anything is sent. A task that entered moves
on by one stage with every slot and never waits, like on a belt; tasks enter in the order in which they became ready.
"""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist


class Task(NamedTuple):
    """One forward through one chunk of one stage."""

    flight: int  # which micro-batch
    step: int  # position among the micro-batch's steps
    branch: int  # of the guidance: a forward of its own
    chunk: int = 0


Plan = list[list[Task | None]]  # [slot][stage]


def plan_slots(flights: int, steps: int, branches: int, stages: int, chunks: int = 1, chained: bool = True) -> Plan:
    """Every (flight, step, branch) through every chunk of every stage.

    Args:
        chained: a flight's step needs the one before (a rollout); otherwise all are independent (a reference pass).

    With chained flights no stage idles between its first and last task if flights * branches >= stages * chunks +
    branches - 1 (one chunk), so for flights >= stages whatever the number of branches.
    """
    first = range(steps) if not chained else range(min(steps, 1))
    waiting = deque(Task(f, s, b) for s in first for f in range(flights) for b in range(branches))
    moving: list[Task | None] = [None] * stages  # what the slot before left for each stage
    plan: Plan = []
    while waiting or any(moving):
        row = list(moving)
        if row[0] is None and waiting:
            row[0] = waiting.popleft()
        plan.append(row)
        moving = [None, *row[:-1]]
        done = row[-1]
        if done is not None and done.chunk + 1 < chunks:
            moving[0] = done._replace(chunk=done.chunk + 1)
        elif done is not None and chained and done.branch == branches - 1 and done.step + 1 < steps:
            waiting.extend(Task(done.flight, done.step + 1, b) for b in range(branches))
    return plan


class Work(Protocol):
    """What a task means; the executor knows tensors and slots only."""

    def forward(self, task: Task, packed: torch.Tensor | None) -> torch.Tensor:
        """This rank's part; `packed` is None where the task starts. What leaves the last chunk stays with the work."""
        ...

    def packed_like(self, task: Task) -> torch.Tensor:
        """An empty tensor for what one stage sends the next."""
        ...

    def result(self, task: Task) -> torch.Tensor | None:
        """On the last stage, after the task: what the first stage needs for the flight's next step; None: nothing."""
        ...

    def result_like(self, task: Task) -> torch.Tensor | None:
        """On the first stage: an empty tensor for it, None exactly where `result` gives None."""
        ...

    def receive(self, task: Task, result: torch.Tensor) -> None:
        """On the first stage of several: the flight's next input has come."""
        ...


@dataclass
class Occupancy:
    """What this rank did, written down as it did it: (slot, task, seconds at its begin and end)."""

    entries: list[tuple[int, Task, float, float]] = field(default_factory=list)
    slots: int = 0  # of the whole plan, the same on every rank

    def busy_and_span(self) -> tuple[int, int]:
        """Slots with a task, and slots from the first to the last of them: start and end do not count."""
        slots = [slot for slot, *_ in self.entries]
        return len(set(slots)), (max(slots) - min(slots) + 1 if slots else 0)

    def follow(self, other: "Occupancy", flights: int) -> None:
        """Append a plan that was executed behind this one, whose flights were `flights` up to now.

        The slots in which the pipeline ran empty and filled again between them lie inside the span: they count as idle.
        """
        for slot, task, begin, end in other.entries:
            self.entries.append((slot + self.slots, task._replace(flight=task.flight + flights), begin, end))
        self.slots += other.slots


@dataclass
class _Message:
    """A tensor on its way and the requests to wait for."""

    tensor: torch.Tensor
    requests: list[dist.Work]

    def wait(self) -> torch.Tensor:
        for request in self.requests:
            request.wait()
        return self.tensor


def execute(plan: Plan, work: Work, group: dist.ProcessGroup | None, chunks: int = 1) -> Occupancy:
    """Run this rank's column of the plan. All ranks of `group` (PP; None: one stage) call it with the same plan.

    The sends and receives of a slot are posted together, so that no order of theirs can lock. A stage waits for packed
    tokens in the slot that takes them, for a result when its flight enters again.
    """
    rank, last = (0, 0) if group is None else (group.rank(), group.size() - 1)
    if group is not None and dist.get_backend(group) == "nccl":
        dist.barrier(group=group)  # NCCL wants all ranks in a group's first operation, the first slot has two of them
    occupancy = Occupancy(slots=len(plan))
    arrived: torch.Tensor | _Message | None = None
    sent: list[_Message] = []
    results: dict[int, tuple[Task, _Message]] = {}  # flight -> what has been posted for it
    for slot, row in enumerate(plan):
        task, output = row[rank], None
        if task is not None:
            if task.flight in results and rank == 0 and task.chunk == 0 and task.branch == 0:
                which, message = results.pop(task.flight)
                work.receive(which, message.wait())
            begin = time.perf_counter()
            output = work.forward(task, arrived.wait() if isinstance(arrived, _Message) else arrived)
            occupancy.entries.append((slot, task, begin, time.perf_counter()))
        for message in sent:
            message.wait()
        if group is None or last == 0:
            # one stage: a chunk's output is the next one's input, and results are where they are needed
            arrived = output if task is not None and task.chunk + 1 < chunks else None
            continue
        sent, received = _exchange(row, output, work, group, chunks)
        before = row[rank - 1]
        returns = rank == 0 and before is not None and before.chunk + 1 == chunks
        arrived = None if returns else received
        if returns and before is not None and received is not None:
            results[before.flight] = (before, received)
    for message in sent:
        message.wait()
    for which, message in results.values():
        work.receive(which, message.wait())
    return occupancy


def _exchange(
    row: list[Task | None], output: torch.Tensor | None, work: Work, group: dist.ProcessGroup, chunks: int
) -> tuple[list[_Message], _Message | None]:
    """Hand on what the slot made: packed tokens to the next stage, results from the last stage to the first."""
    rank, size = group.rank(), group.size()
    mine, before = row[rank], row[rank - 1]
    value, like = None, None
    if mine is not None:
        value = work.result(mine) if rank == size - 1 and mine.chunk + 1 == chunks else output
    if before is not None:
        like = work.result_like(before) if rank == 0 and before.chunk + 1 == chunks else work.packed_like(before)
    ranks = dist.get_process_group_ranks(group)
    operations = []
    if value is not None:
        value = value.contiguous()
        operations.append(dist.P2POp(dist.isend, value, ranks[(rank + 1) % size], group))
    if like is not None:
        operations.append(dist.P2POp(dist.irecv, like, ranks[rank - 1], group))
    if not operations:
        return [], None
    requests = dist.batch_isend_irecv(operations)
    if len(requests) < len(operations):  # NCCL joins them to one request, gloo has one for each
        requests = [requests[0]] * len(operations)
    sent = [] if value is None else [_Message(value, [requests[0]])]
    return sent, None if like is None else _Message(like, [requests[-1]])


def share_from_last(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The last stage's `x` on every stage; elsewhere `x` is overwritten."""
    if group.size() > 1:
        dist.broadcast(x, group_src=group.size() - 1, group=group)
    return x


def bubble_fraction(occupancy: Occupancy, group: dist.ProcessGroup) -> float:
    """Idle slots over all slots of all stages of `group` (PP), each from its first to its last task."""
    busy, span = occupancy.busy_and_span()
    total = torch.tensor([busy, span], dtype=torch.float64)
    if dist.get_backend(group) == "nccl":
        total = total.cuda()
    dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
    return 1.0 - float(total[0] / total[1]) if total[1] else 0.0
