// Copy text, also on a page that came over plain HTTP: there the browser has no navigator.clipboard.
function copyBySelection(text) {
  const box = document.createElement("textarea"), focused = document.activeElement;
  box.value = text;
  box.setAttribute("readonly", "");
  box.className = "visually-hidden";
  // within an open dialog, what lies outside of it cannot be selected
  (focused?.closest("dialog") ?? document.body).append(box);
  box.select();
  const copied = document.execCommand("copy");
  box.remove();
  focused?.focus({ preventScroll: true });
  return copied;
}

async function put(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text);
  }
}

// The button says for a moment how it went; so does what is returned.
export async function copy(button, text) {
  const label = button.dataset.label ?? (button.dataset.label = button.textContent);
  button.textContent = (await put(text)) ? "Copied" : "Select and copy by hand";
  setTimeout(() => { button.textContent = label; }, 1800);
  return button.textContent;
}
