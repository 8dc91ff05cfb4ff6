// The chat page: what is written goes out over the socket, what comes in goes into the thread. The server renders markdown.
import * as drafts from "./drafts.js";
import { dress, setSource, setVersions, watchMessages } from "./messages.js";
import "./shortcuts.js";
import * as sidebar from "./sidebar.js";
import { ChatSocket } from "./socket.js";
import { growTail, showTail } from "./tails.js";

const byId = (id) => document.getElementById(id);
const thread = byId("thread"), scroll = byId("scroll"), composer = byId("composer"), text = byId("text");
const sendButton = byId("send"), stopButton = byId("stop"), notice = byId("notice"), state = byId("state"), jump = byId("jump");
const announcer = byId("announcer");

let conversationId = thread.dataset.conversation || null;
let unsent = null; // the message that the server has not confirmed yet
const newId = () => (crypto.randomUUID ? crypto.randomUUID() : `${Date.now()}-${Math.random().toString(36).slice(2)}`);

// --- the thread ------------------------------------------------------------------------------------------------------------

function addMessage(role, id) {
  byId("empty").hidden = true;
  const article = document.createElement("article");
  article.className = `message ${role}`;
  article.setAttribute("aria-label", role === "user" ? "You" : "Answer");
  if (id) article.id = id;
  article.innerHTML = role === "user"
    ? '<div class="body text"></div>'
    : '<div class="body"><div class="done prose"></div><div class="tail text"></div></div><p class="note" hidden></p><div class="source" hidden></div>';
  dress(article);
  thread.append(article);
  return article;
}

const part = (article, name) => article.querySelector(`.${name}`);
const pending = () => [...thread.querySelectorAll('.message[data-status="pending"]')];

function setNote(article, words, isError) {
  const note = part(article, "note");
  note.hidden = !words;
  note.textContent = words ?? "";
  note.classList.toggle("error", Boolean(isError));
}

function showBusy() {
  const busy = pending().length > 0 || unsent !== null;
  stopButton.hidden = pending().length === 0;
  sendButton.hidden = !stopButton.hidden;
  sendButton.disabled = busy || text.disabled || byId("model").value === "";
}

// --- scrolling: follow the answer until the reader scrolls away ----------------------------------------------------------

let following = true;
const isAtEnd = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
scroll.addEventListener("scroll", () => {
  following = isAtEnd();
  jump.hidden = following;
}, { passive: true });
function follow() {
  if (following) scroll.scrollTop = scroll.scrollHeight;
  else jump.hidden = isAtEnd();
}
jump.addEventListener("click", () => { following = true; follow(); text.focus(); });

// --- frames ------------------------------------------------------------------------------------------------------------------

const handlers = {
  turn(frame) {
    if (unsent && unsent.frame.client_id === frame.client_id) {
      if (unsent.article) {
        unsent.article.id = frame.question_id;
        delete unsent.article.dataset.unsent;
      }
      unsent = null;
      drafts.keep(draftKey(), "");
      // earlier messages, of which one was edited: it is the end of the talk now
      if (thread.hasAttribute("data-earlier")) location.replace(`/c/${frame.conversation_id}/`);
    } else if (frame.text !== undefined && !byId(frame.question_id)) {
      // asked on another page of the same person
      part(addMessage("user", frame.question_id), "body").textContent = frame.text;
    }
    openConversation(frame);
    keepDraft();
    frame.replaced.forEach((id) => byId(id)?.remove());
    const answer = byId(frame.message_id) ?? addMessage("assistant", frame.message_id);
    Object.entries(frame.versions ?? {}).forEach(([id, ids]) => setVersions(byId(id), ids));
    answer.dataset.status = "pending";
    answer.dataset.askedAt = Date.now();
    setTimeout(showState, WAITING_MS);
  },
  begin({ message_id }) {
    const answer = byId(message_id);
    if (!answer) return;
    answer.dataset.status = "pending";
    delete answer.dataset.askedAt;
    part(answer, "done").replaceChildren();
    showTail(answer, "");
    setNote(answer, "");
  },
  delta({ message_id, text: piece }) {
    const answer = byId(message_id);
    if (answer) growTail(answer, piece);
  },
  block({ message_id, html, tail }) {
    const answer = byId(message_id);
    if (!answer) return;
    part(answer, "done").insertAdjacentHTML("beforeend", html);
    showTail(answer, tail);
  },
  finished({ message_id, status, html, text: words, error }) {
    const answer = byId(message_id);
    if (!answer) return;
    answer.dataset.status = status;
    part(answer, "done").innerHTML = html;
    setSource(answer, words);
    showTail(answer, "");
    if (status === "stopped") setNote(answer, "You stopped this answer.");
    else if (error) setNote(answer, error.message, true);
    if (notice.dataset.until === "idle" && pending().length === 0) showNotice("");
    announcer.textContent = error ? error.message : part(answer, "done").textContent;
    // whoever is somewhere else by now stays there
    if ([document.body, stopButton].includes(document.activeElement)) text.focus({ preventScroll: true });
  },
  conversation({ conversation_id, organization_id, title, used }) {
    if (organization_id !== thread.dataset.organization) return;
    if (conversation_id === conversationId) showTitle(title);
    sidebar.showConversation(conversation_id, title, used);
  },
  changed({ conversation_id }) {
    isStale = conversation_id === conversationId;
  },
  shown({ conversation_id, title }) {
    sidebar.showConversation(conversation_id, title, false);
    if (thread.hasAttribute("data-earlier")) location.replace(`/c/${conversation_id}/`);
    isStale = conversation_id === conversationId;
  },
  deleted({ conversation_id }) {
    sidebar.dropConversation(conversation_id);
    if (conversation_id === conversationId) closeConversation();
  },
  interrupted({ message_id }) {
    // the server lost sight of it for a moment: ask again
    setTimeout(() => socket.send({ type: "resume", message_id }), 1500);
  },
  error(frame) {
    switching = null;
    if (unsent && frame.client_id === unsent.frame.client_id) {
      // it was not taken: the words go back into the box
      unsent.article?.remove();
      if (!text.value) text.value = unsent.frame.text ?? "";
      unsent = null;
      keepDraft();
      byId("empty").hidden = thread.querySelector(".message") !== null;
      resize();
    } else if (frame.code === "not_found" && frame.param === "conversation_id") {
      // what the page watches is gone
      closeConversation();
      return;
    }
    // an answer is being made, maybe for another window: once it is there, the advice to wait is out of date
    showNotice(frame.message, frame.param === "conversation_id" ? "idle" : "");
  },
  pong() {},
};

