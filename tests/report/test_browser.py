"""The report in a browser: nothing fetched, no complaint, every plot to be seen, on a desk and on a phone."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from minimax_train.report.page import write_report
from tests.report.browser import browser, unpack

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("playwright", reason="playwright is missing: pip install -e '.[slow]'")
    with browser(unpack(tmp_path_factory.mktemp("chromium"))) as running:
        yield running


def watch(page: Any) -> tuple[list[str], list[str]]:
    """Addresses asked for, and complaints: console messages, errors of scripts."""
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    return asked, complaints


@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_in_a_browser(opened: Any, make_run: Callable[..., Path], width: int) -> None:
    report = write_report(make_run())
    page = opened.new_page(viewport={"width": width, "height": 800})
    asked, complaints = watch(page)
    page.goto(report.as_uri())
    page.wait_for_load_state("networkidle")
    images = page.query_selector_all("img")
    assert len(images) == len(list(report.parent.glob("*.png"))) >= 10
    for image in images:
        image.scroll_into_view_if_needed()
        assert image.is_visible() and image.evaluate("e => e.complete && e.naturalWidth > 0")
        box = image.bounding_box()
        assert box["x"] >= 0 and box["height"] > 80
        scrolls = image.evaluate("e => ['auto', 'scroll'].includes(getComputedStyle(e.parentElement).overflowX)")
        assert box["x"] + box["width"] <= width or scrolls, "a plot is cut off"
        pixels = imread(io.BytesIO(image.screenshot()))[..., :3]
        assert len(np.unique(pixels.reshape(-1, 3).round(1), axis=0)) > 3, f"{image.get_attribute('alt')} is blank"
        assert len(image.get_attribute("alt") or "") > 20
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    assert [address for address in asked if not address.startswith("data:")] == [report.as_uri()]
    assert complaints == []
    page.close()


def test_the_watch_sees(opened: Any, tmp_path: Path) -> None:
    """What the test above would miss if it could not see it: a fetch from outside, an error, a missing picture."""
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.log("hm"); undefinedName()</script>')
    page = opened.new_page()
    asked, complaints = watch(page)
    page.goto(bad.as_uri())
    page.wait_for_load_state("networkidle")
    assert "http://127.0.0.1:9/x.png" in asked
    assert any("hm" in said for said in complaints) and any("undefinedName" in said for said in complaints)
    assert not page.query_selector("img").evaluate("e => e.complete && e.naturalWidth > 0")
