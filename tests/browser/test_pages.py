"""report.html, the gallery and the rating page as a reader has them: in Chromium, from file://."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sage.evaluation.gallery import write_gallery
from megatron_sage.evaluation.rating import make_rating
from megatron_sage.evaluation.tables import load_results
from megatron_sage.evaluation.votes import read_ratings, table
from megatron_sage.reporting.report import write_report
from tests.browser.chromium import Page, browser, require
from tests.evaluation import fake
from tests.reporting.fake_run import write_run

ENTER, DOWN, LEFT, RIGHT, TAB = "\ue007", "\ue015", "\ue012", "\ue014", "\ue004"
READY = "const v = [...document.querySelectorAll('video')]; return v.every(x => x.readyState >= 2) && v.length"
TIMES = """return [...document.querySelectorAll('article')].map(
  a => [...a.querySelectorAll('video')].map(v => v.currentTime))"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require()
    out = tmp_path_factory.mktemp("browser") / "eval %23?&'ü"  # a directory whose name a link must escape
    fake.write_evaluation(out, ("base", "sage", "cps"), samples=1, broken=[("cps", 1, 0)])
    write_gallery(load_results(out))
    make_rating(out, out / "rating", ["base,sage"], raters=2, seed=3, samples=1, limit=None)
    return out


def fits(page: Page, width: int) -> None:
    """Nothing sticks out of the window at the side."""
    page.driver.set_window_size(width, 900)
    page.wait("return document.documentElement.scrollWidth <= window.innerWidth", 3)


