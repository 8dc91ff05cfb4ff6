"""A person in a real Chromium: signs up, chats, sees tokens arrive, stops an answer, and finds it after a reload."""

import time

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.e2e.conftest import Stack
from tests.e2e.visitor import PASSWORD, STORY, ask, sign_up

pytestmark = [pytest.mark.stack, pytest.mark.browser]


def test_signs_up_chats_stops_and_reloads(page: Page) -> None:
    sign_up(page, "ada")
    ask(page, STORY)
    answer = page.locator(".message.assistant").last
    lengths: set[int] = set()
    ends_at = time.monotonic() + 30
    while len(lengths) < 4 and time.monotonic() < ends_at:
        if answer.count():
            lengths.add(len(answer.inner_text().strip()))
        page.wait_for_timeout(60)
    assert len(lengths) >= 4, f"tokens did not arrive one after another: {lengths}"
    assert page.url.split("/c/")[1]

    # a reload in mid-answer finds what was said, and goes on
    page.reload()
    expect(page.locator(".message.user")).to_contain_text("a long story about a dragon")
    answer = page.locator(".message.assistant").last
    expect(answer.locator(".body")).not_to_be_empty()
    expect(answer).to_have_attribute("data-status", "pending")

    page.get_by_role("button", name="Stop").click()
    expect(answer).to_have_attribute("data-status", "stopped")
    expect(answer).to_contain_text("You stopped this answer.")
    stopped = answer.locator(".done").inner_text()
    assert stopped.strip()
    page.reload()
    expect(page.locator(".message.assistant")).to_have_count(1)
    assert page.locator(".message.assistant .done").inner_text() == stopped
    expect(page.get_by_role("navigation", name="Your conversations")).to_contain_text("a long story about a dragon")


def test_a_second_turn_and_another_ones_conversation(page: Page, browser: Browser) -> None:
    sign_up(page, "bob")
    ask(page, "What is the capital of France?")
    first = page.locator(".message.assistant").first
    expect(first).to_have_attribute("data-status", "complete")
    expect(first.locator(".done")).not_to_be_empty()
    ask(page, "And of Italy?")
    expect(page.locator('.message.assistant[data-status="complete"]')).to_have_count(2)
    ids = page.locator(".message.assistant").evaluate_all("all => all.map((each) => each.id)")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(f'.message.assistant[data-status="complete"]:not(#{ids[0]}, #{ids[1]})')).to_have_count(1)
    expect(page.locator(".message")).to_have_count(4)
    # with the keyboard: open the first question, think again, and edit it after all
    page.locator("[data-act=edit]").first.press("Enter")
    expect(page.get_by_label("Your message, edited")).to_be_focused()
    page.keyboard.press("Escape")
    page.keyboard.press("Enter")
    page.get_by_label("Your message, edited").fill("What is the capital of Spain?")
    page.keyboard.press("Enter")
    expect(page.locator(".message")).to_have_count(2)
    expect(page.locator('.message.assistant[data-status="complete"]')).to_have_count(1)
    expect(page.get_by_role("heading", level=1)).to_have_text("What is the capital of Spain?")
    page.reload()
    expect(page.locator(".message")).to_have_count(2)
    url = page.url
    stranger = browser.new_context(base_url=page.url.split("/c/")[0]).new_page()
    sign_up(stranger, "eve")
    response = stranger.goto(url)
    assert response is not None and response.status == 404
    stranger.context.close()


