"""The page in a real Chromium, on a gateway whose jobs this process trains: what a person does, sees and hears of."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright
from setuptools.dist import Distribution

from jobs.job import EventKind, JobStatus, JobSteps, StepMetrics
from jobs.job_log import JobLogWriter
from tests.support.api_site import FIGURES, Site, running_site

ROOT = Path(__file__).parents[2]
VENDORED = {
    "htm-preact.module.js": "72284e8e9079c87817145df1110f74e8a2aa040b2fc384922e18dfcb46fc1fd7",
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}
"""The sha256 of files of htm 3.1.1 (htm/preact/standalone.module.js) and uPlot 1.6.32, as the npm registry has them."""
VIEWS = ("jobs", "new", "chat", "adapters", "capacity")
MARKUP = "<img src=x onerror=document.body.remove()>"
SECONDS = 30


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("page")) as site:
        yield site


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        said = "there is no Chromium: install Debian's package chromium"
        pytest.fail(said) if os.environ.get("CI") else pytest.skip(said)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        expect.set_options(timeout=1000 * SECONDS)
        with playwright.chromium.launch(executable_path=chromium, args=arguments) as browser:
            yield browser


@pytest.fixture
def page(site: Site, browser: Browser) -> Iterator[Page]:
    """Signed in as the tenant `acme`. It asks nobody but the site for anything, and none of its scripts fails."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    asked, failed = list[str](), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(site.url)
    page.get_by_label("API key").fill(str(site.client.api_key))
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Jobs", exact=True)).to_be_visible()
    yield page
    assert not failed
    assert not [url for url in asked if not url.startswith(f"{site.url}/")]
    page.close()


def walk(page: Page, key: str, name: str, wanted: str) -> None:
    """Press a key until that has the focus whose property is this."""
    for _ in range(20):
        page.keyboard.press(key)
        if page.evaluate(f"document.activeElement.{name}") == wanted:
            return
    raise AssertionError(f"the keyboard does not come to {wanted}")


def trained(site: Site, job_id: str, fence: tuple[str, int], steps: range) -> None:
    """Let a session come so far."""
    pace: Any = {"step": steps[-1], "steps": 40, "loss": 3.0 / steps[-1], "tokens_per_second": 100.0, "step_seconds": 1}
    done = tuple(StepMetrics(step, 1000.0 + step, {"train_loss": 3.0 / step}) for step in steps)
    assert site.queue.record_steps(*fence, [JobSteps(job_id, FIGURES | pace, done)], tokens_per_second=100.0)


def test_a_key_is_asked_for_where_there_are_keys_and_by_keyboard_alone_one_comes_to_an_answer(
    site: Site, browser: Browser
) -> None:
    page = browser.new_page()
    page.goto(site.url)
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("sk-lora-none")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("unknown or revoked")
    page.get_by_label("API key").fill("")
    page.keyboard.type(str(site.client.api_key))
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Jobs", exact=True)).to_be_focused()
    walk(page, "Shift+Tab", "textContent", "Chat")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Chat", exact=True)).to_be_visible()
    walk(page, "Tab", "id", "question")
    page.keyboard.type("Hi")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Answer of tiny")).to_contain_text("hello")
    page.get_by_role("button", name="Sign out").press("Enter")
    expect(page.get_by_label("API key")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0
    page.close()


def test_a_job_is_submitted_followed_asked_and_promoted(site: Site, page: Page) -> None:
    page.get_by_role("link", name="New job").click()
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_label("Name of the adapter")).to_be_focused()
    page.get_by_label("Upload a file").set_input_files(
        {"name": f"{MARKUP}.jsonl", "mimeType": "application/jsonl", "buffer": site.rows.read_bytes()}
    )
    page.get_by_label("Name of the adapter").fill("shown")
    page.get_by_label("Epochs").fill("4")
    page.get_by_label("Rank").fill("4")
    page.get_by_text("Other options").click()
    page.get_by_label("As JSON").fill('{"lora": {"lora_dropuot": 0.1}}')
    page.get_by_role("button", name="Estimate").click()
    expect(page.get_by_role("alert")).to_contain_text("lora_dropuot")
    page.get_by_label("As JSON").fill('{"lora": {"lora_dropout": 0.1}}')
    page.get_by_label("Method").select_option("Preferences (DPO)")
    expect(page.get_by_text("Learning rate, times 2e-5")).to_be_visible()
    page.get_by_role("button", name="Estimate").click()
    expect(page.get_by_role("alert")).to_contain_text("use `chosen` and `rejected`")
    page.get_by_label("Method").select_option("Examples (supervised)")
    page.get_by_role("button", name="Estimate").click()
    expect(page.get_by_role("status").filter(has_text="Steps")).to_contain_text("8")
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_role("heading", name="shown")).to_be_visible()
    (job,) = [job for job in site.queue.list() if job.spec.adapter == "shown"]
    assert (job.spec.train.epochs, job.spec.lora.r, job.spec.lora.lora_dropout) == (4, 4, 0.1)

    fence = site.start(job.id)
    trained(site, job.id, fence, range(1, 6))
    curve = page.get_by_role("img", name="Training loss from 3.0000 at step 1")
    expect(curve).to_have_accessible_name("Training loss from 3.0000 at step 1 to 0.6000 at step 5")
    drawn = page.evaluate("document.querySelector('canvas').toDataURL()")
    site.queue.log(job.id, MARKUP)
    trained(site, job.id, fence, range(6, 11))
    expect(curve).to_have_accessible_name("Training loss from 3.0000 at step 1 to 0.3000 at step 10")
    assert page.evaluate("document.querySelector('canvas').toDataURL()") != drawn, "the curve moves"
    expect(page.get_by_label("Progress", exact=True)).to_have_js_property("value", 10)
    expect(page.get_by_label("Events", exact=True).get_by_text(MARKUP)).to_be_visible()

    log = JobLogWriter(site.registry.storage, job.id, 1)
    log.add(f"Traceback: {MARKUP}", level="error")
    log.write([])
    page.get_by_text("Log", exact=True).click()
    expect(page.get_by_label("Log", exact=True)).to_contain_text(f"error Traceback: {MARKUP}")

    site.train(job.id, fence)
    expect(page.get_by_role("link", name="Chat with step 4")).to_be_visible()
    page.get_by_role("link", name="Chat with it").click()
    site.base.goes_on.clear()
    page.get_by_label("Your message").fill("Hi")
    page.get_by_role("button", name="Send").click()
    answers = [page.get_by_label(f"Answer of {model}", exact=True) for model in ("tiny", "tiny:shown@1")]
    for answer in answers:
        expect(answer.locator(".text")).to_have_text("hel")
        expect(answer).to_have_attribute("aria-busy", "true")
    site.base.goes_on.set()
    for answer in answers:
        expect(answer.locator(".text")).to_have_text("hello")
        expect(answer).to_contain_text("5 tokens")

    site.registry.publish("tiny", "shown", {"weights": b"2"}, {"metrics": FIGURES})
    page.get_by_role("link", name="Adapters").click()
    for version in ("1", "2"):
        page.get_by_role("button", name=f"Promote version {version} to prod").click()
        expect(page.get_by_role("status")).to_contain_text(f"prod is version {version} now")
        assert site.registry.alias("tiny", "shown", "prod").meaning.number == int(version)
    page.get_by_role("button", name="Roll back prod").click()
    expect(page.get_by_role("status")).to_contain_text("prod is version 1 again")
    assert site.registry.alias("tiny", "shown", "prod").meaning.number == 1


