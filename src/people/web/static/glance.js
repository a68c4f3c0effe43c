// Small pictures of screens: one terminal that nobody sees reads what a guest wrote last, and what
// it would show is drawn on a canvas.

import { Terminal } from "./vendor/xterm.js";
import { palette, theme } from "./colours.js";

const MOST = 400;
const MARGIN = 12;
const linkHandler = { activate() {} };
const terminal = new Terminal({ scrollback: 0, allowProposedApi: true, linkHandler });
let last = Promise.resolve();

// Draws `bytes` of a console of so many columns and rows, 0 where that is not known.
export function draw(canvas, bytes, columns, rows) {
  last = last.then(
    () =>
      new Promise((done) => {
        terminal.resize(Math.min(columns || 80, MOST), Math.min(rows || 24, MOST));
        terminal.reset();
        terminal.write(bytes, () => {
          paint(canvas);
          done();
        });
      }),
  );
}

function colour(cell, isText) {
  const [isDefault, isRgb, value] = isText
    ? [cell.isFgDefault(), cell.isFgRGB(), cell.getFgColor()]
    : [cell.isBgDefault(), cell.isBgRGB(), cell.getBgColor()];
  if (isDefault) {
    return isText ? theme().foreground : theme().background;
  }
  return isRgb ? `#${value.toString(16).padStart(6, "0")}` : palette(value);
}

function paint(canvas) {
  const context = canvas.getContext("2d");
  const { cols, rows } = terminal;
  const width = (canvas.width - 2 * MARGIN) / cols;
  const height = Math.min((canvas.height - 2 * MARGIN) / rows, width * 2.2);
  context.resetTransform();
  context.fillStyle = theme().background;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.translate(MARGIN, MARGIN);
  context.font = `${height * 0.82}px ui-monospace, monospace`;
  context.textBaseline = "middle";
  const buffer = terminal.buffer.active;
  const cell = buffer.getNullCell();
  for (let row = 0; row < rows; row++) {
    const line = buffer.getLine(buffer.viewportY + row);
    for (let column = 0; line && column < cols; column++) {
      if (!line.getCell(column, cell) || cell.getWidth() === 0) {
        continue;
      }
      const inverse = Boolean(cell.isInverse());
      const text = cell.getChars();
      const back = colour(cell, inverse);
      if (back !== theme().background) {
        context.fillStyle = back;
        context.fillRect(column * width, row * height, width * cell.getWidth() + 0.5, height + 0.5);
      }
      if (text && text !== " ") {
        context.fillStyle = colour(cell, !inverse);
        context.fillText(text, column * width, (row + 0.5) * height, width * cell.getWidth() * 1.1);
      }
    }
  }
}
