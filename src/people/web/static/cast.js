// A recording of a console as the page sees it: asciicast v3, with the times at which bytes came.

const MOST = 64 << 20;

export class Recording {
  #decoder = new TextDecoder(); // keeps the beginning of a character until its end has come
  #last = performance.now();
  #size = 0;
  #lines;

  constructor(title, columns, rows) {
    const timestamp = Math.floor(Date.now() / 1000);
    const header = { version: 3, term: { cols: columns, rows }, timestamp, title };
    this.#lines = [JSON.stringify(header)];
  }

  // Whether it holds as much as a page should.
  get full() {
    return this.#size > MOST;
  }

  #add(code, data) {
    const now = performance.now();
    const line = JSON.stringify([Math.round(now - this.#last) / 1000, code, data]);
    this.#last = now;
    this.#size += line.length;
    this.#lines.push(line);
  }

  output(bytes) {
    const text = this.#decoder.decode(bytes, { stream: true });
    if (text) {
      this.#add("o", text);
    }
  }

  resize(columns, rows) {
    this.#add("r", `${columns}x${rows}`);
  }

  blob() {
    return new Blob([this.#lines.join("\n"), "\n"], { type: "application/x-asciicast" });
  }
}

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
