// What Gradio has no part for: the language of the document, dark and light, and Enter while an
// input method composes. Everything is found when it is used: Gradio draws the page as it likes.

const dark = () => document.body.classList.contains("dark");

function remember(theme) {
  try {
    localStorage.setItem("minicpm-theme", theme);
  } catch {} // a browser that keeps nothing still shows the page
}

function remembered() {
  try {
    return localStorage.getItem("minicpm-theme");
  } catch {
    return null;
  }
}

document.addEventListener("click", (event) => {
  if (event.target.closest("#theme")) {
    document.body.classList.toggle("dark");
    remember(dark() ? "dark" : "light");
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
const theme = remembered();
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
