"""`make serve`, and a run started from the form of the Prefect UI in a real browser."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support import expected_conditions as expected
from selenium.webdriver.support.ui import WebDriverWait

from tasks.store import Store
from tasks.verify import verify
from tests.deployments.serving import ask, free_port, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of what `deployments/serve.sh` started."""
    with serving(tmp_path_factory.mktemp("prefect"), free_port()) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    assert shutil.which("chromium") and shutil.which("chromedriver"), "apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1400,1600",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_started_from_the_form_ends_in_a_release(server: str, browser: webdriver.Chrome, tmp_path: Path):
    manifest = tmp_path / "prompts.parquet"
    pl.DataFrame({"prompt": ["a large red circle on a white background", "a small blue star on a black background"]}).write_parquet(manifest)  # fmt: skip
    deployments = {d["name"]: d for d in ask(f"{server}/api/deployments/filter", {})}
    assert set(deployments) == {"nightly", "on-demand", "train", "promote", "evaluate"}
    assert deployments["nightly"]["schedules"][0]["schedule"]["cron"] == "0 2 * * *"

    browser.get(f"{server}/deployments/deployment/{deployments['on-demand']['id']}/run")
    fill(browser, "manifest", str(manifest))
    fill(browser, "store", str(tmp_path / "store"))
    fill(browser, "name", "from-the-form")
    browser.save_screenshot(str(tmp_path / "form.png"))
    WebDriverWait(browser, 30).until(
        expected.element_to_be_clickable((By.XPATH, "//button[normalize-space()='Submit']"))
    ).click()

    state = wait_for_run(server)
    assert state == "COMPLETED"
    assert verify(Store(tmp_path / "store")).problems == []
    assert (tmp_path / "store/datasets/from-the-form/v=1/README.md").exists()
    kinds = {artifact["type"] for artifact in ask(f"{server}/api/artifacts/filter", {})}
    assert kinds == {"markdown", "progress"}


def fill(browser: webdriver.Chrome, label: str, text: str) -> None:
    """Replace what stands in the text field with this label."""
    field = WebDriverWait(browser, 60).until(
        expected.element_to_be_clickable(
            (By.XPATH, f"(//label[normalize-space()='{label} (Optional)']/following::textarea)[1]")
        )
    )
    field.click()
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(text)


def wait_for_run(server: str, seconds: float = 600) -> str:
    """The state in which the only flow run ends."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        runs = [r for r in ask(f"{server}/api/flow_runs/filter", {}) if r["state_type"] != "SCHEDULED"]
        if runs and runs[0]["state_type"] in ("COMPLETED", "FAILED", "CRASHED"):
            return runs[0]["state_type"]
        time.sleep(1)
    raise TimeoutError("the run did not end")
