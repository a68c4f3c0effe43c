// One console: a terminal, its socket to the server, and what stands around it.

import "./strict.js";
import { Terminal } from "./vendor/xterm.js";
import { FitAddon } from "./vendor/addon-fit.js";
import { SearchAddon } from "./vendor/addon-search.js";
import { SerializeAddon } from "./vendor/addon-serialize.js";
import { Unicode11Addon } from "./vendor/addon-unicode11.js";
import { WebglAddon } from "./vendor/addon-webgl.js";
import { onTheme, theme } from "./colours.js";
import { Recording, save } from "./cast.js";

const TELL_EVERY = 1 << 14; // bytes shown, before the server is told
const MOST_UNTAKEN = 1 << 16; // bytes typed that are on their way; the server allows twice that
const PIECE = 1 << 14;
const CANCEL = "\x18"; // ends a sequence whose rest is missing

const encoder = new TextEncoder();

export function bytes(count) {
  if (count < 1000) {
    return `${count} B`;
  }
  const power = Math.min(Math.floor(Math.log10(count) / 3), 4);
  const value = count / 1000 ** power;
  return `${value.toFixed(value < 10 ? 1 : 0)} ${"kMGT"[power - 1]}B`;
}

export class Pane {
  #socket = null;
  #journal = null;
  #replayed = 0; // up to there output is history: its questions were answered, or not, back then
  #parsed = 0;
  #shown = 0;
  #told = 0;
  #missing = 0;
  #unsent = []; // typed, as pieces
  #sent = 0;
  #taken = 0;
  #role = null;
  #wants = true;
  #overtaking = false;
  #size = null; // the guest's, when another has decided it
  #fitting = { columns: 80, rows: 24 }; // what the pane had room for when it was last seen
  #recording = null;
  #control = false;
  #isNoteOfRole = false;
  #patience = 250;
  #timer = 0;
  #closed = false;
  #ends = [];

  constructor(template, { guest, port, label }, desk) {
    this.guest = guest;
    this.port = port;
    this.label = label;
    this.at = null;
    this.desk = desk;
    this.element = template.content.cloneNode(true).firstElementChild;
    this.element.pane = this;
    this.element.querySelector("h2").textContent = label;
    this.element.setAttribute("aria-label", label);
    this.terminal = new Terminal({
      allowProposedApi: true,
      cursorBlink: true,
      fontFamily: "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace",
      fontSize: Number(localStorage.getItem("size")) || 14,
      linkHandler: { activate() {} }, // xterm.js's own would open a window
      macOptionIsMeta: true,
      scrollback: 10000,
      screenReaderMode: localStorage.getItem("reader") === "yes",
      theme: theme(),
    });
    this.fit = new FitAddon();
    this.search = new SearchAddon();
    this.serialize = new SerializeAddon();
    for (const addon of [this.fit, this.search, this.serialize, new Unicode11Addon()]) {
      this.terminal.loadAddon(addon);
    }
    this.terminal.unicode.activeVersion = "11";
    this.terminal.onData((text) => this.#typed(encoder.encode(text)));
    this.terminal.onBinary((text) => this.#typed(Uint8Array.from(text, (c) => c.charCodeAt(0))));
    this.terminal.attachCustomKeyEventHandler((event) => desk.isGuests(event));
    this.#answerNoHistory();
    this.#furnish();
  }

  // Begins, once the element is in the document.
  open() {
    const place = this.element.querySelector(".screen");
    this.terminal.open(place);
    try {
      const webgl = new WebglAddon();
      webgl.onContextLoss(() => webgl.dispose());
      this.terminal.loadAddon(webgl);
    } catch {
      // xterm.js draws with elements instead.
    }
    const observer = new ResizeObserver(() => requestAnimationFrame(() => this.#fitted()));
    observer.observe(place);
    this.#ends.push(
      () => observer.disconnect(),
      onTheme(() => {
        this.terminal.options.theme = theme();
      }),
    );
    this.#fitted();
    this.#connect();
  }

  close() {
    this.#closed = true;
    clearTimeout(this.#timer);
    this.#ends.forEach((end) => end());
    this.#socket?.close();
    this.terminal.dispose();
    this.element.remove();
  }

  focus() {
    this.terminal.focus();
  }

  // The connection

  #connect() {
    this.#status("connecting", "Connecting");
    const socket = new WebSocket(new URL("console", location.href.replace(/^http/, "ws")));
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    this.#shown = this.#told = this.#sent = this.#taken = 0;
    socket.onopen = () => {
      this.#patience = 250;
      const { columns, rows } = this.#own();
      this.#say({
        type: "open",
        guest: this.guest,
        port: String(this.port),
        since: this.at,
        journal: this.#journal ?? "0",
        write: this.#wants,
        columns,
        rows,
      });
    };
    socket.onmessage = ({ data }) => {
      if (this.#socket !== socket || this.#closed) {
        return;
      }
      if (typeof data === "string") {
        this.#hear(JSON.parse(data));
      } else {
        this.#output(data, socket);
      }
    };
    socket.onclose = () => {
      if (this.#closed) {
        return;
      }
      const lost = this.#sent - this.#taken;
      if (lost > 0) {
        this.#note(`${lost} typed bytes may not have arrived.`);
      }
      this.#unsent = [];
      this.#setRole(null);
      this.#status("lost", "The page's server does not answer. Trying again");
      this.#timer = setTimeout(() => this.#connect(), this.#patience);
      this.#patience = Math.min(this.#patience * 2, 5000);
      this.desk.lost();
    };
  }

  // Begins anew, as when the connection is cut.
  reconnect() {
    this.#socket?.close();
  }

  #say(message) {
    if (this.#socket?.readyState === WebSocket.OPEN) {
      this.#socket.send(JSON.stringify(message));
    }
  }

