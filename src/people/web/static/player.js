// Plays recordings: asciicast v2 and v3, from files of the person's own. No server sees them.

import "./strict.js";
import { Terminal } from "./vendor/xterm.js";
import { onTheme, theme } from "./colours.js";

const MOST = 256 << 20;
const LARGEST = 1000;
const PIECE = 1 << 16; // characters that the terminal is given at a time

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
    const text = String(data);
    for (let from = 0; from < text.length; from += PIECE) {
      events.push([now, code, text.slice(from, from + PIECE)]);
    }
  }
  const fit = (size, usual) => Math.min(Math.max(Math.floor(size) || usual, 1), LARGEST);
  const title = String(header.title ?? "A recording");
  return { title, columns: fit(columns, 80), rows: fit(rows, 24), duration: now, events };
}

class Player {
  #recording;
  #next = -1; // event; -1 when the terminal has to begin anew
  #writing = false; // a piece, which the terminal has not shown yet
  #late = false; // more is due than that: the clock waits
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
      linkHandler: { activate() {} }, // as in a pane
      theme: theme(),
    });
    this.dialog.player = this;
    this.forget = onTheme(() => {
      this.terminal.options.theme = theme();
    });
    this.find("h2").textContent = recording.title;
    this.find(".at").max = recording.duration;
    this.#next = -1;
    this.#writing = this.#late = false;
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
    if (this.#playing && !this.#late) {
      const passed = ((now - this.#then) / 1000) * Number(this.find(".speed").value);
      this.#at = Math.min(this.#at + passed, this.#recording.duration);
    }
    this.#then = now;
  }

  #seek(at) {
    this.#move();
    if (at < this.#at) {
      this.#next = -1;
    }
    this.#at = at;
    this.#show();
  }

  #show() {
    const { duration } = this.#recording;
    this.find(".at").value = this.#at;
    this.find(".status").textContent = `${this.#at.toFixed(1)} of ${duration.toFixed(1)} s`;
    if (!this.#writing) {
      this.#write();
    }
  }

  // Has the terminal show a piece of what is due, and then the next: it throws when it is given
  // more than it can hold.
  #write() {
    const { events } = this.#recording;
    const { terminal } = this;
    if (this.#next < 0) {
      terminal.reset();
      terminal.resize(this.#recording.columns, this.#recording.rows);
      this.#next = 0;
    }
    const isDue = () => events[this.#next]?.[0] <= this.#at;
    let text = "";
    while (isDue() && text.length < PIECE) {
      const [, code, data] = events[this.#next];
      if (code === "r") {
        if (text) {
          break; // what came before it goes first
        }
        const [columns, rows] = data.split("x").map(Number);
        if (columns > 0 && rows > 0 && Math.max(columns, rows) <= LARGEST) {
          terminal.resize(columns, rows);
        }
      } else if (code === "o") {
        text += data;
      }
      this.#next++;
    }
    this.#late = isDue();
    if (text) {
      this.#writing = true;
      terminal.write(text, () => {
        if (terminal === this.terminal) {
          this.#writing = false;
          this.#write();
        }
      });
    }
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
