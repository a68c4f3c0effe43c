// Plays recordings: asciicast v2 and v3, from files of the person's own. No server sees them.

import "./strict.js";
import { Terminal } from "./vendor/xterm.js";
import { onTheme, theme } from "./colours.js";

const MOST = 256 << 20;
const LARGEST = 1000;

// Returns { title, columns, rows, duration, events: [seconds, code, data] }; throws what is wrong.
export function parse(text) {
  const lines = text.split("\n").filter((line) => line && !line.startsWith("#"));
  const header = JSON.parse(lines[0] ?? "{}");
  if (header.version !== 2 && header.version !== 3) {
    throw new Error("it is no asciicast of version 2 or 3");
  }
  const columns = header.term?.cols ?? header.width;
  const rows = header.term?.rows ?? header.height;
  let now = 0;
  const events = [];
  for (const line of lines.slice(1)) {
    let event;
    try {
      event = JSON.parse(line);
    } catch {
      break; // what was being written when the recorder was killed
    }
    const [at, code, data] = event;
    now = header.version === 3 ? now + at : at;
    events.push([now, code, String(data)]);
  }
  const fit = (size, usual) => Math.min(Math.max(Math.floor(size) || usual, 1), LARGEST);
  const title = String(header.title ?? "A recording");
  return { title, columns: fit(columns, 80), rows: fit(rows, 24), duration: now, events };
}

class Player {
  #recording;
  #next = 0; // event
  #at = 0; // seconds in the recording
  #then = 0; // when that was
  #playing = false;
  #frame = 0;

  constructor(dialog) {
    this.dialog = dialog;
    this.find = (selector) => dialog.querySelector(selector);
    this.find(".close").onclick = () => dialog.close();
    this.find(".pause").onclick = () => this.#play(!this.#playing);
    this.find(".at").oninput = ({ target }) => this.#seek(Number(target.value));
    this.find(".speed").onchange = () => this.#move();
    dialog.addEventListener("close", () => this.#end());
    dialog.addEventListener("keydown", (event) => {
      if (event.key === " " && event.target.tagName !== "BUTTON") {
        event.preventDefault();
        this.#play(!this.#playing);
      }
    });
  }

  open(recording) {
    this.#end();
    this.#recording = recording;
    this.terminal = new Terminal({
      cols: recording.columns,
      rows: recording.rows,
      disableStdin: true,
      scrollback: 10000,
      fontFamily: "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace",
      theme: theme(),
    });
    this.dialog.player = this;
    this.forget = onTheme(() => {
      this.terminal.options.theme = theme();
    });
    this.find("h2").textContent = recording.title;
    this.find(".at").max = recording.duration;
    this.dialog.showModal();
    this.terminal.open(this.find(".screen"));
    this.#seek(0);
    this.#play(true);
    this.find(".pause").focus();
  }

  #end() {
    cancelAnimationFrame(this.#frame);
    this.#playing = false;
    this.forget?.();
    this.terminal?.dispose();
    this.terminal = this.forget = null;
  }

  #play(playing) {
    if (playing && this.#at >= this.#recording.duration) {
      this.#seek(0);
    }
    this.#move();
    this.#playing = playing;
    this.find(".pause").textContent = playing ? "Pause" : "Play";
    this.#tick();
  }

  // Takes the time that has passed into account.
  #move() {
    const now = performance.now();
    if (this.#playing) {
      const passed = ((now - this.#then) / 1000) * Number(this.find(".speed").value);
      this.#at = Math.min(this.#at + passed, this.#recording.duration);
    }
    this.#then = now;
  }

  #seek(at) {
    this.#move();
    if (at < this.#at || this.#next === 0) {
      this.terminal.reset();
      this.terminal.resize(this.#recording.columns, this.#recording.rows);
      this.#next = 0;
    }
    this.#at = at;
    this.#show();
  }

  #show() {
    const { events, duration } = this.#recording;
    let text = "";
    while (this.#next < events.length && events[this.#next][0] <= this.#at) {
      const [, code, data] = events[this.#next++];
      if (code === "o") {
        text += data;
      } else if (code === "r") {
        this.terminal.write(text);
        text = "";
        const [columns, rows] = data.split("x").map(Number);
        if (columns > 0 && rows > 0 && Math.max(columns, rows) <= LARGEST) {
          this.terminal.resize(columns, rows);
        }
      }
    }
    this.terminal.write(text);
    this.find(".at").value = this.#at;
    this.find(".status").textContent = `${this.#at.toFixed(1)} of ${duration.toFixed(1)} s`;
  }

  #tick() {
    cancelAnimationFrame(this.#frame);
    if (!this.#playing || !this.terminal) {
      return;
    }
    this.#move();
    this.#show();
    if (this.#at >= this.#recording.duration) {
      this.#playing = false;
      this.find(".pause").textContent = "Play";
      return;
    }
    this.#frame = requestAnimationFrame(() => this.#tick());
  }
}

let player = null;

// Plays a file; throws what is wrong with it.
export async function play(file) {
  if (file.size > MOST) {
    throw new Error("it is too large for a page");
  }
  const recording = parse(await file.text());
  player ??= new Player(document.getElementById("player"));
  player.open(recording);
}
