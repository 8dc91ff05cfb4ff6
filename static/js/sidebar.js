// The list of conversations: a drawer on small screens, and a dialog to rename or delete one.
const byId = (id) => document.getElementById(id);
const shell = byId("shell"), dialog = byId("manage"), list = byId("conversation-list");

export const isOpen = () => shell.classList.contains("open");

export function show(open) {
  shell.classList.toggle("open", open);
  byId("veil").hidden = !open;
  byId("open-sidebar").setAttribute("aria-expanded", String(open));
  // what lies behind the drawer is out of reach, for the keyboard too
  byId("main").inert = open;
  (open ? byId("close-sidebar") : byId("open-sidebar")).focus();
}

const find = (id) => list.querySelector(`[data-manage="${CSS.escape(id)}"]`)?.parentElement;

// Show a conversation's title; one that was used just now stands first, and is added when it is not there yet.
export function showConversation(id, title, used) {
  let item = find(id);
  if (!item) {
    if (!used) return;
    item = byId("conversation-template").content.firstElementChild.cloneNode(true);
    item.querySelector("a").href = `/c/${id}/`;
    item.querySelector("button").dataset.manage = id;
  }
  item.querySelector("a").textContent = title;
  item.querySelector("button").setAttribute("aria-label", `Rename or delete ${title}`);
  // moved only when it must be: an element that moves loses the focus
  if (used && list.firstElementChild !== item) list.prepend(item);
}

export function markCurrent(id) {
  list.querySelector("[aria-current]")?.removeAttribute("aria-current");
  find(id)?.querySelector("a").setAttribute("aria-current", "page");
}

export function dropConversation(id) {
  find(id)?.remove();
}

// on a wide screen it is no drawer
matchMedia("(max-width: 44rem)").addEventListener("change", () => { if (isOpen()) show(false); });
byId("open-sidebar").addEventListener("click", () => show(true));
byId("close-sidebar").addEventListener("click", () => show(false));
byId("veil").addEventListener("click", () => show(false));
list.addEventListener("click", (event) => {
  const button = event.target.closest("[data-manage]");
  if (!button) return;
  const id = button.dataset.manage;
  dialog.querySelector("[name=title]").value = button.parentElement.querySelector("a").textContent;
  for (const form of dialog.querySelectorAll("form[data-to]")) {
    form.action = `/c/${id}/${form.dataset.to}/`;
    form.elements.next.value = location.pathname;
  }
  dialog.showModal();
  dialog.querySelector("[name=title]").select();
});
byId("manage-close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
