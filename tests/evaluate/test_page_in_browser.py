"""The page as a reader opens it: every image inside it, nothing from elsewhere, and no complaint of a browser."""

import base64
import re
import shutil
import subprocess
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests.evaluate.test_label_report import explained, made
from tests.evaluate.test_report_page import Page
from utils.evaluate import plots
from utils.evaluate.label_report import write_label_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROBE = """<script>addEventListener("load", () => {
  const images = [...document.images].map(image => image.complete && image.naturalWidth);
  document.body.dataset.images = JSON.stringify(images);
  document.body.dataset.overflow = document.documentElement.scrollWidth - innerWidth;
})</script>"""
"""Added to a copy of the page: writes into it how wide each image is, 0 for one that is not shown."""


@pytest.fixture(scope="module", params=[3, 40])
def page(request, tmp_path_factory):
    """A page about 3 or 40 types, with an explanation."""
    cells, path = explained(made(request.param, 800), request.param), tmp_path_factory.mktemp("page") / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "umap_coordinates", lambda embedding, **how: np.asarray(embedding)[:, :2])
        return write_label_report(cells, path, "Cell types of <a>", "lead")


def test_everything_is_inside_and_nothing_runs(page):
    text = page.read_text(encoding="utf-8")
    parsed = Page(text)  # every element is closed in order
    assert parsed.images and len(parsed.links) == len(parsed.images)
    for image in parsed.images:
        kind, _, content = image["src"].partition(",")
        assert kind == "data:image/png;base64"
        Image.open(BytesIO(base64.b64decode(content, validate=True))).verify()
    visible = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"<script|<link|<iframe|javascript:|\bon\w+=|url\(|@import|https?://", visible, re.IGNORECASE)


def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    return found or pytest.skip(f"no browser is installed ({', '.join(BROWSERS)})")


def opened(path, folder, *words: str) -> subprocess.CompletedProcess:
    """A headless browser that opens a page; skips where it cannot start."""
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
    done = subprocess.run(
        [
            browser(),
            *flags,
            f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr",
            *words,
            f"file://{path}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"the browser does not start: {done.stderr.strip()[-200:]}")
    return done


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_shows_every_image_and_has_no_complaint(page, width, tmp_path):
    text = page.read_text(encoding="utf-8")
    copy = tmp_path / "copy.html"
    copy.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    done = opened(copy, tmp_path, f"--window-size={width},900", "--virtual-time-budget=5000", "--dump-dom")
    assert "CONSOLE" not in done.stderr
    (images,) = re.findall(r'data-images="\[([\d,]*)\]"', done.stdout)
    widths = [int(width) for width in images.split(",")]
    assert len(widths) == len(Page(text).images) and min(widths) > 300
    (overflow,) = re.findall(r'data-overflow="(-?\d+)"', done.stdout)
    assert int(overflow) <= 0  # the page does not scroll sideways


@pytest.mark.slow
def test_a_complaint_would_be_seen(tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<html><body><script>console.error('broken')</script></body></html>")
    assert "CONSOLE" in opened(bad, tmp_path, "--virtual-time-budget=1000", "--dump-dom").stderr