function showTitle(title) {
  document.title = `${title} · aiscale`;
  byId("chat-title").textContent = byId("new-title").value = title;
}

function openConversation({ conversation_id, title }) {
  showTitle(title);
  sidebar.showConversation(conversation_id, title, true);
  if (conversationId === conversation_id) return;
  conversationId = conversation_id;
  history.replaceState(null, "", `/c/${conversation_id}/`);
  byId("rename-form").action = `/c/${conversation_id}/rename/`;
  byId("delete-form").action = `/c/${conversation_id}/delete/`;
  document.querySelectorAll("[data-export]").forEach((link) => { link.href = `/c/${conversation_id}/export/?format=${link.dataset.export}`; });
  byId("chat-menu").hidden = false;
  sidebar.markCurrent(conversation_id);
}

function closeConversation() {
  conversationId = null;
  messages().forEach((article) => article.remove());
  history.replaceState(null, "", "/");
  showTitle("New chat");
  byId("chat-menu").hidden = true;
  byId("empty").hidden = unsent !== null;
  showNotice("This conversation was deleted in another window. What you write now begins a new one.");
}

// --- other pages of the same person: they tell what they do, and what was missed meanwhile is read again -----------------

let isStale = false;
const messages = () => [...thread.querySelectorAll(":scope > .message")];
const isIdle = () => !unsent && !pending().length && !thread.querySelector(".editing");

function watch() {
  // a page of earlier messages shows no end that could grow
  const isWhole = !new URLSearchParams(location.search).has("before");
  const last = messages().filter((article) => article.id).at(-1);
  socket.send({ type: "watch", conversation_id: isWhole ? conversationId : null, last_id: last?.id ?? "" });
}

async function refresh() {
  isStale = false;
  let page;
  try {
    const response = await fetch(location.href);
    if (!response.ok || response.redirected) return;
    page = new DOMParser().parseFromString(await response.text(), "text/html");
  } catch {
    isStale = true;
    return;
  }
  const fresh = page.getElementById("thread");
  if (!isIdle() || fresh?.dataset.conversation !== conversationId) return;
  thread.querySelectorAll(":scope > .message, :scope > .earlier").forEach((old) => old.remove());
  const all = [...fresh.querySelectorAll(":scope > .message, :scope > .earlier")];
  thread.prepend(...all);
  messages().forEach(dress);
  showTitle(page.getElementById("chat-title").textContent);
  pending().forEach((answer) => socket.send({ type: "resume", message_id: answer.id }));
  watch();
  showBusy();
  if (switching) takePlace();
  else follow();
}

// --- another version of a message: it stands where the one before it stood, with the focus where it was ------------------

let switching = null;
function showVersion(article, id, step) {
  if (!isIdle()) return;
  switching = { id, step, top: article.getBoundingClientRect().top };
  socket.send({ type: "show", message_id: id });
}

function takePlace() {
  const { id, step, top } = switching, article = byId(id);
  switching = null;
  if (!article) return;
  scroll.scrollTop += article.getBoundingClientRect().top - top;
  article.querySelector(`[data-step="${step}"]`)?.focus({ preventScroll: true });
  announcer.textContent = part(article, "versions").getAttribute("aria-label");
  following = isAtEnd();
  jump.hidden = following;
}

