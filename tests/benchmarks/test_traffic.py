"""The benchmark's own functions at small size, and what is committed of it."""

import json
from pathlib import Path

from benchmarks import traffic

HERE = Path(traffic.__file__).parent


def test_counted_ranks_have_the_formula_s_bytes(tmp_path: Path) -> None:
    (row,) = traffic.counted(["CP 2 ulysses"], tmp_path)
    for part in ("iteration", "micro_batch"):
        assert row[part]["equal"] and row[part]["counted_bytes"] == row[part]["formula_bytes"] > 0
    # 4 blocks of 8 heads and 96 channels in fp32, two ranks of 8 of 15 video tokens (one is padding); two samples;
    # 6 words and 1, the last block without the text's answer; an all-to-all each way, forward and backward
    row_bytes, blocks = 2 * 96 * 4, 4
    tokens = sum(2 * (4 * 8 * blocks + words * (blocks - 1)) for words in (6, 1))
    assert row["micro_batch"]["bytes"]["all_to_all cp"] == 2 * tokens * row_bytes
    assert row["micro_batch"]["calls"]["all_to_all cp"] == 2 * 2 * 4 * blocks


def test_committed_results_are_this_version_s(tmp_path: Path) -> None:
    """The released model's rows by formula; of the counted ones, that all of them were equal."""
    committed = json.loads((HERE / "traffic.json").read_text())
    assert [row["layout"] for row in committed["counted"]] == list(traffic.COUNTED)
    assert all(row[part]["equal"] for row in committed["counted"] for part in ("iteration", "micro_batch"))
    for video, rows in committed["released"].items():
        names = [row["layout"] for row in rows]
        assert names == list(traffic.REAL) and len(names) >= 12
        fresh = traffic.real(video, names[-2:])
        assert json.loads(json.dumps(fresh)) == rows[-2:]
        assert all(64 <= row["gpus"] <= 512 for row in rows)
        assert max(max(row["ratio"], row["sent_ratio"]) for row in rows) <= traffic.GOAL
    text = traffic.markdown(committed["counted"], committed["released"])
    assert (HERE / "traffic.md").read_text().endswith(text)