  #hear(message) {
    switch (message.type) {
      case "hello":
        this.#journal = message.journal;
        this.at = message.at;
        this.#parsed = message.at;
        this.#replayed = message.head;
        this.#status("live", "");
        break;
      case "gap":
        this.terminal.write(CANCEL);
        if (message.missing === null) {
          this.#note("This is another daemon: what came meanwhile is not known.");
        } else {
          this.#missing += message.missing;
          this.#status("live", `${bytes(this.#missing)} skipped`);
        }
        break;
      case "role":
        this.#setRole(message);
        break;
      case "size":
        this.sized(message);
        break;
      case "taken":
        this.#taken = message.count;
        this.#type();
        break;
      case "dropped":
        this.#note(`${message.count} typed bytes may not have reached the guest.`);
        break;
      case "who":
        this.#showWho(message.people);
        break;
      case "waiting":
        this.#setRole(null);
        this.#status("lost", `Waiting: ${message.why}`);
        break;
      case "bye":
        break;
    }
  }

  #status(state, text) {
    this.element.dataset.state = state;
    this.element.querySelector(".status").textContent = text;
  }

  #note(text, isRole = false) {
    this.#isNoteOfRole = isRole;
    const note = this.element.querySelector(".note");
    note.textContent = text;
    note.hidden = !text;
  }

  // What the guest writes

  #output(data, socket) {
    const offset = Number(new DataView(data).getBigUint64(0, true));
    let part = new Uint8Array(data, 8);
    this.at = offset + part.length;
    this.#recording?.output(part);
    if (this.#recording?.full) {
      this.#record();
    }
    const history = this.#replayed - offset;
    if (history > 0 && history < part.length) {
      this.#write(part.subarray(0, history), offset, socket);
      part = part.subarray(history);
      this.#write(part, offset + history, socket);
    } else {
      this.#write(part, offset, socket);
    }
  }

  #write(part, offset, socket) {
    this.terminal.write(part, () => {
      if (this.#socket !== socket) {
        return;
      }
      this.#parsed = offset + part.length;
      this.#shown += part.length;
      if (this.#shown - this.#told >= TELL_EVERY) {
        this.#told = this.#shown;
        this.#say({ type: "shown", count: this.#shown });
      }
    });
  }

  // Has the terminal not type answers to questions that history asked.
  #answerNoHistory() {
    const { parser } = this.terminal;
    const old = () => this.#parsed < this.#replayed;
    for (const id of [
      { final: "c" },
      { prefix: ">", final: "c" },
      { prefix: "=", final: "c" },
      { final: "n" },
      { prefix: "?", final: "n" },
      { final: "t" },
      { intermediates: "$", final: "p" },
      { prefix: "?", intermediates: "$", final: "p" },
      { prefix: ">", final: "q" },
    ]) {
      parser.registerCsiHandler(id, old);
    }
    parser.registerDcsHandler({ intermediates: "$", final: "q" }, old);
    for (const id of [4, 10, 11, 12]) {
      parser.registerOscHandler(id, (text) => old() && text.includes("?"));
    }
  }

  // What is typed

  #typed(data) {
    if (this.#control && data.length === 1) {
      this.#control = false;
      this.desk.control(false);
      if (data[0] >= 0x40 && data[0] < 0x7f) {
        data = Uint8Array.of(data[0] & 0x1f);
      }
    }
    if (this.#socket?.readyState !== WebSocket.OPEN || this.element.dataset.state !== "live") {
      this.#note("Not connected: what you type goes nowhere.");
      return;
    }
    if (!this.#role?.writer) {
      this.#note(this.#watching(), true);
      return;
    }
    this.#note("");
    for (let at = 0; at < data.length; at += PIECE) {
      this.#unsent.push(data.subarray(at, at + PIECE));
    }
    this.#type();
  }

  #type() {
    while (this.#unsent.length && this.#sent - this.#taken < MOST_UNTAKEN) {
      const piece = this.#unsent.shift();
      this.#socket.send(piece);
      this.#sent += piece.length;
    }
  }

  // Types what a key that a phone lacks would.
  key(text) {
    const application = this.terminal.modes.applicationCursorKeysMode;
    this.#typed(encoder.encode(application ? text.replace(/^\x1b\[([A-D])$/, "\x1bO$1") : text));
    this.focus();
  }

  // Has the next character be a control character.
  holdControl(held) {
    this.#control = held;
    this.focus();
  }

  // The role

  #watching() {
    const by = this.#role?.by;
    return by ? `You watch: ${by} types here.` : "You only watch.";
  }

  #setRole(role) {
    this.#role = role;
    this.#overtaking = false;
    this.element.classList.toggle("writer", Boolean(role?.writer));
    const button = this.element.querySelector(".role");
    button.disabled = !role;
    button.textContent = role?.writer ? "You type" : "You watch";
    button.title = role?.writer ? "Only watch from now on" : `${this.#watching()} Type here instead`;
    if (role?.writer && this.#isNoteOfRole) {
      this.#note("");
    }
    this.terminal.options.cursorStyle = role?.writer ? "block" : "underline";
    if (!role?.writer) {
      this.#unsent = [];
    }
    this.#fitted();
  }

  // Gives up the role, or asks for it; if it is another's, a second time takes it.
  switchRole() {
    if (!this.#role) {
      return;
    }
    this.#wants = !this.#role.writer;
    if (this.#wants && this.#role.by && !this.#overtaking) {
      this.#overtaking = true;
      this.element.querySelector(".role").textContent = `Take it from ${this.#role.by}?`;
      return;
    }
    this.#say({ type: "ask", write: this.#wants, force: this.#overtaking });
    this.focus();
  }

  #showWho(people) {
    const lines = people.map((person) => {
      const notes = [person.writer ? "types" : "watches"];
      if (person.columns) {
        notes.push(`${person.columns}\u00d7${person.rows}`);
      }
      if (person.lag) {
        notes.push(`${bytes(person.lag)} behind`);
      }
      return `${person.name}${person.you ? " (you)" : ""}: ${notes.join(", ")}`;
    });
    this.#note(lines.join("\n"));
  }

  // The size

  #own() {
    const { cols: columns, rows } = this.fit.proposeDimensions() ?? {};
    if (Number.isFinite(columns) && Number.isFinite(rows)) {
      this.#fitting = { columns, rows };
    }
    return this.#fitting;
  }

  #fitted() {
    if (this.#closed || !this.terminal.element) {
      return;
    }
    const { columns, rows } = this.#own();
    if (this.element.dataset.columns !== `${columns}x${rows}`) {
      this.element.dataset.columns = `${columns}x${rows}`;
      this.#say({ type: "size", columns, rows });
    }
    // Who watches sees the guest's screen as large as it is for whoever has decided that.
    const shown = !this.#role?.writer && this.#size?.columns ? this.#size : { columns, rows };
    if (shown.columns !== this.terminal.cols || shown.rows !== this.terminal.rows) {
      this.terminal.resize(shown.columns, shown.rows);
      this.#recording?.resize(shown.columns, shown.rows);
    }
  }

  // The guest's size is this now, 0 x 0 where it is not known.
  sized({ columns, rows }) {
    this.#size = { columns, rows };
    this.#fitted();
  }

  enlarge(step) {
    const size = Math.min(32, Math.max(8, this.terminal.options.fontSize + step));
    this.terminal.options.fontSize = size;
    localStorage.setItem("size", size);
    this.#fitted();
  }

  // What stands around it

  #furnish() {
    const find = (selector) => this.element.querySelector(selector);
    find(".bar").onclick = ({ target }) => target.closest("button, summary") || this.focus();
    find(".role").onclick = () => this.switchRole();
    find(".close").onclick = () => this.desk.close(this);
    find(".close").title += " (Ctrl Alt X)";
    const menu = find(".menu");
    menu.onclick = ({ target }) => {
      if (target.dataset.do) {
        menu.open = false;
        this.do(target.dataset.do);
      }
    };
    menu.onkeydown = (event) => {
      if (event.key === "Escape") {
        menu.open = false;
        this.focus();
      }
    };
    menu.addEventListener("focusout", ({ relatedTarget }) => {
      if (relatedTarget && !menu.contains(relatedTarget)) {
        menu.open = false;
      }
    });
    const form = find(".find");
    const field = form.querySelector("input");
    const options = {
      decorations: {
        matchBackground: "#8a6d1f", activeMatchBackground: "#d98a2b",
        matchOverviewRuler: "#8a6d1f", activeMatchColorOverviewRuler: "#d98a2b",
      },
    };
    field.oninput = () => this.search.findPrevious(field.value, { ...options, incremental: true });
    form.onsubmit = (event) => {
      event.preventDefault();
      this.search.findNext(field.value, options);
    };
    form.querySelector(".before").onclick = () => this.search.findPrevious(field.value, options);
    form.onkeydown = (event) => {
      if (event.key === "Escape") {
        this.showFind(false);
      }
    };
    this.search.onDidChangeResults(({ resultIndex, resultCount }) => {
      form.querySelector(".found").textContent = resultCount
        ? `${resultIndex + 1} of ${resultCount}`
        : field.value && "nothing";
    });
  }

  showFind(shown) {
    const form = this.element.querySelector(".find");
    form.hidden = !shown;
    if (shown) {
      form.querySelector("input").select();
    } else {
      this.search.clearDecorations();
      this.focus();
    }
  }

  showMenu() {
    const menu = this.element.querySelector(".menu");
    menu.open = true;
    menu.querySelector("button").focus();
  }

  #file(kind) {
    const stamp = new Date().toISOString().replace(/[:.]/g, "-").slice(0, 19);
    return `${this.label.replace(/[^\w.-]+/g, "_")}-${stamp}.${kind}`;
  }

  #record() {
    const button = this.element.querySelector('[data-do="record"]');
    if (this.#recording) {
      save(this.#recording.blob(), this.#file("cast"));
    }
    this.#recording = this.#recording
      ? null
      : new Recording(this.label, this.terminal.cols, this.terminal.rows);
    this.element.classList.toggle("recording", Boolean(this.#recording));
    button.textContent = this.#recording ? "End and save the recording" : "Record from now on";
  }

  do(what) {
    switch (what) {
      case "split":
        this.desk.choose();
        return;
      case "find":
        this.showFind(true);
        return;
      case "who":
        this.#say({ type: "ask-who" });
        break;
      case "history":
      case "recording": {
        const query = new URLSearchParams({ guest: this.guest, port: this.port });
        const link = document.createElement("a");
        link.href = `${what}?${query}`;
        link.download = "";
        link.click();
        break;
      }
      case "screen": {
        const text = this.serialize.serialize({ scrollback: 0 });
        save(new Blob([text, "\n"], { type: "application/octet-stream" }), this.#file("ans"));
        break;
      }
      case "record":
        this.#record();
        break;
      case "larger":
        this.enlarge(1);
        break;
      case "smaller":
        this.enlarge(-1);
        break;
    }
    this.focus();
  }
}
