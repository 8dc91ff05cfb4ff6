"""What every visitor of the chat does in a browser."""

import time

from playwright.sync_api import Page, expect

STORY = "Write a long story about a dragon, with many chapters."
PASSWORD = "correct horse 9 battery"
# two stacks on two slow cores take longer for an answer than the five seconds that are Playwright's own
expect.set_options(timeout=20_000)


def sign_up(page: Page, name: str) -> None:
    page.goto("/")
    page.get_by_role("link", name="Make an account").click()
    page.get_by_label("Email").fill(f"{name}-{time.time_ns()}@example.com")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign up").click()
    expect(page.get_by_role("heading", name="What would you like to know?")).to_be_visible()
    # Enter sends once the page's script has run
    page.wait_for_load_state()


def ask(page: Page, words: str) -> None:
    # Enter sends once the page's script has run
    page.wait_for_load_state()
    page.get_by_label("Your message").fill(words)
    page.keyboard.press("Enter")
