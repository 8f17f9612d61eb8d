"""Which micro-batches are made."""

import random

from megatron_sage.evaluation.work import micro_batches


def test_what_is_finished_never_changes_the_batch_of_a_video() -> None:
    """A video's last bits depend on the batch that it is in: a resumed evaluation must make the same batches."""
    chance = random.Random(2)
    for _ in range(200):
        prompts, samples, size = chance.randint(1, 5), chance.randint(1, 7), chance.randint(1, 8)
        everything = [(p, s) for p in range(prompts) for s in range(samples)]
        plan = micro_batches(everything, samples, size)
        assert [(p, s) for p, some in plan for s in some] == everything
        assert all(len(some) <= size for _, some in plan)
        todo = sorted(chance.sample(everything, chance.randint(0, len(everything))))
        made = micro_batches(todo, samples, size)
        assert all(batch in plan for batch in made)
        assert set(todo) <= {(p, s) for p, some in made for s in some}
        assert all(any((p, s) in todo for s in some) for p, some in made)  # nothing is made for nothing
