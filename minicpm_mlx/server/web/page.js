// What Gradio has no part for: the language of the document, dark and light, and Enter while an
// input method composes. Everything is found when it is used: Gradio draws the page as it likes.

const dark = () => document.body.classList.contains("dark");

function remember(name, value) {
  try {
    localStorage.setItem(name, value);
    return true;
  } catch {
    return false; // a browser that keeps nothing still shows the page
  }
}

function remembered(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

document.addEventListener("click", (event) => {
  if (event.target.closest("#theme")) {
    document.body.classList.toggle("dark");
    remember("minicpm-theme", dark() ? "dark" : "light");
  }
});

document.addEventListener("change", (event) => {
  if (event.target.closest("#language")) {
    document.documentElement.lang = event.target.value === "zh" ? "zh-CN" : "en";
  }
});
document.documentElement.lang = navigator.language;

// Enter that ends a composition is the input method's own, not the page's. Safari says that the
// composition is over before the key comes, and marks the key with 229. An empty message is not sent.
let composing = false;
for (const kind of ["keydown", "keypress"]) {
  document.addEventListener(
    kind,
    (event) => {
      if (kind === "keydown") composing = event.isComposing || event.keyCode === 229;
      if (event.key !== "Enter" || !event.target.closest("#box")) return;
      const empty = !event.shiftKey && !event.target.value.trim();
      if (composing || empty) event.stopImmediatePropagation();
      if (kind === "keypress" ? composing || empty : empty && !composing) event.preventDefault();
    },
    true,
  );
}

// Gradio sets the theme that the system asks for once it has started.
const theme = remembered("minicpm-theme");
if (theme) {
  const apply = () => document.body.classList.toggle("dark", theme === "dark");
  new MutationObserver((_, watcher) => {
    if (document.querySelector("#chat")) {
      watcher.disconnect();
      apply();
    }
  }).observe(document.body, { childList: true, subtree: true });
  apply();
}

// The conversation. The server fills a hidden box with it as text, and this browser keeps it under
// this address: a reload, a restart of the server or of the browser loses nothing, and Clear deletes
// it. Each tab has its own, which it locks; a new tab goes on with the last one that no tab has.

const PREFIX = "minicpm-conversation ";
const MOST_KEPT = 20;

const keptBox = () => document.querySelector("#kept textarea, #kept input");

const keptNames = () =>
  Object.keys(localStorage)
    .filter((name) => name.startsWith(PREFIX))
    .sort()
    .reverse(); // the newest first: a name ends with its time

// Whether this tab has the conversation from now on. Pages of other machines without TLS have no
// locks: there a tab knows only its own.
function claim(name, options) {
  if (!navigator.locks) return Promise.resolve(true);
  return new Promise((done) => {
    navigator.locks
      .request(name, options, (lock) => {
        done(Boolean(lock));
        return lock ? new Promise(() => {}) : null; // until the tab is closed
      })
      .catch(() => done(false));
  });
}

// The name to keep the conversation under, and the text that was kept.
async function ownConversation() {
  const own = sessionStorage.getItem("minicpm-tab");
  const text = own && remembered(own);
  // At a reload the old page still has the lock for a moment; a copy of a tab never gets it.
  if (own && (await claim(own, { signal: AbortSignal.timeout(1000) }))) return [own, text];
  if (!own && navigator.locks) {
    for (const name of keptNames()) {
      if (await claim(name, { ifAvailable: true })) return [name, remembered(name)];
    }
  }
  const name = PREFIX + new Date().toISOString() + Math.random().toString(36).slice(1, 8);
  await claim(name, { ifAvailable: true });
  return [name, text];
}

function keep(name) {
  const text = keptBox()?.value;
  if (text === undefined || text === (remembered(name) ?? "")) return;
  if (!text) {
    localStorage.removeItem(name);
    return;
  }
  for (const old of keptNames().slice(MOST_KEPT)) localStorage.removeItem(old);
  while (!remember(name, text)) {
    const oldest = keptNames().filter((other) => other !== name).pop();
    if (!oldest) return;
    localStorage.removeItem(oldest); // the browser's space is full
  }
}

const sleep = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

// Gives the text to the server, which answers with the conversation and the language. Gradio may not
// listen yet when the box is there: then the text is given again.
async function begin(text) {
  const given = text || "{}"; // to which the answer is an empty text
  for (let tries = 0; tries < 30; tries++) {
    while (!keptBox()) await sleep(20);
    keptBox().value = given;
    keptBox().dispatchEvent(new Event("input", { bubbles: true }));
    await sleep(20); // Gradio takes the text over
    keptBox().dispatchEvent(new FocusEvent("blur"));
    for (let waits = 0; waits < 40; waits++) {
      await sleep(50);
      if (document.querySelector("#chat .message") || keptBox()?.value !== given) return;
    }
  }
}

async function followConversation() {
  const [name, text] = await ownConversation();
  sessionStorage.setItem("minicpm-tab", name);
  await begin(text);
  let waiting = null;
  new MutationObserver(() => {
    waiting ??= setTimeout(() => {
      waiting = null;
      keep(name);
    }, 200);
  }).observe(document.body, { childList: true, characterData: true, subtree: true });
  addEventListener("pagehide", () => keep(name));
}

followConversation().catch(() => begin("")); // a browser that keeps nothing still shows the page

// The button has the server write the conversation as Markdown into a hidden box, after a line with
// the time; it is saved from there as a file.
const exportedBox = () => document.querySelector("#exported textarea, #exported input");

async function saveExported() {
  const before = exportedBox().value;
  for (let waits = 0; waits < 200 && exportedBox().value === before; waits++) await sleep(50);
  const text = exportedBox().value;
  if (text === before || !text) return; // nothing was said yet
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text.slice(text.indexOf("\n") + 1)], { type: "text/markdown" }));
  link.download = `MiniCPM ${new Date().toISOString().slice(0, 16).replace(/[T:]/g, " ")}.md`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

document.addEventListener("click", (event) => {
  if (event.target.closest("#export")) saveExported();
});