def test_report_shows_its_charts_and_plays_its_videos(page: Page, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    page.open(write_report(run))
    count = page.wait(READY)
    assert count == 6 and "quick<start>" in page.texts("h1")
    assert page.run("return [...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 50)")
    page.run("document.querySelectorAll('video').forEach(v => { v.muted = true; v.play() })")
    page.wait("return [...document.querySelectorAll('video')].every(v => v.currentTime > 0.1)")
    page.shot("report", 1280, 1400)
    fits(page, 500)
    assert page.errors() == []


def test_gallery_plays_sorts_and_filters(page: Page, evaluation: Path) -> None:
    page.driver.set_window_size(1280, 2400)
    page.open(evaluation / "gallery.html")
    assert page.wait(READY) == 8  # three rows of three, one without a file
    assert page.texts(".missing") == ["not finite: no video"]
    shown = [text.split(maxsplit=1)[1] for text in page.texts(".row .prompt")]
    assert shown == [" ".join(prompt.split()) for prompt in fake.PROMPTS]  # as text: no tag, no script
    # one row: a click plays its videos together, the others stay
    page.click("article:nth-of-type(1) video")
    page.wait("return document.querySelector('article:nth-of-type(1) video').currentTime > 0.3")
    first, second, _ = page.run(TIMES)
    assert max(first) - min(first) < 0.15 and second == [0, 0]
    page.click("article:nth-of-type(1) video")
    assert page.wait("return [...document.querySelectorAll('video')].every(v => v.paused)")
    # all
    page.click("#play")
    page.wait("return [...document.querySelectorAll('video')].every(v => !v.paused && v.currentTime > 0.1)")
    assert page.texts("#play") == ["Pause all"]
    page.shot("gallery", 1280, 1400)
    page.click("#play")
    page.wait("return [...document.querySelectorAll('video')].every(v => v.paused)")
    page.click("#restart")
    page.wait("return [...document.querySelectorAll('video')].every(v => v.currentTime === 0)")
    # order and filter
    page.choose("#column", "TA")
    page.choose("#checkpoint", "cps")
    gains = [fake.scores("cps", p, 0)["TA"] - fake.scores("base", p, 0)["TA"] for p in range(3)]
    known = sorted((p for p in range(3) if p != 1), key=lambda p: -gains[p])
    for order, expected in (("largest gain first", [*known, 1]), ("largest loss first", [*known[::-1], 1])):
        page.choose("#order", order)
        assert [int(text.split()[0]) for text in page.texts(".row .prompt")] == expected
    for show, sign in (("better", 1), ("worse", -1)):
        page.choose("#show", show)
        expected = {p for p in known if gains[p] * sign > 0}
        assert {int(text.split()[0]) for text in page.texts(".row .prompt")} == expected
        assert page.texts("#count") == [f"{len(expected)} of 3"]
    page.choose("#show", "all")
    page.type("#search", "RED circle")
    assert page.texts("#count") == ["1 of 3"]
    fits(page, 500)
    assert page.errors() == []


def study_of(evaluation: Path) -> str:
    return json.loads((evaluation / "rating/key.json").read_text())["study"]


def test_rating_by_mouse_is_kept_and_saved(page: Page, evaluation: Path) -> None:
    file = evaluation / "rating/pages/rater_01.html"
    items = fake.embedded_data(file)["items"]
    page.driver.set_window_size(1280, 1000)
    page.open(file)
    page.wait("return ['a', 'b'].every(id => document.getElementById(id).currentTime > 0.2)")
    left = page.run("return document.getElementById('a').getBoundingClientRect().left")
    assert left < page.run("return document.getElementById('b').getBoundingClientRect().left")
    text = page.run("return document.body.innerText")
    assert not any(name in text for name in ("base", "sage", "cps", ".mp4"))
    assert page.texts("#place") == ["1 of 3"] and page.texts("#text") == [" ".join(items[0]["text"].split())]
    for side in ("a", "b"):
        assert page.run(f"return document.getElementById('{side}').src").endswith(items[0][side])
    for question, answer in (("VQ", "A"), ("MQ", "same"), ("TA", "B")):
        assert not page.driver.find_element("css selector", "#next").is_enabled()
        page.click(f"[data-question={question}] [data-answer={answer}]")
    page.shot("rating", 1280, 1000)
    page.click("#next")
    page.driver.refresh()  # what was answered stays, and the place
    assert page.texts("#place") == ["2 of 3"] and page.texts("#answered") == ["1 answered"]
    page.click("#back")
    pressed = "return [...document.querySelectorAll('[aria-pressed=true]')].map(b => b.dataset.answer)"
    assert page.run(pressed) == ["A", "same", "B"]
    page.click("[data-question=VQ] [data-answer=B]")  # and can be changed
    page.key(ENTER)  # the keys are the page's again after a click
    assert page.texts("#place") == ["2 of 3"]
    page.click("#save")
    saved = page.download(f"answers_{study_of(evaluation)}_01.json")
    assert saved["answers"] == {items[0]["id"]: {"VQ": "B", "MQ": "same", "TA": "B"}}
    fits(page, 420)
    assert page.errors() == []


def test_rating_by_keyboard_ends_in_the_table(page: Page, evaluation: Path, tmp_path: Path) -> None:
    page.driver.set_window_size(1280, 1000)
    page.open(evaluation / "rating/pages/rater_02.html")
    for _ in range(3):
        page.wait("return document.getElementById('a').readyState >= 2")
        page.key(ENTER)  # nothing is answered: it stays
        page.key("a", "s", "b")  # the marked question moves on by itself
        page.key(DOWN, "2", ENTER)  # the last one again, by its number
    assert page.texts("#place") == ["End"] and "Thank you" in page.texts("#end")[0]
    assert page.run("return document.getElementById('next').offsetParent") is None
    page.key(LEFT, "1", RIGHT)
    # and with the tab key: every button can be reached and pressed
    page.key(LEFT)
    for _ in range(40):
        page.key(TAB)
        if page.run("return document.activeElement.dataset.answer === 'B'"):
            break
    page.key(ENTER)
    assert page.run("return document.querySelector('[data-question=VQ] [aria-pressed=true]').dataset.answer") == "B"
    page.key(RIGHT)
    page.click("#save")
    saved = page.download(f"answers_{study_of(evaluation)}_02.json")
    file = tmp_path / "answers.json"
    file.write_text(json.dumps(saved))
    key = evaluation / "rating/key.json"
    rows = {row["question"]: row for row in table(read_ratings([file], key))}
    sides = json.loads(key.read_text())["raters"]["2"]
    last = fake.embedded_data(evaluation / "rating/pages/rater_02.html")["items"][-1]["id"]
    better = sum((side == "B") if name != last else (side == "A") for name, side in sides.items())
    assert rows["VQ"]["better"] == better  # A, A, and B in the last one
    assert (rows["MQ"]["same"], rows["TA"]["same"]) == (3, 3)
    assert page.errors() == []


def test_a_page_without_its_videos_says_so(page: Page, evaluation: Path, tmp_path: Path) -> None:
    alone = tmp_path / "gallery.html"
    alone.write_bytes((evaluation / "gallery.html").read_bytes())
    page.driver.set_window_size(1280, 2400)
    page.open(alone)
    page.wait("return document.querySelectorAll('.missing').length === 9")
    assert any("cannot be played" in text for text in page.texts(".missing"))
    page.errors()  # the browser complains of the missing files, as it should


def test_a_missing_browser_is_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("MEGATRON_SAGE_REQUIRE_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install -y --no-install-recommends chromium"):
        require()
    for name in ("CI", "MEGATRON_SAGE_REQUIRE_BROWSER"):
        with monkeypatch.context() as with_ci:
            with_ci.setenv(name, "1")
            with pytest.raises(pytest.fail.Exception, match="apt-get install"):
                require()
