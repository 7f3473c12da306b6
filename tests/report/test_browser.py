"""The page in a browser: narrow, wide and printed, with its filters, search and accessibility."""

import contextlib
import shutil
import time

import pytest

from atlas_jax.report import page
from atlas_jax.types import Reward
from tests.report import runs

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine; apt-get install chromium brings it"
)
RIGHT_TO_LEFT = "كم عدد التفاح؟ أربعة تفاحات"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, path, width=1280):
    """A page whose console must stay empty."""
    said = []
    view = browser.new_page(viewport={"width": width, "height": 900})
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda r: r.url.startswith("file:") or r.url.startswith("data:")
            or said.append(f"asks {r.url}"))  # fmt: skip
    view.goto(f"file://{path}")
    view.wait_for_selector("[data-ready=yes]", timeout=60_000)
    yield view
    view.close()
    assert said == []


def written(*directories):
    path = directories[0] / "report.html"
    page.write([str(directory) for directory in directories], str(path))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with every kind of sample, its judges and an evaluation."""
    verdict = {"score": 0.8, "uncertainty": 0.1, "rationale": "It names the step.", "spread": 0.0,
               "escalation": "they disagree", "model": "m", "failures": []}  # fmt: skip

    def groups(step):
        judged = runs.sample("judged", 0, False, False, details={"rim": {
            "judges": {"accuracy": verdict}, "gaming": ["it speaks to the judge"]}})  # fmt: skip
        lost = runs.sample("judged", 1, False, False, reward=Reward(None, {"unscored": "no judge"}))
        arabic = runs.sample(RIGHT_TO_LEFT, 0, True, True, teaching=f"{RIGHT_TO_LEFT} x" * 9)
        evil = runs.sample("evil", 0, False, False, teaching="<script>document.title='!'</script>")
        changing = runs.sample("changing", 0, False, True, teaching=f"count them in step {step}")
        wide = runs.sample("wide", 0, False, False, guided=runs.said("w" * 3000))
        return [*runs.group("q1"), judged, lost, arabic, evil, changing, wide]

    run = runs.grpo(tmp_path_factory.mktemp("whole") / "run", groups=groups)
    return written(runs.evaluated(runs.finished(run)))


@pytest.fixture(scope="module")
def pages(whole, tmp_path_factory):
    """Pages by name: of a run that is whole, of one without a step, of SFT, and so on."""
    folder = tmp_path_factory.mktemp("pages")
    nan = runs.grpo(folder / "nan", steps=3)
    (nan / "metrics.jsonl").write_text('{"step": 1, "reward/mean": NaN, "policy/kl": null}\n')
    for path in (nan / "rollouts").iterdir():
        text = path.read_text().replace('"value": 1.0', '"value": "a \\ud800 word"')
        path.write_text(text.replace('"reward": -1.0', '"reward": NaN').replace("pears", "\\ud800"))
    return {
        "whole": whole,
        "empty": written(runs.grpo(folder / "empty", steps=0)),
        "sft": written(runs.sft(folder / "sft")),
        "nan": written(nan),
        "two": written(runs.grpo(folder / ("a-run-with-a-long-name" * 4), steps=4), nan),
    }


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["whole", "empty", "sft", "nan", "two"])
def test_a_page_fits_its_window(browser, pages, name, width):
    with opened(browser, pages[name], width) as view:
        for details in view.query_selector_all("summary"):
            if details.is_visible():
                details.click()
        assert view.evaluate("document.documentElement.scrollWidth") <= width


def test_a_printed_page_is_no_wider_than_its_paper_and_has_no_controls(browser, whole):
    with opened(browser, whole, 794) as view:  # A4 at 96 dots an inch
        view.emulate_media(media="print")
        assert view.evaluate("document.documentElement.scrollWidth") <= 794
        assert not view.is_visible("#filters") and not view.is_visible("nav")
        assert view.is_visible(".curve svg") and view.is_visible(".verdict")


def shown(view):
    """The number of samples that the page says it has found, and that of the cards."""
    found = int(view.inner_text("#found").split()[0])
    while view.is_visible("#more"):
        view.click("#more")
    assert len(view.query_selector_all(".card")) == found
    return found


def test_filters_show_the_samples_of_their_kind(browser, whole):
    counts = {"wrong → right": 31, "right → wrong": 10, "leak": 10, "gamed": 20, "unscored": 10}
    with opened(browser, whole) as view:
        assert shown(view) == 101  # ten steps of ten samples, and one of the evaluation
        for name, count in counts.items():
            view.click(f"button:has-text('{name} (')")
            assert view.get_attribute("button[aria-pressed=true]", "aria-pressed") == "true"
            assert shown(view) == count, name
            if name == "wrong → right":
                assert all(
                    "wrong → right" in c for c in view.locator(".card .tags").all_inner_texts()
                )
            view.click(f"button:has-text('{name} (')")
        view.click("button:has-text('largest advantage')")
        assert 10 <= shown(view) < 101
        view.click("button:has-text('largest advantage')")
        view.select_option("#source", label="step 3 (10 of 10)")
        assert shown(view) == 10


def test_search_finds_words_of_any_text(browser, whole):
    with opened(browser, whole) as view:
        view.fill("#search", "IN STEP 7")
        assert shown(view) == 1
        assert "step 7" in view.inner_text(".card .tags")
        view.fill("#search", "التفاح")
        assert shown(view) == 10
        view.fill("#search", "no such word")
        assert shown(view) == 0


def test_what_a_lesson_changed_is_marked_and_its_script_is_text(browser, whole):
    with opened(browser, whole) as view:
        view.fill("#search", "changing")
        card = view.locator(".card").first
        assert "alone, ✕ wrong, 4 tokens" in card.inner_text()
        assert "taught, ✓ right, 7 tokens" in card.inner_text()
        assert card.locator("del").all_inner_texts() == ["5", "apples"]
        assert card.locator("ins").all_inner_texts() == ["With the lesson ", "4", "pears"]
        view.fill("#search", "document.title")
        assert "<script>document.title='!'</script>" in view.inner_text(".card .lesson")
        assert view.title() != "!" and len(view.query_selector_all("script")) == 2


def test_a_question_is_followed_over_the_steps_and_within_its_group(browser, whole):
    with opened(browser, whole) as view:
        view.fill("#search", "changing")
        view.click("button:has-text('this question over the steps (10)')")
        assert shown(view) == 10
        steps = [
            text.split(",")[0]
            for text in view.locator(".card .tags li:first-child").all_inner_texts()
        ]
        assert steps == [f"step {i}" for i in range(1, 11)]
        assert view.locator(".lesson ins").all_inner_texts() == [str(i) for i in range(2, 11)]
        view.click("button:has-text('back to all')")
        view.fill("#search", "lesson 0 of q1")
        view.click("button:has-text('its group (4 of 4)')")
        assert shown(view) == 4
        view.click(".card summary")
        view.wait_for_selector(".card details .group")
        assert view.locator(".card .group span").all_inner_texts()[:4] == [
            "0: 1 ✓ !", "1: 1 ✓", "2: -1 ✕", "3: 0"
        ]  # fmt: skip


def test_a_card_has_the_verdict_of_each_judge(browser, whole):
    with opened(browser, whole) as view:
        view.click("button:has-text('gamed')")
        view.fill("#search", "judged")
        view.click(".card summary")
        view.wait_for_selector(".card details .text")
        text = view.inner_text(".card")
        assert "judge accuracy: 0.8, uncertainty 0.1, asked the large model: they disagree" in text
        assert "It names the step." in text and "! it speaks to the judge" in text
        assert "<teaching>" in text  # the teacher's whole text


def test_curves_tell_their_values_to_the_pointer_and_in_a_table(browser, whole):
    with opened(browser, whole) as view:
        figure = view.locator("figure", has_text="Reward and its parts")
        box = figure.locator("> svg").bounding_box()
        view.mouse.move(box["x"] + box["width"] * 0.97, box["y"] + box["height"] / 2)
        assert figure.locator(".tip").inner_text().split("\n") == ["step 10", "reward/mean: 1"]
        figure.locator("summary").click()
        figure.locator("tbody tr").first.wait_for()
        rows = [row.split() for row in figure.locator("tbody tr").all_inner_texts()]
        assert rows[0] == ["1", "-0.1"] and rows[-1] == ["10", "1"]


def test_ten_thousand_samples_open_at_once(browser, tmp_path):
    def groups(step):
        return [s for i in range(100) for s in runs.group(f"q{step}-{i}", 10)]

    path = written(runs.grpo(tmp_path / "run", groups=groups))
    start = time.monotonic()
    with opened(browser, path) as view:
        assert "240 of 10,000 samples" in view.inner_text("#samples")
        view.fill("#search", "q7-")
        assert shown(view) == 24
    assert time.monotonic() - start < 300


@pytest.mark.parametrize("name", ["whole", "empty", "sft", "two"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser, pages, name, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    with opened(browser, pages[name]) as view:
        view.emulate_media(color_scheme=scheme)
        found = axe.Axe().run(view).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] != "minor"] == []