function showNotice(words, until = "") {
  notice.textContent = words;
  notice.hidden = !words;
  notice.dataset.until = until;
}

function askToLogIn() {
  showNotice("You are logged out. What you wrote is kept in this window. ");
  const link = document.createElement("a");
  link.href = `/accounts/login/?next=${encodeURIComponent(location.pathname)}`;
  link.textContent = "Log in again";
  notice.append(link);
}

const SLOW_MS = 700, WAITING_MS = 4000;
const STATES = { closed: "Reconnecting …", offline: "Offline", "logged-out": "" };
let connection = "open";
const isWaiting = (answer) => Date.now() - Number(answer.dataset.askedAt ?? Infinity) >= WAITING_MS;
function describeState() {
  if (connection !== "open") return STATES[connection];
  if (unsent && Date.now() - unsent.since >= SLOW_MS) return "Sending …";
  return pending().some(isWaiting) ? "Waiting for the model …" : "";
}

function showState() {
  state.textContent = describeState();
}

const socket = new ChatSocket({
  onFrame(frame) {
    handlers[frame.type]?.(frame);
    showBusy();
    showState();
    follow();
    if (isStale && isIdle()) refresh();
  },
  onState(now) {
    connection = now;
    showState();
    if (now === "logged-out") {
      keepDraft();
      askToLogIn();
    }
    if (now === "open") {
      watch();
      if (unsent) socket.send(unsent.frame);
      pending().forEach((answer) => socket.send({ type: "resume", message_id: answer.id }));
    }
  },
});

// --- writing -----------------------------------------------------------------------------------------------------------------

function resize() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
}

const isReady = () => !text.disabled && !unsent && !pending().length && Boolean(byId("model").value);

const draftKey = () => `${thread.dataset.organization} ${conversationId ?? "new"}`;
const keepDraft = () => drafts.keep(draftKey(), text.value || unsent?.frame.text);

function ask(frame, article) {
  showNotice("");
  unsent = { frame: { ...frame, client_id: newId(), model: byId("model").value }, article, since: Date.now() };
  // when the socket is away, it is sent as soon as it is back
  if (socket.isOpen) {
    socket.send(unsent.frame);
    // a connection that died without a word is noticed now, and what it lost is sent again
    socket.ping();
  }
  setTimeout(showState, SLOW_MS);
  following = true;
  showBusy();
  follow();
}

// a text that is too long stays whole where it was written: cut short, it would say something else
function fits(words) {
  const count = [...words].length, most = Number(thread.dataset.maxChars);
  if (count > most) showNotice(`Your message has ${count.toLocaleString("en")} characters; the most is ${most.toLocaleString("en")}. Please shorten it.`);
  return count <= most;
}

function say(words, replaces) {
  if (words && pending().length) showNotice("Wait until the answer is finished, or stop it first.", "idle");
  if (!words || !isReady() || !fits(words)) return false;
  const article = addMessage("user");
  part(article, "body").textContent = words;
  article.dataset.unsent = "";
  ask({ type: "send", conversation_id: conversationId, organization_id: thread.dataset.organization, text: words, ...(replaces && { replaces }) }, article);
  return true;
}

function sendText() {
  if (!say(text.value.trim())) return;
  text.value = "";
  keepDraft();
  resize();
}

watchMessages(thread, {
  send: say,
  retry(id) {
    if (!isReady()) return;
    ask({ type: "retry", message_id: id }, null);
    text.focus({ preventScroll: true });
  },
  show: showVersion,
});

function stopAnswers() {
  pending().forEach((answer) => socket.send({ type: "stop", message_id: answer.id }));
}

composer.addEventListener("submit", (event) => { event.preventDefault(); sendText(); });
text.addEventListener("input", () => { resize(); keepDraft(); });
// a keyboard on the screen has no Shift+Enter: there Enter begins a line, and the button sends
const isTouch = matchMedia("(hover: none) and (pointer: coarse)");
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !isTouch.matches) {
    event.preventDefault();
    sendText();
  }
});
stopButton.addEventListener("click", stopAnswers);
document.querySelectorAll("[data-starter]").forEach((button) => button.addEventListener("click", () => {
  text.value = button.dataset.starter;
  sendText();
  text.focus();
}));

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]")) return;
  // a menu with the focus in it closes by itself (site.js), and nothing else does
  if (document.activeElement?.closest("details.menu[open]")) return;
  if (byId("chat-menu").open) byId("chat-menu").open = false;
  else if (sidebar.isOpen()) sidebar.show(false);
  else stopAnswers();
});

if (!text.value) text.value = drafts.read(draftKey());
resize();
showBusy();
showState();
scroll.scrollTop = scroll.scrollHeight;