def test_goes_back_to_an_older_version_and_on_from_there(page: Page) -> None:
    sign_up(page, "lea")
    complete, question = page.locator('.message.assistant[data-status="complete"]'), page.locator(".message.user .body")
    ask(page, "What is the capital of France?")
    expect(complete).to_have_count(1)
    page.locator("[data-act=edit]").press("Enter")
    page.get_by_label("Your message, edited").fill("What is the capital of Spain?")
    page.keyboard.press("Enter")
    # with the keyboard: the focus stays on the button, at the end of the row too
    page.get_by_role("group", name="Version 2 of 2").get_by_role("button", name="Earlier version").press("Enter")
    expect(question).to_have_text("What is the capital of France?")
    expect(page.get_by_role("button", name="Earlier version")).to_be_focused()
    expect(page.locator("#announcer")).to_have_text("Version 1 of 2")
    expect(page.get_by_role("heading", level=1)).to_have_text("What is the capital of France?")
    page.keyboard.press("Enter")
    page.reload()
    expect(question).to_have_text("What is the capital of France?")
    ask(page, "And of Italy?")
    expect(complete).to_have_count(2)
    page.get_by_role("button", name="Try again").press("Enter")
    answer = page.locator(".message.assistant").last
    expect(answer.get_by_role("group", name="Version 2 of 2")).to_be_visible()
    newer = answer.get_attribute("id")
    answer.get_by_role("button", name="Earlier version").press("Enter")
    expect(answer.get_by_role("group", name="Version 1 of 2")).to_be_visible()
    older = answer.get_attribute("id")
    assert older != newer
    # what followed is put away with its question, and comes back as it was
    page.locator(".message.user").first.get_by_role("button", name="Later version").press("Enter")
    expect(question).to_have_text(["What is the capital of Spain?"])
    expect(page.locator(".message")).to_have_count(2)
    page.locator(".message.user").first.get_by_role("button", name="Earlier version").press("Enter")
    expect(question).to_have_text(["What is the capital of France?", "And of Italy?"])
    expect(answer).to_have_attribute("id", older or "")


def test_two_windows_follow_each_other(page: Page, healthy: Stack) -> None:
    sign_up(page, "fay")
    ask(page, "What is the capital of France?")
    expect(page.locator('.message.assistant[data-status="complete"]')).to_have_count(1)
    other = page.context.new_page()
    other.goto(page.url)
    other.get_by_label("Your message").fill("half a thought")
    ask(page, STORY)
    # the question and its answer appear, in mid-answer, and may be stopped from here
    expect(other.locator(".message.user").last).to_have_text(STORY + "CopyEdit")
    expect(other.locator(".message.assistant").last.locator(".body")).not_to_be_empty()
    other.get_by_role("button", name="Stop").click()
    for each in (page, other):
        expect(each.locator(".message.assistant").last).to_have_attribute("data-status", "stopped")
        expect(each.locator(".message")).to_have_count(4)
    expect(other.get_by_label("Your message")).to_have_value("half a thought")
    ends = [each.locator(".message.assistant").last.locator(".done").inner_text() for each in (page, other)]
    assert ends[0] == ends[1]
    # what happens while a window is elsewhere is there when it comes back
    other.goto(f"{healthy.base_url}/accounts/keys/")
    page.get_by_role("button", name="Try again").click()
    other.go_back()
    expect(other.locator(".message")).to_have_count(4)
    page.get_by_role("button", name="Stop").click()
    expect(other.locator(".message.assistant").last).to_have_attribute("data-status", "stopped")
    # a name, and an end
    other.get_by_label("Rename, save or delete").click()
    other.get_by_label("Name", exact=True).first.fill("Of dragons")
    other.get_by_role("button", name="Rename", exact=True).first.click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Of dragons")
    other.on("dialog", lambda dialog: dialog.accept())
    other.get_by_label("Rename, save or delete").click()
    other.get_by_role("button", name="Delete", exact=True).first.click()
    expect(page.locator(".message")).to_have_count(0)
    expect(page.get_by_role("alert")).to_contain_text("deleted in another window")
    expect(page.get_by_role("navigation", name="Your conversations").locator("li")).to_have_count(0)
    # a context whose page is on its way somewhere may not close
    expect(other.get_by_role("heading", name="What would you like to know?")).to_be_visible()
    other.wait_for_load_state()
    other.close()


@pytest.mark.parametrize("width", [320, 768, 1024, 1440])
def test_copy_lies_over_no_code(browser: Browser, healthy: Stack, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(f"{healthy.base_url}/api/docs")
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
    # the lines themselves: what a block hides until it is scrolled counts too
    covered = page.evaluate("""() => [...document.querySelectorAll(".code-block")].filter(block => {
        const button = block.querySelector(".button").getBoundingClientRect(), lines = document.createRange()
        lines.selectNodeContents(block.querySelector("code"))
        return [...lines.getClientRects()].some(line =>
            line.left < button.right && line.right > button.left && line.top < button.bottom && line.bottom > button.top)
    }).length""")
    assert page.locator(".code-block").count() > 20 and covered == 0
    page.close()


def test_heals_when_the_web_process_dies(page: Page, healthy: Stack) -> None:
    sign_up(page, "cyd")
    ask(page, STORY)
    answer = page.locator(".message.assistant").last
    expect(answer.locator(".body")).not_to_be_empty()
    healthy.kill("web")
    expect(page.locator("#state")).to_have_text("Reconnecting …")
    healthy.wait_ready()
    expect(page.locator("#state")).to_have_text("", timeout=30_000)
    page.get_by_role("button", name="Stop").click()
    expect(answer).to_have_attribute("data-status", "stopped")
    assert answer.locator(".done").inner_text().strip()


def test_a_text_that_is_too_long_stays_whole(page: Page) -> None:
    sign_up(page, "eve")
    written = page.get_by_label("Your message")
    long = "word " * 6_401
    page.wait_for_load_state()
    written.focus()
    page.keyboard.insert_text(long)
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_have_text(
        "Your message has 32,004 characters; the most is 32,000. Please shorten it."
    )
    assert written.input_value() == long and page.locator(".message").count() == 0
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.insert_text("Say hello.")
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator('.message.assistant[data-status="complete"]')).to_have_count(1)


