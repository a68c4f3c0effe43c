// xterm.js writes style elements and style attributes, which a strict Content-Security-Policy
// forbids, though not what they do: the same goes through the CSSOM. To be imported before it.

const create = Document.prototype.createElement;
const setAttribute = Element.prototype.setAttribute;

// Returns an element that stands for a style sheet of the document's as long as it is in use.
function sheetElement() {
  const element = create.call(document, "template");
  const sheet = new CSSStyleSheet();
  const others = () => document.adoptedStyleSheets.filter((each) => each !== sheet);
  Object.defineProperty(element, "textContent", {
    get: () => "",
    set: (text) => {
      sheet.replaceSync(text);
      document.adoptedStyleSheets = [...others(), sheet];
    },
  });
  element.remove = () => {
    document.adoptedStyleSheets = others();
    Element.prototype.remove.call(element);
  };
  return element;
}

Document.prototype.createElement = function (name, options) {
  return String(name).toLowerCase() === "style" ? sheetElement() : create.call(this, name, options);
};

Element.prototype.setAttribute = function (name, value) {
  if (name === "style" && this.style) {
    this.style.cssText = value;
  } else {
    setAttribute.call(this, name, value);
  }
};
