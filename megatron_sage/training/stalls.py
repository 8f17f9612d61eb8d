"""From the places of all ranks to who stalls: no threads and no store here, so that it can be tested."""

from dataclasses import dataclass, field
from types import FrameType
from typing import NamedTuple

TIMED = "/megatron_sage/parallel/waiting.py"  # its wrapper around every wait
# Where the main thread's innermost frame is while it waits for another rank. A GPU's collectives are waited for where
# a number is read (`.item()`): there this does not tell, the agreements of `parallel.control` do.
WAITING_FILES = (
    "/torch/distributed/",
    TIMED,
    "/megatron_sage/parallel/pipeline.py",
    "/pipeline_parallel/p2p_communication.py",
    "/distributed/param_and_grad_buffer.py",
)


class Beat(NamedTuple):
    """What a rank's thread says of its main thread."""

    rank: int
    beats: int  # of the thread: they stand still where the process is dead, frozen, or holds the interpreter's lock
    total: int  # micro-steps and phases begun: they stand still where the main thread waits or hangs
    phase: str
    iteration: int
    step: int
    where: str  # file, line and function
    waits: bool  # for others, as far as the stack tells
    process: str


class Report(NamedTuple):
    """What to print, and its essence in one line."""

    text: str
    reason: str


def place(frame: FrameType | None) -> tuple[str, bool]:
    """(innermost file:line function outside torch, whether the thread is inside a collective)."""
    if frame is None:
        return "no main thread", False
    inner = frame.f_code
    waits = any(part in inner.co_filename for part in WAITING_FILES)
    while frame.f_back is not None and ("/torch/" in frame.f_code.co_filename or TIMED in frame.f_code.co_filename):
        frame = frame.f_back
    code = frame.f_code
    file = "/".join(code.co_filename.split("/")[-2:])
    return f"{file}:{frame.f_lineno} {code.co_name}", waits


@dataclass
class Watch:
    """When each rank was last seen to live and to advance, by the clock of the rank that looks."""

    limit: float  # seconds without progress
    interval: float  # seconds between two beats
    _alive: dict[int, tuple[int, float]] = field(default_factory=dict)
    _moved: dict[int, tuple[int, float]] = field(default_factory=dict)

    def look(self, beats: list[Beat], now: float) -> Report | None:
        """A report when a rank that waits for nobody, or every rank, made no progress for `limit` seconds.

        A rank that waits for others while they advance is no stall, however long it takes.
        """
        for beat in beats:
            for seen, count in ((self._alive, beat.beats), (self._moved, beat.total)):
                if beat.rank not in seen or seen[beat.rank][0] != count:
                    seen[beat.rank] = (count, now)
        silent = {beat.rank: now - self._moved[beat.rank][1] for beat in beats}
        alone = [beat for beat in beats if silent[beat.rank] > self.limit and not beat.waits]
        if not alone and min(silent.values()) <= self.limit:
            return None
        return self._report(beats, silent, now)

    def _behind(self, beats: list[Beat], now: float) -> tuple[list[Beat], str]:
        """The likely culprits: the dead, else those that wait for nobody, of these the ones with least progress."""
        patience = max(self.limit / 2, 3 * self.interval)
        dead = [beat for beat in beats if now - self._alive[beat.rank][1] > patience]
        if dead:
            return dead, "gives no sign of life (dead, frozen, or a call that holds Python's lock: see py-spy)"
        working = [beat for beat in beats if not beat.waits] or beats
        least = min(beat.total for beat in working)
        return [beat for beat in working if beat.total == least], "is behind"

    def _report(self, beats: list[Beat], silent: dict[int, float], now: float) -> Report:
        culprits, why = self._behind(beats, now)
        first, names = culprits[0], ranks_text([beat.rank for beat in culprits])
        seconds = silent[first.rank]
        reason = (
            f"rank {names} {why}: phase {first.phase}, iteration {first.iteration}, micro-step {first.step}, at "
            f"{first.where}, no progress for {seconds:.0f} s (training.stall_seconds)"
        )
        rows: list[tuple[object, ...]] = [("ranks", "phase", "iteration", "micro-step", "silent", "at", "process")]
        groups: dict[tuple[object, ...], list[Beat]] = {}
        for beat in beats:
            key = (beat.rank in {c.rank for c in culprits}, beat.phase, beat.iteration, beat.step, beat.where)
            groups.setdefault(key, []).append(beat)
        for (behind, phase, iteration, step, where), members in groups.items():
            note = "<- " + why.split(" (")[0] if behind else "waits for others" if members[0].waits else ""
            quiet = f"{min(silent[beat.rank] for beat in members):.0f} s"
            numbers = ranks_text([beat.rank for beat in members])
            rows.append((numbers, phase, iteration, step, quiet, where, f"{members[0].process} {note}".rstrip()))
        widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return Report("\n".join([f"stalled: {reason}", *(line.rstrip() for line in lines)]), reason)


def ranks_text(ranks: list[int]) -> str:
    """0-3, 5 for 0, 1, 2, 3, 5."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
