"""A run's prompts are read when they are asked for."""

from megatron_sage.data.prompts import PromptRow
from megatron_sage.engine import Prompts


def test_only_what_is_asked_for_is_read() -> None:
    read: list[str] = []
    rows = [PromptRow(f"prompt {number}") for number in range(1000)]
    prompts = Prompts(rows, lambda row: read.append(row.text) or row.text)  # type: ignore[arg-type, return-value]
    assert len(prompts) == 1000 and len(prompts[10:20]) == 10 and not read
    assert prompts[10:20][3] == prompts[13] == "prompt 13" and read == ["prompt 13"] * 2
    assert list(prompts[998:]) == ["prompt 998", "prompt 999"]
