// What can be done with a message: copy it, ask for an answer again, edit a question, show another version of it.
import { copy } from "./clipboard.js";

const BUTTONS = { assistant: [["copy", "Copy"], ["retry", "Try again"]], user: [["copy", "Copy"], ["edit", "Edit"]] };
const roleOf = (article) => (article.classList.contains("user") ? "user" : "assistant");

export function dress(article) {
  const row = document.createElement("div");
  row.className = "message-actions";
  for (const [act, label] of BUTTONS[roleOf(article)]) {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.act = act;
    button.textContent = label;
    row.append(button);
  }
  article.append(row);
  setVersions(article, (article.dataset.versions ?? "").split(" "));
}

// `ids` are all versions of the message, the oldest first; a message that is the only one has no switcher.
export function setVersions(article, ids) {
  const at = ids.indexOf(article?.id);
  article?.querySelector(".versions")?.remove();
  if (at < 0 || ids.length < 2) return;
  const group = document.createElement("span"), count = document.createElement("span");
  group.className = "versions";
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", `Version ${at + 1} of ${ids.length}`);
  count.textContent = `${at + 1} / ${ids.length}`;
  const [before, after] = [[-1, "‹", "Earlier version"], [1, "›", "Later version"]].map(([step, sign, label]) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = sign;
    Object.assign(button.dataset, { act: "show", step, shows: ids[at + step] ?? "" });
    button.setAttribute("aria-label", label);
    // it keeps the focus at either end
    button.setAttribute("aria-disabled", String(!ids[at + step]));
    return button;
  });
  group.append(before, count, after);
  article.querySelector(".message-actions").prepend(group);
}

export function setSource(article, words) {
  const source = article.querySelector(".source");
  if (source) source.textContent = words;
}

// Copy the last answer that has words, and say how it went.
export async function copyAnswer(articles, tell) {
  const answer = articles.findLast((article) => article.querySelector(".source")?.textContent);
  if (!answer) return;
  const button = answer.querySelector("[data-act=copy]");
  button.scrollIntoView({ block: "nearest" });
  tell(await copy(button, answer.querySelector(".source").textContent));
}

function edit(article, button, send) {
  const body = article.querySelector(".body");
  const form = document.createElement("form");
  form.className = "edit";
  form.innerHTML = '<textarea rows="1" required aria-label="Your message, edited"></textarea>'
    + '<div class="buttons"><button type="button" class="button small" data-cancel>Cancel</button><button class="button small button-primary">Send</button></div>'
    + '<p class="hint">It takes the place of this message and of all that follows.</p>';
  const text = form.querySelector("textarea");
  const resize = () => { text.style.height = "auto"; text.style.height = `${text.scrollHeight}px`; };
  const close = () => { form.remove(); article.classList.remove("editing"); };
  const submit = () => { if (text.value.trim() && send(text.value.trim(), article.id)) close(); };
  text.value = body.textContent;
  text.addEventListener("input", resize);
  form.addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
      button.focus();
    } else if (event.key === "Enter" && event.target === text && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  });
  form.querySelector("[data-cancel]").addEventListener("click", () => { close(); button.focus(); });
  article.classList.add("editing");
  article.prepend(form);
  resize();
  text.focus();
}

// `send(words, replaces)` and `retry(id)` tell whether the message was taken; `show(article, id, step)` asks for another version.
export function watchMessages(thread, { send, retry, show }) {
  thread.querySelectorAll(".message").forEach(dress);
  thread.addEventListener("click", (event) => {
    const button = event.target.closest("[data-act]"), article = button?.closest(".message");
    if (!article) return;
    if (button.dataset.act === "copy") copy(button, article.querySelector(".source, .body.text").textContent);
    else if (button.dataset.act === "retry") retry(article.id);
    else if (button.dataset.act === "show") button.dataset.shows && show(article, button.dataset.shows, button.dataset.step);
    else edit(article, button, send);
  });
}
