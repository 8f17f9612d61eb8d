"""report.html of a made-up run: it parses, needs nothing outside itself, and its videos play."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import av
import numpy as np
import pytest
from fake_run import PROMPTS, clip, write_run

from megatron_sage.errors import UserError
from megatron_sage.reporting.report import main, write_report

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects text, sources and tag names."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open and self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "fake")


@pytest.fixture(scope="module")
def html(run) -> str:
    path = write_report(run)
    assert path == run / "report.html" and not list(run.glob(".*"))
    return path.read_text()


def rewritten(tmp_path, name: str, content: str | None):
    """A small run with one file replaced, or removed."""
    run = write_run(tmp_path / "run", iterations=3)
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_text(content)
    return run


def test_the_page_is_self_contained(html: str) -> None:
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r'base64,[^"]+"', "", html))
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert page.sources and all(source.startswith("data:video/mp4;base64,") for source in page.sources)
    assert page.tags.count("svg") == 10
    assert "quick<start>" in page.text and "a <b>blue</b> & green square" in page.text
    assert "<start>" not in html and "<b>blue" not in html


def test_its_videos_play(html: str) -> None:
    videos = re.findall(r"<video autoplay loop muted playsinline[^>]*base64,([^\"]+)\"", html)
    assert len(videos) == 2 * len(PROMPTS)
    with av.open(io.BytesIO(base64.b64decode(videos[0]))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 9 and frames[0].shape == (62, 94, 3)
    assert np.abs(frames[3][::2, ::2].astype(int) - clip(0)[3]).mean() < 12


def test_the_headline_is_the_evaluation(html: str, run) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    text = Page(html).text
    assert f"{evaluation['before']['mean']:.3f}→{evaluation['after']['mean']:.3f}" in text
    assert f"+{evaluation['difference']['mean']:.3g} ± 0.031" in text
    assert "3 held-out prompts" in text and "text alignment" in text and "+0.250" in text
    for word in ("learning rate 1e−4", "groups of 8", "TP=2", "megatron-core", "0.16.1", "guidance_scale: 3.0"):
        assert word in text, word


def test_without_an_evaluation_it_says_so(tmp_path) -> None:
    run = write_run(tmp_path / "run", iterations=10, evaluation=False)
    text = Page(write_report(run).read_text()).text
    assert "no held-out evaluation" in text and "Training reward, first → last 2 iterations" in text
    assert text.count("before") >= 3  # the files of samples/ are shown without scores


def test_metrics_alone_are_enough(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\n')
    text = Page(write_report(tmp_path).read_text()).text
    assert "not recorded in this run" in text and tmp_path.name in text


def test_nan_and_missing_metrics_are_gaps(tmp_path) -> None:
    rows = [
        {"iteration": 0, "reward/mean": 1.0, "reward/Q": 1},
        {"iteration": 1, "reward/mean": float("nan")},
        {"iteration": 2, "reward/mean": None, "loss": "x"},
        {"reward/mean": 2.0, "loss": float("inf")},
    ]
    run = rewritten(tmp_path, "metrics.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    html = write_report(run).read_text()
    Page(html)
    assert not re.search(r'(points|c?[xy][12]?)="[^"]*(nan|inf)', html)


def test_samples_without_scores_or_files(tmp_path) -> None:
    samples = [{"prompt": "p", "reward": float("nan"), "file": "samples/before/gone.mp4"}, {"prompt": "q"}]
    content = {"before": {"mean": float("nan"), "samples": samples}, "after": {"mean": 1.0, "samples": samples[:1]}}
    text = Page(write_report(rewritten(tmp_path, "evaluation.json", json.dumps(content))).read_text()).text
    assert "samples/before/gone.mp4 is missing" in text and "reward –" in text


def test_an_incomplete_last_line_is_left_out_and_said(tmp_path) -> None:
    run = rewritten(tmp_path, "metrics.jsonl", '{"iteration": 0, "loss": 1.0}\n{"iteration": 1, "lo')
    assert "incomplete and left out (line 2)" in Page(write_report(run).read_text()).text


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("metrics.jsonl", None, "metrics.jsonl: not found"),
        ("metrics.jsonl", "", "metrics.jsonl: empty"),
        ("metrics.jsonl", "{bad}\n{}\n", "line 1: not JSON"),
        ("metrics.jsonl", "[1]\n{}\n", "line 1: expected one JSON object"),
        ("config.yaml", "a: [1\n", "config.yaml: not YAML"),
        ("environment.json", "[]", "environment.json: expected a JSON object"),
        ("evaluation.json", "{", "evaluation.json: not JSON"),
        ("evaluation.json", '{"before": []}', "evaluation.json: 'before'"),
        ("evaluation.json", '{"after": {"samples": [1]}}', "evaluation.json: 'after'"),
        ("evaluation.json", '{"after": {"samples": [{"file": "../../etc/passwd"}]}}', "outside the run directory"),
    ],
)
def test_broken_files_are_refused_in_one_line(tmp_path, name: str, content: str | None, named: str) -> None:
    run = rewritten(tmp_path, name, content)
    with pytest.raises(UserError, match=re.escape(named)) as error:
        write_report(run)
    assert "\n" not in str(error.value) and str(run) in str(error.value)
    assert not (run / "report.html").exists() and not list(run.glob(".*"))


def test_a_missing_directory_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no such run directory"):
        write_report(tmp_path / "nowhere")


def test_command_line(run, capsys) -> None:
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")


def test_noise_floor_and_watched_reward_have_their_charts(tmp_path) -> None:
    write_run(tmp_path)
    assert "Noise floor" not in write_report(tmp_path).read_text()
    floor = {"steps": {"0": 0.0, "3": 2.5e-6}, "largest": 2.5e-6, "clip_range": 1e-4, "layout": "TP 2", "dtype": "bf16"}
    (tmp_path / "noise_floor.json").write_text(json.dumps(floor))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [
        row | {"watch/gold": 0.5 - 0.01 * number, "reward/clamped_advantages": 7} for number, row in enumerate(rows)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(tmp_path).read_text())
    assert "Noise floor of the ratio" in page.text and "2.5e−6" in page.text and "TP 2" in page.text
    assert "Watched, not trained on" in page.text and "advantages clamped" in page.text
    assert "clamped_advantages" not in page.text, "a count is no dimension of the reward"
    (tmp_path / "noise_floor.json").write_text(json.dumps(floor | {"steps": {"0": 0.0, "3": 0.0}, "largest": 0.0}))
    assert "gave the same bits" in Page(write_report(tmp_path).read_text()).text


@pytest.mark.parametrize("floor", ['{"steps": {"0": "x"}}', '{"steps": {"a": 1}}', '{"largest": 1}', "[1]"])
def test_a_broken_noise_floor_is_named(tmp_path, floor: str) -> None:
    write_run(tmp_path)
    (tmp_path / "noise_floor.json").write_text(floor)
    with pytest.raises(UserError, match="noise_floor.json") as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value)
