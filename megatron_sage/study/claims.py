"""The paper's claims as comparisons of two cells, and what a study's runs say about each.

Paper: arXiv 2603.21872, main table (VideoAlign on HunyuanVideo-1.5, Overall = VQ + MQ + TA). Some claims go against the
paper's own table (SAGE without KL does not beat CPS there, for one); they are listed all the same, with the number.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sage.study.statistics import ALPHA, MIN_SEEDS, Comparison, RunRow, compare, holm, verdict

PAPER_OVERALL = {
    "a_dance_none": 0.2768,
    "a_dance_fixed": 0.0979,
    "a_flow_none": 0.2733,
    "a_flow_fixed": 0.1880,
    "a_cps_none": 0.6343,
    "a_cps_fixed": 0.0928,
    "a_sage_none": 0.4859,
    "a_sage_fixed": 0.2244,
    "a_sage_dual": 0.2173,
    "b_dance_none": -0.2172,
    "b_dance_fixed": 0.1290,
    "b_flow_none": 0.4773,
    "b_flow_fixed": 0.2103,
    "b_cps_none": 0.3694,
    "b_cps_fixed": 0.3705,
    "b_sage_none": -0.1222,
    "b_sage_fixed": 0.2857,
    "b_sage_dual": 0.8066,
}
NAMES = {"dance": "DanceGRPO", "flow": "FlowGRPO", "cps": "CPS", "sage": "SAGE"}
OUTCOME = "reward"  # what is trained; within one setting it is the same weighted sum in both cells


@dataclass(frozen=True)
class Claim:
    """`better` beats `worse` in OUTCOME. Without a `worse` it beats every other cell, in `overall`: the trained sum
    differs between the settings."""

    key: str
    question: str
    sentence: str
    better: str
    worse: str | None

    @property
    def paper(self) -> float:
        """The paper's difference in Overall; NaN where it has a figure only. Against all: against the next best."""
        if self.worse is None:
            return PAPER_OVERALL[self.better] - max(v for cell, v in PAPER_OVERALL.items() if cell != self.better)
        return PAPER_OVERALL.get(self.better, math.nan) - PAPER_OVERALL.get(self.worse, math.nan)

    @property
    def paper_says(self) -> str:
        """What the paper's number says; a single run each, so the size is no evidence by itself."""
        if math.isnan(self.paper):
            return "figure only"
        return "for" if self.paper > 0 else "against"


@dataclass(frozen=True)
class Judgement:
    """A claim, its comparison in OUTCOME (the hardest rival's, where it is against all) and in `overall`."""

    claim: Claim
    comparison: Comparison
    overall: Comparison
    p_holm: float
    verdict: str
    note: str = ""


def _claims() -> tuple[Claim, ...]:
    found = []

    def add(key: str, question: str, sentence: str, better: str, worse: str | None) -> None:
        found.append(Claim(key, question, sentence, better, worse))

    for short, name in NAMES.items():
        cell = f"b_{short}_none"
        question = "The equalizer helps each sampler"
        add(f"equalizer_{short}", question, f"{name}: with beats without (B, no KL)", cell, f"{cell}_no_equalizer")
    for setting in "ab":
        for short in ("dance", "flow", "cps"):
            sentence = f"SAGE beats {NAMES[short]} ({setting.upper()}, no KL)"
            key, question = f"sampler_{setting}_{short}", "SAGE is the better sampler"
            add(key, question, sentence, f"{setting}_sage_none", f"{setting}_{short}_none")
    for setting in "ba":
        for kl, word in (("fixed", "fixed KL"), ("none", "no KL")):
            sentence = f"SAGE: dual KL beats {word} ({setting.upper()})"
            key, question = f"dual_{setting}_{kl}", "The dual moving trust region helps SAGE"
            add(key, question, sentence, f"{setting}_sage_dual", f"{setting}_sage_{kl}")
    for setting in "ab":
        for short, name in NAMES.items():
            cell = f"{setting}_{short}"
            sentence = f"{name}: no KL beats fixed KL ({setting.upper()})"
            add(f"fixed_{cell}", "A fixed reference costs reward", sentence, f"{cell}_none", f"{cell}_fixed")
    for kl in ("step", "moving"):
        sentence = f"SAGE: dual KL beats {kl} KL alone (B)"
        add(f"dual_{kl}", "Both parts of the dual KL are needed", sentence, "b_sage_dual", f"b_sage_{kl}")
    for schedule in ("fixed", "milder"):
        sentence = f"SAGE, dual KL: two_stage λ beats {schedule} λ (B)"
        worse = f"b_sage_dual_lambda_{schedule}"
        add(f"lambda_{schedule}", "The two-stage λ schedule helps", sentence, "b_sage_dual", worse)
    sentence = "SAGE with dual KL (B) beats every other cell, in overall"
    add("best", "The best of all", sentence, "b_sage_dual", None)
    return tuple(found)