def test_a_job_is_paused_goes_on_and_is_cancelled(site: Site, page: Page) -> None:
    job = site.create("endless", metadata={"note": MARKUP})
    page.get_by_role("link", name="endless").click()
    expect(page.get_by_text(MARKUP)).to_be_visible()
    for button, status in (("Pause", JobStatus.PAUSED), ("Resume", JobStatus.QUEUED)):
        page.get_by_role("button", name=button).click()
        expect(page.get_by_role("heading", name="endless")).to_contain_text(status)
    site.start(job.id)
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("dialog").get_by_role("button", name="No").click()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel it").click()
    expect(page.get_by_text("asked to cancel").first).to_be_visible()
    assert site.queue.get(job.id).requested == "cancel"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_fits_a_phone_and_is_accessible(site: Site, page: Page, scheme: Any) -> None:
    job = site.create(f"seen-{scheme}")
    trained(site, job.id, site.start(job.id), range(1, 4))
    site.registry.publish("tiny", "seen", {"weights": b"1"}, {"metrics": FIGURES, "job": job.id})
    site.queue.log(site.create(f"waits-{scheme}").id, "waits: it is next", kind=EventKind.WAITS)
    page.emulate_media(color_scheme=scheme)
    grounds = set()
    for view in (*VIEWS, f"jobs/{job.id}"):
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 844})
            page.goto(f"{site.url}/#/{view}")
            page.get_by_role("heading", level=1).or_(page.get_by_role("heading", name=job.suffix)).first.wait_for()
            page.wait_for_load_state("networkidle")
            assert page.evaluate("document.documentElement.scrollWidth") == width, view
            grounds.add(page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
        found = Axe().run(page)
        assert not found.response["violations"], f"{view}: {found.generate_report()}"
    assert grounds == {"rgb(246, 246, 243)" if scheme == "light" else "rgb(15, 16, 19)"}


def test_it_is_sent_to_everybody_once_and_may_load_nothing_from_elsewhere(site: Site) -> None:
    answer = requests.get(site.url, timeout=10)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'; ") and "unsafe" not in policy and "http" not in policy
    again = requests.get(site.url, headers={"if-none-match": answer.headers["etag"]}, timeout=10)
    assert (answer.status_code, again.status_code, again.content) == (200, 304, b"")
    assert requests.get(f"{site.url}/web/nothing", timeout=10).status_code == 404


def test_what_others_wrote_is_as_they_published_it_and_all_is_in_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "deploy" / "web"
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (folder / "vendor").glob("*.*s")}
    assert found == VENDORED
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files()
    wheel: Any = distribution.get_command_obj("build_py")
    wheel.ensure_finalized()
    wheel.manifest_files = {}
    files = {str(file.relative_to(ROOT)) for file in folder.rglob("*") if file.is_file()}
    assert len(files) > 15 and {*wheel.find_data_files("deploy", "deploy")} >= files
