// The page's two terminal themes, and colours by their numbers.

const dark = {
  background: "#0f151b", foreground: "#d5dde5", cursor: "#7fd1b9", cursorAccent: "#0f151b",
  selectionBackground: "#2f4a5c",
  black: "#1d2732", red: "#e5786d", green: "#8fc379", yellow: "#dfb863",
  blue: "#6ea8dc", magenta: "#c08bd0", cyan: "#66c2b8", white: "#c3ccd5",
  brightBlack: "#66747f", brightRed: "#f29b90", brightGreen: "#aedd98", brightYellow: "#f0d28c",
  brightBlue: "#9cc8ef", brightMagenta: "#d9b0e4", brightCyan: "#92dbd2", brightWhite: "#f2f5f8",
};

const light = {
  background: "#fdfdfb", foreground: "#27313a", cursor: "#1b7f6b", cursorAccent: "#fdfdfb",
  selectionBackground: "#c9e2ea",
  black: "#27313a", red: "#b3362b", green: "#3d7a26", yellow: "#8a6100",
  blue: "#22639f", magenta: "#8a3fa0", cyan: "#14766b", white: "#b9c0c7",
  brightBlack: "#67727c", brightRed: "#cc4b3f", brightGreen: "#4f9334", brightYellow: "#a37400",
  brightBlue: "#2f79bd", brightMagenta: "#a255b8", brightCyan: "#1d8d80", brightWhite: "#8d969e",
};

const query = matchMedia("(prefers-color-scheme: dark)");
const listeners = new Set();
const root = document.documentElement;

const tell = () => listeners.forEach((listener) => listener());
query.addEventListener("change", tell);

const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : query.matches);
export const theme = () => (isDark() ? dark : light);
export const onTheme = (listener) => {
  listeners.add(listener);
  return () => listeners.delete(listener);
};

export function remember() {
  const kept = localStorage.getItem("theme");
  if (kept === "dark" || kept === "light") {
    root.dataset.theme = kept;
  }
}

export function toggle() {
  root.dataset.theme = isDark() ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
  tell();
}

const named = [
  "black", "red", "green", "yellow", "blue", "magenta", "cyan", "white",
  "brightBlack", "brightRed", "brightGreen", "brightYellow",
  "brightBlue", "brightMagenta", "brightCyan", "brightWhite",
];

// Returns a colour of xterm's 256 as CSS.
export function palette(number) {
  if (number < 16) {
    return theme()[named[number]];
  }
  if (number > 231) {
    const grey = (number - 232) * 10 + 8;
    return `rgb(${grey} ${grey} ${grey})`;
  }
  const step = (value) => (value ? value * 40 + 55 : 0);
  const rest = number - 16;
  return `rgb(${step(Math.floor(rest / 36))} ${step(Math.floor(rest / 6) % 6)} ${step(rest % 6)})`;
}