CLAIMS = _claims()


def judge(rows: Sequence[RunRow]) -> list[Judgement]:
    """Every claim in the order of CLAIMS.

    Holm's correction is made within each question (fixed before any result was seen): all claims of one question are
    a family, as are the last claim's comparisons with all other cells. With five seeds and a family of four, a
    difference is found four times in five from 2.5 standard deviations of the paired differences on.
    """
    pairs = [(claim, compare(rows, claim.better, claim.worse, OUTCOME)) for claim in CLAIMS if claim.worse]
    corrected: list[tuple[float, float]] = []
    for _, family in itertools.groupby(pairs, key=lambda pair: pair[0].question):
        corrected += holm([comparison.p_t for _, comparison in family])
    cells = {row.cell for row in rows}
    found = []
    for (claim, comparison), (p_holm, level) in zip(pairs, corrected, strict=True):
        overall = compare(rows, comparison.better, comparison.worse, "overall")
        word = verdict(comparison, level)
        note = _pair_note(comparison, cells, word)
        found.append(Judgement(claim, comparison, overall, p_holm, word, note))
    return found + [_judge_best(rows, claim) for claim in CLAIMS if not claim.worse]


def _pair_note(comparison: Comparison, cells: set[str], word: str) -> str:
    missing = [cell for cell in (comparison.better, comparison.worse) if cell not in cells]
    if missing:
        return f"not run: {', '.join(missing)}"
    if not comparison.enough:
        return f"common finite seeds: {len(comparison.differences)}, {MIN_SEEDS} are needed"
    if word == "undecided" and comparison.p_t < ALPHA:
        return "its own 95 % interval excludes 0, after correction for the question's claims it does not"
    return ""


def _judge_best(rows: Sequence[RunRow], claim: Claim) -> Judgement:
    """Supported if every rival is beaten after Holm over the rivals; a cell of the paper's table that is missing or
    has too few seeds leaves it undecided; one rival that is better contradicts it."""
    rivals = sorted(({row.cell for row in rows} | PAPER_OVERALL.keys()) - {claim.better})
    comparisons = [compare(rows, claim.better, rival, "overall") for rival in rivals]
    corrected = holm([comparison.p_t for comparison in comparisons])
    words = [verdict(one, level) for one, (_, level) in zip(comparisons, corrected, strict=True)]
    tested = [place for place, one in enumerate(comparisons) if one.enough]
    if not tested:
        nothing = compare(rows, claim.better, "", "overall")
        return Judgement(claim, nothing, nothing, math.nan, "undecided", f"no other cell shares {MIN_SEEDS} seeds")
    hardest = min(tested, key=lambda place: comparisons[place].interval().mean)
    counts = {word: words.count(word) for word in set(words)}
    word = "contradicted" if "contradicted" in counts else "undecided" if "undecided" in counts else "supported"
    note = (
        f"of {len(rivals)} other cells {counts.get('supported', 0)} beaten, {counts.get('contradicted', 0)} better, "
        f"{len(rivals) - len(tested)} not tested; shown: {rivals[hardest]}, the hardest"
    )
    return Judgement(claim, comparisons[hardest], comparisons[hardest], corrected[hardest][0], word, note)
