// Small things on every page: copy buttons, asking before something is lost, light or dark.
import { copy } from "./clipboard.js";

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy], [data-copy-code]");
  if (!button) return;
  const source = button.dataset.copy
    ? document.getElementById(button.dataset.copy)
    : button.closest(".code-block")?.querySelector("code");
  if (source) copy(button, source.textContent.trimEnd());
});

document.addEventListener("submit", (event) => {
  const question = event.target.dataset.confirm;
  if (question && !window.confirm(question)) event.preventDefault();
});

// open menus close with Escape, and when something else is clicked
document.addEventListener("click", (event) => {
  for (const menu of document.querySelectorAll("details.menu[open]")) if (!menu.contains(event.target)) menu.open = false;
});
document.addEventListener("keydown", (event) => {
  const menu = event.key === "Escape" && document.activeElement?.closest("details.menu[open]");
  if (!menu) return;
  menu.open = false;
  menu.querySelector("summary").focus();
});

// the server writes the choice into each page, so that none begins in the other colours
document.addEventListener("change", (event) => {
  if (!event.target.matches("[data-theme-choice]")) return;
  const choice = event.target.value;
  if (choice) document.documentElement.dataset.theme = choice;
  else delete document.documentElement.dataset.theme;
  document.cookie = `aiscale_theme=${choice}; path=/; max-age=${choice ? 31536000 : 0}; samesite=lax`;
});
