"""One thread, here and in the processes that tests start; no network, the same examples in every run; and a browser
for the tests of pages.
"""

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "tokencredit",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=30,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("tokencredit")

FLAGS = ["--no-sandbox", "--headless", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="session")
def browser():
    def absent(why):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{why}: the page was not opened in a browser")

    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        absent("playwright is not installed")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=found, args=FLAGS, timeout=0)
        except Error as error:
            absent(f"no Chromium ({str(error).splitlines()[0]})")
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, page_path):
    """The module's `page_path`, opened; its console, errors, dialogs and requests are collected, and there must be none
    of them.
    """
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.set_default_timeout(0)
    heard = []
    page.on("console", lambda message: heard.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: heard.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (heard.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: request.url == page_path.as_uri() or heard.append(f"request: {request.url}"))
    page.goto(page_path.as_uri())
    yield page
    page.close()
    assert heard == []
