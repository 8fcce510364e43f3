"""The chat page in headless Chromium, against a real server. Skipped where Chromium or selenium is missing.

WAGER_SCREENSHOTS=DIR also writes pictures of the page there, to be looked at.
"""

import json
import os
import shutil
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.serve.conftest import build_llama
from tests.serve.http.conftest import KEY, serving, wait_idle
from wager.serve.http.settings import ServerSettings

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")

SETTINGS = {"temperature": "1.5", "top_p": "0.5", "top_k": "7", "max_tokens": "5", "seed": "42"}
SHOWN = """**Yes.** It removes the white space that *all* lines share:

```python
import textwrap

text = textwrap.dedent(\"\"\"
    first
      second
\"\"\")
```

- the smallest indentation is found with `len(line) - len(line.lstrip())`
- blank lines are ignored <b>as they are</b>
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A server with room for long answers and a draft model, so that every figure of the live panel has something to show."""
    settings = {
        "max_position_embeddings": 8192,
        "favoured": {"<|endoftext|>": -9.0, "<|im_end|>": -9.0},
    }  # it never ends by itself
    model = build_llama(tmp_path_factory.mktemp("page"), **settings)
    draft = build_llama(tmp_path_factory.mktemp("page-draft"), **settings)
    speculation = {"draft": str(draft), "num_speculative_tokens": 2}
    with serving(model, ServerSettings(drain_s=5), max_num_seqs=8, speculative_config=speculation) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1280,860",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page as a person sees it; `close` checks what no page may do."""

    def __init__(self, driver, url):
        self.driver, self.url, self.requests, self.expected = driver, url, [], []
        driver.get_log("performance"), driver.get_log("browser")
        driver.get(url)

    def one(self, selector):
        return self.driver.find_element("css selector", selector)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def until(self, condition, seconds=120):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            time.sleep(0.02)
        raise AssertionError(f"did not happen within {seconds} s; the page shows {self.one('body').text[:800]!r}")

    def ready(self):
        self.until(lambda: self.one("#status").text == "ready" and self.one("#model").get_attribute("value"))
        return self

    def fill(self, name, value):
        self.driver.execute_script(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('change'))",
            name,
            value,
        )

    def say(self, text):
        self.one("#input").send_keys(text)
        self.one("#send").click()

    def answered(self):
        """The last answer's text, once it is complete."""
        self.until(lambda: self.all(".message.assistant, .message.error") and not self.all(".streaming"))
        return self.all(".message .body")[-1].text

    def sent(self):
        """Bodies of the chat requests so far."""
        self._read_log()
        chats = [r for r in self.requests if r["url"].endswith("/v1/chat/completions")]
        return [json.loads(r["postData"]) for r in chats]

    def _read_log(self):
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"])

    def tile(self, name):
        for tile in self.all(".tile"):
            if tile.find_element("css selector", ".name").text.lower().startswith(name.lower()):
                return tile.find_element("css selector", ".value").text
        raise AssertionError(f"no tile {name!r}: {[t.text for t in self.all('.tile')]}")

    def close(self):
        self._read_log()
        foreign = [
            r["url"]
            for r in self.requests
            if urlsplit(r["url"]).scheme not in ("data", "blob", "chrome")
            and urlsplit(r["url"]).hostname != "127.0.0.1"
        ]
        assert foreign == [], "the page must talk to this machine only"
        said = [e["message"] for e in self.driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
        assert [m for m in said if not any(e in m for e in self.expected)] == []


@pytest.fixture()
def page(browser, own):
    opened = Page(browser, own[0]).ready()
    yield opened
    opened.close()
    wait_idle(own[1].state.context.llm)


def test_a_message_is_sent_and_its_answer_streams(page, own):
    page.fill("max_tokens", "3000")
    page.say("Count from one to ten.")
    assert (
        page.one(".message.user .body").text == "Count from one to ten."
        and page.one("#input").get_attribute("value") == ""
    )
    body = page.until(lambda: page.all(".message.assistant.streaming .body"))[0]
    lengths = [len(page.until(lambda: body.text))]
    for _ in range(2):
        page.until(lambda: len(body.text) > lengths[-1])
        lengths.append(len(body.text))
    assert page.one("#stop").is_displayed() and not page.one("#send").is_displayed()
    page.one("#stop").click()
    page.until(lambda: page.one("#send").is_displayed())
    assert "stopped" in page.all(".message.assistant .who")[-1].text and not page.all(".streaming")
    assert len(body.text) >= lengths[-1], "what was said stays"
    wait_idle(own[1].state.context.llm)


def test_the_conversation_goes_along_and_a_new_chat_forgets_it(page):
    page.fill("max_tokens", "4")
    page.fill("system", "Be brief.")
    page.say("One")
    first = page.answered()
    assert "4 tokens" in page.all(".message.assistant .who")[-1].text
    page.say("Two")
    page.answered()
    messages = page.sent()[-1]["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert messages[0]["content"] == "Be brief." and messages[3]["content"] == "Two"
    assert messages[2]["content"].split() == first.split()
    page.fill("max_tokens", "3000")
    page.say("Three")
    page.until(lambda: page.all(".streaming") and page.all(".message .body")[-1].text)
    page.one("#clear").click()  # in the middle of an answer
    page.until(lambda: page.one("#send").is_displayed() and not page.all(".message"))
    page.fill("max_tokens", "2")
    page.say("Four")
    page.answered()
    assert [m["content"] for m in page.sent()[-1]["messages"]] == ["Be brief.", "Four"]


def test_settings_change_the_request(page):
    page.say("Hi")
    page.answered()
    defaults = page.sent()[-1]
    assert defaults["model"] == "tiny" and defaults["stream"] is True and "seed" not in defaults
    for name, value in SETTINGS.items():
        page.fill(name, value)
    page.say("Hi again")
    page.answered()
    asked = page.sent()[-1]
    assert {name: asked[name] for name in SETTINGS} == {name: float(value) for name, value in SETTINGS.items()}


def test_enter_sends_and_shift_enter_does_not(page):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    page.fill("max_tokens", "2")
    page.one("#input").send_keys("line one", keys.SHIFT, keys.ENTER)
    page.one("#input").send_keys("line two")
    assert not page.all(".message")
    page.one("#input").send_keys(keys.NULL, keys.ENTER)
    page.answered()
    assert page.sent()[-1]["messages"][-1]["content"] == "line one\nline two"


def test_the_live_panel_shows_what_the_engine_does(page):
    page.fill("max_tokens", "6000")
    page.fill("temperature", "0")
    page.say("A long question that fills more than one block of the cache, so that the next one finds it there.")
    page.until(lambda: page.tile("Requests running") == "1 (0)")
    page.until(
        lambda: page.tile("Generated tokens per second").isdigit() and int(page.tile("Generated tokens per second")) > 0
    )
    page.until(lambda: float(page.tile("KV cache in use").split()[0]) > 0)
    page.until(lambda: int(page.tile("Tokens in the last step")) > 0)
    # The draft is the model itself: every guess is right.
    page.until(lambda: page.tile("Accepted tokens per step") == "2.00")
    page.one("#stop").click()
    page.until(lambda: page.tile("Requests running") == "0 (0)" and page.tile("KV cache in use") == "0.0 %")
    page.fill("max_tokens", "2")
    page.say("And another one.")
    page.until(lambda: int(page.tile("Prompt tokens from cache").split()[0]) > 0)
    assert all(t.find_element("css selector", "polyline").get_attribute("points") for t in page.all(".tile"))


def test_errors_are_shown_where_the_answer_would_be(page):
    page.expected = ["400 (Bad Request)"]
    page.fill("temperature", "-1")
    page.say("Hi")
    assert "temperature" in page.answered() and page.all(".message.error") and page.one("#send").is_displayed()


def test_a_server_with_a_key_asks_for_it(browser, tiny_dir):
    with serving(tiny_dir, ServerSettings(api_keys=(KEY,), drain_s=5)) as (url, _):
        page = Page(browser, url)
        page.expected = ["401 (Unauthorized)"]
        page.until(lambda: page.one("#status").text == "API key needed")
        assert page.one("#api-key").is_displayed()
        page.one("#api-key").send_keys(KEY, "\n")
        page.ready()
        page.fill("max_tokens", "3")
        page.say("Hi")
        page.answered()
        page.sent()
        assert not page.all(".message.error") and "authorization" in {k.lower() for k in page.requests[-1]["headers"]}
        browser.get("about:blank")
        page.close()


def test_markdown_never_becomes_markup(page):
    html = page.driver.execute_async_script(
        """const done = arguments[arguments.length - 1];
        import("/page/markdown.js").then(({ render }) => { const d = document.createElement("div"); d.append(render(arguments[0])); done(d.innerHTML); });""",
        "<img src=x onerror=alert(1)> **bold** `a<b`\n\n```html\n<script>alert(2)</script>\n```\n\n# Head\nText:\n- one\n- *two*\n  more\n\n3. three\n4. four\n\n```\nopen",
    )
    assert "<img" not in html and "<script" not in html
    assert "<strong>bold</strong>" in html and "<code>a&lt;b</code>" in html and "<p>Text:</p><ul><li>one</li>" in html
    assert (
        "<h3>Head</h3>" in html
        and "<li><em>two</em> more</li></ul>" in html
        and '<ol start="3"><li>three</li><li>four</li></ol>' in html
    )
    assert html.count("<pre>") == 2, "a fence that is still open is a block already"


LOOKS = {
    "light": (1280, 860, "light", False),
    "dark": (1280, 860, "dark", False),
    "mobile": (390, 800, "light", True),
    "mobile-dark": (390, 800, "dark", True),
}


@pytest.mark.parametrize("look", LOOKS)
def test_it_fits_and_can_be_read(page, look):
    """No sideways scrolling, nothing cut off, enough contrast; with WAGER_SCREENSHOTS also pictures."""
    width, height, scheme, mobile = LOOKS[look]
    cdp = page.driver.execute_cdp_cmd
    cdp("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    cdp(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile},
    )
    try:
        snap(page, f"{look}-empty")
        page.driver.execute_script(
            """const real = window.fetch; const shown = arguments[0];
            window.fetch = (path, options) => { if (options?.body) options.body = JSON.stringify({...JSON.parse(options.body), guided_choice: [shown]});
                                                return real(path, options); };""",
            SHOWN,
        )
        page.say("Does textwrap.dedent remove indentation?")
        assert page.answered() and page.all(".message pre code") and page.all(".message li")
        snap(page, look)
        overflow = page.driver.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert overflow <= 0, "the page scrolls sideways"
        for selector in ("#input", "#send", "#clear", "#model"):
            box = page.one(selector).rect
            assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= height, (
                selector,
                box,
            )
        assert not page.one("#api-key").is_displayed(), "asked for only where a key is needed"
        if not mobile:
            last = page.all(".tile")[-1].rect
            assert last["y"] + last["height"] <= height, "the live panel is in view without scrolling"
        else:
            assert not page.one("#side").is_displayed()
            page.one("#toggle-panel").click()
            assert (
                page.one("#side").is_displayed() and page.one("#toggle-panel").get_attribute("aria-expanded") == "true"
            )
            snap(page, f"{look}-panel")
        assert (
            contrast(page, ".message.assistant .body") > 7
            and contrast(page, ".hint") > 4.5
            and contrast(page, "#send") > 4.5
        )
    finally:
        cdp("Emulation.clearDeviceMetricsOverride", {})
        cdp("Emulation.setEmulatedMedia", {"features": []})


def snap(page, name):
    directory = os.environ.get("WAGER_SCREENSHOTS")
    if directory:
        page.until(lambda: page.tile("KV cache in use") != "–" if page.one("#side").is_displayed() else True)
        page.driver.save_screenshot(str(Path(directory) / f"page-{name}.png"))


def contrast(page, selector):
    """WCAG contrast of an element's text with what is behind it."""
    colours = page.driver.execute_script(
        """let e = document.querySelector(arguments[0]); const ink = getComputedStyle(e).color; let behind;
        do { behind = getComputedStyle(e).backgroundColor; e = e.parentElement; } while (behind === "rgba(0, 0, 0, 0)" && e);
        return [ink, behind];""",
        selector,
    )
    light = sorted(luminance(c) for c in colours)
    return (light[1] + 0.05) / (light[0] + 0.05)


def luminance(css):
    channels = [int(c) / 255 for c in css[css.index("(") + 1 : -1].replace(" ", "").split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
