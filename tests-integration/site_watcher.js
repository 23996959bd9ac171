// In every page that the check looks at: collects errors of scripts, of the console and of loading.
window.errorsSeen = [];
addEventListener("error", (event) => {
  const { src, href } = event.target ?? {};
  errorsSeen.push(event.message ?? `cannot load ${src ?? href}`);
}, true);
addEventListener("unhandledrejection", (event) => errorsSeen.push(String(event.reason)));
const consoleError = console.error;
console.error = (...words) => { errorsSeen.push(words.join(" ")); consoleError(...words); };
