// The list of conversations: a drawer on small screens, and a dialog to rename or delete one.
const byId = (id) => document.getElementById(id);
const shell = byId("shell"), dialog = byId("manage");

export const isOpen = () => shell.classList.contains("open");

export function show(open) {
  shell.classList.toggle("open", open);
  byId("veil").hidden = !open;
  byId("open-sidebar").setAttribute("aria-expanded", String(open));
  (open ? byId("close-sidebar") : byId("open-sidebar")).focus();
}

export function addConversation(id, title) {
  const item = byId("conversation-template").content.firstElementChild.cloneNode(true);
  const link = item.querySelector("a"), button = item.querySelector("button");
  link.href = `/c/${id}/`;
  link.textContent = title;
  link.setAttribute("aria-current", "page");
  button.dataset.manage = id;
  button.setAttribute("aria-label", `Rename or delete ${title}`);
  byId("conversation-list").prepend(item);
}

export function retitle(id, title) {
  const button = document.querySelector(`[data-manage="${CSS.escape(id)}"]`);
  if (button) button.parentElement.querySelector("a").textContent = title;
}

byId("open-sidebar").addEventListener("click", () => show(true));
byId("close-sidebar").addEventListener("click", () => show(false));
byId("veil").addEventListener("click", () => show(false));
byId("conversation-list").addEventListener("click", (event) => {
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
