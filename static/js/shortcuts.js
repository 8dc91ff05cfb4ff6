// Keys that do something by themselves, and the dialog that lists them. None of them acts while somebody writes.
import { copyAnswer } from "./messages.js";
import * as sidebar from "./sidebar.js";

const dialog = document.getElementById("shortcuts"), choice = document.getElementById("single-keys");
const NAME = "single keys", WRITES = "input, textarea, select, [contenteditable]";

function isOn() {
  try {
    return localStorage.getItem(NAME) !== "off";
  } catch {
    return true;
  }
}

choice.checked = isOn();
choice.addEventListener("change", () => {
  try {
    if (choice.checked) localStorage.removeItem(NAME);
    else localStorage.setItem(NAME, "off");
  } catch {
    // then it holds for this page
  }
});
document.querySelectorAll("[data-shortcuts]").forEach((button) => button.addEventListener("click", () => dialog.showModal()));
document.getElementById("shortcuts-close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

function write() {
  if (sidebar.isOpen()) sidebar.show(false);
  document.getElementById("text").focus();
}

function copyLast() {
  const answers = [...document.querySelectorAll("#thread .message.assistant")];
  return copyAnswer(answers, (words) => { document.getElementById("announcer").textContent = words; });
}

const KEYS = {
  "?": () => dialog.showModal(),
  "/": write,
  n: () => document.querySelector(".new-chat").click(),
  c: copyLast,
};

document.addEventListener("keydown", (event) => {
  if (!choice.checked || event.defaultPrevented || event.isComposing || event.repeat) return;
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.(WRITES)) return;
  // an open dialog has the keys to itself
  if (!Object.hasOwn(KEYS, event.key) || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  KEYS[event.key]();
});
