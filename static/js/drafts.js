// What was written and not taken yet outlives a reload, and a login, in this window. Some browsers keep nothing.
const name = (key) => `draft ${key}`;

export function keep(key, words) {
  try {
    if (words) sessionStorage.setItem(name(key), words);
    else sessionStorage.removeItem(name(key));
  } catch {
    // then it is gone, as it always was
  }
}

export function read(key) {
  try {
    return sessionStorage.getItem(name(key)) ?? "";
  } catch {
    return "";
  }
}
