"""A person without a mouse, in a real Chromium."""

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.conftest import Stack
from tests.e2e.visitor import STORY, ask, sign_up

pytestmark = [pytest.mark.stack, pytest.mark.browser]


def test_works_with_the_keyboard_alone(page: Page) -> None:
    sign_up(page, "dan")
    expect(page.get_by_label("Your message")).to_be_focused()
    page.keyboard.type("Say hello.")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Be brief.")
    page.keyboard.press("Enter")
    expect(page.locator(".message.user")).to_contain_text("Be brief.")
    expect(page.locator('.message.assistant[data-status="complete"]')).to_have_count(1)
    expect(page.get_by_label("Your message")).to_be_focused()
    page.keyboard.type(STORY)
    page.keyboard.press("Enter")
    expect(page.locator('.message.assistant[data-status="pending"] .body')).not_to_be_empty()
    page.keyboard.press("Escape")
    expect(page.locator('.message.assistant[data-status="stopped"]')).to_have_count(1)


def test_shortcuts_act_where_nobody_writes(page: Page, healthy: Stack) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=healthy.base_url)
    sign_up(page, "moe")
    written, dialog = page.get_by_label("Your message"), page.get_by_role("dialog", name="Keyboard shortcuts")
    # keys that are written are written
    page.keyboard.type("cn/?")
    expect(written).to_have_value("cn/?")
    expect(dialog).to_be_hidden()
    written.fill("")
    ask(page, STORY)
    answer = page.locator(".message.assistant").last
    expect(answer.locator(".body")).not_to_be_empty()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    page.keyboard.press("?")
    expect(dialog).to_be_visible()
    # the dialog has the keys to itself: Escape closes it, and stops no answer
    page.keyboard.press("n")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    expect(answer).to_have_attribute("data-status", "pending")
    page.keyboard.press("/")
    expect(written).to_be_focused()
    page.keyboard.press("Escape")
    expect(answer).to_have_attribute("data-status", "stopped")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("c")
    expect(page.locator("#announcer")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == answer.locator(".source").text_content()
    # whoever speaks to the computer, or slips, turns them off
    opener = page.get_by_role("button", name="All shortcuts")
    opener.press("Enter")
    page.get_by_label("Single keys are on").press("Space")
    page.get_by_role("button", name="Close", exact=True).press("Enter")
    expect(opener).to_be_focused()
    url = page.url
    page.keyboard.press("n")
    page.reload()
    assert page.url == url
    page.wait_for_load_state()
    opener.press("Enter")
    page.get_by_label("Single keys are on").press("Space")
    page.keyboard.press("Escape")
    expect(opener).to_be_focused()
    page.keyboard.press("n")
    expect(page.get_by_role("heading", name="What would you like to know?")).to_be_visible()
    page.wait_for_load_state()


def test_the_drawer_of_a_phone_keeps_the_keyboard_and_gives_it_back(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    sign_up(page, "kim")
    opener = page.get_by_role("button", name="Show conversations")
    opener.press("Enter")
    expect(page.get_by_role("button", name="Close the list")).to_be_focused()
    inside = "document.activeElement === document.body || document.activeElement.closest('#sidebar, .skip') !== null"
    for _ in range(12):
        page.keyboard.press("Tab")
        assert page.evaluate(inside)
    # a menu within it closes first
    page.locator(".side-foot summary").press("Enter")
    page.keyboard.press("Escape")
    expect(page.locator(".side-foot details")).not_to_have_attribute("open", "")
    expect(opener).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("Escape")
    expect(opener).to_be_focused()
    expect(opener).to_have_attribute("aria-expanded", "false")