def test_waits_for_an_answer_and_says_so_as_long_as_that_is_true(page: Page) -> None:
    sign_up(page, "gil")
    ask(page, STORY)
    expect(page.locator('.message.assistant[data-status="pending"] .body')).not_to_be_empty()
    ask(page, "And then?")
    expect(page.locator("#notice")).to_have_text("Wait until the answer is finished, or stop it first.")
    page.keyboard.press("Escape")
    expect(page.locator('.message.assistant[data-status="stopped"]')).to_have_count(1)
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.get_by_label("Your message")).to_have_value("And then?")


def test_what_was_written_outlives_a_log_out(page: Page) -> None:
    sign_up(page, "hal")
    ask(page, "Say hello.")
    expect(page.locator('.message.assistant[data-status="complete"]')).to_have_count(1)
    other = page.context.new_page()
    other.goto(page.url)
    email = other.locator(".who").get_attribute("title")
    other.locator(".side-foot summary").click()
    other.get_by_role("button", name="Log out").click()
    expect(other.get_by_role("link", name="Make an account")).to_be_visible()
    other.wait_for_load_state()
    other.close()
    ask(page, "A thought that must not be lost.")
    expect(page.locator("#notice")).to_contain_text("You are logged out.")
    page.get_by_role("link", name="Log in again").click()
    page.get_by_label("Email").fill(email or "")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_label("Your message")).to_have_value("A thought that must not be lost.")
    page.wait_for_load_state()
    page.get_by_label("Your message").press("Enter")
    expect(page.locator('.message.assistant[data-status="complete"]')).to_have_count(2)
    page.reload()
    page.wait_for_load_state()
    expect(page.get_by_label("Your message")).to_have_value("")


def test_light_or_dark_is_a_choice_that_stays(page: Page) -> None:
    sign_up(page, "ivy")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.locator(".side-foot summary").click()
    page.get_by_label("Theme").select_option("Dark")
    dark = page.evaluate(ground)
    assert dark != light
    page.goto("/account/usage/")
    assert page.evaluate(ground) == dark
    page.locator("summary", has_text="Personal").click()
    page.get_by_label("Theme").select_option("System")
    page.reload()
    assert page.evaluate(ground) == light


def test_instructions_are_kept_and_heeded(page: Page) -> None:
    sign_up(page, "jan")
    page.locator(".side-foot summary").click()
    page.get_by_role("link", name="Instructions").click()
    page.get_by_label("Your instructions").fill("I teach biology. Answer in one sentence.")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("status")).to_contain_text("Saved.")
    expect(page.get_by_label("Your instructions")).to_have_value("I teach biology. Answer in one sentence.")
    page.get_by_role("link", name="Back to the chat").click()
    ask(page, "What is a cell?")
    expect(page.locator('.message.assistant[data-status="complete"]')).to_have_count(1)


def test_the_admin_names_its_fields_and_fits_a_phone(page: Page, admin: tuple[str, str]) -> None:
    page.goto("/accounts/login/?next=/admin/spend/webhookendpoint/add/")
    page.get_by_label("Email").fill(admin[0])
    page.get_by_label("Password").fill(admin[1])
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("link", name="Skip to the content").press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    box = page.get_by_role("combobox", name="Organization")
    box.press("Enter")
    page.get_by_label("Search Organization").fill("no such one")
    expect(page.get_by_text("No results found")).to_be_visible()
    page.keyboard.press("Escape")
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto("/admin/accounts/user/")
    page.get_by_role("link", name=admin[0]).first.click()
    expect(page.get_by_role("searchbox", name="User permissions")).to_be_attached()
    sideways = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(sideways) <= 0
