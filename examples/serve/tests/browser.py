#!/usr/bin/env python3
"""Drives the page of a running jamba-serve in a real browser, with nothing but the keyboard.

    browser.py URL KEY CHROMIUM          (scripts/check-server starts both)
"""

import re
import sys

from playwright.sync_api import expect, sync_playwright

url, key, chromium = sys.argv[1:]

# Every text that is shown while a reply comes.
WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const last = document.querySelector("#log article:last-child.assistant p");
    if (last && last.textContent !== window.seen.at(-1)) window.seen.push(last.textContent);
  }).observe(document.getElementById("log"), { childList: true, subtree: true, characterData: true });
}"""

# From here on a reply stays at its first tokens, however fast the server: only cancelling ends it.
HOLD = """() => {
  const fetched = window.fetch;
  window.fetch = async (to, options) => {
    const response = await fetched(to, options);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    const first = async () => {
      for (let text = ""; ; ) {
        const { value, done } = await reader.read();
        if (done) throw new Error(`a reply of less than eight events: ${text}`);
        text += value;
        const events = text.split("\\n\\n");
        if (events.length > 8) return events.slice(0, 8).join("\\n\\n") + "\\n\\n";
      }
    };
    const held = new ReadableStream({
      start: async (stream) => stream.enqueue(await first()),
      pull: () => new Promise((_, fail) => options.signal.addEventListener("abort", () => fail(options.signal.reason))),
    });
    return new Response(held.pipeThrough(new TextEncoderStream()), response);
  };
  return () => { window.fetch = fetched; };
}"""

# The lowest contrast of texts with what is behind them, as WCAG has it.
CONTRAST = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => channels(color).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (channels(color)[3] !== 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const shown = [...document.querySelectorAll("h1, h2, p, button, label, summary, textarea, input, .took")]
    .filter((e) => e.checkVisibility() && !e.disabled);
  return Math.min(...shown.map((e) => {
    const [a, b] = [getComputedStyle(e).color, behind(e)].map(light);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }));
}"""


def drive(page):
    requested, complaints = [], []
    page.on("request", lambda request: requested.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    page.evaluate(WATCH)
    replies = page.locator("#log article.assistant")
    status = page.get_by_role("status")
    box, options = page.get_by_label("Message", exact=False).first, page.locator("summary")
    press, write = page.keyboard.press, page.keyboard.type

    def tab_to(locator, key="Tab"):
        for _ in range(20):
            if locator.evaluate("e => e === document.activeElement"):
                return
            press(key)
        raise AssertionError(f"no {key} leads to {locator}")

    # The message has the focus. Options: temperature 0, tokens as wanted.
    expect(box).to_be_focused()
    tab_to(options)
    press("Enter")
    tab_to(page.get_by_label("Temperature"))
    write("0")
    tab_to(page.get_by_label("API key"))
    write(key)
    tab_to(page.get_by_label("Temperature"), "Shift+Tab")

    def tokens(number):
        tab_to(page.get_by_label("Tokens at most"), "Tab" if box.evaluate("e => e === document.activeElement") else "Shift+Tab")
        press("Control+A")
        write(str(number))
        tab_to(box, "Shift+Tab")

    tokens(60)

    # A reply is streamed, and told about.
    write("Once upon a time")
    press("Shift+Enter")
    write("there was a fox")
    press("Enter")
    expect(status).to_have_text(re.compile(r"60 tokens at [\d.]+ tokens/s · first after \d+ ms · prompt \d+ tokens, \d+ cached"))
    seen = page.evaluate("window.seen")
    expect(page.get_by_role("heading", level=1)).not_to_have_text("Jamba")
    assert len(seen) > 10 and all(b.startswith(a) for a, b in zip(seen, seen[1:])), seen
    assert page.locator("article.user p").inner_text() == "Once upon a time\nthere was a fox"
    expect(box).to_be_focused()

    # The next turn begins from the state that the first left.
    write("And then?")
    press("Enter")
    expect(replies).to_have_count(2)
    expect(replies.nth(1).locator(".took")).to_contain_text("tokens/s")
    prompt, cached = map(int, re.search(r"prompt (\d+) tokens, (\d+) cached", status.inner_text()).groups())
    assert cached > 60 and prompt - cached < 10, (prompt, cached)

    # What is taken back can be said again, and is answered the same at temperature 0.
    said = seen[-1], replies.nth(1).locator("p").inner_text()
    tab_to(page.get_by_role("button", name="Take back"), "Shift+Tab")
    press("Enter")
    expect(replies).to_have_count(1)
    expect(box).to_have_value("And then?")
    expect(box).to_be_focused()
    press("Enter")
    expect(replies.nth(1).locator(".took")).to_contain_text("tokens/s")
    assert replies.nth(1).locator("p").inner_text() == said[1]

    # Escape ends a reply, and so does the button, and what was said stays.
    tokens(2000)
    release = page.evaluate_handle(HOLD)
    for count, end in [(3, lambda: press("Escape")), (4, lambda: (tab_to(page.get_by_role("button", name="Cancel")), press("Enter")))]:
        write("Tell me more")
        press("Enter")
        expect(replies.nth(count - 1).locator("p")).to_contain_text(re.compile(r"\w+ \w+"))
        end()
        expect(status).to_contain_text("cancelled")
        expect(replies).to_have_count(count)
    release.evaluate("release => release()")

    # A refused message comes back to be made shorter, with the error beside it.
    tab_to(page.get_by_role("button", name="New chat"), "Shift+Tab")
    press("Enter")
    expect(replies).to_have_count(0)
    box.fill("fox " * 9000)
    press("Enter")
    expect(page.locator("article.error p")).to_contain_text("tokens")
    expect(page.locator("article.user")).to_have_count(0)
    assert box.input_value().startswith("fox fox")
    tokens(5)
    press("Control+A")
    write("Hello")
    press("Enter")
    expect(status).to_contain_text("5 tokens at")

    # Readable in both schemes, on a desk and on a phone.
    backs = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        backs.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert page.evaluate(CONTRAST) >= 4.5, (scheme, page.evaluate(CONTRAST))
    assert len(backs) == 2, backs
    page.set_viewport_size({"width": 320, "height": 560})
    assert page.evaluate("document.documentElement.scrollWidth") <= 320

    others = [to for to in requested if not to.startswith((url, "data:"))]
    assert not others, f"from elsewhere: {others}"
    # Complaints of the browser's: the name of the model without a key, and the refused message.
    assert all("401" in complaint or "400" in complaint for complaint in complaints), complaints


with sync_playwright() as playwright:
    # Chromium's own sandbox needs rights that containers do not give; the page is ours.
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    page = browser.new_page()
    page.set_default_timeout(20_000)
    expect.set_options(timeout=20_000)
    drive(page)
    print(f"Chromium {browser.version}: typed, streamed, cached, taken back, cancelled, dark and light")
    browser.close()
