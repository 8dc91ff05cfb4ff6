// One WebSocket to the chat that comes back by itself. What is sent while it is away waits, and goes out in order.
const FIRST_PAUSE_MS = 400;
const LAST_PAUSE_MS = 10000;
const PING_MS = 25000;
const CONNECT_MS = 15000;
const NO_SESSION = 4401;

export class ChatSocket {
  constructor({ onFrame, onState }) {
    this.onFrame = onFrame;
    this.onState = onState;
    this.pauseMs = FIRST_PAUSE_MS;
    this.waiting = [];
    this.open();
    setInterval(() => this.ping(), PING_MS);
    window.addEventListener("offline", () => this.onState("offline"));
    window.addEventListener("online", () => {
      if (!this.isOpen) {
        this.reopenNow();
        return;
      }
      // it may have lived through it
      this.onState("open");
      this.ping();
    });
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.reopenNow(); });
  }

  open() {
    clearTimeout(this.timer);
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = this.socket = new WebSocket(`${scheme}//${location.host}/ws/chat/`);
    // a connection that is not there by then will hardly come
    const slow = setTimeout(() => { if (socket.readyState === WebSocket.CONNECTING) socket.close(); }, CONNECT_MS);
    socket.onopen = () => {
      clearTimeout(slow);
      this.pauseMs = FIRST_PAUSE_MS;
      this.onState("open");
      const waiting = this.waiting;
      this.waiting = [];
      waiting.forEach((frame) => this.send(frame));
    };
    socket.onmessage = (event) => {
      this.heard = true;
      this.onFrame(JSON.parse(event.data));
    };
    socket.onclose = (event) => {
      if (socket !== this.socket) return;
      if (event.code === NO_SESSION) {
        this.onState("logged-out");
        return;
      }
      this.onState("closed");
      this.timer = setTimeout(() => this.open(), this.pauseMs * (0.7 + Math.random() * 0.6));
      this.pauseMs = Math.min(this.pauseMs * 2, LAST_PAUSE_MS);
    };
  }

  get isOpen() { return this.socket.readyState === WebSocket.OPEN; }

  send(frame) {
    if (this.isOpen) this.socket.send(JSON.stringify(frame));
    else if (!this.waiting.includes(frame)) this.waiting.push(frame);
  }

  reopenNow() {
    if (this.socket.readyState === WebSocket.CLOSED) this.open();
  }

  ping() {
    if (!this.isOpen) return;
    this.heard = false;
    this.socket.send('{"type":"ping"}');
    setTimeout(() => {
      // a connection that was cut without a word: nothing came back
      if (!this.heard && this.isOpen) this.socket.close();
    }, 8000);
  }
}
