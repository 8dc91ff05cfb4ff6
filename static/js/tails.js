// The end of an answer, whose block is still open: code looks like code before its fence is closed.
const FENCE = /^(`{3,}|~{3,})([^\n`]*)\n/;
const tails = new WeakMap();

export function showTail(answer, raw) {
  tails.set(answer, raw);
  const tail = answer.querySelector(".tail"), fence = FENCE.exec(raw);
  if (!fence) {
    tail.textContent = raw;
    return;
  }
  let code = tail.querySelector("code");
  if (!code) {
    tail.innerHTML = '<div class="code-block"><div class="code-head"><span></span></div><pre tabindex="0"><code></code></pre></div>';
    tail.querySelector("span").textContent = fence[2].trim() || "code";
    code = tail.querySelector("code");
  }
  const closing = raw.indexOf(`\n${fence[1]}`, fence[0].length - 1);
  code.textContent = raw.slice(fence[0].length, closing < 0 ? undefined : Math.max(closing, fence[0].length));
}

export function growTail(answer, piece) {
  const raw = (tails.get(answer) ?? "") + piece;
  if (raw.startsWith("```") || raw.startsWith("~~~")) showTail(answer, raw);
  else {
    tails.set(answer, raw);
    answer.querySelector(".tail").append(piece);
  }
}
